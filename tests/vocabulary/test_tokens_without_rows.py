"""Added tokens that the model has no rows for, as Gemma 3's smallest models have one, are left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmprune_cli.vocabulary.numbering import renumbered
from support import tiny
from support.cli import BY_MAGNITUDE, run_cli
from support.cut_vocabularies import save_whole
from support.gguf_exports import export, needs_llamacpp, verified
from support.gguf_exports import tiny as byte_level
from support.refusals import CHECKPOINT, assert_refused, edit_json

IMAGE, PAD = "<image_soft_token>", "[PAD]"


def add_rowless(model: Path) -> int:
    """Give a tokenizer two added tokens behind the last row, which all its files name, and return the rows."""
    rows: int = json.loads((model / "config.json").read_text())["vocab_size"]
    numbers = {IMAGE: rows, PAD: rows + 1}
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    described = {name: {"content": name, **flags, "special": True} for name in numbers}

    def tokenizer(document: dict[str, Any]) -> None:
        fill = [f"<unused{number}>" for number in range(max(known(document)) + 1, rows)]
        every = {**{name: rows - len(fill) + place for place, name in enumerate(fill)}, **numbers}
        more = [{"id": number, "content": name, **flags, "special": True} for name, number in every.items()]
        document["added_tokens"] += more
        document["padding"] = {
            "strategy": "BatchLongest",
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": numbers[PAD],
            "pad_type_id": 0,
            "pad_token": PAD,
        }

    def settings(own: dict[str, Any]) -> None:
        own["pad_token"] = {"__type": "AddedToken", **described[PAD]}
        own["image_token"] = IMAGE
        own["extra_special_tokens"] = [IMAGE]
        own["added_tokens_decoder"] = {str(number): described[name] for name, number in numbers.items()}

    edit_json(model / "tokenizer.json", tokenizer)
    edit_json(model / "tokenizer_config.json", settings)
    for name, content in (
        ("special_tokens_map.json", {"pad_token": PAD, "additional_special_tokens": [IMAGE, "<s>"]}),
        ("added_tokens.json", numbers),
        ("generation_config.json", {"eos_token_id": [2, rows], "pad_token_id": rows + 1}),
    ):
        (model / name).write_text(json.dumps(content))
    return rows


def known(document: dict[str, Any]) -> list[int]:
    return [*document["model"]["vocab"].values(), *(own["id"] for own in document["added_tokens"])]


@pytest.mark.parametrize("kind", ["byte-level", "byte fallback"])
def test_tokens_are_cut_and_the_rowless_ones_named_nowhere_any_more(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    model, folder = save_whole(tmp_path / "model", kind), tmp_path / "cut"
    rows = add_rowless(model)
    assert max(AutoTokenizer.from_pretrained(model).get_vocab().values()) == rows + 1
    shown = " ".join(run_cli("inspect", model).stdout.split())
    assert "must stay. --vocab-size 50% saves" in shown
    (tmp_path / "text.txt").write_text(Path(tiny.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    text = ("--calibration", tmp_path / "text.txt", "--calibration-seq-len", "40", "--calibration-tokens", "400")
    run = run_cli("prune", model, *BY_MAGNITUDE, "--vocab-size", "75%", *text, "--output", folder)
    assert run.code == 0, run.stderr
    assert run.stderr.count(f"{IMAGE}, {PAD} left out") == 1
    size: int = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert max(tokenizer.get_vocab().values()) < size < rows and tokenizer.pad_token is None
    assert tokenizer.decode(tokenizer(f"a {IMAGE}b", add_special_tokens=False)["input_ids"]) == f"a {IMAGE}b"
    for path in folder.glob("*.json"):
        assert path.name == "llmprune.json" or not {IMAGE, PAD} & {*texts_in(json.loads(path.read_text()))}, path.name
    generation = GenerationConfig.from_pretrained(folder)
    assert generation.pad_token_id is None and all(number < size for number in generation.eos_token_id)


def texts_in(value: Any) -> list[str]:
    """All texts in a document, names of fields included."""
    if isinstance(value, dict):
        return [*value, *(text for inner in value.values() for text in texts_in(inner))]
    if isinstance(value, list):
        return [text for inner in value for text in texts_in(inner)]
    return [value] if isinstance(value, str) else []


def test_lists_and_sequences_lose_tokens_that_have_no_new_number() -> None:
    numbers: Callable[[int], int | None] = {0: 0, 5: 1, 7: 2}.get
    settings = {
        "eos_token_id": [5, 9],
        "pad_token_id": 9,
        "suppress_tokens": [],
        "begin_suppress_tokens": [9],
        "bad_words_ids": [[5, 7], [5, 9]],
        "force_words_ids": [[[5], [9]], [[7]]],
        "forced_decoder_ids": [[1, None], [2, 9], [3, 7]],
        "sequence_bias": [[[5, 9], -1.0], [[7], 2.0]],
        "image_token_id": -200,
    }
    assert renumbered(settings, numbers) == {
        "eos_token_id": [1],
        "pad_token_id": None,
        "suppress_tokens": [],
        "begin_suppress_tokens": None,
        "bad_words_ids": [[1, 2]],
        "force_words_ids": [[[2]]],
        "forced_decoder_ids": [[1, None], [3, 2]],
        "sequence_bias": [[[2], 2.0]],
        "image_token_id": -200,
    }


@needs_llamacpp
def test_a_gguf_file_has_the_tokens_that_have_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from gguf import GGUFReader

    model = byte_level(tmp_path / "model", "llama")
    path, rows = model / "tokenizer.json", 384
    as_saved = path.read_text()
    edit_json(path, lambda own: own["model"]["vocab"].update(more=rows))
    assert_refused(export(model, tmp_path / "more"), CHECKPOINT, "385 tokens and the model 384 embeddings")
    path.write_text(as_saved)
    assert add_rowless(model) == rows
    run = export(model, tmp_path / "gguf", "--dtype", "f32")
    verified(run)
    assert run.stderr.count(f"{IMAGE}, {PAD} left out of the GGUF file") == 1 and "out of range" not in caplog.text
    header = GGUFReader(tmp_path / "gguf" / "model-f32.gguf").fields
    tokens = header["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == rows and not {IMAGE, PAD} & {*tokens} and "tokenizer.ggml.padding_token_id" not in header
    small = (*BY_MAGNITUDE, "--mlp", "50%", "--gguf", "f32", "--output", tmp_path / "pruned")
    assert run_cli("prune", model, *small).code == 0
