"""What the commands report: plain dataclasses, ready for a table or for JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from llmprune_cli.choose.layers.figures import WidthSensitivity
from llmprune_cli.family.widths import Widths
from llmprune_cli.folder.tensors import Shape
from llmprune_cli.formats.registry import Verification
from llmprune_cli.heal.figures import FinalistResult, HealedLayer, HeldOut, Judgement, RateTrial
from llmprune_cli.progress import Estimate
from llmprune_cli.report.runtimes import RuntimeFit
from llmprune_cli.run.questions.figures import Answered, TaskResult
from llmprune_cli.run.speed.figures import SpeedResult
from llmprune_cli.vocabulary.figures import TriedVocabulary, VocabularySummary

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class TensorRow:
    """Tensors of one template and shape, folded over layers."""

    template: str  # tensor name with {} for numbers
    layers: str  # which, "0-31" for example; empty for tensors outside the layers
    count: int
    shape: Shape
    dtype: str
    parameters: int  # of all `count` tensors together


@dataclass(frozen=True)
class ModelSummary:
    """One state of a model, before or after pruning."""

    widths: Widths
    parameters: int
    size_bytes: int
    kv_cache_bytes_per_token: int | None  # keys and values of all layers that keep any, as stored; None: not known
    tensors: tuple[TensorRow, ...]


@dataclass(frozen=True)
class InspectResult:
    """What `inspect` reports."""

    schema_version: int
    model: str
    revision: str | None
    model_type: str
    has_weights: bool
    tied_embeddings: bool
    prunable: dict[str, str]  # width → legal values, or "no: reason"
    dropped: tuple[str, ...]  # stored tensors that the model does not use
    renamed: tuple[tuple[str, str], ...]  # stored names and those of today
    before: ModelSummary
    after: ModelSummary | None
    vocabulary: VocabularySummary
    deviations: tuple[str, ...]
    runtimes: tuple[RuntimeFit, ...]  # of the model after pruning, where that was asked for


@dataclass(frozen=True)
class VerifyResult:
    """What `inspect --verify` reports of a folder that is what its manifest says."""

    schema_version: int
    folder: str
    files: int  # whose checksums were compared
    size_bytes: int  # of these
    parameters: int | None  # by the headers; None where the weights are not safetensors


@dataclass(frozen=True)
class SensitivityResult:
    """What `inspect --sensitivity` reports."""

    schema_version: int
    model: str
    revision: str | None
    importance: str  # by which units go
    dataset: str
    origin: str
    split: str
    tokens: int  # by which units are ranked
    held_out_tokens: int  # on which it is measured what their absence costs
    widths: tuple[WidthSensitivity, ...]  # that layers have, and whole layers
    influence: tuple[float, ...] | None  # 1 − cos of each layer's input and output; None where no unit reads text
    statistics: str | None  # folder that keeps what was measured
    seconds: float


@dataclass(frozen=True)
class EvalResult:
    """Perplexity and bits per byte of one model."""

    model: str
    perplexity: float
    mean_nll: float  # nats per token
    bits_per_byte: float  # of text in the tokens that are predicted
    bytes: int  # of that text, in UTF-8
    same_tokens: bool  # whether it reads the text as the first model does; perplexities can be compared only then
    kl: float | None  # mean KL(first model ‖ this one) of the next token, nats; None for the first and other windows
    windows: int
    tokens: int
    max_seq_len: int
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int  # of this process, on CUDA of the device
    parameters: int  # of all that is stored, of a multimodal model as well
    size_bytes: int  # of these
    dtype: str  # that it was evaluated in
    tasks: tuple[TaskResult, ...] = ()  # what it answered


@dataclass(frozen=True)
class EvalReport:
    """What `eval` reports."""

    schema_version: int
    dataset: str
    origin: str
    split: str
    results: tuple[EvalResult, ...]


@dataclass(frozen=True)
class LayerResult:
    """How well a layer that stays does what it did."""

    layer: int  # its number before pruning
    removal_error: float | None  # see `LayerRepair`, on the text that was fitted; None where nothing was refitted
    refit_error: float | None
    stream_error: float | None  # ‖ĥ − h‖²/‖h‖² of the residual stream behind the layer, pruned against dense, on
    # held-out text; None where the tokens of that text differ


@dataclass(frozen=True)
class CalibrationResult:
    """What calibration text was used and how the pruned model does on text that it was not fitted to."""

    dataset: str
    origin: str
    split: str
    tokens: int  # that were fitted
    seq_len: int
    seed: int  # by which windows were drawn
    held_out_tokens: int
    perplexity_before: float
    perplexity_after: float  # of its own tokens, where the vocabulary is smaller
    bits_per_byte_before: float
    bits_per_byte_after: float
    kl: float | None  # mean KL(dense ‖ pruned) of the next token, nats; None where the vocabulary is smaller
    layers: tuple[LayerResult, ...]  # those that stay; none where the vocabulary is smaller
    prefill_tokens_per_second_before: float  # float32, window by window, one layer at a time, loading excluded
    prefill_tokens_per_second_after: float
    prefill_spread_before: float  # share of the median time by which the quartiles of its windows lie around it
    prefill_spread_after: float
    device: str  # on which that was measured
    answers: tuple[Answered, ...] = ()  # of a model that chats


@dataclass(frozen=True)
class CandidateResult:
    """Widths that were weighed for a target size."""

    widths: Widths
    layers: tuple[int, ...]
    parameters: int
    kl: float  # on held-out text after a short calibration, nats


@dataclass(frozen=True)
class RecoverResult:
    """What `recover` reports."""

    schema_version: int
    model: str
    teacher: str
    teacher_mode: str  # "resident" or "streamed"
    output: str
    dataset: str
    origin: str
    split: str
    tokens: int  # that were read, each as often as it was
    learned_tokens: int  # and learned from, about: fewer where those are of an assistant
    batch_tokens: int
    seq_len: int
    held_out_tokens: int  # that it was judged by
    mode: str  # "end-to-end" or "blocks"
    loss: str  # that is judged, and but for blocks is learned
    loss_on: str  # "all" tokens of conversations, or the "assistant"'s
    hidden_weight: float  # of the error of hidden states beside it
    learning_rate: float
    tried_rates: tuple[RateTrial, ...]  # those that it was chosen by; none where it was given or is the usual one
    trained_parameters: int  # 0 where the weights that were written are those before
    steps: int
    stopped_early: bool  # because held-out text gained no more
    before: HeldOut
    after: HeldOut  # of what was written
    is_better: bool  # whether it lost less of what was learned than before
    best_tokens: int  # after which the weights that were written stood; 0 where they are those before
    curve: tuple[Judgement, ...]
    layers: tuple[HealedLayer, ...]  # those that were trained one after the other
    seconds: float
    peak_memory_bytes: int
    push: PushResult | None  # where it was uploaded to


@dataclass(frozen=True)
class CountedSize:
    """The size of a model as a target counts it."""

    dtype: str | None  # for GGUF, that weights are counted in; None: as stored
    context: int | None  # tokens whose keys and values count, too; None: none do
    before_bytes: int
    after_bytes: int


@dataclass(frozen=True)
class PruneResult:
    """What `prune` reports."""

    schema_version: int
    model: str
    revision: str | None
    output: str | None  # None for a dry run, or where the result was temporary
    target: str | None  # the size asked for, in words; None where widths were
    counted: CountedSize | None  # where that counts bytes otherwise than as stored
    protected_layers: tuple[int, ...]  # that no one may change
    dropped_layers: tuple[int, ...]  # by their numbers before pruning; empty where text decides and was not read
    importance: str
    refit: str
    seed: int
    before: ModelSummary
    after: ModelSummary
    deviations: tuple[str, ...]
    runtimes: tuple[RuntimeFit, ...]  # of the pruned model
    candidates: tuple[CandidateResult, ...]  # best first; empty where the widths were given
    vocabulary: VocabularySummary | None  # None where it neither shrinks nor is a part that a target could take
    vocabularies: tuple[TriedVocabulary, ...]  # best first; empty where their size was not searched
    speed: SpeedResult | None  # where a time was asked for
    seconds: float
    estimate: Estimate | None  # made before the start; None where the run was too short to be worth it
    calibration: CalibrationResult | None
    recovery: RecoverResult | None
    evaluation: EvalReport | None
    export: ExportResult | None
    finalists: tuple[FinalistResult, ...]  # best first; the first one was gone on with
    push: PushResult | None  # where it was uploaded to


@dataclass(frozen=True)
class SweepPoint:
    """One size of a model, and what it is worth on held-out text."""

    name: str  # as it was asked for, "80%" or "mlp-25%"; "unpruned" for the whole model
    widths: Widths
    layers: tuple[int, ...]  # numbers before pruning of those that it has
    parameters: int
    size_bytes: int
    kv_cache_bytes_per_token: int | None
    perplexity: float
    bits_per_byte: float  # of text in the tokens that are predicted
    kl: float  # mean KL(dense ‖ this) of the next token, nats
    prefill_tokens_per_second: float  # see `CalibrationResult`
    prefill_spread: float  # see `CalibrationResult`
    deviations: tuple[str, ...]
    healed_tokens: int  # that it was trained on after it was pruned; 0 where nothing was
    before_healing: HeldOut | None  # what the same text said of it before that
    seconds: float  # that it took
    plan: str | None  # file in the output, for `prune --plan`
    folder: str | None  # of the model in the output; None where it was not kept


@dataclass(frozen=True)
class SweepResult:
    """What `sweep` reports."""

    schema_version: int
    model: str
    revision: str | None
    output: str | None
    importance: str
    refit: str
    dataset: str
    origin: str
    split: str
    tokens: int  # that were fitted
    held_out_tokens: int
    device: str  # on which speed was measured
    dense: SweepPoint
    points: tuple[SweepPoint, ...]  # the largest first
    seconds: float


@dataclass(frozen=True)
class ExportResult:
    """What `export` reports."""

    schema_version: int
    model: str
    output: str
    format: str
    dtype: str
    parameters: int
    size_bytes: int  # of all files
    files: tuple[str, ...]
    note: str  # in which form a runtime takes it, where that is not its own
    verification: Verification | None
    unverified: str  # why nothing was verified


@dataclass(frozen=True)
class PushResult:
    """What `push` reports."""

    schema_version: int
    folder: str
    repository: str
    url: str
    commit: str
    private: bool  # whether only the members of its organisation see it
    files: tuple[str, ...]
    size_bytes: int  # of all files
    removed: tuple[str, ...]  # weights that were in the repository before, under other names


def to_json(result: Any) -> str:
    """A result as indented JSON; a number that JSON lacks becomes null."""
    return TypeAdapter(type(result)).dump_json(result, indent=2).decode()
