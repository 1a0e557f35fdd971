"""What a model keeps of every token that it has read."""

from __future__ import annotations

from dataclasses import dataclass

from llmprune_cli.family.widths import Widths


@dataclass(frozen=True)
class Cached:
    """How many numbers one layer keeps of a token; what does not grow with the text, such as a state, is none."""

    of_group: int = 0  # for each KV head
    of_head: int = 0  # for each query head, where keys and values are repeated before they are kept
    fixed: int = 0  # whatever the number of heads, such as the latent that keys and values are made of

    def __add__(self, other: Cached) -> Cached:
        return Cached(self.of_group + other.of_group, self.of_head + other.of_head, self.fixed + other.fixed)

    def times(self, count: int) -> Cached:
        """What so many places that keep the same keep together."""
        return Cached(count * self.of_group, count * self.of_head, count * self.fixed)

    def numbers(self, widths: Widths, once: bool = False) -> int:
        """The numbers in a model of these widths.

        Args:
            once: every KV head is kept once, as runtimes do that never repeat one.
        """
        heads = widths.num_key_value_heads if once else widths.num_attention_heads
        return self.of_group * widths.num_key_value_heads + self.of_head * heads + self.fixed
