"""What `recover` is asked for, see `llmprune_cli.options`."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from llmprune_cli.errors import MissingPackageError, UsageError
from llmprune_cli.heal import REPORTERS
from llmprune_cli.options import MACHINE, METHOD, OUTPUT, TEXT_COLUMN, Option
from llmprune_cli.sizes import check_chart, check_seed, parse_count, parse_size

ABOUT_ALL_LAYERS = (  # not for single ones
    *("loss", "loss_on", "temperature", "hidden_weight", "lora", "optimizer", "gradient_checkpointing"),
)
USUAL_RATE, USUAL_SIZE = 3e-4, 135e6  # a learning rate that heals a model of this many parameters well,
USUAL_STEPS = 128  # in at least so many steps: fewer, of which each has moments of few gradients, need a smaller one
MOST_RATE = 1e-3
USUAL_LOSS, LOSS_WHERE_TOKENS_WENT = "kl+0.1ce", "kl+ce"
TAUGHT = ("kl", "reverse-kl")  # by the teacher
BOTH = re.compile(rf"(?P<kl>{'|'.join(TAUGHT)})\+(?P<ce>[0-9]{{1,6}}(\.[0-9]{{0,6}})?|\.[0-9]{{1,6}}|)ce")


@dataclass(frozen=True)
class LossWeights:
    """How much each part of a loss counts."""

    kl: float = 0.0  # τ²·KL(teacher ‖ student), nats per token
    ce: float = 0.0  # cross-entropy of the text, nats per token
    is_reverse: bool = False  # KL(student ‖ teacher) in place of the other one


def parse_loss(text: str) -> LossWeights:
    """`kl`, `ce`, `kl+ce`, or a number of times the latter, such as `kl+0.1ce`; `reverse-kl` in the place of `kl`.

    Raises:
        UsageError: it is none of these.
    """
    if text == "ce":
        return LossWeights(ce=1.0)
    if text in TAUGHT:
        return LossWeights(kl=1.0, is_reverse=text != "kl")
    both = BOTH.fullmatch(text)
    weight = float(both["ce"] or 1) if both else 0.0
    if both is None or not weight:
        raise UsageError(f"{text!r} is no loss such as kl, reverse-kl, ce, kl+ce or kl+0.1ce, nor auto.")
    return LossWeights(1.0, weight, both["kl"] != "kl")


def check_loss(text: str) -> None:
    """See `parse_loss`, or `auto`."""
    if text != "auto":
        parse_loss(text)


def usual_learning_rate(parameters: int, steps: int) -> float:
    """Less for larger models, by the fourth root of their size, and for few steps, by the root of their number."""
    for_size = min(MOST_RATE, USUAL_RATE * (USUAL_SIZE / parameters) ** 0.25)
    return float(for_size * min(1.0, steps / USUAL_STEPS) ** 0.5)


def count_tokens(text: str) -> int:
    """A number of tokens such as `65k` or `1M`.

    Raises:
        UsageError: it is none.
    """
    try:
        budget = parse_count(text)
    except UsageError:
        budget = None
    if budget is None or budget.kind != "parameters" or budget.amount < 1:
        raise UsageError(f"{text!r} is not a number of tokens such as 65k, 0.25M or 1M.")
    return int(budget.amount)


def check_positive(value: float) -> None:
    """A learning rate or a temperature.

    Raises:
        UsageError: it is none.
    """
    if not 0 < value < float("inf"):
        raise UsageError("give a number greater than 0.")


def parse_rate(text: str) -> float | Literal["auto"]:
    """A learning rate, or `auto`.

    Raises:
        UsageError: it is neither.
    """
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{text!r} is neither a number nor auto.") from None


def check_rate(value: float | Literal["auto"]) -> None:
    """See `check_positive`."""
    if value != "auto":
        check_positive(value)


def check_weight(value: float) -> None:
    """What a part of the loss counts.

    Raises:
        UsageError: it is no such number.
    """
    if not 0 <= value < float("inf"):
        raise UsageError("give a number from 0 on.")


@dataclass(frozen=True)
class Healing:
    """What decides the weights that are learned, beside the two models."""

    tokens: Annotated[
        str, Option("Tokens to train on, such as 65k or 1M.", METHOD, is_common=True, check=count_tokens)
    ] = "1M"
    text: Annotated[
        str | None,
        Option(
            "Text to train on: self (what the teacher writes), a file, a folder or a hub dataset.",
            METHOD,
            left_out="wikitext2 and python-docs",
            is_common=True,
        ),
    ] = None
    text_split: Annotated[str, Option("Split of that dataset.", METHOD)] = "validation"
    text_column: Annotated[str | None, replace(TEXT_COLUMN, panel=METHOD)] = None
    seq_len: Annotated[int, Option("Tokens in a window.", METHOD, least=2)] = 512
    mode: Annotated[
        str, Option("The whole model at a time, or one layer after the other, in the memory of one layer.", METHOD)
    ] = "end-to-end"
    loss: Annotated[
        str,
        Option(
            "What is learned: the teacher's predictions (kl, reverse-kl), the text (ce), or both, such as kl+0.1ce; "
            "auto: that, kl+ce where tokens went, kl by blocks.",
            METHOD,
            check=check_loss,
        ),
    ] = "auto"
    loss_on: Annotated[str, Option("Whose words are learned, of conversations.", METHOD)] = "all"
    temperature: Annotated[
        float, Option("What logits are divided by before the kl of both sides.", METHOD, check=check_positive)
    ] = 1.0
    hidden_weight: Annotated[
        float,
        Option("Weight of the error of the hidden states behind all layers, beside that.", METHOD, check=check_weight),
    ] = 0.0
    learning_rate: Annotated[
        float | Literal["auto"] | None,
        Option(
            "Largest learning rate of AdamW, or auto: the best of a few short trials.",
            METHOD,
            left_out="by the model's size and the number of steps",
            check=check_rate,
            parse=parse_rate,
        ),
    ] = None
    batch_tokens: Annotated[
        int | None, Option("Tokens in a step of the optimizer.", METHOD, least=2, left_out="by the number of tokens")
    ] = None
    train: Annotated[str, Option("Which weights are trained.", METHOD)] = "all"
    lora: Annotated[
        int | None, Option("Train adapters of this rank, and merge them at the end (peft).", METHOD, least=1)
    ] = None
    optimizer: Annotated[
        str,
        Option("AdamW with moments in float32, or in 8 bits (bitsandbytes), in 6 bytes less for a weight.", MACHINE),
    ] = "adamw"
    seed: Annotated[int, Option("Seed of the order of the text.", METHOD, check=check_seed)] = 0
    gradient_checkpointing: Annotated[
        bool,
        Option(
            "Compute activations twice instead of keeping them, as is done beside a streamed teacher: in less memory.",
            MACHINE,
        ),
    ] = False
    compute_dtype: Annotated[
        str, Option("Dtype of products; weights are float32; auto: bfloat16 where that is native.", MACHINE)
    ] = "auto"

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        if self.lora is not None and self.train == "norms":
            raise UsageError("--lora is about matrices, and norms have none; leave out --train norms.")
        if self.loss == "ce" and self.temperature != 1.0:
            raise UsageError("--temperature is of the teacher's predictions, and --loss ce learns the text; give one.")
        if self.mode == "blocks":
            usual = {own.name: (own.default,) for own in fields(self)} | {"loss": ("auto", "kl")}
            given = [name for name in ABOUT_ALL_LAYERS if getattr(self, name) not in usual[name]]
            if given:
                raise UsageError(
                    f"--{given[0].replace('_', '-')} is about the whole model, and --mode blocks trains one layer "
                    "after the other on its hidden states; give one of them."
                )

    def decided(self, tokens_went: bool) -> Healing:
        """The same with a loss in place of `auto`.

        Args:
            tokens_went: the student has fewer than its teacher, which so never saw text as the student spells it.
        """
        if self.loss != "auto":
            return self
        if self.mode == "blocks":
            return replace(self, loss="kl")
        return replace(self, loss=LOSS_WHERE_TOKENS_WENT if tokens_went else USUAL_LOSS)

    @property
    def loss_weights(self) -> LossWeights:
        """Of a loss that is decided."""
        return parse_loss(self.loss)

    @property
    def needs_all_of_teacher(self) -> bool:
        """Whether all that the teacher predicts is learned from, and not its likeliest tokens alone."""
        return self.loss != "auto" and parse_loss(self.loss).is_reverse

    @property
    def token_count(self) -> int:
        """Tokens to train on."""
        return count_tokens(self.tokens)


@dataclass(frozen=True)
class Teaching:
    """Whom to learn from, and how that model runs."""

    teacher: Annotated[
        str | None,
        Option("The unpruned model: folder, hub id, or .gguf file.", METHOD, left_out="as llmprune.json says"),
    ] = None
    teacher_mode: Annotated[
        str,
        Option("In memory all the time, or once before the training, layer by layer.", MACHINE),
    ] = "auto"
    teacher_cache: Annotated[
        Path | None, Option("Folder for what a streamed teacher predicts, for other pruned models.", MACHINE)
    ] = None


@dataclass(frozen=True)
class Healed:
    """What is written, and where to."""

    output: Annotated[Path | None, Option("Folder to write.", OUTPUT, is_common=True, short="-o")] = None
    overwrite: Annotated[bool, Option("Replace the model folder that --output names.", OUTPUT)] = False
    max_shard_size: Annotated[str, Option("Largest shard, such as 500MB or 5GB.", OUTPUT, check=parse_size)] = "5GB"
    report: Annotated[
        Path | None, Option("Draw the learning curve into a .png or .svg file.", OUTPUT, check=check_chart)
    ] = None
    report_to: Annotated[str | None, Option("Tell every loss as it goes", OUTPUT)] = None
    resume: Annotated[bool, Option("Go on with a run that was cut short.", OUTPUT)] = False
    push_to: Annotated[str | None, Option("Upload it to the hub then, as ORG/NAME, in private.", OUTPUT)] = None
    public: Annotated[bool, Option("Let everybody see what --push-to uploads.", OUTPUT)] = False


def check_packages(healing: Healing, report_to: str | None) -> None:
    """Make sure that what was asked for is installed.

    Raises:
        MissingPackageError: it is not.
    """
    if healing.lora is not None and find_spec("peft") is None:
        raise MissingPackageError("--lora needs the peft package: pip install 'llmprune[lora]'. Or leave it out.")
    if healing.optimizer != "adamw" and find_spec("bitsandbytes") is None:
        raise MissingPackageError(
            f"--optimizer {healing.optimizer} needs the bitsandbytes package: pip install 'llmprune[bitsandbytes]'. "
            "Or leave it out."
        )
    if report_to is not None and not any(map(find_spec, REPORTERS[report_to])):
        raise MissingPackageError(
            f"--report-to {report_to} needs that package: pip install {report_to}. Or leave it out."
        )
