"""The quality table: which rows it has, what it makes of their figures, and that finished ones are not run again."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tools.bench.quality import axis_row, count_parameters, optipfair_row, rival_rows, width_options
from tools.bench.quality_runs import Bench, Outcome, Row, run_row
from tools.bench.quality_verdicts import DENSE, OURS, PYTHON_DOCS, QUARTER, ROWS, TARGETS, WIKITEXT2, judge

SMOLLM2 = {
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "head_dim": 64,
    "vocab_size": 49152,
}
EVERY = tuple(range(30))
GOOD = {f"{target} {OURS}": perplexity for target, perplexity in zip(TARGETS, (50.0, 100.0, 500.0), strict=True)}


def chosen(layers: tuple[int, ...] = EVERY, **sizes: int) -> Outcome:
    """What ours might choose."""
    widths = {**SMOLLM2, **sizes, "num_hidden_layers": len(layers)}
    return Outcome("85% ours", count_parameters(widths), {}, 1.0, widths, layers, "range", "residual")


def full_table() -> dict[str, Outcome]:
    """Every line holds."""
    figures = dict.fromkeys(ROWS, 1000.0) | {DENSE: 34.55, QUARTER: 51.0} | GOOD
    return {n: Outcome(n, 1, {WIKITEXT2: v, PYTHON_DOCS: v / 2}, seconds=10.0) for n, v in figures.items()}


def failing(outcomes: dict[str, Outcome]) -> list[str]:
    """The lines that do not hold."""
    return [verdict.text for verdict in judge(outcomes) if not verdict.holds]


@pytest.mark.parametrize("sizes", [{}, {"num_attention_heads": 3, "num_key_value_heads": 1}, {"hidden_size": 288}])
def test_parameters_are_counted_as_stock_llama_counts_them(sizes: dict[str, int]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    widths = {**SMOLLM2, "num_hidden_layers": 2, **sizes}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", tie_word_embeddings=True, **widths))
    assert model.num_parameters() == count_parameters(widths)


def test_rivals_get_exactly_the_widths_and_layers_that_ours_chose() -> None:
    ours = chosen(EVERY[:12] + EVERY[15:], intermediate_size=1280, num_attention_heads=6, num_key_value_heads=2)
    assert width_options(SMOLLM2, ours.widths or {}, ours.layers) == (
        *("--num-attention-heads", "6", "--num-key-value-heads", "2", "--intermediate-size", "1280"),
        *("--drop-layers", "12,13,14"),
    )
    assert width_options(SMOLLM2, SMOLLM2, EVERY) == ()
    for row in rival_rows("85%", SMOLLM2, ours, 8):
        assert row.parameters == ours.parameters
        assert all("4096" in command for command in row.commands)  # tokens, the same for all


def test_optipfair_prunes_the_mlp_of_what_is_left_when_more_than_the_mlp_goes() -> None:
    alone = optipfair_row("85%", SMOLLM2, chosen(intermediate_size=1152), 8)
    assert [command[:4] for command in alone.commands] == [("optipfair", "MODEL", "OUTPUT", "1152")]
    first, then = optipfair_row("85%", SMOLLM2, chosen(EVERY[:28], intermediate_size=1280), 8).commands
    assert "--drop-layers" in first and "--intermediate-size" not in first and first[-2] == "STAGE"
    assert then[:4] == ("optipfair", "STAGE", "OUTPUT", "1280")
    untouched = optipfair_row("85%", SMOLLM2, chosen(EVERY[:24]), 8)
    assert not untouched.commands and "nothing to choose" in untouched.note


@pytest.mark.parametrize(
    ("name", "option"),
    [("MLP only", "--intermediate-size"), ("layers only", "--layers"), ("hidden size only", "--hidden-size")],
)
def test_a_single_axis_is_the_widest_that_leaves_no_more_than_ours(name: str, option: str) -> None:
    ours = chosen(EVERY[:28], intermediate_size=1280)
    row = axis_row("85%", name, SMOLLM2, ours, 8)
    (command,) = row.commands
    size = int(command[command.index(option) + 1])
    width = option[2:].replace("-", "_") if option != "--layers" else "num_hidden_layers"
    step = 9 if option == "--hidden-size" else 1
    assert count_parameters({**SMOLLM2, width: size}) == row.parameters
    assert (row.parameters or 0) <= ours.parameters < count_parameters({**SMOLLM2, width: size + step})
    assert size % step == 0 and command[5:9] == ("--importance", "range", "--refit", "residual")


def test_an_axis_that_cannot_reach_the_target_says_so_and_one_that_ours_took_is_not_run_again() -> None:
    row = axis_row("85%", "KV groups only", SMOLLM2, chosen(EVERY[:24]), 8)
    assert not row.commands and "out of reach: the least is 116,820,288 parameters" in row.note
    assert axis_row("85%", "layers only", SMOLLM2, chosen(EVERY[:24]), 8).note == "the same widths as 85% ours"
    assert axis_row("85%", "MLP only", SMOLLM2, chosen(intermediate_size=1152), 8).note == "the same widths as 85% ours"


def test_a_table_in_which_ours_is_best_holds() -> None:
    assert failing(full_table()) == []


@pytest.mark.parametrize(
    ("name", "change", "lines"),
    [
        (QUARTER, 52.5, ["1."]),
        ("85% ours", 53.0, ["2. 85%: 1.534"]),
        ("85% ours", 101.0, ["2. monotone", "2. 85%"]),
        ("70% layers only", 99.0, ["2. 70%: 100.00 ≤ 99.00 of the best single axis (layers only)"]),
        ("50% optipfair", 400.0, ["3. 50%, ours is first on wikitext2: optipfair 400.00 < ours 500.00 <", "4. 50%"]),
    ],
)
def test_a_figure_on_the_wrong_side_fails_its_lines_and_no_other(name: str, change: float, lines: list[str]) -> None:
    table = full_table()
    table[name] = replace(table[name], perplexity={WIKITEXT2: change, PYTHON_DOCS: change / 2})
    found = failing(table)
    assert len(found) == len(lines) and all(text.startswith(line) for text, line in zip(found, lines, strict=True))


def test_a_row_that_failed_or_is_missing_fails_its_lines_and_one_out_of_reach_does_not() -> None:
    table = full_table()
    table["85% taylor"] = Outcome("85% taylor", error="no such importance")
    del table["70% MLP only"]
    table["50% KV groups only"] = Outcome("50% KV groups only", note="out of reach")
    assert [text[:6] for text in failing(table)] == ["2. 70%", "3. 85%", "4. 85%", "4. all"]
    assert "not measured: taylor" in failing(table)[1]


def test_another_order_on_the_second_corpus_is_pointed_out_and_slowness_fails() -> None:
    table = full_table()
    table["85% random"] = replace(table["85% random"], perplexity={WIKITEXT2: 1000.0, PYTHON_DOCS: 499.0}, seconds=4e3)
    assert [v.text[:6] for v in judge(table) if "another order" in v.text] == ["4. 85%"]
    assert [text[:22] for text in failing(table)] == ["4. all rows take 72.3 "]


def test_a_finished_row_is_read_back_until_what_it_depends_on_changes(tiny_llama: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    windows = torch.arange(3, 35).view(2, 16)
    bench = Bench.over(model, tmp_path / "work", {WIKITEXT2: windows, PYTHON_DOCS: windows + 9})
    first = run_row(Row("dense"), bench)
    assert first.perplexity is not None and first.perplexity[WIKITEXT2] != first.perplexity[PYTHON_DOCS]
    for shard in model.glob("*.safetensors"):
        shard.unlink()
    assert run_row(Row("dense"), bench) == first
    other = Bench.over(model, bench.work, bench.texts)
    assert run_row(Row("dense"), other).error and run_row(Row("dense", parameters=1), bench).error
    assert run_row(Row("dense"), bench) == first  # what failed is not kept
    (kept,) = bench.work.iterdir()
    assert json.loads(kept.read_text())["outcome"]["name"] == "dense"


def test_a_command_that_fails_gives_its_message_and_leaves_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    bench = Bench.over(tiny_llama, tmp_path / "work", {})
    outcome = run_row(Row("odd", (("llmprune", "prune", "MODEL", "--importance", "odd", "--output", "OUTPUT"),)), bench)
    assert "'odd'" in outcome.error and outcome.perplexity is None and not list(bench.work.iterdir())
