"""Short names, near names, and what other programs call things."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.cli import BY_CHANCE, run_cli, run_process
from support.refusals import USAGE, assert_refused

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


def test_layers_are_named_by_ranges(tiny_llama: Path) -> None:
    run = run_cli("prune", tiny_llama, *BY_CHANCE, "--drop-layers", "0-0", "--dry-run", "--json")
    assert json.loads(run.stdout)["dropped_layers"] == [0]
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
    ],
)
def test_a_wrong_name_is_answered_with_the_right_one(words: tuple[str, ...], meant: str) -> None:
    assert_refused(run_cli(*words), USAGE, meant)


def test_help_has_a_short_name_and_examples() -> None:
    for command in ("inspect", "prune", "eval", "export", "push"):
        shown = run_cli(command, "-h")
        assert shown.code == 0 and shown.stdout.count(f"llmprune {command} ") >= 3 + 1, shown.stdout


def test_env_says_what_a_bug_report_needs() -> None:
    shown = run_cli("env")
    assert shown.code == 0 and all(word in shown.stdout for word in ("llmprune", "Python", "torch", "CPU", "memory"))


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
