"""What was found out about an architecture is remembered on disk, and only for that architecture."""

from __future__ import annotations

import json
import os
from copy import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from llmprune_cli.coupling import subject
from llmprune_cli.coupling.subject import find_coupling
from llmprune_cli.coupling.trace import Trace
from llmprune_cli.coupling.twin import cached_by, one_thread, settle_head_dim
from llmprune_cli.family.architecture import Architecture, discover, with_widths
from llmprune_cli.family.skeleton import expected_index
from llmprune_cli.options import WidthRequest
from llmprune_cli.plan.requested_widths import resolve
from llmprune_cli.startup import remembered
from support import families
from support.opened import Opened
from support.tiny import tiny_config

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


# --- what a model keeps of a token -----------------------------------------------------------------------------------

KINDS_OF_CACHES = ("gemma", "lfm2", "falcon", "falcon_h1", "qwen3_next")


def kept_of_a_token(config: object) -> float:
    """Numbers by which transformers' own cache of a model grows with a token."""
    model = AutoModelForCausalLM.from_config(config).eval()
    held = []
    for length in (5, 7):  # shorter than the sliding windows
        with torch.no_grad():
            cache = getattr(model(torch.full((1, length), 5), use_cache=True), "past_key_values", None)
        tensors = [own for layer in getattr(cache, "layers", ()) for own in vars(layer).values()]
        held.append(sum(own.numel() for own in tensors if isinstance(own, torch.Tensor) and own.is_floating_point()))
    return (held[1] - held[0]) / 2


@pytest.mark.parametrize("family", dict.fromkeys((*families.TRIED, *KINDS_OF_CACHES)))
def test_what_is_kept_of_a_token_is_what_transformers_keeps(family: str) -> None:
    config = tiny_config(families.model_type(family), **{**families.SIZES, **families.FAMILIES[family]})
    architecture = discover(config, expected_index(config))  # type: ignore[arg-type]
    with one_thread():
        architecture = settle_head_dim(architecture)
        architecture = replace(architecture, cached=cached_by(architecture))
    layers = tuple(range(architecture.widths.num_hidden_layers))
    assert architecture.cached_numbers(architecture.widths, layers) == kept_of_a_token(config)
    fewer_heads = {"head_pruning_ratio": 0.5} if architecture.widths.num_attention_heads else {}
    target = resolve(architecture, {}, WidthRequest(num_hidden_layers=2, **fewer_heads))
    kept = kept_of_a_token(with_widths(architecture, target.widths, target.layers))
    assert architecture.cached_numbers(target.widths, target.layers) == kept


def test_a_family_without_a_cache_has_no_figure(tmp_path: Path) -> None:
    """The first GPT keeps nothing: what would be a token's share of its memory is not known, rather than none."""
    config = tiny_config("openai-gpt", n_layer=2, n_embd=64, n_head=8, n_positions=64)
    architecture = settle_head_dim(discover(config, expected_index(config)))  # type: ignore[arg-type]
    assert cached_by(architecture) is None and architecture.cached_numbers(architecture.widths, (0, 1)) is None


@pytest.mark.parametrize("opened", ["llama"], indirect=True)
def test_a_cache_that_cannot_be_made_is_of_unknown_size(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code of a checkpoint's own raises what it likes, and a figure is worth no command."""

    def refuse(*_: object, **given: object) -> None:
        assert not given["use_cache"], "no cache here"

    monkeypatch.setattr(LlamaForCausalLM, "forward", refuse)
    assert cached_by(opened.subject.architecture) is None
