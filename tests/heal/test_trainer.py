"""What is made before the first step changes nothing that is trained."""

from __future__ import annotations

import pytest
import torch

from llmprune_cli.heal.training.trainer import _allocate_moments


@pytest.mark.parametrize("is_fused", [False, True])
def test_moments_made_early_are_those_that_adamw_makes(is_fused: bool) -> None:
    trained = []
    for is_early in (False, True):
        generator = torch.Generator().manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(5, 3, generator=generator))
        optimizer = torch.optim.AdamW([weight], 0.1, fused=is_fused)
        if is_early:
            _allocate_moments(optimizer)
        for _ in range(3):
            weight.grad = torch.randn(5, 3, generator=generator)
            optimizer.step()
        trained.append(weight.detach())
    assert torch.equal(*trained)
