"""Hidden states that are kept in files."""

from __future__ import annotations

import errno
import io
import os
import platform
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from llmprune_cli.errors import OutputError
from llmprune_cli.run import states as kept_states
from llmprune_cli.run.states import DenseStates, copy_states, give_back_freed_memory, lies_in_memory, roomy_folder


def test_hidden_states_that_cannot_be_kept_are_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"`prune` with --offload-dir .*, `recover` with --output, --teacher-cache"):
        copy_states(torch.zeros(1, 2, 3), tmp_path / "absent")


def test_what_is_written_into_kept_states_stays(tmp_path: Path) -> None:
    states = torch.randn(2, 3, 4)
    kept = copy_states(states[:, ::2], tmp_path)
    assert torch.equal(kept, states[:, ::2])
    kept[1] = 7
    assert torch.equal(kept[1], torch.full((2, 4), 7.0)) and (states != 7).all()


def test_states_of_all_layers_keep_away_from_temporary_files_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, output, lasting = (tmp_path / name for name in ("usual", "output", "lasting"))
    mounts = {"/": "ext4"}

    def found(**changed: str) -> Path:
        own = mounts | {str(tmp_path / name): kind for name, kind in changed.items()}
        parts = [SimpleNamespace(mountpoint=place, fstype=kind) for place, kind in own.items()]
        monkeypatch.setattr(psutil, "disk_partitions", lambda all: parts)
        return roomy_folder(beside)

    for folder in (usual, output, lasting):
        folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(usual))
    monkeypatch.setattr(kept_states, "LASTING", lasting)
    beside: Path | None = output
    assert found() == usual
    assert found(usual="tmpfs") == lasting
    assert found(usual="tmpfs", lasting="tmpfs") == output
    assert found(usual="tmpfs", output="tmpfs", lasting="ramfs") == usual and lies_in_memory(usual)
    beside = None
    assert found(usual="tmpfs") == lasting
    assert found(**{".": "tmpfs", "usual": "ext4"}) == usual
    lasting.rmdir()
    assert found(usual="tmpfs") == usual


def test_where_room_is_short_only_the_states_that_are_needed_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows, states = torch.zeros(2, 3, dtype=torch.long), torch.randn(2, 3, 4)
    monkeypatch.setattr(kept_states, "MOST_OF_FREE_SPACE", 0.0)
    sizes: list[int] = []
    monkeypatch.setattr(kept_states, "allocate", lambda file, size_bytes: sizes.append(size_bytes))
    dense = DenseStates(tmp_path)
    dense.begin(windows, channels=4, places=5)
    assert not dense.is_open
    dense.begin(windows, channels=4, places=5, needed=3)
    for place in ((0, ""), (0, "within"), (1, "")):
        dense.put(place, 0, states)
    assert sizes == [4 * 3 * states.numel()]
    dense.read((1, ""), 1, into := torch.empty(3, 4))
    assert torch.equal(into, states[1])
    dense.is_whole = True
    assert dense.covering(windows) is None


def test_states_that_could_be_computed_again_are_given_up_where_the_disk_fills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows, states = torch.zeros(1, 3, dtype=torch.long), torch.randn(1, 3, 4)

    class Full(io.BytesIO):
        def write(self, _: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: Full())
    monkeypatch.setattr(Full, "fileno", lambda _: -1)
    monkeypatch.setattr(kept_states, "allocate", lambda file, size_bytes: None)
    dense = DenseStates(tmp_path)
    dense.begin(windows, channels=4, places=2)
    for number in range(2):
        dense.put((number, ""), 0, states)
    dense.is_whole = True
    assert not dense.is_open and dense.covering(windows) is None
    dense.begin(windows, channels=4, places=2, needed=2)
    with pytest.raises(OutputError, match="hidden states cannot be kept"):
        dense.put((0, ""), 0, states)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only the GNU C library gives memory back when asked")
def test_freed_memory_is_given_back() -> None:
    blocks = [bytearray(2**16) for _ in range(2**10)]
    del blocks[:-1]  # the last one keeps the others below the top of the heap
    before = psutil.Process().memory_info().rss
    give_back_freed_memory()
    assert psutil.Process().memory_info().rss < before - 2**25
