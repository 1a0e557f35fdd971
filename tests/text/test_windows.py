"""Windows of text: drawn from all over, and kept apart."""

from __future__ import annotations

import torch

from llmprune_cli.text.windows import spread_windows, windows_apart


def test_gradients_see_text_from_all_over() -> None:
    windows = torch.arange(64).view(32, 2)
    assert spread_windows(windows, 9)[:, 0].tolist() == [0, 20, 40, 62]
    assert spread_windows(windows, 1).shape == (1, 2) and len(spread_windows(windows, 1000)) == 32


def test_windows_of_another_use_are_left_out_unless_nothing_would_be_left() -> None:
    windows, judged = torch.arange(12).view(4, 3), torch.tensor([[3, 4, 5], [6, 7, 9]])
    assert windows_apart(windows, judged).tolist() == [[0, 1, 2], [6, 7, 8], [9, 10, 11]]
    assert windows_apart(windows[1:2], judged).tolist() == [[3, 4, 5]]
    assert windows_apart(windows, judged[:0]).tolist() == windows.tolist()
