"""Moments in 8 bits, by bitsandbytes, heal as well, in less memory."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from llmprune_cli.heal.training import trainer
from support.heal_runs import recover, run_recover
from support.refusals import INTERRUPTED
from support.stock import written_tensors

BITS = ("--optimizer", "adamw-8bit", "--tokens", "4096")

pytestmark = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


def test_8_bits_heal_as_well_and_go_on_after_an_interruption(pruned: Path, text_file: Path, tmp_path: Path) -> None:
    usual = recover(pruned, text_file, tmp_path / "usual", "--tokens", "4096")
    whole = recover(pruned, text_file, tmp_path / "whole", *BITS)
    assert whole["after"]["kl"] < 0.6 * whole["before"]["kl"]
    assert whole["after"]["kl"] == pytest.approx(usual["after"]["kl"], rel=0.05)

    def interrupted(*_: object) -> None:
        mark(*_)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        mark = trainer.mark_whole
        patched.setattr(trainer, "mark_whole", interrupted)
        assert run_recover(pruned, text_file, tmp_path / "out", *BITS).code == INTERRUPTED
    state = torch.load(tmp_path / ".out.llmprune-work" / "checkpoint-16" / "optimizer.pt", weights_only=True)["state"]
    kinds = {own["__bnb_optimizer_quant_state__"]["state1"].dtype for own in state.values()}
    assert kinds == {torch.uint8, torch.float32}  # embeddings, norms and whatever has few weights stay whole
    assert recover(pruned, text_file, tmp_path / "out", *BITS, "--resume")["curve"] == whole["curve"]
    expected, found = (written_tensors(tmp_path / name) for name in ("whole", "out"))
    assert all(torch.equal(own, found[name]) for name, own in expected.items())
