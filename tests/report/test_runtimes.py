"""Which runtimes take a model is said before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.cli import run_cli

HEADS = ("--num-attention-heads", "4")  # of 8: query heads × head dim is then half of the hidden size


def test_inspect_and_a_dry_run_say_what_will_not_load(make_tiny: Callable[..., Path]) -> None:
    model = make_tiny("starcoder2", use_bias=True)
    for command in (["inspect", model, *HEADS], ["prune", model, *HEADS, "--dry-run"]):
        shown = run_cli(*command)
        assert shown.code == 0 and "Where it runs" in shown.stdout, shown.stderr
        runtimes = {fit["runtime"]: fit for fit in json.loads(run_cli(*command, "--json").stdout)["runtimes"]}
        assert runtimes["transformers"]["loads"] and not runtimes["llama.cpp"]["loads"]
        assert "not the hidden size 64" in runtimes["llama.cpp"]["note"]
    whole = json.loads(run_cli("inspect", model, "--json").stdout)["runtimes"]
    assert {fit["runtime"]: fit["loads"] for fit in whole}["llama.cpp"]


def test_runtimes_outside_are_named_where_they_stumble(make_tiny: Callable[..., Path]) -> None:
    model = make_tiny("llama")
    notes = {}
    for options in ([], list(HEADS)):
        document = json.loads(run_cli("inspect", model, *options, "--json").stdout)
        notes[bool(options)] = {fit["runtime"]: (fit["loads"], fit["note"]) for fit in document["runtimes"]}
    assert "CTranslate2" not in notes[False] and not notes[True]["CTranslate2"][0]
    assert notes[True]["llama.cpp"] == (True, "")


@pytest.mark.parametrize("family", ["gemma3_text", "cohere2", "qwen3_next"])
def test_a_runtime_that_places_every_nth_layer_is_named_where_none_fits(
    family: str, tiny_of: Callable[[str], Path]
) -> None:
    def fits(*dropped: str) -> dict[str, Any]:
        document = json.loads(run_cli("inspect", tiny_of(family), *dropped, "--json").stdout)
        return {fit["runtime"]: fit for fit in document["runtimes"]}

    assert "mlx-lm" not in fits()
    fit = fits("--drop-layers", "2")["mlx-lm"]
    assert not fit["loads"] and ("sliding_window_pattern" in fit["note"] or "full_attention_interval" in fit["note"])
