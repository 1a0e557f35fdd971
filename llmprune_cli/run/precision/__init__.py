"""In how many digits matrix products are formed."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from llmprune_cli.run.precision.autocast import QuickerAutocast
from llmprune_cli.run.precision.rounding import can_round


def native_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which a device multiplies fastest what is stored in one: that one, or float32."""
    if device.type == "cuda":
        least = {torch.bfloat16: (8, 0), torch.float16: (7, 0)}.get(stored)
        is_native = least is not None and torch.cuda.get_device_capability(device) >= least
    elif device.type == "mps":
        is_native = stored in (torch.bfloat16, torch.float16)
    elif _is_x86():
        cpu = torch.cpu
        is_native = stored == torch.bfloat16 and (cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())
    else:
        is_native = stored == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return stored if is_native else torch.float32


@contextmanager
def multiplying_in(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Within it, matrix products are formed in a dtype, of whatever is multiplied; norms and sums stay in float32."""
    if dtype == torch.float32:
        yield
        return
    is_helped = device.type == "cpu" and dtype == torch.bfloat16
    with torch.autocast(device.type, dtype), QuickerAutocast(_is_attention_slow()) if is_helped else nullcontext():
        yield


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def _is_attention_slow() -> bool:
    """Whether attention in bfloat16 takes longer here than in float32: without AMX, where float32 may be rounded."""
    return _is_x86() and not torch.cpu._is_amx_tile_supported() and can_round()
