"""GGUF files as llama.cpp's converter writes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from support.checkpoints import Tensors, rewrite
from support.stock import written_tensors
from support.tiny import save_tiny


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


def write_gguf(
    plain: Path,
    path: Path,
    family: GgufFamily,
    extra: Tensors | None = None,
    tokens: tuple[str, list[str], list[str]] | None = None,
    **header: object,
) -> Path:
    """Write a checkpoint as llama.cpp's converter does: its names, its layouts and a tokenizer.

    Args:
        tokens: see `add_byte_level`.
    """
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
    if tokens is None:
        add_gguf_tokenizer(writer, family.tokenizer)
    else:
        add_byte_level(writer, *tokens)
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


def add_byte_level(writer: Any, name: str, tokens: list[str], merges: list[str]) -> None:
    """Tokens of which the first begins a text, with llama.cpp's name of how text is split."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_bos_token_id(0)


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
