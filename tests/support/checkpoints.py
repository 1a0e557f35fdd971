"""Checkpoints in other forms: rewritten, quantized, damaged; and that they prune alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from support.cli import BY_MAGNITUDE, run_cli
from support.stock import written_tensors

Tensors = dict[str, torch.Tensor]


def rewrite(plain: Path, target: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """Copy a checkpoint with other tensors in it."""
    shutil.copytree(plain, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = {name: tensor.clone().contiguous() for name, tensor in change(written_tensors(plain)).items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def prune(model: Path, output: Path, *options: str) -> Path:
    run = run_cli("prune", model, *BY_MAGNITUDE, *(options or ("--pruning-ratio", "0.5")), "--output", output)
    assert run.code == 0, run.stderr
    return output


def assert_prune_alike(plain: Path, other: Path, work: Path, *options: str) -> dict[str, Any]:
    """Both forms prune to the same bytes and the same configuration; gives the manifest of the other form's output."""
    first, second = prune(plain, work / "from-plain", *options), prune(other, work / "from-other", *options)
    expected, actual = written_tensors(first), written_tensors(second)
    assert expected.keys() == actual.keys()
    different = [name for name in expected if not torch.equal(expected[name], actual[name])]
    assert not different and all(expected[name].dtype == actual[name].dtype for name in expected)
    one, other_config = (json.loads((folder / "config.json").read_text()) for folder in (first, second))
    assert one == other_config
    manifest: dict[str, Any] = json.loads((second / "llmprune.json").read_text())
    return manifest


def quantize_fp8(tensors: Tensors, block: tuple[int, int]) -> Tensors:
    """Round every projection to FP8 with one scale for each block."""
    result = {}
    for name, tensor in tensors.items():
        if not name.endswith("_proj.weight"):
            result[name] = tensor
            continue
        rows, columns = tensor.shape[0] // block[0], tensor.shape[1] // block[1]
        blocks = tensor.reshape(rows, block[0], columns, block[1])
        scales = blocks.abs().amax(dim=(1, 3)) / 448
        result[name] = (blocks / scales[:, None, :, None]).reshape(tensor.shape).to(torch.float8_e4m3fn)
        result[f"{name}_scale_inv"] = scales
    return result


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [8, 16]}


def flip(path: Path) -> None:
    """Change the last byte of a file."""
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
