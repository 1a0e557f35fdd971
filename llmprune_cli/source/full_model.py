"""The full model, loaded by transformers, and the device that it is loaded to."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmprune_cli.errors import CheckpointError, first_line
from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.folder.tensors import BY_NAME
from llmprune_cli.processes import Processes
from llmprune_cli.source.configuration import NO_ADAPTER

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def pick_device(device: str) -> str:
    """`auto` is the first of CUDA, MPS and CPU that is there.

    Raises:
        CheckpointError: the device is not on this machine.
    """
    if device == "auto":
        return "auto" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, number = device.partition(":")
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(kind, False) or (kind == "cuda" and int(number or 0) >= torch.cuda.device_count()):
        raise CheckpointError(f"There is no device {device!r} on this machine. Try --device cpu.")
    return device


def own_device(device: str, processes: Processes) -> str:
    """Where one of several processes runs: on the GPU of its number, if there are any."""
    several = processes.count > 1 and device in ("auto", "cuda") and torch.cuda.is_available()
    return f"cuda:{processes.local_rank}" if several else device


def load_model(
    checkpoint: Checkpoint, device: str = "auto", dtype: str | None = None, offload_folder: Path | None = None
) -> PreTrainedModel:
    """The full model for evaluation, spread by accelerate's device map.

    Args:
        offload_folder: for weights that fit neither into the devices' memory nor into the machine's, as long as the
            model is used; those that are stored as they are used stay where they are. None refuses such models.

    Raises:
        CheckpointError: transformers cannot load it, or keys are missing or do not fit.
    """
    import psutil
    from transformers import AutoModelForCausalLM

    place = pick_device(device)
    size_bytes = checkpoint.parameter_count * BY_NAME[dtype].size_bytes if dtype else checkpoint.size_bytes
    may_offload = offload_folder is not None and (device, place) == ("auto", "cpu")
    is_too_large = may_offload and size_bytes > psutil.virtual_memory().available
    loaded: Any
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder,
            config=checkpoint.config,
            dtype=BY_NAME[dtype].torch if dtype else "auto",
            device_map="auto" if place == "auto" or is_too_large else {"": place},
            offload_folder=offload_folder,
            trust_remote_code=checkpoint.trust_remote_code,
            adapter_kwargs=NO_ADAPTER,
            key_mapping={f"^{re.escape(stored)}$": name for stored, name in checkpoint.renamed} or None,
            output_loading_info=True,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise CheckpointError(f"{checkpoint.source} cannot be loaded: {first_line(error)}") from error
    model: PreTrainedModel = loaded[0]
    info: dict[str, Any] = loaded[1]
    if info["missing_keys"] or info["mismatched_keys"]:
        names = sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"])))
        raise CheckpointError(f"{checkpoint.source} does not fit its config.json: {', '.join(names[:3])}.")
    model.eval()
    return model
