"""Calibration text: used by default, missed with a warning, refused when it is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.cli import BY_MAGNITUDE, CALIBRATED, run_cli
from support.tiny import save_tiny


def test_widths_alone_are_pruned_by_what_works(tiny_llama: Path, tmp_path: Path, text_file: Path) -> None:
    widths = ("--intermediate-size", "24", "--output", tmp_path / "out", "--json")
    run = run_cli("prune", tiny_llama, *widths, "--calibration", text_file, *CALIBRATED)
    result = json.loads(run.stdout)
    assert (result["importance"], result["refit"]) == ("consensus", "residual") and result["calibration"]["layers"]


@pytest.mark.parametrize("fault", ["no tokenizer", "another model's tokenizer"])
def test_without_usable_text_units_go_by_magnitude_with_a_warning(fault: str, tmp_path: Path, text_file: Path) -> None:
    source = save_tiny(tmp_path / "model", vocab_size=96 if fault == "no tokenizer" else 80)
    if fault == "no tokenizer":
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (source / name).unlink()
    widths = ("--intermediate-size", "24")
    run = run_cli("prune", source, *widths, "--output", tmp_path / "open", "--json")
    assert run.code == 0 and "Warning" in run.stderr and "by magnitude" in run.stderr
    result = json.loads(run.stdout)
    assert (result["importance"], result["refit"]) == ("magnitude", "none") and result["calibration"] is None
    assert run_cli("prune", source, *widths, *BY_MAGNITUDE, "--output", tmp_path / "asked").code == 0
    first, second = (sorted((tmp_path / name).glob("*.safetensors")) for name in ("open", "asked"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    for asked in (("--refit", "residual"), ("--importance", "range"), ("--calibration", text_file)):
        refused = run_cli("prune", source, *widths, *asked, "--output", tmp_path / "refused")
        assert refused.code == 3 and "tokenizer" in refused.stderr and not (tmp_path / "refused").exists()
    evaluated = run_cli("eval", source, "--dataset", text_file, "--max-seq-len", "32")
    assert evaluated.code == 3 and "tokenizer" in evaluated.stderr


@pytest.mark.parametrize(
    ("options", "code", "word"),
    [
        (["--target-params", "many"], 2, "6B"),
        (["--target-params", "150%"], 2, "whole model"),
        (["--target-params", "0"], 2, "number"),
        (["--target-params", "80%", "--target-size", "1GB"], 2, "one of them"),
        (["--target-params", "80%", "--pruning-ratio", "0.5"], 2, "width options"),
        (["--pruning-ratio", "0.5", "--layer-importance", "loss"], 2, "--layers N"),
        (["--target-params", "2%"], 5, "least"),
        (["--pruning-ratio", "0.5", "--refit", "local", "--calibration", "absent.txt"], 3, "absent.txt"),
        (["--pruning-ratio", "0.5", "--refit", "local", "--calibration", "short.txt"], 3, "short.txt"),
    ],
)
def test_calibration_mistakes_are_refused(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], code: int, word: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("too short")
    run = run_cli("prune", tiny_llama, *options, "--output", "out", "--calibration-seq-len", "40")
    assert run.code == code and word in run.stderr and "Traceback" not in run.stderr, run.stderr
    assert not Path("out").exists()


def test_the_same_seed_gives_the_same_bytes(tiny_llama: Path, tmp_path: Path, text_file: Path) -> None:
    options = ("--intermediate-size", "24", "--importance", "range", "--refit", "residual", "--calibration", text_file)
    for name in ("a", "b"):
        assert run_cli("prune", tiny_llama, *options, *CALIBRATED, "--output", tmp_path / name).code == 0
    first, second = (sorted((tmp_path / name).glob("*.safetensors")) for name in ("a", "b"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
