"""Pruning the language model of a multimodal model gives the whole model back: what sees is as it was."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from support.cli import BY_MAGNITUDE, CALIBRATED, run_cli
from support.full import examples
from support.refusals import PLAN, UNSUPPORTED, assert_prune_refused, assert_refused, edit_json
from support.tiny import BYTE_LEVEL_VOCABULARY, save_byte_level, save_tokenizer

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
LAST = BYTE_LEVEL_VOCABULARY - 1  # the same in a vocabulary some of which can go

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


def save_multimodal(folder: Path, family: str, image: int = IMAGE) -> Path:
    """A random multimodal model with a processor's file beside it.

    Args:
        image: the token that stands for a piece of an image; `LAST` makes tokens of bytes.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(3)
    outside, text, _ = FAMILIES[family]
    tokens = {"image_token_id": image, "image_token_index": image}
    sizes = {**TEXT, "vocab_size": BYTE_LEVEL_VOCABULARY} if image == LAST else TEXT
    config = AutoConfig.for_model(family, text_config={**sizes, **text}, **tokens, **outside)
    for name, number in config.to_dict().items():  # that families name by themselves
        if image == LAST and name.endswith(("_token_id", "_token_index")) and isinstance(number, int) and number > LAST:
            setattr(config, name, LAST - 1)
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size="40KB")
    (save_byte_level if image == LAST else save_tokenizer)(folder)
    processor = {"image_processor_type": "CLIPImageProcessor", "image_token_id": image}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def load(folder: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    model, told = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64, output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    return model.eval()


def logits(model: Any, family: str, image: int = IMAGE, number: Callable[[int], int] = int) -> torch.Tensor:
    """What a model says to a text with an image in it.

    Args:
        image: see `save_multimodal`.
        number: that the model has given to a token.
    """
    generator = torch.Generator().manual_seed(5)
    pieces = FAMILIES[family][2]
    ids = torch.randint(3, 80, (1, 20), generator=generator)
    ids[0, 4 : 4 + pieces] = image
    ids.apply_(number)
    is_image = (ids == number(image)).int()
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    image = torch.randn(1, 3, 16, 16, generator=generator, dtype=torch.float64)
    if family in GRIDDED:
        given["pixel_values"] = torch.randn(16, 3 * 2 * 4 * 4, generator=generator, dtype=torch.float64)
        given["image_grid_thw"] = torch.tensor([[1, 4, 4]])
        given["mm_token_type_ids"] = is_image
    elif family == "smolvlm":
        given["pixel_values"] = image[None]
    else:
        given["pixel_values"] = image
    if family == "mistral3":
        given["image_sizes"] = torch.tensor([[16, 16]])
    if family in ("gemma3", "paligemma"):
        given["token_type_ids"] = is_image
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


def test_every_table_counts_all_that_is_stored(tmp_path: Path) -> None:
    source = save_multimodal(tmp_path / "source", "llava")
    pruned = ("--intermediate-size", 24, "--output", tmp_path / "out", "--json")
    said = run_cli("prune", source, *BY_MAGNITUDE, *pruned)
    (tmp_path / "text.txt").write_text(Path(__file__).read_text())
    text = ("--dataset", tmp_path / "text.txt", "--max-seq-len", 32, "--limit", 2)
    judged = run_cli("eval", tmp_path / "out", "--compare", source, *text, "--json")
    assert said.code == judged.code == 0, said.stderr + judged.stderr
    shown = [json.loads(said.stdout)[side] for side in ("after", "before")]
    stored = [
        sum(t.numel() for p in f.glob("*.safetensors") for t in load_file(p).values())
        for f in (tmp_path / "out", source)
    ]
    counted = [(own["parameters"], own["size_bytes"]) for own in json.loads(judged.stdout)["results"]]
    assert counted == [(own["parameters"], own["size_bytes"]) for own in shown] == [(own, 4 * own) for own in stored]


@pytest.mark.parametrize("family", examples(FAMILIES, ["qwen2_5_vl"]))
def test_a_multimodal_model_says_to_an_image_the_same_in_fewer_tokens(family: str, tmp_path: Path) -> None:
    source, out, plan = save_multimodal(tmp_path / "source", family, LAST), tmp_path / "out", tmp_path / "plan.json"
    (tmp_path / "text.txt").write_text(Path(__file__).read_text())
    text = ("--calibration", tmp_path / "text.txt", "--calibration-seq-len", 40, "--calibration-tokens", 400)
    run = run_cli("prune", source, *BY_MAGNITUDE, "--vocab", 320, *text, "--output", out, "--save-plan", plan)
    assert run.code == 0, run.stderr
    kept = json.loads(plan.read_text())["vocabulary"]["kept"]
    whole, part = load(source), load(out)
    assert len(kept) == 320 == part.config.get_text_config().vocab_size
    given = logits(part, family, LAST, kept.index)
    torch.testing.assert_close(given, logits(whole, family, LAST)[..., kept], rtol=0, atol=1e-12)
    assert json.loads((out / "preprocessor_config.json").read_text())["image_token_id"] == kept.index(LAST)
    assert part.config.image_token_id == kept.index(LAST)


def test_tokens_of_which_other_parts_speak_stay(tmp_path: Path) -> None:
    source = save_multimodal(tmp_path / "model", "llava", LAST)
    edit_json(source / "config.json", lambda own: own.update(image_token_index=400))
    assert_prune_refused(source, tmp_path, UNSUPPORTED, "token 400", "--text-only", options=("--vocab", "320"))
    edit_json(source / "config.json", lambda own: own.update(image_token_index=LAST))
    edit_json(source / "config.json", lambda own: own["vision_config"].update(vocab_offset=300))
    assert_prune_refused(source, tmp_path, UNSUPPORTED, "vision_config.vocab_offset", options=("--vocab", "320"))


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


def test_a_target_leaves_layers_that_take_features_of_images(tmp_path: Path, text_file: Path) -> None:
    source = save_multimodal(tmp_path / "source", "qwen3_vl")
    text = ("--calibration", text_file, *CALIBRATED)
    run = run_cli("prune", source, "--target", "90%", "--refit", "none", *text, "--dry-run", "--json")
    assert run.code == 0, run.stderr
    found = json.loads(run.stdout)
    assert {own["widths"]["num_hidden_layers"] for own in found["candidates"]} == {
        found["before"]["widths"]["num_hidden_layers"]
    }


def test_layers_that_take_features_of_images_stay(tmp_path: Path) -> None:
    source = save_multimodal(tmp_path / "source", "qwen3_vl")
    run = run_cli("prune", source, *BY_MAGNITUDE, "--drop-layers", 1, "--output", tmp_path / "out")
    assert_refused(run, PLAN, "images", "--text-only")
