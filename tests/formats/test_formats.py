"""Which format takes which model and options, and that the README's way to run each works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmprune_cli.formats.graphs import SCANNING
from support import ROOT, families
from support.cli import run_cli
from support.exports import export, needs_genai, needs_onnx
from support.full import examples, in_full
from support.tiny import BYTE_LEVEL_VOCABULARY, save_byte_level, save_tiny, tiny_config


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
