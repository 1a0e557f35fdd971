"""What cannot be healed is refused in one message, early, and leaves nothing."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmprune_cli.heal import options as healing_options
from support.cli import BY_MAGNITUDE, run_cli
from support.full import in_full
from support.heal_runs import run_recover
from support.refusals import CHECKPOINT, OUTPUT, UNSUPPORTED, USAGE, VERIFICATION, assert_refused, edit_json, state_of
from support.tiny import save_tiny

LIKE_DENSE = {"initializer_range": 0.2, "tie_word_embeddings": True}


def assert_recover_refused(
    pruned: Path, text: Path, place: Path, code: int, *words: str, options: tuple[str | Path, ...] = ()
) -> None:
    before = state_of(place)
    run = run_recover(pruned, text, place / "out", *options)
    assert_refused(run, code, *words)
    assert run.stderr.count("Error") == 1
    assert state_of(place) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--tokens", "many"), ("'many'", "65k, 0.25M or 1M")),
        (("--tokens", "80%"), ("--tokens",)),
        (("--learning-rate", "0"), ("--learning-rate", "greater than 0")),
        (("--temperature", "nan"), ("--temperature",)),
        (("--loss", "hope"), ("--loss", "'hope'", "kl+0.1ce")),
        (("--loss", "kl+0ce"), ("--loss", "'kl+0ce'")),
        (("--loss", "kl+.ce"), ("--loss", "'kl+.ce'")),
        (("--loss", "kl+-1ce"), ("--loss", "'kl+-1ce'")),
        (("--loss", "2kl"), ("--loss", "'2kl'")),
        (("--lora", "4", "--train", "norms"), ("--train norms",)),
        (("--loss", "ce", "--temperature", "2"), ("--temperature", "--loss ce")),
        (("--device", "cuda:1"), ("CUDA_VISIBLE_DEVICES",)),
        (("--teacher-mode", "resident", "--teacher-cache", "cache"), ("--teacher-cache",)),
    ],
)
def test_options_that_say_nothing_sensible(
    pruned: Path, text_file: Path, tmp_path: Path, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    assert_recover_refused(pruned, text_file, tmp_path, USAGE, *words, options=options)


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [("FSDP", "true", "FSDP"), ("DEEPSPEED", "1", "DeepSpeed"), ("PARALLELISM_CONFIG", "True", "a parallelism config")],
)
def test_a_launcher_that_splits_models(
    pruned: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, kind: str
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", value)
    run = run_recover(pruned, text_file, tmp_path / "out")
    assert_refused(run, USAGE, f"{kind} would split it", "--mode blocks")
    heals = (*BY_MAGNITUDE, "--recover", "1k", "--output", tmp_path / "out")
    assert_refused(run_cli("prune", pruned, "--mlp", "50%", *heals), USAGE, f"{kind} would split it")
    swept = run_cli("sweep", pruned, "--targets", "90%", "--recover", "1k", "--output", tmp_path / "out")
    assert_refused(swept, USAGE, f"{kind} would split it")
    assert not [*tmp_path.iterdir()]


def test_a_teacher_of_another_family(pruned: Path, text_file: Path, tmp_path: Path) -> None:
    teacher = save_tiny(tmp_path / "teacher", "qwen2")
    options = ("--teacher", teacher)
    assert_recover_refused(pruned, text_file, tmp_path, CHECKPOINT, "qwen2", "llama", "--teacher", options=options)


def test_a_teacher_that_the_model_was_not_made_from(pruned: Path, text_file: Path, tmp_path: Path) -> None:
    teacher = save_tiny(tmp_path / "teacher", intermediate_size=56, **LIKE_DENSE)
    words = ("was not made from", "intermediate_size is 56 and not 48")
    assert_recover_refused(pruned, text_file, tmp_path, CHECKPOINT, *words, options=("--teacher", teacher))


def test_a_teacher_with_another_tokenizer(pruned: Path, dense: Path, text_file: Path, tmp_path: Path) -> None:
    teacher = Path(shutil.copytree(dense, tmp_path / "teacher"))

    def exchange(tokenizer: dict[str, dict[str, dict[str, int]]]) -> None:
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    edit_json(teacher / "tokenizer.json", exchange)
    words = ("different tokenizers", "--teacher")
    assert_recover_refused(pruned, text_file, tmp_path, CHECKPOINT, *words, options=("--teacher", teacher))


def test_a_model_that_names_no_teacher(pruned: Path, text_file: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(pruned, tmp_path / "model"))
    (model / "llmprune.json").unlink()
    assert_recover_refused(model, text_file, tmp_path, CHECKPOINT, "Give --teacher")


def test_a_model_whose_teacher_is_gone(pruned: Path, text_file: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(pruned, tmp_path / "model"))
    edit_json(model / "llmprune.json", lambda manifest: manifest.update(source=str(tmp_path / "gone")))
    assert_recover_refused(model, text_file, tmp_path, CHECKPOINT, str(tmp_path / "gone"), "--teacher")


def test_text_shorter_than_a_batch(pruned: Path, text_file: Path, tmp_path: Path) -> None:
    options = ("--batch-tokens", "4096")
    words = ("less than a batch of 4,096", "--batch-tokens")
    assert_recover_refused(pruned, text_file, tmp_path, CHECKPOINT, *words, options=options)


def test_text_without_a_column_that_fits(pruned: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"question": "Why?", "answer": "Because."}) + "\n")
    assert_recover_refused(pruned, text, tmp_path, CHECKPOINT, "no column 'text'", "question, answer")


def test_an_output_that_exists(pruned: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    assert_recover_refused(pruned, text_file, tmp_path, OUTPUT, "is not empty", "--overwrite")


def test_an_output_that_is_one_of_the_models(pruned: Path, dense: Path, text_file: Path) -> None:
    for model in (pruned, dense):
        before = state_of(model)
        run = run_recover(pruned, text_file, model, "--overwrite")
        assert_refused(run, OUTPUT, "overlap")
        assert state_of(model) == before


@pytest.mark.parametrize("place", ["out", "out/cache", "pruned", "dense/deep/cache"])
def test_a_teachers_cache_in_the_folder_of_a_model(
    pruned: Path, dense: Path, text_file: Path, tmp_path: Path, place: str
) -> None:
    folders = {"pruned": pruned, "dense": dense, "out": tmp_path / "out"}
    first, _, rest = place.partition("/")
    before = state_of(pruned), state_of(dense)
    options = ("--teacher-cache", folders[first] / rest)
    assert_recover_refused(pruned, text_file, tmp_path, OUTPUT, "--teacher-cache", "lies in", options=options)
    assert (state_of(pruned), state_of(dense)) == before


def test_a_learning_rate_that_is_too_large(pruned: Path, text_file: Path, tmp_path: Path) -> None:
    options = ("--learning-rate", "1e30", "--seed", "1")
    assert_recover_refused(
        pruned, text_file, tmp_path, VERIFICATION, "smaller --learning-rate than 1e+30", options=options
    )


@pytest.mark.parametrize(
    "options",
    [
        (),
        pytest.param(("--teacher-mode", "streamed"), marks=in_full),
        pytest.param(("--mode", "blocks"), marks=in_full),
    ],
)
def test_a_model_that_predicts_no_numbers(
    pruned: Path, text_file: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    model = Path(shutil.copytree(pruned, tmp_path / "model"))
    (shard,) = model.glob("*.safetensors")
    tensors = load_file(shard)
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, shard, metadata={"format": "pt"})
    words = ("The pruned model or its teacher", "damaged")
    assert_recover_refused(model, text_file, tmp_path, CHECKPOINT, *words, options=options)


@pytest.mark.skipif(importlib.util.find_spec("peft") is not None, reason="peft is installed")
def test_adapters_without_peft(pruned: Path, text_file: Path, tmp_path: Path) -> None:
    words = ("peft", "pip install")
    assert_recover_refused(pruned, text_file, tmp_path, UNSUPPORTED, *words, options=("--lora", "4"))


def test_an_optimizer_without_its_package(
    pruned: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(healing_options, "find_spec", lambda name: None)
    words = ("bitsandbytes", "pip install")
    asked = ("--optimizer", "adamw-8bit")
    assert_recover_refused(pruned, text_file, tmp_path, UNSUPPORTED, *words, options=asked)


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        (lambda manifest: manifest["calibration"].update(answers=5), (), "is not a manifest of llmprune"),
        (lambda manifest: manifest["calibration"].pop("kl"), (), "is not a manifest of llmprune"),
        (lambda manifest: manifest["layers"].reverse(), ("--mode", "blocks"), "Nothing says which of the"),
        (lambda manifest: manifest["layers"].insert(0, -1), ("--hidden-weight", "1"), "Nothing says which of the"),
    ],
)
def test_what_a_manifest_cannot_mean_is_told_before_anything_is_trained(
    pruned: Path,
    text_file: Path,
    tmp_path: Path,
    change: Callable[[dict[str, Any]], object],
    options: tuple[str, ...],
    said: str,
) -> None:
    folder = shutil.copytree(pruned, tmp_path / "torn")
    calibration = {"dataset": "a", "origin": "a", "tokens": 1, "kl": None}
    edit_json(folder / "llmprune.json", lambda manifest: manifest.update(calibration=calibration))
    edit_json(folder / "llmprune.json", change)
    assert_recover_refused(folder, text_file, tmp_path, CHECKPOINT, said, options=options)
