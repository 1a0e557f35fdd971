"""Words that went are put in the place of others, where the teacher expects them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmprune_cli.commands.recover import end_to_end
from llmprune_cli.coupling.subject import understand
from llmprune_cli.errors import CheckpointError, OutputError, UnsupportedError
from llmprune_cli.heal.teacher import rewording
from llmprune_cli.heal.teacher.rewording import BREAK, SHARE, WORD, reword, token_kinds
from llmprune_cli.heal.teacher.token_map import TokenMap, map_tokens
from llmprune_cli.options import ModelReference
from llmprune_cli.progress import QUIET
from llmprune_cli.run import divergence
from llmprune_cli.run.layer import Ends
from llmprune_cli.run.layered_model import LayeredModel
from llmprune_cli.source.opening import open_checkpoint
from llmprune_cli.source.tokenizer import load_tokenizer
from support.cli import BY_MAGNITUDE, run_cli
from support.cut_vocabularies import save_whole
from support.full import in_full
from support.heal_runs import recover, recover_in_two, run_recover
from support.tiny import BYTE_LEVEL_VOCABULARY

CUT = ("--vocab-size", "320", *BY_MAGNITUDE, "--calibration-seq-len", "40", "--calibration-tokens", "400")


@pytest.fixture(scope="module")
def cut(whole: Path) -> Path:
    folder, text = whole.with_name("cut"), whole.with_name("text.txt")
    text.write_text((Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8"), encoding="utf-8")
    run = run_cli("prune", whole, *CUT, "--calibration", text, "--output", folder)
    assert run.code == 0, run.stderr
    return folder


@pytest.fixture(scope="module")
def alike(whole: Path, cut: Path) -> Path:
    """Text of words that both tokenizers spell alike, with one token each, and some numbers right behind them."""
    own = AutoTokenizer.from_pretrained(cut).get_vocab()
    words = [token[1:] for token in sorted(own) if token[0] == "Ġ" and token[1:].isascii() and token[1:].isalpha()]
    path = whole.with_name("alike.txt")
    text = " ".join(word + "7" * (number % 4 == 0) for number, word in enumerate(words * 300))
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def teacher(whole: Path, cut: Path) -> Iterator[tuple[LayeredModel, TokenMap, torch.Tensor]]:
    with ExitStack() as stack:
        small, large = (
            stack.enter_context(open_checkpoint(ModelReference(str(folder)), True)) for folder in (cut, whole)
        )
        reader = load_tokenizer(large)
        tokens = map_tokens((small, load_tokenizer(small)), (large, reader))
        assert tokens is not None
        yield LayeredModel(understand(large), "cpu", torch.float32), tokens, token_kinds(reader)


@pytest.fixture(scope="module")
def windows(cut: Path, alike: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(cut)
    return torch.tensor(tokenizer(alike.read_text(encoding="utf-8"))["input_ids"])[:376].view(8, 47)


Teacher = tuple[LayeredModel, TokenMap, torch.Tensor]


def words_that_went(tokens: TokenMap, kinds: torch.Tensor) -> torch.Tensor:
    went = torch.tensor([len(spelling) > 1 for spelling in tokens.spellings])
    return torch.nonzero(went & (kinds == WORD)).flatten()


def test_kinds_of_tokens(whole: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(whole)
    kinds, numbers = token_kinds(tokenizer), tokenizer.get_vocab()
    for token, kind in (("a", 0), ("Ġt", WORD), ("Ġ", BREAK), (".", BREAK), ("_", 0), ("'", 0), ("1", 0), ("Ċ", BREAK)):
        assert kinds[numbers[token]] == kind, token
    for token in (*tokenizer.all_special_tokens, "Ã", "ð", "â"):
        assert kinds[numbers[token]] == 0, token


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        *((own, WORD) for own in (" word", " é", " naïve", " слово", " हिन्दी")),
        *((own, BREAK) for own in (" ", "\n", "\n\n", ". ", ",", " 2", " —", " of the", "“")),
        *((own, 0) for own in ("ing", "7", "'t", "’s", "_var", "的", "\ufffd", "ी")),
    ],
)
def test_kinds_of_texts(text: str, kind: int) -> None:
    assert rewording._kind(text) == kind


def test_kinds_of_pieces_with_a_space_of_their_own(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(save_whole(tmp_path / "model", "byte fallback"))
    kinds, numbers = token_kinds(tokenizer), tokenizer.get_vocab()
    words = [token for token in numbers if token[0] == "▁" and token[1:].isascii() and token[1:].isalpha()]
    assert len(words) > 2 and all(kinds[numbers[token]] == WORD for token in words)
    assert kinds[numbers["<0x0A>"]] == 0 and all(kinds[numbers[token]] == 0 for token in tokenizer.all_special_tokens)


def test_words_give_way_to_such_as_the_teacher_expects(
    whole: Path, teacher: Teacher, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chances are sums of what the model predicts, and what is drawn went and is a word."""
    layered, tokens, kinds = teacher
    monkeypatch.setattr(divergence, "LOGIT_ELEMENTS", 7 * BYTE_LEVEL_VOCABULARY)  # a window in seven parts
    words, read = words_that_went(tokens, kinds), tokens.read(windows)
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
        expected = model(read).logits[:, :-1].softmax(-1)[..., words].sum(-1)
    chances, drawn = rewording._draw_words(layered, read, kinds, words, torch.Generator().manual_seed(0), QUIET)
    own = kinds[read]
    whole_words = (own[:, 1:-1] == WORD) & (own[:, 2:] > 0)
    assert torch.allclose(chances[:, :-1], expected[:, :-1] * whole_words, rtol=1e-4)
    assert not chances[:, -1].any() and bool((own[:, -1] == WORD).any()) and int(whole_words.sum()) > 100
    assert set(drawn[chances > 0].tolist()) <= set(words.tolist())


def test_what_is_drawn_follows_the_chances(whole: Path, teacher: Teacher, windows: torch.Tensor) -> None:
    layered, tokens, kinds = teacher
    words, read = words_that_went(tokens, kinds), tokens.read(windows[:1]).repeat(400, 1)
    chances, drawn = rewording._draw_words(layered, read, kinds, words, torch.Generator().manual_seed(1), QUIET)
    place = int(chances[0].argmax())
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
        likely = model(read[:1]).logits[0, place].softmax(-1)[words]
    found = torch.bincount(drawn[:, place], minlength=BYTE_LEVEL_VOCABULARY)[words] / 400
    assert float((found - likely / likely.sum()).abs().sum()) / 2 < 0.2  # of 400 draws


def test_places_are_drawn_by_their_chances() -> None:
    generator, chances = torch.Generator().manual_seed(0), torch.zeros(100)
    chances[[10, 11, 30, 50, 70]] = torch.tensor([0.3, 0.3, 0.3, 0.05, 0.05])
    drawn = [rewording._draw_places(chances, generator) for _ in range(200)]
    assert all(len(own) <= int(SHARE * 100) and set(own) <= {10, 11, 30, 50, 70} for own in drawn)
    assert not any({10, 11} <= set(own) for own in drawn)  # too near
    first = [own[0] for own in drawn]
    assert first.count(30) == pytest.approx(60, abs=25) and first.count(50) == pytest.approx(10, abs=10)
    assert rewording._draw_places(torch.zeros(100), generator) == []


def test_a_reworded_text_is_the_same_but_for_what_was_put_in(
    cut: Path, teacher: Teacher, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each new window is the old one with words spelled in pieces, and reads as the tokenizer would read it."""
    layered, tokens, kinds = teacher
    assert tokens.share_that_went(windows) == 0
    reworded = reword(layered, tokens, kinds, windows, 0, QUIET)
    assert reworded.shape == windows.shape
    assert not torch.equal(reworded, reword(layered, tokens, kinds, windows, 1, QUIET))
    assert 0.5 * SHARE < tokens.share_that_went(reworded) < 1.3 * SHARE
    tokenizer, generator = AutoTokenizer.from_pretrained(cut), torch.Generator().manual_seed(0)
    words, read = words_that_went(tokens, kinds), tokens.read(windows)
    chances, drawn = rewording._draw_words(layered, read, kinds, words, generator, QUIET)
    for number, new in enumerate(reworded.tolist()):
        first, *rest = windows[number].tolist()
        places, expected = rewording._draw_places(chances[number], generator), [first]
        for place, token in enumerate(rest):
            expected += tokens.spellings[drawn[number, place]] if place in places else [token]
        assert len(places) == int(SHARE * 46) and expected[: len(new)] == new
        whole_words = tokenizer(tokenizer.decode(new).rsplit(" ", 1)[0])["input_ids"]
        assert len(whole_words) > 30 and whole_words == new[: len(whole_words)]
    monkeypatch.setattr(rewording, "STATES_BYTES", 1)  # one window at a time, which draws in another order
    assert 0.5 * SHARE < tokens.share_that_went(reword(layered, tokens, kinds, windows, 0, QUIET)) < 1.3 * SHARE


def test_text_without_words_that_went_gets_some(cut: Path, alike: Path, tmp_path: Path) -> None:
    run = run_recover(cut, alike, tmp_path / "healed")
    assert run.code == 0, run.stderr
    assert "give way to words that went" in run.stderr and "with words put in that went" in run.stdout
    chats, said = tmp_path / "chats.jsonl", alike.read_text()
    turns = zip(*(re.findall(".{1,60}", said, re.DOTALL)[first::2] for first in (0, 1)), strict=False)
    chats.write_text("".join(f"{json.dumps({'prompt': one, 'completion': two})}\n" for one, two in turns))
    for text, *options in ((alike, "--loss", "ce"), (alike, "--mode", "blocks"), (chats, "--loss-on", "assistant")):
        untouched = run_recover(cut, text, tmp_path / options[1], *options)
        assert untouched.code == 0, untouched.stderr
        assert "give way" not in untouched.stderr and "how to spell these" in untouched.stderr
        assert "put in" not in untouched.stdout


def test_a_reworded_text_is_drawn_once_for_a_cache(cut: Path, alike: Path, tmp_path: Path) -> None:
    cached = ("--teacher-mode", "streamed", "--teacher-cache", tmp_path / "cache")
    results = [recover(cut, alike, tmp_path / name, *cached) for name in ("first", "second")]
    assert results[0]["after"] == results[1]["after"] and len([*(tmp_path / "cache").glob("text-*.safetensors")]) == 1


def test_a_teacher_whose_layers_do_not_run_alone_leaves_the_text(
    cut: Path, alike: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise UnsupportedError("its layers share something")

    monkeypatch.setattr(end_to_end, "reword", refuse)
    run = run_recover(cut, alike, tmp_path / "healed")
    assert run.code == 0 and "how to spell these" in run.stderr and "put in" not in run.stdout, run.stderr


def test_a_reworded_text_outlives_an_error(
    cut: Path, alike: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes on draws nothing anew."""

    def fail(*_: object) -> None:
        raise OutputError("no room")

    with monkeypatch.context() as patched:
        patched.setattr(end_to_end, "choose_teacher", fail)
        run = run_recover(cut, alike, tmp_path / "healed")
        assert run.code != 0 and "--resume" in run.stderr
    monkeypatch.setattr(end_to_end, "reword", fail)
    assert "put in" in recover(cut, alike, tmp_path / "healed", "--resume")["origin"]


def test_a_teacher_that_predicts_nothing_is_refused(
    teacher: Teacher, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    layered, tokens, kinds = teacher
    with pytest.MonkeyPatch.context() as patched, pytest.raises(CheckpointError, match="damaged"):
        patched.setattr(
            Ends,
            "logits",
            lambda self, states, items: torch.full((*states.shape[:2], BYTE_LEVEL_VOCABULARY), torch.nan),
        )
        reword(layered, tokens, kinds, windows, 0, QUIET)


@in_full
def test_two_processes_train_on_the_same_reworded_text(cut: Path, alike: Path, tmp_path: Path) -> None:
    one, two = recover(cut, alike, tmp_path / "one"), recover_in_two(cut, alike, tmp_path / "two")
    assert "put in" in two["origin"] and two["before"]["kl"] == pytest.approx(one["before"]["kl"], rel=0.005)
