"""Pruning the language model of a multimodal model gives the whole model back: what sees is as it was."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from support.cli import BY_MAGNITUDE, run_cli
from support.full import examples
from support.refusals import PLAN, assert_refused
from support.tiny import save_tokenizer

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 96,
    "max_position_embeddings": 128,
}
SIGHT = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
PIXELS = {**SIGHT, "image_size": 16, "patch_size": 8}
GRID = {"depth": 1, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
TURNS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
IMAGE = 90  # the token that stands for a piece of an image

# family: settings beside the text model's sizes, settings of the text model, pieces of an image of 16 × 16
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "llava": ({"vision_config": {**PIXELS, "model_type": "clip_vision_model"}}, {"model_type": "llama"}, 4),
    "mistral3": (
        {"vision_config": {**PIXELS, "model_type": "pixtral", "head_dim": 16}, "spatial_merge_size": 1},
        {"model_type": "mistral", "sliding_window": None},
        4,
    ),
    "gemma3": (
        {"vision_config": PIXELS, "mm_tokens_per_image": 4},
        {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention", "full_attention"]},
        4,
    ),
    "paligemma": (
        {"vision_config": {**PIXELS, "projection_dim": 64}, "projection_dim": 64},
        {"model_type": "gemma"},
        4,
    ),
    "qwen2_vl": (
        {"vision_config": {**GRID, "embed_dim": 32, "hidden_size": 64}},
        {"rope_parameters": TURNS},
        4,
    ),
    "qwen2_5_vl": (
        {
            "vision_config": {
                **GRID,
                "hidden_size": 32,
                "intermediate_size": 32,
                "out_hidden_size": 64,
                "window_size": 16,
                "fullatt_block_indexes": [0],
            }
        },
        {"rope_parameters": TURNS},
        4,
    ),
    "qwen3_vl": (
        {
            "vision_config": {
                **GRID,
                "hidden_size": 32,
                "intermediate_size": 32,
                "out_hidden_size": 64,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            }
        },
        {"rope_parameters": TURNS},
        4,
    ),
    "smolvlm": ({"vision_config": PIXELS, "scale_factor": 2}, {"model_type": "llama"}, 1),
}
GRIDDED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def save_multimodal(folder: Path, family: str) -> Path:
    """A random multimodal model with a processor's file beside it."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(3)
    outside, text, _ = FAMILIES[family]
    tokens = {"image_token_id": IMAGE, "image_token_index": IMAGE}
    config = AutoConfig.for_model(family, text_config={**TEXT, **text}, **tokens, **outside)
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size="40KB")
    save_tokenizer(folder)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor"}')
    return folder


def load(folder: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    model, told = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64, output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    return model.eval()


def logits(model: Any, family: str) -> torch.Tensor:
    """What a model says to a text with an image in it."""
    generator = torch.Generator().manual_seed(5)
    pieces = FAMILIES[family][2]
    ids = torch.randint(3, 80, (1, 20), generator=generator)
    ids[0, 4 : 4 + pieces] = IMAGE
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    image = torch.randn(1, 3, 16, 16, generator=generator, dtype=torch.float64)
    if family in GRIDDED:
        given["pixel_values"] = torch.randn(16, 3 * 2 * 4 * 4, generator=generator, dtype=torch.float64)
        given["image_grid_thw"] = torch.tensor([[1, 4, 4]])
        given["mm_token_type_ids"] = (ids == IMAGE).int()
    elif family == "smolvlm":
        given["pixel_values"] = image[None]
    else:
        given["pixel_values"] = image
    if family == "mistral3":
        given["image_sizes"] = torch.tensor([[16, 16]])
    if family in ("gemma3", "paligemma"):
        given["token_type_ids"] = (ids == IMAGE).int()
    with torch.no_grad():
        found: torch.Tensor = model(**given).logits
    return found


def silence(model: Any, plan: dict[str, Any]) -> None:
    """Set to zero what a plan removes, in the model that was not pruned."""
    readers = {n: p for n, p in model.named_parameters() if n.endswith(("mlp.down_proj.weight", "o_proj.weight"))}
    text = {name: parameter for name, parameter in readers.items() if "vision" not in name and "visual" not in name}
    for name, parameter in text.items():
        layer = next(part for part in name.split(".") if part.isdigit())
        gone = torch.ones(parameter.shape[1], dtype=torch.bool)
        if int(layer) in plan["layers"]:
            kept = plan["keep"].get("intermediate_size", {}).get(layer)
            gone[:] = False
            if "down_proj" in name and kept is not None:
                gone[:] = True
                gone[kept] = False
        with torch.no_grad():
            parameter[:, gone] = 0


@pytest.mark.parametrize("family", examples(FAMILIES, ["llava", "gemma3", "qwen2_5_vl"]))
def test_a_pruned_multimodal_model_says_to_an_image_what_the_whole_one_says_without_what_went(
    family: str, tmp_path: Path
) -> None:
    source = save_multimodal(tmp_path / "source", family)
    layers = () if family == "qwen3_vl" else ("--drop-layers", "1")
    run = run_cli(
        *("prune", source, *BY_MAGNITUDE, "--intermediate-size", 24, *layers),
        *("--output", tmp_path / "out", "--save-plan", tmp_path / "plan.json"),
    )
    assert run.code == 0, run.stderr
    assert "vision" in run.stderr and "--text-only" in run.stderr
    dense, pruned = load(source), load(tmp_path / "out")
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in dense.parameters())
    whole = logits(dense, family)
    silence(dense, json.loads((tmp_path / "plan.json").read_text()))
    expected = logits(dense, family)
    assert not torch.allclose(whole, expected, atol=1e-4)
    torch.testing.assert_close(logits(pruned, family), expected, rtol=0, atol=1e-9)
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "AutoModelForImageTextToText" in card and "image-text-to-text" in card


def test_the_parts_that_see_are_the_same_bytes(tmp_path: Path) -> None:
    source = save_multimodal(tmp_path / "source", "llava")
    run = run_cli("prune", source, *BY_MAGNITUDE, "--intermediate-size", 24, "--output", tmp_path / "out")
    assert run.code == 0, run.stderr
    before, after = (
        {n: t for p in folder.glob("*.safetensors") for n, t in load_file(p).items()}
        for folder in (source, tmp_path / "out")
    )
    seeing = [name for name in before if "vision" in name or "projector" in name]
    assert len(seeing) > 10 and all(torch.equal(before[name], after[name]) for name in seeing)
    assert before.keys() == after.keys()
    verified = run_cli("inspect", tmp_path / "out", "--verify")
    assert verified.code == 0, verified.stderr


def test_text_only_writes_the_language_model_alone_and_says_so(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = save_multimodal(tmp_path / "source", "llava")
    run = run_cli(
        *("prune", source, *BY_MAGNITUDE, "--hidden-size", 32, "--text-only"), *("--output", tmp_path / "out")
    )
    assert run.code == 0, run.stderr
    assert "language model alone" in run.stderr and "vision" in (tmp_path / "out" / "README.md").read_text()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "llama" and config["hidden_size"] == 32
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_the_hidden_size_that_the_projector_meets_stays(tmp_path: Path) -> None:
    source = save_multimodal(tmp_path / "source", "llava")
    run = run_cli("prune", source, *BY_MAGNITUDE, "--hidden-size", 32, "--output", tmp_path / "out")
    assert_refused(run, PLAN, "hidden_size", "projector", "--text-only")
    assert not (tmp_path / "out").exists()
    assert json.loads(run_cli("inspect", source, "--json").stdout)["prunable"]["hidden_size"].startswith("no: ")


def test_layers_that_take_features_of_images_stay(tmp_path: Path) -> None:
    source = save_multimodal(tmp_path / "source", "qwen3_vl")
    run = run_cli("prune", source, *BY_MAGNITUDE, "--drop-layers", 1, "--output", tmp_path / "out")
    assert_refused(run, PLAN, "images", "--text-only")
