"""What `inspect` found out is remembered for as long as the model is the same, and loads no library again."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmprune_cli.commands import inspect as inspecting
from llmprune_cli.commands.inspect import inspect
from llmprune_cli.errors import LlmpruneError
from llmprune_cli.options import ModelReference, WidthRequest
from llmprune_cli.startup import remembered
from llmprune_cli.startup.loading import loading
from support.checkpoints import rewrite
from support.cli import run_cli

NOTHING, HALF = WidthRequest(), WidthRequest(pruning_ratio=0.5)


@pytest.fixture
def found_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The models that were looked into, with a cache of this test's own and files that count as settled at once."""
    found: list[str] = []
    original: Any = inspecting._find_out

    def counted(reference: ModelReference, *request: Any) -> Any:
        found.append(reference.name)
        return original(reference, *request)

    monkeypatch.setattr(inspecting, "_find_out", counted)
    monkeypatch.setattr(remembered, "SETTLED_NS", -(10**9))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return found


@pytest.mark.parametrize("family", ["llama", "jamba"])
def test_what_is_remembered_is_what_was_found_out(
    tiny_of: Callable[[str], Path], family: str, found_out: list[str]
) -> None:
    model = ModelReference(str(tiny_of(family)))
    for request in (NOTHING, HALF):
        first, second = (inspect(model, request) for _ in range(2))
        assert first == second
    assert len(found_out) == 2


def test_another_model_is_looked_into(tiny_llama: Path, tmp_path: Path, found_out: list[str]) -> None:
    folder = rewrite(tiny_llama, tmp_path / "model", lambda tensors: tensors)
    model = ModelReference(str(folder))
    inspect(model, NOTHING)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"head_dim": 16}))
    with pytest.raises(LlmpruneError):
        inspect(model, NOTHING)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "adapter.bin").touch()
    inspect(model, NOTHING)
    (folder / "adapter.bin").unlink()
    inspect(model, NOTHING)
    assert len(found_out) == 4
    inspect(ModelReference(str(folder), trust_remote_code=True), NOTHING)
    inspect(ModelReference(str(folder), trust_remote_code=True), NOTHING)
    assert len(found_out) == 6


def test_files_that_were_just_written_are_not_relied_on(
    tiny_llama: Path, tmp_path: Path, found_out: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembered, "SETTLED_NS", 3600 * 10**9)
    model = ModelReference(str(rewrite(tiny_llama, tmp_path / "model", lambda tensors: tensors)))
    for _ in range(2):
        inspect(model, NOTHING)
    assert len(found_out) == 2


@pytest.mark.parametrize("damage", ["", "{", "null", '{"schema_version": 1}'])
def test_a_damaged_memory_is_no_memory(tiny_llama: Path, tmp_path: Path, found_out: list[str], damage: str) -> None:
    first = inspect(ModelReference(str(tiny_llama)), NOTHING)
    (file,) = (tmp_path / "cache" / "llmprune").glob("inspect-*")
    file.write_text(damage)
    assert inspect(ModelReference(str(tiny_llama)), NOTHING) == first
    assert len(found_out) == 2


@pytest.mark.parametrize("place", [os.devnull, "relative", ""])
def test_only_an_absolute_cache_is_written_to(
    tiny_llama: Path, tmp_path: Path, found_out: list[str], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", place)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        inspect(ModelReference(str(tiny_llama)), NOTHING)
    assert not (tmp_path / "relative").exists()
    assert len(found_out) == (2 if place == os.devnull else 1)


def test_remembering_takes_no_library(tiny_llama: Path, tmp_path: Path, found_out: list[str]) -> None:
    run = run_cli("inspect", tiny_llama, "--pruning-ratio", "0.5")
    assert run.code == 0
    code = (
        "import sys\nfrom llmprune_cli.__main__ import main\nfrom llmprune_cli.startup import remembered\n"
        "remembered.SETTLED_NS = -10**9\n"
        f"try: main(['inspect', {str(tiny_llama)!r}, '--pruning-ratio', '0.5'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'heavy imports'"
    )
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert again.stdout == run.stdout


def test_garbage_is_collected_again_after_loading() -> None:
    frozen = gc.get_freeze_count()
    with pytest.raises(ZeroDivisionError), loading():
        assert not gc.isenabled()
        raise ZeroDivisionError
    assert gc.isenabled() and gc.get_freeze_count() == frozen
