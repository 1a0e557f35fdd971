"""llama.cpp tokenizes as the model's tokenizer does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from support.gguf_exports import export, needs_llamacpp, verified
from support.tiny import save_byte_level

pytestmark = needs_llamacpp


def save_pieces(folder: Path) -> None:
    """A BPE tokenizer of SentencePiece's kind: spaces are characters, and what is not known falls back to bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    from llmprune_cli.formats.verification import PROMPTS

    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained = Tokenizer(models.BPE())
    trained.normalizer = spaces
    trainer = trainers.BpeTrainer(vocab_size=120, show_progress=False)
    trained.train_from_iterator([text for text in PROMPTS if text.isascii()], trainer)
    learned = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *(token for token, _ in learned)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece, _ in learned
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    model = models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


def byte_steps(*steps: object, by_words: bool = False) -> object:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=by_words)])


def words(digits: str) -> object:
    from tokenizers import Regex, pre_tokenizers

    expression = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return byte_steps(pre_tokenizers.Split(Regex(expression), "isolated"))


def single_digits() -> object:
    from tokenizers import pre_tokenizers

    return byte_steps(pre_tokenizers.Digits(individual_digits=True), by_words=True)


TOKENIZERS: dict[str, Callable[[Path], None]] = {
    "gpt-2": save_byte_level,
    "smollm": lambda folder: save_byte_level(folder, single_digits()),
    "llama-bpe": lambda folder: save_byte_level(folder, words(r"\p{N}{1,3}"), whole_words=True),
    "dbrx": lambda folder: save_byte_level(folder, words(r"\p{N}{1,3}")),
    "qwen2": lambda folder: save_byte_level(folder, words(r"\p{N}")),
    "default": save_pieces,
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_llama_cpp_tokenizes_as_the_tokenizer_does(name: str, byte_level_llama: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    from llmprune_cli.formats.gguf.llamacpp import open_llamacpp

    folder = Path(shutil.copytree(byte_level_llama, tmp_path / "model"))
    TOKENIZERS[name](folder)
    verified(export(folder, tmp_path / "gguf", "--dtype", "f32"))
    header = GGUFReader(tmp_path / "gguf" / "model-f32.gguf").fields
    assert header["tokenizer.ggml.pre"].contents() == name
    assert (
        header["tokenizer.ggml.bos_token_id"].contents() == 1 and header["tokenizer.ggml.eos_token_id"].contents() == 2
    )
    assert header["tokenizer.ggml.add_bos_token"].contents() == (name == "default")
    assert "message['content']" in header["tokenizer.chat_template"].contents()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with open_llamacpp(tmp_path / "gguf") as runtime:
        for text in ("I'LL pay 12345.67 at 10:30,  it's   fine!\n\n\tOK?", " élan ∑ 山\u200d🦙 <s> x</s>"):
            assert runtime.tokenize(text) == tokenizer(text)["input_ids"]


def test_a_tokenizer_without_a_name_is_refused_with_the_way_out(byte_level_llama: Path, tmp_path: Path) -> None:
    from tokenizers import Regex, pre_tokenizers

    folder = Path(shutil.copytree(byte_level_llama, tmp_path / "model"))
    described = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**described, "normalizer": {"type": "Lowercase"}}))
    run = export(folder, tmp_path / "gguf")
    assert run.code == 4 and "Lowercase" in run.stderr and "--converter PATH" in run.stderr
    save_byte_level(folder, byte_steps(pre_tokenizers.Split(Regex(r"\p{L}+"), "isolated")))
    run = export(folder, tmp_path / "gguf")
    assert run.code == 4 and "pre-tokenizer" in run.stderr and "--converter PATH" in run.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_other_tokens_fail_the_verification(
    byte_level_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmprune_cli.formats.gguf import vocabulary as gguf_vocabulary

    folder = Path(shutil.copytree(byte_level_llama, tmp_path / "model"))
    save_byte_level(folder, words(r"\p{N}"))
    rules = dict.fromkeys(gguf_vocabulary.BY_RULE, "gpt-2")
    monkeypatch.setattr(gguf_vocabulary, "BY_RULE", rules)
    run = export(folder, tmp_path / "gguf")
    assert run.code == 7 and "other tokens" in run.stderr and not (tmp_path / "gguf").exists()
