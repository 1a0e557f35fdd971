"""The command line: parse, call one pipeline function, hand the result to output."""

from __future__ import annotations

import enum
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmprune_cli import __version__
from llmprune_cli.processes import is_first

if TYPE_CHECKING:
    from llmprune_cli.choose.search import Budget

SHARED_COMMANDS = ("prune", "eval")  # in whose work all processes of a run take part

app = typer.Typer(
    name="llmprune",
    help="Prune large language models into smaller dense checkpoints that stock software loads.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Importance(enum.StrEnum):
    """How units are ranked."""

    magnitude = "magnitude"
    random = "random"
    activation = "activation"
    range = "range"
    taylor = "taylor"
    consensus = "consensus"


class LayerImportance(enum.StrEnum):
    """How layers are ranked."""

    influence = "influence"
    loss = "loss"


class Refit(enum.StrEnum):
    """How what reads removed units is repaired."""

    none = "none"
    local = "local"
    residual = "residual"


class DtypeName(enum.StrEnum):
    """Floating-point types."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class FormatName(enum.StrEnum):
    """Export formats."""

    safetensors = "safetensors"
    gguf = "gguf"
    onnx = "onnx"
    genai = "genai"
    torch_export = "torch-export"


def _ratio(value: float | None) -> float | None:
    if value is not None and not 0 <= value < 1:
        raise typer.BadParameter("a pruning ratio is a fraction from 0 up to, but not including, 1.")
    return value


def _device(value: str) -> str:
    kind, colon, number = value.partition(":")
    if value not in ("auto", "cpu", "cuda", "mps") and not (kind == "cuda" and colon and number.isdecimal()):
        raise typer.BadParameter("use auto, cpu, cuda, cuda:N or mps.")
    return value


def _dropped_layers(text: str | None, layers: int | None) -> tuple[int, ...] | None:
    if text is not None and layers is not None:
        raise typer.BadParameter("--layers says how many stay and --drop-layers which go; give one of them.")
    return None if text is None else _layer_numbers("--drop-layers", text)


def _layer_numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{option} wants layer numbers such as 3,7,-1, not {text!r}.") from None


def _chart_file(value: Path | None) -> Path | None:
    if value is not None and value.suffix.lower() not in (".png", ".svg"):
        raise typer.BadParameter(f"a chart is a .png or an .svg file, not {value.name!r}.")
    return value


def _budget(parameters: str | None, size: str | None) -> Budget | None:
    if parameters is None and size is None:
        return None
    if parameters is not None and size is not None:
        raise typer.BadParameter("--target-params and --target-size say the same thing; give one of them.")
    from llmprune_cli.choose.search import Budget, parse_parameters
    from llmprune_cli.folder.shards import parse_size

    if size is not None:
        return Budget(parse_size(size), "bytes")
    try:
        return parse_parameters(str(parameters))
    except ValueError as error:
        raise typer.BadParameter(f"--target-params: {error}") from None


Model = Annotated[str, typer.Argument(help="Model folder, hub id, or .gguf file.", metavar="MODEL")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Dtype = Annotated[DtypeName | None, typer.Option(help="Dtype to load in, and to dequantize to. [default: as stored]")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.", callback=_device)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the model folder that --output names.")]
ShardSize = Annotated[str, typer.Option(help="Largest shard, such as 500MB or 5GB.")]


def ratio_option(what: str) -> Any:
    """A ratio of its own for one width."""
    return typer.Option(help=f"Fraction of the {what} to remove.", callback=_ratio, rich_help_panel="Widths")


def size_option(what: str) -> Any:
    """An exact size for one width."""
    return typer.Option(help=f"Exact {what} to keep.", min=1, rich_help_panel="Widths")


PruningRatio = Annotated[float | None, ratio_option("hidden size, heads and MLP, together")]
HiddenRatio = Annotated[float | None, ratio_option("hidden channels")]
HeadRatio = Annotated[float | None, ratio_option("query heads, evenly in every KV group")]
GroupRatio = Annotated[float | None, ratio_option("KV groups, with their query heads")]
NeuronRatio = Annotated[float | None, ratio_option("MLP neurons")]
HiddenSize = Annotated[int | None, size_option("hidden size")]
Heads = Annotated[int | None, size_option("number of query heads")]
Groups = Annotated[int | None, size_option("number of KV groups")]
Neurons = Annotated[int | None, size_option("intermediate size")]
ExpertNeurons = Annotated[int | None, size_option("intermediate size of every routed expert")]
SharedNeurons = Annotated[int | None, size_option("intermediate size of the shared expert")]
Experts = Annotated[
    int | None, typer.Option("--experts", help="Exact number of experts to keep.", min=1, rich_help_panel="Widths")
]
Layers = Annotated[
    int | None,
    typer.Option("--layers", help="Number of layers to keep.", min=1, rich_help_panel="Widths"),
]
DropLayers = Annotated[str | None, typer.Option(help="Layers to drop, such as 3,7,12.", rich_help_panel="Widths")]
KeepLayers = Annotated[
    str | None,
    typer.Option(
        help="Layers that stay as they are, such as 0,1,-1; beside them only whole layers can go.",
        rich_help_panel="Widths",
    ),
]
TargetParams = Annotated[
    str | None,
    typer.Option(help="Choose widths that leave at most so many, such as 6B or 80%.", rich_help_panel="Target"),
]
TargetSize = Annotated[
    str | None, typer.Option(help="The same as a size of the weights, such as 4GiB.", rich_help_panel="Target")
]
RoundTo = Annotated[int, typer.Option(help="Round kept channels and neurons down to a multiple.", min=1)]
Calibration = Annotated[
    str | None,
    typer.Option(
        help="Text to calibrate on, as --dataset. [default: wikitext2, or python-docs]", rich_help_panel="Calibration"
    ),
]
CalibrationSplit = Annotated[str, typer.Option(help="Split of that dataset.", rich_help_panel="Calibration")]
CalibrationTokens = Annotated[int, typer.Option(help="Tokens to fit on.", min=2, rich_help_panel="Calibration")]
CalibrationSeqLen = Annotated[int, typer.Option(help="Tokens in a window.", min=2, rich_help_panel="Calibration")]
Statistics = Annotated[
    Path | None,
    typer.Option(
        help="Folder that remembers what was measured, for another target of the same model and text.",
        rich_help_panel="Calibration",
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on after the last finished layer of a run that was cut short.",
        rich_help_panel="Calibration",
    ),
]
OffloadDir = Annotated[
    Path | None,
    typer.Option(help="Folder for the hidden states, instead of memory.", rich_help_panel="Calibration"),
]
Dataset = Annotated[str, typer.Option(help="wikitext2, a .txt/.parquet/.jsonl file, a folder, or a hub dataset.")]
Split = Annotated[str, typer.Option(help="Split of the dataset.")]
MaxSeqLen = Annotated[int | None, typer.Option(help="Tokens in a window. [default: the model's maximum]", min=2)]
Limit = Annotated[int | None, typer.Option(help="Evaluate the first N windows only.", min=1)]
BatchSize = Annotated[int, typer.Option(help="Windows evaluated at a time.", min=1)]


def _version(value: bool) -> None:
    if value:
        typer.echo(f"llmprune {__version__}")
        raise typer.Exit


@app.callback()
def main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Prune large language models into smaller dense checkpoints that stock software loads."""
    if context.invoked_subcommand not in SHARED_COMMANDS and not is_first():
        raise typer.Exit
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")


@app.command()
def inspect(
    model: Model,
    revision: Revision = None,
    pruning_ratio: PruningRatio = None,
    hidden_pruning_ratio: HiddenRatio = None,
    head_pruning_ratio: HeadRatio = None,
    kv_group_pruning_ratio: GroupRatio = None,
    intermediate_pruning_ratio: NeuronRatio = None,
    hidden_size: HiddenSize = None,
    num_attention_heads: Heads = None,
    num_key_value_heads: Groups = None,
    intermediate_size: Neurons = None,
    moe_intermediate_size: ExpertNeurons = None,
    shared_expert_intermediate_size: SharedNeurons = None,
    experts: Experts = None,
    layers: Layers = None,
    drop_layers: DropLayers = None,
    round_to: RoundTo = 1,
    verify: Annotated[
        bool, typer.Option("--verify", help="Hold a folder that llmprune wrote against its checksums, and no more.")
    ] = False,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Show modules, widths and totals from headers and configuration; with a width option, after pruning too."""
    from llmprune_cli.cli import output
    from llmprune_cli.commands import pipeline
    from llmprune_cli.plan.target import WidthRequest
    from llmprune_cli.source.opening import ModelReference

    request = WidthRequest(
        pruning_ratio,
        hidden_pruning_ratio,
        head_pruning_ratio,
        kv_group_pruning_ratio,
        intermediate_pruning_ratio,
        hidden_size,
        num_attention_heads,
        num_key_value_heads,
        intermediate_size,
        moe_intermediate_size,
        shared_expert_intermediate_size,
        experts,
        layers,
        _dropped_layers(drop_layers, layers),
        round_to,
    )
    if verify:
        if not request.is_empty:
            raise typer.BadParameter("--verify plans nothing; leave out the width options.")
        verified = pipeline.verify_folder(Path(model))
        (output.print_json if as_json else output.print_verify)(verified)
        return
    result = pipeline.inspect(ModelReference(model, revision, trust_remote_code), request)
    (output.print_json if as_json else output.print_inspect)(result)


@app.command()
def prune(
    model: Model,
    output_folder: Annotated[Path | None, typer.Option("--output", help="Folder to write.")] = None,
    revision: Revision = None,
    pruning_ratio: PruningRatio = None,
    hidden_pruning_ratio: HiddenRatio = None,
    head_pruning_ratio: HeadRatio = None,
    kv_group_pruning_ratio: GroupRatio = None,
    intermediate_pruning_ratio: NeuronRatio = None,
    hidden_size: HiddenSize = None,
    num_attention_heads: Heads = None,
    num_key_value_heads: Groups = None,
    intermediate_size: Neurons = None,
    moe_intermediate_size: ExpertNeurons = None,
    shared_expert_intermediate_size: SharedNeurons = None,
    experts: Experts = None,
    layers: Layers = None,
    drop_layers: DropLayers = None,
    keep_layers: KeepLayers = None,
    round_to: RoundTo = 1,
    target_params: TargetParams = None,
    target_size: TargetSize = None,
    importance: Annotated[
        Importance | None,
        typer.Option(help="How units are ranked. [default: consensus; magnitude where there is no text]"),
    ] = None,
    layer_importance: Annotated[
        LayerImportance | None,
        typer.Option(help="How layers are ranked, with --layers or a target. [default: influence where text is read]"),
    ] = None,
    refit: Annotated[
        Refit | None,
        typer.Option(help="How what reads removed units is repaired. [default: residual; none where there is no text]"),
    ] = None,
    rotate: Annotated[
        bool, typer.Option("--rotate", help="Keep principal components of the residual stream instead of channels.")
    ] = False,
    calibration: Calibration = None,
    calibration_split: CalibrationSplit = "validation",
    calibration_tokens: CalibrationTokens = 32768,
    calibration_seq_len: CalibrationSeqLen = 512,
    statistics: Statistics = None,
    resume: Resume = False,
    offload_dir: OffloadDir = None,
    seed: Annotated[int, typer.Option(help="Of whatever is random.")] = 0,
    plan: Annotated[Path | None, typer.Option(help="Replay a saved plan instead of choosing.")] = None,
    save_plan: Annotated[Path | None, typer.Option(help="Save the plan as JSON.")] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Draw the errors of all layers into a .png or .svg file.", callback=_chart_file),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and write no model.")] = False,
    overwrite: Overwrite = False,
    max_shard_size: ShardSize = "5GB",
    evaluate: Annotated[bool, typer.Option("--eval", help="Perplexity before and after.")] = False,
    dataset: Dataset = "wikitext2",
    split: Split = "test",
    max_seq_len: MaxSeqLen = None,
    limit: Limit = None,
    batch_size: BatchSize = 1,
    device: Device = "auto",
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Remove channels, heads, neurons, experts and layers, and write a smaller checkpoint."""
    request_values = (
        pruning_ratio,
        hidden_pruning_ratio,
        head_pruning_ratio,
        kv_group_pruning_ratio,
        intermediate_pruning_ratio,
        hidden_size,
        num_attention_heads,
        num_key_value_heads,
        intermediate_size,
        moe_intermediate_size,
        shared_expert_intermediate_size,
        experts,
        layers,
        _dropped_layers(drop_layers, layers),
    )
    asked = any(value is not None for value in request_values)
    budget = _budget(target_params, target_size)
    if budget is not None and (asked or plan is not None):
        raise typer.BadParameter("a target chooses the widths; leave out the width options and --plan.")
    asked = asked or budget is not None
    if plan is not None and (asked or keep_layers is not None):
        raise typer.BadParameter("a plan already says which widths; give --plan or width options, not both.")
    if plan is None and not asked:
        raise typer.BadParameter("say what to prune: --target-params, --pruning-ratio, a width of its own, or --plan.")
    kept = () if keep_layers is None else _layer_numbers("--keep-layers", keep_layers)
    if output_folder is None and not (dry_run or evaluate or save_plan):
        raise typer.BadParameter("give --output DIR, or --dry-run, --save-plan or --eval.")
    if layer_importance is not None and budget is None and layers is None:
        raise typer.BadParameter("--layer-importance says which layers go; give --layers N or a target with it.")
    hidden = (pruning_ratio, hidden_pruning_ratio, hidden_size)
    if rotate and (plan is not None or save_plan is not None or resume or all(value is None for value in hidden)):
        raise typer.BadParameter(
            "--rotate is about the hidden size: give one, and leave out targets, --plan, --save-plan and --resume."
        )
    if resume and (output_folder is None or dry_run):
        raise typer.BadParameter(
            "--resume goes on with a run that writes a model; give its --output, and no --dry-run."
        )
    if dry_run and evaluate:
        raise typer.BadParameter("--dry-run makes no model to evaluate; leave out --eval.")
    from llmprune_cli.cli import output
    from llmprune_cli.commands import pipeline
    from llmprune_cli.folder.shards import parse_size
    from llmprune_cli.options import EvalOptions, PruneOptions
    from llmprune_cli.plan.target import WidthRequest
    from llmprune_cli.run.calibration import CalibrationOptions
    from llmprune_cli.source.opening import ModelReference

    options = PruneOptions(
        request=WidthRequest(*request_values, round_to, kept),
        budget=budget,
        importance=(importance or Importance.consensus).value,
        layer_importance=layer_importance.value if layer_importance else None,
        refit=(refit or Refit.residual).value,
        left_open=tuple(name for name, value in (("importance", importance), ("refit", refit)) if value is None),
        calibration=CalibrationOptions(calibration, calibration_split, calibration_tokens, calibration_seq_len, device),
        rotate=rotate,
        seed=seed,
        plan=plan,
        save_plan=save_plan,
        report=report,
        output=output_folder,
        overwrite=overwrite,
        dry_run=dry_run,
        max_shard_bytes=parse_size(max_shard_size),
        statistics=statistics,
        resume=resume,
        offload_dir=offload_dir,
    )
    if report is not None and (dry_run or not options.needs_text or not (output_folder or evaluate)):
        raise typer.BadParameter(
            "--report draws what calibration measures on a pruned model: give --output or --eval, and a --refit or a "
            "calibrated --importance (activation, range, taylor, consensus)."
        )
    for value, name in ((statistics, "--statistics"), (resume, "--resume"), (offload_dir, "--offload-dir")):
        if value and not options.needs_text:
            raise typer.BadParameter(f"{name} is for runs that calibrate; give another --importance or --refit.")
    dtype_name = dtype.value if dtype else None
    evaluation = EvalOptions(dataset, split, max_seq_len, limit, batch_size, device, dtype_name)
    reference = ModelReference(model, revision, trust_remote_code, dtype_name)
    with output.progress_on_stderr() as listener:
        result = pipeline.prune(reference, options, evaluation if evaluate else None, listener)
    if result is not None:
        (output.print_json if as_json else output.print_prune)(result)


@app.command("eval")
def evaluate_command(
    model: Model,
    compare: Annotated[str | None, typer.Option(help="A second model, evaluated side by side.")] = None,
    revision: Revision = None,
    dataset: Dataset = "wikitext2",
    split: Split = "test",
    max_seq_len: MaxSeqLen = None,
    limit: Limit = None,
    batch_size: BatchSize = 1,
    device: Device = "auto",
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity: mean over windows of the mean negative log-likelihood, exponentiated."""
    from llmprune_cli.cli import output
    from llmprune_cli.commands import pipeline
    from llmprune_cli.options import EvalOptions
    from llmprune_cli.source.opening import ModelReference

    dtype_name = dtype.value if dtype else None
    options = EvalOptions(dataset, split, max_seq_len, limit, batch_size, device, dtype_name)
    reference = ModelReference(model, revision, trust_remote_code, dtype_name)
    other = ModelReference(compare, None, trust_remote_code, dtype_name) if compare else None
    with output.progress_on_stderr() as listener:
        report = pipeline.evaluate(reference, other, options, listener)
    (output.print_json if as_json else output.print_eval)(report)


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help="Model folder, hub id, or .gguf file.", metavar="CHECKPOINT")],
    output_folder: Annotated[Path, typer.Option("--output", help="Folder to write.")],
    format_name: Annotated[FormatName, typer.Option("--format", help="What to write.")] = FormatName.safetensors,
    dtype: Annotated[
        str | None, typer.Option(help="Dtype to write; for gguf also q8_0 and the like. [default: as stored]")
    ] = None,
    verify: Annotated[
        bool | None,
        typer.Option(
            help="Compare with transformers in the runtime of the format. [default: where it is installed]",
            show_default=False,
        ),
    ] = None,
    converter: Annotated[
        Path | None,
        typer.Option(help="llama.cpp's convert_hf_to_gguf.py, to write gguf with.", exists=True, dir_okay=False),
    ] = None,
    compat: Annotated[
        bool,
        typer.Option("--compat", help="Write config.json for readers of older ones too (rope_theta, torch_dtype)."),
    ] = False,
    kv_cache: Annotated[
        bool, typer.Option("--kv-cache/--no-kv-cache", help="Whether an onnx graph has a key-value cache.")
    ] = True,
    max_shard_size: ShardSize = "5GB",
    revision: Revision = None,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint in another format, dtype or shard size, and prove it in the runtime that reads it."""
    from llmprune_cli.cli import output
    from llmprune_cli.commands import pipeline
    from llmprune_cli.export import FORMATS
    from llmprune_cli.export.formats import ExportOptions
    from llmprune_cli.folder.shards import parse_size
    from llmprune_cli.folder.tensors import SHORT_DTYPES
    from llmprune_cli.source.opening import ModelReference

    dtype = SHORT_DTYPES.get(dtype, dtype) if dtype else None
    known = FORMATS[format_name].dtypes
    if dtype is not None and dtype not in known:
        raise typer.BadParameter(f"--format {format_name.value} has no --dtype {dtype}; it has {', '.join(known)}.")
    if output_folder.suffix in (".gguf", ".onnx", ".pt2", ".safetensors"):
        raise typer.BadParameter(f"--output names a folder, and {output_folder} looks like a file.")
    if converter is not None and format_name is not FormatName.gguf:
        raise typer.BadParameter("--converter writes gguf; give --format gguf with it.")
    if compat and format_name is not FormatName.safetensors:
        raise typer.BadParameter("--compat is about config.json; give --format safetensors with it.")
    if not kv_cache and format_name is not FormatName.onnx:
        raise typer.BadParameter("--no-kv-cache is about onnx; give --format onnx with it.")
    options = ExportOptions(dtype, parse_size(max_shard_size), converter, kv_cache, compat)
    reference = ModelReference(checkpoint, revision, trust_remote_code, dtype if dtype in {*DtypeName} else None)
    with output.progress_on_stderr() as listener:
        result = pipeline.export(reference, output_folder, format_name.value, options, overwrite, verify, listener)
    (output.print_json if as_json else output.print_export)(result)
