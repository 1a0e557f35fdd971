"""Every form of text gives the same windows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmprune_cli.errors import CheckpointError
from llmprune_cli.text import corpus
from support.cli import CALIBRATED, WINDOW, evaluated, run_cli
from support.gguf_exports import tiny
from support.refusals import CHECKPOINT, assert_refused


@pytest.mark.parametrize("form", ["parquet", "jsonl", "folder"])
def test_every_form_of_text_gives_the_same_windows(tiny_llama: Path, tmp_path: Path, form: str) -> None:
    from datasets import Dataset

    rows = [f"row {number} of a dataset" for number in range(40)]
    dataset = Dataset.from_dict({"text": rows})
    path = tmp_path / f"corpus.{form}"
    if form == "jsonl":
        dataset.to_json(path)
    else:
        target = tmp_path / "data" / "test-00000-of-00001.parquet" if form == "folder" else path
        target.parent.mkdir(exist_ok=True)
        dataset.to_parquet(target)
        path = tmp_path / "data" if form == "folder" else path
    (tmp_path / "corpus.txt").write_text("\n\n".join(rows))
    options = ["--max-seq-len", str(WINDOW), "--limit", "5"]
    found = evaluated(tiny_llama, "--dataset", path, *options)["results"][0]
    expected = evaluated(tiny_llama, "--dataset", tmp_path / "corpus.txt", *options)["results"][0]
    assert found["windows"] == 5 and found["tokens"] == 5 * WINDOW
    assert found["perplexity"] == expected["perplexity"]


def test_models_are_evaluated_on_what_is_there_where_nobody_names_a_text(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise CheckpointError("No way to the hub.")

    monkeypatch.delenv("LLMPRUNE_WIKITEXT2", raising=False)
    monkeypatch.setattr(corpus, "_load", unreachable)
    asked = ("eval", tiny_llama, tiny_llama, "--max-seq-len", str(WINDOW), "--limit", "2")
    run = run_cli(*asked, "--json")
    assert run.code == 0 and run.stderr.count("WikiText-2 is out of reach") == 1, run.stderr
    assert "--dataset names better text" in run.stderr
    report = json.loads(run.stdout)
    assert report["dataset"] == "python-docs" and report["results"][1]["kl"] == pytest.approx(0, abs=1e-6)
    assert "Perplexity on python-docs (test), " in run_cli(*asked).stdout
    assert_refused(run_cli(*asked, "--split", "validation"), CHECKPOINT, "No way to the hub")
    assert_refused(run_cli(*asked, "--dataset", "wikitext2"), CHECKPOINT, "No way to the hub")


def test_a_folder_without_a_split_says_which_it_has_and_how_to_name_it(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("Once upon a time there was a text. " * 40)
    asked = ("prune", tiny_llama, "--mlp", "50%", *CALIBRATED, "--calibration", folder, "--output", tmp_path / "out")
    assert_refused(run_cli(*asked), CHECKPOINT, "of ['train']. Name one of these with --calibration-split")
    run = run_cli(*asked, "--calibration-split", "train")
    assert run.code == 0, run.stderr


def test_a_dataset_that_cannot_be_read_says_why_and_what_to_give(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "test.jsonl").write_text('{"text": "Once"}\n{"text": 1, "number": [}\n')
    run = run_cli("eval", tiny_llama, "--dataset", folder)
    assert_refused(run, CHECKPOINT, "at position", ". Give a file")
    assert_refused(run_cli("eval", tiny_llama, "--dataset", "nope"), CHECKPOINT, "'nope'", ". Give a file")


def test_no_part_of_the_documentation_is_learned_from_and_judged_by() -> None:
    judged, learned = (corpus.load_corpus("python-docs", split).text for split in ("test", "validation"))
    assert not {*judged.split("\n\n")} & {*learned.split("\n\n")}
    assert len(judged) > 150_000 and len(learned) > 100_000
    assert learned == corpus.load_corpus("python-docs", "train").text


def test_where_nobody_names_a_text_wikitext2_and_documentation_are_learned_from(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import Dataset

    for split in ("validation", "train"):
        rows = [f"Row {number} of {split}, which is no documentation. " * 4 for number in range(200)]
        path = tmp_path / "wikitext" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(exist_ok=True)
        Dataset.from_dict({"text": rows}).to_parquet(path)
    monkeypatch.setenv("LLMPRUNE_WIKITEXT2", str(tmp_path / "wikitext"))
    asked = ("prune", tiny_llama, "--mlp", "25%", *CALIBRATED, "--calibration-tokens", "2000")
    printed = run_cli(*asked, "--output", tmp_path / "usual", "--json")
    assert printed.code == 0, printed.stderr
    named = ("--calibration", "wikitext2:0.7,python-docs:0.3")
    shown = run_cli(*asked, *named, "--output", tmp_path / "named")
    assert shown.code == 0 and "perplexity (wikitext2, python-docs)" in shown.stdout, shown.stderr
    usual, spelled, by_split = (tmp_path / name / "model.safetensors" for name in ("usual", "named", "by-split"))
    assert usual.read_bytes() == spelled.read_bytes()
    assert json.loads(printed.stdout)["calibration"]["dataset"] == named[1]
    assert run_cli(*asked, "--calibration-split", "train", "--output", by_split.parent, "--json").code == 0
    manifest = json.loads((by_split.parent / "llmprune.json").read_text())
    assert (manifest["calibration"]["dataset"], manifest["calibration"]["split"]) == ("wikitext2", "train")
    words = ("--vocab-size", "300", "--mlp", "50%", "--calibration-seq-len", "40", "--calibration-tokens", "2000")
    spelled = tiny(tmp_path / "spelled", "llama")
    plans = [tmp_path / f"{name}.json" for name in ("by-default", "by-name")]
    for plan, named_or_not in zip(plans, ((), named), strict=True):
        run = run_cli("prune", spelled, *words, *named_or_not, "--save-plan", plan, "--output", plan.with_suffix(""))
        assert run.code == 0, run.stderr
    by_default, by_name = (json.loads(plan.read_text()) for plan in plans)
    assert by_default["vocabulary"] == by_name["vocabulary"]  # tokens, too, are ranked by both texts
    long = corpus.load_usual_corpora("validation", "validation", 50_000, pytest.fail, "--text")
    assert [(own.name, share) for own, share in long] == [("wikitext2", 1.0)]  # of documentation there is too little
