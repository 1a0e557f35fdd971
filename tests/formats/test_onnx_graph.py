"""ONNX graphs: the same probabilities for any batch and length, with a cache and without."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from support import families
from support.cli import run_cli
from support.exports import export, needs_onnx, pruned, verified
from support.full import examples, in_full
from support.stock import load_stock
from support.tiny import BYTE_LEVEL_VOCABULARY, save_byte_level, save_tiny


@needs_onnx
@pytest.mark.parametrize("family", examples(families.TRIED_EXPORTS, ["llama"]))
def test_an_onnx_graph_reads_prompts_and_goes_on_with_its_cache(family: str, tmp_path: Path) -> None:
    from llmprune_cli.formats.onnx_graph import open_onnx

    folder = pruned(tmp_path, family)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    start = TemplateProcessing("<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = start
    tokenizer.save_pretrained(folder)
    document = verified(export(folder, tmp_path / "graph", "onnx", "--dtype", "f32"))
    assert document["verification"]["same_tokens"] == 1
    assert {"model.onnx", "model.onnx_data", "config.json", "tokenizer.json"} <= {*document["files"]}
    said = json.loads((tmp_path / "graph" / "tokenizer_config.json").read_text())  # for transformers.js
    assert said["clean_up_tokenization_spaces"] is False and "content" in said["chat_template"]
    assert said["add_bos_token"] is True, "which tokenizer.json alone says"
    config = json.loads((tmp_path / "graph" / "config.json").read_text())
    assert config["transformers.js_config"]["use_external_data_format"] and config["model_type"] == family
    model, tokens, done = load_stock(folder), torch.randint(3, 90, (3, 20)), 0
    with torch.no_grad(), open_onnx(tmp_path / "graph") as graph:
        expected, past = model(input_ids=tokens, use_cache=False).logits, graph.empty_past(3)
        assert past
        for step in (7, 1, 5, 1, 6):
            logits, past = graph.run(tokens[:, done : done + step], past)
            torch.testing.assert_close(logits, expected[:, done : done + step], rtol=1e-3, atol=1e-4)
            done += step
        axes = {name: given.shape for name, given in graph.inputs.items()}
    assert axes["input_ids"] == ["batch_size", "sequence_length"]  # by which transformers.js makes an empty cache
    assert {shape[0] for shape in axes.values()} == {"batch_size"}


@needs_onnx
@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_an_older_tokenizer_is_written_as_javascript_reads_it(has_tokenizer: bool, tmp_path: Path) -> None:
    """Words and merges in files of their own become one; of several chat templates, all are kept."""
    folder = save_tiny(tmp_path / "model", num_hidden_layers=1, vocab_size=BYTE_LEVEL_VOCABULARY)
    save_byte_level(folder)
    AutoTokenizer.from_pretrained(folder).backend_tokenizer.model.save(str(folder))
    for name in ("tokenizer.json", "chat_template.jinja"):
        (folder / name).unlink()
    templates = [{"name": name, "template": f"{name}: {{{{ messages }}}}"} for name in ("default", "tool_use")]
    said = {"tokenizer_class": "GPT2Tokenizer", "chat_template": templates}
    (folder / "tokenizer_config.json").write_text(json.dumps(said if has_tokenizer else {}))
    if not has_tokenizer:
        (folder / "vocab.json").write_text("{}")
    run = export(folder, tmp_path / "graph", "onnx", *(() if has_tokenizer else ("--no-verify",)))
    assert run.code == 0, run.stderr
    config = json.loads((tmp_path / "graph" / "config.json").read_text())
    assert ("transformers.js_config" in config) == has_tokenizer == (tmp_path / "graph" / "tokenizer.json").is_file()
    if has_tokenizer:
        written = json.loads((tmp_path / "graph" / "tokenizer_config.json").read_text())
        assert written["chat_template"] == templates and "add_bos_token" not in written
        found, expected = (AutoTokenizer.from_pretrained(own)("So, why?") for own in (tmp_path / "graph", folder))
        assert found["input_ids"] == expected["input_ids"]
        checked = run_cli("inspect", tmp_path / "graph", "--verify")
        assert checked.code == 0, checked.stderr


@needs_onnx
@in_full
def test_an_onnx_graph_without_a_cache_takes_token_ids_only(tmp_path: Path) -> None:
    from llmprune_cli.formats.onnx_graph import open_onnx

    folder = save_tiny(tmp_path / "model", num_hidden_layers=1)
    verified(export(folder, tmp_path / "graph", "onnx", "--no-kv-cache"))
    assert "transformers.js_config" not in json.loads((tmp_path / "graph" / "config.json").read_text())
    tokens = torch.randint(3, 90, (2, 9))
    with torch.no_grad(), open_onnx(tmp_path / "graph") as graph:
        assert [*graph.inputs] == ["input_ids"]
        logits, _ = graph.run(tokens, {})
        torch.testing.assert_close(logits, load_stock(folder)(input_ids=tokens).logits, rtol=1e-3, atol=1e-4)


@needs_onnx
@in_full
def test_a_model_with_such_a_state_is_exported_without_it(tmp_path: Path) -> None:
    settings = {**families.SIZES, **families.FAMILIES["lfm2"]}
    folder = save_tiny(tmp_path / "model", "lfm2", **settings)
    verified(export(folder, tmp_path / "graph", "onnx", "--no-kv-cache"))


@needs_onnx
def test_a_state_that_is_no_cache_is_refused(tmp_path: Path) -> None:
    settings = {**families.SIZES, **families.FAMILIES["lfm2"]}
    folder = save_tiny(tmp_path / "model", "lfm2", **settings)
    run = export(folder, tmp_path / "graph", "onnx")
    assert run.code == 4 and "--no-kv-cache" in run.stderr and not (tmp_path / "graph").exists()
    said = json.loads(run_cli("inspect", folder, "--json").stdout)["runtimes"]
    assert "with --no-kv-cache" in next(fit["note"] for fit in said if fit["runtime"] == "ONNX Runtime")
