"""An exported model is held against transformers: the same prompts, the same choices, nearly the same probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llmprune_cli.errors import CheckpointError, VerificationError, first_line
from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.formats.registry import Format, Limits, Runtime, Tokenizes, Verification
from llmprune_cli.source.full_model import load_model
from llmprune_cli.source.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPTS = (
    "The history of the city begins with a small settlement by the river, where traders",
    "def median(values):\n    ordered = sorted(values)\n    middle = len(ordered) // 2\n",
    "Der schnelle Fuchs springt über 3 Zäune; 他喜欢读书。 What does he do next?",
)
PROMPT_TOKENS = 24  # at most, of each prompt
NEW_TOKENS = 64
LIKELY = 1e-4  # probability from which a token counts in the largest difference; the likeliest always do
TIE = 1e-3  # nats: where the two likeliest tokens are this close, either is right
USUAL_COST = 1e-3  # nats that bfloat16 costs a model in transformers, without raising what an export may cost
ROUNDINGS = 2  # times that cost are fine: two ways to round differ from each other as much as from float32
NEVER = -1e4  # logit of a token that the runtime does not speak of


def missing_runtime(form: Format) -> str | None:
    """Why a format cannot be verified here; None where it can."""
    if form.runtime is None:
        return "transformers itself reads it"
    if find_spec(form.package) is None:
        return f"{form.package} is not installed; pip install 'llmprune[{form.extra}]' brings it"
    return None


def missing_memory(checkpoint: Checkpoint) -> str | None:
    """Why a model is too large to be loaded twice here, in float32; None where it is not."""
    import psutil

    needed, free = 2 * 4 * checkpoint.parameter_count, psutil.virtual_memory().available
    if needed <= free:
        return None
    return f"comparing takes about {needed / 2**30:.1f} GiB of memory and {free / 2**30:.1f} GiB are free"


def verify(
    checkpoint: Checkpoint, form: Format, folder: Path, dtype: str, advance: Callable[[int], None]
) -> Verification:
    """Let the runtime go on with some prompts, and ask transformers about each of its choices.

    Args:
        folder: that holds the exported model.
        dtype: in which it was written, by the format's name.
        advance: by one for each prompt.

    Raises:
        VerificationError: the runtime does not load or run it, or is further from transformers than the format's
            limits.
    """
    assert form.runtime is not None
    model = load_model(checkpoint, "cpu", "float32")
    tokenizer = _tokenizer(checkpoint)
    longest = getattr(model.config, "max_position_embeddings", None) or 2**31
    prompts = [ids[: max(1, longest // 2)] for ids in _prompts(tokenizer, int(checkpoint.config.vocab_size))]
    divergences, differences, agreements, texts = [], [], [], []
    with form.runtime(folder) as runtime, torch.inference_mode():
        if isinstance(runtime, Tokenizes) and tokenizer is not None:
            _compare_tokens(tokenizer, runtime)
        for prompt in prompts:
            tokens = min(NEW_TOKENS, longest - len(prompt))
            expected, found, chosen = _both(model, runtime, prompt, tokens)
            texts.append(torch.cat([prompt, chosen]))
            divergences.append(_kl(expected, found))
            best = expected.max(-1).values
            likely = expected >= best.clamp(max=math.log(LIKELY))[:, None]
            differences.append((expected - found).abs()[likely].max())
            agreements.append(expected.gather(-1, chosen[:, None])[:, 0] > best - TIE)
            advance(1)
    kl, agreed = torch.cat(divergences), torch.cat(agreements)
    limits = form.limits[dtype]
    if kl.mean() > limits.kl and not limits.same_tokens:
        rounded = load_model(checkpoint, "cpu", "bfloat16")
        limits = replace(limits, kl=kl_limit(limits.kl, _rounding_cost(model, rounded, texts)))
    result = Verification(
        runtime=f"{form.package} {version(form.package)}",
        prompts=len(prompts),
        tokens=len(kl),
        kl=max(0.0, float(kl.mean())),
        kl_limit=limits.kl,
        largest_difference=float(torch.stack(differences).max()),
        same_tokens=float(agreed.float().mean()),
    )
    _hold(result, limits)
    return result


def _kl(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    return (expected.exp() * (expected - found)).sum(-1)


def kl_limit(usual: float, cost: float) -> float:
    """What an export may differ by from a model that transformers itself computes otherwise in bfloat16, nats.

    Args:
        usual: the limit for other models.
        cost: see `_rounding_cost`.
    """
    return max(usual, usual * cost / USUAL_COST, ROUNDINGS * cost)


def _rounding_cost(model: torch.nn.Module, rounded: torch.nn.Module, texts: list[torch.Tensor]) -> float:
    """What bfloat16 costs a model in transformers: mean KL(float32 ‖ bfloat16) of the next token, nats.

    Pruning without any repair can leave a model so sure of what it says that all rounding turns it around.
    """
    costs = []
    with torch.inference_mode():
        for text in texts:
            sides = (side(input_ids=text[None], use_cache=False).logits[0].double() for side in (model, rounded))
            costs.append(_kl(*(logits.log_softmax(-1) for logits in sides)))
    return float(torch.cat(costs).mean())


def _hold(result: Verification, limits: Limits) -> None:
    wrong = []
    if not result.kl <= limits.kl:  # not a number does not hold either
        wrong.append(f"KL per token is {result.kl:.2g} nats, more than {limits.kl:g}")
    if limits.same_tokens and result.same_tokens < 1:
        wrong.append(f"{1 - result.same_tokens:.1%} of the greedy tokens differ")
    if wrong:
        raise VerificationError(
            f"What {result.runtime} makes of the export is not what transformers makes of the model: "
            f"{' and '.join(wrong)}. Nothing was kept; please report this, or pass --no-verify to keep it."
        )


def _both(
    model: torch.nn.Module, runtime: Runtime, prompt: torch.Tensor, tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities [n, V] by transformers and by the runtime, at the places of the tokens [n] it chose.

    Where the runtime speaks of the likeliest tokens only, both are those of a token that is one of them.
    """
    try:
        made = runtime.continue_greedily(prompt, tokens)
    except (RuntimeError, ValueError, AssertionError) as error:  # as runtimes say that they cannot go on
        reason = first_line(error)
        raise VerificationError(f"The export does not run: {reason}. Nothing was kept; please report this.") from error
    ids = torch.cat([prompt, made.tokens])[:-1]
    logits = model(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 :].float()
    width = min(logits.shape[-1], made.log_probs.shape[-1])  # embeddings may be padded beyond the tokenizer's tokens
    expected, found = logits[:, :width], made.log_probs[:, :width]
    unsaid = found.isneginf()
    sides = (torch.where(unsaid, NEVER, side.double()).log_softmax(-1) for side in (expected, found))
    return next(sides), next(sides), made.tokens


def _compare_tokens(tokenizer: PreTrainedTokenizerBase, runtime: Tokenizes) -> None:
    """Hold a runtime's tokens of the prompts against the tokenizer's."""
    for text in PROMPTS:
        expected, found = list(tokenizer(text)["input_ids"]), runtime.tokenize(text)
        if expected != found:
            place = next((i for i, pair in enumerate(zip(expected, found, strict=False)) if len({*pair}) > 1), 0)
            raise VerificationError(
                f"The export splits text into other tokens than the model's tokenizer: {text!r} begins to differ at "
                f"token {place} ({expected[place : place + 4]}, there {found[place : place + 4]}). Nothing was kept; "
                "please report this, or pass --no-verify to keep it."
            )


def _tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase | None:
    try:
        return load_tokenizer(checkpoint)
    except CheckpointError:
        return None


def _prompts(tokenizer: PreTrainedTokenizerBase | None, vocabulary: int) -> list[torch.Tensor]:
    """Token ids of some text; at random where a checkpoint has no tokenizer."""
    if tokenizer is None:
        seeded = torch.Generator().manual_seed(0)
        return [torch.randint(vocabulary, (PROMPT_TOKENS,), generator=seeded) for _ in PROMPTS]
    return [torch.tensor(tokenizer(text)["input_ids"][:PROMPT_TOKENS]) for text in PROMPTS]
