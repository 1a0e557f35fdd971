"""The residual stream in principal components: the same model, and the right one where the least components go."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from llmprune_cli.coupling.subject import Subject, understand
from llmprune_cli.errors import UnsupportedError
from llmprune_cli.options import ModelReference
from llmprune_cli.repair.residual_stream import ResidualStream, find_residual_stream
from llmprune_cli.repair.rotation import principal_components, rotate, untie
from llmprune_cli.run.layered_model import LayeredModel
from llmprune_cli.source.opening import open_checkpoint
from support import families
from support.checkpoints import rewrite
from support.cli import run_cli
from support.full import examples
from support.stock import load_stock
from support.tiny import save_tiny

TURNED = ["llama", "llama-mha", "mistral", "qwen2", "qwen3", "phi3", "smollm3", "granite", "mixtral", "qwen3_moe"]
TURNED += ["qwen2_moe", "olmoe", "granitemoe", "gpt_oss", "deepseek_v3", "glm4_moe", "helium", "mamba", "falcon_h1"]
REFUSED = {
    "gemma": "embeddings",
    "gemma2": "embeddings",
    "olmo2": "scales what enters",
    "gpt2": "subtracts the mean",
    "olmo": "has no weights",
    "opt": "subtracts the mean",
}
SHOWN = ["llama", "llama-mha", "phi3", "granite", "qwen2_moe", "deepseek_v3", "mamba"]
TEXT = ("--calibration-tokens", "1200", "--calibration-seq-len", "40")


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 90, (4, 24), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, Subject, int]]:
    family = request.param
    settings = {**families.SIZES, **families.FAMILIES[family], "initializer_range": 0.15}
    folder = save_tiny(tmp_path / "model", families.model_type(family), **settings)
    with open_checkpoint(ModelReference(str(folder)), need_weights=True) as checkpoint:
        yield folder, *untie(understand(checkpoint))


def stream_of(subject: Subject) -> ResidualStream:
    return find_residual_stream(subject.architecture, subject.trace)


@pytest.mark.parametrize("opened", examples(TURNED, SHOWN), indirect=True)
def test_a_rotated_model_computes_what_it_did(
    opened: tuple[Path, Subject, int], tokens: torch.Tensor, tmp_path: Path
) -> None:
    folder, subject, added = opened
    assert added in (0, 96 * subject.widths.hidden_size)
    components = principal_components(LayeredModel(subject, "cpu"), tokens, None, lambda layers: None)
    torch.testing.assert_close(components.T @ components, torch.eye(len(components), dtype=torch.float64))
    (tmp_path / "rotated").mkdir()
    rotated = rotate(subject, stream_of(subject), components, tmp_path / "rotated", lambda size_bytes: None)
    dense, turned = load_stock(folder), load_stock(tmp_path / "rotated")
    assert not torch.allclose(dense.get_input_embeddings().weight, turned.get_input_embeddings().weight)
    with torch.no_grad():
        torch.testing.assert_close(turned(tokens).logits, dense(tokens).logits, rtol=1e-3, atol=1e-4)
    assert rotated.widths == subject.widths


@pytest.mark.parametrize("opened", REFUSED, indirect=True)
def test_what_cannot_be_rotated_exactly_is_refused_by_name(opened: tuple[Path, Subject, int]) -> None:
    _, subject, _ = opened
    family = subject.architecture.config.model_type
    with pytest.raises(UnsupportedError, match=f"{family} cannot be rotated: .*{REFUSED[family]}"):
        stream_of(subject)


@pytest.mark.parametrize("opened", ["llama"], indirect=True)
def test_components_are_those_of_the_normalized_hidden_states(
    opened: tuple[Path, Subject, int], tokens: torch.Tensor
) -> None:
    folder, subject, _ = opened
    found = principal_components(LayeredModel(subject, "cpu"), tokens, None, lambda layers: None).numpy()
    model = load_stock(folder)
    states: list[Any] = []
    hooks = [layer.register_forward_pre_hook(lambda _, args: states.append(args[0])) for layer in model.model.layers]
    hooks.append(model.model.norm.register_forward_pre_hook(lambda _, args: states.append(args[0])))
    with torch.no_grad():
        model(tokens)
    assert len(hooks) == len(states)
    rows = torch.cat([state.flatten(0, 1) for state in states]).double().numpy()
    rows /= numpy.linalg.norm(rows, axis=1, keepdims=True)
    values, vectors = numpy.linalg.eigh(rows.T @ rows)
    assert numpy.abs(numpy.abs(vectors[:, ::-1].T @ found).diagonal()).min() > 1 - 1e-6
    energies = ((rows @ found) ** 2).sum(0)
    assert (numpy.diff(energies) < 1e-9).all() and energies[0] == pytest.approx(values[-1])


def in_a_subspace(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Let everything that writes the residual stream write into 32 of its 64 dimensions, in no direction of an axis."""
    basis = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(1)))[0][:, :32]
    projection = basis @ basis.T
    changed = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            changed[name] = projection @ tensor
        elif "embed_tokens" in name:
            changed[name] = tensor @ projection
    return changed


@pytest.mark.parametrize("tied", [False, True])
def test_components_without_energy_go_without_a_trace(
    tied: bool, text_file: Path, tokens: torch.Tensor, tmp_path: Path
) -> None:
    saved = save_tiny(tmp_path / "saved", tie_word_embeddings=tied, initializer_range=0.15)
    source = rewrite(saved, tmp_path / "model", in_a_subspace)
    options = ("--hidden-size", "32", "--rotate", "--refit", "none", "--calibration", text_file, *TEXT)
    run = run_cli("prune", source, *options, "--output", tmp_path / "out", "--json")
    assert run.code == 0, run.stderr
    result = json.loads(run.stdout)
    assert any("adds 6,144 parameters" in text for text in result["deviations"]) == tied
    pruned = load_stock(tmp_path / "out")
    assert pruned.config.hidden_size == 32 and not pruned.config.tie_word_embeddings
    assert pruned.num_parameters() == result["after"]["parameters"]
    with torch.no_grad():
        torch.testing.assert_close(pruned(tokens).logits, load_stock(source)(tokens).logits, rtol=1e-3, atol=1e-3)
    dropped = run_cli("prune", source, *(o for o in options if o != "--rotate"), "--output", tmp_path / "dropped")
    assert dropped.code == 0
    with torch.no_grad():
        logits = load_stock(tmp_path / "dropped")(tokens).logits
    assert (logits - load_stock(source)(tokens).logits).abs().max() > 0.1


@pytest.mark.parametrize(
    "options",
    [
        ["--intermediate-size", "24", "--output", "out"],
        ["--target-params", "80%", "--output", "out"],
        ["--hidden-size", "32", "--save-plan", "plan.json"],
        ["--hidden-size", "32", "--output", "out", "--resume"],
    ],
)
def test_rotation_is_about_the_hidden_size(options: list[str], tiny_llama: Path) -> None:
    run = run_cli("prune", tiny_llama, "--rotate", *options)
    assert run.code == 2 and "--rotate" in run.stderr
