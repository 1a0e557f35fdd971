"""The hidden folders in which results and scratch files are made."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from llmprune_cli.errors import OutputError
from llmprune_cli.folder.scratch import scratch_folder
from llmprune_cli.folder.staging import check_target, claimed, hidden_folder, lock_file, locked_folder
from support.cli import BY_MAGNITUDE, run_cli

CUT = (*BY_MAGNITUDE, "--intermediate-size", "24")


def test_a_hidden_folder_that_is_a_link_is_not_followed(tiny_llama: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("mine")
    (tmp_path / ".out.llmprune-work").symlink_to(elsewhere)
    run = run_cli("prune", tiny_llama, *CUT, "--output", tmp_path / "out")
    assert run.code == 6 and "hidden folder is a link" in run.stderr and not (tmp_path / "out").exists()
    assert [path.name for path in elsewhere.iterdir()] == ["precious"]


def test_scratch_of_dead_runs_goes_and_that_of_others_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("llmprune-dead", "llmprune-running", "llmprune-of-something-else", "elsewhere"):
        (tmp_path / name / "deep").mkdir(parents=True)
    for name in ("llmprune-dead", "llmprune-link", "llmprune-not-made-yet"):
        (tmp_path / f"{name}.lock").touch()
    (tmp_path / "llmprune-link").symlink_to(tmp_path / "elsewhere")
    others = set()
    if os.geteuid() == 0:  # nobody else can make a folder that is somebody's
        others = {"llmprune-foreign"}
        (tmp_path / "llmprune-foreign").mkdir()
        (tmp_path / "llmprune-foreign.lock").touch()
        os.chown(tmp_path / "llmprune-foreign", 12345, 12345)
    with locked_folder(tmp_path / "llmprune-running"), scratch_folder() as scratch:
        found = {path.name for path in tmp_path.iterdir() if path.suffix != ".lock"} - {scratch.name} - others
        assert all((tmp_path / name).is_dir() for name in others)
        assert found == {"llmprune-running", "llmprune-of-something-else", "llmprune-link", "elsewhere"}
        locks = {path.stem for path in tmp_path.glob("*.lock")} - others
        assert locks == {"llmprune-running", "llmprune-link", scratch.name}
        assert (tmp_path / "elsewhere" / "deep").is_dir() and (tmp_path / "llmprune-running" / "deep").is_dir()
    assert not scratch.exists()


OLD_MODEL, NEW_MODEL = '{"model_type": "old"}', '{"model_type": "new"}'


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked here")
def test_runs_that_begin_together_leave_each_other_their_scratch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each clears away what it finds, which may be what another has just begun to make."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            try:
                for _ in range(100):
                    with scratch_folder() as folder:
                        (folder / "kept").touch()
                        assert (folder / "kept").exists()
                os._exit(0)
            except BaseException as error:
                os.write(2, f"{error!r}\n".encode())
                os._exit(1)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    assert not list(tmp_path.iterdir())


def test_a_temporary_disk_that_takes_nothing_is_named(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "no-folder").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "no-folder"))
    run = run_cli("prune", tiny_llama, *CUT, "--output", tmp_path / "out")
    assert run.code == 6 and "TMPDIR" in run.stderr and [path.name for path in tmp_path.iterdir()] == ["no-folder"]


@pytest.mark.parametrize("moment", ["before", "between", "after"])
def test_a_run_that_died_while_replacing_is_finished_or_undone(moment: str, tiny_llama: Path, tmp_path: Path) -> None:
    """`done` says that all was written; `old` is what stood at the target."""
    target, hidden = tmp_path / "out", tmp_path / ".out.llmprune-work"
    for folder, text in ((target, OLD_MODEL), (hidden / "new", NEW_MODEL)):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(text)
    (hidden / "done").touch()
    if moment != "before":
        target.rename(hidden / "old")
    if moment == "after":
        (hidden / "new").rename(target)
    run = run_cli("prune", tiny_llama, *CUT, "--output", target)
    assert run.code == 6 and "is not empty" in run.stderr and not hidden.exists()
    assert (target / "config.json").read_text() == (NEW_MODEL if moment == "after" else OLD_MODEL)
    assert run_cli("prune", tiny_llama, *CUT, "--overwrite", "--output", target).code == 0
    assert run_cli("inspect", target, "--verify").code == 0 and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_others_put_at_the_target_meanwhile_stays(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with (
        pytest.raises(OutputError, match="not empty"),
        claimed(target, overwrite=False) as claim,
        claim.staged() as new,
    ):
        (new / "config.json").touch()
        target.mkdir()
        (target / "precious").write_text("mine")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in target.iterdir()] == ["precious"]


def test_what_a_dead_run_left_beside_its_target_goes_with_the_next_refusal(tmp_path: Path) -> None:
    """Also where it died with nothing left to do but to remove its lock."""
    target, hidden = tmp_path / "out", hidden_folder(tmp_path / "out")
    target.mkdir()
    (target / "config.json").touch()
    lock_file(hidden).touch()
    check_target(target, overwrite=False)  # what stands there is only looked at by whoever has the lock
    with pytest.raises(OutputError, match="not empty"), claimed(target, overwrite=False):
        pass
    assert list(tmp_path.iterdir()) == [target]
    with pytest.raises(OutputError, match="not empty"):
        check_target(target, overwrite=False)
