"""The twin proof catches wrong groupings: break the groups of every family on purpose, and see each break refused."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmprune_cli.apply.proof import half_of, prove
from llmprune_cli.apply.pruned_folder import prune_twin
from llmprune_cli.apply.second_opinion import hold_against_torch_pruning
from llmprune_cli.coupling.discovery import trace
from llmprune_cli.coupling.trace import Binding, Trace
from llmprune_cli.coupling.twin import build_twin, proof_sizes, settle_head_dim
from llmprune_cli.errors import LlmpruneError, UnsupportedError
from llmprune_cli.family.architecture import Architecture, discover
from llmprune_cli.family.skeleton import expected_index
from llmprune_cli.family.widths import Widths
from support.families import EVERY, FAMILIES, SIZES, TRIED_SLOWLY, model_type
from support.tiny import tiny_config

BINDINGS_BROKEN = 2 if EVERY else 1  # of each width, drawn anew for every family


@dataclass(frozen=True)
class Shifted(Binding):
    """A binding whose units are all off by one."""

    by: int = 1

    def units(self, widths: Widths, size: int) -> torch.Tensor:
        return super().units(widths, size).roll(self.by * (widths.head_dim if self.heads else 1))


def shifted(binding: Binding) -> Binding:
    return Shifted(**{field.name: getattr(binding, field.name) for field in fields(binding)})


def exchanged(traced: Trace, old: Binding, new: Binding | None) -> Trace:
    """The trace with one binding exchanged or left out, among the readers too."""
    keep = [new if binding == old else binding for binding in traced.bindings]
    readers = [new if binding == old else binding for binding in traced.readers]
    return replace(
        traced,
        bindings=tuple(binding for binding in keep if binding is not None),
        readers=tuple(binding for binding in readers if binding is not None),
    )


def mutations(traced: Trace, family: str) -> Iterator[tuple[str, Trace]]:
    """Bindings left out, shifted by one unit, or with the axes of their tensor swapped."""
    draw = random.Random(family)
    for width in sorted({binding.width for binding in traced.bindings}):
        bindings = traced.of(width)
        for binding in draw.sample(bindings, min(BINDINGS_BROKEN, len(bindings))):
            what = f"{width} along axis {binding.axis} of {binding.template}"
            yield f"drop {what}", exchanged(traced, binding, None)
            yield f"shift {what}", exchanged(traced, binding, shifted(binding))
            others = [other for other in traced.on(binding.template) if other.axis != binding.axis]
            for other in others[:1]:
                swapped = exchanged(traced, binding, replace(binding, axis=other.axis))
                yield f"swap {what}", exchanged(swapped, other, replace(other, axis=binding.axis))


def logits_of_pruned_twin(architecture: Architecture, traced: Trace, changed: tuple[str, ...]) -> torch.Tensor | None:
    """What the pruned twin of the proof answers; None where it cannot be made or loaded."""
    twin = build_twin(architecture, proof_sizes(architecture.config, False))
    with tempfile.TemporaryDirectory() as name:
        dense, pruned = Path(name, "dense"), Path(name, "pruned")
        twin.model.save_pretrained(dense)
        pruned.mkdir()
        try:
            prune_twin(dense, pruned, traced, twin.architecture, half_of(twin.architecture, changed))
            eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
            model = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float64, **eager)
        except (LlmpruneError, ValueError, RuntimeError):
            return None
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=twin.tokens, use_cache=False).logits
    return logits


@pytest.mark.parametrize("family", TRIED_SLOWLY)
def test_every_broken_group_is_caught(family: str, record_property: Callable[[str, Any], None]) -> None:
    config: Any = tiny_config(model_type(family), **{**SIZES, **FAMILIES[family]})
    architecture = settle_head_dim(discover(config, expected_index(config)))
    traced = trace(architecture)
    changed = tuple(sorted({binding.width for binding in traced.bindings}))
    prove(architecture, traced, changed, prune_twin)
    tried, missed = 0, []
    right = logits_of_pruned_twin(architecture, traced, changed)
    assert right is not None
    for what, broken in mutations(traced, family):
        try:
            prove(architecture, broken, changed, prune_twin)
        except (LlmpruneError, ValueError):
            tried += 1
            continue
        found = logits_of_pruned_twin(architecture, broken, changed)
        is_same = found is not None and torch.allclose(found, right, rtol=1e-5, atol=1e-6)  # but for rounding
        if not is_same:  # else it broke nothing: a key bias changes no softmax
            tried += 1
            missed.append(what)
    record_property("broken groups tried", tried)
    record_property("broken groups caught", tried - len(missed))
    assert (tried >= 6 or not changed) and not missed, missed


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2", "opt", "qwen2_moe"])
def test_torch_pruning_agrees_and_objects_to_broken_groups(family: str) -> None:
    config: Any = tiny_config(model_type(family), **{**SIZES, **FAMILIES[family]})
    architecture = settle_head_dim(discover(config, expected_index(config)))
    traced = trace(architecture)
    assert hold_against_torch_pruning(architecture, traced) >= 3
    reader = next(b for b in traced.of("intermediate_size") if b.axis == 1)
    for broken in (exchanged(traced, reader, None), exchanged(traced, reader, shifted(reader))):
        with pytest.raises(UnsupportedError, match=r"torch-pruning and the twin disagree about .*mlp|fc2"):
            hold_against_torch_pruning(architecture, broken)
