"""The Zero oracle by hand: what a pruned model answers must be what the whole one answers without the removed units.

It shares nothing with the proof. What stayed is found by the values of the written tensors, since no two random ones
are alike; of layers the plan says which. The whole model is then given zeros where something went. Layers that went
pass on their input, routers never score an expert that went, and norms see what stayed.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

COPIES = (torch.Tensor.float, torch.Tensor.type, torch.Tensor.to)  # in another precision
WITHIN = ".language_model"  # where a model around a language model has it
TOWERS = ".embed_tokens_extend"  # what Phi-4-multimodal calls its towers, whose numbers are none of decoder layers
NEVER = -1e9  # the score of an expert that went
TOKENS = 24
FIRST, LAST = 5, 90  # tokens that are not special


def difference(dense: Path, pruned: Path, plan: Path) -> float:
    """The largest difference of logits, relative to how far they differ among tokens."""
    stays = json.loads(plan.read_text())
    tokens = torch.randint(FIRST, LAST, (2, TOKENS), generator=torch.Generator().manual_seed(3))
    whole, part = _load(dense), _load(pruned)
    if not _runs(whole, tokens):  # its code masks by the least number of a precision, or mixes two
        whole, part = whole.float(), part.float()
    names = Names(stays, is_text_alone=not any(WITHIN in name for name in part.state_dict()))
    stayed = _stayed(_state(whole), _state(part), names)
    with torch.no_grad(), ExitStack() as changed:
        for name, mask in stayed.items():
            whole.state_dict()[name].mul_(mask)
        for change in (_norms_of_kept(whole, part, stayed, names), _without_layers(whole, names)):
            changed.enter_context(change)
        changed.enter_context(_Routers(whole, stayed, names))
        expected = whole(input_ids=tokens, use_cache=False).logits
    with torch.no_grad():
        given = part(input_ids=tokens, use_cache=False).logits
    return float((expected - given).abs().max() / (expected - expected.mean(-1, keepdim=True)).abs().max())


class Names:
    """Which layers stayed, and the names that tensors and modules have after them."""

    def __init__(self, plan: dict[str, Any], is_text_alone: bool) -> None:
        self.is_text_alone = is_text_alone  # written without the model around it
        self.layers: list[int] = plan["layers"]
        self.depth: int = plan["before"]["num_hidden_layers"]
        self.experts: int = plan["before"]["num_experts"]

    def after(self, name: str) -> str | None:
        """The name in the pruned model; None for what is part of a layer that went."""
        if self.is_text_alone:
            name = name.replace(WITHIN, "", 1)
        found = None if TOWERS in name else re.search(r"\.(\d+)(?=\.|$)", name)
        if found is None or len(self.layers) == self.depth:
            return name
        layer = int(found[1])
        if layer not in self.layers:
            return None
        return f"{name[: found.start(1)]}{self.layers.index(layer)}{name[found.end(1) :]}"


def _load(folder: Path) -> Any:
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **eager).double().eval()


def _runs(model: nn.Module, tokens: torch.Tensor) -> bool:
    try:
        with torch.no_grad():
            model(input_ids=tokens, use_cache=False)
    except RuntimeError:
        return False
    return True


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}


def _stayed(dense: dict[str, torch.Tensor], pruned: dict[str, torch.Tensor], names: Names) -> dict[str, torch.Tensor]:
    """For every tensor in memory that was cut, which of its elements stayed."""
    stayed: dict[str, torch.Tensor] = {}
    for name, before in dense.items():
        after = pruned.get(names.after(name) or "")
        if after is not None and after.shape != before.shape:
            mask = _found_in(before, after)
            if mask is not None:
                stayed[name] = mask
            elif before.ndim > 1:
                raise AssertionError(f"the values of {name} are not those that it had")
    return stayed


def _found_in(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor | None:
    """Which elements of a tensor another one holds: as they are, or all times one factor; None where it does not."""
    flat, order = before.flatten().sort()
    for factor in (1.0, *((old / new) ** 0.5 for old, new in zip(before.shape, after.shape, strict=True))):
        values = after.flatten() / factor
        above = torch.searchsorted(flat, values).clamp(max=len(flat) - 1)
        below = (above - 1).clamp(min=0)
        nearest = torch.where((flat[above] - values).abs() < (flat[below] - values).abs(), above, below)
        if torch.allclose(flat[nearest], values, rtol=1e-6, atol=1e-9):
            mask = torch.zeros(before.numel(), dtype=torch.bool)
            mask[order[nearest]] = True
            return mask.reshape(before.shape)
    return None  # a norm whose weights were changed: `_norms_of_kept` knows what it runs over


@contextmanager
def _without_layers(model: nn.Module, names: Names) -> Iterator[None]:
    """Let layers that went pass on what they are given."""
    hooks = []
    for name, module in model.named_modules():
        found = re.search(r"\.(\d+)$", name)
        is_layer = found and re.search(r"\.\d+\.", name) is None and int(found[1]) not in names.layers
        parent = model.get_submodule(name[: found.start()]) if found and is_layer else None
        if isinstance(parent, nn.ModuleList) and len(parent) == names.depth:
            hooks.append(module.register_forward_hook(_pass_on, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _pass_on(_: nn.Module, inputs: Any, named: dict[str, Any], output: Any) -> Any:
    given = inputs[0] if inputs else named["hidden_states"]
    return type(output)((given, *output[1:])) if isinstance(output, tuple | list) else given


@contextmanager
def _norms_of_kept(whole: nn.Module, part: nn.Module, stayed: dict[str, torch.Tensor], names: Names) -> Iterator[None]:
    """Let norms see the elements that stayed only: the pruned model's norm, with the whole model's weights."""
    small: dict[str, Any] = dict(part.named_modules())
    hooks = []
    channels = _channels(whole, stayed)
    for name, module in whole.named_modules():
        new = names.after(name)
        own = None if new is None else small[new]
        if own is None or "norm" not in type(module).__name__.lower() or list(module.children()):
            continue
        weight = getattr(module, "weight", None)
        if weight is None and list(module.parameters()):
            continue  # of queries and keys, by a factor for each head
        mask = stayed.get(f"{name}.weight", channels)
        is_cut = weight is None or weight.shape != own.weight.shape
        index = None if mask is None else mask.nonzero().flatten()
        if mask is None or index is None or not is_cut:
            continue
        norm = copy.deepcopy(own)
        for key, parameter in norm.named_parameters(recurse=False):
            parameter.copy_(getattr(module, key)[index])
        hooks.append(module.register_forward_hook(_normed(norm, index, len(mask))))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _normed(norm: nn.Module, index: torch.Tensor, size: int) -> Any:
    def hook(_: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
        if output.shape[-1] != size:
            return None
        result = torch.zeros_like(output)
        rest = [value[..., index] if isinstance(value, torch.Tensor) else value for value in inputs[1:]]
        result[..., index] = norm(inputs[0][..., index], *rest)
        return result

    return hook


def _channels(whole: Any, stayed: dict[str, torch.Tensor]) -> torch.Tensor | None:
    embedding = whole.get_input_embeddings()
    for name, module in whole.named_modules():
        if module is embedding:
            return next((mask.any(0) for key, mask in stayed.items() if key.startswith(f"{name}.")), None)
    return None


class _Routers(TorchFunctionMode):
    """Scores no expert that went: rows of a router that went give a score that nothing picks."""

    def __init__(self, model: nn.Module, stayed: dict[str, torch.Tensor], names: Names) -> None:
        super().__init__()
        self._gone: dict[int, torch.Tensor] = {}
        self._copies: list[torch.Tensor] = []
        for name, parameter in model.state_dict().items():
            is_router = re.search(r"(gate|router|classifier|layer)(\.\w*)?\.(weight|bias|\w*bias)$", name)
            if name in stayed and is_router and parameter.ndim < 3 and names.experts in parameter.shape:
                gone = ~stayed[name].reshape(names.experts, -1).any(1)
                if parameter.numel() == names.experts:
                    parameter.view(-1)[gone] = NEVER
                self._gone[parameter.untyped_storage().data_ptr()] = gone

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in COPIES and args[0].untyped_storage().data_ptr() in self._gone:
            self._copies.append(result)  # kept, so that no other tensor takes its place
            self._gone[result.untyped_storage().data_ptr()] = self._gone[args[0].untyped_storage().data_ptr()]
        if function is nn.functional.linear:
            gone = self._gone.get(args[1].untyped_storage().data_ptr())
            if gone is not None and result.shape[-1] == len(gone):
                result = result.masked_fill(gone, NEVER)
        return result
