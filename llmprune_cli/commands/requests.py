"""What each command takes, and how named options become these values, whoever names them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from llmprune_cli.choose import IMPORTANCES, LAYER_IMPORTANCES, needs_text
from llmprune_cli.errors import UsageError
from llmprune_cli.formats import FORMATS
from llmprune_cli.options import (
    ROTATES,
    Choice,
    Conversion,
    Delivery,
    Evaluation,
    ModelReference,
    Option,
    Scratch,
    Text,
)
from llmprune_cli.repair import REFITS
from llmprune_cli.vocabulary.request import VocabularyRequest

DTYPES = ("float32", "float16", "bfloat16")
# The values that an option has to be one of.
CHOICES: dict[tuple[type, str], tuple[str, ...]] = {
    (Choice, "importance"): tuple(IMPORTANCES),
    (Choice, "layer_importance"): tuple(LAYER_IMPORTANCES),
    (Choice, "refit"): tuple(REFITS),
    (Choice, "compute_dtype"): ("auto", *DTYPES),
    (ModelReference, "dtype"): DTYPES,
    (Conversion, "format"): tuple(FORMATS),
}


@dataclass(frozen=True)
class PruneRequest:
    """What `prune` takes."""

    model: ModelReference
    choice: Choice
    text: Text = field(default_factory=Text)
    delivery: Delivery = field(default_factory=Delivery)
    scratch: Scratch = field(default_factory=Scratch)
    evaluation: Evaluation | None = None  # None: nothing is evaluated
    vocabulary: VocabularyRequest = field(default_factory=VocabularyRequest)

    def __post_init__(self) -> None:
        """Refuse what contradicts itself, or would do nothing."""
        self._check_what_goes()
        delivery, scratch, evaluates = self.delivery, self.scratch, self.evaluation is not None
        if delivery.output is None and not (delivery.dry_run or evaluates or delivery.save_plan):
            raise UsageError("give --output DIR, or --dry-run, --save-plan or --eval.")
        if self.choice.rotate and (delivery.plan or delivery.save_plan or scratch.resume):
            raise UsageError(ROTATES)
        if scratch.resume and (delivery.output is None or delivery.dry_run):
            raise UsageError("--resume goes on with a run that writes a model; give its --output, and no --dry-run.")
        if delivery.dry_run and evaluates:
            raise UsageError("--dry-run makes no model to evaluate; leave out --eval.")
        if delivery.report and (delivery.dry_run or not self.needs_text or not (delivery.output or evaluates)):
            raise UsageError(
                "--report draws what calibration measures on a pruned model: give --output or --eval, and a --refit or "
                "an --importance that reads text."
            )
        folders = (("--statistics", scratch.statistics), ("--offload-dir", scratch.offload_dir))
        for name, value in (*folders, ("--resume", scratch.resume)):
            if value and not self.needs_text:
                raise UsageError(f"{name} is for runs that calibrate; give another --importance or --refit.")

    def _check_what_goes(self) -> None:
        widths, plan = self.choice.widths, self.delivery.plan
        asked = not widths.is_empty or self.choice.budget is not None or self.vocabulary.vocab_size is not None
        if self.vocabulary.vocab_size is not None:
            if self.choice.budget is not None or self.choice.rotate:
                raise UsageError("--vocab-size goes with widths; leave out targets and --rotate.")
            if self.scratch.resume or self.evaluation is not None or self.delivery.report is not None:
                raise UsageError(
                    "--vocab-size changes the tokens that a text has, so that --eval, --report and --resume do not go "
                    "with it. Prune first."
                )
        if self.choice.budget is not None and plan is not None:
            raise UsageError("a target chooses the widths; leave out the width options and --plan.")
        if plan is not None and (asked or widths.keep_layers):
            raise UsageError("a plan already says which widths; give --plan or width options, not both.")
        if plan is None and not asked:
            raise UsageError("say what to prune: --target-params, --pruning-ratio, a width of its own, or --plan.")

    @property
    def needs_text(self) -> bool:
        """Whether anything is measured on calibration text."""
        return needs_text(self.choice, self.delivery.plan is not None)

    @property
    def needs_weights(self) -> bool:
        """Whether headers and configuration are not enough."""
        delivery = self.delivery
        return not delivery.dry_run or delivery.save_plan is not None or self.choice.budget is not None

    @property
    def writes(self) -> bool:
        """Whether a model is written, if only to be evaluated."""
        return not self.delivery.dry_run and (self.delivery.output is not None or self.evaluation is not None)


# --- options by name ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NamedOption:
    """One option of a command."""

    name: str  # what it is called everywhere
    attribute: str  # of the value that holds it
    option: Option
    kind: Any  # its type, without the annotation
    default: Any
    choices: tuple[str, ...]  # that it has to be one of; empty where any will do


def options_of(kind: Any) -> tuple[NamedOption, ...]:
    """The options that a value is made of, those of the values in it included."""
    hints = get_type_hints(kind, include_extras=True)
    found: list[NamedOption] = []
    for own in fields(kind):
        hint = hints[own.name]
        if is_dataclass(hint):
            found += options_of(hint)
        elif get_origin(hint) is Annotated:
            plain, option = get_args(hint)
            choices = CHOICES.get((kind, own.name), ())
            found.append(NamedOption(option.name or own.name, own.name, option, plain, own.default, choices))
    return tuple(found)


def make(kind: Any, named: Mapping[str, Any]) -> Any:
    """A value of those of the named options that it is made of; the others keep their defaults.

    Raises:
        UsageError: they contradict each other.
    """
    hints, values = get_type_hints(kind), {}
    for own in fields(kind):
        if is_dataclass(hints[own.name]):
            values[own.name] = make(hints[own.name], named)
    values |= {own.attribute: named[own.name] for own in _direct(kind) if own.name in named}
    return kind(**values)


def _direct(kind: Any) -> list[NamedOption]:
    return [own for own in options_of(kind) if own.attribute in {f.name for f in fields(kind)}]


def refuse_unknown(names: Iterable[str], known: Iterable[str], where: str) -> None:
    """Make sure that options exist.

    Raises:
        UsageError: one does not; the message names one that is nearly called so.
    """
    every = list(known)
    for name in names:
        if name not in every:
            near = get_close_matches(name, every, 1)
            advice = f"; did you mean {near[0]}?" if near else f". There are: {', '.join(sorted(every))}."
            raise UsageError(f"{where} has no option {name}{advice}")
