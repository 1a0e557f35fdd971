"""Short names, near names, and what other programs call things."""

from __future__ import annotations

import json
import platform
import re
from importlib.metadata import version
from pathlib import Path

import pytest

import llmprune_cli
from support.cli import BY_CHANCE, run_cli, run_process
from support.refusals import USAGE, assert_refused
from support.tiny import save_tiny

WIDTHS = {
    "--mlp": ("--intermediate-pruning-ratio", "25%"),
    "--heads": ("--head-pruning-ratio", "0.5"),
    "--kv-groups": ("--kv-group-pruning-ratio", "50%"),
    "--hidden": ("--hidden-pruning-ratio", "0.25"),
}


@pytest.mark.parametrize("short", WIDTHS)
def test_a_short_name_means_its_long_one(tiny_llama: Path, short: str) -> None:
    long, value = WIDTHS[short]
    shown = [json.loads(run_cli("inspect", tiny_llama, name, value, "--json").stdout) for name in (short, long)]
    assert shown[0]["after"] == shown[1]["after"] and shown[0]["after"]["parameters"] < shown[0]["before"]["parameters"]


@pytest.mark.parametrize(
    ("target", "words"),
    [("4GiB", "bytes"), ("6B", "parameters, so a target of 6,000,000,000"), ("100%", "removes nothing")],
)
def test_a_target_is_a_share_a_number_or_a_size(tiny_llama: Path, tmp_path: Path, target: str, words: str) -> None:
    run = run_cli("prune", tiny_llama, "--target", target, "-o", tmp_path / "out")
    assert run.code == 5 and words in run.stderr
    twice = run_cli("prune", tiny_llama, "--target", target, "--target-size", "1MB", "-o", tmp_path / "out")
    assert_refused(twice, USAGE, "--target and --target-size say the same thing")


def test_experts_have_a_short_name(tmp_path: Path) -> None:
    experts = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
    model = save_tiny(tmp_path / "model", "qwen3_moe", head_dim=16, **experts)
    run = run_cli("inspect", model, "--experts", "4", "--json")
    assert json.loads(run.stdout)["after"]["widths"]["num_experts"] == 4, run.stderr


def test_a_share_has_a_short_name(tiny_llama: Path, text_file: Path) -> None:
    text = ("--calibration", text_file, "--calibration-tokens", "80", "--calibration-seq-len", "40")
    asked = ("--keep-layers", "0", *BY_CHANCE, *text, "--dry-run", "--json")
    runs = [run_cli("prune", tiny_llama, name, "85%", *asked) for name in ("--target", "--target-params")]
    found = [json.loads(run.stdout) for run in runs]
    assert found[0]["after"] == found[1]["after"] and found[0]["target"] == found[1]["target"]
    assert found[0]["after"]["parameters"] <= 0.85 * found[0]["before"]["parameters"]


def test_layers_are_named_by_ranges(tiny_llama: Path, tmp_path: Path) -> None:
    run = run_cli("prune", tiny_llama, *BY_CHANCE, "--drop-layers", "0-0", "--dry-run", "--json")
    assert json.loads(run.stdout)["dropped_layers"] == [0]
    deep = save_tiny(tmp_path / "deep", num_hidden_layers=5)
    run = run_cli("prune", deep, *BY_CHANCE, "--drop-layers", "1-2,-1", "--dry-run", "--json")
    assert json.loads(run.stdout)["dropped_layers"] == [1, 2, 4]
    assert_refused(run_cli("prune", tiny_llama, "--drop-layers", "3-1", "--dry-run"), USAGE, "smaller number first")


@pytest.mark.parametrize(("name", "dtype"), [("fp16", "float16"), ("bf16", "bfloat16"), ("F32", "float32")])
def test_dtypes_have_short_names(tiny_llama: Path, tmp_path: Path, name: str, dtype: str) -> None:
    run = run_cli("export", tiny_llama, "--dtype", name, "-o", tmp_path / "out", "--json", "-q")
    assert run.code == 0 and json.loads(run.stdout)["dtype"] == dtype and run.stderr == "", run.stderr


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (("prune", "x", "--sparsity", "0.3"), "--pruning-ratio"),
        (("prune", "x", "--output-dir", "o"), "--output"),
        (("prune", "x", "--importanse", "range"), "--importance"),
        (("prune", "x", "--importance", "ranje"), "Did you mean range?"),
        (("eval", "x", "--dtype", "int8"), "float32, float16, bfloat16"),
        (("export", "x", "--format", "ggfu", "-o", "o"), "Did you mean gguf?"),
        (("prnue", "x"), "prune"),
        (("recover", "x", "--calibration", "a.txt"), "--text)"),
        (("recover", "x", "--calibration-data", "a.txt"), "--text)"),
        (("eval", "x", "--calibration", "a.txt"), "--dataset)"),
        (("prune", "x", "--text", "a.txt"), "--calibration)"),
    ],
)
def test_a_wrong_name_is_answered_with_the_right_one(words: tuple[str, ...], meant: str) -> None:
    assert_refused(run_cli(*words), USAGE, meant)


def test_help_has_a_short_name_and_examples() -> None:
    for command in ("inspect", "prune", "eval", "export", "push", "sweep", "recover"):
        shown = run_cli(command, "-h")
        assert shown.code == 0 and shown.stdout.count(f"llmprune {command} ") >= 3 + 1, shown.stdout


@pytest.mark.parametrize("command", ["inspect", "prune", "sweep", "recover", "eval", "export", "push"])
def test_help_cuts_no_name_of_an_option(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = run_cli(command, "--help").stdout
    assert "…" not in shown and max(map(len, shown.splitlines())) <= 80
    if command in ("inspect", "prune"):
        assert "--intermediate-pruning-ratio" in shown and "--kv-group-pruning-ratio" in shown


def test_help_groups_the_options() -> None:
    shown = run_cli("prune", "--help").stdout
    panels = re.findall(r"^╭─ (.+?) ─+╮$", shown, re.MULTILINE)
    expected = ["Size", "What goes", "Calibration", "Method", "Evaluation", "Output", "Machine"]
    assert [panel for panel in panels if panel in expected] == expected
    holds = dict(zip(panels, re.split(r"^╭─.+╮$", shown, flags=re.MULTILINE)[1:], strict=True))
    belongs = {"Size": "--target-speedup", "What goes": "--drop-layers", "Method": "--refit", "Machine": "--device"}
    assert all(option in holds[panel] for panel, option in belongs.items()), shown


def test_env_says_what_a_bug_report_needs() -> None:
    shown = run_cli("env")
    assert shown.code == 0 and all(word in shown.stdout for word in ("llmprune", "Python", "torch", "CPU", "memory"))
    found = dict(line.split(maxsplit=1) for line in shown.stdout.splitlines())
    assert [found[name] for name in ("llmprune", "Python")] == [llmprune_cli.__version__, platform.python_version()]
    assert [found[name] for name in ("torch", "transformers")] == list(map(version, ("torch", "transformers")))


def test_inspect_lists_families_and_formats() -> None:
    families, formats = run_cli("inspect", "--families"), run_cli("inspect", "--formats")
    assert families.code == formats.code == 0, families.stderr + formats.stderr
    assert "llama" in families.stdout and " bert," not in families.stdout
    assert "gguf" in formats.stdout and "llama.cpp" in formats.stdout and "q8_0" in formats.stdout


def test_a_shell_completes_options_and_their_values() -> None:
    def completed(line: str) -> list[str]:
        words = {"_LLMPRUNE_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
        return run_process(env=words).stdout.split()

    assert completed("llmprune prune model --importance ta") == ["taylor"]
    assert "--calibration-tokens" in completed("llmprune prune model --calib")
