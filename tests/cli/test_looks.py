"""What is shown: in a terminal of 80 columns, in a pipe, quietly and at length."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import select
import shutil
import struct
import tempfile
import termios
from pathlib import Path

import pytest
from rich.console import Console

from llmprune_cli.cli.screen.progress import Lines, in_words
from llmprune_cli.cli.screen.table_parts import count_text, folded
from llmprune_cli.progress import Listener
from support.cli import BY_CHANCE, run_cli
from support.started import start
from support.tiny import save_tiny

COLUMNS = 80
COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
CALIBRATED = ("--calibration-tokens", "160", "--calibration-seq-len", "40", "--importance", "range")


def in_terminal(*words: str | Path) -> str:
    """What a command shows in a terminal of 80 columns."""
    mine, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched:
        for name in ("COLUMNS", "LINES", "NO_COLOR"):
            patched.delenv(name, raising=False)
        patched.setenv("TERM", "xterm-256color")
        errors, shown = Path(folder, "errors"), b""
        process = start(*words, said=Path(os.ttyname(its)), errors=errors)
        while process.is_alive() or select.select([mine], [], [], 0)[0]:
            if select.select([mine], [], [], 0.1)[0]:
                shown += os.read(mine, 65536)
        assert process.exitcode == 0, errors.read_text()
    os.close(its)
    os.close(mine)
    return COLOURS.sub("", shown.decode()).replace("\r\n", "\n")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the configuration of a model with long names and large numbers, and no weights."""
    folder = tmp_path_factory.mktemp("wide") / "a-model-whose-name-goes-on-and-on"
    save_tiny(folder, "qwen2_moe", num_hidden_layers=4, moe_intermediate_size=16, shared_expert_intermediate_size=24)
    settings = json.loads((folder / "config.json").read_text())
    large = {"hidden_size": 2048, "intermediate_size": 5632, "vocab_size": 151936, "num_hidden_layers": 24}
    layers = {"layer_types": ["full_attention"] * 24, "max_window_layers": 21}
    (folder / "config.json").write_text(json.dumps({**settings, **large, **layers}))
    for shard in folder.glob("*.safetensors*"):
        shard.unlink()
    return folder


def test_inspect_fits_into_80_columns_without_cutting_anything(wide: Path) -> None:
    shown = in_terminal("inspect", wide, "--intermediate-pruning-ratio", "25%")
    lines = shown.splitlines()
    assert max(map(len, lines)) <= COLUMNS and "…" not in shown.replace("4, 5, … 60", "")
    for whole in ("151936 × 2048", "query heads", "mlp.", "shared_expert.", "gate_proj.weight", "input_layernorm."):
        assert whole in shown, shown


def test_prune_ends_with_at_most_15_lines(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    asked = ("--pruning-ratio", "50%", "--drop-layers", "0", *CALIBRATED, "--calibration", text_file)
    judged = ("--eval", "--dataset", text_file, "--max-seq-len", "64", "--limit", "2")
    shutil.copytree(tiny_llama, tmp_path / "model")
    shown = in_terminal("prune", tmp_path / "model", *asked, *judged, "--output", tmp_path / "out")
    lines = [line for line in shown.splitlines() if not line.startswith("  llmprune") and str(tmp_path) not in line]
    assert max(map(len, lines)) <= COLUMNS and "…" not in shown and len(shown.splitlines()) <= 15, shown
    for said in ("parameters", "51.5k", "size", "perplexity", "KL ", "Layers 2 → 1: 0 went.", "tokens of corpus.txt"):
        assert said in shown, shown
    for command in ("llmprune eval", "llmprune recover", "llmprune push"):
        assert f"  {command} " in shown
    assert "Modules" not in shown and "Where it runs" not in shown


def test_verbose_shows_all_tables_and_quiet_no_progress(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    asked = ("--intermediate-size", "24", "--calibration", text_file, *CALIBRATED)
    loud = run_cli("prune", tiny_llama, *asked, "--output", tmp_path / "loud", "-v")
    assert all(title in loud.stdout for title in ("Modules", "Where it runs", "Layers", "Held-out text"))
    assert max(map(len, loud.stdout.splitlines())) <= max(COLUMNS, len(str(tmp_path)) * 2 + COLUMNS)
    assert [line for line in loud.stderr.splitlines() if line in ("Measuring activity", "Writing")]
    quiet = run_cli("prune", tiny_llama, *asked, "--output", tmp_path / "quiet", "-q")
    assert quiet.code == 0 and quiet.stderr == "" and "Modules" not in quiet.stdout


def test_without_a_terminal_a_stage_is_a_line_and_so_is_each_tenth_or_minute() -> None:
    shown, now = io.StringIO(), 0.0
    listener = Listener(Lines(Console(file=shown), lambda: now).tell)
    listener.stage("Refitting", 30)
    for _ in range(30):
        now += 10
        listener.advance(1)
    listener.stage("Writing", 5 * 10**9)
    for _ in range(4):
        now += 61
        listener.advance(10**8)
    listener.stage("Judging", 100)
    for _ in range(100):
        listener.advance(1)
    lines = shown.getvalue().splitlines()
    assert lines[0] == "Refitting" and lines[1] == "Refitting: 3 of 30 (10%), 30 s, about 4 min left"
    assert lines[10] == "Refitting: 30 of 30 (100%), 5 min" and lines[11] == "Writing"
    assert lines[12] == "Writing: 2%, 61 s, about 50 min left" and len(lines) == 17 and lines[-1] == "Judging"


def test_a_dry_run_ends_with_the_command_that_goes_on_from_it(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = ("--calibration", text_file, *CALIBRATED)
    dry = run_cli("prune", tiny_llama, "--target-params", "80%", *text, "--dry-run", "--json")
    shown = run_cli("prune", tiny_llama, "--target-params", "80%", *text, "--dry-run")
    (command,) = [line.strip() for line in shown.stdout.splitlines() if line.startswith("  llmprune prune")]
    assert "--target-params" not in command and "Dry run" in shown.stdout
    assert "--statistics " in command
    done = run_cli(*command.split()[1:], "--json")
    assert done.code == 0 and "Measuring" not in done.stderr, done.stderr  # that was kept
    assert json.loads(done.stdout)["after"]["widths"] == json.loads(dry.stdout)["after"]["widths"]
    named = run_cli("prune", tiny_llama, "--layers", "1", *text, "--dry-run")
    assert re.search("Layers 2 → 1: [01] go", named.stdout) and "--statistics" in named.stdout
    (tmp_path / "bare").mkdir()
    shutil.copy(tiny_llama / "config.json", "bare")
    undecided = run_cli("prune", "bare", "--layers", "1", *text, "--dry-run")
    assert "Layers 2 → 1: which go is measured on text" in undecided.stdout
    planned = run_cli("prune", tiny_llama, "--layers", "1", *BY_CHANCE, "--dry-run", "--save-plan", "plan.json")
    assert "--plan plan.json --output pruned" in planned.stdout and "--layers" not in planned.stdout.split("go on")[1]


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0"), (999, "999"), (1500, "1.5k"), (28_311_552, "28.3M"), (999_600, "1M"), (8.03e9, "8.03B")],
)
def test_numbers_of_parameters_are_short(count: float, shown: str) -> None:
    assert count_text(count) == shown


def test_names_are_folded_where_their_parts_end() -> None:
    name = "model.layers.{}.mlp.shared_expert.gate_proj.weight"
    lines = folded(name, 24).splitlines()
    assert "".join(line.strip() for line in lines) == name and max(map(len, lines)) <= 24
    assert all(line.endswith((".", "weight")) for line in lines)


@pytest.mark.parametrize(("seconds", "shown"), [(0.4, "0 s"), (99, "99 s"), (150, "2 min"), (7500, "2 h 5 min")])
def test_times_are_short(seconds: float, shown: str) -> None:
    assert in_words(seconds) == shown
