"""The proof that a pruning is right: prune a small twin for real and hold it against the dense one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmprune_cli.apply.reference.answers import answer, differ
from llmprune_cli.apply.reference.removal import Kept, answer_without, silence_removed, stored_buffers
from llmprune_cli.coupling.subject import Subject
from llmprune_cli.coupling.trace import Keep, Trace
from llmprune_cli.coupling.twin import NoLogitsError, Twin, build_twin, proof_sizes, run_twin
from llmprune_cli.errors import UnsupportedError
from llmprune_cli.family.architecture import Architecture, has_layers, most_heads
from llmprune_cli.family.kept_layers import check_kept_layers
from llmprune_cli.family.skeleton import expected_index
from llmprune_cli.family.widths import HEAD_COUNTS, NEURONS, Width
from llmprune_cli.folder.scratch import scratch_folder, scratch_space
from llmprune_cli.plan.requested_widths import Target

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 1e-4  # relative; RoPE, softmax and norms run in float32 inside a float64 model
OTHERS = "Prune other widths."
ONLY_LAST = "What a layer computes follows its number here, so that only the last layers can go (--drop-layers)."

Prune = Callable[[Path, Path, Trace, Architecture, Target], Keep]


class DifferingError(UnsupportedError):
    """A pruned twin answers otherwise than the dense one without the same units."""


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
    """Do what `compare` does, and where the two differ, find out what would hold instead.

    Raises:
        UnsupportedError: the proof does not hold, with the tensor, axis or width to blame, and what to do.
    """
    try:
        compare(architecture, traced, changed, prune, renumbers)
    except DifferingError as error:
        if renumbers and Width.LAYERS in changed and _holds(architecture, traced, changed, prune):
            raise UnsupportedError(f"{error} {ONLY_LAST}") from error
        raise UnsupportedError(f"{error} {OTHERS}") from error


def _holds(architecture: Architecture, traced: Trace, changed: tuple[str, ...], prune: Prune) -> bool:
    """Whether the same is proven if layers go from the end."""
    try:
        compare(architecture, traced, changed, prune, False)
    except UnsupportedError:
        return False
    return True


def compare(
    architecture: Architecture, traced: Trace, changed: tuple[str, ...], prune: Prune, renumbers: bool = True
) -> None:
    """Prune a twin of other sizes for real and hold the result against a dense model without the same units.

    The pruned twin must load through stock `AutoModelForCausalLM` with no missing, unexpected or mismatched key, and
    its logits must equal those of the dense twin in which whatever reads a removed unit is zero, every norm over a
    pruned axis sees the kept elements only, and removed layers pass on what they are given: of a batch, with padding
    and from a cache.

    Args:
        changed: the widths to prune together, names of `Widths` fields; without any there is nothing to prove.
        prune: prune a saved folder into another; returns the units kept, by width and instance.
        renumbers: whether layers that stay get other numbers, since one goes before them.

    Raises:
        DifferingError: the logits are others.
        UnsupportedError: it does not come to that, with the tensor, axis or width to blame.
    """
    if not changed:
        return
    drops_layers = Width.LAYERS in changed
    twin = build_twin(architecture, proof_sizes(architecture.config, drops_layers))
    traced = traced.limited_to((*changed, *(HEAD_COUNTS if not {*HEAD_COUNTS}.isdisjoint(changed) else ())))
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
            kept = Kept(traced, twin.architecture.widths, target.layers, keep)
            silence_removed(dense, kept, stored_buffers(twin.model))
        whole, part = (load_stock(folder, twin) for folder in (dense, pruned))
    difference, way = differ(answer_without(whole, part, twin.tokens, kept), answer(part, twin.tokens))
    if not difference <= TOLERANCE:
        raise DifferingError(
            f"The twin proof fails for {architecture.config.model_type}: pruning {', '.join(changed)} changes the "
            f"logits by {difference:.1e} of their size {way}, where the removed units are not read."
        )
    kinds = twin.architecture.layer_kinds
    if {kinds[layer] for layer in target.layers} != {*kinds}:  # the only layer of its kind went, and was not proven
        compare(architecture, traced, tuple(width for width in changed if width != Width.LAYERS), prune)


def _check_logits(twin: Twin) -> None:
    """Make sure that there is something to compare, before the twin is pruned; one that does not run is told there.

    Raises:
        NoLogitsError: there is not.
    """
    try:
        run_twin(twin)
    except NoLogitsError:
        raise
    except Exception:  # families fail in their own ways
        return


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
    heads = most_heads(architecture, groups, groups * per_group) if groups else 0
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
    found = next((kept for kept in choices if has_layers(architecture.config, kept)), None)
    if found is None:
        raise UnsupportedError(f"{architecture.config.model_type} has no layer that could go alone.")
    return found


def _keep_positive(twin: Twin) -> None:
    """Move the embeddings up, so that the sum over a token's channels stays positive, which `silence_removed` uses."""
    with torch.no_grad():
        next(twin.model.get_input_embeddings().parameters()).add_(3.0)


def load_stock(folder: Path, twin: Twin) -> PreTrainedModel:
    """A saved twin as stock software loads it, in the precision of the twin.

    Raises:
        UnsupportedError: it does not, or not every tensor has its place.
    """
    from transformers import AutoModelForCausalLM

    loaded: Any
    family = twin.architecture.config.model_type
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=twin.model.dtype,
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
    model.double() if twin.model.dtype == torch.float64 else model.float()
    model.eval()
    return model
