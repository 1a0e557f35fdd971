"""How a teacher's tokens are spelled in its student's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmprune_cli.heal.teacher.token_map import map_tokens
from llmprune_cli.options import ModelReference
from llmprune_cli.source.opening import open_checkpoint
from llmprune_cli.source.tokenizer import load_tokenizer
from support.cli import run_cli
from support.cut_vocabularies import cut, save_whole
from support.full import examples
from support.gguf_exports import tiny
from support.refusals import edit_json
from support.tokenizers_of_kinds import strings

KINDS = ("byte-level", "whole words", "byte fallback", "unigram")


@pytest.mark.parametrize("kind", examples(KINDS, ("byte fallback", "unigram")))
def test_texts_are_spelled_as_their_tokens_are(kind: str, tmp_path: Path) -> None:
    model = save_whole(tmp_path / "model", kind)
    references = (ModelReference(str(folder)) for folder in (cut(model, tmp_path / "cut"), model))
    with open_checkpoint(next(references), True) as pruned, open_checkpoint(next(references), True) as teacher:
        own, its = load_tokenizer(pruned), load_tokenizer(teacher)
        tokens = map_tokens((pruned, own), (teacher, its))
    assert tokens is not None
    known, shares = own.get_vocab(), []
    for text in strings()[:50]:  # of scripts that the tokenizers have learned
        pieces, words = own(text)["input_ids"], its.convert_ids_to_tokens(its(text)["input_ids"])
        went = sum(word not in known for word in words) / len(words)
        shares.append((tokens.share_that_went(torch.tensor([pieces])), went))
    found, real = zip(*shares, strict=True)
    if kind == "unigram":  # spells a few otherwise, see `map_tokens`
        assert sum(found) == pytest.approx(sum(real), abs=0.05 * len(shares))
    else:
        assert found == pytest.approx(real, abs=1e-9) and any(found)


def test_rows_without_a_token_that_a_gguf_file_names_are_no_tokens(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    model = tiny(tmp_path / "model", "llama")
    run = run_cli("export", model, "--format", "gguf", "--output", tmp_path / "out", "--no-verify")
    assert run.code == 0, run.stderr
    (file,) = (tmp_path / "out").glob("*.gguf")
    with (
        open_checkpoint(ModelReference(str(file)), True) as pruned,
        open_checkpoint(ModelReference(str(model)), True) as own,
    ):
        sides = (pruned, load_tokenizer(pruned)), (own, load_tokenizer(own))
        assert len(sides[0][1].get_vocab()) > len(sides[1][1].get_vocab())
        assert map_tokens(*sides) is None


def test_a_teachers_token_without_a_row_is_none_of_its_tokens(tmp_path: Path) -> None:
    model = save_whole(tmp_path / "model", "byte fallback")
    rows = json.loads((model / "config.json").read_text())["vocab_size"]
    token = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}

    def add(document: dict[str, Any]) -> None:
        last = 1 + max(own["id"] for own in document["added_tokens"])
        document["added_tokens"] += [{"id": n, "content": f"<unused{n}>", **token} for n in range(last, rows + 1)]

    edit_json(model / "tokenizer.json", add)
    folder = cut(model, tmp_path / "cut")
    with (
        open_checkpoint(ModelReference(str(folder)), True) as pruned,
        open_checkpoint(ModelReference(str(model)), True) as own,
    ):
        sides = (pruned, load_tokenizer(pruned)), (own, load_tokenizer(own))
        assert max(sides[1][1].get_vocab().values()) == rows
        tokens = map_tokens(*sides)
    assert tokens is not None and len(tokens.owners) == rows
    assert tokens.regroup(torch.zeros(1, rows).log_softmax(-1)).sum() == pytest.approx(1.0)
