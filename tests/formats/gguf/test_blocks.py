"""Blocks of quantized elements: which kind each matrix gets, what is in the file, and what is refused."""

from __future__ import annotations

import ctypes
import itertools
import json
import math
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from support.cli import BY_MAGNITUDE, run_cli
from support.full import examples, in_full
from support.gguf_exports import export, needs_llamacpp, tiny, verified
from support.refusals import CHECKPOINT, OUTPUT, UNSUPPORTED, USAGE, assert_refused
from support.stock import written_tensors

pytestmark = needs_llamacpp

MIXES = ("q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "iq4_nl", "iq4_xs", "q3_k_m")
ROLES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
# Matrices of each kind in files of Llama 2 7B that llama-quantize wrote, as llama.cpp counts them when it loads one.
COUNTED = {
    "q3_k_m": {"Q3_K": 129, "Q4_K": 92, "Q5_K": 4, "Q6_K": 1},
    "q4_k_m": {"Q4_K": 193, "Q6_K": 33},
    "q4_k_s": {"Q4_K": 217, "Q5_K": 8, "Q6_K": 1},
    "q5_k_m": {"Q5_K": 193, "Q6_K": 33},
    "q5_k_s": {"Q5_K": 225, "Q6_K": 1},
    "q6_k": {"Q6_K": 226},
}


@pytest.mark.parametrize("mix", COUNTED)
def test_llama_2_7b_has_the_kinds_that_llama_quantize_gives_it(mix: str) -> None:
    from llmprune_cli.formats.gguf.blocks.mixes import Model, mixed_kind

    model = Model("llama", layers=32, queries_per_key=1, experts=0, is_weighted=False, is_tied=False)
    names = ["token_embd.weight", "output.weight", *(f"blk.{n}.{role}.weight" for n in range(32) for role in ROLES)]
    columns = {name: 11008 if "ffn_down" in name else 4096 for name in names}
    assert Counter(mixed_kind(mix, name, columns[name], model) for name in names) == COUNTED[mix]


@pytest.mark.parametrize(
    ("mix", "name", "columns", "settings", "kind"),
    [
        ("q4_k_m", "token_embd.weight", 512, {"is_tied": True}, "Q6_K"),
        ("q4_k_m", "token_embd.weight", 576, {"is_tied": True}, "Q8_0"),
        ("q4_k_m", "token_embd.weight", 576, {}, "Q5_0"),
        ("q4_k_m", "blk.8.attn_q.weight", 576, {}, "Q5_0"),
        ("q5_k_m", "blk.8.attn_q.weight", 576, {}, "Q5_1"),
        ("q6_k", "blk.8.attn_q.weight", 576, {}, "Q8_0"),
        ("q3_k_m", "blk.8.attn_q.weight", 576, {}, "Q4_0"),
        ("iq4_xs", "blk.8.attn_q.weight", 576, {}, "IQ4_NL"),
        ("q4_k_m", "blk.8.attn_q.weight", 100, {}, "F16"),
        ("iq4_nl", "blk.8.attn_v.weight", 512, {"queries_per_key": 4}, "Q5_K"),
        ("iq4_nl", "blk.0.ffn_down.weight", 512, {}, "Q5_K"),
        ("iq4_nl", "blk.0.ffn_down.weight", 512, {"is_weighted": True}, "IQ4_NL"),
        ("iq4_nl", "blk.8.ffn_down.weight", 512, {}, "IQ4_NL"),
        ("q4_k_m", "blk.8.attn_k.weight", 512, {"experts": 8}, "Q8_0"),
        ("q4_k_m", "blk.8.attn_v.weight", 512, {"experts": 8}, "Q8_0"),
        ("q4_k_m", "blk.8.attn_output.weight", 512, {"experts": 8}, "Q5_K"),
        ("q4_k_m", "blk.0.ffn_down_exps.weight", 512, {"experts": 8}, "Q6_K"),
        ("q4_k_m", "blk.5.attn_v.weight", 512, {"layers": 80, "queries_per_key": 8}, "Q6_K"),
        ("q4_k_m", "blk.10.attn_v.weight", 512, {"layers": 80, "queries_per_key": 8}, "Q5_K"),
        ("q4_k_m", "output.weight", 512, {"architecture": "falcon"}, "Q8_0"),
        ("q4_k_m", "blk.6.ffn_down.weight", 512, {"architecture": "falcon"}, "Q5_K"),
        ("q3_k_m", "blk.8.ffn_down.weight", 512, {"architecture": "falcon"}, "Q3_K"),
    ],
)
def test_what_a_matrix_gets_depends_on(
    mix: str, name: str, columns: int, settings: dict[str, object], kind: str
) -> None:
    from llmprune_cli.formats.gguf.blocks.mixes import Model, mixed_kind

    plain = {
        "architecture": "llama",
        "layers": 32,
        "queries_per_key": 1,
        "experts": 0,
        "is_weighted": False,
        "is_tied": False,
    }
    assert mixed_kind(mix, name, columns, Model(**{**plain, **settings})) == kind  # type: ignore[arg-type]


MIXED = {"num_experts": 4, "num_experts_per_tok": 2, "hidden_size": 64, "norm_topk_prob": True}


@pytest.mark.parametrize(
    ("family", "settings", "words"),
    [
        ("llama", {"intermediate_size": 72}, ["72 neurons"]),
        ("mixtral", {"intermediate_size": 72}, ["72 neurons"]),
        ("llama", {"hidden_size": 72, "intermediate_size": 96}, ["72 hidden channels"]),
        ("qwen3_moe", {**MIXED, "moe_intermediate_size": 72, "intermediate_size": 96}, ["72 neurons of an expert"]),
        ("qwen3_moe", {**MIXED, "moe_intermediate_size": 96, "intermediate_size": 72}, []),
        (
            "qwen2_moe",
            {**MIXED, "norm_topk_prob": False, "moe_intermediate_size": 72, "shared_expert_intermediate_size": 104},
            ["72 neurons of an expert", "104 neurons of the shared expert"],
        ),
    ],
)
def test_what_stays_in_16_bits_is_what_is_laid_out_so(family: str, settings: dict[str, Any], words: list[str]) -> None:
    from transformers import AutoConfig

    from llmprune_cli.family.skeleton import expected_index
    from llmprune_cli.folder.tensors import TensorEntry
    from llmprune_cli.formats.gguf.blocks.mixes import unpacked
    from llmprune_cli.formats.gguf.families import written_family
    from llmprune_cli.formats.gguf.tensors import lay_out

    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    if family == "qwen2_moe":
        sizes["head_dim"] = 16  # which fills the hidden size
    config = AutoConfig.for_model(family, vocab_size=96, **{**sizes, **settings})
    entries = [TensorEntry(name, shape, "BF16", None) for name, shape in expected_index(config).items()]
    laid = lay_out(entries, config, written_family(config)[0], "q4_k_m", is_weighted=False).tensors
    rows = {tensor.shape[-1] for tensor in laid if tensor.kind.name == "F16"}
    assert rows == {int(own.split()[0]) for own in words}
    said = unpacked(config)
    assert bool(said) == bool(words) and all(f"{own} " in said for own in words)


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 256, which every block divides, and rows of 288 into its MLP, which only short ones do."""
    sizes = {"hidden_size": 256, "intermediate_size": 288, "head_dim": 32, "tie_word_embeddings": False}
    return tiny(tmp_path_factory.mktemp("wide") / "model", "llama", **sizes, initializer_range=0.05)


@pytest.mark.parametrize("mix", examples(MIXES, ["q4_k_m"]))
def test_a_mix_runs_in_llama_cpp_and_takes_the_bytes_of_its_blocks(mix: str, wide_llama: Path, tmp_path: Path) -> None:
    import numpy
    from gguf import GGML_QUANT_SIZES, GGUFReader, LlamaFileType
    from gguf.quants import dequantize

    from llmprune_cli.formats.gguf.blocks.mixes import SHORTER, USUAL

    document = verified(export(wide_llama, tmp_path / "gguf", "--dtype", mix.upper()))
    path = tmp_path / "gguf" / f"model-{mix}.gguf"
    assert document["dtype"] == mix and path.is_file()
    read = GGUFReader(path)
    assert read.fields["general.file_type"].contents() == LlamaFileType[f"MOSTLY_{mix.upper()}"]
    found = {tensor.name: tensor for tensor in read.tensors}
    kinds = {name: tensor.tensor_type.name for name, tensor in found.items()}
    assert kinds["blk.1.ffn_gate.weight"] == USUAL[mix] and kinds["output.weight"] == "Q6_K"
    assert kinds["blk.1.ffn_down.weight"] in {*SHORTER.values(), "IQ4_NL"}
    size_bytes = 0
    for tensor in read.tensors:
        elements, block_bytes = GGML_QUANT_SIZES[tensor.tensor_type]
        size_bytes += -(-math.prod(tensor.shape.tolist()) // elements * block_bytes // 32) * 32
    assert path.stat().st_size == min(tensor.data_offset for tensor in read.tensors) + size_bytes
    stored = written_tensors(wide_llama)["model.layers.2.mlp.up_proj.weight"].float().numpy()
    given = found["blk.2.ffn_up.weight"]
    error = numpy.square(dequantize(given.data, given.tensor_type).reshape(stored.shape) - stored).mean()
    assert 0 < error < {"q3_k_m": 0.03}.get(mix, 0.01) * numpy.square(stored).mean()


def decoded(blocks: Any, kind: str) -> Any:
    """What llama.cpp's own code makes of the blocks of a matrix, [R, C] in float32."""
    import numpy
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    from llmprune_cli.formats.gguf.blocks import encoding

    name = kind.lower() if kind.startswith("IQ") else f"q{kind[1:]}"
    decode = getattr(encoding._ggml(), f"dequantize_row_{name}")
    decode.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    elements, size_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    blocks = numpy.ascontiguousarray(blocks).view(numpy.uint8)
    found = numpy.empty((len(blocks), blocks.shape[1] // size_bytes * elements), numpy.float32)
    decode(blocks.ctypes.data, found.ctypes.data, found.size)
    return found


@pytest.mark.parametrize("mix", examples(MIXES, ["q4_k_m", "q3_k_m", "iq4_xs"]))
def test_what_is_read_back_is_bit_for_bit_what_llama_cpp_reads(mix: str, wide_llama: Path, tmp_path: Path) -> None:
    """The usual kind of a mix, and the one of rows that blocks of 256 do not divide."""
    from gguf import GGUFReader

    run = run_cli(
        "export", wide_llama, "--format", "gguf", "--dtype", mix, "--output", tmp_path / "gguf", "--no-verify"
    )
    assert run.code == 0, run.stderr
    path = tmp_path / "gguf" / f"model-{mix}.gguf"
    run = run_cli("export", path, "--format", "safetensors", "--dtype", "float32", "--output", tmp_path / "read")
    assert run.code == 0, run.stderr
    stored, read = {own.name: own for own in GGUFReader(path).tensors}, written_tensors(tmp_path / "read")
    names = {
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_v": "self_attn.v_proj",
    }
    kinds = set()
    for (own, other), layer in itertools.product(names.items(), range(4)):
        tensor = stored[f"blk.{layer}.{own}.weight"]
        kinds.add(tensor.tensor_type.name)
        expected = decoded(tensor.data, tensor.tensor_type.name)
        assert (read[f"model.layers.{layer}.{other}.weight"].numpy() == expected).all(), (own, layer)
    assert len(kinds) >= 2, kinds


def test_threads_and_pieces_change_no_bit(wide_llama: Path) -> None:
    import numpy
    from gguf import GGMLQuantizationType

    from llmprune_cli.formats.gguf.blocks.encoding import encode_blocks

    rows = numpy.random.default_rng(0).normal(size=(7, 512)).astype("float32")
    for kind in (GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q6_K, GGMLQuantizationType.IQ4_NL):
        whole = encode_blocks(rows, kind, "x", 1)
        pieces = [encode_blocks(rows[n : n + 1], kind, "x", 1) for n in range(7)]
        assert (whole == encode_blocks(rows, kind, "x", 3)).all() and (whole == numpy.concatenate(pieces)).all()


def test_what_the_gguf_package_encodes_as_well_is_the_same() -> None:
    import numpy
    from gguf import GGMLQuantizationType, quantize

    from llmprune_cli.formats.gguf.blocks.encoding import encode_blocks

    rows = numpy.random.default_rng(0).normal(size=(16, 256)).astype("float32")
    for name in ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"):
        kind = GGMLQuantizationType[name]
        assert (encode_blocks(rows, kind, "x", 1) == quantize(rows, kind)).all(), name


def test_elements_beyond_the_scales_of_blocks_are_refused() -> None:
    import numpy
    from gguf import GGMLQuantizationType

    from llmprune_cli.errors import VerificationError
    from llmprune_cli.formats.gguf.blocks.encoding import encode_blocks

    rows = numpy.full((1, 256), 1e9, "float32")
    with pytest.raises(VerificationError, match="attn_q has elements that are too large for Q4_K"):
        encode_blocks(rows, GGMLQuantizationType.Q4_K, "attn_q", 1)


@pytest.mark.parametrize("family", examples(["llama", "gpt2", "falcon", "phi3", "mixtral", "qwen3_moe"], ["llama"]))
def test_importance_is_what_comes_into_each_stored_matrix(family: str, tmp_path: Path) -> None:
    """Beside hooks on the whole model in transformers, in whose modules matrices have their stored names, or slices."""
    import torch

    from llmprune_cli.formats.gguf.blocks.importance import measure_importance
    from support.opened import open_family

    expected: dict[str, torch.Tensor] = {}

    def follow(module: torch.nn.Module, name: str) -> None:
        def keep(module: torch.nn.Module, given: tuple[torch.Tensor, ...], result: torch.Tensor) -> None:
            expected[name] = given[0].reshape(-1, given[0].shape[-1]).square().mean(0)

        module.register_forward_hook(keep)

    with open_family(family, tmp_path) as opened, torch.inference_mode():
        found = measure_importance(opened.layered, opened.tokens, lambda layers: None)
        own = [name for name, values in opened.model.named_parameters() if name in found and values.ndim == 2]
        for name in own:
            follow(opened.model.get_submodule(name.removesuffix(".weight")), name)
        opened.model(input_ids=opened.tokens)
        config = opened.model.config
        stacked = {entry.name for entry in opened.subject.checkpoint.entries if ".experts." in entry.name}
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values.clamp_min(1e-6 * values.mean()), rtol=1e-3, atol=1e-6)
    assert len(expected) == len(own) >= 4 * config.num_hidden_layers
    assert {name for name in found if ".experts." in name} == stacked


def test_importance_rounds_with_more_care_where_it_counts(wide_llama: Path, tmp_path: Path) -> None:
    import numpy
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    from llmprune_cli.formats.gguf.blocks.encoding import encode_blocks

    seeded = numpy.random.default_rng(0)
    rows, weights = seeded.normal(size=(64, 256)).astype("float32"), seeded.exponential(size=256).astype("float32") ** 3
    for kind in (GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q5_0, GGMLQuantizationType.IQ4_NL):
        errors = [
            (weights * numpy.square(dequantize(encode_blocks(rows, kind, "x", 1, given), kind) - rows)).sum()
            for given in (weights, None)
        ]
        assert errors[0] < 0.95 * errors[1], kind


def test_an_export_measures_importance_on_the_text_that_is_named(
    wide_llama: Path, tmp_path: Path, text_file: Path
) -> None:
    words = ("export", wide_llama, "--format", "gguf", "--dtype", "q4_k_m", "-o")
    run = run_cli(*words, tmp_path / "weighted", "--imatrix", text_file, "--no-verify")
    assert run.code == 0, run.stderr
    assert run_cli(*words, tmp_path / "plain", "--no-verify").code == 0
    files = [(tmp_path / name / "model-q4_k_m.gguf").read_bytes() for name in ("weighted", "plain")]
    assert len(files[0]) == len(files[1]) and files[0] != files[1]
    run = run_cli(*words[:4], "--dtype", "q8_0", "-o", tmp_path / "x", "--imatrix", text_file)
    assert_refused(run, USAGE, "--imatrix is about gguf in q6_k, q5_k_m")
    assert_refused(run_cli(*words, tmp_path / "x", "--imatrix", "nope.txt"), CHECKPOINT, "nope.txt does not")


def test_a_prune_exports_in_one_go(byte_level_llama: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader

    words = ("prune", byte_level_llama, "--mlp", "0.5", *BY_MAGNITUDE, "-o", tmp_path / "out", "--gguf", "q4_k_m")
    run = run_cli(*words)
    assert run.code == 0, run.stderr
    said = " ".join(run.stdout.split())
    assert "out-gguf: gguf, q4_k_m" in said and "Verified with xllamacpp" in said and "llmprune export" not in said
    assert "24 neurons in 16 bits; prune with --round-to 32 to pack it" in said
    header = GGUFReader(tmp_path / "out-gguf" / "model-q4_k_m.gguf").fields
    assert header["llama.feed_forward_length"].contents() == 24
    manifest = json.loads((tmp_path / "out-gguf" / "llmprune.json").read_text())
    assert manifest["export"]["dtype"] == "q4_k_m" and manifest["widths"]["after"]["intermediate_size"] == 24
    assert_refused(run_cli(*words), OUTPUT, "out is not empty")
    shutil.rmtree(tmp_path / "out")
    assert_refused(run_cli(*words), OUTPUT, "out-gguf is not empty", "--overwrite")


def test_a_tokenizer_that_llama_cpp_does_not_take_is_told_before_a_prune(tiny_llama: Path, tmp_path: Path) -> None:
    run = run_cli("prune", tiny_llama, "--mlp", "0.5", *BY_MAGNITUDE, "-o", tmp_path / "out", "--gguf", "q8_0")
    assert_refused(run, UNSUPPORTED, "cannot be exported in one go", "its pre-tokenizer", "Leave out --gguf")
    assert not [*tmp_path.iterdir()] and "Writing" not in run.stderr


@in_full
def test_what_llama_cpp_does_not_take_is_told_before_a_prune(tmp_path: Path) -> None:
    model = tiny(tmp_path / "model", "opt")
    run = run_cli(
        "prune", model, "--intermediate-size", "32", *BY_MAGNITUDE, "-o", tmp_path / "out", "--gguf", "q4_k_m"
    )
    assert_refused(run, UNSUPPORTED, "cannot be exported", "convert_hf_to_gguf.py` does. Leave out --gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_package_that_is_missing_is_named_before_anything_is_read(
    wide_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    words = ("export", wide_llama, "--format", "gguf", "--output", tmp_path / "gguf", "--dtype")
    assert_refused(run_cli(*words, "q4_k_m"), UNSUPPORTED, "xllamacpp", "'llmprune[gguf,llamacpp]'", "q5_0")
    assert run_cli(*words, "q5_0").code == 0
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert_refused(run_cli(*words, "q5_0", "--overwrite"), UNSUPPORTED, "'llmprune[gguf]'")


def test_what_prune_suggests_is_a_type_that_can_be_written_here(
    byte_level_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def suggested(model: Path) -> str | None:
        run = run_cli("prune", model, "--mlp", "0.5", *BY_MAGNITUDE, "-o", tmp_path / "out", "--overwrite")
        assert run.code == 0, run.stderr
        found = re.search(r"llmprune export .* --dtype (\w+)", run.stdout)
        return found[1] if found else None

    assert suggested(byte_level_llama) == "q4_k_m"
    assert suggested(tiny(tmp_path / "opt", "opt")) is None  # which is not written here
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    assert suggested(byte_level_llama) == "q8_0"
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert suggested(byte_level_llama) is None


@pytest.mark.parametrize(
    ("dtype", "meant"), {"q4_k": "q4_k_m", "Q5_K": "q5_k_m", "q4km": "q4_k_m", "q6": "q6_k", "q8": "q8_0"}.items()
)
def test_a_type_that_is_not_there_brings_one_with_nearly_its_name(
    dtype: str, meant: str, wide_llama: Path, tmp_path: Path
) -> None:
    run = run_cli("export", wide_llama, "--format", "gguf", "--dtype", dtype, "--output", tmp_path / "gguf")
    assert_refused(run, USAGE, f"Did you mean {meant}?", "bf16, q6_k, q5_k_m", "q4_0.")
    run = run_cli("prune", wide_llama, "--mlp", "50%", "--gguf", dtype, "--output", tmp_path / "out")
    assert_refused(run, USAGE, f"Did you mean {meant}?")


def test_a_disk_without_room_for_the_file_is_told_before_a_tensor_is_written(
    wide_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmprune_cli.folder import staging

    usage = staging.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    run = export(wide_llama, tmp_path / "gguf", "--dtype", "q4_k_m")
    assert_refused(run, OUTPUT, "bytes", "has room for 1,000", "another --output")
    assert not list(tmp_path.iterdir())
