"""Calibrated pruning: layers run one at a time, importance from activations, refits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import families
from conftest import BY_MAGNITUDE, Opened, run_cli, save_tiny
from llmprune_cli.apply.pruned_folder import write_pruned
from llmprune_cli.choose.activity import measure_activity
from llmprune_cli.choose.magnitude import HEADS
from llmprune_cli.choose.selection import make_plan
from llmprune_cli.coupling.products import Product
from llmprune_cli.coupling.subject import Subject, understand
from llmprune_cli.family.architecture import NEURONS
from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.options import Listener, PruneOptions
from llmprune_cli.plan.target import Plan, WidthRequest, resolve
from llmprune_cli.repair.least_squares import Moments, solve_reader
from llmprune_cli.repair.refit import Streams, refit
from llmprune_cli.repair.sites import Entry, Uses, find_sites
from llmprune_cli.run.calibration import CalibrationOptions, prepare_calibration
from llmprune_cli.source.full_model import load_model
from llmprune_cli.source.opening import ModelReference, open_checkpoint
from llmprune_cli.source.tokenizer import load_tokenizer

CALIBRATED = ("--calibration-tokens", "600", "--calibration-seq-len", "40")


every_family = pytest.mark.parametrize("opened", families.FAMILIES, indirect=True)


@every_family
def test_layers_run_one_at_a_time_as_the_stock_model_runs_them(opened: Opened) -> None:
    with torch.inference_mode():
        *_, (states, items) = opened.layered.walk(opened.tokens)
        logits = opened.layered.load_ends().logits(states, items)
        expected = opened.model(opened.tokens, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_a_layer_alone_keeps_the_scale_of_its_number(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "gpt2", num_hidden_layers=3, scale_attn_by_inverse_layer_idx=True)
    tokens = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(1))
    with open_checkpoint(ModelReference(str(folder)), need_weights=True) as checkpoint:
        layered, model = understand(checkpoint).layered("cpu"), load_model(checkpoint, "cpu", "float32")
        with torch.inference_mode():
            *_, (states, _) = layered.walk(tokens)
            expected = model(tokens, use_cache=False).logits
            logits = layered.load_ends().logits(states, 0)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@every_family
def test_calibrated_pruning_repairs_every_family(opened: Opened, text_file: Path, tmp_path: Path) -> None:
    assert_repaired(opened.subject, "residual", text_file, tmp_path / "out")


def refitted(opened: Opened, method: str, folder: Path) -> tuple[Checkpoint, Plan, Streams, float]:
    """Half the neurons gone (and some experts, where there are any) by magnitude; the error of the last stream."""
    subject = opened.subject
    request = WidthRequest(
        intermediate_pruning_ratio=0.5, round_to=8, num_experts=4 if subject.widths.num_experts else None
    )
    target = resolve(subject.architecture, subject.trace.refused, request)
    quiet = Listener(*[lambda *_: None] * 4)
    plan = make_plan(subject, target, PruneOptions(request), None, quiet)
    with torch.inference_mode():
        start = opened.layered.embed(opened.tokens)
        streams = Streams(start, start.clone(), len(start))
        checkpoint, reports = refit(opened.layered, subject.trace, plan, streams, method, folder, lambda n: None)
    return checkpoint, plan, streams, reports[-1].stream_error


@pytest.mark.parametrize(
    "opened", ["llama", "gpt_neox", "granite", "cohere", "gemma2", "olmo2", "mixtral", "jamba"], indirect=True
)
def test_the_residual_refit_follows_the_dense_stream(opened: Opened, tmp_path: Path) -> None:
    """Blocks in sequence, in parallel, scaled, with a norm behind them, of experts: less and less error is left."""
    none, local, residual = (refitted(opened, method, tmp_path)[3] for method in ("none", "local", "residual"))
    assert residual < 0.9 * local < local < none


@pytest.mark.parametrize(
    "opened", ["llama", "granite", "gpt2", "opt", "falcon", "phi", "qwen3_moe", "glm4", "gpt_oss"], indirect=True
)
def test_a_refit_of_what_lost_nothing_changes_nothing(opened: Opened, tmp_path: Path) -> None:
    subject = opened.subject
    target = resolve(subject.architecture, subject.trace.refused, WidthRequest())
    plan = make_plan(subject, target, PruneOptions(WidthRequest()), None, Listener(*[lambda *_: None] * 4))
    with torch.inference_mode():
        start = opened.layered.embed(opened.tokens)
        streams = Streams(start, start.clone(), 4)
        checkpoint, reports = refit(opened.layered, subject.trace, plan, streams, "residual", tmp_path, lambda n: None)
    before = {entry.name: tensor.clone() for entry, tensor in subject.checkpoint.tensors()}
    for entry, tensor in checkpoint.tensors():
        torch.testing.assert_close(tensor, before[entry.name], rtol=1e-3, atol=1e-4)
    assert any(entry.shard and Path(entry.shard).parent == tmp_path for entry in checkpoint.entries)
    assert all(report.stream_error < 1e-6 for report in reports)


@pytest.mark.parametrize("opened", ["llama", "gpt2", "gemma2", "mixtral", "gpt_oss", "deepseek_v3"], indirect=True)
def test_the_pruned_stream_is_what_the_written_model_computes(opened: Opened, tmp_path: Path) -> None:
    subject = opened.subject
    checkpoint, plan, streams, _ = refitted(opened, "residual", tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    quiet = Listener(*[lambda *_: None] * 4)
    write_pruned(replace(subject, checkpoint=checkpoint), plan, out, {}, 10**9, quiet)
    with open_checkpoint(ModelReference(str(out)), need_weights=True) as written, torch.inference_mode():
        logits = load_model(written, "cpu", "float32")(opened.tokens, use_cache=False).logits
        ends = opened.layered.load_ends()
        items = opened.layered.load_layer(0).returned_items(streams.pruned)
        torch.testing.assert_close(ends.logits(streams.pruned, items), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("opened", ["llama", "gpt_neox", "gemma2", "mixtral"], indirect=True)
def test_the_local_refit_repairs_too(opened: Opened, text_file: Path, tmp_path: Path) -> None:
    assert_repaired(opened.subject, "local", text_file, tmp_path / "out")


def assert_repaired(subject: Subject, refit: str, text: Path, out: Path) -> None:
    """Prune whatever the family has, with a refit that is nowhere worse than none, into a checkpoint that loads."""
    widths, refused = subject.widths, subject.trace.refused
    neurons = [width for width in NEURONS if getattr(widths, width)]
    options = ["--round-to", "8"]
    options += ["--intermediate-pruning-ratio", "0.4"] if not refused.keys() & {*neurons} else ["--layers", "3"]
    options += ["--kv-group-pruning-ratio", "0.5"] if widths.num_key_value_heads > 1 and HEADS not in refused else []
    options += ["--experts", "4"] if widths.num_experts and "num_experts" not in refused else []
    run = run_cli(
        *("prune", subject.checkpoint.folder, *options, "--output", out, "--json"),
        *("--importance", "activation", "--refit", refit, "--calibration", text, *CALIBRATED),
    )
    assert run.code == 0, run.stderr
    card = json.loads(run.stdout)["calibration"]
    assert card["layers"] and all(row["refit_error"] <= row["removal_error"] + 1e-9 for row in card["layers"])
    manifest = json.loads((out / "llmprune.json").read_text())
    assert manifest["calibration"] == card and manifest["options"]["refit"] == refit
    with open_checkpoint(ModelReference(str(out)), need_weights=True) as pruned:
        load_model(pruned, "cpu", "float32")


@pytest.mark.parametrize("opened", ["llama", "gpt2"], indirect=True)
def test_activity_is_what_its_formulas_say(opened: Opened) -> None:
    subject, model = opened.subject, opened.model
    seen: dict[str, torch.Tensor] = {}
    base = "model.layers.1.mlp.down_proj" if "llama" in type(model).__name__.lower() else "transformer.h.1.mlp.c_proj"
    model.get_submodule(base).register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    with torch.inference_mode():
        hidden = model(opened.tokens, use_cache=False, output_hidden_states=True).hidden_states
        start = opened.layered.embed(opened.tokens)
        activity = measure_activity(opened.layered, subject.trace, start, "activation", lambda n: None)
        weight = model.get_submodule(base).weight.double()
        matrix = weight if "llama" in base or "model." in base else weight.T
        expected = matrix.square().sum(0) * seen["x"].double().square().flatten(0, 1).mean(0)
        torch.testing.assert_close(activity.scores["intermediate_size"]["1"], expected, rtol=1e-5, atol=0)
        cosine = torch.nn.functional.cosine_similarity(hidden[1], hidden[2], dim=-1).double().mean()
        assert activity.influence[1] == pytest.approx(1 - float(cosine), abs=1e-6)


def test_the_refit_is_the_least_squares_solution() -> None:
    import numpy as np

    generator = torch.Generator().manual_seed(3)
    inputs, outputs = torch.randn(200, 12, generator=generator), torch.randn(200, 5, generator=generator)
    matrix, kept, damping = torch.randn(5, 12, generator=generator), torch.tensor([0, 2, 3, 7, 11]), 0.2
    moments = Moments.zero(5, 12)
    for first in range(0, 200, 64):
        moments.add(inputs[first : first + 64], outputs[first : first + 64])
    solved = solve_reader(moments, matrix, kept, damping)
    x, old = inputs[:, kept].double(), matrix[:, kept].double()
    strength = damping * x.square().sum(0).mean()
    rows = torch.cat([x, strength.sqrt() * torch.eye(5, dtype=torch.float64)])
    goals = torch.cat([outputs.double(), strength.sqrt() * old.T])
    expected = np.linalg.lstsq(rows.numpy(), goals.numpy(), rcond=None)[0].T
    np.testing.assert_allclose(solved[:, kept].numpy(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(solved[:, [1, 4, 5, 6, 8, 9, 10]], torch.zeros(5, 7))
    assert moments.error(solved) < moments.error(torch.zeros_like(matrix).index_copy(1, kept, matrix[:, kept]))


def test_an_input_that_is_always_zero_keeps_its_weight() -> None:
    inputs = torch.randn(50, 4)
    inputs[:, 1] = 0
    matrix = torch.randn(3, 4)
    moments = Moments.zero(3, 4)
    moments.add(inputs, torch.randn(50, 3))
    solved = solve_reader(moments, matrix, torch.tensor([0, 1, 2]), 0.1)
    torch.testing.assert_close(solved[:, 1], matrix[:, 1])
    dead = Moments.zero(3, 4)
    assert torch.equal(solve_reader(dead, matrix, torch.arange(4), 0.1), matrix)


@pytest.mark.parametrize(
    ("opened", "ways", "factor"),
    [
        ("llama", ["plain", "plain"], 1),
        ("granite", ["plain", "plain"], 0.5),
        ("gpt_neox", ["plain", "plain"], 1),
        ("glm4", ["normed", "normed"], "model.layers.0.post_mlp_layernorm.weight"),
        ("gpt_oss", ["plain", "shared"], 1),
        ("deepseek_v3", ["shared", "plain"], 1),
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
        found = find_sites(layer, subject.trace, subject.widths.hidden_size)
    assert [site.entry and site.entry.way for site in found] == ways
    expected = opened.model.get_parameter(factor) if isinstance(factor, str) else torch.tensor(float(factor))
    last = found[-1].entry
    assert last is not None and found[-1].ends_layer
    torch.testing.assert_close(last.factor, expected.detach().expand_as(last.factor), rtol=1e-3, atol=1e-3)


def test_experts_share_what_is_missing_in_the_smallest_changes() -> None:
    """Two experts of every token: what they are to add is what the pseudo-inverse of their weights says."""
    generator = torch.Generator().manual_seed(2)
    values, results, missing = (torch.randn(*shape, generator=generator) for shape in ((2, 6, 3), (2, 6, 4), (6, 4)))
    weights = torch.rand(2, 6, generator=generator)
    uses = Uses("down", {0, 1})
    for expert in range(2):
        uses.watch(Product("down", 2, expert, values[expert], None, results[expert]))
        uses.collect(torch.arange(6), results[expert] * weights[expert, :, None])
    found = {expert: (x, y) for expert, x, y in Entry("shared", torch.full((4,), 2.0)).corrections(uses, missing)}
    for token in range(6):
        changes = torch.linalg.pinv(2 * weights[None, :, token]) @ missing[None, token]
        for expert in range(2):
            inputs, aims = found[expert]
            weight = weights[expert, token]
            torch.testing.assert_close(inputs[token], weight * values[expert, token])
            torch.testing.assert_close(aims[token], weight * changes[expert], rtol=0.02, atol=0)


def test_an_aim_that_is_added_comes_on_top_of_what_a_weight_makes() -> None:
    generator = torch.Generator().manual_seed(4)
    inputs, aims, matrix = (torch.randn(*shape, generator=generator) for shape in ((30, 4), (30, 3), (3, 4)))
    aimed, direct = Moments.zero(3, 4), Moments.zero(3, 4)
    aimed.add(inputs, aims)
    aimed.aim_at(matrix)
    direct.add(inputs, inputs @ matrix.T + aims)
    torch.testing.assert_close(aimed.cross, direct.cross, rtol=1e-5, atol=1e-5)
    assert aimed.total == pytest.approx(direct.total, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "gemma2"])
@pytest.mark.parametrize("share", ["85%", "60%"])
def test_a_target_is_reached_and_never_exceeded(family: str, share: str, tmp_path: Path, text_file: Path) -> None:
    settings = {**families.SIZES, **families.FAMILIES[family]}
    source = save_tiny(tmp_path / "model", families.model_type(family), **settings)
    run = run_cli(
        *("prune", source, "--target-params", share, "--output", tmp_path / "out", "--json"),
        *("--calibration", text_file, *CALIBRATED),
    )
    assert run.code == 0, run.stderr
    result = json.loads(run.stdout)
    limit = float(share[:-1]) / 100 * result["before"]["parameters"]
    assert 0.5 * limit < result["after"]["parameters"] <= limit
    assert result["importance"] == "consensus" and result["refit"] == "residual"
    divergences = [candidate["kl"] for candidate in result["candidates"]]
    assert divergences == sorted(divergences) and all(c["parameters"] <= limit for c in result["candidates"])
    assert result["candidates"][0]["widths"] == result["after"]["widths"]
    tried = {"llama": "num_attention_heads", "qwen3_moe": "num_experts"}
    if family in tried:
        assert len({candidate["widths"][tried[family]] for candidate in result["candidates"]}) > 1
    with open_checkpoint(ModelReference(str(tmp_path / "out")), need_weights=True) as pruned:
        load_model(pruned, "cpu", "float32")


def test_a_dry_run_shows_the_candidates(tiny_llama: Path, text_file: Path) -> None:
    options = ("--target-size", "100KB", "--dry-run", "--calibration", text_file, *CALIBRATED)
    run = run_cli("prune", tiny_llama, *options)
    assert run.code == 0 and "Candidates, best first" in run.stdout and "Dry run" in run.stdout
    assert json.loads(run_cli("prune", tiny_llama, *options, "--json").stdout)["after"]["size_bytes"] <= 100_000


def test_widths_alone_are_pruned_by_what_works(tiny_llama: Path, tmp_path: Path, text_file: Path) -> None:
    widths = ("--intermediate-size", "24", "--output", tmp_path / "out", "--json")
    run = run_cli("prune", tiny_llama, *widths, "--calibration", text_file, *CALIBRATED)
    result = json.loads(run.stdout)
    assert (result["importance"], result["refit"]) == ("consensus", "residual") and result["calibration"]["layers"]


@pytest.mark.parametrize("fault", ["no tokenizer", "another model's tokenizer"])
def test_without_usable_text_units_go_by_magnitude_with_a_warning(fault: str, tmp_path: Path, text_file: Path) -> None:
    source = save_tiny(tmp_path / "model", vocab_size=96 if fault == "no tokenizer" else 80)
    if fault == "no tokenizer":
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (source / name).unlink()
    widths = ("--intermediate-size", "24")
    run = run_cli("prune", source, *widths, "--output", tmp_path / "open", "--json")
    assert run.code == 0 and "Warning" in run.stderr and "by magnitude" in run.stderr
    result = json.loads(run.stdout)
    assert (result["importance"], result["refit"]) == ("magnitude", "none") and result["calibration"] is None
    assert run_cli("prune", source, *widths, *BY_MAGNITUDE, "--output", tmp_path / "asked").code == 0
    first, second = (sorted((tmp_path / name).glob("*.safetensors")) for name in ("open", "asked"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    for asked in (("--refit", "residual"), ("--importance", "range"), ("--calibration", text_file)):
        refused = run_cli("prune", source, *widths, *asked, "--output", tmp_path / "refused")
        assert refused.code == 3 and "tokenizer" in refused.stderr and not (tmp_path / "refused").exists()
    evaluated = run_cli("eval", source, "--dataset", text_file, "--max-seq-len", "32")
    assert evaluated.code == 3 and "tokenizer" in evaluated.stderr


@pytest.mark.parametrize(
    ("options", "code", "word"),
    [
        (["--target-params", "many"], 2, "6B"),
        (["--target-params", "150%"], 2, "whole model"),
        (["--target-params", "0"], 2, "number"),
        (["--target-params", "80%", "--target-size", "1GB"], 2, "one of them"),
        (["--target-params", "80%", "--pruning-ratio", "0.5"], 2, "width options"),
        (["--pruning-ratio", "0.5", "--layer-importance", "loss"], 2, "--layers N"),
        (["--target-params", "2%"], 5, "least"),
        (["--pruning-ratio", "0.5", "--refit", "local", "--calibration", "absent.txt"], 3, "absent.txt"),
        (["--pruning-ratio", "0.5", "--refit", "local", "--calibration", "short.txt"], 3, "short.txt"),
    ],
)
def test_calibration_mistakes_are_refused(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], code: int, word: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("too short")
    run = run_cli("prune", tiny_llama, *options, "--output", "out", "--calibration-seq-len", "40")
    assert run.code == code and word in run.stderr and "Traceback" not in run.stderr, run.stderr
    assert not Path("out").exists()


def test_layers_go_by_block_influence(tiny_llama: Path, tmp_path: Path, text_file: Path) -> None:
    source = save_tiny(tmp_path / "model", num_hidden_layers=5)
    plan = tmp_path / "plan.json"
    options = ("--importance", "activation", "--calibration", text_file, *CALIBRATED)
    run = run_cli("prune", source, "--layers", "3", "--save-plan", plan, "--output", tmp_path / "out", *options)
    assert run.code == 0, run.stderr
    with open_checkpoint(ModelReference(str(source)), need_weights=True) as checkpoint:
        subject = understand(checkpoint)
        text = prepare_calibration(
            CalibrationOptions(str(text_file), tokens=600, seq_len=40), load_tokenizer(checkpoint), 96, 64, 0, print
        )
        with torch.inference_mode():
            layered = subject.layered("cpu")
            start = layered.embed(text.fitted)
            activity = measure_activity(layered, subject.trace, start, "activation", lambda n: None)
    least = sorted(range(5), key=activity.influence.__getitem__)[:2]
    assert json.loads(plan.read_text())["layers"] == [layer for layer in range(5) if layer not in least]


def test_the_same_seed_gives_the_same_bytes(tiny_llama: Path, tmp_path: Path, text_file: Path) -> None:
    options = ("--intermediate-size", "24", "--importance", "range", "--refit", "residual", "--calibration", text_file)
    for name in ("a", "b"):
        assert run_cli("prune", tiny_llama, *options, *CALIBRATED, "--output", tmp_path / name).code == 0
    first, second = (sorted((tmp_path / name).glob("*.safetensors")) for name in ("a", "b"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
