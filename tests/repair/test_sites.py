"""How weights enter the residual stream, and what experts share."""

from __future__ import annotations

import pytest
import torch

from llmprune_cli.coupling.products import Product
from llmprune_cli.repair.sites import FACTOR_FLOOR, Entry, Uses, find_sites
from support.opened import Opened


@pytest.mark.parametrize(
    ("opened", "ways", "factor"),
    [
        ("llama", ["plain", "plain"], 1),
        ("granite", ["plain", "plain"], 0.5),
        ("gpt_neox", ["plain", "plain"], 1),
        ("glm4", ["normed", "normed"], "model.layers.0.post_mlp_layernorm.weight"),
        ("gpt_oss", ["plain", "shared"], 1),
        ("deepseek_v3", ["plain", "shared", "plain"], 1),
        ("qwen2_moe", ["plain", None, "shared"], 1),
    ],
    indirect=["opened"],
)
def test_it_is_known_how_readers_enter_the_residual_stream(
    opened: Opened, ways: list[str | None], factor: float | str
) -> None:
    subject = opened.subject
    with torch.inference_mode():
        layer = opened.layered.load_layer(0 if "deepseek" not in subject.architecture.config.model_type else 1)
        found = find_sites(opened.layered, layer)
    assert [site.entry and site.entry.way for site in found] == ways
    expected = opened.model.get_parameter(factor) if isinstance(factor, str) else torch.tensor(float(factor))
    last = found[-1].entry
    assert last is not None and found[-1].ends_layer
    torch.testing.assert_close(last.factor, expected.detach().expand_as(last.factor), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bias", [None, 3 * torch.ones(2, 4)])
def test_experts_share_what_is_missing_in_the_smallest_changes(bias: torch.Tensor | None) -> None:
    """Two experts of every token: what they are to make more is what the pseudo-inverse of their weights says."""
    generator = torch.Generator().manual_seed(2)
    values, results, missing = (torch.randn(*shape, generator=generator) for shape in ((2, 6, 3), (2, 6, 4), (6, 4)))
    weights = torch.rand(2, 6, generator=generator)
    uses = Uses("down", {0, 1}, bias)
    for expert in range(2):
        uses.watch(Product("down", 2, expert, values[expert], None, results[expert]))
        handed_in = results[expert] if bias is None else results[expert] + bias[expert]
        uses.collect(torch.arange(6), handed_in * weights[expert, :, None])
    found = {expert: (x, y) for expert, x, y in Entry("shared", torch.full((4,), 2.0)).corrections(uses, missing)}
    for token in range(6):
        changes = torch.linalg.pinv(2 * weights[None, :, token]) @ missing[None, token]
        for expert in range(2):
            inputs, aims = found[expert]
            weight = weights[expert, token]
            torch.testing.assert_close(inputs[token], weight * values[expert, token])
            added = aims[token] - weight * results[expert, token]
            torch.testing.assert_close(added, weight * changes[expert], rtol=0.02, atol=1e-5)


def test_what_a_reader_has_made_is_told_as_it_was_before_the_layer_added_to_it() -> None:
    """Falcon adds its attention to what its MLP has made in place; a bias is not of the reader's making."""
    values, results = torch.randn(1, 6, 3), torch.randn(1, 6, 4)
    seen, made = Product("down", 1, None, values, torch.ones(4), results), results.clone()
    uses = Uses("down", {None})
    assert uses.watch(seen)
    results += 5
    ((expert, inputs, told),) = uses.as_they_are()
    assert expert is None and torch.equal(inputs, values[0]) and torch.equal(told, made[0] - 1)
    missing = torch.randn(6, 4)
    ((_, _, wanted),) = Entry("plain", torch.full((4,), 2.0)).corrections(uses, missing)
    torch.testing.assert_close(wanted, made[0] - 1 + missing / 2)


def test_behind_a_norm_what_is_made_and_what_is_missing_are_scaled_alike() -> None:
    values, results, missing = torch.randn(1, 6, 3), torch.randn(1, 6, 4), torch.randn(6, 4)
    uses = Uses("down", {None})
    assert uses.watch(Product("down", 1, None, values, None, results))
    ((_, inputs, wanted),) = Entry("normed", torch.full((4,), 2.0)).corrections(uses, missing)
    q = results[0].square().mean(-1, keepdim=True).rsqrt()
    torch.testing.assert_close(inputs, values[0] * q, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(wanted, results[0] * q + missing / (2 * (1 + FACTOR_FLOOR)), rtol=1e-4, atol=1e-4)
