"""What is done quicker than by autocast to bfloat16 alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from llmprune_cli.run import precision
from llmprune_cli.run.precision import multiplying_in

CPU = torch.device("cpu")


class Recorder(TorchFunctionMode):
    """Remembers in which dtypes attention is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[torch.dtype]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is scaled_dot_product_attention:
            self.seen.append([own.dtype for own in (*args, *kwargs.values()) if isinstance(own, torch.Tensor)])
        return function(*args, **kwargs)


@pytest.mark.parametrize(
    ("machine", "has_amx", "with_gradients", "expected"),
    [
        ("x86_64", False, False, torch.float32),
        ("x86_64", True, False, torch.bfloat16),
        ("x86_64", False, True, torch.bfloat16),
        ("arm64", False, False, torch.bfloat16),
    ],  # with a PyTorch that can round
)
def test_attention_without_gradients_is_formed_in_float32_where_that_is_faster(
    monkeypatch: pytest.MonkeyPatch, machine: str, has_amx: bool, with_gradients: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    monkeypatch.setattr(precision, "can_round", lambda: True)
    q, k, v = torch.randn(3, 2, 4, 16, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(16, 16, dtype=torch.bool).tril()
    exact = scaled_dot_product_attention(q.bfloat16().float(), k.bfloat16().float(), v.bfloat16().float(), mask)
    recorder = Recorder()
    with torch.set_grad_enabled(with_gradients), recorder, multiplying_in(torch.bfloat16, CPU):
        found = scaled_dot_product_attention(q.bfloat16(), k.bfloat16(), value=v.bfloat16(), attn_mask=mask)
    assert recorder.seen == [[expected] * 3 + [torch.bool]]
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, rtol=2e-2, atol=2e-2)


def test_attention_of_a_computation_in_float32_is_left_alone() -> None:
    recorder, states = Recorder(), torch.randn(1, 1, 4, 8)
    with torch.no_grad(), recorder, multiplying_in(torch.float32, CPU):
        found = scaled_dot_product_attention(states, states, states)
    assert recorder.seen == [[torch.float32] * 3] and found.dtype == torch.float32


def test_what_several_layers_are_given_is_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    original = torch.Tensor.to

    def counted(own: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        found.extend([own.numel()] if args == (torch.bfloat16,) else [])
        return original(own, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", counted)
    layers, states = [torch.nn.Linear(8, 8) for _ in range(3)], torch.randn(4, 8)
    with torch.inference_mode():
        with torch.autocast("cpu", torch.bfloat16):
            expected = [own(states) for own in layers]
        with multiplying_in(torch.bfloat16, CPU):
            made = [own(states) for own in layers]
    assert found == [states.numel()]
    assert all(torch.equal(*pair) for pair in zip(made, expected, strict=True))


def set_data(states: torch.Tensor) -> None:
    states.data = states + 1


@pytest.mark.parametrize(
    "change",
    [
        lambda states: states.add_(1),
        lambda states: states.__isub__(1),
        lambda states: states[:, 1:].mul_(2),
        lambda states: states.__setitem__(0, 7),
        lambda states: torch.add(states, 1, out=states),
        lambda states: torch.nn.functional.relu(states, inplace=True),
        set_data,
    ],
)
def test_what_changes_is_rounded_anew(change: Callable[[torch.Tensor], Any]) -> None:
    layer, states = torch.nn.Linear(8, 8), torch.randn(4, 8)
    with torch.no_grad(), multiplying_in(torch.bfloat16, CPU):
        layer(states)
        change(states)
        assert torch.equal(layer(states), layer(states.clone()))


def test_what_a_model_computes_in_float32_stays_there() -> None:
    layer, states = torch.nn.Linear(8, 8), torch.randn(1, 1, 4, 8)
    with torch.no_grad(), multiplying_in(torch.bfloat16, CPU):
        assert layer(states).dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(layer(states), layer.float()(states))
            assert scaled_dot_product_attention(states, states, states).dtype == torch.float32


def test_gradients_of_what_several_layers_are_given_are_those_of_autocast() -> None:
    layers = [torch.nn.Linear(8, 8) for _ in range(3)]
    found = []
    for context in (multiplying_in(torch.bfloat16, CPU), torch.autocast("cpu", torch.bfloat16)):
        states = torch.ones(4, 8, requires_grad=True)
        with context:
            sum(own(states) for own in layers).sum().backward()  # type: ignore[union-attr]
        found.append(states.grad)
    assert found[0] is not None and found[1] is not None and torch.equal(found[0], found[1])
