"""What is shown: in a terminal of 80 columns, in a pipe, quietly and at length."""

from __future__ import annotations

import fcntl
import io
import itertools
import json
import os
import pty
import re
import select
import shutil
import struct
import tempfile
import termios
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from llmprune_cli.cli import evaluate
from llmprune_cli.cli.screen import progress
from llmprune_cli.cli.screen.progress import Lines, in_words, progress_on_stderr
from llmprune_cli.cli.screen.table_parts import count_text, folded
from llmprune_cli.progress import Listener
from support.cli import BY_CHANCE, run_cli, run_process
from support.started import start
from support.tiny import save_tiny

COLUMNS = 80
COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
REACHED = r"[\d,]+ of [\d,]+ \(\d+%\), \d+ (s|min)(, about \d+ (s|min) left)?"  # of a stage
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


def test_prune_ends_with_at_most_15_lines(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_llama, "model")
    shutil.copy(text_file, "corpus.txt")
    asked = ("--pruning-ratio", "50%", "--drop-layers", "0", *CALIBRATED, "--calibration", "corpus.txt")
    judged = ("--eval", "--dataset", "corpus.txt", "--max-seq-len", "64", "--limit", "2")
    shown = in_terminal("prune", "model", *asked, *judged, "--output", "out")
    lines = shown.splitlines()
    assert max(map(len, lines)) <= COLUMNS and "…" not in shown and len(lines) <= 15, shown
    for said in ("parameters", "51.5k", "size", "perplexity", "KL ", "Layers 2 → 1: 0 went.", "tokens of corpus.txt"):
        assert said in shown, shown
    for command in ("llmprune eval", "llmprune recover", "llmprune push"):
        assert f"  {command} " in shown
    assert "Modules" not in shown and "Where it runs" not in shown


def test_commands_that_go_on_keep_the_text_and_the_folder(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    asked = ("prune", tiny_llama, "--mlp", "50%", "--calibration", text_file, *CALIBRATED, "--output", tmp_path / "o")
    planned = in_terminal(*asked, "--dry-run")
    assert f"--output {tmp_path / 'o'}\n" in f"{planned}\n"
    (healed,) = (line for line in in_terminal(*asked).splitlines() if line.startswith("  llmprune recover"))
    assert f"--text {text_file} --tokens 1M" in healed


def test_commands_that_go_on_keep_what_the_first_one_needed(tiny_llama: Path, tmp_path: Path) -> None:
    rows, column = tmp_path / "rows.jsonl", ("--text-column", "title")
    rows.write_text("".join(json.dumps({"title": f"Once upon a time {n} " * 9, "body": "b"}) + "\n" for n in range(40)))
    asked = (
        "prune",
        tiny_llama,
        "--mlp",
        "50%",
        "--calibration",
        rows,
        *column,
        *CALIBRATED,
        "--output",
        tmp_path / "o",
    )
    trust = ("--trust-remote-code", "--device", "cpu")
    planned = run_cli(*asked, *trust, "--overwrite", "--dry-run").stdout.splitlines()[-1]
    assert "--trust-remote-code" in planned and "--overwrite" in planned and "--text-column title" in planned
    shown = {line.split()[1]: line for line in run_cli(*asked, *trust).stdout.splitlines() if "  llmprune " in line}
    assert all("--trust-remote-code" in shown[name] for name in ("eval", "recover")) and "--device cpu" in shown["eval"]
    assert f"--text {rows} --text-column title --tokens 1M" in shown["recover"]


def test_a_plan_is_saved_again_and_what_does_nothing_is_told(tiny_llama: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    for plan in (("--mlp", "50%"), ("--mlp", "25%"), ("--plan", model / "plan.json")):
        asked = ("prune", model, *plan, *BY_CHANCE, "--save-plan", model / "plan.json", "--limit", "3", "--dry-run")
        run = run_cli(*asked)
        assert run.code == 0 and "do nothing without --eval" in run.stderr, run.stderr
    assert json.loads((model / "plan.json").read_text())["after"]["intermediate_size"] == 36


def test_characters_that_the_output_cannot_hold_end_no_run(tiny_llama: Path) -> None:
    run = run_process("inspect", tiny_llama, "--mlp", "50%", env={"PYTHONIOENCODING": "ascii"})
    assert run.code == 0 and "64 ? 48" in run.stdout, run.stderr


MODEL = "a-model-whose-name-goes-on-and-on-until-it-fills-most-of-a-line-of-a-terminal"
TEXT = "a-text-whose-name-goes-on-and-on-until-it-fills-most-of-such-a-line.txt"
HEALING = ("--tokens", "256", "--batch-tokens", "128", "--seq-len", "32")
COMMANDS: dict[str, tuple[str, ...]] = {
    "sweep": ("--mlp", "25%,50%", "--calibration", TEXT, *CALIBRATED, "--refit", "none", "--output", "sizes"),
    "eval": ("pruned", "--dataset", TEXT, "--max-seq-len", "32", "--limit", "4"),
    "recover": ("--teacher", MODEL, "--text", TEXT, *HEALING, "--output", "healed"),
}
NUMBER = r" +[\d,.]+"
ROWS: dict[str, tuple[str, ...]] = {  # of their tables, as regular expressions
    "sweep": (
        rf"unpruned +51\.5k +201 KiB +48{4 * NUMBER}",
        rf"mlp-25% +46\.9k +183 KiB +36{4 * NUMBER}",
        rf"mlp-50% +42\.3k +165 KiB +24{4 * NUMBER}",
    ),
    "eval": (
        rf"a-model-whose-\S* +51\.5k +201\.25 KiB{2 * NUMBER}",
        rf"pruned +42\.3k +165\.25 KiB{NUMBER} +×[\d.]+{2 * NUMBER}",
    ),
    "recover": (
        r" *tokens  KL divergence, nats  perplexity  bits per byte",
        *(rf" *{tokens}{3 * NUMBER}" for tokens in ("0", "256", "written")),
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_tables_of_other_commands_fit_without_cutting_anything_either(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_llama, MODEL)
    shutil.copy(text_file, TEXT)
    assert run_cli("prune", MODEL, "--mlp", "50%", *BY_CHANCE, "--output", "pruned").code == 0
    shown = in_terminal(name, "pruned" if name == "recover" else MODEL, *COMMANDS[name])
    lines = [line.rstrip() for line in shown.splitlines() if not line.startswith("  llmprune")]
    assert max(map(len, lines)) <= COLUMNS and "…" not in shown, shown
    first_column = "".join(line[:16].strip() for line in lines)
    assert shown.count(TEXT) == (2 if name in ("recover", "sweep") else 1), shown
    assert MODEL in (first_column if name == "eval" else shown), shown
    for row in ROWS[name]:
        assert sum(bool(re.fullmatch(row, line)) for line in lines) == 1, f"{row}\n{shown}"


BRACKETS = {  # commands whose models, texts and outputs have names like those of styles
    "inspect": ("inspect", "m[/v2]"),
    "prune": ("prune", "m[/v2]", "--mlp", "50%", *BY_CHANCE, "--output", "out[q4]"),
    "eval": ("eval", "m[/v2]", "pr[old]", "--dataset", "c[bold].txt", "--max-seq-len", "32", "--limit", "2", "-v"),
    "sweep": (
        *("sweep", "m[/v2]", "--mlp", "50%", "--calibration", "c[bold].txt", *CALIBRATED, "--refit", "none"),
        *("--output", "out[q4]"),
    ),
    "recover": (
        *("recover", "pr[old]", "--teacher", "m[/v2]", "--text", "c[bold].txt", "--tokens", "256"),
        *("--batch-tokens", "128", "--seq-len", "32", "--output", "out[q4]"),
    ),
    "export": ("export", "pr[old]", "--output", "out[q4]"),
    "inspect --verify": ("inspect", "pr[old]", "--verify"),
}


def test_names_of_models_are_shown_however_narrow_a_terminal_is(
    tiny_llama: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "new_console", lambda: Console(width=40, markup=False))
    run = run_cli("eval", tiny_llama, tiny_llama, "--dataset", text_file, "--max-seq-len", "32", "--limit", "2")
    assert run.stdout.count("model") == 3 and "…" not in run.stdout, run.stdout
    assert max(map(len, run.stdout.splitlines()[1:])) <= 40, run.stdout


@pytest.mark.parametrize("name", BRACKETS)
def test_brackets_in_names_are_shown_as_they_are(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_llama, "m[/v2]")
    shutil.copy(text_file, "c[bold].txt")
    assert run_cli("prune", "m[/v2]", "--mlp", "50%", *BY_CHANCE, "--output", "pr[old]").code == 0
    run = run_cli(*BRACKETS[name])
    assert run.code == 0, run.stderr
    for path in ("m[/v2]", "pr[old]", "c[bold].txt", "out[q4]"):
        if path in BRACKETS[name] and (name, path) not in (
            ("prune", "m[/v2]"),
            ("export", "pr[old]"),
            ("recover", "pr[old]"),
        ):
            assert path in run.stdout, run.stdout


def test_verbose_shows_all_tables_and_quiet_no_progress(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    asked = ("--intermediate-size", "24", "--calibration", text_file, *CALIBRATED)
    loud = run_cli("prune", tiny_llama, *asked, "--output", tmp_path / "loud", "-v")
    assert all(title in loud.stdout for title in ("Modules", "Where it runs", "Layers", "Held-out text"))
    lines = [line for line in loud.stdout.splitlines() if not line.startswith("  llmprune")]
    assert max(map(len, lines)) <= max(COLUMNS, len(str(tmp_path)) * 2 + COLUMNS)
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


def test_a_run_into_a_file_says_its_stages_layers_and_times_and_nothing_else(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count(step=10)  # each step takes ten seconds
    monkeypatch.setattr(progress, "Lines", partial(Lines, clock=lambda: next(ticks)))
    run = run_cli("prune", tiny_llama, "--mlp", "25%", "--calibration", text_file, *CALIBRATED, "-o", tmp_path / "out")
    lines, measuring = run.stderr.splitlines(), "Measuring activity"
    assert lines[:2] == [measuring, f"{measuring}: 1 of 2 (50%), 10 s, about 10 s left"]
    assert lines[2:4] == [f"{measuring}: 2 of 2 (100%), 20 s", "Refitting (residual)"]
    stages = {line for line in lines if ":" not in line}
    assert stages == {measuring, "Refitting (residual)", "Writing", "Judging on held-out text"}
    for line in lines:
        stage, _, reached = line.partition(": ")
        assert stage in stages and (not reached or re.fullmatch(REACHED, reached)), line


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


def test_what_was_said_is_not_said_again(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_on_stderr() as listener:
        for said in ("one thing", "another", "one thing"):
            listener.warn(said)
    shown = capsys.readouterr().err
    assert shown.count("one thing") == shown.count("another") == 1, shown
