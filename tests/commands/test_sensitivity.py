"""What a part of a layer is worth: what the model without it loses, shown, kept, and used by a later prune."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import llmprune_cli
from llmprune_cli.choose.layers.sensitivity import measure_sensitivity, reduced_targets
from llmprune_cli.choose.selection import make_random_plan
from llmprune_cli.cli.screen.sensitivity import print_sensitivity
from llmprune_cli.coupling.subject import understand
from llmprune_cli.coupling.trace import Instance
from llmprune_cli.options import ModelReference
from llmprune_cli.plan.document import Plan
from llmprune_cli.progress import QUIET
from llmprune_cli.report.schemas import DOCUMENTS, adapter_of
from llmprune_cli.run.layered_model import LayeredModel
from llmprune_cli.source.opening import open_checkpoint
from support.cli import CALIBRATED, Run, run_cli
from support.full import in_full
from support.opened import Opened
from support.stock import load_stock
from support.tiny import save_tiny
from tools.schemas import schema_of

COLUMNS = 80
MEASURING = ("Measuring activity", "Measuring gradients", "Leaving out parts of each layer")
TOKENS = torch.randint(3, 90, (4, 24), generator=torch.Generator().manual_seed(1))


def divergence(whole: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL(whole ‖ other) of the tokens that have one before them, of logits [N, T, V]."""
    first, second = (logits[:, :-1].double().log_softmax(-1) for logits in (whole, other))
    return float((first.exp() * (first - second)).sum(-1).mean())


def without_inputs(weight: torch.nn.Parameter, kept: tuple[int, ...], size: int) -> torch.Tensor:
    """A weight with zeros for the units of so many inputs that are not kept."""
    stays = torch.zeros(weight.shape[1] // size, dtype=torch.bool)
    stays[list(kept)] = True
    return weight.detach() * stays.repeat_interleave(size)


@pytest.mark.parametrize("opened", ["llama"], indirect=True)
def test_what_a_part_of_a_layer_costs_is_what_the_stock_model_loses_without_it(opened: Opened, tmp_path: Path) -> None:
    targets = reduced_targets(opened.subject)
    plans = {width: make_random_plan(opened.subject, own, QUIET) for width, own in targets.items()}
    with torch.inference_mode():
        rows = measure_sensitivity(opened.layered, plans, opened.tokens, tmp_path, lambda n: None)
    found = {row.width: row for row in rows}
    assert [*found] == ["intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers"]
    assert [(row.removed, row.units) for row in rows] == [(12, 48), (2, 8), (1, 2), (1, 1)]
    inner = opened.model.model.layers[0]
    assert found["num_hidden_layers"].parameters == sum(p.numel() for p in inner.parameters())
    reads = (("intermediate_size", "mlp.down_proj", 1), ("num_attention_heads", "self_attn.o_proj", 8))
    reads += (("num_key_value_heads", "self_attn.o_proj", 8),)
    with torch.no_grad():
        whole = opened.model(opened.tokens, use_cache=False).logits
        for number, layer in enumerate(opened.model.model.layers):
            for width, name, size in reads:
                reader, units = layer.get_submodule(name), width.replace("key_value", "attention")
                original = reader.weight.data
                reader.weight.data = without_inputs(reader.weight, plans[width].keep[units][Instance(number)], size)
                lost = divergence(whole, opened.model(opened.tokens, use_cache=False).logits)
                assert found[width].kl[number] == pytest.approx(lost, rel=1e-3, abs=1e-6) and lost > 1e-4
                reader.weight.data = original
            forward = layer.forward
            layer.forward = lambda hidden, *args, **kwargs: hidden
            lost = divergence(whole, opened.model(opened.tokens, use_cache=False).logits)
            assert found["num_hidden_layers"].kl[number] == pytest.approx(lost, rel=1e-3)
            layer.forward = forward


@in_full
def test_where_a_model_has_one_layer_it_is_what_pruning_it_costs(tmp_path: Path) -> None:
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": []}
    model = save_tiny(
        tmp_path / "model", "qwen3_moe", num_hidden_layers=1, head_dim=16, initializer_range=0.15, **experts
    )
    with open_checkpoint(ModelReference(str(model)), need_weights=True) as checkpoint:
        subject = understand(checkpoint)
        targets = reduced_targets(subject)
        plans = {width: make_random_plan(subject, own, QUIET) for width, own in targets.items()}
        with torch.inference_mode():
            rows = measure_sensitivity(LayeredModel(subject, "cpu"), plans, TOKENS, tmp_path, lambda n: None)
    assert {row.width for row in rows} >= {"moe_intermediate_size", "num_experts", "num_key_value_heads"}
    whole, parameters = load_stock(model), 0
    for row in rows[:-1]:
        plan = tmp_path / f"{row.width}.json"
        Plan.save(plans[row.width], plan)
        pruned = tmp_path / row.width
        run = run_cli("prune", model, "--plan", plan, "--refit", "none", "--output", pruned)
        assert run.code == 0, run.stderr
        stock = load_stock(pruned)
        with torch.no_grad():
            lost = divergence(whole(TOKENS).logits, stock(TOKENS).logits)
        parameters = sum(p.numel() for p in whole.parameters()) - sum(p.numel() for p in stock.parameters())
        assert (row.kl, row.parameters) == ((pytest.approx(lost, rel=1e-3),), parameters) and lost > 1e-4
    assert parameters


@in_full
def test_a_layer_without_units_of_a_kind_has_no_figure(tmp_path: Path, text_file: Path) -> None:
    settings = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "mlp_only_layers": [1]}
    model = save_tiny(tmp_path / "model", "qwen3_moe", head_dim=16, **settings)
    report = llmprune_cli.inspect(
        model, sensitivity=True, calibration=str(text_file), calibration_tokens=160, calibration_seq_len=40
    )
    known = {row.width: [kl is not None for kl in row.kl] for row in report.widths}
    assert known["intermediate_size"] == [False, True] and known["num_experts"] == [True, False]
    assert known["num_attention_heads"] == known["num_hidden_layers"] == [True, True]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("deep") / "model", num_hidden_layers=4, initializer_range=0.15)


@pytest.fixture(scope="module")
def words(model: Path, text_file: Path) -> tuple[str | Path, ...]:
    return "inspect", model, "--sensitivity", "--calibration", text_file, *CALIBRATED


@pytest.fixture(scope="module")
def measured(words: tuple[str | Path, ...], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """A folder with a picture and what was measured, and the run that made them."""
    folder = tmp_path_factory.mktemp("measured")
    run = run_cli(*words, "--statistics", folder / "kept", "--report", folder / "layers.svg", "--json")
    assert run.code == 0, run.stderr
    return folder, run


def test_it_is_shown_as_a_document_and_as_a_picture(measured: tuple[Path, Run]) -> None:
    folder, run = measured
    result: dict[str, Any] = json.loads(run.stdout)
    adapter_of(DOCUMENTS["inspect-sensitivity"]).validate_json(run.stdout, strict=True)
    assert result.keys() == schema_of("inspect-sensitivity")["properties"].keys()
    assert all(len(row["kl"]) == 4 and min(row["kl"]) > 0 for row in result["widths"])
    assert len(result["influence"]) == 4 and result["tokens"] == 600 and result["importance"] == "consensus"
    assert result["held_out_tokens"] == 39 and result["statistics"] == str(folder / "kept")
    assert all(stage in run.stderr for stage in MEASURING)
    drawn = (folder / "layers.svg").read_text()
    assert all(said in drawn for said in ("12 of 48", "MLP neurons", "KV groups", "the whole layer", "KL divergence"))


def test_what_was_measured_is_not_measured_again(words: tuple[str | Path, ...], measured: tuple[Path, Run]) -> None:
    folder, first = measured
    again = run_cli(*words, "--statistics", folder / "kept", "--json")
    assert not any(stage in again.stderr for stage in MEASURING)
    assert json.loads(again.stdout)["widths"] == json.loads(first.stdout)["widths"]


def test_a_later_prune_measures_nothing_again(
    model: Path, text_file: Path, measured: tuple[Path, Run], tmp_path: Path
) -> None:
    folder, first = measured
    influence, plan = json.loads(first.stdout)["influence"], tmp_path / "plan.json"
    asked = ("--mlp", "25%", "--layers", "3", "--calibration", text_file, *CALIBRATED, "--save-plan", plan)
    run = run_cli("prune", model, *asked, "--statistics", folder / "kept")
    assert run.code == 0 and "Measuring" not in run.stderr, run.stderr
    least = min(range(4), key=influence.__getitem__)
    assert Plan.load(plan).layers == tuple(number for number in range(4) if number != least)


@in_full
def test_the_commands_that_come_next_find_what_was_measured(
    words: tuple[str | Path, ...], measured: tuple[Path, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = run_cli(*words, "--statistics", measured[0] / "kept")
    lines = [line.strip() for line in shown.stdout.splitlines() if line.startswith("  llmprune prune")]
    other = run_cli(*words, "--statistics", measured[0] / "kept", "--importance", "magnitude", "--json")
    assert MEASURING[2] in other.stderr and MEASURING[0] not in other.stderr, "other units go"
    assert json.loads(other.stdout)["influence"] is None
    assert len(lines) == 2
    monkeypatch.chdir(tmp_path)
    for line in lines:
        run = run_cli(*shlex.split(line)[1:], "--json")
        assert run.code == 0 and "Measuring" not in run.stderr, run.stderr
        result = json.loads(run.stdout)
        assert result["dropped_layers"] or result["after"]["parameters"] < result["before"]["parameters"]


def test_the_table_fits_into_80_columns(measured: tuple[Path, Run], capsys: pytest.CaptureFixture[str]) -> None:
    result = adapter_of(DOCUMENTS["inspect-sensitivity"]).validate_json(measured[1].stdout)
    print_sensitivity(result, "model")
    shown = capsys.readouterr().out
    cheapest = sorted(range(4), key=result.widths[-1].kl.__getitem__)[:2]
    assert f"cost least: {cheapest[0]} (" in shown
    assert f"--drop-layers {min(cheapest)}" in shown
    kinds = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "num_experts")
    row = replace(result.widths[0], units=53_248, removed=13_312, kl=(1e9, 12.5, None, 0.0), parameters=10**9)
    many = (*(replace(row, width=kind) for kind in kinds), *result.widths[1:])
    print_sensitivity(replace(result, widths=many, model="model", dataset="text"), "model")
    wide = [line for line in capsys.readouterr().out.splitlines() if "llmprune prune" not in line]
    assert max(map(len, wide)) <= COLUMNS, "\n".join(wide)
    assert not any("…" in line for line in wide)


@in_full
def test_layers_that_a_dry_run_names_are_those_that_go(
    model: Path, text_file: Path, measured: tuple[Path, Run], tmp_path: Path
) -> None:
    text = ("--calibration", text_file, *CALIBRATED, "--statistics", measured[0] / "kept")
    influence = json.loads(measured[1].stdout)["influence"]
    expected = sorted(sorted(range(4), key=influence.__getitem__)[:2])
    dry = run_cli("prune", model, "--layers", "2", *text, "--dry-run", "--json")
    assert "Measuring" not in dry.stderr and json.loads(dry.stdout)["dropped_layers"] == expected
    done = run_cli("prune", model, "--layers", "2", *text, "--output", tmp_path / "out")
    named = ", ".join(map(str, expected)) if expected[1] > expected[0] + 1 else f"{expected[0]}-{expected[1]}"
    assert f"Layers 4 → 2: {named} went." in done.stdout
