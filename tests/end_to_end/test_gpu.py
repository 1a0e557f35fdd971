"""The calibrated path on a CUDA device; `make check-gpu` runs it where there is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from support import families
from support.cli import run_cli
from support.stock import written_tensors
from support.tiny import save_tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
TEXT = ("--calibration-tokens", "4000", "--calibration-seq-len", "40")
QUARTER = ("--intermediate-pruning-ratio", "0.25")


def model_of(family: str, folder: Path) -> Path:
    settings = {**families.SIZES, **families.FAMILIES[family], "initializer_range": 0.15}
    return save_tiny(folder / family, families.model_type(family), dtype="bfloat16", **settings)


def card_of(*command: str | Path) -> dict[str, Any]:
    run = run_cli(*command, "--json")
    assert run.code == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout)["calibration"]
    return found


@pytest.mark.parametrize("family", families.TRIED)
def test_every_family_is_calibrated_as_on_the_cpu(family: str, text_file: Path, tmp_path: Path) -> None:
    model = model_of(family, tmp_path)
    what = QUARTER if family != "mamba" else ("--layers", "3")
    cards = {
        device: card_of(
            *("prune", model, *what, *TEXT, "--calibration", text_file, "--output", tmp_path / device),
            *("--device", device, "--compute-dtype", "float32"),
        )
        for device in ("cpu", "cuda")
    }
    one, other = (cards[device]["perplexity_after"] for device in ("cpu", "cuda"))
    assert other == pytest.approx(one, rel=0.02)
    assert cards["cuda"]["device"].startswith("cuda")


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "jamba", "gemma3_text"])
def test_bfloat16_is_chosen_and_as_good(family: str, text_file: Path, tmp_path: Path) -> None:
    model, found = model_of(family, tmp_path), {}
    for dtype in ("auto", "float32"):
        out = tmp_path / dtype
        asked = (*QUARTER, *TEXT, "--calibration", text_file, "--device", "cuda", "--compute-dtype", dtype)
        found[dtype] = card_of("prune", model, *asked, "--output", out)["perplexity_after"]
    used = json.loads((tmp_path / "auto" / "llmprune.json").read_text())["options"]["compute_dtype"]
    assert used == ("bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float32")
    assert found["auto"] == pytest.approx(found["float32"], rel=0.05)


def test_perplexity_is_that_of_the_cpu(text_file: Path, tmp_path: Path) -> None:
    model, found = model_of("llama", tmp_path), {}
    for device in ("cpu", "cuda"):
        asked = ("--dataset", text_file, "--max-seq-len", "32", "--device", device, "--dtype", "float32", "--json")
        run = run_cli("eval", model, *asked)
        assert run.code == 0, run.stderr
        found[device] = json.loads(run.stdout)["results"][0]["perplexity"]
    assert found["cuda"] == pytest.approx(found["cpu"], rel=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL wants a device for each process")
def test_two_processes_with_nccl_write_what_one_writes(text_file: Path, tmp_path: Path) -> None:
    model = model_of("llama", tmp_path)
    asked = ["prune", str(model), *QUARTER, *TEXT, "--calibration", str(text_file), "--device", "cuda"]
    launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "llmprune_cli")
    for name, start in (("one", ("llmprune_cli",)), ("two", launcher)):
        command = [sys.executable, "-m", *start, *asked, "--output", str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ)
        assert done.returncode == 0, done.stderr
    one, two = (written_tensors(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert max(float((one[name].double() - two[name].double()).abs().max()) for name in one) < 1e-2
