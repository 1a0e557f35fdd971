"""Which format takes which model and options, and that the README's way to run each works."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmprune_cli.errors import UnsupportedError
from llmprune_cli.family.skeleton import build_skeleton
from llmprune_cli.formats.graphs import example_past, fit_graph
from llmprune_cli.formats.onnx_graph import fit_onnx
from llmprune_cli.source.configuration import text_part
from support import ROOT, families
from support.cli import run_cli
from support.exports import export, needs_genai, needs_onnx
from support.full import examples, in_full
from support.tiny import BYTE_LEVEL_VOCABULARY, save_byte_level, save_tiny, tiny_config

SCANNING = ("mamba", "mamba2", "jamba", "bamba", "falcon_h1", "granitemoehybrid", "qwen3_next")
TYPES = json.loads((ROOT / "tests" / "tools" / "families" / "configurations.json").read_text(encoding="utf-8"))
UNBUILT = ("dots3_note", "emu3", "gemma3n", "mllama")  # of which there is no language model alone
TRIED_TYPES = (
    *("falcon_mamba", "kimi_linear", "llama", "minimax", "nemotron_h", "olmo_hybrid", "qwen3_5_moe_text"),
    *("qwen3_5_text", "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2", "zaya"),
)
# Classes of modules that go through a text in steps or chunks.
IN_STEPS = re.compile(
    r"(Mamba.*|Bamba|FalconH1)Mixer|MambaLayer|Delta(Net|Attention)|Lightning|Rglru|RwkvSelf|xLSTMLayer|Compressor$"
)


def config_of(family: str) -> Any:
    """The language model of one of transformers' types, small."""
    return text_part(AutoConfig.for_model(family, **TYPES[family]))


@pytest.mark.parametrize("family", examples([own for own in TYPES if own not in UNBUILT], TRIED_TYPES))
def test_what_goes_through_a_text_in_steps_has_no_graph(family: str) -> None:
    config = config_of(family)
    names = {type(module).__name__ for module in build_skeleton(config).modules()}
    in_steps = {name for name in names if IN_STEPS.search(name)}
    assert fit_graph(config).loads == fit_onnx(config).loads == (not in_steps), names


def test_layers_of_attention_alone_have_a_graph_in_a_family_that_may_have_others() -> None:
    settings = {**families.SIZES, **families.FAMILIES["granitemoehybrid"], "layer_types": ["attention"] * 4}
    config: Any = tiny_config("granitemoehybrid", **settings)
    assert fit_graph(config).loads and not fit_onnx(config).note


@pytest.mark.parametrize("family", ["zaya", "deepseek_v32"])
def test_a_cache_of_more_than_keys_and_values_is_not_taken_for_one(family: str) -> None:
    """Zaya's attention keeps the last inputs of a convolution as well, DeepSeek V3.2's what it chooses keys by."""
    config = config_of(family)
    assert "with --no-kv-cache" in fit_onnx(config).note
    torch.manual_seed(7)
    with pytest.raises(UnsupportedError, match="more than keys and values"):
        example_past(AutoModelForCausalLM.from_config(config).eval())


@pytest.mark.parametrize("family", examples(SCANNING, ["mamba", "qwen3_next"]))
def test_what_scans_in_steps_is_refused_before_it_is_traced(family: str, tmp_path: Path) -> None:
    settings = {**families.SIZES, **families.FAMILIES[family]}
    tiny_config(family, **settings).save_pretrained(tmp_path / "model")  # type: ignore[attr-defined]
    run = run_cli("inspect", tmp_path / "model", "--json")
    assert run.code == 0, run.stderr
    fits = {fit["runtime"]: fit for fit in json.loads(run.stdout)["runtimes"]}
    assert not fits["ONNX Runtime"]["loads"] and not fits["torch.export"]["loads"]
    assert "steps" in fits["torch.export"]["note"] and fits["transformers"]["loads"]


FORMS = [
    pytest.param("torch-export", marks=in_full),
    pytest.param("onnx", marks=[needs_onnx, in_full]),
    pytest.param("genai", marks=[needs_genai, in_full]),
]


@pytest.mark.parametrize("form", FORMS)
def test_the_documented_block_generates_text(form: str, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "exports.md").read_text(encoding="utf-8")
    script = next(b for b in page.split("```") if b.startswith("sh\n") and f"--format {form} " in b)[3:]
    save_tiny(tmp_path / "pruned", vocab_size=BYTE_LEVEL_VOCABULARY, **families.HEADS_OF_16)
    save_byte_level(tmp_path / "pruned")
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "400"}
    done = subprocess.run(["bash", "-ec", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report, _, generated = done.stdout.partition("largest difference")
    assert "Verified with" in report and "The history of the city" in generated and len(generated) > 50


def test_wrong_usages(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    run = export(folder, tmp_path / "graph", "torch-export", "--no-kv-cache")
    assert run.code == 2 and "--format onnx" in run.stderr
    run = export(folder, tmp_path / "model.onnx", "onnx")
    assert run.code == 2 and "names a folder" in run.stderr
    run = export(folder, tmp_path / "graph", "onnx", "--dtype", "q8_0")
    assert run.code == 2 and "float16" in run.stderr
