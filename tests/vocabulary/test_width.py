"""`inspect` shows the vocabulary as a width."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llmprune_cli.commands.prune.vocabulary import summarize_vocabulary
from llmprune_cli.coupling.subject import understand
from llmprune_cli.options import ModelReference
from llmprune_cli.source.opening import open_checkpoint
from support.cli import BY_MAGNITUDE, run_cli
from support.full import in_full
from support.gguf_exports import tiny
from support.refusals import PLAN, UNSUPPORTED, USAGE
from support.stock import written_tensors


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("model") / "model", "llama", num_hidden_layers=2)


def inspected(*words: str | Path) -> dict[str, Any]:
    run = run_cli("inspect", *words, "--json")
    assert run.code == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout)
    return found


@in_full
def test_what_tokens_weigh_and_what_fewer_would_save_is_shown(model: Path) -> None:
    found = inspected(model, "--vocab-size", "320", "--mlp", "50%")
    own, whole = found["vocabulary"], sum(tensor.numel() for tensor in written_tensors(model).values())
    assert own == {
        "tokens": 384,
        "after": 320,
        "must_stay": own["must_stay"],
        "parameters": 2 * 384 * 64,
        "share": pytest.approx(2 * 384 * 64 / whole),
        "refused": "",
    }
    assert 256 + 3 <= own["must_stay"] <= 300
    assert found["before"]["parameters"] - found["after"]["parameters"] == 2 * 64 * 64 + 2 * 24 * (3 * 64 + 2)
    shown = run_cli("inspect", model).stdout
    assert "320 to 384, multiples of 64" in shown and f"{own['must_stay']} must stay" in " ".join(shown.split())
    assert "--vocab-size 50% saves" in " ".join(shown.split())


@in_full
def test_what_is_written_weighs_what_was_shown(model: Path, tmp_path: Path) -> None:
    found = inspected(model, "--vocab-size", "320", "--mlp", "50%")
    (tmp_path / "text.txt").write_text(Path(__file__).read_text())
    text = ("--calibration", tmp_path / "text.txt", "--calibration-seq-len", "40", "--calibration-tokens", "400")
    options = ("--vocab-size", "320", "--mlp", "50%", *BY_MAGNITUDE, *text)
    run = run_cli("prune", model, *options, "--output", tmp_path / "out")
    assert run.code == 0, run.stderr
    written = sum(tensor.numel() for tensor in written_tensors(tmp_path / "out").values())
    assert found["after"]["parameters"] == written < found["before"]["parameters"]


def test_rows_that_weigh_little_are_looked_into_no_further(model: Path) -> None:
    with open_checkpoint(ModelReference(str(model)), need_weights=False) as checkpoint:
        subject = understand(checkpoint)
        brief, whole = (summarize_vocabulary(subject, least_share=share) for share in (0.99, 0.0))
    assert brief.must_stay is None and whole.must_stay is not None
    assert (brief.tokens, brief.parameters, brief.share) == (whole.tokens, whole.parameters, whole.share)


def test_tokens_to_keep_are_counted(model: Path, tmp_path: Path) -> None:
    keep, before = tmp_path / "keep.txt", inspected(model)["vocabulary"]["must_stay"]
    last = max(json.loads((model / "tokenizer.json").read_text())["model"]["vocab"].values())
    keep.write_text(f"{last}\n")
    assert inspected(model, "--keep-tokens", keep)["vocabulary"]["must_stay"] > before


@in_full
def test_why_no_token_can_go_is_shown(tiny_llama: Path, tmp_path: Path) -> None:
    own = inspected(tiny_llama)["vocabulary"]
    assert own["refused"] and own["tokens"] == 96 and own["share"] > 0
    (tmp_path / "config.json").write_text((tiny_llama / "config.json").read_text())
    assert "no tokenizer.json" in inspected(tmp_path)["vocabulary"]["refused"]
    assert "no: " in run_cli("inspect", tmp_path).stdout.split("vocabulary")[1]


def test_a_token_around_every_text_that_has_no_row_is_named_at_once(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "more")
    path = tmp_path / "more" / "tokenizer.json"
    document = json.loads(path.read_text())
    document["added_tokens"].append({**document["added_tokens"][0], "id": 384, "content": "<extra>"})
    assert not inspected_with(path, document)["refused"]
    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<extra>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<extra>": {"id": "<extra>", "ids": [384], "tokens": ["<extra>"]}},
    }
    assert "'<extra>', whose number is 384" in inspected_with(path, document)["refused"]
    run = run_cli("prune", path.parent, "--vocab-size", "320", *BY_MAGNITUDE, "--output", tmp_path / "out")
    assert run.code == UNSUPPORTED and "<extra>" in run.stderr and not (tmp_path / "out").exists()


def inspected_with(path: Path, document: dict[str, Any]) -> dict[str, Any]:
    path.write_text(json.dumps(document))
    found: dict[str, Any] = inspected(path.parent)["vocabulary"]
    return found


def test_a_size_that_cannot_be_is_refused(model: Path) -> None:
    for size, code, word in (("64", PLAN, "must stay"), ("384", PLAN, "Give fewer"), ("auto", USAGE, "target")):
        run = run_cli("inspect", model, "--vocab-size", size)
        assert run.code == code and word in run.stderr
