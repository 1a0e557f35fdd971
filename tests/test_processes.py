"""Processes share what there is to do."""

from __future__ import annotations

import pytest
import torch

from llmprune_cli.processes import Processes


@pytest.mark.parametrize(("windows", "together", "count"), [(15, 8, 2), (64, 8, 3), (1, 1, 4), (5, 2, 2), (9, 4, 2)])
def test_shares_are_all_windows_once_in_whole_batches(windows: int, together: int, count: int) -> None:
    every = torch.arange(windows)
    shares = [Processes(rank, count).share(every, together) for rank in range(count)]
    assert torch.equal(torch.cat(shares), every) and len(shares[0]) == max(map(len, shares)) > 0
    assert all(len(share) % together == 0 for share in shares if len(share) and share[-1] < windows - 1)
