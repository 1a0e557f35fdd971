"""Export for onnxruntime-genai, by its own builder: a folder that it generates text from."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmprune_cli.errors import UnsupportedError, VerificationError, first_line
from llmprune_cli.family.skeleton import build_skeleton
from llmprune_cli.family.widths import read_widths
from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.folder.scratch import scratch_folder
from llmprune_cli.formats.gguf.families import rope_of
from llmprune_cli.formats.registry import Continuation, ExportOptions, Fit, Format, Limits
from llmprune_cli.formats.safetensors import write_safetensors
from llmprune_cli.source.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PACKAGE = "onnxruntime_genai"
PRECISIONS = {"float32": "fp32", "int8": "int8", "int4": "int4"}  # that the builder makes for the CPU
FAMILIES = ("gemma", "gemma2", "gpt_oss", "granite", "lfm2", "llama", "mistral", "phi", "qwen2", "qwen3")
# Families that the builder (0.18) takes, but not rightly.
MISTAKEN = {
    "gemma3": "its builder does not find the RoPE settings of Gemma 3",
    "gemma3_text": "its builder does not find the RoPE settings of Gemma 3",
    "granitemoehybrid": "its builder fails on layers without attention weights",
    "olmo": "what its builder makes of it gives other results",
    "phi3": "what its builder makes of it gives other results",
    "smollm3": "its builder fails for want of position ids",
}
# Kinds of RoPE that the builder gets: of Llama it drops others without a word, of GPT-OSS it wants YaRN.
USUAL_ROPE = ("default", "linear", "yarn")
ROPE = {"llama": ("default", "dynamic", "llama3"), "gpt_oss": ("yarn",)}
HEAD_MULTIPLE = 16  # of which its attention wants the head dim, and what of it RoPE turns


def fit_genai(config: PretrainedConfig) -> Fit:
    """Whether the builder knows the family, and the attention of ONNX Runtime its head dim."""
    family = config.model_type
    if family in MISTAKEN:
        return Fit(loads=False, note=MISTAKEN[family])
    if family not in FAMILIES:
        return Fit(loads=False, note=f"its builder is not known to be right for {family}")
    if mistaken := _mistaken_rope(config):
        return Fit(loads=False, note=mistaken)
    if _has_two_outputs(config):
        tokens = config.vocab_size
        return Fit(
            loads=False, note=f"its builder takes any matrix with {tokens} outputs for that of the {tokens} tokens"
        )
    head_dim = read_widths(config).head_dim
    turning = int(head_dim * (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1))
    for size, what in ((head_dim, "a head dim"), (turning, "a share of a head that turns")):
        if size % HEAD_MULTIPLE:
            return Fit(loads=False, note=f"onnxruntime-genai wants {what} in multiples of {HEAD_MULTIPLE}, not {size}")
    window = getattr(config, "sliding_window", None)
    if family == "mistral" and window is not None and window < config.max_position_embeddings:
        return Fit(loads=True, note=f"it is right within the sliding window of {window} tokens only")
    return Fit(loads=True)


def _has_two_outputs(config: PretrainedConfig) -> bool:
    """Whether another matrix has as many outputs as there are tokens, by which the builder knows the last one."""
    model = build_skeleton(config)
    others = (own for own in model.modules() if isinstance(own, nn.Linear) and own is not model.get_output_embeddings())
    return any(own.out_features == config.vocab_size for own in others)


def _mistaken_rope(config: PretrainedConfig) -> str:
    """What the builder gets wrong of RoPE; empty where it gets all of it."""
    rope = rope_of(config)
    kind = rope.get("rope_type", "default")
    if kind not in ROPE.get(config.model_type, USUAL_ROPE):
        return f"its builder does not get RoPE of the kind {kind} in {config.model_type}"
    is_complete = bool(rope.get("beta_fast") and rope.get("beta_slow")) and rope.get("truncate") is False
    is_own = rope.get("attention_factor") or bool(rope.get("mscale")) != bool(rope.get("mscale_all_dim"))
    if kind == "yarn" and (is_own or not is_complete):
        return "its builder gets YaRN with beta_fast and beta_slow alone, without truncate and an attention factor"
    return ""


def write_genai(
    checkpoint: Checkpoint, folder: Path, options: ExportOptions, progress: Callable[[int], None]
) -> dict[str, str]:
    """Run the builder on a plain copy of the checkpoint, in a process of its own: it prints, and extends `sys.path`.

    Raises:
        CheckpointError: no tokenizer.
        UnsupportedError: the builder is not installed, or fails.
    """
    load_tokenizer(checkpoint)
    if find_spec(PACKAGE) is None:
        raise UnsupportedError(
            "The builder of --format genai is part of onnxruntime-genai, which is not installed: "
            "pip install 'llmprune[genai]' brings it."
        )
    with scratch_folder() as scratch:
        plain = scratch / "model"
        plain.mkdir()
        write_safetensors(checkpoint, plain, replace(options, dtype=None), lambda size: progress(size // 2))
        command: list[str | Path] = [sys.executable, "-m", f"{PACKAGE}.models.builder", "--input", plain]
        command += ["--output", folder, "--precision", PRECISIONS[str(options.dtype)], "--execution_provider", "cpu"]
        command += ["--cache_dir", scratch / "cache", "--extra_options", "hf_token=false"]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise UnsupportedError(f"{checkpoint.source}: the builder of onnxruntime-genai fails: {reason}")
    progress(checkpoint.size_bytes - checkpoint.size_bytes // 2)
    checkpoint.config.save_pretrained(folder)
    return {}


class GenaiModel:
    """A folder that onnxruntime-genai has loaded."""

    def __init__(self, model: Any) -> None:
        """Run an `onnxruntime_genai.Model`."""
        self.model = model

    def continue_greedily(self, prompt: torch.Tensor, tokens: int) -> Continuation:
        """Go on with a prompt, with its cache."""
        import onnxruntime_genai as genai

        settings = genai.GeneratorParams(self.model)
        settings.set_search_options(max_length=len(prompt) + tokens, do_sample=False)
        generator = genai.Generator(self.model, settings)
        log_probs, new, chosen = [], prompt, []
        for _ in range(tokens):
            generator.append_tokens(new[None].to(torch.int32).numpy())
            logits = torch.from_numpy(generator.get_logits()).float()
            log_probs.append(logits.reshape(-1, logits.shape[-1])[-1].log_softmax(-1))
            new = log_probs[-1].argmax()[None]
            chosen.append(new)
        return Continuation(torch.cat(chosen), torch.stack(log_probs))


@contextmanager
def open_genai(folder: Path) -> Iterator[GenaiModel]:
    """Load a written folder.

    Raises:
        VerificationError: onnxruntime-genai does not load it.
    """
    import onnxruntime_genai as genai

    try:
        model = genai.Model(str(folder))
    except Exception as error:  # its exceptions have no parent of their own
        raise VerificationError(
            f"onnxruntime-genai does not load the export: {first_line(error)}. Nothing was kept."
        ) from error
    yield GenaiModel(model)


GENAI = Format(
    runs_in="onnxruntime-genai",
    write=write_genai,
    fit=fit_genai,
    loading="`onnxruntime_genai.Model(FOLDER)`, where FOLDER is this folder.",
    package=PACKAGE,
    extra="genai",
    runtime=open_genai,
    limits={"float32": Limits(1e-5), "int8": Limits(1e-2, same_tokens=False), "int4": Limits(0.5, same_tokens=False)},
)
