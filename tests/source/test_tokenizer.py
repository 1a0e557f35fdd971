"""A tokenizer is read as transformers reads it, and where that is not what its file says, a warning tells."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, pre_tokenizers

from llmprune_cli.source.tokenizer import reader_of
from support.cli import BY_MAGNITUDE, run_cli
from support.refusals import CHECKPOINT, assert_refused
from support.tiny import BYTE_LEVEL_VOCABULARY, save_byte_level, save_tiny


def test_a_class_that_splits_text_otherwise_than_the_file_is_told(text_file: Path, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", vocab_size=BYTE_LEVEL_VOCABULARY)
    save_byte_level(model)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    spaces = pre_tokenizers.Split(" ", "isolated")  # of whose merges with letters the tokenizer has some
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([spaces, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.save(str(model / "tokenizer.json"))
    words = ("eval", model, "--dataset", text_file, "--max-seq-len", "32", "--limit", "2", "-q")
    assert run_cli(*words).stderr == ""
    settings = model / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "tokenizer_class": "GPT2Tokenizer"}))
    run = run_cli(*words)
    assert run.code == 0 and "a GPT2Tokenizer, which splits text otherwise" in run.stderr
    assert '"PreTrainedTokenizerFast" in tokenizer_config.json' in run.stderr


def test_a_text_is_read_whole_where_the_file_says_to_cut_and_to_fill_up(text_file: Path, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", vocab_size=BYTE_LEVEL_VOCABULARY)
    save_byte_level(model)
    path = model / "tokenizer.json"
    text, as_saved = text_file.read_text(encoding="utf-8"), path.read_text(encoding="utf-8")
    whole = Tokenizer.from_str(as_saved).encode(text).ids
    left = Tokenizer.from_str(as_saved)
    left.enable_truncation(8)
    left.enable_padding(length=8)
    left.save(str(path))
    assert reader_of(path.read_text(encoding="utf-8")).encode(text).ids == whole and len(whole) > 8
    run = run_cli("eval", model, "--dataset", text_file, "--max-seq-len", "32", "--limit", "2", "-q")
    assert run.code == 0 and "cuts texts to 8 tokens" in run.stderr and "splits text otherwise" not in run.stderr


def test_a_tokenizer_that_is_missing_or_damaged_is_told_with_what_to_do(text_file: Path, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    words = ("eval", model, "--dataset", text_file, "-q")
    (model / "tokenizer.json").write_text("{}")
    assert_refused(run_cli(*words), CHECKPOINT, "no usable tokenizer", "transformers cannot load its own (", "again")
    for path in model.glob("*token*"):
        path.unlink()
    missing = (CHECKPOINT, "has no tokenizer, which this needs", "Put the model's own beside")
    assert_refused(run_cli(*words), *missing)
    healed = ("prune", model, "--mlp", "50%", *BY_MAGNITUDE, "--recover", "800", "-o", tmp_path / "out")
    run = run_cli(*healed)
    assert_refused(run, *missing)
    assert "Writing" not in run.stderr, "it is told before the prune"
