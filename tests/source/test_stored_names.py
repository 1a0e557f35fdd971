"""Checkpoints as people have them: older names, stray buffers, multimodal folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llmprune_cli.options import ModelReference
from llmprune_cli.source.opening import open_checkpoint
from support.checkpoints import Tensors, assert_prune_alike, edit_config, rewrite
from support.cli import run_cli
from support.refusals import CHECKPOINT, UNSUPPORTED, assert_refused
from support.stock import written_tensors
from support.tiny import save_tiny


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


def test_masks_that_codegen_once_stored(tmp_path: Path) -> None:
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 8, "n_inner": 96, "rotary_dim": 4, "n_positions": 64}
    plain = save_tiny(tmp_path / "plain", "codegen", **sizes)

    def with_masks(tensors: Tensors) -> Tensors:
        masks = {f"transformer.h.{layer}.attn.causal_mask": torch.ones(1, 1, 64, 64).bool() for layer in range(2)}
        return {**tensors, **masks}

    manifest = assert_prune_alike(plain, rewrite(plain, tmp_path / "form", with_masks), tmp_path, "--layers", "1")
    assert len(manifest["dropped_tensors"]) == 2


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


def test_embeddings_that_only_the_configuration_ties_stay_two_tensors(tmp_path: Path) -> None:
    plain = save_tiny(tmp_path / "plain", "llama", tie_word_embeddings=False)
    form = rewrite(plain, tmp_path / "form", lambda tensors: tensors)
    edit_config(form, tie_word_embeddings=True)
    assert_prune_alike(plain, form, tmp_path)
    same = rewrite(
        plain,
        tmp_path / "same",
        lambda tensors: {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]},
    )
    edit_config(same, tie_word_embeddings=True)
    document = json.loads(run_cli("inspect", same, "--json").stdout)
    assert document["tied_embeddings"] and document["dropped"] == ["lm_head.weight"]


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


def test_experts_of_a_base_model_keep_their_numbers(tmp_path: Path) -> None:
    plain = save_tiny(tmp_path / "plain", "mixtral", num_local_experts=4)
    form = rewrite(
        plain, tmp_path / "form", lambda tensors: {name.removeprefix("model."): t for name, t in tensors.items()}
    )
    with open_checkpoint(ModelReference(str(form)), need_weights=True) as checkpoint:
        read = {entry.name: tensor.clone() for entry, tensor in checkpoint.tensors()}
    expected = written_tensors(plain)
    assert read.keys() == expected.keys() and all(torch.equal(read[name], expected[name]) for name in read)


def test_a_layout_that_would_need_conversion_is_refused_by_name(tmp_path: Path) -> None:
    plain = save_tiny(tmp_path / "plain", "mixtral", num_local_experts=2)
    stacked = "model.layers.0.mlp.experts.down_proj"

    def stack(tensors: Tensors) -> Tensors:
        parts = [name for name in sorted(tensors) if name.startswith("model.layers.0") and ".w2." in name]
        kept = {name: tensor for name, tensor in tensors.items() if name not in parts}
        return {**kept, stacked: torch.stack([tensors[name] for name in parts])}

    run = run_cli("inspect", rewrite(plain, tmp_path / "form", stack))
    assert_refused(run, UNSUPPORTED, stacked, "another layout")


GEMMA = {"head_dim": 16, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}


def vision_tensors(prefix: str) -> Tensors:
    return {
        f"{prefix}vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight": torch.ones(8, 8),
        f"{prefix}vision_tower.vision_model.post_layernorm.bias": torch.ones(8),
        f"{prefix}multi_modal_projector.mm_input_projection_weight": torch.ones(8, 64),
    }


@pytest.mark.parametrize("layout", ["old", "new"])
@pytest.mark.parametrize("config", ["gemma3", "gemma3_text"])
def test_gemma_3_with_its_eyes_prunes_as_its_text_model(tmp_path: Path, layout: str, config: str) -> None:
    plain = save_tiny(tmp_path / "plain", "gemma3_text", **GEMMA)
    new = {"model.": "model.language_model."}
    prefixes = new if layout == "new" else {"model.": "language_model.model."}

    def wrap(tensors: Tensors) -> Tensors:
        (old, prefix), *_ = prefixes.items()
        text = {name.replace(old, prefix, 1): tensor for name, tensor in tensors.items()}
        return {**text, **vision_tensors("model." if layout == "new" else "")}

    form = rewrite(plain, tmp_path / "form", wrap)
    if config == "gemma3":
        vision = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        text = json.loads((plain / "config.json").read_text())
        outer = {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "model_type": "gemma3",
            "text_config": text,
            "vision_config": {**vision, "model_type": "siglip_vision_model"},
            "dtype": "float32",
        }
        (form / "config.json").write_text(json.dumps(outer))
    manifest = assert_prune_alike(plain, form, tmp_path, "--intermediate-size", "24")
    assert len(manifest["dropped_tensors"]) == 3 and len(manifest["renamed_tensors"]) > 20
    document = json.loads(run_cli("inspect", form, "--json").stdout)
    assert document["model_type"] == "gemma3_text"
    warned = run_cli("inspect", form).stderr
    assert ("vision" in warned and "gemma3 model" in warned) == (config == "gemma3")
