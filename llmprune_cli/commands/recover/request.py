"""What `recover` takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from llmprune_cli.errors import UsageError
from llmprune_cli.heal.options import Healed, Healing, Teaching
from llmprune_cli.options import ModelReference
from llmprune_cli.processes import is_first


@dataclass(frozen=True)
class RecoverRequest:
    """What `recover` takes."""

    model: ModelReference
    healing: Healing = field(default_factory=Healing)
    teaching: Teaching = field(default_factory=Teaching)
    delivery: Healed = field(default_factory=Healed)

    def __post_init__(self) -> None:
        """Refuse what contradicts itself, or would do nothing."""
        if self.delivery.output is None:
            raise UsageError("give --output DIR.")
        if self.teaching.teacher_cache is not None and self.teaching.teacher_mode == "resident":
            raise UsageError("--teacher-cache is for a streamed teacher; leave out --teacher-mode resident.")
        if self.healing.mode == "blocks" and (self.teaching.teacher_mode != "auto" or self.teaching.teacher_cache):
            raise UsageError(
                "--mode blocks runs the teacher beside the pruned model, layer by layer; leave out --teacher-mode and "
                "--teacher-cache."
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


def check_recover(request: RecoverRequest) -> None:
    """Refuse what can be refused in a moment; what the pruned model says of its teacher is looked at later.

    Raises:
        LlmpruneError: see there.
    """
    from llmprune_cli.folder.documents import is_there
    from llmprune_cli.folder.staging import check_target as check_output
    from llmprune_cli.startup.model_argument import check_model, check_tokenizer
    from llmprune_cli.text.names import check_text, parts_of

    models = [request.model]
    if request.teaching.teacher is not None:
        models.append(ModelReference(request.teaching.teacher))
    for model in models:
        check_model(model, needs_weights=True)
        check_tokenizer(model.name)
    for part in parts_of(request.healing.text) if request.healing.text is not None else ():
        check_text(part.name)
    if is_first():
        source = Path(request.model.name)
        check_output(request.output, request.delivery.overwrite, source if is_there(source) else None)
