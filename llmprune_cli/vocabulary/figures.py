"""What is reported of a vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

from llmprune_cli.vocabulary.request import STEP


@dataclass(frozen=True)
class VocabularySummary:
    """The tokens of a model, which are a width as well."""

    tokens: int  # rows of the embedding
    after: int | None  # of them when pruned; None where all stay
    must_stay: int | None  # of them, whatever the text; None where no token can go
    parameters: int  # in the rows of all tokens
    share: float  # of the model's parameters that these are
    refused: str  # why no token can go; empty where some can

    @property
    def legal(self) -> str:
        """The smallest number of tokens that can stay, in words; nothing where none can go."""
        return f"{-(-self.must_stay // STEP) * STEP:,}" if self.must_stay is not None else ""

    def saved_by(self, tokens: int) -> tuple[int, float]:
        """The parameters that go with all tokens but so many, and their share of the model's."""
        gone = 1 - tokens / self.tokens
        return round(gone * self.parameters), gone * self.share


@dataclass(frozen=True)
class TriedVocabulary:
    """A number of tokens that was weighed for a target size."""

    tokens: int
    bits_per_byte: float  # of held-out text, after a short calibration of the rest of the target
