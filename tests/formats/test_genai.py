"""onnxruntime-genai generates what transformers does, or the model is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmprune_cli.formats.genai import FAMILIES as GENAI_FAMILIES
from llmprune_cli.formats.genai import PACKAGE
from support import families
from support.exports import export, needs_genai, pruned, verified
from support.full import examples
from support.tiny import save_tiny


@needs_genai
@pytest.mark.parametrize("family", examples(families.TRIED_EXPORTS, ["phi3", "gpt2"]))
def test_genai_generates_what_transformers_does_or_is_refused(family: str, tmp_path: Path) -> None:
    folder = pruned(tmp_path, family, **families.HEADS_OF_16)
    run = export(folder, tmp_path / "genai", "genai", "--dtype", "f32")
    if family not in GENAI_FAMILIES:
        assert run.code == 4 and "its builder" in run.stderr and not (tmp_path / "genai").exists()
        return
    document = verified(run)
    assert document["verification"]["same_tokens"] == 1 and document["verification"]["runtime"].startswith(PACKAGE)
    assert {"genai_config.json", "model.onnx", "tokenizer.json", "config.json"} <= {*document["files"]}


LEAST_LIMITS = {"int8": 0.01, "int4": 0.5}  # of the KL per token


@needs_genai
@pytest.mark.parametrize("dtype", examples(LEAST_LIMITS, []))
def test_genai_quantizes_within_its_limits(dtype: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", **families.HEADS_OF_16)
    found = verified(export(folder, tmp_path / "genai", "genai", "--dtype", dtype))["verification"]
    assert found["kl_limit"] >= LEAST_LIMITS[dtype]


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("llama", {}, "head dim in multiples of 16, not 8"),
        ("phi", families.HEADS_OF_16, "share of a head that turns in multiples of 16, not 8"),
        ("opt", {}, "not known to be right for opt"),
    ],
)
def test_genai_is_refused_from_the_configuration(
    family: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    settings = {**families.SIZES, **families.FAMILIES[family], **changes}
    run = export(save_tiny(tmp_path / "model", family, **settings), tmp_path / "genai", "genai")
    assert run.code == 4 and reason in run.stderr and not (tmp_path / "genai").exists()
