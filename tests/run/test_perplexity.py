"""Perplexity against a plain transformers loop."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from llmprune_cli.options import ModelReference
from llmprune_cli.run import perplexity as evaluation
from llmprune_cli.source.full_model import load_model
from llmprune_cli.source.opening import open_checkpoint
from support.cli import WINDOW, evaluated, run_cli
from support.refusals import UNSUPPORTED, assert_refused
from support.stock import plain_perplexity
from support.tiny import save_tokenizer


def test_a_perplexity_that_overflows_is_null(make_tiny: Callable[..., Path], text_file: Path) -> None:
    folder = make_tiny("llama", tie_word_embeddings=True)
    shard = sorted(folder.glob("*.safetensors"))[0]
    from safetensors.torch import load_file, save_file

    tensors = {name: torch.full_like(tensor, torch.inf) for name, tensor in load_file(shard).items()}
    save_file(tensors, shard, metadata={"format": "pt"})
    run = run_cli("eval", folder, "--dataset", text_file, "--max-seq-len", "32", "--json")
    assert run.code == 0 and json.loads(run.stdout)["results"][0]["perplexity"] is None


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("gemma2", {"final_logit_softcapping": 0.5, "head_dim": 8}),
        ("cohere", {"logit_scale": 3.0}),
        ("granite", {"logits_scaling": 0.25}),
        ("gpt2", {"n_inner": 48}),
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 64}),
        ("mixtral", {"num_local_experts": 3}),
        ("llama4_text", {"num_local_experts": 2, "intermediate_size_mlp": 48, "head_dim": 8}),
    ],
)
def test_it_agrees_with_a_plain_loop(
    make_tiny: Callable[..., Path],
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    changes: dict[str, Any],
) -> None:
    monkeypatch.setattr(evaluation, "LOGIT_ELEMENTS", 96 * 5)  # five positions at a time, so that chunks matter
    folder = make_tiny(family, **changes)
    report = evaluated(folder, "--dataset", text_file, "--max-seq-len", str(WINDOW), "--batch-size", "3")
    expected = plain_perplexity(folder, text_file.read_text(), WINDOW)
    assert report["results"][0]["perplexity"] == pytest.approx(expected, rel=1e-5)


def test_the_window_is_the_models_maximum_unless_said_otherwise(tiny_llama: Path, text_file: Path) -> None:
    assert evaluated(tiny_llama, "--dataset", text_file)["results"][0]["max_seq_len"] == 64


def test_long_windows_by_default_are_warned_about(make_tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_tiny("llama", max_position_embeddings=8200, num_hidden_layers=1)
    (tmp_path / "long.txt").write_text("word " * 1700)
    run = run_cli("eval", folder, "--dataset", tmp_path / "long.txt", "--json")
    assert run.code == 0 and "--max-seq-len" in run.stderr and json.loads(run.stdout)["results"][0]["windows"] == 1


@pytest.mark.parametrize(
    ("fitting", "windows", "found"), [(100, 80, 64), (100, 5, 5), (9, 80, 8), (2, 7, 1), (0, 9, 1)]
)
def test_windows_are_halved_until_they_fit(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, fitting: int, windows: int, found: int
) -> None:
    """As if the device's memory took so many windows; with one alone it is left to the evaluation to fail."""
    real = evaluation.window_nll

    def limited(model: Any, batch: torch.Tensor) -> torch.Tensor:
        if len(batch) > fitting:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return real(model, batch)

    monkeypatch.setattr(evaluation, "window_nll", limited)
    with open_checkpoint(ModelReference(str(tiny_llama)), need_weights=True) as checkpoint:
        model = load_model(checkpoint, "cpu")
        assert evaluation.largest_batch(model, torch.zeros(windows, 8, dtype=torch.long)) == found


def test_other_errors_are_no_lack_of_memory(tiny_llama: Path) -> None:
    with open_checkpoint(ModelReference(str(tiny_llama)), need_weights=True) as checkpoint:
        model = load_model(checkpoint, "cpu")
        with pytest.raises(IndexError):
            evaluation.largest_batch(model, torch.full((4, 8), 10**6))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, whose memory is the limit")
def test_as_many_windows_as_fit_give_the_same_figure_on_a_gpu(tiny_llama: Path, text_file: Path) -> None:
    options = ("--dataset", text_file, "--max-seq-len", str(WINDOW), "--device", "cuda", "--batch-size")
    one, several = (evaluated(tiny_llama, *options, size)["results"][0]["perplexity"] for size in ("1", "auto"))
    assert several == pytest.approx(one, rel=1e-5)


def test_the_largest_memory_so_far_is_more_than_the_memory_now(tiny_llama: Path) -> None:
    with open_checkpoint(ModelReference(str(tiny_llama)), need_weights=True) as checkpoint:
        model = load_model(checkpoint, "cpu")
        before = evaluation.peak_memory_bytes(model)
        now = psutil.Process().memory_info().rss
        held = torch.ones(before // 4, dtype=torch.float32)
        assert 0.9 * now < before < evaluation.peak_memory_bytes(model) and held.any()


def test_a_model_with_more_states_than_tokens_is_refused(text_file: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    folder, layers = tmp_path / "model", {"num_encoder_layers": 2, "num_decoder_layers": 2}
    heads = {"num_encoder_attention_heads": 8, "num_decoder_attention_heads": 8}
    sizes = {"vocab_size": 96, "hidden_size": 64, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_buckets": 8}
    config = AutoConfig.for_model("prophetnet", **sizes, **layers, **heads, max_position_embeddings=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    save_tokenizer(folder)
    assert_refused(run_cli("eval", folder, "--dataset", text_file, "--max-seq-len", "32"), UNSUPPORTED, "prophetnet")
    options = ("--mlp", "50%", "--calibration", text_file, "--calibration-seq-len", "32", "--output", tmp_path / "out")
    assert_refused(run_cli("prune", folder, *options), UNSUPPORTED, "prophetnet", "--importance magnitude")
    assert not (tmp_path / "out").exists()
