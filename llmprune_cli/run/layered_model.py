"""Run a model over cached hidden states, with one decoder layer in memory at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmprune_cli.coupling.subject import Subject
from llmprune_cli.coupling.trace import Trace
from llmprune_cli.errors import UnsupportedError, first_line
from llmprune_cli.family.architecture import Architecture, reconfigure
from llmprune_cli.family.layers import layer_changes
from llmprune_cli.family.skeleton import build_skeleton
from llmprune_cli.family.widths import Widths
from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.folder.tensors import split_name
from llmprune_cli.processes import Processes
from llmprune_cli.run.layer import BATCH_TOKENS, WITHOUT_LAYERS, Ends, Layer, check_states, number_as, windows_together
from llmprune_cli.run.states import new_states
from llmprune_cli.source.stored_names import Rules

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


FEW = 8  # tokens that show whether a layer runs
UNBUILDABLE = (ValueError, RuntimeError, TypeError, AttributeError, LookupError, ArithmeticError)  # what classes raise
VOCABULARY = 8  # of a one-layer model, whose embedding is never used


def _alone(config: PretrainedConfig, number: int) -> PretrainedConfig:
    """The configuration of one layer, and of another behind it where the rules of a family ask for one of its kind.

    Raises:
        ValueError: there is none.
    """
    try:
        return reconfigure(config, layer_changes(config, (number,)))
    except ValueError as error:
        for other in reversed(range(config.get_text_config().num_hidden_layers)):
            with suppress(ValueError):
                return reconfigure(config, layer_changes(config, (number, other)))
        raise error


def _leave_first(model: PreTrainedModel) -> None:
    """Take all layers but the first one out of a model."""
    prefix = layer_prefix(model)
    layers: Any = model.get_submodule(prefix.removesuffix(".0."))
    del layers[1:]


def _without_tokens(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration with next to no vocabulary."""
    known, ids = {"bos_token_id": 1, "eos_token_id": 2}, config.to_dict().items()
    tokens = {n: known.get(n, None if own is None else 0) for n, own in ids if n.endswith("_token_id")}
    return reconfigure(config, {**tokens, "vocab_size": VOCABULARY})


def _refused(what: str, reason: str) -> UnsupportedError:
    return UnsupportedError(f"{what} cannot be run on its own ({reason}). {WITHOUT_LAYERS}")


def layer_prefix(model: PreTrainedModel) -> str:
    """What the names of the parameters of layer 0 start with."""
    numbered = (split_name(name)[0] for name, _ in model.named_parameters() if split_name(name)[1])
    return next(numbered).split("{}")[0] + "0."


def _multiplied(model: PreTrainedModel) -> frozenset[str]:
    """The parameters that hidden states are multiplied with as with a matrix: of linear layers, and of all experts."""
    from transformers.pytorch_utils import Conv1D

    found = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    experts = {name for name, parameter in model.named_parameters() if parameter.ndim == 3 and ".experts." in name}
    return frozenset(found | experts)


@dataclass(frozen=True)
class _Shell:
    """A model with one layer of some kind, whose weights are yet to come."""

    model: PreTrainedModel  # its weights are on `meta`, its buffers are not
    prefix: str  # see `Layer`
    rules: Rules
    multiplied: frozenset[str]  # names of the parameters that matrices are multiplied with


@dataclass(frozen=True)
class LayeredModel:
    """A checkpoint that is run in parts: one decoder layer at a time, and what comes before and after them."""

    subject: Subject
    device: str  # where the parts run
    compute: torch.dtype = torch.float32  # of matrix products
    _shells: dict[str | int, _Shell] = field(default_factory=dict, compare=False, repr=False)  # by kind, by number
    _tried: set[int] = field(default_factory=set, compare=False, repr=False)  # kinds of layers that do run alone

    @property
    def checkpoint(self) -> Checkpoint:
        """Where the weights are."""
        return self.subject.checkpoint

    @property
    def architecture(self) -> Architecture:
        """What the configuration says."""
        return self.subject.architecture

    @property
    def widths(self) -> Widths:
        """The sizes that every layer shares."""
        return self.subject.widths

    @property
    def trace(self) -> Trace:
        """Which units the axes of its tensors are made of."""
        return self.subject.trace

    @property
    def processes(self) -> Processes:
        """Those that share the windows of text."""
        return self.subject.processes

    def share(self, windows: torch.Tensor, tokens: int = BATCH_TOKENS) -> torch.Tensor:
        """The windows [N, T] that this process runs, in batches of about so many tokens that stay whole."""
        return self.processes.share(windows, windows_together(windows, tokens))

    @cached_property
    def skeleton(self) -> PreTrainedModel:
        """The whole model on the `meta` device."""
        return build_skeleton(self.architecture.config)

    @property
    def layers(self) -> int:
        """How many decoder layers there are."""
        return self.widths.num_hidden_layers

    def load_layer(self, number: int) -> Layer:
        """One decoder layer, what it multiplies with in the dtype of the computation and all else in float32.

        Raises:
            UnsupportedError: no model of this layer alone can be built.
        """
        config = self.architecture.config
        entries = tuple(entry for entry in self.checkpoint.entries if split_name(entry.name)[1][:1] == (number,))
        state = {}
        for entry, tensor in replace(self.checkpoint, entries=entries).tensors():
            template, numbers = split_name(entry.name)
            state[template.format(0, *numbers[1:])] = tensor
        try:
            shell = self._shell(number)
            places = {name: shell.rules.locate(name) for name in state}
            is_plain = all(pattern is None for _, pattern, _ in places.values())
            if is_plain:
                model = self._filled(shell, {places[name][0]: tensor for name, tensor in state.items()})
            else:
                model = self._converted(shell, state)
            block = model.get_submodule(shell.prefix[:-1])
            number_as(block, self.skeleton.get_submodule(f"{shell.prefix[:-2]}{number}"))
        except UNBUILDABLE as error:
            raise _refused(f"Layer {number} of {config.model_type}", first_line(error)) from error
        layer, kind = Layer(model.eval(), block, shell.prefix, self.compute), self.architecture.layer_kinds[number]
        if kind not in self._tried:
            self._check_alone(layer)
            self._tried.add(kind)
        return layer

    def _check_alone(self, layer: Layer) -> None:
        """Refuse a layer that does not run by its own weights: those outside of it are NaN."""
        states = torch.randn(1, 1, self.widths.hidden_size, generator=torch.Generator().manual_seed(0))
        try:
            with torch.no_grad():
                output = layer.run(states)
        except UNBUILDABLE as error:
            raise _refused(f"A layer of {self.architecture.config.model_type}", first_line(error)) from error
        if output is None or output.isfinite().all():
            return
        if all(own.isfinite().all() for own in layer.block.parameters()):
            raise _refused(f"A layer of {self.architecture.config.model_type}", "it reads weights outside of it")

    def runs(self) -> bool:
        """Whether layers of every kind make numbers of a few random hidden states, in the dtype of the computation."""
        states = torch.randn(1, FEW, self.widths.hidden_size, generator=torch.Generator().manual_seed(0))
        try:
            with torch.inference_mode():
                made = [self.load_layer(number).run(states) for number in {*self.architecture.layer_kinds}]
        except (UnsupportedError, RuntimeError, TypeError, ValueError):  # a family that mixes dtypes in its own way
            return False
        return all(output is not None and bool(output.isfinite().all()) for output in made)

    def _shell(self, number: int) -> _Shell:
        """The model that a layer is run in, built once for all layers of its kind."""
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM

        if number in self._shells:
            return self._shells[number]
        config = self.architecture.config
        own = _without_tokens(_alone(config, number))
        key = own.to_json_string(use_diff=False)
        if key not in self._shells:
            with init_empty_weights(include_buffers=False), torch.inference_mode(False):
                model = AutoModelForCausalLM.from_config(own, experts_implementation="eager")
            _leave_first(model)
            self._shells[key] = _Shell(model, layer_prefix(model), Rules(model), _multiplied(model))
        self._shells[number] = self._shells[key]
        return self._shells[number]

    def _filled(self, shell: _Shell, state: dict[str, torch.Tensor]) -> PreTrainedModel:
        """A copy of the shell with these weights, named as in memory, and NaN outside of the layer.

        Raises:
            ValueError: one is missing.
        """
        model: PreTrainedModel = copy.deepcopy(shell.model)
        for name, tensor in state.items():
            is_multiplied = name in shell.multiplied and tensor.is_floating_point()
            dtype = self.compute if is_multiplied else torch.float32 if tensor.is_floating_point() else tensor.dtype
            state[name] = tensor.to(self.device, dtype)
        model.load_state_dict(state, strict=False, assign=True)
        for name, parameter in [*model.named_parameters()]:
            if parameter.device.type == "meta":
                if name.startswith(shell.prefix):
                    raise ValueError(f"it lacks {name}")
                parent, _, own = name.rpartition(".")
                unknown = torch.full(parameter.shape, torch.nan, device=self.device)
                model.get_submodule(parent).register_parameter(own, nn.Parameter(unknown, requires_grad=False))
        return model.to(self.device)  # type: ignore[no-any-return, arg-type]

    def _converted(self, shell: _Shell, state: dict[str, torch.Tensor]) -> PreTrainedModel:
        """The model with these weights, named as on disk, which transformers regroups.

        Raises:
            ValueError: one is missing.
        """
        loaded: Any = type(shell.model).from_pretrained(
            None,
            config=shell.model.config,
            state_dict=state,
            dtype=torch.float32,
            experts_implementation="eager",
            output_loading_info=True,
        )
        model, info = loaded
        _leave_first(model)
        wrong = [str(name) for name in (*info["missing_keys"], *info["mismatched_keys"])]
        wrong = [name for name in wrong if name.startswith(shell.prefix)]
        if wrong:
            raise ValueError(f"it lacks {wrong[0]}")
        for name in shell.multiplied:
            parameter = model.get_parameter(name)
            parameter.data = parameter.data.to(self.compute)
        for name, parameter in model.named_parameters():
            if not name.startswith(shell.prefix):
                parameter.data.fill_(torch.nan)
        return model.to(self.device)  # type: ignore[no-any-return]

    def load_ends(self, exact: bool = False, compute: torch.dtype = torch.float32) -> Ends:
        """Embeddings, final norm and output projection, without any layer.

        Args:
            exact: norm in float32 and output projection in `compute`, for logits; an own embedding as it is stored.
            compute: of the product with the output projection.

        Raises:
            UnsupportedError: a part that the checkpoint does not have under the name that transformers gives it.
        """
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM

        config = self.architecture.config
        ends = f"What is around the layers of {config.model_type}"
        try:
            with init_empty_weights(include_buffers=False):
                model = AutoModelForCausalLM.from_config(_alone(config, 0))
            _leave_first(model)
        except UNBUILDABLE as error:
            raise _refused(ends, first_line(error)) from error
        prefix, rules = layer_prefix(model), Rules(model)
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        is_tied = bool(getattr(model, "all_tied_weights_keys", None))
        entries = tuple(entry for entry in self.checkpoint.entries if not split_name(entry.name)[1])
        state = {}
        for entry, tensor in replace(self.checkpoint, entries=entries).tensors():
            name = rules.locate(entry.name)[0]
            owner = model.get_submodule(name.rpartition(".")[0])
            is_head = owner is head or (is_tied and owner is embedding)
            exactly = compute if is_head else tensor.dtype if owner is embedding else torch.float32
            state[name] = tensor.to(self.device, exactly if exact else tensor.dtype)
        try:
            model.load_state_dict(state, strict=False, assign=True)
        except RuntimeError as error:  # what every layer has a part of, such as Gemma 4's embeddings for each
            raise _refused(ends, str(error).strip().splitlines()[-1].strip()) from error
        model.tie_weights()
        rest = [n for n, p in model.named_parameters() if p.device.type == "meta" and not n.startswith(prefix)]
        if rest:
            raise _refused(ends, f"{rest[0]} is not in the checkpoint under this name")
        for name, buffer in model.named_buffers():
            if not name.startswith(prefix):
                parent, _, own = name.rpartition(".")
                model.get_submodule(parent).register_buffer(own, buffer.to(self.device), persistent=False)
        return Ends(model.eval(), model.get_submodule(prefix[:-1]), self.device, compute, self.compute)

    def embed(
        self, windows: torch.Tensor, folder: Path | None = None, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Token ids [N, T] to the hidden states before the first layer, [N, T, D]; see `new_states`.

        Raises:
            CheckpointError: see `check_states`.
        """
        ends, size = self.load_ends(), windows_together(windows)
        stream = new_states((*windows.shape, self.widths.hidden_size), folder, dtype)
        for first in range(0, len(windows), size):
            stream[first : first + size] = ends.embed(windows[first : first + size])
        check_states(stream, "The embedding")
        return stream

    def walk(
        self,
        windows: torch.Tensor,
        advance: Callable[[Layer, torch.Tensor], None] | None = None,
        folder: Path | None = None,
    ) -> Iterator[tuple[torch.Tensor, int]]:
        """Token ids [N, T] through one layer after the other, none of which is in memory when its result is given.

        Args:
            advance: what to call in the place of `Layer.advance`.
            folder: see `new_states`.

        Yields:
            The hidden states behind each layer, float32 [N, T, D], always the same tensor, and how many items layers
            return.
        """
        stream = self.embed(windows, folder)
        for number in range(self.layers):
            layer = self.load_layer(number)
            (advance or Layer.advance)(layer, stream)
            items = layer.returned_items(stream)
            del layer
            yield stream, items
