"""A tokenizer is read as transformers reads it, and where that is not what its file says, a warning tells."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, pre_tokenizers

from llmprune_cli.source.tokenizer import MOST_COMPANION_BYTES, reader_of
from support.cli import BY_MAGNITUDE, run_cli
from support.refusals import CHECKPOINT, assert_refused, edit_json
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


OWN = '''"""A tokenizer with files of its own."""

from pathlib import Path

from transformers import PythonBackend

VOCAB_FILES_NAMES = {
    "vocab_file": "own.tiktoken",
    "words_file": "own_words.txt",
    "other_file": "config.json",
}


class OwnTokenizer(PythonBackend):
    vocab_files_names = VOCAB_FILES_NAMES

    def __init__(self, vocab_file, words_file, **options):
        self.known = [*Path(vocab_file).read_text().split(), *Path(words_file).read_text().split()]
        super().__init__(**options)

    @property
    def vocab_size(self):
        return len(self.known)

    def get_vocab(self):
        return {token: number for number, token in enumerate(self.known)}

    def _tokenize(self, text):
        return text.split()

    def _convert_token_to_id(self, token):
        return self.known.index(token)

    def _convert_id_to_token(self, index):
        return self.known[index]
'''


def test_the_files_of_a_tokenizer_with_its_own_code_are_copied(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model, folder = save_tiny(tmp_path / "model"), tmp_path / "out"
    for path in model.glob("*token*"):
        path.unlink()
    code = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
    brought = {"tokenizer_class": "OwnTokenizer", "auto_map": code}
    (model / "tokenizer_config.json").write_text(json.dumps(brought))
    (model / "tokenization_own.py").write_text(OWN)
    (model / "own.tiktoken").write_text("a b c")
    (model / "own_words.txt").write_text("word other")
    (model / "notes.txt").write_text("nothing of the tokenizer's")
    run = run_cli("prune", model, "--mlp", "50%", *BY_MAGNITUDE, "--output", folder)
    assert run.code == 0, run.stderr
    assert AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("a other b")["input_ids"] == [0, 4, 1]
    assert json.loads((folder / "config.json").read_text())["intermediate_size"] == 24
    assert not (folder / "notes.txt").exists()


def test_files_with_tokens_are_copied_under_each_of_their_names(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    names = {"spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "tekken.json", "qwen.tiktoken", "emoji.json"}
    for name in names:
        (model / name).write_text("{}")
    with (model / "large.model").open("wb") as file:
        file.truncate(MOST_COMPANION_BYTES + 1)
    edit_json(model / "tokenizer_config.json", lambda own: own.update(tokenizer_class="GPTNeoXJapaneseTokenizer"))
    assert run_cli("export", model, "--output", tmp_path / "out").code == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} > names
    assert not (tmp_path / "out" / "large.model").exists()
