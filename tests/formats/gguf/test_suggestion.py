"""What `prune` says to do next is what the commands then take."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from support.cli import BY_MAGNITUDE, run_cli
from support.full import examples, in_full
from support.gguf_exports import needs_llamacpp, tiny
from support.tiny import save_tokenizer

PRUNED = (*BY_MAGNITUDE, "--intermediate-pruning-ratio", "0.5")
KINDS = ("known", "of unknown words", "with more tokens than the model", "missing")


def suggested(model: Path, output: Path) -> dict[str, list[str]]:
    """The commands behind "Next:", each by its first word."""
    run = run_cli("prune", model, *PRUNED, "--output", output)
    assert run.code == 0, run.stderr
    lines = [shlex.split(line)[1:] for line in run.stdout.partition("Next:")[2].splitlines() if line.strip()]
    return {words[0]: words for words in lines}


@needs_llamacpp
@pytest.mark.parametrize("kind", examples(KINDS, ("known", "of unknown words", "missing")))
def test_gguf_is_suggested_where_it_can_be_exported(tmp_path: Path, kind: str) -> None:
    changes = {"vocab_size": 300} if kind == "with more tokens than the model" else {}
    model = tiny(tmp_path / "model", "llama", **changes)
    if kind == "of unknown words":
        save_tokenizer(model)
    if kind == "missing":
        for path in model.glob("*token*"):
            path.unlink()
    commands = suggested(model, tmp_path / "pruned")
    usual = ["export", str(tmp_path / "pruned"), "--format", "gguf", "--dtype", "q4_k_m", "--output"]
    words = commands.get("export", [*usual, str(tmp_path / "pruned-gguf")])
    run = run_cli(*words, "--no-verify")
    assert (run.code == 0) == ("export" in commands) == (kind == "known"), run.stderr
    assert set(commands) - {"export"} == ({"push"} if kind == "missing" else {"eval", "recover", "push"})


@in_full
def test_gguf_is_suggested_for_no_other_family(tmp_path: Path) -> None:
    model = tiny(tmp_path / "model", "mamba")
    assert set(suggested(model, tmp_path / "pruned")) == {"eval", "recover", "push"}


@needs_llamacpp
@pytest.mark.parametrize(("neurons", "is_said"), [("32", False), ("40", True)])
def test_a_suggested_type_that_leaves_parts_in_16_bits_says_so(tmp_path: Path, neurons: str, is_said: bool) -> None:
    model = tiny(tmp_path / "model", "llama")
    run = run_cli("prune", model, *BY_MAGNITUDE, "--intermediate-size", neurons, "--output", tmp_path / "pruned")
    assert run.code == 0 and "--dtype q4_k_m" in run.stdout, run.stderr
    assert ("As q4_k_m parts would stay in 16 bits: prune with --round-to 32" in run.stdout) == is_said
