"""Hidden states that are kept in files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmprune_cli.errors import OutputError
from llmprune_cli.run.states import copy_states


def test_hidden_states_that_cannot_be_kept_are_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"`prune` with --offload-dir .*, `recover` with --output, --teacher-cache"):
        copy_states(torch.zeros(1, 2, 3), tmp_path / "absent")


def test_what_is_written_into_kept_states_stays(tmp_path: Path) -> None:
    states = torch.randn(2, 3, 4)
    kept = copy_states(states[:, ::2], tmp_path)
    assert torch.equal(kept, states[:, ::2])
    kept[1] = 7
    assert torch.equal(kept[1], torch.full((2, 4), 7.0)) and (states != 7).all()
