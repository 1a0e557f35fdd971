"""Layers that run one at a time compute what the stock model does."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from llmprune_cli.coupling.subject import understand
from llmprune_cli.options import ModelReference
from llmprune_cli.run.layer import Layer
from llmprune_cli.run.layered_model import LayeredModel
from llmprune_cli.run.speed.throughput import Clock
from llmprune_cli.source.full_model import load_model
from llmprune_cli.source.opening import open_checkpoint
from support import families
from support.cli import run_cli
from support.opened import Opened
from support.refusals import UNSUPPORTED, assert_refused
from support.stock import load_stock
from support.tiny import save_tiny

every_family = pytest.mark.parametrize("opened", families.TRIED, indirect=True)


@every_family
def test_layers_run_one_at_a_time_as_the_stock_model_runs_them(opened: Opened) -> None:
    with torch.inference_mode():
        *_, (states, items) = opened.layered.walk(opened.tokens)
        logits = opened.layered.load_ends().logits(states, items)
        expected = opened.model(opened.tokens, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("opened", ["llama"], indirect=True)
def test_windows_are_embedded_together_as_each_alone(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmprune_cli.run.layered_model.windows_together", lambda windows: 2)
    windows = torch.arange(40).reshape(5, 8)
    with torch.inference_mode():
        ends, together = opened.layered.load_ends(), opened.layered.embed(windows)
        alone = torch.cat([ends.embed(window[None]) for window in windows])
        none = opened.layered.embed(windows[:0])  # of a process that has none
    assert torch.equal(together, alone) and none.shape == (0, *together.shape[1:])


@pytest.mark.parametrize(("windows", "passes"), [(1, 3), (2, 3), (3, 3), (4, 4), (8, 8), (12, 9)])
def test_a_layer_is_warmed_up_apart_only_where_windows_are_few(tmp_path: Path, windows: int, passes: int) -> None:
    stream, counted = torch.randn(windows, 8, 64), []
    with open_checkpoint(ModelReference(str(save_tiny(tmp_path / "model"))), need_weights=True) as checkpoint:
        layer, clock = LayeredModel(understand(checkpoint), "cpu").load_layer(0), Clock()
        layer.block.register_forward_hook(lambda *_: counted.append(1))
        with torch.inference_mode():
            plain = stream.clone()
            layer.advance(plain)
            counted.clear()
            clock.advance(layer, stream)
    torch.testing.assert_close(stream, plain)
    assert len(counted) == passes and len(clock.seconds) == 1 and min(clock.seconds[0]) > 0


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_logits_are_multiplied_in_the_dtype_of_the_computation_and_normed_in_float32(
    tmp_path: Path, is_tied: bool, compute: torch.dtype
) -> None:
    folder = save_tiny(tmp_path / "model", "llama", "bfloat16", tie_word_embeddings=is_tied)
    hidden = 30 * torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))
    with open_checkpoint(ModelReference(str(folder)), need_weights=True) as checkpoint:
        ends = LayeredModel(understand(checkpoint), "cpu").load_ends(exact=True, compute=compute)
        stock = load_model(checkpoint, "cpu", "float32")
    with torch.inference_mode():
        expected = functional.linear(stock.model.norm(hidden).to(compute), stock.lm_head.weight.to(compute)).float()
        assert torch.equal(ends.logits(hidden, 0), expected)
    assert ends.model.lm_head.weight.dtype == compute and ends.model.model.norm.weight.dtype == torch.float32
    assert ends.model.model.embed_tokens.weight.dtype == (compute if is_tied else torch.bfloat16)


def test_a_layer_alone_keeps_the_scale_of_its_number(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "gpt2", num_hidden_layers=3, scale_attn_by_inverse_layer_idx=True)
    tokens = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(1))
    with open_checkpoint(ModelReference(str(folder)), need_weights=True) as checkpoint:
        layered, model = LayeredModel(understand(checkpoint), "cpu"), load_model(checkpoint, "cpu", "float32")
        with torch.inference_mode():
            *_, (states, _) = layered.walk(tokens)
            expected = model(tokens, use_cache=False).logits
            logits = layered.load_ends().logits(states, 0)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


KINDS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
SPECIAL: dict[str, dict[str, object]] = {  # rules say what the first or the last layers are, or layers give a list
    "openai-gpt": {},
    "gemma4_text": {"layer_types": KINDS, "sliding_window": 8, "head_dim": 16, "hidden_size_per_layer_input": 0},
    "olmo_hybrid": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "ernie4_5_moe": {"moe_intermediate_size": 40, "moe_num_experts": 4, "moe_k": 2},
}


@pytest.mark.parametrize("family", SPECIAL)
def test_layers_of_special_families_run_alone_as_the_stock_model_runs_them(tmp_path: Path, family: str) -> None:
    folder = save_tiny(tmp_path / "model", family, num_hidden_layers=4, **SPECIAL[family])
    tokens = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(1))
    with open_checkpoint(ModelReference(str(folder)), need_weights=True) as checkpoint:
        layered = LayeredModel(understand(checkpoint), "cpu")
        with torch.inference_mode():
            *_, (states, items) = layered.walk(tokens)
            logits = layered.load_ends().logits(states, items)
            expected = load_stock(folder)(tokens, use_cache=False).logits
            assert replace(layered, compute=torch.bfloat16).runs()  # also where a router multiplies in float32 always
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "settings", "why"),
    [
        ("roformer", {"is_decoder": True}, "reads weights outside of it"),  # positions
        ("modernbert-decoder", {"layer_types": ["full_attention"] * 2}, "attn_norm"),  # which the first one lacks
    ],
)
def test_layers_that_would_run_otherwise_alone_are_refused(
    tmp_path: Path, text_file: Path, family: str, settings: dict[str, object], why: str
) -> None:
    folder = save_tiny(tmp_path / "model", family, pad_token_id=0, **settings)
    options = ("--mlp", "50%", "--calibration", text_file, "--calibration-seq-len", "32", "--output", tmp_path / "out")
    assert_refused(run_cli("prune", folder, *options), UNSUPPORTED, why, "--importance magnitude")


def test_a_layer_is_gone_as_soon_as_the_next_but_one_comes(
    make_tiny: Callable[..., Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Python frees only when it looks for cycles is many layers on the way there."""
    load, loaded = LayeredModel.load_layer, []

    def load_and_count(self: LayeredModel, number: int) -> Layer:
        left = [parts for parts in loaded if any(part() is not None for part in parts)]
        assert len(left) < 3, "two of a side-by-side run, or the one before"
        layer = load(self, number)
        loaded.append([weakref.ref(part) for part in layer.block.modules()])
        return layer

    monkeypatch.setattr(LayeredModel, "load_layer", load_and_count)
    folder = make_tiny(num_hidden_layers=6)
    options = ("--mlp", "50%", "--calibration", text_file, "--calibration-seq-len", "32", "--output", tmp_path / "out")
    gc.collect()
    gc.disable()
    try:
        run = run_cli("prune", folder, *options)
    finally:
        gc.enable()
    assert run.code == 0, run.stderr
    assert len(loaded) > 12
