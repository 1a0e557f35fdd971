"""One decoder layer, run over hidden states batch by batch, and what comes before and after all layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmprune_cli.errors import CheckpointError, UnsupportedError
from llmprune_cli.family.skeleton import on_disk
from llmprune_cli.run.precision import multiplying_in
from llmprune_cli.run.precision.rounding import rounding_to

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmprune_cli.coupling.products import Collector, Watcher

BATCH_TOKENS = 4096  # that run through a layer together
# What can be done with a model whose layers cannot be run alone.
WITHOUT_LAYERS = "Prune it by --importance magnitude --refit none, and heal it with --teacher-mode resident."


class Enough(Exception):  # noqa: N818 - not an error
    """Raised by a watcher that has seen what it wanted: the rest of the layer need not run."""


def unpacked(output: Any) -> tuple[torch.Tensor, int]:
    """What a module makes of hidden states, and how many items it returns, of which that is the first; 0: none else."""
    return (output[0], len(output)) if isinstance(output, tuple | list) else (output, 0)


def packed(states: torch.Tensor, items: int) -> Any:
    """What a module returns that gives hidden states first, and None for the rest of so many items; see `unpacked`."""
    return (states, *[None] * (items - 1)) if items else states


def number_as(block: nn.Module, original: nn.Module) -> None:
    """Give a layer that stands alone the plain numbers of its original: its own, and scales that depend on it.

    Raises:
        ValueError: the original has other parts, since it is not the first of the model.
    """
    modules, parts = dict(block.named_modules()), dict(original.named_modules())
    differing = [name for name in {**modules, **parts} if type(modules.get(name)) is not type(parts.get(name))]
    differing += {n for n, _ in block.named_parameters()} ^ {n for n, _ in original.named_parameters()}
    if differing:
        raise ValueError(f"its {min(differing)} is another one where the layer is not the first")
    for name, module in parts.items():
        own = modules[name]
        for attribute, value in vars(module).items():
            if isinstance(value, int | float) and attribute != "training" and attribute in vars(own):
                setattr(own, attribute, value)


@dataclass(frozen=True)
class Layer:
    """One decoder layer, inside a model that has no other."""

    model: PreTrainedModel
    block: nn.Module
    prefix: str  # of the names of its parameters in `model`
    compute: torch.dtype = torch.float32  # of its matrix products; the residual stream and norms are float32

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return next(self.block.parameters()).device

    def has(self, template: str) -> bool:
        """Whether this kind of layer has the parameter with a template's name."""
        name = template.replace("{}", "0", 1).removeprefix(self.prefix)
        return any(name == own for own, _ in self.block.named_parameters())

    def run(
        self,
        hidden: torch.Tensor,
        watcher: Watcher | None = None,
        collected: Collector | None = None,
    ) -> torch.Tensor | None:
        """Hidden states [B, T, D] through the layer; None where the watcher had enough.

        Masks and position embeddings are those that the model itself hands to the layer.

        Args:
            watcher, collected: see `Products`; parameters have their names in `model`.
        """
        from llmprune_cli.coupling.products import Products

        seen: list[Any] = []
        names = [(f"{self.prefix}{name}", parameter) for name, parameter in self.block.named_parameters()]
        if self.compute != torch.float32 and watcher is not None:
            watcher, collected = self._in_float32(watcher), self._in_float32(collected) if collected else None
        products = Products(names, watcher, collected) if watcher is not None else nullcontext()
        given = hidden.to(self.device, torch.float32)
        with _replacing_input(self.block, given), _catching_output(self.block, seen), products:
            ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.device)
            with multiplying_in(self.compute, self.device), suppress(Enough):
                self.model(input_ids=ids, use_cache=False)
        if not seen:
            return None
        return unpacked(seen[0])[0].to(hidden.device, torch.float32)

    def _in_float32(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function of what is seen, whose own products are not in the dtype of the computation."""

        def computed(*seen: Any) -> Any:
            with torch.autocast(self.device.type, enabled=False):
                return function(*seen)

        return computed

    def advance(
        self,
        stream: torch.Tensor,
        watcher_of: Callable[[int, torch.Tensor], Watcher] | None = None,
        collected: Collector | None = None,
    ) -> None:
        """Replace the hidden states [N, T, D] of all windows by what the layer makes of them, batch by batch.

        Args:
            watcher_of: from the number of a batch's first window and its hidden states to a watcher.
        """
        for first, batch in batches(stream):
            output = self.run(batch, watcher_of(first, batch) if watcher_of else None, collected)
            if output is None:
                raise AssertionError("a watcher had enough of a layer that has to run to its end")
            batch.copy_(output)

    def returned_items(self, hidden: torch.Tensor) -> int:
        """How many items this family's layers return, hidden states first; 0 where these come alone."""
        seen: list[Any] = []
        token = torch.zeros(1, 1, hidden.shape[-1], device=self.device)
        ids = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        precision = multiplying_in(self.compute, self.device)
        with _replacing_input(self.block, token), _catching_output(self.block, seen), precision, suppress(Enough):
            self.model(input_ids=ids, use_cache=False)
        return unpacked(seen[0])[1]

    def stored(self) -> dict[str, torch.Tensor]:
        """Its tensors as on disk, numbered 0."""
        return on_disk(self.model, {name: parameter.detach() for name, parameter in self.model.named_parameters()})


@dataclass(frozen=True)
class Ends:
    """What comes before and after the decoder layers: embeddings, final norm, output projection."""

    model: PreTrainedModel  # with one layer, whose weights are on `meta`
    block: nn.Module
    device: str
    compute: torch.dtype = torch.float32  # of the output projection
    rounded: torch.dtype = torch.float32  # what products of one in float32 may round to, see `rounding_to`

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids [B, T] to the hidden states [B, T, D] that the first layer gets, float32.

        Raises:
            UnsupportedError: it gets others than one for each token.
        """
        caught: list[torch.Tensor] = []

        def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught.append(args[0] if args else kwargs["hidden_states"])
            raise Enough

        handle = self.block.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            with suppress(Enough):
                self.model(input_ids=tokens.to(self.device), use_cache=False)
        finally:
            handle.remove()
        config = self.model.config.get_text_config()
        width = getattr(config, "hidden_size", caught[0].shape[-1])
        if caught[0].shape != (*tokens.shape, width):  # but streams of hyper-connections, or of n-grams
            raise UnsupportedError(
                f"The layers of {config.model_type} read more than one hidden state for each token, so that "
                f"none can be run alone. {WITHOUT_LAYERS}"
            )
        return caught[0].float().cpu()

    def logits(self, hidden: torch.Tensor, items: int) -> torch.Tensor:
        """Hidden states [B, T, D] that the last layer gives to logits [B, T, V], float32.

        Args:
            items: see `Layer.returned_items`.
        """
        head = self.model.get_output_embeddings().weight
        given = hidden.to(self.device, head.dtype if self.compute == torch.float32 else torch.float32)
        output = packed(given, items)
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.device)
        precision = multiplying_in(self.compute, torch.device(self.device))
        with running_as(self.block, lambda *_, **__: output), precision, rounding_to(self.rounded):
            logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits.float()


def batches(stream: torch.Tensor, tokens: int = BATCH_TOKENS) -> Iterator[tuple[int, torch.Tensor]]:
    """Hidden states [N, T, D] cut into batches of about so many tokens, each with its first window's number."""
    size = windows_together(stream, tokens)
    for first in range(0, len(stream), size):
        yield first, stream[first : first + size]


def windows_together(windows: torch.Tensor, tokens: int = BATCH_TOKENS) -> int:
    """How many windows, token ids or hidden states [N, T, ...], make a batch of about so many tokens."""
    return max(1, tokens // windows.shape[1])


def check_states(stream: torch.Tensor, origin: str) -> None:
    """Hold that the unpruned model's hidden states [N, T, D] are numbers.

    Args:
        origin: what made them.

    Raises:
        CheckpointError: some are NaN, or too large for sums of squares in float32.
    """
    if not all(window.norm().isfinite() for window in stream):
        raise CheckpointError(
            f"{origin} turns text into NaN or into numbers that float32 cannot hold: its weights are damaged. Download "
            "the checkpoint again."
        )


@contextmanager
def running_as(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """While active, a module runs another function.

    Afterwards nothing is left on it: its own method, kept there, would hold it in memory until Python looks for cycles.
    """
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


@contextmanager
def _replacing_input(block: nn.Module, hidden: torch.Tensor) -> Iterator[None]:
    def replace_first(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    handle = block.register_forward_pre_hook(replace_first, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _catching_output(block: nn.Module, seen: list[Any]) -> Iterator[None]:
    def catch(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.append(output)
        raise Enough

    handle = block.register_forward_hook(catch)
    try:
        yield
    finally:
        handle.remove()
