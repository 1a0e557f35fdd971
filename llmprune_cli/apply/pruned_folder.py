"""The folder that a pruned model is written to."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from llmprune_cli.apply.multimodal import names_within, put_back
from llmprune_cli.apply.surgery import pruned_entries, pruned_tensors, remaining
from llmprune_cli.apply.vocabulary.rows import cut_rows
from llmprune_cli.choose.selection import make_random_plan
from llmprune_cli.coupling.subject import Subject
from llmprune_cli.coupling.trace import Keep, Trace
from llmprune_cli.errors import VerificationError
from llmprune_cli.family.architecture import Architecture, with_widths
from llmprune_cli.family.written import write_config, write_whole_config
from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.folder.manifest import Manifest, Numbers, WidthNumbers, write_manifest
from llmprune_cli.folder.shards import read_index, write_shards
from llmprune_cli.journal.keys import versions
from llmprune_cli.plan.document import Plan, Vocabulary
from llmprune_cli.plan.requested_widths import Target
from llmprune_cli.progress import QUIET, Listener
from llmprune_cli.source.tokenizer import copy_companions
from llmprune_cli.vocabulary.rewriting import write_tokenizer
from llmprune_cli.vocabulary.size import cut_config, cut_whole, vocabulary_axes


def write_pruned(
    subject: Subject,
    plan: Plan,
    folder: Path,
    manifest: Manifest,
    max_shard_bytes: int,
    listener: Listener,
) -> dict[str, str]:
    """Stream every tensor through the plan into a folder, with everything a stock loader needs beside it.

    Returns:
        The SHA-256 of each shard, by file name.

    Raises:
        VerificationError: what was written is not what the plan predicts.
    """
    checkpoint = subject.checkpoint
    entries = pruned_entries(checkpoint, subject.trace, plan)
    listener.stage("Writing", checkpoint.size_bytes)
    tensors = pruned_tensors(checkpoint, subject.trace, plan, listener.advance, subject.folded_norms)
    config = with_widths(subject.architecture, plan.after, plan.layers)
    if plan.vocabulary is not None:
        entries, tensors = cut_rows(entries, tensors, vocabulary_axes(config), plan.vocabulary.kept)
        config = cut_config(config, plan.vocabulary.kept)
    if checkpoint.whole is None:
        write_config(config, folder)
    else:
        stored = names_within(checkpoint, remaining(checkpoint, subject.trace, plan)[1])
        entries, tensors = put_back(checkpoint, checkpoint.whole, stored, entries, tensors)
        whole = checkpoint.whole.config
        if plan.vocabulary is not None:
            whole = cut_whole(whole, plan.vocabulary.kept)
        write_whole_config(whole, checkpoint.config, config, folder)
    checksums = write_shards(folder, entries, tensors, max_shard_bytes)
    copy_companions(checkpoint, folder)
    if plan.vocabulary is not None and (folder / "tokenizer.json").is_file():  # a twin has none
        write_tokenizer(checkpoint, folder, plan.vocabulary.kept)
    write_manifest(folder, manifest)
    written = {entry.name: entry.shape for entry in read_index(folder)}
    if written != {entry.name: entry.shape for entry in entries}:
        raise VerificationError("The written headers differ from the plan. Nothing was kept; please report this.")
    return checksums


def make_manifest(
    checkpoint: Checkpoint,
    plan: Plan,
    parameters: Numbers,
    size_bytes: Numbers,
    options: dict[str, Any],
    recipe: dict[str, Any],
) -> Manifest:
    """What the folder's `llmprune.json` says about how it was made.

    Args:
        options: that were asked for.
        recipe: what repeats the run, see `recipe_of`.
    """
    vocabulary = plan.vocabulary
    rows = ({"vocab_size": vocabulary.before}, {"vocab_size": len(vocabulary.kept)}) if vocabulary else ({}, {})
    return Manifest(
        source=checkpoint.source,
        revision=checkpoint.revision,
        source_fingerprint=plan.fingerprint,
        versions=versions(),
        options=options,
        recipe=recipe,
        widths=WidthNumbers({**asdict(plan.before), **rows[0]}, {**asdict(plan.after), **rows[1]}),
        layers=plan.layers,
        protected_layers=plan.protected,
        parameters=parameters,
        size_bytes=size_bytes,
        deviations=plan.deviations,
        dropped_tensors=checkpoint.dropped,
        renamed_tensors=dict(checkpoint.renamed),
    )


def prune_twin(
    source: Path,
    target: Path,
    traced: Trace,
    architecture: Architecture,
    cut: Target,
    vocabulary: Vocabulary | None = None,
) -> Keep:
    """Prune a saved twin as a user's model is pruned, at random.

    Args:
        vocabulary: the tokens that stay; None keeps all.
    """
    checkpoint = Checkpoint(source, "twin", None, architecture.config, read_index(source), True, source)
    subject = Subject(checkpoint, architecture, traced)
    plan = replace(make_random_plan(subject, cut, QUIET), vocabulary=vocabulary)
    write_pruned(subject, plan, target, Manifest(), 2**62, QUIET)
    return plan.keep
