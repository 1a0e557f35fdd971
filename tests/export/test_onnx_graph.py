"""Graphs for ONNX Runtime and torch.export: the same probabilities and choices, for any batch and length."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import families
from conftest import BY_MAGNITUDE, BYTE_LEVEL_VOCABULARY, Run, run_cli, save_byte_level, save_tiny, tiny_config
from llmprune_cli.export import FORMATS
from llmprune_cli.export.formats import Fit, Limits
from llmprune_cli.export.genai import FAMILIES as GENAI_FAMILIES
from llmprune_cli.export.genai import PACKAGE
from llmprune_cli.export.graphs import SCANNING
from llmprune_cli.export.verification import kl_limit
from test_oracles import load_stock

HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
needs_genai = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime_genai") is None, reason="pip install 'llmprune[genai]'"
)
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="pip install 'llmprune[onnx]'")


@pytest.fixture(autouse=True)
def few_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pruned(folder: Path, family: str, **changes: object) -> Path:
    """A random checkpoint with half of its query heads, which then do not fill the hidden size where they need not."""
    own = {**families.FAMILIES[family], **families.EXPORTED[family]}
    depth = {} if "layer_types" in own else {"num_hidden_layers": 2}  # tracing takes its time for every layer
    settings = {**families.SIZES, **depth, **own, "initializer_range": 0.15, **changes}
    save_tiny(folder / "model", families.model_type(family), **settings)
    cut = ("--head-pruning-ratio", "0.5", "--intermediate-pruning-ratio", "0.25")
    run = run_cli("prune", folder / "model", *cut, *BY_MAGNITUDE, "--output", folder / "pruned")
    assert run.code == 0, run.stderr
    return folder / "pruned"


def export(folder: Path, output: Path, form: str, *options: str) -> Run:
    return run_cli("export", folder, "--format", form, "--output", output, "--verify", "--json", *options)


def verified(run: Run) -> dict[str, Any]:
    assert run.code == 0, run.stderr
    document: dict[str, Any] = json.loads(run.stdout)
    assert document["verification"]["kl"] <= document["verification"]["kl_limit"]
    return document


@pytest.mark.parametrize("family", families.EXPORTED)
def test_a_torch_graph_gives_the_logits_of_any_batch_and_length(family: str, tmp_path: Path) -> None:
    folder = pruned(tmp_path, family)
    document = verified(export(folder, tmp_path / "graph", "torch-export", "--dtype", "f32"))
    assert document["verification"]["same_tokens"] == 1 and "model.pt2" in document["files"]
    graph, model = torch.export.load(tmp_path / "graph" / "model.pt2").module(), load_stock(folder)
    for shape in ((1, 2), (3, 20)):
        tokens = torch.randint(3, 90, shape)
        with torch.no_grad():
            torch.testing.assert_close(graph(tokens), model(input_ids=tokens, use_cache=False).logits)


@needs_onnx
@pytest.mark.parametrize("family", families.EXPORTED)
def test_an_onnx_graph_reads_prompts_and_goes_on_with_its_cache(family: str, tmp_path: Path) -> None:
    from llmprune_cli.export.onnx_graph import open_onnx

    folder = pruned(tmp_path, family)
    document = verified(export(folder, tmp_path / "graph", "onnx", "--dtype", "f32"))
    assert document["verification"]["same_tokens"] == 1
    assert {"model.onnx", "model.onnx.data", "config.json", "tokenizer.json"} <= {*document["files"]}
    model, tokens, done = load_stock(folder), torch.randint(3, 90, (3, 20)), 0
    with torch.no_grad(), open_onnx(tmp_path / "graph") as graph:
        expected, past = model(input_ids=tokens, use_cache=False).logits, graph.empty_past(3)
        assert past
        for step in (7, 1, 5, 1, 6):
            logits, past = graph.run(tokens[:, done : done + step], past)
            torch.testing.assert_close(logits, expected[:, done : done + step], rtol=1e-3, atol=1e-4)
            done += step


@needs_onnx
def test_an_onnx_graph_without_a_cache_takes_token_ids_only(tmp_path: Path) -> None:
    from llmprune_cli.export.onnx_graph import open_onnx

    folder = save_tiny(tmp_path / "model")
    verified(export(folder, tmp_path / "graph", "onnx", "--no-kv-cache"))
    tokens = torch.randint(3, 90, (2, 9))
    with torch.no_grad(), open_onnx(tmp_path / "graph") as graph:
        assert [*graph.inputs] == ["input_ids"]
        logits, _ = graph.run(tokens, {})
        torch.testing.assert_close(logits, load_stock(folder)(input_ids=tokens).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("form", ["torch-export", pytest.param("onnx", marks=needs_onnx)])
def test_half_precision_is_within_its_limit(form: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    assert verified(export(folder, tmp_path / "graph", form, "--dtype", "f16"))["dtype"] == "float16"


def test_rounding_may_cost_as_much_again_as_it_costs_in_transformers() -> None:
    assert kl_limit(1e-3, 0.0) == kl_limit(1e-3, 5e-4) == 1e-3
    assert kl_limit(1e-3, 1.5e-3) == 3e-3
    assert kl_limit(1e-2, 5e-4) == 1e-2
    assert kl_limit(1e-2, 2e-3) == 2e-2


def test_a_graph_that_is_not_the_model_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    form = FORMATS["torch-export"]
    monkeypatch.setitem(FORMATS, "torch-export", replace(form, limits={"float32": Limits(-1.0)}))
    run = export(save_tiny(tmp_path / "model"), tmp_path / "graph", "torch-export")
    assert run.code == 7 and "KL per token" in run.stderr and not (tmp_path / "graph").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@needs_onnx
def test_a_state_that_is_no_cache_is_refused(tmp_path: Path) -> None:
    settings = {**families.SIZES, **families.FAMILIES["lfm2"]}
    folder = save_tiny(tmp_path / "model", "lfm2", **settings)
    run = export(folder, tmp_path / "graph", "onnx")
    assert run.code == 4 and "--no-kv-cache" in run.stderr and not (tmp_path / "graph").exists()
    said = json.loads(run_cli("inspect", folder, "--json").stdout)["runtimes"]
    assert "with --no-kv-cache" in next(fit["note"] for fit in said if fit["runtime"] == "ONNX Runtime")
    verified(export(folder, tmp_path / "graph", "onnx", "--no-kv-cache"))


@pytest.mark.parametrize("family", SCANNING)
def test_what_scans_in_steps_is_refused_before_it_is_traced(family: str, tmp_path: Path) -> None:
    settings = {**families.SIZES, **families.FAMILIES[family]}
    tiny_config(family, **settings).save_pretrained(tmp_path / "model")  # type: ignore[attr-defined]
    run = run_cli("inspect", tmp_path / "model", "--json")
    assert run.code == 0, run.stderr
    fits = {fit["runtime"]: fit for fit in json.loads(run.stdout)["runtimes"]}
    assert not fits["ONNX Runtime"]["loads"] and not fits["torch.export"]["loads"]
    assert "steps" in fits["torch.export"]["note"] and fits["transformers"]["loads"]


def test_a_graph_of_steps_indeed_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    form = FORMATS["torch-export"]
    monkeypatch.setitem(FORMATS, "torch-export", replace(form, fit=lambda config: Fit(loads=True)))
    settings = {**families.SIZES, **families.FAMILIES["mamba2"], "num_hidden_layers": 1}
    folder = save_tiny(tmp_path / "model", "mamba2", **settings)
    run = export(folder, tmp_path / "graph", "torch-export")
    assert run.code == 7 and "does not run" in run.stderr and not (tmp_path / "graph").exists()


def test_a_model_of_few_positions_is_verified_within_them(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", max_position_embeddings=16)
    assert verified(export(folder, tmp_path / "graph", "torch-export"))["verification"]["tokens"] == 3 * 8


@needs_genai
@pytest.mark.parametrize("family", families.EXPORTED)
def test_genai_generates_what_transformers_does_or_is_refused(family: str, tmp_path: Path) -> None:
    folder = pruned(tmp_path, family, **families.HEADS_OF_16)
    run = export(folder, tmp_path / "genai", "genai", "--dtype", "f32")
    if family not in GENAI_FAMILIES:
        assert run.code == 4 and "its builder" in run.stderr and not (tmp_path / "genai").exists()
        return
    document = verified(run)
    assert document["verification"]["same_tokens"] == 1 and document["verification"]["runtime"].startswith(PACKAGE)
    assert {"genai_config.json", "model.onnx", "tokenizer.json", "config.json"} <= {*document["files"]}


@needs_genai
@pytest.mark.parametrize(("dtype", "limit"), [("int8", 0.01), ("int4", 0.5)])
def test_genai_quantizes_within_its_limits(dtype: str, limit: float, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", **families.HEADS_OF_16)
    assert verified(export(folder, tmp_path / "genai", "genai", "--dtype", dtype))["verification"]["kl_limit"] >= limit


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("llama", {}, "head dim in multiples of 16, not 8"),
        ("phi", families.HEADS_OF_16, "share of a head that turns in multiples of 16, not 8"),
        ("opt", {}, "not known to be right for opt"),
    ],
)
def test_genai_is_refused_from_the_configuration(
    family: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    settings = {**families.SIZES, **families.FAMILIES[family], **changes}
    run = export(save_tiny(tmp_path / "model", family, **settings), tmp_path / "genai", "genai")
    assert run.code == 4 and reason in run.stderr and not (tmp_path / "genai").exists()


FORMS = ["torch-export", pytest.param("onnx", marks=needs_onnx), pytest.param("genai", marks=needs_genai)]


@pytest.mark.parametrize("form", FORMS)
def test_the_readmes_block_generates_text(form: str, tmp_path: Path) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    script = next(b for b in readme.split("```") if b.startswith("sh\n") and f"--format {form} " in b)[3:]
    save_tiny(tmp_path / "pruned", vocab_size=BYTE_LEVEL_VOCABULARY, **families.HEADS_OF_16)
    save_byte_level(tmp_path / "pruned")
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "400"}
    done = subprocess.run(["bash", "-ec", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report, _, generated = done.stdout.partition("largest difference")
    assert "Verified with" in report and "The history of the city" in generated and len(generated) > 50


def test_wrong_usages(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    run = export(folder, tmp_path / "graph", "torch-export", "--no-kv-cache")
    assert run.code == 2 and "--format onnx" in run.stderr
    run = export(folder, tmp_path / "model.onnx", "onnx")
    assert run.code == 2 and "names a folder" in run.stderr
    run = export(folder, tmp_path / "graph", "onnx", "--dtype", "q8_0")
    assert run.code == 2 and "float16" in run.stderr
