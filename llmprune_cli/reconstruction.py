"""Repair what a plan removes: solve the weights that read the removed units anew, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llmprune_cli.activations import reader_instance
from llmprune_cli.architecture import Widths
from llmprune_cli.calibration import CalibrationText
from llmprune_cli.checkpoint import Checkpoint, TensorEntry, open_shard
from llmprune_cli.errors import OutputError
from llmprune_cli.groups import Reader, Trace
from llmprune_cli.layerwise import Enough, Layer, LayeredModel
from llmprune_cli.least_squares import Moments, only, solve_reader
from llmprune_cli.loading import DTYPES
from llmprune_cli.names import split_name
from llmprune_cli.options import Listener, PruneOptions
from llmprune_cli.plan import Plan
from llmprune_cli.scoring import GROUPS, HEADS
from llmprune_cli.statefiles import copy_states, new_states
from llmprune_cli.subject import Subject
from llmprune_cli.workfolder import WorkFolder
from llmprune_cli.writer import fsync

if TYPE_CHECKING:
    import torch

    from llmprune_cli.products import Product, Watcher

DAMPING = 0.3  # of every refit, relative to the mean diagonal of the Gram matrix
PROBE_TOKENS = 8  # that show how a reader's result enters the residual stream
GRAM_BYTES = 2**30  # of the Gram matrices of experts that are gathered in one pass
UNPICKED = -1e30  # router logit of an expert that goes


@dataclass(frozen=True)
class Site:
    """A reader in one layer."""

    reader: Reader
    name: str  # of its parameter in the one-layer model
    scale: float | None  # its result enters the residual stream times this; None where it does not enter as it is


@dataclass(frozen=True)
class Streams:
    """Hidden states of the dense and of the pruned model, float32 [N, T, D]."""

    dense: torch.Tensor
    pruned: torch.Tensor
    fitted: int  # windows that are fitted; those behind them only pass through
    folder: Path | None = None  # of more of their kind, see `new_states`


@dataclass(frozen=True)
class LayerRepair:
    """How well a layer was repaired."""

    layer: int
    removal_error: float  # ‖y − Wx‖²/‖y‖² over its refitted readers, with removed inputs left out
    refit_error: float  # the same after the refit
    stream_error: float  # ‖ĥ − h‖²/‖h‖² of the residual stream behind the layer, pruned against dense


def refit(
    model: LayeredModel,
    trace: Trace,
    plan: Plan,
    streams: Streams,
    method: str,
    folder: Path | None,
    progress: Callable[[int], None],
    work: WorkFolder | None = None,
) -> tuple[Checkpoint, tuple[LayerRepair, ...]]:
    """Solve the readers of every layer anew, each layer seeing the pruned and refitted layers before it.

    `none`: nothing is solved; the streams show what removal alone does.
    `local`: each reader that loses inputs makes, from those that stay, what it would make from all of them.
    `residual`: every reader whose result enters the residual stream as it is makes what is missing there from the dense
    model's stream, so that it also makes up for the layers before it, for dropped ones too; the others as in `local`.
    What a mixer without a reader of this kind (latent attention, a state space) adds within the same layer is not seen.

    Args:
        streams: before the first layer; afterwards behind the last one.
        folder: where the new weights go, one file for each layer; None keeps no weights.
        progress: told after each layer.
        work: that remembers finished layers; the first that is not comes first.

    Returns:
        The checkpoint with the new weights in the old ones' place, at full size, and a report on each layer that stays.
    """
    both = (streams.dense, streams.pruned)
    done = work.last_layer(both) if work is not None else None
    first, reports = (done[0] + 1, [LayerRepair(**report) for report in done[1]]) if done else (0, [])
    progress(first)
    for number in range(first, model.layers):
        layer = model.load_layer(number)
        if number in plan.layers:
            layer_refit = _LayerRefit(layer, model, trace, plan, number, streams)
            reports.append(layer_refit.run(method))
            if method != "none" and folder is not None:
                layer_refit.store(folder)
        else:
            layer.advance(streams.dense)
        if work is not None:
            work.save_layer(number, [asdict(report) for report in reports], both)
        progress(1)
    return _with_stored(model.checkpoint, plan.layers, folder), tuple(reports)


def _with_stored(checkpoint: Checkpoint, layers: Sequence[int], folder: Path | None) -> Checkpoint:
    """The checkpoint with the weights in a folder, one file for each layer, in the place of its own."""
    found: dict[str, TensorEntry] = {}
    for path in (folder / layer_file(number) for number in layers) if folder is not None else ():
        if not path.exists():
            continue  # a layer without readers
        with open_shard(path) as file:
            names = list(file.keys())
        shard = str(path.absolute())
        found |= {name: replace(checkpoint.by_name[name], shard=shard, stored_name=None) for name in names}
    return replace(checkpoint, entries=tuple(found.get(entry.name, entry) for entry in checkpoint.entries))


def layer_file(number: int) -> str:
    """The name of the file that holds the new weights of a layer."""
    return f"layer-{number:05d}.safetensors"


def repair(
    subject: Subject,
    plan: Plan,
    options: PruneOptions,
    calibration: CalibrationText | None,
    work: WorkFolder | None,
    listener: Listener,
) -> tuple[Subject, tuple[LayerRepair, ...]]:
    """The subject with weights that make up for what the plan removes, and a report on each layer that stays.

    Args:
        work: where these weights lie; None where there is no calibration text.
    """
    import torch

    if options.refit == "none" or calibration is None or work is None:
        return subject, ()
    if "hidden_size" in plan.changed:
        listener.warn("The channels that go are cut after the refit, which does not make up for them.")
    model = subject.layered(options.layer_device)
    listener.stage(f"Refitting ({options.refit})", subject.widths.num_hidden_layers)
    with torch.inference_mode():
        start = model.embed(calibration.fitted, options.offload_dir)
        streams = Streams(start, copy_states(start, options.offload_dir), len(start), options.offload_dir)
        checkpoint, repairs = refit(
            model, subject.trace, plan, streams, options.refit, work.path, listener.advance, work
        )
    return replace(subject, checkpoint=checkpoint), repairs


@dataclass(frozen=True)
class _LayerRefit:
    """The refit of one layer."""

    layer: Layer
    whole: LayeredModel
    trace: Trace
    plan: Plan
    number: int
    streams: Streams

    def run(self, method: str) -> LayerRepair:
        """Refit all readers, in the order in which they run, and take both streams through the layer."""
        found = find_sites(self.layer, self.trace, self.streams.dense.shape[-1])
        aims = [site for site in found if site.scale is not None] if method == "residual" else []
        goals = _advance_dense(self.layer, aims, self.streams)
        self._silence_biases()
        errors: list[_Errors] = []
        for position, site in enumerate(found):
            if method == "none":
                self._drop_inputs(site)
            elif site.name in goals:
                moments: dict[int | None, Moments] = {
                    None: self._moments_towards(goals.pop(site.name), site, found[:position])
                }
                errors += self._solve(site, moments)
            else:
                for experts in self._chunks(site):
                    errors += self._solve(site, self._own_moments(site, experts))
        self.layer.advance(self.streams.pruned, lambda first, batch: self._silence)
        total = sum(error.total for error in errors) or 1.0
        return LayerRepair(
            self.number,
            sum(error.removal for error in errors) / total,
            sum(error.refit for error in errors) / total,
            relative_distance(self.streams.pruned, self.streams.dense),
        )

    def store(self, folder: Path) -> None:
        """Write the readers as they are on disk."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        tensors = {}
        for name, tensor in self.layer.stored().items():
            real = self._real_name(name)
            if real is not None:
                tensors[real] = tensor.to("cpu", torch_dtype(self.whole.checkpoint.by_name[real].dtype)).contiguous()
        if not tensors:
            return
        path = folder / layer_file(self.number)
        try:
            save_file(tensors, path)
            fsync(path)
        except (OSError, SafetensorError) as error:
            raise OutputError(f"{path} cannot be written: {error}. Make room, or choose another --output.") from error

    def _real_name(self, name: str) -> str | None:
        """The name in the checkpoint of a tensor of a reader; None for any other tensor."""
        template, numbers = split_name(name)
        if template not in {binding.template for binding in self.trace.readers}:
            return None
        return template.format(self.number, *numbers[1:])

    def _matrix(self, site: Site, expert: int | None) -> torch.Tensor:
        """A view of the reader's weight, [outputs, inputs]."""
        weight = self.layer.model.get_parameter(site.name).detach()
        last = site.reader.axis == weight.ndim - 1
        matrix = weight if expert is None else weight[expert]
        return matrix if last else matrix.T

    def _kept(self, site: Site, expert: int | None) -> torch.Tensor:
        size = self._matrix(site, expert).shape[1]
        return kept_inputs(
            self.whole.architecture.widths, self.trace, self.plan, site.reader, self.number, expert, size
        )

    def _experts(self, site: Site) -> Sequence[int | None]:
        weight = self.layer.model.get_parameter(site.name)
        if weight.ndim == 2:
            return (None,)
        chosen = self.plan.keep.get("num_experts", {}).get(str(self.number))
        return range(len(weight)) if chosen is None else chosen

    def _chunks(self, site: Site) -> Iterator[Sequence[int | None]]:
        """The experts that lose inputs, as many at a time as their Gram matrices may take memory."""
        losing = [e for e in self._experts(site) if len(self._kept(site, e)) < self._matrix(site, e).shape[1]]
        size = self._matrix(site, self._experts(site)[0]).shape[1]
        each = max(1, GRAM_BYTES // (8 * size * size))
        for first in range(0, len(losing), each):
            yield losing[first : first + each]

    def _drop_inputs(self, site: Site) -> None:
        for expert in self._experts(site):
            matrix, kept = self._matrix(site, expert), self._kept(site, expert)
            matrix.copy_(only(matrix, kept))

    def _solve(self, site: Site, moments: dict[int | None, Moments]) -> list[_Errors]:
        """Solve a reader anew, round it as the checkpoint will, and say how well it does."""
        errors = []
        dtype = self._stored_dtype(site)
        for expert, own in moments.items():
            matrix, kept = self._matrix(site, expert), self._kept(site, expert)
            removal = own.error(only(matrix, kept))
            matrix.copy_(solve_reader(own, matrix, kept, DAMPING).to(dtype))
            errors.append(_Errors(removal, own.error(matrix), own.total))
        return errors

    def _stored_dtype(self, site: Site) -> torch.dtype:
        """The dtype on disk of the tensors that a reader is made of."""
        reader = site.reader
        widths = (HEADS, GROUPS) if reader.width == HEADS else (reader.width,)
        own = (b for b in self.trace.readers if b.width in widths and b.component == reader.component)
        templates = {binding.template for binding in own}
        for entry in self.whole.checkpoint.entries:
            template, numbers = split_name(entry.name)
            if template in templates and numbers[0] == self.number:
                return torch_dtype(entry.dtype)
        raise AssertionError(f"{site.name} is not on disk")

    def _moments_towards(self, goal: torch.Tensor, site: Site, earlier: Sequence[Site]) -> Moments:
        """Moments of a reader that has to make what is missing in the pruned stream from a goal, [fitted, T, D]."""
        size = self._matrix(site, None).shape[1]
        moments = Moments.zero(goal.shape[-1], size, self.layer.device)
        scales = {other.name: other.scale for other in earlier if other.scale is not None}

        def watcher_of(first: int, batch: torch.Tensor) -> Watcher:
            stream = batch.clone()

            def watch(seen: Product) -> torch.Tensor | None:
                if seen.parameter in scales:
                    stream.add_(seen.result.to(stream.device).view(stream.shape), alpha=scales[seen.parameter])
                if seen.parameter != site.name:
                    return self._silence(seen)
                missing = (goal[first : first + len(batch)] - stream).flatten(0, -2) / (site.scale or 1.0)
                missing = missing.to(seen.values.device)
                moments.add(seen.values.reshape(-1, size), missing if seen.bias is None else missing - seen.bias)
                raise Enough

            return watch

        self.layer.observe(self.streams.pruned[: self.streams.fitted], watcher_of)
        return moments

    def _own_moments(self, site: Site, experts: Sequence[int | None]) -> dict[int | None, Moments]:
        """Moments of readers that have to make from the kept inputs what they make from all of them."""
        sizes = self._matrix(site, experts[0]).shape
        moments = {expert: Moments.zero(sizes[0], sizes[1], self.layer.device) for expert in experts}

        def watch(seen: Product) -> torch.Tensor | None:
            if seen.parameter != site.name:
                return self._silence(seen)
            if seen.expert in moments:
                moments[seen.expert].add(seen.values.reshape(-1, sizes[1]), None)
            return None

        self.layer.observe(self.streams.pruned[: self.streams.fitted], lambda first, batch: watch)
        for expert, own in moments.items():
            own.aim_at(self._matrix(site, expert))
        return moments

    def _silence_biases(self) -> None:
        """Keep the router from picking an expert that goes by a bias that it adds behind its scores."""
        chosen = self.plan.keep.get("num_experts", {}).get(str(self.number))
        for buffer in self.layer.block.buffers():
            if chosen is not None and buffer.shape == (self.whole.architecture.widths.num_experts,):
                kept = buffer[list(chosen)].clone()
                buffer.fill_(UNPICKED)[list(chosen)] = kept

    def _silence(self, seen: Product) -> torch.Tensor | None:
        """A watcher under which no token picks an expert that goes."""
        import torch

        chosen = self.plan.keep.get("num_experts", {}).get(str(self.number))
        if chosen is None or seen.parameter not in {name.replace("{}", "0", 1) for name in self.trace.routers}:
            return None
        gone = torch.ones(seen.result.shape[-1], dtype=torch.bool, device=seen.result.device)
        gone[list(chosen)] = False
        return seen.result.masked_fill(gone, UNPICKED)


@dataclass(frozen=True)
class _Errors:
    """Squared errors of one reader."""

    removal: float
    refit: float
    total: float  # ‖y‖²


def relative_distance(stream: torch.Tensor, other: torch.Tensor) -> float:
    """‖a − b‖²/‖b‖²."""
    import torch

    gaps = sum(float((a - b).square().sum(dtype=torch.float64)) for a, b in zip(stream, other, strict=True))
    return gaps / sum(float(b.square().sum(dtype=torch.float64)) for b in other)


def torch_dtype(code: str) -> torch.dtype:
    """safetensors' name of a dtype to torch's."""
    import torch

    names = {"F64": "float64", **{short: name for name, short in DTYPES.items()}}
    dtype: torch.dtype = getattr(torch, names[code])
    return dtype


def find_sites(layer: Layer, trace: Trace, hidden_size: int) -> list[Site]:
    """The readers that a layer has, in the order in which they run, and how each enters the residual stream.

    Measured on a few random hidden states: with the results of all readers but one set to zero, that one is changed,
    and the output of the layer has to change by the same times a constant.
    """
    import torch

    readers = {r.parameter.replace("{}", "0", 1): r for r in trace.inputs if layer.has(r.parameter)}
    order: dict[str, int] = {}
    generator = torch.Generator().manual_seed(0)
    probe, noise = (torch.randn(1, PROBE_TOKENS, hidden_size, generator=generator) for _ in range(2))

    def respond(changed: str | None) -> torch.Tensor:
        def watch(seen: Product) -> torch.Tensor | None:
            if seen.parameter not in readers or seen.axis != readers[seen.parameter].axis:
                return None
            order.setdefault(seen.parameter, len(order))
            fits = seen.parameter == changed and seen.result.numel() == noise.numel()
            return noise.to(seen.result.device).view(seen.result.shape) if fits else torch.zeros_like(seen.result)

        output = layer.run(probe, watch)
        if output is None:
            raise AssertionError("a probed layer did not run to its end")
        return output

    quiet, found = respond(None), []
    for name in sorted(order, key=order.__getitem__):
        scale = None
        if layer.model.get_parameter(name).ndim == 2:
            change = respond(name) - quiet
            ratio = float((change * noise).sum() / noise.square().sum())
            largest = float((change - ratio * noise).abs().max())
            scale = ratio if ratio and largest < 1e-3 * abs(ratio) * float(noise.abs().max()) else None
        found.append(Site(readers[name], name, scale))
    return found


def _advance_dense(layer: Layer, aims: list[Site], streams: Streams) -> dict[str, torch.Tensor]:
    """The dense stream through the layer; what it is behind each reader that enters it as it is, [fitted, T, D]."""
    fitted = streams.fitted
    goals = {site.name: new_states(streams.dense[:fitted].shape, streams.folder) for site in aims}
    scales = {site.name: site.scale or 0.0 for site in aims}

    def watcher_of(first: int, batch: torch.Tensor) -> Watcher:
        stream, rows = batch.clone(), max(0, fitted - first)

        def watch(seen: Product) -> None:
            if seen.parameter in goals and rows:
                stream.add_(seen.result.to(stream.device).view(stream.shape), alpha=scales[seen.parameter])
                goals[seen.parameter][first : first + len(batch)] = stream[:rows]

        return watch

    layer.advance(streams.dense, watcher_of)
    return goals


def kept_inputs(
    widths: Widths, trace: Trace, plan: Plan, reader: Reader, number: int, expert: int | None, size: int
) -> torch.Tensor:
    """Which of a reader's inputs a plan keeps, sorted indices."""
    import torch

    units = plan.keep.get(reader.width, {}).get(reader_instance(trace, reader, number, expert))
    if units is None:
        return torch.arange(size)
    stays = torch.zeros(getattr(widths, reader.width), dtype=torch.bool)
    stays[list(units)] = True
    times = size // len(stays)
    along = stays.repeat_interleave(times) if reader.width == HEADS else stays.repeat(times)
    indices: torch.Tensor = along.nonzero().flatten()
    return indices
