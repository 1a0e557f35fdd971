"""The hidden states behind each layer are learned, too."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmprune_cli.folder.manifest import read_manifest
from llmprune_cli.heal.layers import relative_error, stands_for
from llmprune_cli.heal.teacher.repeated import Repeated
from llmprune_cli.heal.teacher.streamed import DRAWN, LIKELIEST
from llmprune_cli.heal.training_text import TrainingText
from llmprune_cli.options import ModelReference
from llmprune_cli.source.opening import open_checkpoint
from support.cli import BY_MAGNITUDE, run_cli
from support.full import in_full
from support.heal_runs import recover, run_recover
from support.refusals import CHECKPOINT, OUTPUT, PLAN, UNSUPPORTED, assert_refused, state_of
from support.tiny import save_tiny

LAYERS, LENGTH, CHANNELS = 4, 32, 64
STAND_FOR = ((0, 2), (1, 3))  # of the two layers that stay: the layer behind which the stream is to be the teacher's


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("deep") / "dense", initializer_range=0.1, num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def shallow(deep: Path) -> Path:
    """Layers 1 and 3 stay; behind layer 1 stands what layer 2 made."""
    folder = deep.with_name("pruned")
    run = run_cli("prune", deep, *BY_MAGNITUDE, "--drop-layers", "0,2", "--output", folder)
    assert run.code == 0, run.stderr
    return folder


def stream_errors(folder: Path, teacher: Path) -> list[float]:
    streams: list[torch.Tensor] = []

    def keep(_: object, __: object, output: torch.Tensor) -> None:
        streams.append(output)

    windows = torch.randint(4, 96, (4, 32), generator=torch.Generator().manual_seed(3))
    found = []
    for own, layers in ((teacher, [its for _, its in STAND_FOR]), (folder, [layer for layer, _ in STAND_FOR])):
        model = AutoModelForCausalLM.from_pretrained(own).eval()
        for layer in layers:
            model.model.layers[layer].register_forward_hook(keep)
        with torch.no_grad():
            model(windows)
        found.append([*streams])
        streams.clear()
    return [float(relative_error(own, wanted)) for wanted, own in zip(*found, strict=True)]


def test_a_layer_stands_for_those_that_went_behind_it(deep: Path, shallow: Path) -> None:
    with (
        open_checkpoint(ModelReference(str(shallow)), need_weights=True) as own,
        open_checkpoint(ModelReference(str(deep)), need_weights=True) as its,
    ):
        assert stands_for(own, read_manifest(shallow), its, "") == tuple(theirs for _, theirs in STAND_FOR)


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--teacher-mode", "streamed"),
        pytest.param(("--gradient-checkpointing",), marks=in_full),
    ],
)
def test_streams_come_nearer_to_those_of_the_layers_that_they_stand_for(
    deep: Path, shallow: Path, text_file: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    result = recover(shallow, text_file, tmp_path / "healed", "--hidden-weight", "20", *more)
    assert result["hidden_weight"] == 20 and result["is_better"]
    before, after = (stream_errors(folder, deep) for folder in (shallow, tmp_path / "healed"))
    assert sum(after) < 0.95 * sum(before)  # which grows where predictions alone are learned


def test_what_cannot_be_compared_is_refused(deep: Path, shallow: Path, text_file: Path, tmp_path: Path) -> None:
    weight = ("--hidden-weight", "1")
    narrow = tmp_path / "narrow"
    assert run_cli("prune", deep, *BY_MAGNITUDE, "--hidden-size", "32", "--output", narrow).code == 0
    run = run_recover(narrow, text_file, tmp_path / "out", *weight)
    assert_refused(run, UNSUPPORTED, "32 channels and not 64", "--hidden-weight")
    (shallow / "llmprune.json").rename(tmp_path / "manifest")
    try:
        run = run_recover(shallow, text_file, tmp_path / "out", *weight, "--teacher", deep)
    finally:
        (tmp_path / "manifest").rename(shallow / "llmprune.json")
    assert_refused(run, CHECKPOINT, "which of the 4 layers", "--hidden-weight")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["narrow"]


def test_a_streamed_teacher_keeps_its_hidden_states_where_there_is_room(
    shallow: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, weight = ("--teacher-cache", tmp_path / "cache"), ("--hidden-weight", "20", "--train", "norms")
    resident = recover(shallow, text_file, tmp_path / "resident", *weight, "--teacher-mode", "resident")
    streamed = recover(shallow, text_file, tmp_path / "streamed", *weight, *cache)
    assert streamed["after"]["kl"] == pytest.approx(resident["after"]["kl"], rel=0.01)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "cache").iterdir()}
    windows = sizes["tokens.bin"] // (4 * (LENGTH - 1) * (LIKELIEST + DRAWN))
    assert sizes["hidden-states.bin"] == 2 * len(STAND_FOR) * windows * LENGTH * CHANNELS
    before = state_of(tmp_path)
    run = run_recover(shallow, text_file, tmp_path / "out", *cache)
    assert_refused(run, PLAN, "layers with hidden states", "--teacher-cache")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, 500_000))
    run = run_recover(shallow, text_file, tmp_path / "out", *weight, "--teacher-mode", "streamed")
    assert_refused(run, OUTPUT, "500,000 bytes", "its hidden states for --hidden-weight")
    assert state_of(tmp_path) == before


def test_of_a_teacher_whose_layers_are_followed_no_text_is_kept_but_what_is_judged(
    pruned: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, kept, many = Repeated.of, list[bool](), ("--tokens", "16384")

    def noting(text: TrainingText, folder: Path, with_trained: bool) -> Repeated:
        kept.append(with_trained)
        return made(text, folder, with_trained)

    monkeypatch.setattr(Repeated, "of", noting)
    for weight in ("0", "1"):
        recover(pruned, text_file, tmp_path / weight, "--hidden-weight", weight, "--teacher-mode", "resident", *many)
    assert kept == [True, False]
