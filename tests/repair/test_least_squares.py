"""The refit is the solution of its least squares."""

from __future__ import annotations

import pytest
import torch

from llmprune_cli.repair.least_squares import BLOCK, Moments, solve_reader


def test_the_refit_is_the_least_squares_solution() -> None:
    import numpy as np

    generator = torch.Generator().manual_seed(3)
    inputs, outputs = torch.randn(200, 12, generator=generator), torch.randn(200, 5, generator=generator)
    matrix, kept, damping = torch.randn(5, 12, generator=generator), torch.tensor([0, 2, 3, 7, 11]), 0.2
    moments = Moments.zero(5, 12, kept)
    for first in range(0, 200, 64):
        moments.add(inputs[first : first + 64], outputs[first : first + 64], torch.zeros(5, 12))
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
    moments = Moments.zero(3, 4, torch.tensor([0, 1, 2]))
    moments.add(inputs, torch.randn(50, 3), None)
    solved = solve_reader(moments, matrix, 0.1)
    torch.testing.assert_close(solved[:, 1], matrix[:, 1])
    dead = Moments.zero(3, 4, torch.arange(4))
    assert torch.equal(solve_reader(dead, matrix, 0.1), matrix)


def test_an_aim_that_is_added_comes_on_top_of_what_a_weight_makes() -> None:
    generator = torch.Generator().manual_seed(4)
    inputs, aims, matrix = (torch.randn(*shape, generator=generator) for shape in ((30, 4), (30, 3), (3, 4)))
    aimed, direct = (Moments.zero(3, 4, torch.tensor([0, 3])) for _ in range(2))
    wanted = inputs @ matrix.T + aims
    for first in (0, 17):
        tokens = slice(first, first + 17)
        aimed.add(inputs[tokens], aims[tokens], matrix)
        direct.add(inputs[tokens], wanted[tokens], torch.zeros(3, 4))
    aimed.aim_at(matrix)
    torch.testing.assert_close(aimed.cross, direct.cross, rtol=1e-5, atol=1e-5)
    assert aimed.total == pytest.approx(direct.total, rel=1e-5)
    assert aimed.total == pytest.approx(float(wanted.double().square().sum()), rel=1e-5)


def test_a_gram_matrix_formed_in_blocks_is_that_of_all_kept_inputs() -> None:
    inputs, kept = torch.randn(64, 3 * BLOCK), torch.arange(0, 3 * BLOCK, 2)[: BLOCK + 10]
    moments = Moments.zero(1, inputs.shape[1], kept)
    for tokens in inputs.split(40):
        moments.add(tokens, None, None)
    x = inputs.double()
    torch.testing.assert_close(moments.gram, x[:, kept].T @ x[:, kept], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(moments.across, x[:, moments.gone].T @ x[:, kept], rtol=1e-5, atol=1e-4)


def test_a_number_that_float32_cannot_hold_is_noticed_wherever_it_is() -> None:
    for place in (0, 1):  # of an input that stays, and of one that goes
        inputs = torch.ones(2, 2)
        inputs[0, place] = torch.inf
        moments = Moments.zero(1, 2, torch.tensor([0]))
        moments.add(inputs, torch.ones(2, 1), None)
        assert not moments.is_finite
    moments = Moments.zero(1, 2, torch.tensor([0]))
    moments.add(torch.tensor([[1.0, 1e20]]), torch.ones(1, 1), torch.full((1, 2), 1e20))  # of what is made of x₋
    assert moments.across.isfinite().all() and not moments.is_finite
