"""The proof that tokens can go: cut a small twin for real and hold what it answers against the whole one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from llmprune_cli.apply.proof import TOLERANCE, load_stock
from llmprune_cli.apply.pruned_folder import prune_twin
from llmprune_cli.coupling.subject import Subject, known_architecture
from llmprune_cli.coupling.twin import SEED, TOKENS, VOCABULARY, build_twin, one_thread, proof_sizes
from llmprune_cli.errors import LlmpruneError, UnsupportedError, first_line
from llmprune_cli.family.architecture import reconfigure
from llmprune_cli.folder.scratch import scratch_folder, scratch_space
from llmprune_cli.plan.document import Vocabulary
from llmprune_cli.plan.requested_widths import Target
from llmprune_cli.startup.remembered import recall, remember
from llmprune_cli.vocabulary.numbering import new_numbers
from llmprune_cli.vocabulary.size import PER_LAYER

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEPT = 17  # of the twin's tokens; an odd number, since even ones of other axes would fit by chance
SPECIAL = 3  # tokens of the twin with the first numbers, to which its configuration refers
SHORTER = 5  # rows by which embeddings in every layer are fewer than others, where there are any


@dataclass(frozen=True)
class Unproven:
    """What the proof refuses, as it is remembered."""

    reason: str  # empty where it holds


def unproven_rows(subject: Subject) -> str:
    """Why the twin does not prove that tokens can go, as remembered or found out now; empty where it does."""
    place = known_architecture("tokens", subject.architecture)
    known = recall(place, Unproven)
    if known is None:
        try:
            prove_rows(subject)
            known = Unproven("")
        except LlmpruneError as error:
            known = Unproven(first_line(error).rstrip("."))
        remember(place, known)
    return known.reason


def prove_rows(subject: Subject) -> None:
    """Prove on a twin that tokens can go.

    Raises:
        UnsupportedError: it does not hold, see `changed_logits`.
    """
    difference = changed_logits(subject)
    if not difference <= TOLERANCE:
        raise UnsupportedError(
            f"The twin proof fails for {subject.architecture.config.model_type}: without some tokens, the logits of "
            f"the others change by {difference:.1e} of their size. Leave --vocab-size out."
        )


def changed_logits(subject: Subject) -> float:
    """Cut a twin to about half of its tokens, let it read text of these, and see how far their logits change.

    The cut twin must load through stock `AutoModelForCausalLM` with no missing, unexpected or mismatched key.

    Returns:
        The largest difference from the logits that the whole twin gives these tokens, relative to the largest of them.

    Raises:
        UnsupportedError: no twin can be built, or what is cut does not load.
    """
    architecture = subject.architecture
    if getattr(architecture.config, PER_LAYER, None):
        shorter = reconfigure(architecture.config, {PER_LAYER: VOCABULARY - SHORTER})
        architecture = replace(architecture, config=shorter)
    generator = torch.Generator().manual_seed(SEED)
    drawn = SPECIAL + torch.randperm(VOCABULARY - SPECIAL, generator=generator)[: KEPT - SPECIAL]
    kept = (*range(SPECIAL), *drawn.sort().values.tolist())
    tokens = torch.tensor(kept)[torch.randint(SPECIAL, KEPT, (2, TOKENS), generator=generator)]
    with one_thread(), scratch_folder() as folder:
        twin = build_twin(architecture, proof_sizes(architecture.config, False))
        dense, cut, own = folder / "dense", folder / "cut", twin.architecture
        whole = Target(own.widths, tuple(range(own.widths.num_hidden_layers)), ())
        with scratch_space():
            twin.model.save_pretrained(dense)
            cut.mkdir()
            prune_twin(dense, cut, subject.trace, own, whole, Vocabulary(VOCABULARY, kept))
        whole_model, part = (load_stock(saved, twin) for saved in (dense, cut))
        expected, given = _answers(whole_model, part, tokens, kept)
    return float((expected - given).abs().max() / expected.abs().max())


def _answers(
    whole: PreTrainedModel, part: PreTrainedModel, tokens: torch.Tensor, kept: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of kept tokens, [B, T, V'], that both models give the same text.

    Args:
        tokens: ids, [B, T], of kept tokens by their numbers in the whole vocabulary.
    """
    numbers = new_numbers(kept)
    renumbered = torch.tensor([[numbers[number] for number in row] for row in tokens.tolist()])
    with torch.no_grad():
        expected = whole(input_ids=tokens, use_cache=False).logits[..., list(kept)]
        return expected, part(input_ids=renumbered, use_cache=False).logits
