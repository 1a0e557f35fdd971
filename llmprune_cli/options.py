"""What a command is asked for, as values: a command line, a file and Python give the same ones.

The annotation of a field says how it is offered. `name` is what it is called everywhere: `--layers`, `layers: 27`,
`layers=27`; by default the field's own name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

from llmprune_cli.errors import PlanError, UsageError
from llmprune_cli.sizes import (
    TARGETS,
    Budget,
    check_chart,
    check_config,
    check_device,
    check_ratio,
    check_seed,
    check_speedup,
    parse_batch,
    parse_dtype,
    parse_layers,
    parse_ratio,
    parse_size,
    parse_speedup,
)

DEFAULT_IMPORTANCE, DEFAULT_REFIT = "consensus", "residual"
SIZE, GOES, TEXT, METHOD = "Size", "What goes", "Calibration", "Method"
EVALUATION, OUTPUT, MACHINE = "Evaluation", "Output", "Machine"
PANELS = (SIZE, GOES, TEXT, METHOD, EVALUATION, OUTPUT, MACHINE)  # in their order


@dataclass(frozen=True)
class Option:
    """How a field is offered."""

    help: str
    panel: str  # of `--help`
    name: str = ""  # what it is called, where that is not the field's name
    least: int | None = None
    left_out: str = ""  # what happens where it is not given, in words; else its default is shown
    is_common: bool = False  # shown first
    check: Callable[[Any], None] | None = None  # raises UsageError
    parse: Callable[[str], Any] | None = None  # from a text to the value
    short: str = ""  # another flag, for people at a keyboard


def _ratio(what: str, short: str = "", is_common: bool = False) -> Option:
    about = f"Fraction to remove of the {what}" + (", such as 0.25 or 25%." if is_common else ".")
    return Option(about, GOES, check=check_ratio, is_common=is_common, parse=parse_ratio, short=short)


def _size(what: str) -> Option:
    return Option(f"Exact {what} to keep.", GOES, least=1)


@dataclass(frozen=True)
class ModelReference:
    """Which model, and how it is loaded."""

    name: str  # folder, .gguf file or hub id
    revision: Annotated[str | None, Option("Branch, tag or commit of a hub id.", MACHINE)] = None
    trust_remote_code: Annotated[bool, Option("Run code that comes with the checkpoint.", MACHINE)] = False
    dtype: Annotated[
        str | None,
        Option(
            "Dtype to dequantize to, or to eval in.", MACHINE, left_out="as stored; else bfloat16", parse=parse_dtype
        ),
    ] = None
    device: Annotated[str, Option("auto, cpu, cuda, cuda:N or mps.", MACHINE, check=check_device)] = "auto"


@dataclass(frozen=True)
class WidthRequest:
    """The widths that the user asked for; an exact size beats a ratio, a width's own ratio beats `pruning_ratio`."""

    pruning_ratio: Annotated[float | None, _ratio("hidden size, heads and MLP, together")] = None
    hidden_pruning_ratio: Annotated[float | None, _ratio("hidden channels", "--hidden")] = None
    head_pruning_ratio: Annotated[float | None, _ratio("query heads, evenly in every KV group", "--heads")] = None
    kv_group_pruning_ratio: Annotated[float | None, _ratio("KV groups, with their query heads", "--kv-groups")] = None
    intermediate_pruning_ratio: Annotated[
        float | None, _ratio("MLP neurons of every kind", "--mlp", is_common=True)
    ] = None
    hidden_size: Annotated[int | None, _size("hidden size")] = None
    num_attention_heads: Annotated[int | None, _size("number of query heads")] = None
    num_key_value_heads: Annotated[int | None, _size("number of KV groups")] = None
    intermediate_size: Annotated[int | None, _size("intermediate size")] = None
    moe_intermediate_size: Annotated[int | None, _size("intermediate size of every routed expert")] = None
    shared_expert_intermediate_size: Annotated[int | None, _size("intermediate size of the shared expert")] = None
    num_experts: Annotated[int | None, Option("Exact number of experts to keep.", GOES, "experts", least=1)] = None
    num_hidden_layers: Annotated[
        int | None, Option("Number of layers to keep.", GOES, "layers", least=1, is_common=True)
    ] = None
    drop_layers: Annotated[
        tuple[int, ...] | None, Option("Layers to drop, such as 3,7,-2 or 20-25.", GOES, parse=parse_layers)
    ] = None
    round_to: Annotated[
        int | None,
        Option("Round what a ratio keeps down to a multiple.", GOES, least=1, left_out="256 for neurons, or less"),
    ] = None
    keep_layers: Annotated[
        tuple[int, ...],
        Option(
            "Layers that stay as they are, such as 0,1,-1; beside them only whole layers can go.",
            GOES,
            parse=parse_layers,
        ),
    ] = ()

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        if self.drop_layers is not None and self.num_hidden_layers is not None:
            raise UsageError("--layers says how many stay and --drop-layers which go; give one of them.")

    @property
    def is_empty(self) -> bool:
        """Whether no width was asked for."""
        conditions = ("round_to", "keep_layers")
        return all(getattr(self, field.name) is None for field in fields(self) if field.name not in conditions)

    def check_layer_numbers(self, whole: int) -> None:
        """Make sure that the layers of a model of so many exist that are named by number.

        Raises:
            PlanError: some do not; these are named. Or all are to go.
        """
        dropped = self.drop_layers or ()
        for name, verb, numbers in (("--keep-layers", "kept", self.keep_layers), ("--drop-layers", "dropped", dropped)):
            if outside := [layer for layer in numbers if not -whole <= layer < whole]:
                raise PlanError(
                    f"Layer{'s' if len(outside) > 1 else ''} {', '.join(map(str, outside))} cannot be {verb}: the "
                    f"model has layers 0 to {whole - 1}, from the end -1 to {-whole}. Choose {name} among these."
                )
        if len({layer % whole for layer in dropped}) == whole:
            raise PlanError(f"--drop-layers names all {whole} layers, and one must stay. Name fewer.")

    @property
    def asks_for_a_fraction(self) -> bool:
        """Whether a part of any width is to go."""
        ratios = (self.head_pruning_ratio, self.kv_group_pruning_ratio, self.intermediate_pruning_ratio)
        return any((self.pruning_ratio, self.hidden_pruning_ratio, *ratios))

    @property
    def asks_for_heads(self) -> bool:
        """Whether query heads or KV groups were asked for by name."""
        sizes = (self.num_attention_heads, self.num_key_value_heads)
        return any(value is not None for value in (*sizes, self.head_pruning_ratio, self.kv_group_pruning_ratio))

    @property
    def asks_for_channels(self) -> bool:
        """Whether the hidden size was asked for."""
        return any(value is not None for value in (self.pruning_ratio, self.hidden_pruning_ratio, self.hidden_size))


@dataclass(frozen=True)
class Choice:
    """What decides the weights that are written, beside the model and the text."""

    widths: WidthRequest = field(default_factory=WidthRequest)
    target: Annotated[
        str | None,
        Option("Choose widths that leave at most so much: 85%, 6B parameters or 4GiB.", SIZE, is_common=True),
    ] = None
    target_params: Annotated[str | None, Option("The same as a number of parameters, such as 6B or 80%.", SIZE)] = None
    target_size: Annotated[
        str | None, Option("The same as a size of the weights: 4GiB as stored, or '4GiB as q4_k_m'.", SIZE)
    ] = None
    target_speedup: Annotated[
        float | None,
        Option("As a time: 1.5 times as fast on this machine.", SIZE, check=check_speedup, parse=parse_speedup),
    ] = None
    context: Annotated[
        int | None,
        Option(
            "Tokens whose KV cache counts into a size; of a speedup, that are read before it writes.",
            SIZE,
            least=1,
            left_out="none; 512 for a speedup",
        ),
    ] = None
    batch: Annotated[
        int | None, Option("Texts at a time, for a speedup.", SIZE, "target_batch", least=1, left_out="1")
    ] = None
    importance: Annotated[
        str | None, Option("How units are ranked.", METHOD, left_out="consensus; magnitude where there is no text")
    ] = None
    layer_importance: Annotated[
        str | None,
        Option("How layers are ranked, with --layers or a target.", METHOD, left_out="influence where text is read"),
    ] = None
    refit: Annotated[
        str | None,
        Option("How what reads removed units is repaired.", METHOD, left_out="residual; none where there is no text"),
    ] = None
    rotate: Annotated[bool, Option("Keep principal components of the residual stream instead of channels.", METHOD)] = (
        False
    )
    seed: Annotated[
        int,
        Option("Seed of random importance and of the windows that are drawn from the text.", METHOD, check=check_seed),
    ] = 0
    compute_dtype: Annotated[
        str,
        Option(
            "Dtype of products on calibration text; auto: the model's where that is native.", MACHINE, parse=parse_dtype
        ),
    ] = "auto"

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        if self.budget is not None and not self.widths.is_empty:
            raise UsageError("a target chooses the widths; leave out the width options and --plan.")
        if self.layer_importance is not None and self.budget is None and self.widths.num_hidden_layers is None:
            raise UsageError("--layer-importance says which layers go; give --layers N or a target with it.")
        if self.rotate and not self.widths.asks_for_channels:
            raise UsageError(ROTATES)

    @property
    def budget(self) -> Budget | None:
        """The size that the model must not exceed, or how much faster it has to be.

        Raises:
            UsageError: two of them, or one that cannot be read.
        """
        given = [name for name in TARGETS if getattr(self, name) is not None]
        if len(given) > 1:
            shown = " and ".join(f"--{name.replace('_', '-')}" for name in given)
            raise UsageError(f"{shown} say the same thing; give one of them.")
        found = None
        for name in given:
            try:
                found = replace(TARGETS[name](getattr(self, name)), context=self.context)
            except UsageError as error:
                raise UsageError(f"--{name.replace('_', '-')}: {error}") from None
        kind = found.kind if found is not None else None
        if self.context is not None and kind not in ("bytes", "speedup"):
            raise UsageError("--context goes with a target in bytes, such as 4GiB, or with --target-speedup.")
        if self.batch is not None and kind != "speedup":
            raise UsageError("--target-batch goes with --target-speedup.")
        return found

    @property
    def settled(self) -> Choice:
        """The same with the defaults in the place of what was left open."""
        return replace(self, importance=self.importance or DEFAULT_IMPORTANCE, refit=self.refit or DEFAULT_REFIT)

    @property
    def without_text(self) -> Choice:
        """The same, but what was left open measures nothing on text."""
        return replace(self, importance=self.importance or "magnitude", refit=self.refit or "none")


ROTATES = "--rotate is about the hidden size: give one, and leave out targets, --plan, --save-plan and --resume."


TEXT_COLUMN = Option("Column of a dataset that holds text or conversations.", TEXT, left_out="found by its name")


@dataclass(frozen=True)
class Text:
    """What to calibrate on."""

    calibration: Annotated[
        str | None,
        Option(
            "Text to calibrate on: a file, a folder, a hub dataset or self; several: a.jsonl:0.7,b.txt:0.3.",
            TEXT,
            left_out="wikitext2 and python-docs",
            is_common=True,
        ),
    ] = None
    calibration_split: Annotated[str, Option("Split of that dataset.", TEXT)] = "validation"
    text_column: Annotated[str | None, TEXT_COLUMN] = None
    calibration_tokens: Annotated[int, Option("Tokens to fit on.", TEXT, least=2)] = 32768
    calibration_seq_len: Annotated[int, Option("Tokens in a window.", TEXT, least=2)] = 512


@dataclass(frozen=True)
class Delivery:
    """What is written, and where to."""

    output: Annotated[Path | None, Option("Folder to write.", OUTPUT, is_common=True, short="-o")] = None
    overwrite: Annotated[bool, Option("Replace the model folder that --output names.", OUTPUT)] = False
    push_to: Annotated[str | None, Option("Upload it to the hub then, as ORG/NAME, in private.", OUTPUT)] = None
    public: Annotated[bool, Option("Let everybody see what --push-to uploads.", OUTPUT)] = False
    dry_run: Annotated[bool, Option("Show what would be done, and write no model.", OUTPUT)] = False
    text_only: Annotated[bool, Option("Of a multimodal model, write the language model alone.", OUTPUT)] = False
    max_shard_size: Annotated[str, Option("Largest shard, such as 500MB or 5GB.", OUTPUT, check=parse_size)] = "5GB"
    recover: Annotated[str | None, Option("Tokens to heal it on then, such as 1M.", METHOD, is_common=True)] = None
    finalists: Annotated[
        int | None,
        Option("Heal so many candidates for a target on 1/8 of that, and go on with the best.", METHOD, least=2),
    ] = None
    gguf: Annotated[
        str | None,
        Option("Export it as GGUF too, such as q4_k_m, to OUTPUT-gguf.", OUTPUT, is_common=True, parse=parse_dtype),
    ] = None
    plan: Annotated[Path | None, Option("Replay a saved plan instead of choosing.", OUTPUT)] = None
    save_plan: Annotated[Path | None, Option("Save the plan as JSON.", OUTPUT)] = None
    save_config: Annotated[
        Path | None, Option("Save the request as a .yaml or .json file for --config.", OUTPUT, check=check_config)
    ] = None
    report: Annotated[
        Path | None, Option("Draw the errors of all layers into a .png or .svg file.", OUTPUT, check=check_chart)
    ] = None


@dataclass(frozen=True)
class Scratch:
    """What is kept for later runs, and where large intermediate results lie."""

    statistics: Annotated[
        Path | None, Option("Folder that remembers what was measured, for other targets of this model and text.", TEXT)
    ] = None
    resume: Annotated[bool, Option("Go on from where a run was cut short.", TEXT)] = False
    offload_dir: Annotated[
        Path | None, Option("Folder for the hidden states of all calibration text.", TEXT, left_out="in memory")
    ] = None


@dataclass(frozen=True)
class Evaluation:
    """What to evaluate on."""

    dataset: Annotated[
        str | None,
        Option("A file, a folder, a hub dataset or python-docs.", EVALUATION, left_out="wikitext2, or python-docs"),
    ] = None
    text_column: Annotated[str | None, TEXT_COLUMN] = None
    split: Annotated[str, Option("Split of the dataset.", EVALUATION)] = "test"
    max_seq_len: Annotated[
        int | None, Option("Tokens in a window.", EVALUATION, least=2, left_out="the model's maximum")
    ] = None
    limit: Annotated[
        int | None, Option("Evaluate the first N windows only, and of each task N questions.", EVALUATION, least=1)
    ] = None
    batch_size: Annotated[
        int | None,
        Option(
            "Windows evaluated at a time; auto: as many as fit on a GPU, one on the CPU.",
            EVALUATION,
            left_out="auto",
            parse=parse_batch,
        ),
    ] = None
