"""Exports of tiny models as graphs, and their verification."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from support import families
from support.cli import BY_MAGNITUDE, Run, run_cli
from support.tiny import save_tiny

HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
needs_genai = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime_genai") is None, reason="pip install 'llmprune[genai]'"
)
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="pip install 'llmprune[onnx]'")


def pruned(folder: Path, family: str, **changes: object) -> Path:
    """A random checkpoint with half of its query heads, which then do not fill the hidden size where they need not."""
    own = {**families.FAMILIES[family], **families.EXPORTED[family]}
    depth = {} if "layer_types" in own else {"num_hidden_layers": 2}  # tracing takes its time for every layer
    settings = {**families.SIZES, **depth, **own, "initializer_range": 0.15, **changes}
    save_tiny(folder / "model", families.model_type(family), **settings)
    cut = ("--head-pruning-ratio", "0.5", "--intermediate-pruning-ratio", "0.25")
    run = run_cli("prune", folder / "model", *cut, *BY_MAGNITUDE, "--output", folder / "pruned")
    assert run.code == 0, run.stderr
    return folder / "pruned"


def export(folder: Path, output: Path, form: str, *options: str) -> Run:
    return run_cli("export", folder, "--format", form, "--output", output, "--verify", "--json", *options)


def verified(run: Run) -> dict[str, Any]:
    assert run.code == 0, run.stderr
    document: dict[str, Any] = json.loads(run.stdout)
    assert document["verification"]["kl"] <= document["verification"]["kl_limit"]
    return document
