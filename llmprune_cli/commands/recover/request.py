"""What `recover` takes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llmprune_cli.commands.push import check_push_to
from llmprune_cli.errors import CheckpointError, UsageError
from llmprune_cli.heal import ON_ANSWERS
from llmprune_cli.heal.options import Healed, Healing, Teaching, check_packages
from llmprune_cli.options import ModelReference
from llmprune_cli.processes import is_first

if TYPE_CHECKING:
    from llmprune_cli.commands.requests import PruneRequest
    from llmprune_cli.folder.manifest import Manifest

SPLITS = {  # what a launcher asks for
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
YES = ("y", "yes", "t", "true", "on", "1")


@dataclass(frozen=True)
class RecoverRequest:
    """What `recover` takes."""

    model: ModelReference
    healing: Healing = field(default_factory=Healing)
    teaching: Teaching = field(default_factory=Teaching)
    delivery: Healed = field(default_factory=Healed)
    is_command: bool = True  # whether `recover` was asked for, and not another command that heals, with fewer options
    may_go_on: bool = True  # whether the command can be given again with --resume

    def __post_init__(self) -> None:
        """Refuse what contradicts itself, or would do nothing."""
        if self.delivery.output is None:
            raise UsageError("give --output DIR.")
        if self.teaching.teacher_cache is not None and self.teaching.teacher_mode == "resident":
            raise UsageError("--teacher-cache is for a streamed teacher; leave out --teacher-mode resident.")
        is_streamed = self.teaching.teacher_mode == "streamed" or self.teaching.teacher_cache is not None
        if is_streamed and self.healing.needs_all_of_teacher:
            raise UsageError(
                f"--loss {self.healing.loss} needs what the teacher would not say, too, of which a streamed one keeps "
                "next to nothing; leave out --teacher-mode and --teacher-cache, or give --loss kl."
            )
        if self.healing.mode == "blocks" and (self.teaching.teacher_mode != "auto" or self.teaching.teacher_cache):
            raise UsageError(
                "--mode blocks runs the teacher beside the pruned model, layer by layer; leave out --teacher-mode and "
                "--teacher-cache."
            )
        if self.healing.mode == "blocks" and self.delivery.report_to:
            raise UsageError(
                "--mode blocks trains one layer after the other and has no loss of all; leave out --report-to."
            )
        split = next((kind for name, kind in SPLITS.items() if os.environ.get(name, "").lower() in YES), None)
        if split is not None:
            raise UsageError(
                f"healing trains a whole model in each process, and {split} would split it. Launch it without that; "
                "less memory is needed with --lora, --train layers, --optimizer adamw-8bit or --mode blocks."
            )
        if self.model.device.startswith("cuda:"):
            raise UsageError(
                f"training takes the first GPU that it sees; set CUDA_VISIBLE_DEVICES to choose one, "
                f"and leave out --device {self.model.device}."
            )

    @property
    def output(self) -> Path:
        """The folder to write."""
        assert self.delivery.output is not None
        return self.delivery.output


def healing_of(pruning: PruneRequest, pruned: Path, delivery: Healed, may_go_on: bool = True) -> RecoverRequest:
    """What heals the model of a `prune --recover`, or of a sweep.

    Args:
        pruned: folder that it was pruned into.
        may_go_on: see `RecoverRequest`.

    Raises:
        UsageError: nothing can be trained where it is pruned.
    """
    reference = replace(pruning.model, name=str(pruned), revision=None, dtype=None)
    return RecoverRequest(reference, pruning.healing, delivery=delivery, is_command=False, may_go_on=may_go_on)


def teacher_reference(given: str | None, pruned: ModelReference, manifest: Manifest | None) -> ModelReference:
    """The model to learn from: the one that was named, else the one that the pruned model was made from.

    Raises:
        CheckpointError: nothing says which.
    """
    if given is not None:
        return ModelReference(given, trust_remote_code=pruned.trust_remote_code, device=pruned.device)
    if manifest is None or manifest.source is None:
        raise CheckpointError(f"{pruned.name} has no llmprune.json that says what it was made from. Give --teacher.")
    dtype = (manifest.options or {}).get("dtype")
    return ModelReference(
        manifest.source,
        manifest.revision,
        trust_remote_code=pruned.trust_remote_code,
        dtype=dtype if isinstance(dtype, str) else None,
        device=pruned.device,
    )


@contextmanager
def teacher_explained(request: RecoverRequest, teacher: ModelReference) -> Iterator[None]:
    """Say of a teacher that cannot be read who named it, where that was not the user."""
    try:
        yield
    except CheckpointError as error:
        if request.teaching.teacher is not None:
            raise
        raise CheckpointError(
            f"{request.model.name} was made from {teacher.name}, which cannot be read: {error} Give --teacher if it "
            "lies elsewhere."
        ) from error


def check_recover(request: RecoverRequest) -> None:
    """Refuse what can be refused in a moment.

    Raises:
        LlmpruneError: see there.
    """
    from llmprune_cli.folder.documents import check_own_folder, is_there
    from llmprune_cli.folder.staging import check_target as check_output
    from llmprune_cli.startup.model_argument import check_model, check_tokenizer
    from llmprune_cli.text.names import check_column, check_split, check_texts, holds_conversations

    check_packages(request.healing, request.delivery.report_to)
    check_model(request.model, needs_weights=True)
    check_tokenizer(request.model.name)
    check_texts(request.healing.text, request.healing.text_column)
    check_column(request.healing.text_column, request.healing.text)
    if request.healing.loss_on == ON_ANSWERS and not holds_conversations(request.healing.text):
        raise UsageError(
            f"--loss-on {ON_ANSWERS} is about conversations, and {request.healing.text or 'the default text'} has "
            "none. Give --text with some, or leave it out."
        )
    check_split(request.healing.text, request.healing.text_split, Healing.text_split, "--text-split")
    if is_first():
        source = Path(request.model.name)
        check_output(request.output, request.delivery.overwrite, source if is_there(source) else None)
        check_push_to(request.delivery.push_to, request.delivery.public)
    teacher = _known_teacher(request)
    if request.teaching.teacher_cache is not None:
        models = (request.output, *(Path(own.name) for own in (request.model, teacher) if own is not None))
        check_own_folder(request.teaching.teacher_cache, "--teacher-cache", models)
    if teacher is not None:
        with teacher_explained(request, teacher):
            check_model(teacher, needs_weights=True)
        check_tokenizer(teacher.name)


def _known_teacher(request: RecoverRequest) -> ModelReference | None:
    """The teacher, where the user names it or the pruned model's folder is here; None where it is not known yet."""
    from llmprune_cli.folder.manifest import MANIFEST_NAME, read_manifest

    folder, given = Path(request.model.name), request.teaching.teacher
    if not folder.is_dir():
        return None if given is None else teacher_reference(given, request.model, None)
    manifest = read_manifest(folder) if (folder / MANIFEST_NAME).exists() else None
    return teacher_reference(given, request.model, manifest)
