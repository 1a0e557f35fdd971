"""The README.md that is written with every model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from support.cli import BY_MAGNITUDE, run_cli

TEXT = ("--calibration-tokens", "600", "--calibration-seq-len", "40")


def test_the_card_of_a_pruned_model_says_what_the_manifest_says(
    tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(tiny_llama, tmp_path / "a`model"))
    (source / "README.md").write_text("---\nlicense: mit\nlanguage: [en]\nbase_model: some/one\n---\nMine.\n")
    (source / "LICENSE.txt").write_text("Do as you like.")
    run = run_cli(
        *("prune", source, "--intermediate-size", "24", "--layers", "1", "--output", tmp_path / "out"),
        *("--calibration", text_file, *TEXT),
    )
    assert run.code == 0, run.stderr
    manifest = json.loads((tmp_path / "out" / "llmprune.json").read_text())
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "mit" and card.data.language == ["en"] and card.data.base_model == "some/one"
    assert {"pruned", "llmprune"} <= {*card.data.tags} and card.data.library_name == "transformers"
    figures = manifest["calibration"]
    for figure in (
        f"{manifest['parameters']['after']:,}",
        f"{figures['kl']:.3f}",
        f"{figures['perplexity_after']:,.2f}",
    ):
        assert figure in card.text
    assert "`` a`model ``" in card.text and "1 of 2 layers stay" in card.text and "`consensus`" in card.text
    assert (tmp_path / "out" / "LICENSE.txt").read_text() == "Do as you like."


def test_the_card_of_an_export_keeps_the_licence_and_says_how_to_load_it(tiny_llama: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert run_cli("prune", source, "--intermediate-size", "24", *BY_MAGNITUDE, "--output", tmp_path / "out").code == 0
    run = run_cli("export", tmp_path / "out", "--format", "torch-export", "--no-verify", "--output", tmp_path / "graph")
    assert run.code == 0, run.stderr
    card = ModelCard.load(tmp_path / "graph" / "README.md")
    assert card.data.license == "apache-2.0" and 'torch.export.load("model.pt2")' in card.text
    assert "nothing was trained" in card.text.lower() and "perplexity" not in card.text


@pytest.mark.parametrize("text", ["---\n: [\n---\n", "no front matter", "---\nlicense: 7\n---\n"])
def test_a_card_that_cannot_be_read_does_not_matter(text: str, tiny_llama: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    (source / "README.md").write_text(text)
    assert run_cli("export", source, "--output", tmp_path / "out").code == 0
    assert "llmprune" in ModelCard.load(tmp_path / "out" / "README.md").data.tags


def test_a_manifest_that_is_none_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    (source / "llmprune.json").write_text('{"source": "x", "widths": 3}')
    run = run_cli("export", source, "--output", tmp_path / "out")
    assert run.code == 3 and "llmprune.json" in run.stderr and not (tmp_path / "out").exists()
