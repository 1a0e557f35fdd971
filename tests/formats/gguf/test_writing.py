"""GGUF files in every dtype, by other converters, and of a real model."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support import ROOT
from support.cli import BY_MAGNITUDE, run_cli
from support.full import in_full
from support.gguf_exports import export, needs_llamacpp, tiny, verified
from support.stock import written_tensors

pytestmark = needs_llamacpp

# The largest error of an element, as a share of the largest one.
STEPS = {"f16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 127, "q5_1": 1 / 15, "q5_0": 1 / 15, "q4_1": 1 / 7, "q4_0": 1 / 7}


@pytest.mark.parametrize("dtype", STEPS)
def test_matrices_are_quantized_where_their_rows_divide(dtype: str, byte_level_llama: Path, tmp_path: Path) -> None:
    import numpy
    from gguf import GGUFReader
    from gguf.quants import dequantize

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


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("opt", {}, "llmprune itself does not write opt for llama.cpp; where llama.cpp has this family"),
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


@in_full
def test_the_documented_block_generates_text(byte_level_llama: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "exports.md").read_text(encoding="utf-8")
    script = next(block for block in page.split("```") if block.startswith("sh\n") and "import xllamacpp" in block)[3:]
    shutil.copytree(byte_level_llama, tmp_path / "pruned")
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "400"}
    done = subprocess.run(["bash", "-ec", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report, _, generated = done.stdout.partition("largest difference")
    assert "Verified with xllamacpp" in report and len(generated.partition("\n")[2]) > 8


@in_full
@pytest.mark.parametrize("layers", [2, 30])
def test_smollm2_runs_in_llama_cpp_with_the_tokenizer_of_its_own_file(
    smollm2: Path, smollm2_gguf: Path, tmp_path: Path, layers: int
) -> None:
    from gguf import GGUFReader

    model = smollm2
    if layers < 30:
        model = tmp_path / "model"
        dropped = ("--drop-layers", ",".join(map(str, range(layers, 30))))
        assert run_cli("prune", smollm2, *BY_MAGNITUDE, *dropped, "--output", model).code == 0
    found = verified(export(model, tmp_path / "gguf", "--dtype", "f32"))["verification"]
    assert found["kl_limit"] == 1e-5 and found["same_tokens"] == 1 and found["tokens"] == 3 * 64
    ours, theirs = (GGUFReader(path).fields for path in (tmp_path / "gguf" / "model-f32.gguf", smollm2_gguf))
    names = [name for name in theirs if name.startswith("tokenizer.") and not name.endswith("space_prefix")]
    assert "tokenizer.ggml.merges" in names and ours["tokenizer.ggml.pre"].contents() == "smollm"
    assert all(ours[name].contents() == theirs[name].contents() for name in names)


@in_full
def test_smollm2_pruned_by_a_third_runs_quantized_as_well_as_it_can(
    smollm2: Path,
    tmp_path: Path,
) -> None:
    """Magnitudes alone ruin it: what rounding then costs in transformers is part of what an export may cost."""
    assert (
        run_cli(
            "prune", smollm2, *BY_MAGNITUDE, "--pruning-ratio", "0.3333333333", "--output", tmp_path / "pruned"
        ).code
        == 0
    )
    found = verified(export(tmp_path / "pruned", tmp_path / "gguf", "--dtype", "q8_0"))["verification"]
    assert 1e-2 < found["kl"] < found["kl_limit"] < 0.5
