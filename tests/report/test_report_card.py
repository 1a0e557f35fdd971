"""The report card: errors of layers, speeds, the chart, protected layers, and the warning about shared text."""

from __future__ import annotations

import itertools
import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llmprune_cli.report.report_card import _unprefixed
from llmprune_cli.run.speed import clock
from support.cli import BY_MAGNITUDE, CALIBRATED, run_cli
from support.stock import written_tensors
from support.tiny import save_tiny


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six layers, with weights so large that each matters."""
    return save_tiny(tmp_path_factory.mktemp("deep") / "model", num_hidden_layers=6, initializer_range=0.15)


@pytest.fixture
def calibrated(text_file: Path) -> tuple[str | Path, ...]:
    return ("--importance", "activation", "--refit", "residual", "--calibration", text_file, *CALIBRATED)


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_card_is_drawn_and_its_numbers_are_those_of_the_document(
    deep: Path, calibrated: tuple[str | Path, ...], tmp_path: Path, suffix: str
) -> None:
    pytest.importorskip("matplotlib")
    chart, out = tmp_path / f"card.{suffix}", tmp_path / "out"
    widths = ("--layers", "5", "--intermediate-size", "24")
    run = run_cli("prune", deep, *widths, *calibrated, "--output", out, "--report", chart, "--json")
    assert run.code == 0, run.stderr
    card = json.loads(run.stdout)["calibration"]
    assert [row["layer"] for row in card["layers"]] == json.loads((out / "llmprune.json").read_text())["layers"]
    assert all(0 <= row["refit_error"] <= row["removal_error"] + 1e-9 for row in card["layers"])
    assert all(row["stream_error"] > 0 for row in card["layers"][1:])
    assert card["prefill_tokens_per_second_before"] > 0 and card["prefill_tokens_per_second_after"] > 0
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    if suffix == "png":
        assert chart.read_bytes().startswith(b"\x89PNG")
    else:
        words = " ".join(ET.parse(chart).getroot().itertext())
        assert f"{card['kl']:.3f} nats" in words and "units removed" in words and "shaded: dropped" in words


@pytest.mark.parametrize(("seconds", "spread"), [((1.0,), (0.0, 0.0)), ((1.0, 3.0), (0.3, 1.0))])
def test_speeds_have_a_spread(
    tiny_llama: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    seconds: tuple[float, ...],
    spread: tuple[float, float],
) -> None:
    """Of passes that take these seconds in turns."""
    passes = itertools.chain.from_iterable((0.0, taken) for taken in itertools.cycle(seconds))
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: next(passes)))
    asked = ("--mlp", "25%", "--importance", "range", "--refit", "none", "--calibration", text_file, *CALIBRATED)
    run = run_cli("sweep", tiny_llama, *asked, "--json")
    assert run.code == 0, run.stderr
    result = json.loads(run.stdout)
    found = [point["prefill_spread"] for point in (result["dense"], *result["points"])]
    assert spread[0] <= min(found) <= max(found) <= spread[1]
    shown = run_cli("sweep", tiny_llama, *asked).stdout
    assert f"half of its windows are within ±{max(found):.0%} of it." in shown


@pytest.mark.parametrize(
    ("options", "code", "word"),
    [
        (["--intermediate-size", "24", "--report", "card.pdf"], 2, ".png"),
        ([*BY_MAGNITUDE, "--intermediate-size", "24", "--report", "card.png"], 2, "calibration"),
        (["--intermediate-size", "24", "--refit", "local", "--report", "absent/card.png"], 6, "--report"),
        (["--intermediate-size", "24", "--keep-layers", "0"], 5, "intermediate"),
        (["--layers", "5", "--keep-layers", "9"], 5, "0 to 5"),
        (["--layers", "5", "--keep-layers", "first"], 2, "first"),
        (["--drop-layers", "5", "--keep-layers", "-1"], 5, "5"),
        (["--layers", "2", "--keep-layers", "0,1,2"], 5, "3"),
    ],
)
def test_mistakes_are_refused_before_any_work(
    deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], code: int, word: str
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    run = run_cli("prune", deep, *options, "--output", "out")
    assert run.code == code and word in run.stderr and "Traceback" not in run.stderr, run.stderr
    assert not list(tmp_path.iterdir())


def test_protected_layers_keep_every_bit(deep: Path, calibrated: tuple[str | Path, ...], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = run_cli("prune", deep, "--drop-layers", "0", "--keep-layers", "1,-1", *calibrated, "--output", out, "--json")
    assert run.code == 0, run.stderr
    result = json.loads(run.stdout)
    layers = json.loads((out / "llmprune.json").read_text())["layers"]
    assert layers == [1, 2, 3, 4, 5] and result["protected_layers"] == [1, 5]
    old, new = written_tensors(deep), written_tensors(out)
    same = dict.fromkeys(layers, True)
    for name, tensor in new.items():
        if ".layers." in name:
            number = int(name.split(".")[2])
            source = name.replace(f"layers.{number}.", f"layers.{layers[number]}.")
            same[layers[number]] &= torch.equal(tensor, old[source])
    assert same == {1: True, 2: False, 3: False, 4: False, 5: True}


def test_a_target_drops_only_what_is_not_protected(
    deep: Path, calibrated: tuple[str | Path, ...], tmp_path: Path
) -> None:
    options = ("--target-params", "70%", "--keep-layers", "0,-1", "--dry-run", "--json")
    run = run_cli("prune", deep, *options, *calibrated)
    assert run.code == 0, run.stderr
    result = json.loads(run.stdout)
    before, after = result["before"], result["after"]
    assert after["parameters"] <= 0.7 * before["parameters"]
    changed = {name for name, value in before["widths"].items() if after["widths"][name] != value}
    assert changed == {"num_hidden_layers"} and len(result["candidates"]) == 1
    assert {0, 5} <= set(result["candidates"][0]["layers"])


def test_text_that_is_calibrated_on_and_evaluated_is_pointed_out(
    deep: Path, calibrated: tuple[str | Path, ...], text_file: Path
) -> None:
    evaluated = ("--eval", "--dataset", text_file, "--max-seq-len", "40", "--limit", "2")
    run = run_cli("prune", deep, "--layers", "5", *calibrated, *evaluated)
    assert run.code == 0, run.stderr
    assert "flatters" in run.stderr


@pytest.mark.parametrize("count", ["500", "5000"])
def test_bits_per_byte_are_of_the_letters_of_the_text_even_where_the_model_knows_none(
    tiny_llama: Path, tmp_path: Path, count: str
) -> None:
    """Of two bytes each: with text left to judge by, and with a short one that is judged by what is held out."""
    name = tmp_path / "a.txt"
    name.write_text("é" * 640, encoding="utf-8")
    run = run_cli(
        *("prune", tiny_llama, "--mlp", "50%", "--importance", "activation", "--refit", "none", "--calibration", name),
        *("--calibration-tokens", count, "--calibration-seq-len", "32", "--output", tmp_path / "out", "--json"),
    )
    assert run.code == 0, run.stderr
    card = json.loads(run.stdout)["calibration"]
    for side in ("before", "after"):
        bits = math.log2(card[f"perplexity_{side}"]) / 2
        assert card[f"bits_per_byte_{side}"] == pytest.approx(bits, rel=1e-6)


@pytest.mark.parametrize(("told", "read"), [("the fox", "the fox"), (" the fox", " the fox")])
def test_a_window_is_read_anew_as_it_was_read(told: str, read: str) -> None:
    """A tokenizer that puts a space before every text would make two of the one that a window begins with."""
    assert _unprefixed(" the fox", told) == read
