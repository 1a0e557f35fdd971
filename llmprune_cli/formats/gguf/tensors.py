"""Which tensors a GGUF file holds, and what each stored tensor gives to them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from llmprune_cli.errors import UnsupportedError
from llmprune_cli.folder.tensors import TensorEntry
from llmprune_cli.formats.gguf.blocks.mixes import USUAL, Model, fitting, mixed_kind
from llmprune_cli.formats.gguf.families import GgufFamily, Heads, experts_of, heads_of

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, TensorNameMap
    from transformers import PretrainedConfig

Change = Callable[["torch.Tensor"], "torch.Tensor"]
EXPERT = re.compile(r"(?P<block>.*)\.experts\.(?P<number>\d+)\.(?P<role>\w+)\.weight")
FUSED = ("qkv_proj.weight", "gate_up_proj.weight")
EXPERT_ROLES = {"w1": "gate", "w2": "down", "w3": "up", "gate_proj": "gate", "down_proj": "down", "up_proj": "up"}
OUTPUT = "output.weight"
LAYER = re.compile(r"\.(?:layers|h)\.(\d+)\.")
# Matrices that llama.cpp's own converter keeps in float32: routers, and positions that are added.
PRECISE = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "position_embd.weight", "_norm.weight")


@dataclass(frozen=True)
class FileTensor:
    """One tensor of the file."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType


@dataclass(frozen=True)
class Part:
    """What one stored tensor gives to one of the file."""

    target: str
    change: Change
    expert: int | None = None  # its number within a stack


@dataclass(frozen=True)
class Layout:
    """The file's tensors in their order, and what is made of each stored one."""

    tensors: tuple[FileTensor, ...]
    parts: dict[str, tuple[Part, ...]]  # by the stored tensor's name


def lay_out(
    entries: Iterable[TensorEntry], config: PretrainedConfig, family: GgufFamily, dtype: str, is_weighted: bool
) -> Layout:
    """Name, reshape and type every tensor.

    Args:
        dtype: of the file, by llama.cpp's name. Matrices whose rows no block divides become float16, vectors float32.
        is_weighted: see `Model`.

    Raises:
        UnsupportedError: a tensor that llama.cpp has no name for.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    architecture = next(key for key, name in MODEL_ARCH_NAMES.items() if name == family.architecture)
    names = get_tensor_name_map(architecture, int(config.num_hidden_layers))
    shapes: dict[str, tuple[int, ...]] = {}
    stacked: set[str] = set()
    parts: dict[str, tuple[Part, ...]] = {}
    for entry in entries:
        parts[entry.name] = tuple(_parts(entry, config, family, names))
        for part in parts[entry.name]:
            shapes[part.target] = tuple(part.change(torch.empty(entry.shape, device="meta")).shape)
            stacked |= {part.target} if part.expert is not None else set()
    heads = heads_of(config, family)
    grouped = heads.query // heads.key
    layers, is_tied = int(config.num_hidden_layers), OUTPUT not in shapes
    model = Model(family.architecture, layers, grouped, experts_of(config), is_weighted, is_tied)
    tensors = (
        FileTensor(
            name, (*((experts_of(config),) if name in stacked else ()), *shape), _kind(name, shape, dtype, model)
        )
        for name, shape in shapes.items()
    )
    return Layout(tuple(tensors), parts)


def _kind(name: str, shape: tuple[int, ...], dtype: str, model: Model) -> GGMLQuantizationType:
    from gguf import GGMLQuantizationType

    if len(shape) == 1 or name.endswith(PRECISE):
        return GGMLQuantizationType.F32
    if dtype in USUAL:
        return GGMLQuantizationType[mixed_kind(dtype, name, shape[-1], model)]
    return GGMLQuantizationType[fitting(shape[-1], dtype.upper())]


def _parts(entry: TensorEntry, config: PretrainedConfig, family: GgufFamily, names: TensorNameMap) -> Iterator[Part]:
    layer = LAYER.search(entry.name)
    expert = EXPERT.fullmatch(entry.name)
    if expert and layer:
        name = f"blk.{layer[1]}.ffn_{EXPERT_ROLES[expert['role']]}_exps.weight"
        yield Part(name, _same, int(expert["number"]))
        return
    if entry.name.endswith(FUSED) and family.interleaved:
        for name, change in _split(entry.name, config, family):
            yield Part(f"{names.get_name(name)}.weight", change)
        return
    target = names.get_name(entry.name, try_suffixes=(".weight", ".bias"))
    if target is None or (target == OUTPUT and not family.has_head):
        raise UnsupportedError(f"llama.cpp's {family.architecture} has no tensor for {entry.name}.")
    yield Part(target, _change(entry.name, config, family))
    if target == "token_embd.weight" and family.own_head and config.tie_word_embeddings:
        yield Part(OUTPUT, _same)


def _split(name: str, config: PretrainedConfig, family: GgufFamily) -> Iterator[tuple[str, Change]]:
    """The projections that one of Phi-3's matrices holds, for an architecture that has them apart."""
    heads, neurons = heads_of(config, family), int(config.intermediate_size)
    roles = {"q_proj": heads.query * heads.size, "k_proj": heads.key * heads.size, "v_proj": heads.key * heads.size}
    if name.endswith(FUSED[1]):
        roles = {"gate_proj": neurons, "up_proj": neurons}
    block, start = name.rsplit(".", 2)[0], 0
    for role, rows in roles.items():
        yield f"{block}.{role}", _rows(start, rows, _change(f"{block}.{role}.weight", config, family))
        start += rows


def _rows(start: int, rows: int, change: Change) -> Change:
    return lambda tensor: change(tensor[start : start + rows])


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _change(name: str, config: PretrainedConfig, family: GgufFamily) -> Change:
    """How the family's layout becomes llama.cpp's."""
    heads = heads_of(config, family)
    role = ".".join(name.split(".")[-2:])
    if family.interleaved and role.startswith("q_proj."):
        return lambda tensor: interleave(tensor, heads.query)
    if family.interleaved and role.startswith("k_proj."):
        return lambda tensor: interleave(tensor, heads.key)
    if family.fused and role.startswith("query_key_value."):
        return lambda tensor: gather(tensor, heads)
    if role in family.transposed:
        return lambda tensor: tensor.T
    factor = attention_factor(config, family, heads)
    if factor != 1.0 and role == ("q_norm.weight" if family.swa_rope else "q_proj.weight"):
        return lambda tensor: (tensor.float() + (family.norm_offset if family.swa_rope else 0.0)) * factor
    if family.norm_offset and role.endswith("norm.weight"):
        return lambda tensor: tensor.float() + family.norm_offset
    return _same


def interleave(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Order the rows of each head so that the two elements that RoPE turns together are neighbours.

    transformers turns element i of a head of P elements with element i + P/2, llama.cpp 2i with 2i + 1.

    Args:
        tensor: projection [H·P, D] or its bias [H·P].
    """
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def gather(tensor: torch.Tensor, heads: Heads) -> torch.Tensor:
    """Order fused rows, stored group by group (its queries, its key, its value), as all queries, keys and values.

    Args:
        tensor: projection [(H + 2K)·P, D] or its bias.
    """
    groups = tensor.reshape(heads.key, -1, heads.size, *tensor.shape[1:])
    rows = groups[:, :-2], groups[:, -2], groups[:, -1]
    return torch.cat([part.reshape(-1, *tensor.shape[1:]) for part in rows])


def attention_factor(config: PretrainedConfig, family: GgufFamily, heads: Heads) -> float:
    """What queries have to be multiplied by so that llama.cpp's scale of attention becomes the family's."""
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if scalar is None:
        return 1.0
    wide = config.num_hidden_layers == family.wide_layers
    assumed = config.hidden_size // heads.query if wide else heads.size
    return float((assumed / scalar) ** 0.5)
