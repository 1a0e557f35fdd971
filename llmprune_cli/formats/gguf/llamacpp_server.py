"""llama.cpp's server in a process of its own, for one GGUF file: an assertion of its C++ code ends that process only.

Run as `python -m llmprune_cli.formats.gguf.llamacpp_server FILE CONTEXT THREADS`. It prints the address that it listens
on, and ends when its standard input does.
"""

from __future__ import annotations

import sys


def serve(path: str, context: int, threads: int) -> None:
    """Load a model for exact answers: float32 key-value cache, plain attention, on the CPU."""
    from xllamacpp import CommonParams, Server, ggml_type, llama_flash_attn_type

    params = CommonParams()
    params.model.path = path
    params.n_ctx = context
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.fit_params = False
    params.warmup = False
    params.swa_full = True
    params.ui = False
    params.cache_ram_mib = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cache_type_k = params.cache_type_v = ggml_type.GGML_TYPE_F32
    params.flash_attn_type = llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
