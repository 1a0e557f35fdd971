"""Exports of tiny models as GGUF files, and their verification by llama.cpp."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from support import families
from support.cli import Run, run_cli
from support.tiny import BYTE_LEVEL_VOCABULARY, save_byte_level, save_tiny

needs_llamacpp = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("xllamacpp", "gguf")),
    reason="pip install 'llmprune[gguf,llamacpp]'",
)
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
