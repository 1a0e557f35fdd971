"""A tiny checkpoint of a family, opened and understood, beside the stock model of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmprune_cli.coupling.subject import Subject, understand
from llmprune_cli.options import ModelReference
from llmprune_cli.run.layered_model import LayeredModel
from llmprune_cli.source.full_model import load_model
from llmprune_cli.source.opening import open_checkpoint
from support import families
from support.checkpoints import rewrite
from support.tiny import save_tiny


@dataclass(frozen=True)
class Opened:
    """A tiny checkpoint of a family, and the stock model of it."""

    subject: Subject
    model: Any
    tokens: torch.Tensor

    @property
    def layered(self) -> LayeredModel:
        """The same, to be run one layer at a time."""
        return LayeredModel(self.subject, "cpu")


@contextmanager
def open_family(family: str, folder: Path) -> Iterator[Opened]:
    """Make a checkpoint below a folder, with weights so large that every unit matters."""
    settings = {**families.SIZES, **families.FAMILIES[family], "initializer_range": 0.15}
    saved = save_tiny(folder / "saved", families.model_type(family), **settings)
    model = rewrite(saved, folder / "model", with_random_correction)
    with open_checkpoint(ModelReference(str(model)), need_weights=True) as checkpoint:
        subject = understand(checkpoint)
        tokens = torch.randint(3, 90, (4, 24), generator=torch.Generator().manual_seed(1))
        yield Opened(subject, load_model(checkpoint, "cpu", "float32"), tokens)


def with_random_correction(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The biases that a router adds behind its scores start as zeros: give them a say."""
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.randn(tensor.shape, generator=generator) if name.endswith("correction_bias") else tensor
        for name, tensor in tensors.items()
    }
