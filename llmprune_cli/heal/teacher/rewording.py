"""Words that a student has no token for, put in the place of others in a text that has none of them."""

from __future__ import annotations

import json
import unicodedata
from typing import TYPE_CHECKING

import torch

from llmprune_cli.heal.teacher.token_map import TokenMap
from llmprune_cli.progress import Listener
from llmprune_cli.run.divergence import check_loss, predicted
from llmprune_cli.run.layered_model import LayeredModel
from llmprune_cli.vocabulary.tokens import is_byte_level

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARE = 0.08  # of a window's tokens that give way, at most
APART = 3  # places from one of them to the next, at least
STATES_BYTES = 2**30  # of hidden states that are in memory
SPACE = "▁"  # as SentencePiece writes it
WITHIN_WORDS = "'’_"  # what words go on with beside letters, marks and digits
WORD, BREAK = 1, 2  # kinds of tokens: a space and letters; what else a word ends before


def token_kinds(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """The kind of each token, [V]; 0 for all that are of no use here, such as special ones and parts of characters."""
    from tokenizers import decoders

    bytes_of, known = decoders.ByteLevel(), tokenizer.get_vocab()
    has_bytes = is_byte_level(json.loads(tokenizer.backend_tokenizer.to_str()))
    apart = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    kinds = torch.zeros(1 + max(known.values()), dtype=torch.long)
    for token, number in known.items():
        text = bytes_of.decode([token]) if has_bytes else token.replace(SPACE, " ")
        if token not in apart and text:
            kinds[number] = _kind(text)
    return kinds


def _kind(text: str) -> int:
    if text[0] == " " and text[1:] and all(unicodedata.category(own)[0] in "LM" for own in text[1:]):
        return WORD
    goes_on = text[0] in WITHIN_WORDS or unicodedata.category(text[0])[0] in "LMNCS"
    return BREAK if text[0].isspace() or not goes_on else 0


def reword(
    teacher: LayeredModel, tokens: TokenMap, kinds: torch.Tensor, windows: torch.Tensor, seed: int, listener: Listener
) -> torch.Tensor:
    """Put words that the student has no token for in the place of others, each of which is one token.

    Where, and which, is drawn by the probabilities that the teacher gives these tokens: a word gives way to another
    that might have stood behind the same text.

    Args:
        kinds: of the teacher's tokens, see `token_kinds`.
        windows: of the student's tokens, [N, T].

    Returns:
        Windows [N, T], whose ends are cut off where the text became longer.

    Raises:
        CheckpointError: see `check_loss`.
    """
    rows = int(teacher.architecture.config.get_text_config().vocab_size)
    numbered = enumerate(zip(tokens.spellings, kinds[:rows].tolist(), strict=False))
    words = torch.tensor([number for number, (spelling, kind) in numbered if len(spelling) > 1 and kind == WORD])
    if not len(words):
        return windows
    generator = torch.Generator().manual_seed(seed)
    together = max(1, STATES_BYTES // (4 * teacher.widths.hidden_size * windows.shape[1]))
    listener.stage("Putting in words that went", teacher.layers * -(-len(windows) // together))
    reworded = []
    for part in windows.split(together):
        chances, drawn = _draw_words(teacher, tokens.read(part), kinds, words, generator, listener)
        for window, own_chances, own_words in zip(part.tolist(), chances, drawn.tolist(), strict=True):
            for place in sorted(_draw_places(own_chances, generator), reverse=True):
                window[place + 1 : place + 2] = tokens.spellings[own_words[place]]
            reworded.append(window[: windows.shape[1]])
    return torch.tensor(reworded)


def _draw_words(
    teacher: LayeredModel,
    windows: torch.Tensor,
    kinds: torch.Tensor,
    words: torch.Tensor,
    generator: torch.Generator,
    listener: Listener,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The probability that one of some words follows each place, and one of them, drawn by theirs.

    Args:
        windows: of the teacher's tokens, [N, T].
        words: tokens, in their order.

    Returns:
        Probabilities, 0 where no whole word follows the place, and tokens, both [N, T−1].
    """
    chances, drawn = torch.zeros(windows[:, 1:].shape), torch.zeros_like(windows[:, 1:])
    own = kinds[windows]
    is_word = own[:, 1:] == WORD
    is_word[:, :-1] &= own[:, 2:] > 0
    is_word[:, -1] = False  # what follows is not known
    with torch.inference_mode():
        for states, items in teacher.walk(windows):  # noqa: B007, what is behind the last layer
            listener.advance(1)
        head = teacher.load_ends(exact=True, compute=teacher.compute)
        for number, places, _ in predicted(head, windows):
            likely = head.logits(states[number : number + 1, places], items)[0].softmax(-1)
            sums = likely[:, words.to(likely.device)].cpu().double().cumsum(-1)
            totals = sums[:, -1:].contiguous()
            check_loss(float(totals.sum()))
            picked = torch.searchsorted(sums, totals * torch.rand(totals.shape, generator=generator))
            chances[number, places] = totals[:, 0].float()
            drawn[number, places] = words[picked[:, 0].clamp_max(len(words) - 1)]
    return chances * is_word, drawn


def _draw_places(chances: torch.Tensor, generator: torch.Generator) -> list[int]:
    """Places [T−1] drawn by their chances without putting back (the Gumbel-top-k trick, arXiv 1903.06059)."""
    noise = torch.empty_like(chances).exponential_(generator=generator).log()
    most, found = int(SHARE * len(chances)), list[int]()
    for place in (chances.log() - noise).argsort(descending=True).tolist():
        if len(found) == most or not chances[place]:
            break
        if all(abs(place - other) >= APART for other in found):
            found.append(place)
    return found
