"""What `sweep` is asked for, see `llmprune_cli.options`."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

from llmprune_cli.choose.importances import needs_text
from llmprune_cli.commands.named_options import options_of
from llmprune_cli.commands.requests import PruneRequest, check_prune
from llmprune_cli.errors import UsageError
from llmprune_cli.heal.options import count_tokens
from llmprune_cli.options import (
    GOES,
    METHOD,
    OUTPUT,
    SIZE,
    Choice,
    Delivery,
    ModelReference,
    Option,
    Scratch,
    Text,
    WidthRequest,
)
from llmprune_cli.processes import is_first
from llmprune_cli.sizes import WHOLE, check_chart, check_ratio, parse_budget, parse_ratio

# Options of `prune` that say what is tried, and those that one text and one model for all points leave no room for.
LEFT_OUT = (
    *(own.name for own in options_of(WidthRequest) if own.name not in ("round_to", "keep_layers")),
    *(
        "target",
        "target_params",
        "target_size",
        "target_speedup",
        "target_batch",
        "context",
        "layer_importance",
        "rotate",
    ),
)


def _listed(text: str, read: Callable[[str], Any]) -> tuple[Any, ...]:
    """The values of a list such as `90%,80%`.

    Raises:
        UsageError: there are none, one cannot be read, or is there twice.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    values = [read(part) for part in parts]
    if not values:
        raise UsageError("give a list such as 90%,80%,70%.")
    twice = [part for number, part in enumerate(parts) if values[number] in values[:number]]
    if twice:
        raise UsageError(f"{twice[0]} is there twice.")
    return tuple(values)


def _targets(text: str) -> tuple[str, ...]:
    _listed(text, parse_budget)
    return _listed(text, lambda part: "".join(part.split()))


def _ratio(text: str) -> float:
    ratio = parse_ratio(text)
    check_ratio(ratio)
    if not ratio:
        raise UsageError("0 removes nothing, and the unpruned model is in the table anyway.")
    return ratio


def _percent(ratio: float) -> str:
    """How a ratio is called in tables and names of files."""
    return f"{100 * ratio:g}%"


def _ratios(text: str) -> tuple[float, ...]:
    ratios: tuple[float, ...] = _listed(text, _ratio)
    shown = [_percent(ratio) for ratio in ratios]
    alike = [name for name in shown if shown.count(name) > 1]
    if alike:
        raise UsageError(f"two ratios come to {alike[0]}; leave out one of them.")
    return ratios


def _count(text: str) -> int:
    if not re.fullmatch(WHOLE, text) or not int(text):
        raise UsageError(f"give numbers of layers such as 28,26,24, not {text!r}.")
    return int(text)


def _counts(text: str) -> tuple[int, ...]:
    return _listed(text, _count)


def _of(what: str, is_common: bool = False) -> Option:
    about = f"Fractions to remove of the {what}{', such as 10%,20%,30%' if is_common else ''}."
    return Option(about, GOES, parse=_ratios, is_common=is_common)


@dataclass(frozen=True)
class Points:
    """What is tried, which is one of these."""

    targets: Annotated[
        tuple[str, ...] | None,
        Option("Sizes to try, each as --target of prune: 90%,80%,70%,60%.", SIZE, is_common=True, parse=_targets),
    ] = None
    mlp: Annotated[tuple[float, ...] | None, _of("MLP neurons", is_common=True)] = None
    heads: Annotated[tuple[float, ...] | None, _of("query heads")] = None
    kv_groups: Annotated[tuple[float, ...] | None, _of("KV groups, with their query heads")] = None
    hidden: Annotated[tuple[float, ...] | None, _of("hidden channels")] = None
    depths: Annotated[
        tuple[int, ...] | None, Option("Numbers of layers to keep, such as 28,26,24.", GOES, parse=_counts)
    ] = None

    def __post_init__(self) -> None:
        """Refuse none of them, and several."""
        given = [own.name for own in fields(self) if getattr(self, own.name) is not None]
        if not given:
            raise UsageError("say what to try: --targets 90%,80%,70%, or one width such as --mlp 10%,20%,30%.")
        if len(given) > 1:
            shown = " and ".join(f"--{name.replace('_', '-')}" for name in given)
            raise UsageError(f"a sweep varies one thing; give {shown} one at a time.")

    def choices(self, choice: Choice) -> dict[str, Choice]:
        """The request of each point, by what it is called: also its file or folder."""
        if self.targets is not None:
            return {target: replace(choice, target=target) for target in self.targets}
        if self.depths is not None:
            return {f"{count}-layers": _with(choice, "num_hidden_layers", count) for count in self.depths}
        name, attribute = next((n, a) for n, a in RATIOS.items() if getattr(self, n) is not None)
        return {f"{name}-{_percent(ratio)}": _with(choice, attribute, ratio) for ratio in getattr(self, name)}


RATIOS = {
    "mlp": "intermediate_pruning_ratio",
    "heads": "head_pruning_ratio",
    "kv_groups": "kv_group_pruning_ratio",
    "hidden": "hidden_pruning_ratio",
}


def _with(choice: Choice, width: str, value: float) -> Choice:
    return replace(choice, widths=replace(choice.widths, **{width: value}))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Kept:
    """What is written, and where to."""

    output: Annotated[
        Path | None, Option("Folder to write: a plan for each point, and the figures.", OUTPUT, short="-o")
    ] = None
    overwrite: Annotated[bool, Option("Replace the sweep that --output names.", OUTPUT)] = False
    keep_models: Annotated[bool, Option("Keep the models there, too.", OUTPUT)] = False
    recover: Annotated[
        str | None,
        Option("Tokens to heal each size on, such as 1M, before it is judged.", METHOD, check=count_tokens),
    ] = None
    report: Annotated[
        Path | None, Option("Draw size against quality and speed into a .png or .svg file.", OUTPUT, check=check_chart)
    ] = None


@dataclass(frozen=True)
class Sweep:
    """What `sweep` takes beside the model."""

    points: Points
    choice: Choice = field(default_factory=Choice)  # for all points
    text: Text = field(default_factory=Text)
    delivery: Kept = field(default_factory=Kept)
    scratch: Scratch = field(default_factory=Scratch)

    def __post_init__(self) -> None:
        """Refuse what contradicts itself, or would do nothing."""
        if self.delivery.output is None:
            for name, value in (("--resume", self.scratch.resume), ("--keep-models", self.delivery.keep_models)):
                if value:
                    raise UsageError(f"{name} needs the folder that all is kept in; give --output DIR.")
        if not all(needs_text(choice, has_plan=False) for choice in self.points.choices(self.choice).values()):
            raise UsageError("a sweep judges on text; give a --refit or an --importance that reads some.")

    def requests(self, model: ModelReference, place: Path) -> dict[str, PruneRequest]:
        """What `prune` would be asked for, by the names of the points.

        Args:
            place: folder for what is written.
        """
        scratch = replace(self.scratch, resume=False)  # the sweep as a whole goes on
        return {
            name: PruneRequest(
                model, choice, self.text, Delivery(output=place / name, recover=self.delivery.recover), scratch
            )
            for name, choice in self.points.choices(self.choice).items()
        }


def check_sweep(model: ModelReference, asked: Sweep) -> None:
    """Refuse what can be refused in a moment, before any library is loaded; nothing is written.

    Raises:
        LlmpruneError: see there.
    """
    from llmprune_cli.folder.documents import check_own_folder, is_there
    from llmprune_cli.folder.staging import check_target as check_output
    from llmprune_cli.folder.staging import hidden_folder
    from llmprune_cli.report.chart import check_chart_target

    delivery = asked.delivery
    if is_first() and delivery.output is not None:
        source = Path(model.name)
        check_output(delivery.output, delivery.overwrite, source if is_there(source) else None)
    if is_first() and delivery.report is not None:
        check_chart_target(delivery.report, delivery.output)
    folders = ((asked.scratch.statistics, "--statistics"), (asked.scratch.offload_dir, "--offload-dir"))
    for folder, option in folders:
        if folder is not None:
            check_own_folder(folder, option, (delivery.output,))
    place = hidden_folder(delivery.output or Path(tempfile.gettempdir(), "sweep"))  # the output may hold older models
    for request in asked.requests(model, place).values():
        check_prune(request)
