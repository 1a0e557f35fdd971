"""The proof that a pruning is right: prune a small twin for real and hold it against the dense one."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune_cli.architecture import Architecture, Widths, split_name
from llmprune_cli.errors import UnsupportedError
from llmprune_cli.groups import Keep, Trace, chosen_for, kept_mask
from llmprune_cli.twin import build_twin, small_head_dims

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

TOLERANCE = 1e-4  # relative; RoPE, softmax and norms run in float32 inside a float64 model

Prune = Callable[[Path, Path, Trace, Architecture, Widths], Keep]


def prove(architecture: Architecture, traced: Trace, changed: tuple[str, ...], prune: Prune) -> None:
    """Prune a twin of other sizes for real and hold the result against a dense model without the same units.

    The pruned twin must load through stock `AutoModelForCausalLM` with no missing, unexpected or mismatched key, and
    its logits must equal those of the dense twin in which whatever reads a removed unit is zero and every norm over a
    pruned axis sees the kept elements only.

    Args:
        changed: the widths to prune together, names of `Widths` fields; without any there is nothing to prove.
        prune: prune a saved folder into another; returns the units kept, by width and instance.

    Raises:
        UnsupportedError: the proof does not hold, with the tensor, axis or width to blame.
    """
    if not changed:
        return
    twin = build_twin(architecture, small_head_dims(architecture.config)[1], channels_per_head=8, neurons=20)
    after = half_widths(twin.architecture, changed)
    with tempfile.TemporaryDirectory(prefix="llmprune-twin-") as name:
        dense, pruned = Path(name, "dense"), Path(name, "pruned")
        twin.model.save_pretrained(dense)
        pruned.mkdir()
        keep = prune(dense, pruned, traced, twin.architecture, after)
        _silence_removed(dense, traced, twin.architecture.widths, keep)
        whole, part = (_load_stock(folder, architecture.config.model_type) for folder in (dense, pruned))
    difference = _compare(whole, part, twin.tokens, keep)
    if not difference <= TOLERANCE:
        raise UnsupportedError(
            f"The twin proof fails for {architecture.config.model_type}: pruning {', '.join(changed)} changes the "
            f"logits by {difference:.1e} of their size where the removed units are not read. Prune other widths."
        )


def half_widths(architecture: Architecture, changed: tuple[str, ...]) -> Widths:
    """About half of each width to prune, within the architecture's rules."""
    before = architecture.widths
    groups, per_group = before.num_key_value_heads, before.heads_per_group
    if "num_key_value_heads" in changed:
        groups = max(1, groups // 2)
    if "num_attention_heads" in changed and per_group > 1:
        per_group = max(1, per_group // 2)
    heads = groups * per_group
    hidden, neurons = before.hidden_size, before.intermediate_size
    if "hidden_size" in changed:
        hidden = heads * (hidden // (2 * heads)) if heads <= hidden // 2 else hidden // 2
    if not architecture.explicit_head_dim:
        hidden = heads * before.head_dim
    elif architecture.hidden_multiple_of_heads:
        hidden -= hidden % heads
    if "intermediate_size" in changed:
        neurons //= 2
    return replace(
        before, hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=groups, intermediate_size=neurons
    )


def _load_stock(folder: Path, family: str) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    loaded: Any
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float64,
            attn_implementation="eager",
            experts_implementation="eager",
            output_loading_info=True,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise UnsupportedError(f"A pruned {family} does not load: {error}") from error
    model: PreTrainedModel = loaded[0]
    info: dict[str, Any] = loaded[1]
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            raise UnsupportedError(f"A pruned {family} loads with {problem}: {sorted(map(str, info[problem]))[:3]}.")
    model.double().eval()
    return model


def _silence_removed(folder: Path, traced: Trace, widths: Widths, keep: Keep) -> None:
    """Zero, in a saved dense twin, whatever reads a removed head or neuron."""
    from safetensors.torch import load_file, save_file

    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            template, numbers = split_name(name)
            for binding in traced.readers:
                if binding.template == template:
                    mask = kept_mask(traced, template, binding.axis, chosen_for(keep, numbers), widths)
                    tensor.index_fill_(binding.axis, (~mask).nonzero().flatten(), 0)
        save_file(tensors, path, metadata={"format": "pt"})


def _compare(dense: PreTrainedModel, pruned: PreTrainedModel, tokens: torch.Tensor, keep: Keep) -> float:
    """Largest difference of logits, relative to the largest logit.

    The removed channels' embeddings are zero as well, for families that read the residual stream without a norm.
    """
    import torch

    with torch.no_grad(), _norms_of_kept(dense, pruned):
        for channels in keep.get("hidden_size", {}).values():
            embedding = next(dense.get_input_embeddings().parameters())
            removed = torch.ones(embedding.shape[1], dtype=torch.bool)
            removed[torch.tensor(channels)] = False
            embedding[:, removed] = 0
        dense_logits = dense(input_ids=tokens, use_cache=False).logits
        pruned_logits = pruned(input_ids=tokens, use_cache=False).logits
    return float((dense_logits - pruned_logits).abs().max() / dense_logits.abs().max())


@contextmanager
def _norms_of_kept(model: PreTrainedModel, pruned: PreTrainedModel) -> Iterator[None]:
    """Let every norm whose weight was cut see the kept elements only, through the pruned model's own norm."""
    import torch

    hooks = []
    for name, module in model.named_modules():
        small = pruned.get_submodule(name)
        weight, small_weight = getattr(module, "weight", None), getattr(small, "weight", None)
        if not isinstance(weight, torch.Tensor) or not isinstance(small_weight, torch.Tensor) or weight.ndim != 1:
            continue
        if len(weight) == len(small_weight):
            continue
        kept = _positions(weight, small_weight)

        def replace_output(_: Any, inputs: Any, output: Any, small: Any = small, kept: Any = kept) -> torch.Tensor:
            result = torch.zeros_like(output)
            result[..., kept] = small(inputs[0][..., kept])
            return result

        hooks.append(module.register_forward_hook(replace_output))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _positions(whole: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Indices of the elements that stayed (the twin's random weights are all different)."""
    import torch

    return torch.isin(whole, part).nonzero().flatten()
