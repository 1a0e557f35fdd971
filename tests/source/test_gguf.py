"""GGUF files prune as the checkpoints that they were made from."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from llmprune_cli.options import ModelReference
from llmprune_cli.source.gguf import header, reading
from llmprune_cli.source.gguf.configuration import read_configuration
from llmprune_cli.source.opening import open_checkpoint
from support.checkpoints import Tensors, prune, rewrite
from support.cli import BY_MAGNITUDE, run_cli
from support.full import examples
from support.gguf_files import EPSILON, GGUF_FAMILIES, GgufFamily, gguf_pair, write_gguf
from support.refusals import UNSUPPORTED, assert_refused
from support.stock import load_stock, written_tensors
from support.tiny import BYTE_LEVEL_VOCABULARY, save_byte_level, save_tiny


@pytest.mark.parametrize("family", examples(GGUF_FAMILIES, ["llama", "gemma3_text"]))
def test_a_gguf_file_prunes_as_the_checkpoint_it_was_made_from(tmp_path: Path, family: str) -> None:
    plain, path = gguf_pair(tmp_path, family)
    options = ("--intermediate-size", "24")
    pruned = [prune(plain, tmp_path / "a", *options), prune(path, tmp_path / "b", *options, "--dtype", "float32")]
    expected, actual = map(written_tensors, pruned)
    assert expected.keys() == actual.keys()
    assert not [name for name in expected if not torch.equal(expected[name], actual[name])]
    ids = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        one, other = (load_stock(folder)(ids).logits for folder in pruned)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    described, stored = (json.loads(run_cli("inspect", model, "--json").stdout) for model in (path, plain))
    assert described["before"]["parameters"] == stored["before"]["parameters"]
    assert described["prunable"] == stored["prunable"]


def test_that_weights_come_out_in_bfloat16_is_said(tmp_path: Path) -> None:
    _, path = gguf_pair(tmp_path, "llama")
    asked = ("prune", path, *BY_MAGNITUDE, "--intermediate-size", "24", "--output")
    run = run_cli(*asked, tmp_path / "out")
    assert run.code == 0 and "is dequantized: from here on its weights are bfloat16 (--dtype names" in run.stderr
    assert {tensor.dtype for tensor in written_tensors(tmp_path / "out").values()} == {torch.bfloat16}
    assert "bfloat16" not in run_cli(*asked, tmp_path / "other", "--dtype", "float16").stderr
    assert {tensor.dtype for tensor in written_tensors(tmp_path / "other").values()} == {torch.float16}


LOADED_WHOLE = ("gpt2",)  # whose tensors transformers turns as it loads them


@pytest.mark.parametrize("family", GGUF_FAMILIES)
def test_weights_made_plain_one_by_one_are_those_that_transformers_loads(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit in bfloat16, with the same files beside them."""
    _, path = gguf_pair(tmp_path, family)
    streamed, whole = tmp_path / "streamed", tmp_path / "whole"
    loaded: list[Path] = []
    original = reading.save_plain

    def counted(model: Any, info: Any, source: Path, target: Path) -> None:
        loaded.append(target)
        original(model, info, source, target)

    monkeypatch.setattr(reading, "save_plain", counted)
    for folder in (streamed, whole):
        folder.mkdir()
        reading.convert_gguf(path, None, folder)
        monkeypatch.setattr(reading, "ONE_BY_ONE", {})
    assert loaded == ([whole] if family not in LOADED_WHOLE else [streamed, whole])
    one, other = written_tensors(streamed), written_tensors(whole)
    assert one.keys() == other.keys() and {tensor.dtype for tensor in one.values()} == {torch.bfloat16}
    assert not [name for name in one if not torch.equal(one[name], other[name])]
    files = [{file.name for file in folder.iterdir()} for folder in (streamed, whole)]
    assert files[0] == files[1]
    for name in files[0] - {"model.safetensors"}:
        assert (streamed / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize("family", GGUF_FAMILIES)
def test_a_header_without_its_vocabulary_says_the_same(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path = gguf_pair(tmp_path, family)
    whole = read_configuration(path).to_dict()
    monkeypatch.setattr(header, "LONGEST", 8)
    (tmp_path / "brief").mkdir()
    brief = header.header_of(path, tmp_path / "brief")
    assert brief != path and brief.stat().st_size < path.stat().st_size
    assert {**read_configuration(brief).to_dict(), "_name_or_path": ""} == {**whole, "_name_or_path": ""}


def test_other_tools_names_of_dtypes_are_known_for_a_gguf_too(tmp_path: Path) -> None:
    _, path = gguf_pair(tmp_path, "llama")
    for name in ("f16", "float16"):
        assert run_cli("export", path, "--dtype", name, "--output", tmp_path / name).code == 0
    short, long = (written_tensors(tmp_path / name) for name in ("f16", "float16"))
    assert {tensor.dtype for tensor in short.values()} == {torch.float16}
    assert all(torch.equal(short[name], long[name]) for name in long)


def test_a_gguf_of_stacked_experts_reads_as_the_checkpoint(tmp_path: Path) -> None:
    spec = GgufFamily("qwen3moe", {}, {EPSILON: 1e-6, "expert_count": 4, "expert_used_count": 2})
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16}
    plain = save_tiny(tmp_path / "plain", "qwen3_moe", norm_topk_prob=True, **sizes)

    def stack(tensors: Tensors) -> Tensors:
        kept = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
        for layer, projection in product(range(2), ("gate_proj", "up_proj", "down_proj")):
            prefix = f"model.layers.{layer}.mlp.experts"
            parts = [tensors[f"{prefix}.{expert}.{projection}.weight"] for expert in range(4)]
            kept[f"{prefix}.{projection}.weight"] = torch.stack(parts)
        return kept

    stacked = rewrite(plain, tmp_path / "stacked", stack)
    path = write_gguf(stacked, tmp_path / "model.gguf", spec, expert_feed_forward_length=24)
    with open_checkpoint(ModelReference(str(path), dtype="float32"), need_weights=True) as checkpoint:
        read = {entry.name: tensor.clone() for entry, tensor in checkpoint.tensors()}
    expected = written_tensors(plain)
    assert read.keys() == expected.keys() and all(torch.equal(read[name], expected[name]) for name in read)
    assert checkpoint.config.num_experts_per_tok == 2 and checkpoint.config.moe_intermediate_size == 24


def llama3_factors(count: int, theta: float, factor: float) -> list[float]:
    """The factors that llama.cpp's converter stores for Llama 3.1's scaling."""
    factors = []
    for number in range(count):
        wavelength = 2 * math.pi * theta ** (number / count)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192 / 1:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


def test_llama_3s_scaling_is_recovered_from_its_factors(tmp_path: Path) -> None:
    spec = replace(
        GGUF_FAMILIES["llama"],
        settings={"head_dim": 16, "rms_norm_eps": 1e-3},
        header={EPSILON: 1e-3, "rope.freq_base": 500000.0, "rope.dimension_count": 16},
    )
    plain = save_tiny(tmp_path / "plain", "llama", **spec.settings)
    factors = torch.tensor(llama3_factors(8, 500000.0, 32.0))
    path = write_gguf(plain, tmp_path / "model.gguf", spec, extra={"rope_freqs.weight": factors})
    with open_checkpoint(ModelReference(str(path)), need_weights=True) as checkpoint:
        rope = checkpoint.config.rope_parameters
    assert rope["rope_type"] == "llama3" and rope["factor"] == 32.0 and rope["rope_theta"] == 500000.0
    assert rope["original_max_position_embeddings"] == 8192
    other = write_gguf(plain, tmp_path / "other.gguf", spec, extra={"rope_freqs.weight": factors + 0.1})
    assert_refused(run_cli("inspect", other), UNSUPPORTED, "rope_freqs.weight")


@pytest.mark.parametrize(
    ("family", "header", "extra", "word"),
    [
        ("llama", {}, "blk.0.attn_q.bias", "some would be lost"),
        ("phi3", {}, "rope_factors_long.weight", "rope_factors_long.weight"),
        ("qwen2", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, None, "yarn"),
        ("llama", {"expert_count": 4, "expert_used_count": 2}, None, "expert_count"),
        ("llama", {"attention.clamp_kqv": 8.0}, None, "attention.clamp_kqv"),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "prune"])
def test_what_transformers_would_lose_from_a_gguf_is_refused(
    tmp_path: Path, family: str, header: dict[str, object], extra: str | None, word: str, command: str
) -> None:
    spec = GGUF_FAMILIES[family]
    plain = save_tiny(tmp_path / "plain", family, **spec.settings)
    tensors = {extra: torch.ones(64)} if extra else {}
    path = write_gguf(plain, tmp_path / "model.gguf", spec, extra=tensors, **header)
    output = ["--output", tmp_path / "out"] if command == "prune" else []
    assert_refused(run_cli(command, path, "--pruning-ratio", "0.5", *output), UNSUPPORTED, word)


def test_falcon_with_kv_groups_is_refused_from_gguf(tmp_path: Path) -> None:
    settings = {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": False, "ffn_hidden_size": 48}
    plain = save_tiny(tmp_path / "plain", "falcon", **settings)
    spec = GgufFamily("falcon", {}, {"attention.layer_norm_epsilon": 1e-5})
    path = write_gguf(plain, tmp_path / "model.gguf", spec)
    assert_refused(run_cli("inspect", path), UNSUPPORTED, "query_key_value")


def test_a_gguf_architecture_that_transformers_cannot_read_is_refused(tmp_path: Path) -> None:
    plain = save_tiny(tmp_path / "plain", "olmo2")
    path = write_gguf(plain, tmp_path / "model.gguf", GgufFamily("olmo2", {}, {EPSILON: 1e-6}))
    assert_refused(run_cli("inspect", path), UNSUPPORTED, "olmo2")


@pytest.mark.parametrize("family", GGUF_FAMILIES)
def test_a_tokenizer_is_the_one_that_transformers_makes(tmp_path: Path, family: str) -> None:
    _, path = gguf_pair(tmp_path, family)
    ours, theirs = reading._load_tokenizer(path), AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    for name, tokenizer in (("ours", ours), ("theirs", theirs)):
        tokenizer.save_pretrained(tmp_path / name)
    files = [
        {file.name: json.loads(file.read_text()) for file in (tmp_path / name).glob("*.json")}
        for name in ("ours", "theirs")
    ]
    vocabulary, added = files[1]["tokenizer.json"]["model"]["vocab"], files[1]["tokenizer.json"]["added_tokens"]
    files[1]["tokenizer.json"]["added_tokens"] = [own for own in added if own["content"] in vocabulary]
    assert type(ours) is type(theirs) and len(files[0]) > 1 and files[0] == files[1]


def test_tokens_of_a_gguf_file_can_go_by_its_own_tokenizer_whatever_lies_beside_it(tmp_path: Path) -> None:
    _, path = gguf_pair(tmp_path, "llama")
    assert "--vocab-size" in json.loads(run_cli("inspect", path, "--json").stdout)["vocabulary"]["refused"]
    save_byte_level(tmp_path)  # of another model
    asked = ("--vocab-size", "64")
    for words in (("inspect", path, *asked), ("prune", path, *asked, *BY_MAGNITUDE, "--dry-run")):
        run = run_cli(*words, "--json")
        assert run.code == 0, run.stderr
        assert json.loads(run.stdout)["vocabulary"]["after"] == 64
    written = AutoTokenizer.from_pretrained(prune(path, tmp_path / "out", "--mlp", "50%"))
    assert len(written) == 96 and written.get_vocab()["ab"] == 3


# Families whose files are llama.cpp's llama, with what is pruned: all have biases or heads that make it so.
AS_LLAMA: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "qwen2": ({"use_sliding_window": False, "sliding_window": None}, ("--num-attention-heads", "4")),
    "phi3": ({"pad_token_id": None}, ("--num-attention-heads", "4")),
    "llama": ({"attention_bias": True, "mlp_bias": True}, ("--intermediate-size", "24")),
    "mistral": ({"head_dim": 16, "sliding_window": None}, ("--num-attention-heads", "4")),
}


@pytest.mark.parametrize("family", AS_LLAMA)
def test_a_file_of_llama_cpps_llama_is_read_back_with_its_biases(family: str, tmp_path: Path) -> None:
    settings, widths = AS_LLAMA[family]
    source = save_tiny(tmp_path / "model", family, vocab_size=BYTE_LEVEL_VOCABULARY, initializer_range=0.3, **settings)
    save_byte_level(source)
    pruned = prune(source, tmp_path / "pruned", *widths)
    run = run_cli("export", pruned, "--format", "gguf", "--dtype", "f32", "--no-verify", "--output", tmp_path / "gguf")
    assert run.code == 0, run.stderr
    (file,) = (tmp_path / "gguf").glob("*.gguf")
    biased = family in ("qwen2", "llama")
    assert ("reads this file without its biases" in " ".join(run.stdout.split())) == biased
    assert ("reads this file without its biases" in (tmp_path / "gguf" / "README.md").read_text()) == biased
    run = run_cli("export", file, "--dtype", "float32", "--output", tmp_path / "back")
    assert run.code == 0, run.stderr
    ids = torch.randint(3, 90, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        one, other = (load_stock(folder).float()(ids).logits for folder in (pruned, tmp_path / "back"))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_tokenizer_has_the_tokens_of_its_file_and_no_more(tmp_path: Path) -> None:
    """Else one of them has no embedding, and the model fails on it."""
    source = save_tiny(tmp_path / "model", vocab_size=BYTE_LEVEL_VOCABULARY)
    save_byte_level(source)
    for name, words in (("file", ("export", source)), ("again", ("export", tmp_path / "plain"))):
        run = run_cli(*words, "--format", "gguf", "--dtype", "f32", "--no-verify", "--output", tmp_path / name)
        assert run.code == 0, run.stderr
        if name == "file":
            (file,) = (tmp_path / name).glob("*.gguf")
            run = run_cli("export", file, "--dtype", "float32", "--output", tmp_path / "plain")
            assert run.code == 0, run.stderr
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "plain")
    assert len(tokenizer) == BYTE_LEVEL_VOCABULARY and tokenizer.eos_token == "</s>"
    text = "of <|endoftext|> there is none, </s>"
    expected = AutoTokenizer.from_pretrained(source)(text, add_special_tokens=False)["input_ids"]
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected


# Ways to split text: what each file's tokenizer must make of words that no merges make, of numbers, and what is said.
SPLITS = {
    "llama-bpe": ([["abc"], [" ", "12", "3", "4"]], ""),
    "smollm": ([["ab", "c"], [" ", "1", "2", "3", "4"]], ""),
    "olmo": ([["ab", "c"], [" 12", "34"]], ""),
    "deepseek-coder": ([["ab", "c"], [" 12", "34"]], "model.gguf splits text into words in a way (deepseek-coder)"),
}


@pytest.mark.parametrize("name", SPLITS)
def test_text_is_split_as_the_file_says(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf

    monkeypatch.setattr(header, "LONGEST", 128)  # as if the vocabulary were a large one
    pieces, said = SPLITS[name]
    tokens = ["<s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "12", "34", "Ġ12", "abc"]
    path = tmp_path / "model.gguf"
    spec = GGUF_FAMILIES["llama"]
    source = save_tiny(tmp_path / "plain", "llama", vocab_size=len(tokens), **spec.settings)
    write_gguf(source, path, spec, tokens=(name, tokens, ["a b", "1 2", "3 4", "Ġ 12"]))
    assert gguf.GGUFReader(path).fields["tokenizer.ggml.pre"].contents() == name
    run = run_cli("export", path, "--dtype", "float32", "--output", tmp_path / "read")
    assert run.code == 0 and (f"{tmp_path}/{said}" in run.stderr if said else "not known here" not in run.stderr), (
        run.stderr
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "read")
    for text, expected in zip(("abc", " 1234"), pieces, strict=True):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert [tokenizer.decode([number]) for number in ids] == expected
