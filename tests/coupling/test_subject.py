"""What was found out about an architecture is remembered on disk, and only for that architecture."""

from __future__ import annotations

import json
import os
from copy import copy
from dataclasses import replace
from pathlib import Path

import pytest

from llmprune_cli.coupling import subject
from llmprune_cli.coupling.subject import find_coupling
from llmprune_cli.coupling.trace import Trace
from llmprune_cli.family.architecture import Architecture
from llmprune_cli.startup import remembered
from support import families
from support.opened import Opened

every_family = pytest.mark.parametrize("opened", families.TRIED_SLOWLY, indirect=True)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Architecture]:
    """The architectures that were traced, with a cache of this test's own."""
    found: list[Architecture] = []
    original = subject.trace

    def counted(architecture: Architecture) -> Trace:
        found.append(architecture)
        return original(architecture)

    monkeypatch.setattr(subject, "trace", counted)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return found


@every_family
def test_a_remembered_trace_is_the_trace(opened: Opened, traced: list[Architecture]) -> None:
    first, second = (find_coupling(opened.subject.architecture) for _ in range(2))
    assert len(traced) == 1 and first == second
    assert first[1] == opened.subject.trace


@pytest.mark.parametrize("opened", ["llama"], indirect=True)
def test_a_copy_elsewhere_is_the_same_architecture(opened: Opened, traced: list[Architecture]) -> None:
    elsewhere = copy(opened.subject.architecture.config)
    elsewhere._name_or_path = "elsewhere"
    find_coupling(opened.subject.architecture)
    found, _ = find_coupling(replace(opened.subject.architecture, config=elsewhere))
    assert len(traced) == 1 and found.config is elsewhere


@pytest.mark.parametrize("opened", ["llama"], indirect=True)
@pytest.mark.parametrize("damage", ["", "{", '{"trace": 3}', None])
def test_a_damaged_memory_is_no_memory(
    opened: Opened, traced: list[Architecture], tmp_path: Path, damage: str | None
) -> None:
    find_coupling(opened.subject.architecture)
    (file,) = (tmp_path / "cache" / "llmprune").iterdir()
    whole = file.read_text()
    if damage is None:
        file.unlink()
        file.mkdir()
    else:
        file.write_text(damage)
    assert find_coupling(opened.subject.architecture)[1] == opened.subject.trace
    assert len(traced) == 2 and (damage is None or json.loads(file.read_text()).keys() == json.loads(whole).keys())


@pytest.mark.parametrize("opened", ["llama"], indirect=True)
def test_another_architecture_or_version_is_traced_anew(
    opened: Opened, traced: list[Architecture], monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture = opened.subject.architecture
    find_coupling(architecture)
    find_coupling(replace(architecture, hidden_multiple_of_heads=not architecture.hidden_multiple_of_heads))
    assert len(traced) == 2
    monkeypatch.setattr(remembered, "versions", lambda: ["torch 0"])
    find_coupling(architecture)
    assert len(traced) == 3
    monkeypatch.setattr(remembered, "__version__", "0")
    find_coupling(architecture)
    assert len(traced) == 4


@pytest.mark.parametrize("opened", ["llama"], indirect=True)
def test_a_cache_that_cannot_be_written_is_done_without(
    opened: Opened, traced: list[Architecture], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    for _ in range(2):
        assert find_coupling(opened.subject.architecture)[1] == opened.subject.trace
    assert len(traced) == 2
