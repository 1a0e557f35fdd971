"""Quantized weights prune as their dequantized values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llmprune_cli.options import ModelReference
from llmprune_cli.source.opening import open_checkpoint
from support.checkpoints import FP8, Tensors, assert_prune_alike, edit_config, prune, quantize_fp8, rewrite
from support.cli import BY_MAGNITUDE, run_cli
from support.refusals import CHECKPOINT, UNSUPPORTED, assert_refused
from support.stock import load_stock, written_tensors
from support.tiny import save_tiny

MXFP4_SIZES = {"hidden_size": 64, "intermediate_size": 64, "sliding_window": 16}


def test_quantized_bytes_without_a_record_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    form = rewrite(tiny_llama, tmp_path / "form", lambda t: {**t, name: t[name].to(torch.float8_e4m3fn)})
    assert_refused(run_cli("inspect", form), CHECKPOINT, name, "F8_E4M3", "quantization_config")


def dequantize_fp8(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """The formula that the format documents: each block times its scale."""
    result = {}
    for name, tensor in tensors.items():
        scales = tensors.get(f"{name}_scale_inv")
        if scales is not None:
            rows, columns = (side // count for side, count in zip(tensor.shape, scales.shape, strict=True))
            spread = scales.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
            result[name] = (tensor.float() * spread).to(dtype)
        elif not name.endswith("_scale_inv"):
            result[name] = tensor.to(dtype)
    return result


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_fp8_weights_prune_as_their_dequantized_values(tiny_llama: Path, tmp_path: Path, dtype: str) -> None:
    form = rewrite(tiny_llama, tmp_path / "form", lambda tensors: quantize_fp8(tensors, (8, 16)))
    edit_config(form, quantization_config=FP8, dtype="bfloat16")
    plain = rewrite(form, tmp_path / "plain", lambda tensors: dequantize_fp8(tensors, getattr(torch, dtype)))
    config = json.loads((plain / "config.json").read_text())
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps({**config, "dtype": dtype}))
    assert_prune_alike(plain, form, tmp_path, "--pruning-ratio", "0.5", "--dtype", dtype)
    one, other = (json.loads(run_cli("inspect", model, "--json").stdout) for model in (plain, form))
    assert one["before"]["parameters"] == other["before"]["parameters"]
    dry = ("--pruning-ratio", "0.5", "--dry-run", "--dtype", dtype, "--json")
    dry_one, dry_other = (json.loads(run_cli("prune", model, *BY_MAGNITUDE, *dry).stdout) for model in (plain, form))
    assert all(dry_one["after"][key] == dry_other["after"][key] for key in ("widths", "parameters", "size_bytes"))


def test_the_description_of_quantized_weights_reads_no_weights(tiny_llama: Path, tmp_path: Path) -> None:
    form = rewrite(tiny_llama, tmp_path / "form", lambda tensors: quantize_fp8(tensors, (8, 16)))
    edit_config(form, quantization_config=FP8)
    (form / "model.safetensors").write_bytes(b"")
    document = json.loads(run_cli("inspect", form, "--json").stdout)
    assert document["before"]["size_bytes"] == 2 * document["before"]["parameters"]


def test_fp8_blocks_that_are_cut_short_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    form = rewrite(tiny_llama, tmp_path / "form", lambda tensors: quantize_fp8(tensors, (8, 16)))
    edit_config(form, quantization_config={**FP8, "weight_block_size": [8, 20]})
    run = run_cli("prune", form, *BY_MAGNITUDE, "--pruning-ratio", "0.5", "--output", tmp_path / "out")
    assert_refused(run, UNSUPPORTED, "FP8 blocks", "_proj.weight")


def test_fp8_weights_without_their_scales_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    form = rewrite(tiny_llama, tmp_path / "form", lambda tensors: quantize_fp8(tensors, (8, 16)))
    scale = "model.layers.1.mlp.up_proj.weight_scale_inv"
    broken = rewrite(form, tmp_path / "broken", lambda tensors: {n: t for n, t in tensors.items() if n != scale})
    edit_config(broken, quantization_config=FP8)
    run = run_cli("prune", broken, *BY_MAGNITUDE, "--pruning-ratio", "0.5", "--output", tmp_path / "out")
    assert_refused(run, CHECKPOINT, "up_proj")


def test_mxfp4_experts_are_dequantized(tmp_path: Path) -> None:
    plain = save_tiny(tmp_path / "plain", "gpt_oss", dtype="bfloat16", num_local_experts=4, head_dim=16, **MXFP4_SIZES)
    generator = torch.Generator().manual_seed(3)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    expected: Tensors = {}

    def quantize(tensors: Tensors) -> Tensors:
        result = {}
        for name, tensor in tensors.items():
            if not name.endswith(("gate_up_proj", "down_proj")):
                result[name] = expected[name] = tensor
                continue
            experts, inputs, outputs = tensor.shape
            blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=generator).to(torch.uint8)
            scales = torch.randint(118, 124, (experts, outputs, inputs // 32), generator=generator).to(torch.uint8)
            nibbles = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)
            weights = values[nibbles.long()] * 2.0 ** (scales.float() - 127)[..., None]
            expected[name] = weights.reshape(experts, outputs, inputs).transpose(1, 2).to(torch.bfloat16)
            result[f"{name}_blocks"], result[f"{name}_scales"] = blocks, scales
        return result

    form = rewrite(plain, tmp_path / "form", quantize)
    edit_config(form, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    with open_checkpoint(ModelReference(str(form)), need_weights=True) as checkpoint:
        read = {entry.name: tensor.clone() for entry, tensor in checkpoint.tensors()}
    assert read.keys() == expected.keys() and all(torch.equal(read[name], expected[name]) for name in read)
    assert json.loads(run_cli("inspect", form, "--json").stdout)["before"]["parameters"] == sum(
        tensor.numel() for tensor in expected.values()
    )


@pytest.mark.parametrize(
    ("method", "record"),
    [
        ("gptq", {"bits": 4, "group_size": 128}),
        ("awq", {"bits": 4, "group_size": 128, "version": "gemm"}),
        ("papyrus", {}),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "prune"])
def test_methods_that_transformers_cannot_undo_are_refused(
    tiny_llama: Path, tmp_path: Path, method: str, record: dict[str, object], command: str
) -> None:
    form = rewrite(tiny_llama, tmp_path / "form", lambda tensors: tensors)
    edit_config(form, quantization_config={"quant_method": method, **record})
    output = ["--output", tmp_path / "out"] if command == "prune" else []
    run = run_cli(command, form, "--pruning-ratio", "0.5", *output)
    assert_refused(run, UNSUPPORTED, method)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("bits", "error"), [(4, 0.15), (8, 0.01)])
def test_bitsandbytes_weights_are_dequantized(tmp_path: Path, bits: int, error: float) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    sizes = {"hidden_size": 128, "intermediate_size": 256}
    plain = save_tiny(tmp_path / "plain", dtype="bfloat16", **sizes)
    quantized = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    form = tmp_path / "form"
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=quantized, device_map="cpu").save_pretrained(form)
    out = prune(form, tmp_path / "out", "--num-attention-heads", "4", "--dtype", "float32")
    expected, actual = written_tensors(plain), written_tensors(out)
    for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.k_proj.weight"):
        close = (actual[name] - expected[name].float()).norm() / expected[name].float().norm()
        assert actual[name].dtype == torch.float32 and 0 < close < error
    assert torch.equal(actual["lm_head.weight"], expected["lm_head.weight"].float())
    load_stock(out)


def test_bitsandbytes_names_the_package_that_it_needs(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.quantizers.quantizer_bnb_4bit.is_bitsandbytes_available", lambda: False)
    form = rewrite(tiny_llama, tmp_path / "form", lambda tensors: tensors)
    edit_config(form, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert run_cli("inspect", form).code == 0
    run = run_cli("prune", form, *BY_MAGNITUDE, "--pruning-ratio", "0.5", "--output", tmp_path / "out")
    assert_refused(run, UNSUPPORTED, "bitsandbytes", "pip install")
