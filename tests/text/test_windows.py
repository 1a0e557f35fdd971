"""Windows of text: drawn from all over, and kept apart."""

from __future__ import annotations

import pytest
import torch

from llmprune_cli.text.reading import UNKNOWN, Reading, predicted_bytes, read, spelled_bytes, window_text
from llmprune_cli.text.windows import spread_windows, windows_apart
from support.tokenizers_of_kinds import DECLARATION, SCRIPTS, learn

ENGLISH = DECLARATION[0] * 4
WINDOW = 12


def test_gradients_see_text_from_all_over() -> None:
    windows = torch.arange(64).view(32, 2)
    assert spread_windows(windows, 9)[:, 0].tolist() == [0, 20, 40, 62]
    assert spread_windows(windows, 1).shape == (1, 2) and len(spread_windows(windows, 1000)) == 32


def test_windows_of_another_use_are_left_out_unless_nothing_would_be_left() -> None:
    windows, judged = torch.arange(12).view(4, 3), torch.tensor([[3, 4, 5], [6, 7, 9]])
    assert windows_apart(windows, judged).tolist() == [[0, 1, 2], [6, 7, 8], [9, 10, 11]]
    assert windows_apart(windows[1:2], judged).tolist() == [[3, 4, 5]]
    assert windows_apart(windows, judged[:0]).tolist() == windows.tolist()


def read_by(kind: str, text: str, begins: bool = False) -> Reading:
    """A text in the tokens of a kind of tokenizer, after a start token or not."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=learn(kind), bos_token="<s>", unk_token="<unk>")
    return read(text, tokenizer, begins)


def letters_of(kind: str) -> str:
    """Those that a tokenizer knows of a text, and whole ones where it is cut into bytes."""
    known = {*"".join(learn(kind).get_vocab())}
    return "".join(letter for letter in ENGLISH if letter in known or letter == " " or kind != "unigram")


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("kind", ["byte-level", "unigram", "byte fallback"])
def test_what_a_tokenizer_loses_nothing_of_is_counted_as_its_tokens_spell_it(kind: str, begins: bool) -> None:
    reading = read_by(kind, letters_of(kind), begins)
    ends = [*range(WINDOW, len(reading.tokens), WINDOW)]
    windows = reading.tokens[: ends[-1]].view(-1, WINDOW)
    spelled = [spelled_bytes(reading.tokenizer, window) for window in windows]
    if begins and kind != "byte-level":
        spelled[0] -= 1  # the space that it puts before every text, and that is none of it
    parts = reading.parts(WINDOW, torch.arange(len(windows)), 0)
    counted = [
        predicted_bytes(reading.text, reading.tokenizer, windows[n : n + 1], parts[n : n + 1].tolist())
        for n in range(len(windows))
    ]
    assert counted == spelled and sum(counted) == reading.predicted_bytes(ends)


@pytest.mark.parametrize("kind", ["byte-level", "unigram", "byte fallback"])
def test_windows_share_out_the_letters_of_a_text_whatever_the_tokens_spell(kind: str) -> None:
    """Letters that are several tokens, or none but `<unk>`, are in one window, and whole."""
    text = "\n".join(SCRIPTS)
    reading = read_by(kind, text)
    count = len(reading.tokens) // WINDOW
    parts = reading.parts(WINDOW, torch.arange(count), 7)
    assert parts[0, 0] == 7 and parts[1:, 0].tolist() == parts[:-1, 2].tolist()
    assert reading.characters(count * WINDOW) == parts[-1, 2] - 7 and reading.characters(len(reading.tokens)) == len(
        text
    )
    windows = reading.tokens[: count * WINDOW].view(-1, WINDOW)
    texts = [
        window_text("." * 7 + text, reading.tokenizer, *each) for each in zip(windows, parts.tolist(), strict=True)
    ]
    assert "".join(texts) == text[: parts[-1, 2] - 7]
    size = sum(len(own.encode()) for own in texts)
    rest = predicted_bytes("." * 7 + text, reading.tokenizer, windows, parts.tolist())
    first = [text[a - 7 : b - 7] for a, b, _ in parts.tolist()]
    assert rest == size - sum(len(own.encode()) for own in first)


def test_a_tokenizer_that_tells_no_places_is_counted_by_what_its_tokens_spell() -> None:
    reading = read_by("byte-level", ENGLISH)
    window = reading.tokens[:WINDOW]
    assert predicted_bytes("", reading.tokenizer, [window], [UNKNOWN]) == spelled_bytes(reading.tokenizer, window) > 0
    assert window_text("", reading.tokenizer, window, UNKNOWN) == ENGLISH[: reading.characters(WINDOW)]
