"""Checkpoints as people have them: older names, stray buffers, text models within multimodal ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from conftest import run_cli
from families import FAMILIES, SIZES
from test_oracles import load_stock
from test_peer import written_tensors


def rewritten(
    folder: Path, target: Path, rename: Callable[[str], str], extra: dict[str, torch.Tensor] | None = None
) -> Path:
    """A copy whose tensors have other names, in one file, with further tensors beside them."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = {rename(name): tensor for name, tensor in written_tensors(folder).items()}
    save_file({**tensors, **(extra or {})}, target / "model.safetensors", metadata={"format": "pt"})
    return target


def assert_prunes_alike(plain: Path, other: Path, work: Path) -> None:
    """Both forms give the same tensors and the same report of widths."""
    for source, name in ((plain, "from-plain"), (other, "from-other")):
        run = run_cli("prune", source, "--pruning-ratio", "0.5", "--output", work / name)
        assert run.code == 0, run.stderr
    one, two = written_tensors(work / "from-plain"), written_tensors(work / "from-other")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    load_stock(work / "from-other")


def test_gpt2_without_its_prefix_and_with_its_masks(make_tiny: Callable[..., Path], tmp_path: Path) -> None:
    plain = make_tiny("gpt2", **{**SIZES, **FAMILIES["gpt2"]})
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64) for layer in range(4)}
    masks |= {f"h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(4)}
    old = rewritten(plain, tmp_path / "old", lambda name: name.removeprefix("transformer."), masks)
    assert_prunes_alike(plain, old, tmp_path)
    report = json.loads(run_cli("inspect", old, "--json").stdout)
    assert set(report["dropped"]) == masks.keys()
    assert ["wte.weight", "transformer.wte.weight"] in report["renamed"]
    table = run_cli("inspect", old).stdout
    assert "Stored but unused" in table and "Stored under older names" in table
    manifest = json.loads((tmp_path / "from-other" / "llmprune.json").read_text())
    assert manifest["renamed_tensors"]["wte.weight"] == "transformer.wte.weight"
    assert set(manifest["dropped_tensors"]) == masks.keys()


@pytest.mark.parametrize(
    ("family", "buffer"), [("llama", "self_attn.rotary_emb.inv_freq"), ("gpt_neox", "attention.bias")]
)
def test_stray_buffers_are_left_out(make_tiny: Callable[..., Path], tmp_path: Path, family: str, buffer: str) -> None:
    plain = make_tiny(family)
    prefix = "gpt_neox.layers.0." if family == "gpt_neox" else "model.layers.0."
    assert_prunes_alike(plain, rewritten(plain, tmp_path / "old", str, {prefix + buffer: torch.ones(4)}), tmp_path)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
@pytest.mark.parametrize("multimodal_config", [False, True])
def test_gemma_3_text_within_its_multimodal_model(
    make_tiny: Callable[..., Path], tmp_path: Path, prefix: str, multimodal_config: bool
) -> None:
    plain = make_tiny("gemma3_text", **{**SIZES, **FAMILIES["gemma3_text"]})
    vision = {"vision_tower.vision_model.embeddings.patch_embedding.bias": torch.ones(4)}
    if prefix.startswith("model."):
        vision = {f"model.{name}": tensor for name, tensor in vision.items()}
    old = rewritten(plain, tmp_path / "old", lambda name: prefix + name.removeprefix("model."), vision)
    if multimodal_config:
        text = json.loads((plain / "config.json").read_text())
        outer = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
        vision_sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 4}
        outer["vision_config"] = {"model_type": "siglip_vision_model", **vision_sizes}
        (old / "config.json").write_text(json.dumps(outer))
    assert_prunes_alike(plain, old, tmp_path)
    config = json.loads((tmp_path / "from-other" / "config.json").read_text())
    assert config["model_type"] == "gemma3_text"
    assert run_cli("export", old, "--output", tmp_path / "exported").code == 0
    load_stock(tmp_path / "exported")


def test_a_tensor_that_the_model_does_not_know_is_refused(make_tiny: Callable[..., Path], tmp_path: Path) -> None:
    plain = make_tiny("llama")
    odd = rewritten(plain, tmp_path / "odd", str, {"model.layers.0.self_attn.adapter.weight": torch.ones(4)})
    run = run_cli("prune", odd, "--pruning-ratio", "0.5", "--output", tmp_path / "out")
    assert run.code == 3 and "adapter.weight" in run.stderr and not (tmp_path / "out").exists()


BLOCK = 16  # rows and columns that share a scale in the FP8 checkpoint
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def to_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight in float8 with a scale for each block, and what it is once dequantized, in bfloat16."""
    rows, columns = weight.shape[0] // BLOCK, weight.shape[1] // BLOCK
    blocks = weight.float().view(rows, BLOCK, columns, BLOCK)
    scales = blocks.abs().amax(dim=(1, 3)) / 448
    eighths = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    plain = (eighths.float() * scales[:, None, :, None]).view_as(weight)
    return eighths.view_as(weight), scales, plain.bfloat16()


def test_fp8_weights_prune_as_what_they_stand_for(make_tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_tiny("llama", dtype="bfloat16")
    plain, quantized = {}, {}
    for name, tensor in written_tensors(folder).items():
        plain[name] = quantized[name] = tensor
        if name.endswith("proj.weight"):
            quantized[name], quantized[f"{name}_scale_inv"], plain[name] = to_fp8(tensor)
    for target, tensors in (("plain", plain), ("fp8", quantized)):
        shutil.copytree(folder, tmp_path / target, ignore=shutil.ignore_patterns("*.safetensors*"))
        save_file(tensors, tmp_path / target / "model.safetensors", metadata={"format": "pt"})
    record = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    edit_config(tmp_path / "fp8", quantization_config=record)
    assert_prunes_alike(tmp_path / "plain", tmp_path / "fp8", tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "from-other" / "config.json").read_text())
    assert (tmp_path / "from-other" / "tokenizer.json").exists()
    before = json.loads(run_cli("inspect", tmp_path / "fp8", "--json").stdout)
    expected = json.loads(run_cli("inspect", tmp_path / "plain", "--json").stdout)
    assert before["before"]["parameters"] == expected["before"]["parameters"] and before["has_weights"]


def test_mxfp4_experts_prune_as_what_they_stand_for(make_tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_tiny("gpt_oss", dtype="bfloat16", **{**SIZES, **FAMILIES["gpt_oss"], "intermediate_size": 64})
    generator = torch.Generator().manual_seed(0)
    plain, quantized = {}, {}
    for name, tensor in written_tensors(folder).items():
        plain[name] = quantized[name] = tensor
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inputs, outputs = tensor.shape
            codes = torch.randint(0, 16, (experts, outputs, inputs // 32, 32), generator=generator)
            exponents = torch.randint(-4, 0, (experts, outputs, inputs // 32), generator=generator)
            values = FP4[codes] * 2.0 ** exponents[..., None]
            plain[name] = values.flatten(2).transpose(1, 2).bfloat16().contiguous()
            del quantized[name]
            quantized[f"{name}_blocks"] = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
            quantized[f"{name}_scales"] = (exponents + 127).to(torch.uint8)
    for target, tensors in (("plain", plain), ("mxfp4", quantized)):
        shutil.copytree(folder, tmp_path / target, ignore=shutil.ignore_patterns("*.safetensors*"))
        save_file(tensors, tmp_path / target / "model.safetensors", metadata={"format": "pt"})
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    record = {"quant_method": "mxfp4", "modules_to_not_convert": skipped}
    edit_config(tmp_path / "mxfp4", quantization_config=record)
    assert_prunes_alike(tmp_path / "plain", tmp_path / "mxfp4", tmp_path)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "home-made"])
def test_what_cannot_be_dequantized_is_refused(make_tiny: Callable[..., Path], tmp_path: Path, method: str) -> None:
    folder = make_tiny("llama")
    edit_config(folder, quantization_config={"quant_method": method, "bits": 4, "load_in_4bit": True})
    run = run_cli("prune", folder, "--pruning-ratio", "0.5", "--output", tmp_path / "out")
    assert run.code == 4 and method in run.stderr and "unquantized" in run.stderr, run.stderr
    assert "Traceback" not in run.stderr and not (tmp_path / "out").exists()


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
