"""Every form of text gives the same windows."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.cli import WINDOW, evaluated


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
