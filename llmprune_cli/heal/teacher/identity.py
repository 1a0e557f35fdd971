"""Whether a teacher is the right one."""

from __future__ import annotations

from dataclasses import asdict

from llmprune_cli.errors import CheckpointError, UnsupportedError
from llmprune_cli.family.widths import read_widths
from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.folder.manifest import Manifest
from llmprune_cli.plan.document import fingerprint


def check_teacher(pruned: Checkpoint, manifest: Manifest | None, teacher: Checkpoint) -> None:
    """Hold a teacher against what the pruned model says it was made from, by configurations and headers alone.

    Raises:
        CheckpointError: it is another one.
    """
    kinds = pruned.config.model_type, teacher.config.model_type
    if kinds[0] != kinds[1]:
        raise CheckpointError(
            f"{teacher.source} is a {kinds[1]} model and {pruned.source} a {kinds[0]} one. Give the --teacher that it "
            "was made from."
        )
    if manifest is None or manifest.source_fingerprint is None or manifest.widths is None:
        return
    try:
        widths = asdict(read_widths(teacher.config))
    except UnsupportedError:
        widths = {}
    before = manifest.widths.before
    differing = [name for name in before if name in widths and widths[name] != before[name]]
    if manifest.source_fingerprint != fingerprint(teacher) and differing:
        name = differing[0]
        raise CheckpointError(
            f"{pruned.source} was not made from {teacher.source}, whose {name} is {widths.get(name)} and not "
            f"{before[name]}: llmprune.json names {manifest.source}. Give that as --teacher."
        )
