"""Matrix products in half precision, around norms and sums in float32."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmprune_cli.choose.gradients import measure_gradients
from llmprune_cli.coupling.products import Product
from llmprune_cli.run.precision import native_dtype
from llmprune_cli.run.states import DenseStates
from support import families
from support.cli import CALIBRATED, run_cli
from support.full import examples
from support.opened import Opened
from support.tiny import save_tiny


@pytest.mark.parametrize("opened", families.TRIED, indirect=True)
def test_layers_in_bfloat16_follow_the_stock_model(opened: Opened) -> None:
    half = replace(opened.layered, compute=torch.bfloat16)
    with torch.inference_mode():
        *_, (whole, _) = opened.layered.walk(opened.tokens)
        whole = whole.clone()
        *_, (states, _) = half.walk(opened.tokens)
    assert states.dtype == torch.float32
    gap = float((states - whole).norm() / whole.norm())
    assert 0 < gap < 0.2  # a state space amplifies what is rounded, the others stay below 0.03


@pytest.mark.parametrize("opened", families.TRIED_SLOWLY, indirect=True)
def test_gradients_in_bfloat16_rank_units_alike(opened: Opened, tmp_path: Path) -> None:
    half = replace(opened.layered, compute=torch.bfloat16)
    whole = measure_gradients(opened.layered, opened.tokens, DenseStates(tmp_path), lambda n: None).scores
    found = measure_gradients(half, opened.tokens, DenseStates(tmp_path), lambda n: None).scores
    assert [*found] == [*whole]
    for width, by in whole.items():
        several = [instance for instance, scores in by.items() if len(scores) > 2]
        if not several:
            continue
        sides = [torch.cat([own[n] / own[n].mean() for n in several]) for own in (by, found[width])]
        if float(sides[0].std()) > 0.05:
            assert float(torch.corrcoef(torch.stack(sides))[0, 1]) > 0.8, width


@pytest.mark.parametrize("opened", ["llama"], indirect=True)
def test_what_is_multiplied_is_bfloat16_and_what_is_added_up_float32(opened: Opened) -> None:
    layer = replace(opened.layered, compute=torch.bfloat16).load_layer(0)
    kinds = {name.removeprefix(layer.prefix): parameter.dtype for name, parameter in layer.block.named_parameters()}
    assert kinds["mlp.up_proj.weight"] == torch.bfloat16 and kinds["input_layernorm.weight"] == torch.float32
    results: list[torch.dtype] = []

    def watch(seen: Product) -> None:
        results.append(seen.result.dtype)

    with torch.inference_mode():
        output = layer.run(torch.randn(1, 5, 64), watch)
    assert output is not None and output.dtype == torch.float32 and {*results} == {torch.bfloat16}


@pytest.mark.parametrize("family", examples(["llama", "qwen3_moe", "jamba", "gpt2"], ["gpt2"]))
def test_a_calibrated_prune_in_bfloat16_is_as_good(family: str, tiny_of, text_file: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    cards = {}
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / dtype
        run = run_cli(
            *("prune", tiny_of(family), "--intermediate-pruning-ratio", "0.5", "--output", out, "--json"),
            *("--calibration", text_file, *CALIBRATED, "--compute-dtype", dtype),
        )
        assert run.code == 0, run.stderr
        cards[dtype] = json.loads(run.stdout)["calibration"]
        manifest = json.loads((out / "llmprune.json").read_text())
        assert manifest["options"]["compute_dtype"] == dtype
    ratio = cards["bfloat16"]["perplexity_after"] / cards["float32"]["perplexity_after"]
    assert 0.95 < ratio < 1.05


def test_candidates_of_a_target_are_as_good_in_bfloat16(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    asked = ("prune", tiny_llama, "--target-params", "80%", "--calibration", text_file, *CALIBRATED, "--json")
    found = {}
    for dtype in ("float32", "bfloat16"):
        run = run_cli(*asked, "--output", tmp_path / dtype, "--compute-dtype", dtype)
        assert run.code == 0, run.stderr
        found[dtype] = json.loads(run.stdout)["candidates"]
    assert len(found["float32"]) == len(found["bfloat16"])
    best = [own[0]["kl"] for own in found.values()]
    assert best[0] == pytest.approx(best[1], rel=0.1)


def test_where_half_precision_is_emulated_it_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for is_there in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda is_there=is_there: is_there)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        chosen = native_dtype(torch.bfloat16, torch.device("cpu"))
        assert chosen == (torch.bfloat16 if is_there else torch.float32)
    assert native_dtype(torch.float16, torch.device("cpu")) == torch.float32
    assert native_dtype(torch.float32, torch.device("cpu")) == torch.float32


@pytest.mark.parametrize("opened", ["llama"], indirect=True)
def test_a_family_that_does_not_run_in_half_precision_is_run_in_float32(
    opened: Opened, monkeypatch: pytest.MonkeyPatch, text_file: Path, tmp_path: Path
) -> None:
    half = replace(opened.layered, compute=torch.bfloat16)
    assert half.runs()
    model = save_tiny(tmp_path / "half", dtype="bfloat16")
    asked = ("--intermediate-pruning-ratio", "0.5", "--calibration", text_file, *CALIBRATED)
    monkeypatch.setattr("llmprune_cli.commands.prune.decision.native_dtype", lambda stored, device: stored)
    used = []
    for name in ("runs", "fails"):
        run = run_cli("prune", model, *asked, "--output", tmp_path / name)
        assert run.code == 0, run.stderr
        used.append(json.loads((tmp_path / name / "llmprune.json").read_text())["options"]["compute_dtype"])
        monkeypatch.setattr("llmprune_cli.run.layer.multiplying_in", failing)
    assert used == ["bfloat16", "float32"]


def failing(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[None]:
    if dtype != torch.float32:
        raise RuntimeError("expected m1 and m2 to have the same dtype")
    return nullcontext()


def test_an_unknown_dtype_is_refused_with_those_that_there_are(tiny_llama: Path, tmp_path: Path) -> None:
    run = run_cli(
        "prune", tiny_llama, "--pruning-ratio", "0.5", "--output", tmp_path / "out", "--compute-dtype", "int8"
    )
    assert run.code == 2 and "bfloat16" in run.stderr
