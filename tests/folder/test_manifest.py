"""The manifest as a value: as it is written, and as it is read from whoever wrote it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmprune_cli.errors import CheckpointError
from llmprune_cli.folder.manifest import MANIFEST_NAME, Manifest, read_manifest, write_manifest
from support.cli import BY_MAGNITUDE, run_cli


def test_a_manifest_is_what_it_was_when_written_again(tiny_llama: Path, tmp_path: Path) -> None:
    run = run_cli("prune", tiny_llama, *BY_MAGNITUDE, "--intermediate-size", "24", "--output", tmp_path / "out")
    assert run.code == 0, run.stderr
    whole = (tmp_path / "out" / MANIFEST_NAME).read_text()
    manifest = read_manifest(tmp_path / "out")
    assert manifest.is_pruned and not manifest.other and manifest.widths is not None
    assert manifest.widths.after["intermediate_size"] == 24 and manifest.layers == (0, 1)
    write_manifest(tmp_path, manifest)
    assert (tmp_path / MANIFEST_NAME).read_text() == whole


def test_what_is_unknown_here_travels_on(tiny_llama: Path, tmp_path: Path) -> None:
    run = run_cli("prune", tiny_llama, *BY_MAGNITUDE, "--intermediate-size", "24", "--output", tmp_path / "out")
    assert run.code == 0, run.stderr
    write_manifest(tmp_path / "out", replace(read_manifest(tmp_path / "out"), other={"tomorrow": [1, {"a": None}]}))
    run = run_cli("export", tmp_path / "out", "--output", tmp_path / "exported")
    assert run.code == 0, run.stderr
    document = json.loads((tmp_path / "exported" / MANIFEST_NAME).read_text())
    assert document["tomorrow"] == [1, {"a": None}] and document["export"]["format"] == "safetensors"
    assert document["widths"]["after"]["intermediate_size"] == 24


def test_what_a_manifest_does_not_say_is_not_written(tmp_path: Path) -> None:
    write_manifest(tmp_path, Manifest(source="somewhere"))
    assert json.loads((tmp_path / MANIFEST_NAME).read_text()) == {
        "schema_version": 1,
        "source": "somewhere",
        "revision": None,
    }


@pytest.mark.parametrize(
    ("document", "place"),
    [
        ({"widths": 3}, "widths"),
        ({"parameters": {"before": 1}}, "parameters.after"),
        ({"files": {"a": {"size_bytes": "many"}}}, "files.a.size_bytes"),
        ({"layers": [0, "last"]}, "layers.1"),
    ],
)
def test_what_is_damaged_is_named(document: dict[str, Any], place: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=place):
        read_manifest(tmp_path)
