"""Repair what a plan removes: solve the weights that read the removed units anew, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import TypeAlias

import torch

from llmprune_cli.coupling.subject import Subject
from llmprune_cli.coupling.trace import Reader
from llmprune_cli.family.widths import HEAD_COUNTS, Width
from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.folder.shards import open_shard
from llmprune_cli.folder.tensors import TensorEntry
from llmprune_cli.journal.journal import Journal
from llmprune_cli.plan.document import Plan
from llmprune_cli.repair.dense_goals import Streams, advance_dense, walk_dense
from llmprune_cli.repair.layer_refit import LayerRefit, LayerRepair, layer_file
from llmprune_cli.run.layer import Layer, check_states
from llmprune_cli.run.layered_model import LayeredModel
from llmprune_cli.run.workbench import Workbench

Refitter: TypeAlias = Callable[[Layer, LayeredModel, Plan, int, Streams, bool], LayerRefit]  # as `LayerRefit` is made


def repair(
    bench: Workbench, plan: Plan, method: str, refitter: Refitter = LayerRefit
) -> tuple[Subject, tuple[LayerRepair, ...]]:
    """The subject with weights that make up for what the plan removes, and a report on each layer that stays.

    Args:
        method: see `refit`. The new weights lie where the journal is.
        refitter: see `refit`.
    """
    model, text, subject = bench.model, bench.text, bench.model.subject
    if method == "none" or text is None:
        return subject, ()
    if "hidden_size" in plan.changed:
        bench.listener.warn("The channels that go are cut after the refit, which does not make up for them.")
    warn = bench.listener.warn
    if together := _read_together(model, plan):
        warn(f"Several weights read {', '.join(together)} together: none of them is refitted for what goes there.")
    bench.listener.stage(f"Refitting ({method})", model.layers)
    with torch.inference_mode():
        windows, folder = model.share(text.fitted), bench.offload_dir
        if bench.serves_several:
            walk_dense(model, windows, bench.dense, lambda layers: None)
        kept, start = bench.dense.covering(windows), model.embed(windows, folder)
        streams = Streams.of(model, start, len(start), folder, kept)
        repairs = refit(model, plan, streams, method, bench.listener.advance, bench.journal, True, refitter, warn)
    checkpoint = with_new_weights(model.checkpoint, plan.layers, bench.journal)
    return replace(subject, checkpoint=checkpoint), repairs


def _read_together(model: LayeredModel, plan: Plan) -> list[str]:
    """The widths that a plan changes, and whose units no weight alone can make up for."""
    alone = {_unit(reader) for reader in model.trace.inputs}
    return sorted({str(r.width) for r in model.trace.joint if _unit(r) not in alone} & {*plan.changed})


def _unit(reader: Reader) -> tuple[str, int]:
    """What a reader reads; that of query heads reads their KV groups."""
    return Width.HEADS if reader.width in HEAD_COUNTS else reader.width, reader.component


def refit(
    model: LayeredModel,
    plan: Plan,
    streams: Streams,
    method: str,
    progress: Callable[[int], None],
    journal: Journal | None = None,
    with_errors: bool = True,
    refitter: Refitter = LayerRefit,
    warn: Callable[[str], None] = lambda message: None,
) -> tuple[LayerRepair, ...]:
    """Solve the readers of every layer anew, each layer seeing the pruned and refitted layers before it.

    `none`: nothing is solved; the streams show what removal alone does.
    `local`: each reader that loses inputs makes, from those that stay, what it would make from all of them.
    `residual`: every reader whose result is known to enter the residual stream (see `Entry`) also makes what is missing
    there from the dense model's stream, so that it makes up for the layers before it, for dropped ones too; the others
    as in `local`. What a mixer without a reader (latent attention, a state space) adds is seen behind the layer only.
    Layers that the plan protects stay as they are.

    Args:
        streams: before the first layer; afterwards behind the last one.
        progress: told after each layer.
        journal: that keeps the new weights, one file for each layer, and remembers finished layers: the first that is
            not comes first. None keeps nothing.
        with_errors: whether to report on single readers; without, their errors are 0.
        refitter: what refits a layer.
        warn: told once where no reader of any layer follows the residual stream, although that is the method.

    Returns:
        A report on each layer that stays.
    """
    both = (streams.dense, streams.pruned)
    done = journal.last_layer(both) if journal is not None else None
    first, reports = (done[0] + 1, [LayerRepair(**report) for report in done[1]]) if done else (0, [])
    progress(first)
    follows: list[bool] = []
    for number in range(first, model.layers):
        layer = model.load_layer(number)
        if number in plan.layers:
            layer_refit = refitter(layer, model, plan, number, streams, with_errors)
            own = "none" if number in plan.protected else method
            reports.append(layer_refit.run(own))
            if own == "residual":
                follows.append(bool(layer_refit.following))
            if own != "none" and journal is not None and journal.folder is not None:
                layer_refit.store(journal.folder)
        else:
            advance_dense(layer, number, (), streams)
            check_states(streams.dense, f"Layer {number}")
        if journal is not None:
            is_last = number + 1 == model.layers
            journal.save_layer(number, [asdict(report) for report in reports], both, is_last)
        progress(1)
    if follows and not any(follows):
        warn(
            f"How the weights of {model.architecture.config.model_type} enter the residual stream is not known, so "
            "that nothing makes up for dropped layers and earlier errors: --refit residual is the same as local."
        )
    return tuple(reports)


def with_new_weights(checkpoint: Checkpoint, layers: Sequence[int], journal: Journal) -> Checkpoint:
    """The checkpoint with the weights that a journal keeps, one file for each layer, in the place of its own."""
    found: dict[str, TensorEntry] = {}
    folder = journal.folder
    for path in (folder / layer_file(number) for number in layers) if folder is not None else ():
        if not path.exists():
            continue  # a layer without readers
        with open_shard(path) as file:
            names = list(file.keys())
        shard = str(path.absolute())
        found |= {name: replace(checkpoint.by_name[name], shard=shard, stored_name=None) for name in names}
    return replace(checkpoint, entries=tuple(found.get(entry.name, entry) for entry in checkpoint.entries))
