"""Stock software reads text as the cut tokenizer does: transformers, chats included, and llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support.cut_vocabularies import cut, save_whole
from support.full import examples
from support.gguf_exports import export, needs_llamacpp, verified
from support.tokenizers_of_kinds import strings

KINDS = ("byte-level", "whole words", "byte fallback", "unigram")
IN_LLAMACPP = ("byte-level", "byte fallback")
CHAT = [
    {"role": "user", "content": "Здравствуй, <pad> 世界! def f(x): return x"},
    {"role": "assistant", "content": "It's 12,345.67 naïve <s> façades."},
]


def loaded(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", examples(KINDS, ("byte-level", "unigram")))
def test_transformers_reads_text_and_chats_as_before(kind: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    model = save_whole(tmp_path / "model", kind)
    folder = cut(model, tmp_path / "cut")
    whole, part = loaded(model), loaded(folder)
    config = json.loads((folder / "config.json").read_text())
    direct = Tokenizer.from_file(str(folder / "tokenizer.json"))
    longer = 0
    for text in strings():
        before, after = whole(text)["input_ids"], part(text)["input_ids"]
        assert after == direct.encode(text).ids and max(after) < config["vocab_size"]
        assert part.decode(after) == whole.decode(before)
        longer += len(after) > len(before)
    assert longer  # tokens went that text used
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = getattr(whole, name)
        assert getattr(part, name) == token and part(token, add_special_tokens=False)["input_ids"] == [
            getattr(part, f"{name}_id")
        ]
        assert config.get(f"{name}_id") in (getattr(part, f"{name}_id"), None)
    for prompts in (True, False):
        chats = [own.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompts) for own in (whole, part)]
        read = [own.apply_chat_template(CHAT, add_generation_prompt=prompts)["input_ids"] for own in (whole, part)]
        assert chats[0] == chats[1] and whole.decode(read[0]) == part.decode(read[1])
        counts = [ids.count(own.eos_token_id) for own, ids in zip((whole, part), read, strict=True)]
        assert counts == [2, 2]


def test_a_model_of_fewer_tokens_assists_the_whole_one(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    whole = save_whole(tmp_path / "model", "byte-level")
    folders = whole, cut(whole, tmp_path / "cut")
    model, assistant = (AutoModelForCausalLM.from_pretrained(folder) for folder in folders)
    own, its = (loaded(folder) for folder in folders)
    prompt = own("def cut(model: Path)", return_tensors="pt", return_token_type_ids=False)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    alone = model.generate(**prompt, **options)
    together = model.generate(**prompt, **options, assistant_model=assistant, tokenizer=own, assistant_tokenizer=its)
    assert alone[0].tolist() == together[0, : alone.shape[1]].tolist() and alone.shape[1] > prompt["input_ids"].shape[1]


@needs_llamacpp
@pytest.mark.parametrize("kind", examples(IN_LLAMACPP, ("byte fallback",)))
def test_llama_cpp_reads_text_as_transformers_does(kind: str, tmp_path: Path) -> None:
    from llmprune_cli.formats.gguf.llamacpp import open_llamacpp

    folder = cut(save_whole(tmp_path / "model", kind), tmp_path / "cut")
    verified(export(folder, tmp_path / "gguf", "--dtype", "f32"))
    tokenizer = loaded(folder)
    with open_llamacpp(tmp_path / "gguf") as runtime:
        for text in strings():
            assert runtime.tokenize(text) == tokenizer(text)["input_ids"]
