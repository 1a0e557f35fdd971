"""Run a layer again without running those of its parts whose results are known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmprune_cli.coupling.products import Product
from llmprune_cli.repair.sites import Site
from llmprune_cli.run.layer import Enough, Layer, batches, packed, running_as, unpacked
from llmprune_cli.run.precision import multiplying_in
from llmprune_cli.run.states import new_states

KEPT_BYTES = 2**29  # of a reader's inputs that are kept in memory; in a folder there may be more


@dataclass
class Inputs:
    """What a reader is given, which is the last thing that its part of the layer does."""

    site: Site
    part: str  # the child of the layer that ends with it, by name
    values: torch.Tensor | None = None  # [N, T, U]; None before the first batch, or where they are not kept
    output_items: int = 0  # of what the part returns, hidden states first; 0 where these come alone


class Replay:
    """The parts of one layer whose results are known for all windows of a stream."""

    def __init__(self, layer: Layer, stream: torch.Tensor, folder: Path | None) -> None:
        """Of a layer that is run over a stream [N, T, D].

        Args:
            folder: of what is kept, see `new_states`.
        """
        self._layer, self._stream, self._folder = layer, stream, folder
        self._known: dict[str, tuple[Site, torch.Tensor, int]] = {}  # by part: results [N, T, D], and returned items

    @contextmanager
    def answering(
        self, first: int, count: int, tell: Callable[[str, torch.Tensor], None] = lambda name, result: None
    ) -> Iterator[None]:
        """While active, parts with known results give these, those of windows from `first` on.

        Args:
            tell: what to call with a reader's parameter and result, [count, T, D], when its part is asked.
        """
        with ExitStack() as stack:
            for part, (site, results, items) in self._known.items():
                rows = results[first : first + count].to(self._layer.device)
                module = self._layer.block.get_submodule(part)
                stack.enter_context(running_as(module, _giving(rows, items, site.name, tell)))
            yield

    def recorder(self, site: Site) -> Inputs | None:
        """What keeps a reader's inputs; None where its result alone is not what its part of the layer gives."""
        path = site.name.removeprefix(self._layer.prefix)
        part, _, rest = path.partition(".")
        parameter = self._layer.model.get_parameter(site.name)
        owner = self._layer.block.get_submodule(path.rpartition(".")[0])
        size = parameter.shape[site.reader.axis] * self._stream[..., 0].numel() * self._layer.compute.itemsize
        is_small = self._folder is not None or size <= KEPT_BYTES
        is_product = parameter.ndim == 2 and "." in rest and not list(owner.children())
        return Inputs(site, part) if is_product and is_small else None

    @contextmanager
    def recording(self, inputs: Inputs, first: int, seen: list[Product], stop: bool) -> Iterator[None]:
        """Keep the inputs of a batch when the part that the reader ends has run.

        Args:
            seen: products of the reader in this run.
            stop: whether the rest of the layer need not run.
        """

        def ended(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            given, items = unpacked(output)
            if len(seen) == 1 and _is_same(given, seen[0].result):
                values = seen[0].values.reshape(*given.shape[:2], -1)
                if inputs.values is None and first == 0:
                    shape = (*self._stream.shape[:2], values.shape[-1])
                    inputs.values = new_states(shape, self._folder, values.dtype)
                    inputs.output_items = items
                if inputs.values is not None:
                    inputs.values[first : first + len(values)] = values
            else:
                inputs.values = None
            if stop:
                raise Enough

        handle = self._layer.block.get_submodule(inputs.part).register_forward_hook(ended)
        try:
            yield
        finally:
            handle.remove()

    def can_be_left_out(self, site: Site) -> bool:
        """Whether what a reader has to make is no more than what the stream lacks without it."""
        return type(self._owner(site)) is nn.Linear and site.entry is not None and site.entry.way == "plain"

    def _owner(self, site: Site) -> nn.Module:
        return self._layer.model.get_submodule(site.name.rpartition(".")[0])

    @contextmanager
    def leaving_out(self, site: Site, tell: Callable[[Product], Any]) -> Iterator[None]:
        """While active, a reader of which `can_be_left_out` holds makes zeros.

        Args:
            tell: what to call with what it is given.
        """
        owner: Any = self._owner(site)

        def forward(values: torch.Tensor) -> torch.Tensor:
            made = values.new_zeros(1).expand(*values.shape[:-1], owner.out_features)
            tell(Product(site.name, site.reader.axis, None, values, owner.bias, made))
            return made

        with running_as(owner, forward):
            yield

    def learn(self, inputs: Inputs) -> None:
        """Take in what the reader, with the weight that it has now, makes of its inputs."""
        if inputs.values is None:
            return
        owner = self._owner(inputs.site)
        results: torch.Tensor | None = None
        for first, batch in batches(self._stream):
            values = inputs.values[first : first + len(batch)].to(self._layer.device)
            with multiplying_in(self._layer.compute, self._layer.device):
                made = owner(values)
            if results is None:
                results = new_states((*self._stream.shape[:2], made.shape[-1]), self._folder, made.dtype)
            results[first : first + len(batch)] = made
        if results is not None:
            self._known[inputs.part] = (inputs.site, results, inputs.output_items)


def _is_same(given: Any, result: torch.Tensor) -> bool:
    """Whether one tensor is the other, seen in whatever shape."""
    return (
        isinstance(given, torch.Tensor)
        and given.ndim == 3
        and given.numel() == result.numel()
        and given.data_ptr() == result.data_ptr()
        and given.dtype == result.dtype
    )


def _giving(
    result: torch.Tensor, items: int, name: str, tell: Callable[[str, torch.Tensor], None]
) -> Callable[..., Any]:
    """What a module runs that gives a result [B, T, D], and None for whatever else it returns."""

    def answer(*_: Any, **__: Any) -> Any:
        tell(name, result)
        return packed(result, items)

    return answer
