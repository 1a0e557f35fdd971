"""The refit of one layer: what reads removed units is solved anew, reader by reader."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.linalg import vector_norm

from llmprune_cli.coupling.trace import Instance, Reader, reader_instance
from llmprune_cli.errors import CheckpointError, OutputError
from llmprune_cli.family.widths import HEAD_COUNTS, Width
from llmprune_cli.folder.documents import fsync
from llmprune_cli.folder.shards import check_finite
from llmprune_cli.folder.tensors import DTYPES, split_name
from llmprune_cli.plan.document import Plan
from llmprune_cli.processes import ALONE, Processes
from llmprune_cli.repair.dense_goals import Streams, StreamWithin, advance_dense, sites_of
from llmprune_cli.repair.least_squares import DAMPING, Moments, only, solve_reader
from llmprune_cli.repair.replay import Inputs, Replay
from llmprune_cli.repair.sites import Site, Uses, expert_bias
from llmprune_cli.run.layer import Enough, Layer, batches, check_states
from llmprune_cli.run.layered_model import LayeredModel
from llmprune_cli.run.norms import see_kept_units
from llmprune_cli.run.precision.rounding import rounding_to

if TYPE_CHECKING:
    from llmprune_cli.coupling.products import Product

GRAM_BYTES = 2**30  # of the Gram matrices of experts that are gathered in one pass
UNPICKED = -1e30  # router logit of an expert that goes


@dataclass(frozen=True)
class LayerRepair:
    """How well a layer was repaired."""

    layer: int
    removal_error: float  # ‖y − Wx‖²/‖y‖² over its refitted readers, with removed inputs left out
    refit_error: float  # the same after the refit
    stream_error: float  # ‖ĥ − h‖²/‖h‖² of the residual stream behind the layer, pruned against dense


@dataclass(frozen=True)
class LayerRefit:
    """The refit of one layer."""

    layer: Layer
    whole: LayeredModel
    plan: Plan
    number: int
    streams: Streams
    with_errors: bool = True  # whether those of its readers are wanted, which cost as much as their solution
    exact: dict[str, torch.Tensor] = field(default_factory=dict)  # see `_exact_parameter`
    following: list[str] = field(default_factory=list)  # readers that were made to follow the residual stream

    def run(self, method: str) -> LayerRepair:
        """Refit all readers, in the order in which they run, and take both streams through the layer."""
        found = sites_of(self.whole, self.layer, self.number, self.streams.kept)
        goals = advance_dense(self.layer, self.number, found if method == "residual" else [], self.streams)
        check_states(self.streams.dense, f"Layer {self.number}")
        self._remove_unread()
        errors: list[_Errors] = []
        replay = Replay(self.layer, self.streams.pruned, self.streams.folder)
        for position, site in enumerate(found):
            if method == "none":
                self._drop_inputs(site)
                continue
            goal, recorded = goals.pop(site.name, None), replay.recorder(site)
            self.following.extend([site.name] if goal is not None else [])
            for experts in self._chunks(site, with_all=goal is not None):
                errors += self._solve(site, self._moments(site, experts, found[:position], goal, replay, recorded))
            if recorded is not None:
                replay.learn(recorded)
        self._advance_pruned(replay)
        total = sum(error.total for error in errors) or 1.0
        return LayerRepair(
            self.number,
            sum(error.removal for error in errors) / total,
            sum(error.refit for error in errors) / total,
            relative_distance(self.streams.pruned, self.streams.dense, self.whole.processes),
        )

    def only_remove(self) -> None:
        """Take the stream of the pruned model through the layer without the units that go."""
        self._remove_unread()
        for reader in self.whole.trace.inputs:
            if self.layer.has(reader.parameter):
                self._drop_inputs(Site(reader, reader.parameter.replace("{}", "0", 1), None, False))
        self._advance_pruned(Replay(self.layer, self.streams.pruned, self.streams.folder))

    def _advance_pruned(self, replay: Replay) -> None:
        for first, batch in batches(self.streams.pruned):
            with replay.answering(first, len(batch)):
                output = self.layer.run(batch, self._silence)
            assert output is not None
            batch.copy_(output)

    def store(self, folder: Path) -> None:
        """Write the readers as they are on disk."""
        for name, tensor in self.exact.items():
            self.layer.model.get_parameter(name).data = tensor
        tensors = {}
        for name, tensor in self.layer.stored().items():
            real = self._real_name(name)
            if real is not None and not self._was_only_rounded(real, tensor):
                tensors[real] = tensor.to("cpu", DTYPES[self.whole.checkpoint.by_name[real].dtype].torch).contiguous()
        if tensors:
            store_layer(folder, self.number, tensors)

    def _was_only_rounded(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether nothing was done to a tensor but that the computation has fewer digits than the checkpoint."""
        entry, compute = self.whole.checkpoint.by_name[name], self.layer.compute
        if DTYPES[entry.dtype].torch.itemsize <= compute.itemsize:
            return False
        ((_, original),) = replace(self.whole.checkpoint, entries=(entry,)).tensors()
        return torch.equal(original.to(compute).float(), tensor.cpu().float())

    def _real_name(self, name: str) -> str | None:
        """The name in the checkpoint of a tensor of a reader that can be solved; None for any other tensor."""
        template, numbers = split_name(name)
        trace, solved = self.whole.trace, {(own.width, own.component) for own in self.whole.trace.inputs}
        solved |= {(width, component) for own, component in solved if own == Width.HEADS for width in HEAD_COUNTS}
        if template not in {own.template for own in trace.readers if (own.width, own.component) in solved}:
            return None
        return template.format(self.number, *numbers[1:])

    def _exact_parameter(self, name: str) -> torch.Tensor:
        """What is written of a parameter, where that has more digits than the computation."""
        if name not in self.exact:
            self.exact[name] = self.layer.model.get_parameter(name).detach().float()
        return self.exact[name]

    def _matrix(self, site: Site, expert: int | None) -> torch.Tensor:
        """A view of the reader's weight, [outputs, inputs]."""
        return self._matrix_of(self.layer.model.get_parameter(site.name).detach(), site, expert)

    def _matrix_of(self, weight: torch.Tensor, site: Site, expert: int | None) -> torch.Tensor:
        last = site.reader.axis == weight.ndim - 1
        matrix = weight if expert is None else weight[expert]
        return matrix if last else matrix.T

    def _kept(self, site: Site, expert: int | None) -> torch.Tensor:
        size = self._matrix(site, expert).shape[1]
        return kept_inputs(self.whole, self.plan, site.reader, self.number, expert, size)

    def _experts(self, site: Site) -> Sequence[int | None]:
        weight = self.layer.model.get_parameter(site.name)
        if weight.ndim == 2:
            return (None,)
        chosen = self.plan.keep.get(Width.EXPERTS, {}).get(Instance(self.number))
        return range(len(weight)) if chosen is None else chosen

    def _chunks(self, site: Site, with_all: bool) -> Iterator[Sequence[int | None]]:
        """The experts that lose inputs, or all of them, as many at a time as their Gram matrices may take memory."""
        losing = [
            e for e in self._experts(site) if with_all or len(self._kept(site, e)) < self._matrix(site, e).shape[1]
        ]
        kept = max((len(self._kept(site, expert)) for expert in losing), default=0)
        each = max(1, GRAM_BYTES // (8 * max(1, kept) * (kept + len(self._matrix(site, self._experts(site)[0])))))
        for first in range(0, len(losing), each):
            yield losing[first : first + each]

    def _drop_inputs(self, site: Site) -> None:
        for expert in self._experts(site):
            matrix, kept = self._matrix(site, expert), self._kept(site, expert)
            matrix.copy_(only(matrix, kept))

    def _solve(self, site: Site, moments: dict[int | None, Moments]) -> list[_Errors]:
        """Solve a reader anew: from the kept inputs it has to make what it makes from all, and what is missing.

        It is rounded as the checkpoint will round it, and what comes back says how well it does.

        The first process does; the others are given the weights.

        Raises:
            CheckpointError: float32 cannot hold what it reads.
            VerificationError: the dtype on disk cannot hold what is solved.
        """
        errors = []
        dtype = self._stored_dtype(site)
        template, numbers = split_name(site.name)
        name = template.format(self.number, *numbers[1:])
        for expert, own in moments.items():
            matrix = self._matrix(site, expert)
            if self.whole.processes.is_first:
                if not own.is_finite:
                    raise CheckpointError(
                        f"What {name} reads is too large for float32: weights of that layer are damaged. Download the "
                        "checkpoint again."
                    )
                removal = own.error(matrix) if self.with_errors else 0.0
                solved = solve_reader(own, matrix.float(), DAMPING).to(dtype)
                check_finite(name, solved)
                matrix.copy_(solved)
                if dtype.itemsize > self.layer.compute.itemsize:
                    self._matrix_of(self._exact_parameter(site.name), site, expert).copy_(solved)
                refit = own.error(matrix) if self.with_errors else 0.0
                errors.append(_Errors(removal, refit, own.total))
            self.whole.processes.copy_from_first_(matrix)
        return errors

    def _stored_dtype(self, site: Site) -> torch.dtype:
        """The dtype on disk of the tensors that a reader is made of."""
        reader = site.reader
        widths = HEAD_COUNTS if reader.width == Width.HEADS else (reader.width,)
        own = (b for b in self.whole.trace.readers if b.width in widths and b.component == reader.component)
        templates = {binding.template for binding in own}
        for entry in self.whole.checkpoint.entries:
            template, numbers = split_name(entry.name)
            if template in templates and numbers[0] == self.number:
                return DTYPES[entry.dtype].torch
        raise AssertionError(f"{site.name} is not on disk")

    def _moments(
        self,
        site: Site,
        experts: Sequence[int | None],
        earlier: Sequence[Site],
        goal: torch.Tensor | None,
        replay: Replay,
        recorded: Inputs | None,
    ) -> dict[int | None, Moments]:
        """Moments of readers: of what they are given, and of what they have to make of it.

        Args:
            earlier: readers that run before this one.
            goal: the dense stream behind the reader [fitted, T, D]; None where nothing is made up for.
            recorded: what keeps the inputs of all windows, also of those that only pass through.
        """
        outputs, bias = len(self._matrix(site, experts[0])), expert_bias(self.layer, site.name)
        moments = {expert: Moments.zero(outputs, self._kept(site, expert), self.layer.device) for expert in experts}
        is_enough = None in moments and (goal is None or not site.ends_layer)
        is_left_out, fitted = goal is not None and replay.can_be_left_out(site), self.streams.fitted
        followed = earlier if is_left_out else (*earlier, site)
        passing = ((fitted + first, batch) for first, batch in batches(self.streams.pruned[fitted:]) if recorded)
        for first, batch in (*batches(self.streams.pruned[:fitted]), *passing):
            stream, uses = StreamWithin(batch, followed), Uses(site.name, moments, bias)

            def watch(seen: Product, stream: StreamWithin = stream, uses: Uses = uses) -> torch.Tensor | None:
                stream.watch(seen)
                if uses.watch(seen) and is_enough and recorded is None:
                    raise Enough
                return self._silence(seen)

            record = replay.recording(recorded, first, uses.products, is_enough) if recorded else nullcontext()
            left_out = replay.leaving_out(site, watch) if is_left_out else nullcontext()
            with replay.answering(first, len(batch), stream.add), record, left_out:
                output = self.layer.run(batch, watch, uses.collect)
            if first >= fitted:
                continue
            aims = uses.as_they_are()
            if goal is not None and site.entry is not None:
                missing = goal[first : first + len(batch)] - (stream.states if output is None else output)
                aims = site.entry.corrections(uses, missing.flatten(0, 1).to(self.layer.device))
            with rounding_to(self.layer.compute):
                for expert, values, aim in aims:
                    moments[expert].add(values, aim)
        for own in moments.values():
            own.add_up(self.whole.processes)
        return moments

    def _remove_unread(self) -> None:
        """Take out what goes, but for what weights read that can make up for it."""
        self._silence_biases()
        see_kept_units(self.whole, self.layer, self.number, self.plan.keep)
        for reader in self.whole.trace.joint:
            if self.layer.has(reader.parameter):
                weight = self.layer.model.get_parameter(reader.parameter.replace("{}", "0", 1)).detach()
                size = weight.shape[reader.axis]
                gone = torch.ones(size, dtype=torch.bool)
                gone[kept_inputs(self.whole, self.plan, reader, self.number, None, size)] = False
                weight.index_fill_(reader.axis, gone.nonzero().flatten().to(weight.device), 0)

    def _silence_biases(self) -> None:
        """Keep the router from picking an expert that goes by a bias that it adds behind its scores."""
        chosen = self.plan.keep.get(Width.EXPERTS, {}).get(Instance(self.number))
        for buffer in self.layer.block.buffers():
            if chosen is not None and buffer.shape == (self.whole.widths.num_experts,):
                kept = buffer[list(chosen)].clone()
                buffer.fill_(UNPICKED)[list(chosen)] = kept

    def _silence(self, seen: Product) -> torch.Tensor | None:
        """A watcher under which no token picks an expert that goes."""
        chosen = self.plan.keep.get(Width.EXPERTS, {}).get(Instance(self.number))
        if chosen is None or seen.parameter not in {name.replace("{}", "0", 1) for name in self.whole.trace.routers}:
            return None
        gone = torch.ones(seen.result.shape[-1], dtype=torch.bool, device=seen.result.device)
        gone[list(chosen)] = False
        return seen.result.masked_fill(gone, UNPICKED)


def layer_file(number: int) -> str:
    """The name of the file that holds the new weights of a layer."""
    return f"layer-{number:05d}.safetensors"


def store_layer(folder: Path, number: int, tensors: dict[str, torch.Tensor]) -> None:
    """Write the new weights of a layer, by their names on disk.

    Raises:
        OutputError: they cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = folder / layer_file(number)
    try:
        save_file(tensors, path)
        fsync(path)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{path} cannot be written: {error}. Make room, or choose another --output.") from error


@dataclass(frozen=True)
class _Errors:
    """Squared errors of one reader."""

    removal: float
    refit: float
    total: float  # ‖y‖²


def relative_distance(stream: torch.Tensor, other: torch.Tensor, processes: Processes = ALONE) -> float:
    """‖a − b‖²/‖b‖² over the windows of all processes."""
    gaps = whole = 0.0
    for first, batch in batches(other):
        gaps += float(vector_norm(stream[first : first + len(batch)] - batch, dtype=torch.float64)) ** 2
        whole += float(vector_norm(batch, dtype=torch.float64)) ** 2
    gaps, whole = processes.add_up(gaps, whole)
    return gaps / whole


def kept_inputs(
    model: LayeredModel, plan: Plan, reader: Reader, number: int, expert: int | None, size: int
) -> torch.Tensor:
    """Which of a reader's inputs a plan keeps, sorted indices."""
    units = plan.keep.get(reader.width, {}).get(reader_instance(model.trace, reader, number, expert))
    if units is None:
        return torch.arange(size)
    stays = torch.zeros(getattr(model.widths, reader.width), dtype=torch.bool)
    stays[list(units)] = True
    times = size // len(stays)
    along = stays.repeat_interleave(times) if reader.width in HEAD_COUNTS else stays.repeat(times)
    indices: torch.Tensor = along.nonzero().flatten()
    return indices
