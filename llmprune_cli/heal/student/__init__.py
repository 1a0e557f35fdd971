"""The pruned model as it is trained: in float32, with the weights that were asked for, perhaps as adapters."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from torch import nn
from torch.utils.checkpoint import checkpoint

from llmprune_cli.errors import UnsupportedError
from llmprune_cli.family.skeleton import build_skeleton, on_disk
from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.folder.tensors import split_name
from llmprune_cli.heal.layers import decoder_layers
from llmprune_cli.heal.options import Healing
from llmprune_cli.heal.student.adapters import Adapters, adapt
from llmprune_cli.source.full_model import load_model

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# In names of classes: what lets tokens see each other.
MIXERS = ("attention", "mixer", "mamba", "conv", "deltanet", "recurrentblock", "lstmlayer")


@dataclass(frozen=True)
class TrainedModel:
    """A model some of whose weights are trained."""

    model: PreTrainedModel  # adapters, if there are any, are parts of its modules
    adapters: Adapters | None = None

    @property
    def trained(self) -> int:
        """How many numbers are trained."""
        return sum(own.numel() for own in self.model.parameters() if own.requires_grad)

    @property
    def summed_bytes(self) -> int:
        """What each step adds adapters to, as far as that is formed before it is multiplied with."""
        return 0 if self.adapters is None else self.adapters.summed_bytes

    def merged(self) -> PreTrainedModel:
        """The model without adapters: they are added to what they adapt."""
        if self.adapters is not None:
            self.adapters.merge()
        return self.model


def load_trained(pruned: Checkpoint, device: str, healing: Healing) -> TrainedModel:
    """Load a pruned model in float32, and say which of its weights are trained.

    Raises:
        CheckpointError: it cannot be loaded.
        UnsupportedError: it has no such weights.
    """
    model = load_model(pruned, device, "float32")
    model.config.use_cache = False
    names = trained_names(model, healing.train)
    if not names:
        raise UnsupportedError(f"{pruned.config.model_type} has no weights that --train {healing.train} names.")
    if healing.lora is not None:
        return TrainedModel(model, adapt(model, names, healing.lora, healing.seed))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    return TrainedModel(model)


def compute_twice(model: PreTrainedModel) -> None:
    """Have activations within decoder layers computed again where gradients need them, instead of keeping them.

    A family's own switch for that would turn on its dropout as well.
    """
    for layer in decoder_layers(model):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def trained_names(model: nn.Module, train: str) -> set[str]:
    """Names of the parameters that are trained.

    Args:
        train: one of `TRAINED`.
    """
    names = [name for name, _ in model.named_parameters()]
    if train == "layers":
        return {name for name in names if split_name(name)[1]}
    return {name for name in names if train in ("all", _part_of(model, name))}


def _part_of(model: nn.Module, name: str) -> str:
    """Which part a parameter belongs to: norms, attention (or what stands in its place), mlp, or else none."""
    from transformers.pytorch_utils import Conv1D

    path = name.split(".")[:-1]
    modules = [model.get_submodule(".".join(path[:end])) for end in range(1, len(path) + 1)]
    if "norm" in type(modules[-1]).__name__.lower():
        return "norms"
    if not split_name(name)[1]:
        return ""
    kinds = [type(own).__name__.lower() for own in modules if not isinstance(own, Conv1D)]  # which is a linear layer
    kinds = [kind for kind in kinds if "decoderlayer" not in kind]  # named after its mixer, and has an MLP as well
    return "attention" if any(mixer in kind for kind in kinds for mixer in MIXERS) else "mlp"


def stored_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """All tensors of a model as on disk, tied ones once, under their names of today, wherever it was loaded from."""
    skeleton = build_skeleton(
        model.config
    )  # a loaded one would give tensors back the names that they were stored under
    return on_disk(skeleton, {name: tensor.detach() for name, tensor in model.state_dict().items()})
