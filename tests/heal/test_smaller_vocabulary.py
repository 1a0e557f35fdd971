"""A student that has fewer tokens than its teacher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from llmprune_cli.heal.teacher.token_map import map_tokens
from llmprune_cli.options import ModelReference
from llmprune_cli.source.opening import open_checkpoint
from llmprune_cli.source.tokenizer import load_tokenizer
from support.cli import BY_MAGNITUDE, run_cli
from support.heal_runs import recover, run_recover
from support.tiny import BYTE_LEVEL_VOCABULARY


@pytest.fixture(scope="module")
def text(whole: Path) -> Path:
    """Text that uses tokens which stay, and tokens which go."""
    path = whole.with_name("text.txt")
    path.write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    return path


CUT = ("--vocab-size", "320", *BY_MAGNITUDE, "--calibration-seq-len", "40", "--calibration-tokens", "400")


@pytest.fixture(scope="module")
def cut(whole: Path, text: Path) -> Path:
    folder = whole.with_name("cut")
    run = run_cli("prune", whole, *CUT, "--mlp", "50%", "--calibration", text, "--output", folder)
    assert run.code == 0, run.stderr
    return folder


def test_what_the_teacher_expects_becomes_what_the_student_can_say(whole: Path, cut: Path) -> None:
    references = (open_checkpoint(ModelReference(str(folder)), need_weights=True) for folder in (cut, whole))
    with next(references) as own, next(references) as its:
        tokenizers = load_tokenizer(own), load_tokenizer(its)
        tokens = map_tokens((own, tokenizers[0]), (its, tokenizers[1]))
        assert tokens is not None and map_tokens((its, tokenizers[1]), (its, tokenizers[1])) is None
    ids = torch.tensor(tokenizers[0]("model and text")["input_ids"])
    assert tokenizers[1].decode(tokens.read(ids)) == "model and text"
    logs = torch.randn(3, BYTE_LEVEL_VOCABULARY, dtype=torch.float64).log_softmax(-1)
    expected = torch.zeros(3, 320, dtype=torch.float64)
    for token, number in tokenizers[1].get_vocab().items():
        spelled = tokenizers[0].get_vocab().get(token)
        if spelled is None:
            spelled = tokenizers[0](tokenizers[1].decode([number]), add_special_tokens=False)["input_ids"][0]
        expected[:, spelled] += logs[:, number].exp()
    expected /= expected.sum(-1, keepdim=True)
    assert torch.allclose(tokens.regroup(logs), expected, atol=1e-12)


def test_a_model_with_fewer_tokens_is_healed(whole: Path, cut: Path, text: Path, tmp_path: Path) -> None:
    resident = recover(cut, text, tmp_path / "resident", "--teacher-mode", "resident")
    streamed = recover(cut, text, tmp_path / "streamed", "--teacher-mode", "streamed")
    assert (resident["loss"], streamed["loss"]) == ("kl+ce", "kl+ce")
    assert resident["is_better"] and resident["after"]["kl"] < 0.9 * resident["before"]["kl"]
    assert streamed["before"]["kl"] == pytest.approx(resident["before"]["kl"], rel=0.01)
    assert streamed["after"]["kl"] == pytest.approx(resident["after"]["kl"], rel=0.02)
    blocks = recover(cut, text, tmp_path / "blocks", "--mode", "blocks", "--learning-rate", "0.003")
    assert blocks["before"]["kl"] == pytest.approx(resident["before"]["kl"], rel=0.01)
    assert blocks["loss"] == "kl" and blocks["is_better"] and blocks["after"]["kl"] < blocks["before"]["kl"]
    words = ("prune", whole, *CUT, "--mlp", "50%", "--calibration", text, "--output", tmp_path / "both")
    run = run_cli(*words, "--recover", "1024", "--json")
    assert run.code == 0, run.stderr
    assert json.loads(run.stdout)["recovery"]["tokens"] >= 1000


def test_what_a_teacher_predicted_serves_again(cut: Path, text: Path, tmp_path: Path) -> None:
    cached = ("--teacher-mode", "streamed", "--teacher-cache", tmp_path / "cache")
    results = [recover(cut, text, tmp_path / name, *cached) for name in ("first", "second")]
    assert results[0]["after"] == results[1]["after"]


def test_text_without_tokens_that_went_is_told(cut: Path, text: Path, tmp_path: Path) -> None:
    assert "how to spell these" not in run_recover(cut, text, tmp_path / "with").stderr
    tokenizer = AutoTokenizer.from_pretrained(cut)
    known = [token for token in tokenizer.get_vocab() if token.isascii() and token.isalpha() and len(token) == 1]
    alike = tmp_path / "alike.txt"
    alike.write_text("\n".join(sorted(known) * 100), encoding="utf-8")
    run = run_recover(cut, alike, tmp_path / "without", "--loss", "kl")
    assert run.code == 0 and json.loads(run.stdout)["loss"] == "kl"
    assert "0.00% of the tokens of" in run.stderr and "self" in run.stderr
