"""Calibration text: windows to fit on, and others to judge by."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import torch
from pydantic import Field, TypeAdapter, ValidationError

from llmprune_cli.errors import CheckpointError, UsageError
from llmprune_cli.folder.documents import is_there
from llmprune_cli.options import Text
from llmprune_cli.text.conversations import BETWEEN, Speller
from llmprune_cli.text.corpus import Corpus, load_corpus, load_usual_corpora
from llmprune_cli.text.names import SELF, USUAL_TEXT, has_splits, parts_of, split_of
from llmprune_cli.text.windows import Reader, fitting_length, mixed, read_corpus, windows_in

if TYPE_CHECKING:
    from collections.abc import Callable


Writer: TypeAlias = "Callable[[int], Corpus]"  # a text of so many tokens, that a model writes itself
Count: TypeAlias = Annotated[int, Field(gt=0, le=2**53)]
Seed: TypeAlias = Annotated[int, Field(ge=-(2**63), lt=2**64)]  # that torch takes
HELD_OUT_SHARE = 8  # one window in so many is held out, one at least
ROUNDED = 2  # windows more than a share has, since shares are whole windows
JUDGED_TOKENS = 16_384  # of further text, on which the result is judged, where there are as many


@dataclass(frozen=True)
class CalibrationText:
    """Windows of tokens, drawn from all over a corpus."""

    corpus: Corpus
    fitted: torch.Tensor  # token ids, [N, T]
    held_out: torch.Tensor  # token ids, [M, T]; no statistic sees them, but candidates are chosen by them
    judged: torch.Tensor  # token ids, [K, T]; nothing sees them before the result; empty where no text is left
    held_out_parts: torch.Tensor = field(default_factory=lambda: torch.empty(0, 3, dtype=torch.long))  # see `Reading`
    judged_parts: torch.Tensor = field(default_factory=lambda: torch.empty(0, 3, dtype=torch.long))

    @property
    def without_corpus(self) -> CalibrationText:
        """The windows, without the text from which they were drawn."""
        return replace(self, corpus=replace(self.corpus, text="", answers=None))


@dataclass(frozen=True)
class SeenText:
    """Text that a pruned model was fitted on, as its manifest says."""

    dataset: str
    split: str
    tokens: Count
    seq_len: Count
    seed: Seed

    @classmethod
    def of(cls, said: dict[str, Any] | None) -> SeenText | None:
        """What the `calibration` of a manifest says of it; None where that is too little."""
        try:
            found = TypeAdapter(cls).validate_python(said)
            parts_of(found.dataset)
        except (ValidationError, UsageError):
            return None
        return found

    def share_of(self, name: str, split: str) -> float:
        """Of these tokens that is of a text; 0 where none is."""
        path = Path(name)
        if name == SELF or (has_splits(name) and split_of(name, split) != split_of(name, self.split)):
            return 0.0
        parts = (part for part in parts_of(self.dataset) if part.name)
        return sum(part.share for part in parts if part.name == name or _is_same_file(path, Path(part.name)))

    def places(self, tokens: int, share: float) -> torch.Tensor:
        """Which of a text's tokens are among these, [tokens] of bool.

        Args:
            share: see `share_of`.
        """
        count, seen = tokens // self.seq_len, torch.zeros(tokens, dtype=torch.bool)
        fitted = max(1, round(self.tokens // self.seq_len * share))
        seen[: count * self.seq_len].view(count, self.seq_len)[_order(count, self.seed)[:fitted]] = True
        return seen


def prepare_calibration(
    options: Text,
    reader: Reader,
    seed: int,
    warn: Callable[[str], None],
    write: Writer | None = None,
) -> CalibrationText:
    """Draw windows from a corpus: as many as asked for, or as there are.

    Args:
        write: see `load_calibration`.

    Raises:
        CheckpointError: no such text, less than two windows of it, or a tokenizer of another model.
    """
    parts = load_calibration(options, Speller(reader.tokenizer), warn, write, tokens_to_write(options))
    length = window_tokens(options, reader.longest, warn)
    wanted = max(1, options.calibration_tokens // length)
    corpus = together(options.calibration, [own for own, _ in parts])
    shares = _judged_shares(parts)
    found = []
    for (own, share), judged, begin in zip(parts, shares, begins_in([own for own, _ in parts]), strict=True):
        reading = read_corpus(own, reader)
        windows = windows_in(reading.tokens, length, None, own.origin)
        places = _drawn(own, windows, max(1, round(wanted * share)), judged, seed, warn)
        told = (reading.parts(length, place, begin) for place in places[1:])
        found.append((*(windows[place] for place in places), *told))
    return CalibrationText(corpus, *(mixed([*each]) for each in zip(*found, strict=True)))


def _judged_shares(parts: list[tuple[Corpus, float]]) -> list[float]:
    """Which share of the tokens to judge by is of each text: none of what the model wrote, where there are others."""
    others = sum(share for own, share in parts if own.name != SELF)
    if not others:
        return [share for _, share in parts]
    return [share / others if own.name != SELF else 0.0 for own, share in parts]


def window_tokens(options: Text, longest: int | None, warn: Callable[[str], None]) -> int:
    """How many tokens there are in a window; where that is not what was asked for, it is said.

    Args:
        longest: tokens that the model can attend to, if it says so.
    """
    length = fitting_length(options.calibration_seq_len, longest, Text.calibration_seq_len, warn)
    if options.calibration_tokens < length:
        warn(
            f"--calibration-tokens {options.calibration_tokens} is less than one window of {length}, so one window "
            "of every text is fitted on. --calibration-seq-len makes windows shorter."
        )
    return length


def _drawn(
    corpus: Corpus, windows: torch.Tensor, wanted: int, share: float, seed: int, warn: Callable[[str], None]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers of windows to fit on, to choose by and to judge by; the last are the same, however many the others are.

    Args:
        windows: token ids, [N, T].
        wanted: windows to fit on.
        share: of the tokens to judge by that is of this corpus.
    """
    length = windows.shape[1]
    if len(windows) < 2:
        raise CheckpointError(
            f"{corpus.origin} gives one window of {length} tokens; calibration needs two. Give more text or a smaller "
            "--calibration-seq-len."
        )
    held_out = max(1, min(wanted // HELD_OUT_SHARE, len(windows) // 2))
    fitted = min(wanted, len(windows) - held_out)
    if fitted < wanted:
        warn(f"{corpus.origin} has {fitted * length:,} tokens to calibrate on instead of {wanted * length:,}.")
    order = _order(len(windows), seed)
    left = len(windows) - fitted - held_out
    judged = min(left, windows_to_judge_by(length, share)) if share else 0
    places = (order[:fitted], order[fitted : fitted + held_out], order[len(windows) - judged :])
    drawn, chosen_by, judged_by = (place.sort().values for place in places)
    return drawn, chosen_by, judged_by


def windows_to_judge_by(length: int, share: float = 1.0) -> int:
    """How many windows hold the tokens to judge by, or a share of them; the first token of each is not predicted."""
    return max(1, math.ceil(share * JUDGED_TOKENS / (length - 1)))


def _order(windows: int, seed: int) -> torch.Tensor:
    """In which windows are drawn, [windows]: those to fit on first, then those to choose by, last those to judge by."""
    return torch.randperm(windows, generator=torch.Generator().manual_seed(seed))


def _is_same_file(path: Path, other: Path) -> bool:
    return is_there(path) and is_there(other) and path.samefile(other)


def together(name: str | None, corpora: list[Corpus]) -> Corpus:
    """Several texts as one.

    Args:
        name: that the user gave them, if any.
    """
    if len(corpora) == 1:
        return corpora[0]
    texts, origins = (BETWEEN.join(c.text for c in corpora), ", ".join(c.origin for c in corpora))
    return Corpus(name or USUAL_TEXT, texts, origins)


def begins_in(corpora: list[Corpus]) -> list[int]:
    """The characters at which texts begin in that of `together`."""
    return [0, *accumulate(len(own.text) + len(BETWEEN) for own in corpora[:-1])]


def warn_of_shared_text(calibration: Corpus, evaluated: Corpus, warn: Callable[[str], None]) -> None:
    """Warn where one text is a part of the other: perplexity then tells how well it was fitted."""
    shorter, longer = sorted((calibration.text, evaluated.text), key=len)
    if shorter in longer:
        warn(
            f"The text that is evaluated ({evaluated.origin}) is the one that was calibrated on, so its perplexity "
            "flatters the pruned model. Give another --split or --dataset, or another --calibration."
        )


def tokens_to_write(options: Text) -> int:
    """How long a text is of which a model writes its share: to be calibrated on, to choose by, and where there is no
    other text also to be judged by.
    """
    length, parts = options.calibration_seq_len, parts_of(options.calibration or USUAL_TEXT)
    judged = windows_to_judge_by(length) * length if all(part.name == SELF for part in parts) else 0
    return options.calibration_tokens * (HELD_OUT_SHARE + 1) // HELD_OUT_SHARE + judged


def load_calibration(
    options: Text,
    speller: Speller,
    warn: Callable[[str], None],
    write: Writer | None = None,
    tokens: int = 0,
    option: str = "--calibration",
) -> list[tuple[Corpus, float]]:
    """The texts asked for, each with its share of the tokens; by default WikiText-2 and documentation.

    Args:
        speller: of conversations.
        write: what makes the model write text itself.
        tokens: that it is to write, if that is all that is asked for.
        option: that names the text.

    Raises:
        CheckpointError: see `load_corpus`.
    """
    split = options.calibration_split
    if options.calibration is not None:
        parts = parts_of(options.calibration)
        found = []
        for part in parts:
            if part.name == SELF and write is not None:
                corpus = write(math.ceil(tokens * part.share) + ROUNDED * options.calibration_seq_len)
            else:
                corpus = load_corpus(part.name, split, options.text_column, speller)
            found.append((corpus, part.share))
        return found
    return load_usual_corpora(split, Text.calibration_split, options.calibration_seq_len, warn, option)
