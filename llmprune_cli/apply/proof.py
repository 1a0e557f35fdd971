"""The proof that a pruning is right: prune a small twin for real and hold it against the dense one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmprune_cli.apply.answers import Answers, answer, differ
from llmprune_cli.coupling.products import Product, Products
from llmprune_cli.coupling.subject import Subject
from llmprune_cli.coupling.trace import Binding, Instance, Keep, Trace, kept_mask, new_name, renumbered
from llmprune_cli.coupling.twin import Twin, build_twin, proof_sizes
from llmprune_cli.errors import UnsupportedError
from llmprune_cli.family.architecture import Architecture
from llmprune_cli.family.kept_layers import check_kept_layers
from llmprune_cli.family.layers import can_keep_layers
from llmprune_cli.family.skeleton import expected_index, on_disk, vectors_on_disk
from llmprune_cli.family.widths import NEURONS, Width, Widths
from llmprune_cli.folder.scratch import scratch_folder, scratch_space
from llmprune_cli.folder.tensors import split_name
from llmprune_cli.plan.requested_widths import Target

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 1e-4  # relative; RoPE, softmax and norms run in float32 inside a float64 model

UNPICKED = -1e4  # weight of a router's row that no token picks

Prune = Callable[[Path, Path, Trace, Architecture, Target], Keep]


def prove_target(subject: Subject, target: Target, prune: Prune) -> None:
    """Prove a change of widths on a twin, and that the layers that stay remain what they are.

    Args:
        prune: see `prove`.

    Raises:
        UnsupportedError: it does not hold.
    """
    changed, layers = target.widths.changed_from(subject.widths), target.layers
    if "num_hidden_layers" in changed:
        check_kept_layers(subject.architecture.config, layers)
    renumbers = layers != tuple(range(len(layers)))
    prove(subject.architecture, subject.trace, changed, prune, renumbers)


def prove(
    architecture: Architecture, traced: Trace, changed: tuple[str, ...], prune: Prune, renumbers: bool = True
) -> None:
    """Prune a twin of other sizes for real and hold the result against a dense model without the same units.

    The pruned twin must load through stock `AutoModelForCausalLM` with no missing, unexpected or mismatched key, and
    its logits must equal those of the dense twin in which whatever reads a removed unit is zero and every norm over a
    pruned axis sees the kept elements only: of a batch, with padding and from a cache.

    Args:
        changed: the widths to prune together, names of `Widths` fields; without any there is nothing to prove.
        prune: prune a saved folder into another; returns the units kept, by width and instance.
        renumbers: whether layers that stay get other numbers, since one goes before them.

    Raises:
        UnsupportedError: the proof does not hold, with the tensor, axis or width to blame.
    """
    if not changed:
        return
    drops_layers = Width.LAYERS in changed
    twin = build_twin(architecture, proof_sizes(architecture.config, drops_layers))
    traced.check(expected_index(twin.architecture.config), twin.architecture.widths)
    _check_logits(twin)
    target = half_of(twin.architecture, changed, renumbers)
    if Width.EXPERTS in changed:
        _keep_positive(twin)
    with scratch_folder() as folder:
        dense, pruned = folder / "dense", folder / "pruned"
        with scratch_space():
            twin.model.save_pretrained(dense)
            pruned.mkdir()
            keep = prune(dense, pruned, traced, twin.architecture, target)
            kept = _Kept(traced, twin.architecture.widths, target.layers, keep)
            _silence_removed(dense, kept, _stored_buffers(twin.model))
        whole, part = (load_stock(folder, architecture.config.model_type) for folder in (dense, pruned))
    difference, way = differ(_answer_without(whole, part, twin.tokens, kept), answer(part, twin.tokens))
    if not difference <= TOLERANCE:
        raise UnsupportedError(
            f"The twin proof fails for {architecture.config.model_type}: pruning {', '.join(changed)} changes the "
            f"logits by {difference:.1e} of their size {way}, where the removed units are not read. "
            f"{_advice(architecture, traced, changed, prune, renumbers)}"
        )


class NoLogitsError(UnsupportedError):
    """A configuration whose models give no numbers, so that nothing can be proven of any width."""


def _check_logits(twin: Twin) -> None:
    """Make sure that there is something to compare, before the twin is pruned; one that does not run is told there.

    Raises:
        NoLogitsError: there is not.
    """
    try:
        with torch.no_grad():
            logits = twin.model(input_ids=twin.tokens, use_cache=False).logits
    except Exception:  # families fail in their own ways
        return
    if not logits.isfinite().all():
        raise NoLogitsError(
            f"A small {twin.architecture.config.model_type} model of this config.json gives no finite logits, so that "
            "nothing can be proven of it. Download config.json again."
        )


def _advice(architecture: Architecture, traced: Trace, changed: tuple[str, ...], prune: Prune, renumbers: bool) -> str:
    """What to do where the proof does not hold."""
    if not renumbers or "num_hidden_layers" not in changed:
        return "Prune other widths."
    try:
        prove(architecture, traced, changed, prune, False)
    except UnsupportedError:
        return "Prune other widths."
    return "What a layer computes follows its number here, so that only the last layers can go (--drop-layers)."


@dataclass(frozen=True)
class _Kept:
    """What a pruning left of the dense twin."""

    trace: Trace
    before: Widths
    layers: tuple[int, ...]
    keep: Keep


def half_of(architecture: Architecture, changed: tuple[str, ...], renumbers: bool = True) -> Target:
    """About half of each width to prune, within the rules; of the layers, all but one that has its like.

    Args:
        renumbers: whether that is an early one, so that others get new numbers, or the last of a kind.
    """
    before = architecture.widths
    groups, per_group = before.num_key_value_heads, before.heads_per_group
    if Width.GROUPS in changed:
        groups = max(1, groups // 2)
    if Width.HEADS in changed and per_group > 1:
        per_group = max(1, per_group // 2)
    heads = groups * per_group
    hidden = before.hidden_size
    if Width.HIDDEN in changed:
        hidden = heads * (hidden // (2 * heads)) if 0 < heads <= hidden // 2 else hidden // 2
    if architecture.hidden_follows_heads:
        hidden = heads * before.head_dim
    elif architecture.hidden_multiple_of_heads:
        hidden -= hidden % heads
    layers = tuple(range(before.num_hidden_layers))
    if Width.LAYERS in changed and len(layers) > 1:
        layers = _without_one(architecture, layers, renumbers)
    widths = replace(
        before,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        num_hidden_layers=len(layers),
        **{width: getattr(before, width) // 2 for width in (*NEURONS, Width.EXPERTS) if width in changed},
    )
    return Target(widths, layers, ())


def _without_one(architecture: Architecture, layers: tuple[int, ...], renumbers: bool) -> tuple[int, ...]:
    """All layers but one: the first that has its like behind it, or the last layer."""
    kinds = architecture.layer_kinds
    early = [layer for layer in layers if kinds[layer] in kinds[layer + 1 :]]
    order = (*early, *layers) if renumbers else (layers[-1], *reversed(early), *layers)
    choices = (tuple(other for other in layers if other != layer) for layer in order)
    return next(kept for kept in choices if can_keep_layers(architecture.config, kept))


def _keep_positive(twin: Twin) -> None:
    """Move the embeddings up, so that the sum over a token's channels stays positive, which `_silence_removed` uses."""
    with torch.no_grad():
        next(twin.model.get_input_embeddings().parameters()).add_(3.0)


def load_stock(folder: Path, family: str) -> PreTrainedModel:
    """A saved twin as stock software loads it, in float64.

    Raises:
        UnsupportedError: it does not, or not every tensor has its place.
    """
    from transformers import AutoModelForCausalLM

    loaded: Any
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float64,
            attn_implementation="eager",
            experts_implementation="eager",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are named
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


def _stored_buffers(model: PreTrainedModel) -> frozenset[str]:
    """The names on disk of what is stored beside the weights."""
    state = model.state_dict()
    return frozenset(on_disk(model, {name: own for name, own in model.named_buffers() if name in state}))


def _silence_removed(folder: Path, kept: _Kept, buffers: Collection[str]) -> None:
    """In a saved dense twin, zero whatever reads a removed head or neuron and all weights of a removed layer.

    What is stored beside the weights becomes one there: a scale of zero would silence all layers.

    The router's row of a removed expert, and what is added to its score, become so negative that no token with a
    positive sum over its channels picks it, or gives it weight in a softmax.
    """
    from safetensors.torch import load_file, save_file

    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            template, numbers = split_name(name)
            if numbers and numbers[0] not in kept.layers:
                tensor.fill_(name in buffers)
                continue
            for binding in kept.trace.on(template):
                reads = binding in kept.trace.readers
                routes = binding.width == Width.EXPERTS and Width.EXPERTS in kept.keep
                if tensor.ndim == 1 or tensor.numel() == tensor.shape[binding.axis]:  # what is added to the scores
                    routes &= name in buffers or tensor.ndim > 1
                else:
                    routes &= tensor.ndim == 2 and _is_router(kept.trace, template)
                if reads or routes:
                    mask = kept_mask(kept.trace, template, binding.axis, numbers, kept.keep, kept.before)
                    tensor.index_fill_(binding.axis, (~mask).nonzero().flatten(), 0 if reads else UNPICKED)
        save_file(tensors, path, metadata={"format": "pt"})


def _is_router(traced: Trace, template: str) -> bool:
    """Whether the tensor has a row of channels for every expert, and no neurons."""
    axes = {binding.axis: binding.width for binding in traced.on(template)}
    return axes.get(0) == Width.EXPERTS and axes.get(1) in (None, Width.HIDDEN) and template.endswith("weight")


def _answer_without(dense: PreTrainedModel, pruned: PreTrainedModel, tokens: torch.Tensor, kept: _Kept) -> Answers:
    """What the dense twin answers where norms see the kept elements only, and routers score no removed expert.

    The removed channels' embeddings are zero as well, for families that read the residual stream without a norm.
    """
    with torch.no_grad(), _norms_of_kept(dense, pruned, kept), _routers_of_kept(dense, kept):
        if channels := kept.keep.get(Width.HIDDEN, {}).get(Instance()):
            embedding = next(dense.get_input_embeddings().parameters())
            removed = torch.ones(embedding.shape[1], dtype=torch.bool)
            removed[torch.tensor(channels)] = False
            embedding[:, removed] = 0
        return answer(dense, tokens)


def _routers_of_kept(dense: PreTrainedModel, kept: _Kept) -> Products:
    """While active, routers give removed experts a score that no token picks, whatever the norm before them.

    In a norm that takes the mean away the sum over the channels, which `_silence_removed` relies on, has no sign.
    """

    def score(product: Product) -> torch.Tensor | None:
        chosen = kept.keep.get(Width.EXPERTS, {}).get(Instance(split_name(product.parameter)[1][0]))
        if chosen is None or product.result.shape[-1] != kept.before.num_experts:
            return None
        gone = torch.ones(kept.before.num_experts, dtype=torch.bool)
        gone[torch.tensor(chosen)] = False
        return product.result.masked_fill(gone, UNPICKED)

    routers = kept.trace.routers
    return Products(((name, own) for name, own in dense.named_parameters() if split_name(name)[0] in routers), score)


def _normed(traced: Trace, name: str, module: nn.Module) -> Binding | None:
    """The axis that a norm runs over: that of its weight, else of the channels; None for other modules.

    Args:
        name: of its weight on disk.
    """
    weight = getattr(module, "weight", None)
    if weight is not None:
        along = (binding for binding in traced.on(split_name(name)[0]) if weight.ndim == 1)
        return next((binding for binding in along if binding.axis == 0), None)
    if "Norm" in type(module).__name__ and not list(module.children()):
        return next((binding for binding in traced.of(Width.HIDDEN) if binding.is_global), None)
    return None


@contextmanager
def _norms_of_kept(model: PreTrainedModel, pruned: PreTrainedModel, kept: _Kept) -> Iterator[None]:
    """Let every norm of pruned elements see the kept ones only: the pruned norm with the dense one's weights."""
    small_modules, names, hooks = dict(pruned.named_modules()), vectors_on_disk(model), []
    for name, module in model.named_modules():
        numbers = split_name(name)[1]
        new = new_name(f"{name}.weight", kept.trace, renumbered(kept.layers), None)
        normed = _normed(kept.trace, names.get(f"{name}.weight", ""), module)
        if new is None or normed is None:
            continue
        mask = kept_mask(kept.trace, normed.template, normed.axis, numbers, kept.keep, kept.before)
        if bool(mask.all()):
            continue
        norm = copy.deepcopy(small_modules[new.removesuffix(".weight")])
        for parameter_name, parameter in norm.named_parameters(recurse=False):
            parameter.copy_(getattr(module, parameter_name)[mask])

        def replace_output(_: Any, inputs: Any, output: Any, norm: Any = norm, mask: Any = mask) -> Any:
            if output.shape[-1] != len(mask):
                return None
            result = torch.zeros_like(output)
            result[..., mask] = norm(inputs[0][..., mask])
            return result

        hooks.append(module.register_forward_hook(replace_output))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
