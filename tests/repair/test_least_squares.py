"""The refit is the solution of its least squares."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmprune_cli.repair.least_squares import BLOCK, Moments, solve_reader
from llmprune_cli.run.precision.rounding import rounding_to


def test_the_refit_is_the_least_squares_solution() -> None:
    import numpy as np

    generator = torch.Generator().manual_seed(3)
    inputs, outputs = torch.randn(200, 12, generator=generator), torch.randn(200, 5, generator=generator)
    matrix, kept, damping = torch.randn(5, 12, generator=generator), torch.tensor([0, 2, 3, 7, 11]), 0.2
    moments = Moments.zero(5, kept)
    for first in range(0, 200, 64):
        moments.add(inputs[first : first + 64], outputs[first : first + 64])
    solved = solve_reader(moments, matrix, damping)
    x, old = inputs[:, kept].double(), matrix[:, kept].double()
    strength = damping * x.square().sum(0).mean()
    rows = torch.cat([x, strength.sqrt() * torch.eye(5, dtype=torch.float64)])
    goals = torch.cat([outputs.double(), strength.sqrt() * old.T])
    expected = np.linalg.lstsq(rows.numpy(), goals.numpy(), rcond=None)[0].T
    np.testing.assert_allclose(solved[:, kept].numpy(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(solved[:, [1, 4, 5, 6, 8, 9, 10]], torch.zeros(5, 7))
    assert moments.error(solved) < moments.error(matrix)
    gap = outputs.double() - x @ old.T
    assert moments.error(matrix) == pytest.approx(float(gap.square().sum()), rel=1e-5)


def test_an_input_that_is_always_zero_keeps_its_weight() -> None:
    inputs = torch.randn(50, 4)
    inputs[:, 1] = 0
    matrix = torch.randn(3, 4)
    moments = Moments.zero(3, torch.tensor([0, 1, 2]))
    moments.add(inputs, torch.randn(50, 3))
    solved = solve_reader(moments, matrix, 0.1)
    torch.testing.assert_close(solved[:, 1], matrix[:, 1])
    dead = Moments.zero(3, torch.arange(4))
    assert torch.equal(solve_reader(dead, matrix, 0.1), matrix)


def test_a_gram_matrix_formed_in_blocks_is_that_of_all_kept_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmprune_cli.repair.least_squares.ROWS", 16)  # of the 40 that come together
    inputs, kept = torch.randn(64, 3 * BLOCK), torch.arange(0, 3 * BLOCK, 2)[: BLOCK + 10]
    moments, outputs = Moments.zero(2, kept), torch.randn(64, 2)
    for tokens, made in zip(inputs.split(40), outputs.split(40), strict=True):
        moments.add(tokens, made)
    x = inputs.double()
    torch.testing.assert_close(moments.gram, x[:, kept].T @ x[:, kept], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(moments.cross, outputs.double().T @ x[:, kept], rtol=1e-5, atol=1e-4)
    assert moments.total == pytest.approx(float(outputs.double().square().sum()), rel=1e-6)


def test_a_number_that_float32_cannot_hold_is_noticed_wherever_it_is() -> None:
    for damaged in (0, 1):  # an input that stays, and what is made of one that goes
        inputs, outputs = torch.ones(2, 2), torch.ones(2, 1)
        (inputs, outputs)[damaged][0, 0] = torch.inf
        moments = Moments.zero(1, torch.tensor([0]))
        moments.add(inputs, outputs)
        assert not moments.is_finite


def test_sums_of_what_bfloat16_holds_are_those_of_float32() -> None:
    """Where products may be rounded, what enters them has no more digits anyway, and sums have all of theirs."""
    inputs, outputs = (torch.randn(64, 300).bfloat16() for _ in range(2))
    rounded, whole = (Moments.zero(300, torch.arange(0, 300, 2)) for _ in range(2))
    products: Any = torch.backends.mkldnn.matmul
    before = products.fp32_precision
    with pytest.raises(KeyError), rounding_to(torch.bfloat16):
        assert products.fp32_precision == "bf16" != before
        rounded.add(inputs, outputs)
        raise KeyError
    with rounding_to(torch.float32):
        assert products.fp32_precision == before
        whole.add(inputs, outputs)
    torch.testing.assert_close(rounded.gram, whole.gram, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(rounded.cross, whole.cross, rtol=1e-5, atol=1e-4)


def test_what_a_caller_has_set_of_precision_is_no_error_and_stays() -> None:
    """PyTorch refuses to tell its older setting where the newer one of a GPU was used."""
    gpu: Any = torch.backends.cuda.matmul
    cpu: Any = torch.backends.mkldnn.matmul
    usual, before = gpu.fp32_precision, cpu.fp32_precision
    gpu.fp32_precision = "tf32"
    try:
        for dtype in (torch.float32, torch.bfloat16):
            with rounding_to(dtype):
                assert gpu.fp32_precision == "tf32"
            assert cpu.fp32_precision == before
    finally:
        gpu.fp32_precision = usual
