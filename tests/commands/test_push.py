"""A folder goes to the hub whole and in one commit, or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmprune_cli import push
from llmprune_cli.errors import OutputError
from support.cli import BY_MAGNITUDE, run_cli, run_process
from support.full import in_full
from support.hub import TOKEN, Hub, hub_that_takes, log_in
from support.refusals import CHECKPOINT, OUTPUT, USAGE, VERIFICATION, assert_refused, edit_json, state_of

REPOSITORY = "tests/pruned"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # what huggingface_hub is told


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_that_takes() as hub:
        log_in(monkeypatch, hub, tmp_path)
        yield hub


@pytest.fixture(scope="module")
def made(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("push") / "pruned"
    options = ("--pruning-ratio", "0.5", "--max-shard-size", "30KB")
    assert run_cli("prune", tiny_llama, *BY_MAGNITUDE, *options, "--output", folder).code == 0
    return folder


@pytest.fixture
def pruned(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "pruned"))


def test_a_folder_is_pushed_in_private_and_in_one_commit(pruned: Path, hub: Hub) -> None:
    (pruned / "notes.txt").write_text("not of the model")
    run = run_cli("push", pruned, REPOSITORY, "--json")
    assert run.code == 0, run.stderr
    result, files = json.loads(run.stdout), hub.files[REPOSITORY]
    assert result["url"] == f"{hub.address}/{REPOSITORY}" and result["private"] and hub.private[REPOSITORY]
    assert hub.commits == 1 and result["commit"] == f"{1:040}" and result["removed"] == []
    assert {*files} == {*result["files"]} == {path.name for path in pruned.iterdir()} - {"notes.txt"}
    assert len([name for name in files if name.endswith(".safetensors")]) > 1
    assert files == {name: (pruned / name).read_bytes() for name in files}
    shown = run_cli("push", pruned, REPOSITORY)
    assert shown.code == 0 and result["url"] in shown.stdout and "private" in shown.stdout, shown.stderr


@in_full
def test_a_process_of_its_own_pushes_through_its_environment(pruned: Path, tmp_path: Path) -> None:
    with hub_that_takes() as hub:
        env = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
        run = run_process("push", pruned, REPOSITORY, "--public", env={**env, "HF_HUB_DISABLE_XET": "1"})
        assert run.code == 0 and f"{hub.address}/{REPOSITORY}" in run.stdout, run.stderr
        assert hub.private == {REPOSITORY: False} and "config.json" in hub.files[REPOSITORY]


def test_weights_of_an_earlier_push_go_with_the_next_one(pruned: Path, hub: Hub) -> None:
    """Stock software reads `model.safetensors` before the index of several files."""
    stale = {"model.safetensors": b"old", "own-notes.md": b"kept", ".gitattributes": b""}
    hub.files[REPOSITORY], hub.private[REPOSITORY] = dict(stale), True
    result = json.loads(run_cli("push", pruned, REPOSITORY, "--json").stdout)
    assert result["removed"] == ["model.safetensors"] and hub.commits == 1
    assert stale.keys() - hub.files[REPOSITORY].keys() == {"model.safetensors"}


def test_nothing_goes_by_chance_where_everybody_sees_it(pruned: Path, hub: Hub) -> None:
    hub.files[REPOSITORY], hub.private[REPOSITORY] = {}, False
    assert_refused(run_cli("push", pruned, REPOSITORY), OUTPUT, "everybody may see it", "--public")
    assert hub.files[REPOSITORY] == {} and not hub.blobs
    assert run_cli("push", pruned, REPOSITORY, "--public").code == 0 and hub.files[REPOSITORY]


def test_a_folder_that_has_changed_is_not_pushed(pruned: Path, hub: Hub) -> None:
    edit_json(pruned / "config.json", lambda config: config.update(rope_theta=5.0))
    assert_refused(run_cli("push", pruned, REPOSITORY), VERIFICATION, "config.json")
    assert hub.files == {REPOSITORY: {}} and not hub.blobs


@pytest.mark.parametrize(
    ("part", "status", "said"),
    [
        ("whoami", 401, "does not know your token"),
        ("repos/create", 403, f"may not write to {REPOSITORY}"),
        ("preupload", 403, f"may not write to {REPOSITORY}"),
        ("/blobs/", 400, "goes on, and uploads nothing twice"),
        ("/commit/", 400, "goes on, and uploads nothing twice"),
    ],
)
def test_what_the_hub_refuses_is_said_and_the_folder_stays(
    pruned: Path, hub: Hub, part: str, status: int, said: str
) -> None:
    before = state_of(pruned)
    hub.refuses = {part: status}
    assert_refused(run_cli("push", pruned, REPOSITORY, "-q"), OUTPUT, said)
    assert state_of(pruned) == before and not hub.files.get(REPOSITORY) and not hub.commits
    if status == 400:
        uploaded = {*hub.blobs}
        hub.refuses, hub.asked = {}, []
        assert run_cli("push", pruned, REPOSITORY).code == 0 and "config.json" in hub.files[REPOSITORY]
        assert not uploaded & {line.rpartition("/")[2] for line in hub.asked if "/blobs/" in line}


def test_a_token_is_looked_at_before_anything_else(
    pruned: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.role = "read"
    assert_refused(run_cli("push", pruned, REPOSITORY), OUTPUT, "may only read", "hf auth login")
    assert hub.asked == ["GET /api/whoami-v2"]
    log_in(monkeypatch, hub, tmp_path, token=None)
    assert_refused(run_cli("push", pruned, REPOSITORY), OUTPUT, "not logged in", "hf auth login")
    assert len(hub.asked) == 1


def test_a_hub_that_cannot_be_reached_is_said(pruned: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert_refused(run_cli("push", pruned, REPOSITORY), OUTPUT, "could not be pushed", "llmprune push")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_refused(run_cli("push", pruned, REPOSITORY), OUTPUT, "HF_HUB_OFFLINE is set")


def test_python_pushes_what_the_command_line_pushes(pruned: Path, hub: Hub) -> None:
    stages = []
    result = push(pruned, REPOSITORY, progress=lambda progress: stages.append((progress.stage, progress.done)))
    assert {*result.files} == {*hub.files[REPOSITORY]} and result.private
    assert stages[0] == ("Asking the hub", 0) and stages[-1] == ("Uploading", result.size_bytes)
    hub.refuses = {"/commit/": 400}
    (pruned / "README.md").write_text("another")
    with pytest.raises(OutputError):
        push(pruned, REPOSITORY)


def test_what_is_no_folder_of_ours_or_no_name_is_told_at_once(tiny_llama: Path, pruned: Path, hub: Hub) -> None:
    assert_refused(run_cli("push", tiny_llama, REPOSITORY), CHECKPOINT, "has no llmprune.json", "hf upload")
    assert_refused(run_cli("push", pruned, "pruned"), USAGE, "Write ORG/NAME")
    assert hub.asked == [] and os.environ["HF_TOKEN"] == TOKEN
