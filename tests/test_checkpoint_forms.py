"""Checkpoints as people have them: older names, stray buffers, multimodal folders, quantized weights, GGUF files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from conftest import Run, run_cli, save_tiny
from test_peer import written_tensors

Tensors = dict[str, torch.Tensor]
CHECKPOINT, UNSUPPORTED = 3, 4


def rewrite(plain: Path, target: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """Copy a checkpoint with other tensors in it."""
    shutil.copytree(plain, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = {name: tensor.clone().contiguous() for name, tensor in change(written_tensors(plain)).items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def prune(model: Path, output: Path, *options: str) -> Path:
    run = run_cli("prune", model, "--pruning-ratio", "0.5", "--output", output, *options)
    assert run.code == 0, run.stderr
    return output


def assert_prune_alike(plain: Path, other: Path, work: Path, *options: str) -> dict[str, Any]:
    """Both forms prune to the same bytes and the same configuration; gives the manifest of the other form's output."""
    first, second = prune(plain, work / "from-plain", *options), prune(other, work / "from-other", *options)
    expected, actual = written_tensors(first), written_tensors(second)
    assert expected.keys() == actual.keys()
    different = [name for name in expected if not torch.equal(expected[name], actual[name])]
    assert not different and all(expected[name].dtype == actual[name].dtype for name in expected)
    one, other_config = (json.loads((folder / "config.json").read_text()) for folder in (first, second))
    assert one == other_config
    manifest: dict[str, Any] = json.loads((second / "llmprune.json").read_text())
    return manifest


def assert_refused(run: Run, code: int, *words: str) -> None:
    assert run.code == code, run.stderr
    assert run.stdout == "" and "Traceback" not in run.stderr
    for word in words:
        assert word in run.stderr, run.stderr


# --- older names and stray buffers ---------------------------------------------------------------------------------


def test_gpt2_without_its_prefix_and_with_its_masks(tmp_path: Path) -> None:
    plain = save_tiny(tmp_path / "plain", "gpt2", n_positions=64, n_inner=48)

    def older(tensors: Tensors) -> Tensors:
        renamed = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        for layer in range(2):
            renamed[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64)
            renamed[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        return renamed

    form = rewrite(plain, tmp_path / "form", older)
    manifest = assert_prune_alike(plain, form, tmp_path)
    assert manifest["renamed_tensors"]["wte.weight"] == "transformer.wte.weight"
    assert "h.1.attn.masked_bias" in manifest["dropped_tensors"] and len(manifest["dropped_tensors"]) == 4
    document = json.loads(run_cli("inspect", form, "--json").stdout)
    assert ["wpe.weight", "transformer.wpe.weight"] in document["renamed"] and len(document["dropped"]) == 4
    table = run_cli("inspect", form).stdout
    assert "h.0.attn.bias" in table and "28 tensors" in table


def test_frequencies_that_every_layer_once_stored(tiny_llama: Path, tmp_path: Path) -> None:
    extra = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(2)}
    form = rewrite(tiny_llama, tmp_path / "form", lambda tensors: {**tensors, **extra})
    manifest = assert_prune_alike(tiny_llama, form, tmp_path)
    assert sorted(manifest["dropped_tensors"]) == sorted(extra) and not manifest["renamed_tensors"]


def test_a_base_model_saved_without_its_head(tmp_path: Path) -> None:
    plain = save_tiny(tmp_path / "plain", "qwen2", tie_word_embeddings=True)
    form = rewrite(
        plain, tmp_path / "form", lambda tensors: {name.removeprefix("model."): t for name, t in tensors.items()}
    )
    assert_prune_alike(plain, form, tmp_path)


def test_tied_embeddings_stored_under_the_name_of_the_head(tmp_path: Path) -> None:
    plain = save_tiny(tmp_path / "plain", "llama", tie_word_embeddings=True)

    def swap(tensors: Tensors) -> Tensors:
        return {"lm_head.weight" if "embed_tokens" in name else name: tensor for name, tensor in tensors.items()}

    manifest = assert_prune_alike(plain, rewrite(plain, tmp_path / "form", swap), tmp_path)
    assert manifest["renamed_tensors"] == {"lm_head.weight": "model.embed_tokens.weight"}


def test_the_evaluation_reads_older_names_too(tmp_path: Path, text_file: Path) -> None:
    plain = save_tiny(tmp_path / "plain", "gpt2", n_positions=64, n_inner=48)
    form = rewrite(
        plain, tmp_path / "form", lambda tensors: {name.removeprefix("transformer."): t for name, t in tensors.items()}
    )
    options = ("--dataset", text_file, "--max-seq-len", "32", "--json")
    documents = [json.loads(run_cli("eval", model, *options).stdout) for model in (plain, form)]
    assert documents[0]["results"][0]["perplexity"] == documents[1]["results"][0]["perplexity"]


def test_a_tensor_stored_twice_is_refused_by_both_names(tmp_path: Path) -> None:
    plain = save_tiny(tmp_path / "plain", "gpt2", n_positions=64, n_inner=48)
    form = rewrite(
        plain,
        tmp_path / "form",
        lambda tensors: {**tensors, "wte.weight": tensors["transformer.wte.weight"]},
    )
    assert_refused(run_cli("inspect", form), CHECKPOINT, "transformer.wte.weight", "as wte.weight")


def test_a_tensor_that_nothing_explains_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    form = rewrite(tiny_llama, tmp_path / "form", lambda tensors: {**tensors, "adapter.weight": torch.ones(2)})
    assert_refused(run_cli("inspect", form), CHECKPOINT, "adapter.weight", "unknown")


def test_quantized_bytes_without_a_record_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    form = rewrite(tiny_llama, tmp_path / "form", lambda t: {**t, name: t[name].to(torch.float8_e4m3fn)})
    assert_refused(run_cli("inspect", form), CHECKPOINT, name, "F8_E4M3", "quantization_config")
