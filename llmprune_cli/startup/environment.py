"""What a bug report has to say of a machine: versions, memory and devices."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

from llmprune_cli import __version__
from llmprune_cli.startup.loading import loading

PACKAGES = (
    *("torch", "transformers", "safetensors", "huggingface_hub", "datasets", "accelerate", "torch-pruning"),
    *("gguf", "onnx", "onnxruntime", "xllamacpp", "peft", "lm-eval", "sentencepiece", "matplotlib"),
)


def describe_environment() -> dict[str, str]:
    """Names and what was found, in the order in which people ask."""
    import psutil

    with loading():
        import torch

    found = {"llmprune": __version__, "Python": platform.python_version(), "system": platform.platform()}
    found |= {package: _version(package) for package in PACKAGES}
    found["CPU"] = f"{os.cpu_count()} cores, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    found["memory"] = f"{psutil.virtual_memory().total / 2**30:.1f} GiB"
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(number)
            found[f"cuda:{number}"] = f"{device.name}, {device.total_memory / 2**30:.1f} GiB"
    else:
        found["GPU"] = "mps" if torch.backends.mps.is_available() else "none that torch can use"
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
