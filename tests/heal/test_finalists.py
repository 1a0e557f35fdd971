"""The best candidates for a size are healed for a while, and the run goes on with the best of them."""

from __future__ import annotations

import json
from pathlib import Path

from support.cli import run_cli
from support.full import in_full
from support.gguf_exports import tiny
from support.stock import load_stock
from support.tiny import save_tiny


@in_full
def test_the_candidate_that_heals_best_is_gone_on_with(text_file: Path, tmp_path: Path) -> None:
    dense = save_tiny(tmp_path / "dense", initializer_range=0.1, num_hidden_layers=4)
    words = ("prune", dense, "--target", "85%", "--vocab", "keep", "--recover", "2048", "--finalists", "2")
    text = ("--calibration", text_file, "--calibration-seq-len", "32", "--calibration-tokens", "512")
    judged = ("--eval", "--dataset", text_file, "--max-seq-len", "32", "--limit", "4")
    run = run_cli(*words, *text, *judged, "--output", tmp_path / "out", "--json")
    assert run.code == 0, run.stderr
    result = json.loads(run.stdout)
    first, second = result["finalists"]
    assert first["kl_after"] <= second["kl_after"] and first["widths"] != second["widths"]
    best = [own["widths"] for own in result["candidates"][:2]]
    assert first["widths"] in best and second["widths"] in best
    assert result["after"]["widths"] == first["widths"] and result["target"] == "85% of the parameters"
    assert result["recovery"]["tokens"] > 1024 and len(result["evaluation"]["results"]) == 3
    assert load_stock(tmp_path / "out").config.intermediate_size == first["widths"]["intermediate_size"]
    recipe = json.loads((tmp_path / "out" / "llmprune.json").read_text())["recipe"]
    assert recipe["recover"] == "2048" and not {"target", "finalists"} & recipe.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "out"]


@in_full
def test_finalists_have_the_tokens_that_the_search_found(text_file: Path, tmp_path: Path) -> None:
    dense = tiny(tmp_path / "dense", "llama")
    words = ("prune", dense, "--target", "80%", "--vocab", "320", "--recover", "1024", "--finalists", "2")
    text = ("--calibration", text_file, "--calibration-seq-len", "32", "--calibration-tokens", "512")
    run = run_cli(*words, *text, "--output", tmp_path / "out", "--json")
    assert run.code == 0, run.stderr
    result = json.loads(run.stdout)
    first, second = result["finalists"]
    assert first["kl_after"] <= second["kl_after"] and first["widths"] != second["widths"]
    stock = load_stock(tmp_path / "out")
    assert stock.config.vocab_size == 320 and stock.num_parameters() == first["parameters"]
    assert run.stderr.splitlines().count("Ranking tokens") == 1
