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
    assert_refused(run_cli("push", pruned, REPOSITORY), OUTPUT, "Nothing can be pushed", "llmprune push")
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


HALVED = (*BY_MAGNITUDE, "--pruning-ratio", "0.5", "--push-to", REPOSITORY)


def test_what_prune_writes_goes_to_the_hub_in_one_go(tiny_llama: Path, hub: Hub, tmp_path: Path) -> None:
    run = run_cli("prune", tiny_llama, *HALVED, "--output", tmp_path / "pruned", "--json")
    assert run.code == 0, run.stderr
    result, files = json.loads(run.stdout), hub.files[REPOSITORY]
    assert result["push"]["url"] == f"{hub.address}/{REPOSITORY}" and hub.private[REPOSITORY] and hub.commits == 1
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "pruned").iterdir()}
    recipe = json.loads(files["llmprune.json"])["recipe"]
    assert not {"push_to", "public"} & recipe.keys(), "where results go is no part of a recipe"
    shown = run_cli("prune", tiny_llama, *HALVED, "--output", tmp_path / "pruned", "--overwrite").stdout
    assert f"{hub.address}/{REPOSITORY}" in shown and "llmprune push" not in shown


def test_what_recover_writes_goes_there_too(tiny_llama: Path, text_file: Path, hub: Hub, tmp_path: Path) -> None:
    options = ("--text", text_file, "--tokens", "1k", "--seq-len", "32", "--push-to", "tests/healed", "--public")
    assert run_cli("prune", tiny_llama, *HALVED[:-2], "--output", tmp_path / "pruned").code == 0
    run = run_cli("recover", tmp_path / "pruned", *options, "--output", tmp_path / "healed")
    assert run.code == 0 and f"{hub.address}/tests/healed" in run.stdout, run.stderr
    assert hub.private == {"tests/healed": False}
    healing = json.loads(hub.files["tests/healed"]["llmprune.json"])["healing"]
    assert healing["tokens"] and "push" not in healing


def test_an_upload_that_fails_leaves_what_was_written(tiny_llama: Path, hub: Hub, tmp_path: Path) -> None:
    hub.refuses = {"/commit/": 403}
    run = run_cli("prune", tiny_llama, *HALVED, "--output", tmp_path / "pruned")
    later = f"llmprune push {tmp_path / 'pruned'} {REPOSITORY}"
    assert_refused(run, OUTPUT, f"may not write to {REPOSITORY}", later)
    assert run_cli("inspect", tmp_path / "pruned", "--verify").code == 0
    hub.refuses = {}
    assert run_cli(*later.split()[1:]).code == 0 and "config.json" in hub.files[REPOSITORY]


def test_a_push_that_must_fail_is_refused_before_the_work(
    tiny_llama: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("prune", tiny_llama, *HALVED, "--output", tmp_path / "pruned")
    hub.files[REPOSITORY], hub.private[REPOSITORY] = {}, False
    assert_refused(run_cli(*command), OUTPUT, "everybody may see it", "--public")
    hub.refuses = {"whoami": 401}
    assert_refused(run_cli(*command), OUTPUT, "does not know your token", "Nothing was done yet")
    hub.refuses, hub.role = {}, "read"
    assert_refused(run_cli(*command), OUTPUT, "may only read")
    asked = len(hub.asked)
    assert_refused(run_cli(*command[:-3], "pruned", *command[-2:]), USAGE, "Write ORG/NAME")
    assert_refused(run_cli(*command[:-4], "--public", *command[-2:]), USAGE, "--push-to ORG/NAME")
    assert_refused(run_cli(*command[:-2], "--dry-run"), USAGE, "give its --output")
    log_in(monkeypatch, hub, tmp_path, token=None)
    assert_refused(run_cli(*command), OUTPUT, "not logged in", "hf auth login")
    assert len(hub.asked) == asked and not any(line.startswith("POST") for line in hub.asked)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_folder_of_ours_or_no_name_is_told_at_once(tiny_llama: Path, pruned: Path, hub: Hub) -> None:
    assert_refused(run_cli("push", tiny_llama, REPOSITORY), CHECKPOINT, "has no llmprune.json", "hf upload")
    assert_refused(run_cli("push", pruned, "pruned"), USAGE, "Write ORG/NAME")
    assert hub.asked == [] and os.environ["HF_TOKEN"] == TOKEN
