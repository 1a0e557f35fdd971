"""Checkpoints as people have them: older names, stray buffers, multimodal folders, quantized weights, GGUF files."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from conftest import BY_MAGNITUDE, Run, run_cli, save_tiny
from llmprune_cli.source.opening import ModelReference, open_checkpoint
from test_oracles import load_stock
from test_peer import written_tensors

Tensors = dict[str, torch.Tensor]
CHECKPOINT, UNSUPPORTED = 3, 4
MXFP4_SIZES = {"hidden_size": 64, "intermediate_size": 64, "sliding_window": 16}


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
    run = run_cli("prune", model, *BY_MAGNITUDE, *(options or ("--pruning-ratio", "0.5")), "--output", output)
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


def test_quantized_bytes_without_a_record_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    form = rewrite(tiny_llama, tmp_path / "form", lambda t: {**t, name: t[name].to(torch.float8_e4m3fn)})
    assert_refused(run_cli("inspect", form), CHECKPOINT, name, "F8_E4M3", "quantization_config")


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


# --- multimodal checkpoints ----------------------------------------------------------------------------------------

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


# --- quantized weights ---------------------------------------------------------------------------------------------


def quantize_fp8(tensors: Tensors, block: tuple[int, int]) -> Tensors:
    """Round every projection to FP8 with one scale for each block."""
    result = {}
    for name, tensor in tensors.items():
        if not name.endswith("_proj.weight"):
            result[name] = tensor
            continue
        rows, columns = tensor.shape[0] // block[0], tensor.shape[1] // block[1]
        blocks = tensor.reshape(rows, block[0], columns, block[1])
        scales = blocks.abs().amax(dim=(1, 3)) / 448
        result[name] = (blocks / scales[:, None, :, None]).reshape(tensor.shape).to(torch.float8_e4m3fn)
        result[f"{name}_scale_inv"] = scales
    return result


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


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [8, 16]}


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


# --- GGUF ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GgufFamily:
    """How llama.cpp's converter writes one family."""

    architecture: str
    settings: dict[str, object]  # of the tiny model
    header: dict[str, object]  # keys beyond the widths
    tokenizer: str = "gpt2"
    norm_offset: float = 0.0  # added to norm weights
    permuted: bool = False  # the halves of every query and key head are interleaved
    transposed: tuple[str, ...] = ()  # weights stored input first by transformers


EPSILON = "attention.layer_norm_rms_epsilon"
GEMMA_HEADER = {EPSILON: 1e-6, "attention.sliding_window": 16}
GGUF_FAMILIES = {
    "llama": GgufFamily(
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rms_norm_eps": 1e-3, "head_dim": 16},
        {EPSILON: 1e-3, "rope.freq_base": 500.0, "rope.dimension_count": 16},
        tokenizer="llama",
        permuted=True,
    ),
    "qwen2": GgufFamily("qwen2", {"tie_word_embeddings": True}, {EPSILON: 1e-6, "rope.freq_base": 1e4}),
    "qwen3": GgufFamily("qwen3", {"head_dim": 12}, {EPSILON: 1e-6, "rope.freq_base": 1e4}),
    "phi3": GgufFamily(
        "phi3",
        {"head_dim": 16, "sliding_window": 12, "original_max_position_embeddings": 64},
        {
            EPSILON: 1e-5,
            "rope.dimension_count": 16,
            "rope.scaling.original_context_length": 64,
            "attention.sliding_window": 12,
        },
        tokenizer="llama",
    ),
    "gemma2": GgufFamily(
        "gemma2",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16, "attn_logit_softcapping": 20.0},
        {**GEMMA_HEADER, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 30.0},
        tokenizer="llama",
        norm_offset=1.0,
    ),
    "gemma3_text": GgufFamily(
        "gemma3",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16},
        {**GEMMA_HEADER, "rope.freq_base": 1e6},
        tokenizer="llama",
        norm_offset=1.0,
    ),
    "gpt2": GgufFamily(
        "gpt2",
        {"n_positions": 64, "n_inner": 48, "num_key_value_heads": 8},
        {"attention.layer_norm_epsilon": 1e-5},
        transposed=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
    ),
    "starcoder2": GgufFamily(
        "starcoder2",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "sliding_window": None},
        {"attention.layer_norm_epsilon": 1e-5, "rope.freq_base": 500.0},
    ),
    "stablelm": GgufFamily(
        "stablelm",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        {"attention.layer_norm_epsilon": 1e-5, "rope.dimension_count": 4, "use_parallel_residual": False},
    ),
}


def write_gguf(plain: Path, path: Path, family: GgufFamily, extra: Tensors | None = None, **header: object) -> Path:
    """Write a checkpoint as llama.cpp's converter does: its names, its layouts and a tokenizer."""
    import gguf

    config = AutoConfig.from_pretrained(plain)
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    widths = {
        "context_length": 64,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": 48,
        "attention.head_count": heads,
        "attention.head_count_kv": groups,
    }
    if head_dim != config.hidden_size // heads:
        widths |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    writer = gguf.GGUFWriter(path, family.architecture)
    writer.add_name("tiny")
    for key, value in {**widths, **family.header, **header}.items():
        kind = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        kind[type(value)](f"{family.architecture}.{key}", value)  # type: ignore[operator]
    add_gguf_tokenizer(writer, family.tokenizer)
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    for name, tensor in written_tensors(plain).items():
        stem, suffix = name.rsplit(".", 1)
        stored = names.get_name(stem)
        assert stored is not None, name
        if stored.split(".")[-1] in family.transposed and tensor.ndim == 2:
            tensor = tensor.T
        if family.norm_offset and "norm" in stored:
            tensor = tensor + family.norm_offset
        if family.permuted and stored.endswith(("attn_q", "attn_k")):
            count = heads if stored.endswith("attn_q") else groups
            tensor = tensor.reshape(count, 2, head_dim // 2, -1).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(f"{stored}.{suffix}", tensor.float().contiguous().numpy())
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_gguf_tokenizer(writer: Any, kind: str) -> None:
    """96 tokens: `llama` is SentencePiece, `gpt2` is byte-level BPE."""
    tokens = ["<unk>", "<s>", "</s>", "ab", "cd", *map(chr, range(33, 124))]
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    if kind == "llama":
        writer.add_token_scores([0.0] * len(tokens))
    else:
        writer.add_tokenizer_pre("default")
        writer.add_token_merges(["a b", "c d"])
    writer.add_token_types([2, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)


def gguf_pair(folder: Path, family: str) -> tuple[Path, Path]:
    """A tiny checkpoint and the same as GGUF; norm weights survive the round trip through `w + 1`."""
    spec = GGUF_FAMILIES[family]
    saved = save_tiny(folder / "saved", family, **spec.settings)

    def exact(tensors: Tensors) -> Tensors:
        return {n: (t * 1024).round() / 1024 if "norm" in n else t for n, t in tensors.items()}

    plain = rewrite(saved, folder / "plain", exact)
    return plain, write_gguf(plain, folder / "model.gguf", spec)


@pytest.mark.parametrize("family", GGUF_FAMILIES)
def test_a_gguf_file_prunes_as_the_checkpoint_it_was_made_from(tmp_path: Path, family: str) -> None:
    plain, path = gguf_pair(tmp_path, family)
    options = ("--intermediate-size", "24")
    pruned = [prune(plain, tmp_path / "a", *options), prune(path, tmp_path / "b", *options, "--dtype", "float32")]
    expected, actual = map(written_tensors, pruned)
    assert expected.keys() == actual.keys()
    assert not [name for name in expected if not torch.equal(expected[name], actual[name])]
    ids = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        one, other = (load_stock(folder)(ids).logits for folder in pruned)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    described, stored = (json.loads(run_cli("inspect", model, "--json").stdout) for model in (path, plain))
    assert described["before"]["parameters"] == stored["before"]["parameters"]
    assert described["prunable"] == stored["prunable"]


def test_a_gguf_of_stacked_experts_reads_as_the_checkpoint(tmp_path: Path) -> None:
    spec = GgufFamily("qwen3moe", {}, {EPSILON: 1e-6, "expert_count": 4, "expert_used_count": 2})
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16}
    plain = save_tiny(tmp_path / "plain", "qwen3_moe", norm_topk_prob=True, **sizes)

    def stack(tensors: Tensors) -> Tensors:
        kept = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
        for layer, projection in product(range(2), ("gate_proj", "up_proj", "down_proj")):
            prefix = f"model.layers.{layer}.mlp.experts"
            parts = [tensors[f"{prefix}.{expert}.{projection}.weight"] for expert in range(4)]
            kept[f"{prefix}.{projection}.weight"] = torch.stack(parts)
        return kept

    stacked = rewrite(plain, tmp_path / "stacked", stack)
    path = write_gguf(stacked, tmp_path / "model.gguf", spec, expert_feed_forward_length=24)
    with open_checkpoint(ModelReference(str(path), dtype="float32"), need_weights=True) as checkpoint:
        read = {entry.name: tensor.clone() for entry, tensor in checkpoint.tensors()}
    expected = written_tensors(plain)
    assert read.keys() == expected.keys() and all(torch.equal(read[name], expected[name]) for name in read)
    assert checkpoint.config.num_experts_per_tok == 2 and checkpoint.config.moe_intermediate_size == 24


def llama3_factors(count: int, theta: float, factor: float) -> list[float]:
    """The factors that llama.cpp's converter stores for Llama 3.1's scaling."""
    factors = []
    for number in range(count):
        wavelength = 2 * math.pi * theta ** (number / count)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192 / 1:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


def test_llama_3s_scaling_is_recovered_from_its_factors(tmp_path: Path) -> None:
    spec = replace(
        GGUF_FAMILIES["llama"],
        settings={"head_dim": 16, "rms_norm_eps": 1e-3},
        header={EPSILON: 1e-3, "rope.freq_base": 500000.0, "rope.dimension_count": 16},
    )
    plain = save_tiny(tmp_path / "plain", "llama", **spec.settings)
    factors = torch.tensor(llama3_factors(8, 500000.0, 32.0))
    path = write_gguf(plain, tmp_path / "model.gguf", spec, extra={"rope_freqs.weight": factors})
    with open_checkpoint(ModelReference(str(path)), need_weights=True) as checkpoint:
        rope = checkpoint.config.rope_parameters
    assert rope["rope_type"] == "llama3" and rope["factor"] == 32.0 and rope["rope_theta"] == 500000.0
    assert rope["original_max_position_embeddings"] == 8192
    other = write_gguf(plain, tmp_path / "other.gguf", spec, extra={"rope_freqs.weight": factors + 0.1})
    assert_refused(run_cli("inspect", other), UNSUPPORTED, "rope_freqs.weight")


@pytest.mark.parametrize(
    ("family", "header", "extra", "word"),
    [
        ("llama", {}, "blk.0.attn_q.bias", "some would be lost"),
        ("phi3", {}, "rope_factors_long.weight", "rope_factors_long.weight"),
        ("qwen2", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, None, "yarn"),
        ("llama", {"expert_count": 4, "expert_used_count": 2}, None, "expert_count"),
        ("llama", {"attention.clamp_kqv": 8.0}, None, "attention.clamp_kqv"),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "prune"])
def test_what_transformers_would_lose_from_a_gguf_is_refused(
    tmp_path: Path, family: str, header: dict[str, object], extra: str | None, word: str, command: str
) -> None:
    spec = GGUF_FAMILIES[family]
    plain = save_tiny(tmp_path / "plain", family, **spec.settings)
    tensors = {extra: torch.ones(64)} if extra else {}
    path = write_gguf(plain, tmp_path / "model.gguf", spec, extra=tensors, **header)
    output = ["--output", tmp_path / "out"] if command == "prune" else []
    assert_refused(run_cli(command, path, "--pruning-ratio", "0.5", *output), UNSUPPORTED, word)


def test_falcon_with_kv_groups_is_refused_from_gguf(tmp_path: Path) -> None:
    settings = {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": False, "ffn_hidden_size": 48}
    plain = save_tiny(tmp_path / "plain", "falcon", **settings)
    spec = GgufFamily("falcon", {}, {"attention.layer_norm_epsilon": 1e-5})
    path = write_gguf(plain, tmp_path / "model.gguf", spec)
    assert_refused(run_cli("inspect", path), UNSUPPORTED, "query_key_value")


def test_a_gguf_architecture_that_transformers_cannot_read_is_refused(tmp_path: Path) -> None:
    plain = save_tiny(tmp_path / "plain", "olmo2")
    path = write_gguf(plain, tmp_path / "model.gguf", GgufFamily("olmo2", {}, {EPSILON: 1e-6}))
    assert_refused(run_cli("inspect", path), UNSUPPORTED, "olmo2")
