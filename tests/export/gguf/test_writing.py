"""GGUF files, run by llama.cpp itself: the same tokens and probabilities, or refused before anything is written."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import families
from conftest import BY_MAGNITUDE, BYTE_LEVEL_VOCABULARY, Run, run_cli, save_byte_level, save_tiny
from test_real_model import converted, gguf  # noqa: F401 (fixtures)

if importlib.util.find_spec("xllamacpp") is None or importlib.util.find_spec("gguf") is None:
    pytest.skip("pip install 'llmprune[gguf,llamacpp]'", allow_module_level=True)

SIZES: dict[str, Any] = {**families.SIZES, "vocab_size": BYTE_LEVEL_VOCABULARY, "max_position_embeddings": 48}


def tiny(folder: Path, family: str, **changes: object) -> Path:
    """A random checkpoint in which every unit matters, with a byte-level tokenizer."""
    settings = {**SIZES, **families.FAMILIES[family], "initializer_range": 0.15, **changes}
    save_tiny(folder, families.model_type(family), shard="1GB", **settings)
    save_byte_level(folder)
    return folder


def export(folder: Path, output: Path, *options: str | Path) -> Run:
    return run_cli("export", folder, "--format", "gguf", "--output", output, "--verify", "--json", *options)


def verified(run: Run) -> dict[str, Any]:
    assert run.code == 0, run.stderr
    document: dict[str, Any] = json.loads(run.stdout)
    found = document["verification"]
    assert found["runtime"].startswith("xllamacpp ") and found["prompts"] == 3 and found["kl"] <= found["kl_limit"]
    return document


@pytest.fixture(scope="session")
def byte_level_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("byte-level") / "model", "llama")


def save_pieces(folder: Path) -> None:
    """A BPE tokenizer of SentencePiece's kind: spaces are characters, and what is not known falls back to bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    from llmprune_cli.export.verification import PROMPTS

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


# --- architectures -------------------------------------------------------------------------------------------------

LONG_ROPE = {
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "original_max_position_embeddings": 256,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
        "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
    },
}
# What comes of query heads that do not fill the hidden size.
SAID = {
    "qwen2": "written as llama.cpp's llama",
    "phi3": "written as llama.cpp's llama",
    "qwen2_moe": "llama.cpp's qwen2moe does not load",
    "olmo2": "llama.cpp's olmo2 does not load",
    "starcoder2": "llama.cpp's starcoder2 does not load",
}
VARIANTS: dict[str, dict[str, Any]] = {"llama-mha": {}, "phi3-partial": LONG_ROPE, "falcon-multi-query": {}}
ARCHITECTURES = {
    family: (settings, SAID.get(family, "")) for family, settings in {**families.EXPORTED, **VARIANTS}.items()
}


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_llama_cpp_runs_every_architecture_pruned_or_it_is_refused(family: str, tmp_path: Path) -> None:
    settings, said = ARCHITECTURES[family]
    folder = tiny(tmp_path / "model", family, **settings)
    cut = ("--head-pruning-ratio", "0.5", "--intermediate-pruning-ratio", "0.25")
    assert run_cli("prune", folder, *BY_MAGNITUDE, *cut, "--output", tmp_path / "pruned").code == 0
    run = export(tmp_path / "pruned", tmp_path / "gguf", "--dtype", "f32")
    if "does not load" in said:
        assert run.code == 4 and said in run.stderr and "is not the hidden size 64" in run.stderr
        assert not (tmp_path / "gguf").exists()
    else:
        document = verified(run)
        assert said in document["note"] and bool(said) == bool(document["note"])
        assert document["files"] == ["README.md", "llmprune.json", "model-f32.gguf"]
        assert document["verification"]["same_tokens"] == 1
    if said:  # where heads fill the hidden size it is written as what it is
        half = run_cli("prune", folder, *BY_MAGNITUDE, "--pruning-ratio", "0.5", "--output", tmp_path / "half")
        assert half.code == 0, half.stderr
        assert verified(export(tmp_path / "half", tmp_path / "full", "--dtype", "f32"))["note"] == ""


@pytest.mark.parametrize("family", ["qwen2", "qwen2_moe", "phi3", "olmo2", "starcoder2"])
def test_llama_cpp_indeed_loads_no_such_widths(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from llmprune_cli.export.gguf.families import FAMILIES

    folder = tiny(tmp_path / "model", family, **ARCHITECTURES[family][0])
    assert (
        run_cli("prune", folder, *BY_MAGNITUDE, "--head-pruning-ratio", "0.5", "--output", tmp_path / "pruned").code
        == 0
    )
    monkeypatch.setitem(FAMILIES, family, replace(FAMILIES[family], full_width=False))
    run = export(tmp_path / "pruned", tmp_path / "gguf")
    assert run.code == 7 and "llama.cpp does not load the export" in run.stderr, run.stderr
    assert not (tmp_path / "gguf").exists()


SHORT = {"rope_theta": 1e4, "original_max_position_embeddings": 12, "factor": 4.0}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3 RoPE": (
        "llama",
        {"rope_parameters": {**SHORT, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    ),
    "yarn RoPE": ("llama", {"rope_parameters": {**SHORT, "rope_type": "yarn"}}),
    "linear RoPE in the full layers": (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
    ),
    "windows in unusual layers": (
        "gemma2",
        {"layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]},
    ),
    "windows longer than the context": ("gemma2", {"sliding_window": 64}),
    "a head tied to the embedding": ("gpt_neox", {"tie_word_embeddings": True}),
    "attention and MLP in sequence": ("gpt_neox", {"use_parallel_residual": False}),
}


@pytest.mark.parametrize("form", FORMS)
def test_llama_cpp_is_told_of(form: str, tmp_path: Path) -> None:
    family, settings = FORMS[form]
    run = export(tiny(tmp_path / "model", family, **settings), tmp_path / "gguf", "--dtype", "f32")
    assert verified(run)["verification"]["same_tokens"] == 1


# --- tokenizers ----------------------------------------------------------------------------------------------------


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

    from llmprune_cli.export.gguf.llamacpp import open_llamacpp

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
    from llmprune_cli.export.gguf import vocabulary as gguf_vocabulary

    folder = Path(shutil.copytree(byte_level_llama, tmp_path / "model"))
    save_byte_level(folder, words(r"\p{N}"))
    rules = dict.fromkeys(gguf_vocabulary.BY_RULE, "gpt-2")
    monkeypatch.setattr(gguf_vocabulary, "BY_RULE", rules)
    run = export(folder, tmp_path / "gguf")
    assert run.code == 7 and "other tokens" in run.stderr and not (tmp_path / "gguf").exists()


# --- dtypes --------------------------------------------------------------------------------------------------------


# The largest error of an element, as a share of the largest one.
STEPS = {"f16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 127, "q5_1": 1 / 15, "q5_0": 1 / 15, "q4_1": 1 / 7, "q4_0": 1 / 7}


@pytest.mark.parametrize("dtype", STEPS)
def test_matrices_are_quantized_where_their_rows_divide(dtype: str, byte_level_llama: Path, tmp_path: Path) -> None:
    import numpy
    from gguf import GGUFReader
    from gguf.quants import dequantize

    from test_peer import written_tensors

    document = verified(export(byte_level_llama, tmp_path / "gguf", "--dtype", dtype))
    assert document["files"] == ["README.md", "llmprune.json", f"model-{dtype}.gguf"]
    found = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "gguf" / f"model-{dtype}.gguf").tensors}
    kinds = {name: tensor.tensor_type.name.lower() for name, tensor in found.items()}
    assert kinds["output.weight"] == kinds["blk.3.attn_q.weight"] == dtype
    assert kinds["blk.0.attn_norm.weight"] == kinds["blk.0.attn_q.bias"] == "f32"
    assert kinds["blk.0.ffn_down.weight"] == (dtype if dtype in ("f16", "bf16") else "f16")  # rows of 48
    stored = written_tensors(byte_level_llama)["model.layers.2.mlp.up_proj.weight"].numpy()
    read = found["blk.2.ffn_up.weight"]
    error = numpy.abs(dequantize(read.data, read.tensor_type).reshape(stored.shape) - stored).max()
    assert 0 < error <= STEPS[dtype] * numpy.abs(stored).max()


# --- what goes wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("opt", {}, "written are llama, mistral"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}, "'dynamic'"),
        ("llama", {"hidden_act": "gelu"}, "not with gelu"),
        ("mistral", {"sliding_window": 8}, "no sliding window"),
        ("qwen2_moe", {"mlp_only_layers": [1]}, "mlp_only_layers"),
        ("qwen3_moe", {"mlp_only_layers": [], "norm_topk_prob": False}, "norm_topk_prob"),
        ("gemma2", {"final_logit_softcapping": None}, "final_logit_softcapping"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_llama_cpp_lacks_is_refused_from_the_configuration(
    family: str, settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    folder = tiny(tmp_path / "model", family, **settings)
    run = export(folder, tmp_path / "gguf")
    assert run.code == 4 and reason in run.stderr, run.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_window_that_llama_cpp_ignores_bounds_the_context(tmp_path: Path) -> None:
    from gguf import GGUFReader

    folder = tiny(tmp_path / "model", "mistral", max_position_embeddings=512, sliding_window=128)
    document = verified(export(folder, tmp_path / "gguf", "--dtype", "f32"))
    assert "that of the window, 128" in document["note"]
    header = GGUFReader(tmp_path / "gguf" / "model-f32.gguf").fields
    assert header["llama.context_length"].contents() == 128


def test_wrong_usages(byte_level_llama: Path, tmp_path: Path) -> None:
    run = export(byte_level_llama, tmp_path / "gguf", "--dtype", "q4_k")
    assert run.code == 2 and "q8_0" in run.stderr
    run = run_cli("export", byte_level_llama, "--output", tmp_path / "x", "--converter", __file__)
    assert run.code == 2 and "--format gguf" in run.stderr
    target = tmp_path / "gguf"
    assert export(byte_level_llama, target, "--dtype", "f16").code == 0
    assert export(byte_level_llama, target).code == 6
    assert export(byte_level_llama, target, "--overwrite").code == 0
    names = sorted(path.name for path in tmp_path.rglob("*"))
    assert names == ["README.md", "gguf", "llmprune.json", "model-f32.gguf"]
    (target / "mine.gguf").write_text("kept")
    run = export(byte_level_llama, target, "--overwrite")
    assert run.code == 6 and "not a model folder" in run.stderr and (target / "mine.gguf").exists()


def test_a_model_without_a_tokenizer_is_refused(byte_level_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(byte_level_llama, tmp_path / "model"))
    for path in folder.glob("tokenizer*"):
        path.unlink()
    run = export(folder, tmp_path / "gguf")
    assert run.code == 3 and "tokenizer" in run.stderr and not (tmp_path / "gguf").exists()


CONVERTER = """
import argparse, pathlib, shutil
parser = argparse.ArgumentParser()
parser.add_argument("model", type=pathlib.Path)
parser.add_argument("--outfile")
parser.add_argument("--outtype", choices=["f32"])
options = parser.parse_args()
assert (options.model / "model.safetensors").is_file() and (options.model / "tokenizer.json").is_file()
shutil.copyfile({made!r}, options.outfile)
"""


def test_a_converter_writes_instead_and_is_held_to_the_same(byte_level_llama: Path, tmp_path: Path) -> None:
    assert export(byte_level_llama, tmp_path / "right", "--dtype", "f32").code == 0
    other = tiny(tmp_path / "other-model", "llama", initializer_range=0.1)
    assert export(other, tmp_path / "other", "--dtype", "f32").code == 0
    broken = tmp_path / "broken.gguf"
    broken.write_bytes((tmp_path / "right" / "model-f32.gguf").read_bytes()[:5000])
    script, output = tmp_path / "convert_hf_to_gguf.py", tmp_path / "gguf"
    for made, reason in ((tmp_path / "other" / "model-f32.gguf", "KL per token"), (broken, "does not load")):
        script.write_text(CONVERTER.format(made=str(made)))
        run = export(byte_level_llama, output, "--dtype", "f32", "--converter", script)
        assert run.code == 7 and reason in run.stderr and not output.exists()
    run = export(byte_level_llama, output, "--dtype", "q4_0", "--converter", script)
    assert run.code == 3 and "invalid choice: 'q4_0'" in run.stderr and not output.exists()
    script.write_text(CONVERTER.format(made=str(tmp_path / "right" / "model-f32.gguf")))
    assert str(script) in verified(export(byte_level_llama, output, "--dtype", "f32", "--converter", script))["note"]


def test_the_readmes_block_generates_text(byte_level_llama: Path, tmp_path: Path) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    script = next(block for block in readme.split("```") if block.startswith("sh\n") and "import xllamacpp" in block)[
        3:
    ]
    shutil.copytree(byte_level_llama, tmp_path / "pruned")
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "400"}
    done = subprocess.run(["bash", "-ec", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report, _, generated = done.stdout.partition("largest difference")
    assert "Verified with xllamacpp" in report and len(generated.partition("\n")[2]) > 8


# --- a real model --------------------------------------------------------------------------------------------------


def test_smollm2_runs_in_llama_cpp_with_the_tokenizer_of_its_own_file(
    converted: Path,  # noqa: F811
    gguf: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    from gguf import GGUFReader

    found = verified(export(converted, tmp_path / "gguf", "--dtype", "f32"))["verification"]
    assert found["kl_limit"] == 1e-5 and found["same_tokens"] == 1 and found["tokens"] == 3 * 64
    ours, theirs = (GGUFReader(path).fields for path in (tmp_path / "gguf" / "model-f32.gguf", gguf))
    names = [name for name in theirs if name.startswith("tokenizer.") and not name.endswith("space_prefix")]
    assert "tokenizer.ggml.merges" in names and ours["tokenizer.ggml.pre"].contents() == "smollm"
    assert all(ours[name].contents() == theirs[name].contents() for name in names)


def test_smollm2_pruned_by_a_third_runs_quantized_as_well_as_it_can(
    converted: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Magnitudes alone ruin it: what rounding then costs in transformers is part of what an export may cost."""
    assert (
        run_cli(
            "prune", converted, *BY_MAGNITUDE, "--pruning-ratio", "0.3333333333", "--output", tmp_path / "pruned"
        ).code
        == 0
    )
    found = verified(export(tmp_path / "pruned", tmp_path / "gguf", "--dtype", "q8_0"))["verification"]
    assert 1e-2 < found["kl"] < found["kl_limit"] < 0.5
