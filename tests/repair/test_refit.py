"""Refits: less error than before in every family, and none where nothing was lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmprune_cli.apply.pruned_folder import write_pruned
from llmprune_cli.choose.selection import make_plan
from llmprune_cli.coupling.subject import Subject
from llmprune_cli.family.widths import NEURONS, Width
from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.folder.manifest import Manifest
from llmprune_cli.journal.journal import Journal
from llmprune_cli.options import Choice, ModelReference, WidthRequest
from llmprune_cli.plan.document import Plan
from llmprune_cli.plan.requested_widths import Target, resolve
from llmprune_cli.progress import QUIET
from llmprune_cli.repair.dense_goals import Streams
from llmprune_cli.repair.layer_refit import LayerRefit, relative_distance
from llmprune_cli.repair.refit import refit, with_new_weights
from llmprune_cli.run.layered_model import LayeredModel
from llmprune_cli.run.workbench import Workbench
from llmprune_cli.source.full_model import load_model
from llmprune_cli.source.opening import open_checkpoint
from support import families
from support.cli import CALIBRATED, run_cli
from support.full import examples
from support.opened import Opened
from support.stock import written_tensors

FOLLOWED = ["llama", "gpt_neox", "granite", "cohere", "gemma2", "olmo2", "mixtral", "jamba", "gpt_oss"]
WHOLE = ["llama", "granite", "gpt2", "opt", "falcon", "phi", "qwen3_moe", "glm4", "gpt_oss"]
BY_LAYER = ["llama", "gpt_neox", "gemma2", "mixtral"]
WRITTEN = ["llama", "gpt2", "gemma2", "mixtral", "gpt_oss", "deepseek_v3"]
every_family = pytest.mark.parametrize("opened", families.TRIED_SLOWLY, indirect=True)


@every_family
def test_calibrated_pruning_repairs_every_family(opened: Opened, text_file: Path, tmp_path: Path) -> None:
    assert_repaired(opened.subject, "residual", text_file, tmp_path / "out")


def by_magnitude(subject: Subject, target: Target) -> Plan:
    bench = Workbench(LayeredModel(subject, "cpu"), None, QUIET)
    return make_plan(bench, target, Choice(importance="magnitude", refit="none"))


def refitted(
    opened: Opened, method: str, folder: Path, request: WidthRequest | None = None
) -> tuple[Checkpoint, Plan, Streams, float]:
    """Half the neurons gone (and some experts, where there are any) by magnitude; the error of the last stream."""
    subject = opened.subject
    request = request or WidthRequest(
        intermediate_pruning_ratio=0.5, round_to=8, num_experts=4 if subject.widths.num_experts else None
    )
    target = resolve(subject.architecture, subject.trace.refused, request)
    plan = by_magnitude(subject, target)
    with torch.inference_mode():
        start = opened.layered.embed(opened.tokens)
        streams = Streams(start, start.clone(), len(start))
        journal = Journal(folder=folder / method)
        (folder / method).mkdir()
        reports = refit(opened.layered, plan, streams, method, lambda n: None, journal)
    checkpoint = with_new_weights(subject.checkpoint, plan.layers, journal)
    return checkpoint, plan, streams, reports[-1].stream_error


@pytest.mark.parametrize(
    "opened", examples(FOLLOWED, ["gpt_neox", "granite", "olmo2", "jamba", "gpt_oss"]), indirect=True
)
def test_the_residual_refit_follows_the_dense_stream(opened: Opened, tmp_path: Path) -> None:
    """Blocks in sequence, in parallel, scaled, with a norm behind them, of experts: less and less error is left."""
    none, local, residual = (refitted(opened, method, tmp_path)[3] for method in ("none", "local", "residual"))
    assert residual < 0.9 * local < local < none


@pytest.mark.parametrize("opened", examples(WHOLE, ["granite", "gpt2", "opt", "falcon", "gpt_oss"]), indirect=True)
def test_a_refit_of_what_lost_nothing_changes_nothing(opened: Opened, tmp_path: Path) -> None:
    subject = opened.subject
    target = resolve(subject.architecture, subject.trace.refused, WidthRequest())
    plan = by_magnitude(subject, target)
    with torch.inference_mode():
        start = opened.layered.embed(opened.tokens)
        streams = Streams(start, start.clone(), 4)
        journal = Journal(folder=tmp_path)
        reports = refit(opened.layered, plan, streams, "residual", lambda n: None, journal)
    checkpoint = with_new_weights(subject.checkpoint, plan.layers, journal)
    before = {entry.name: tensor.clone() for entry, tensor in subject.checkpoint.tensors()}
    for entry, tensor in checkpoint.tensors():
        torch.testing.assert_close(tensor, before[entry.name], rtol=1e-3, atol=1e-4)
    assert any(entry.shard and Path(entry.shard).parent == tmp_path for entry in checkpoint.entries)
    assert all(report.stream_error < 1e-6 for report in reports)


@pytest.mark.parametrize("opened", examples(WRITTEN, ["gpt2", "gemma2", "gpt_oss"]), indirect=True)
def test_the_pruned_stream_is_what_the_written_model_computes(opened: Opened, tmp_path: Path) -> None:
    assert_streams_alike(opened, "residual", tmp_path, None)


@pytest.mark.parametrize("method", ["none", "residual"])
@pytest.mark.parametrize(
    ("opened", "request_"),
    [
        ("olmo2", WidthRequest(num_attention_heads=4)),  # norms over all heads
        ("olmo2", WidthRequest(num_attention_heads=2, num_key_value_heads=1)),
        ("mamba", WidthRequest(intermediate_pruning_ratio=0.5)),  # neurons that two weights read
    ],
    indirect=["opened"],
)
def test_the_pruned_stream_lacks_what_no_reader_can_make_up_for(
    opened: Opened, request_: WidthRequest, method: str, tmp_path: Path
) -> None:
    assert_streams_alike(opened, method, tmp_path, request_)


def assert_streams_alike(opened: Opened, method: str, folder: Path, request: WidthRequest | None) -> None:
    """What a refit takes for the pruned model is the model that is written."""
    subject = opened.subject
    checkpoint, plan, streams, error = refitted(opened, method, folder, request)
    assert error > 1e-3
    out = folder / "out"
    out.mkdir()
    write_pruned(replace(subject, checkpoint=checkpoint), plan, out, Manifest(), 10**9, QUIET)
    with open_checkpoint(ModelReference(str(out)), need_weights=True) as written, torch.inference_mode():
        logits = load_model(written, "cpu", "float32")(opened.tokens, use_cache=False).logits
        ends = opened.layered.load_ends()
        items = opened.layered.load_layer(0).returned_items(streams.pruned)
        torch.testing.assert_close(ends.logits(streams.pruned, items), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("opened", examples(BY_LAYER, ["gpt_neox", "mixtral"]), indirect=True)
def test_the_local_refit_repairs_too(opened: Opened, text_file: Path, tmp_path: Path) -> None:
    assert_repaired(opened.subject, "local", text_file, tmp_path / "out")


def assert_repaired(subject: Subject, refit: str, text: Path, out: Path) -> None:
    """Prune whatever the family has, with a refit that is nowhere worse than none, into a checkpoint that loads."""
    widths, refused = subject.widths, subject.trace.refused
    neurons = [width for width in NEURONS if getattr(widths, width)]
    options = ["--round-to", "8"]
    options += ["--intermediate-pruning-ratio", "0.4"] if not refused.keys() & {*neurons} else ["--layers", "3"]
    has_groups = widths.num_key_value_heads > 1 and Width.HEADS not in refused
    options += ["--kv-group-pruning-ratio", "0.5"] if has_groups else []
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


MEASURED = ("--importance", "range", "--refit", "local", "--compute-dtype", "bfloat16")


def test_what_no_refit_touches_keeps_the_digits_that_the_computation_lacks(
    tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    words = ("--mlp", "50%", "--calibration", text_file, *CALIBRATED, *MEASURED, "--output", tmp_path / "out")
    run = run_cli("prune", tiny_llama, *words)
    assert run.code == 0, run.stderr
    before, after = written_tensors(tiny_llama), written_tensors(tmp_path / "out")
    readers = {name for name in before if name.endswith("self_attn.o_proj.weight")}
    assert readers and all(torch.equal(before[name], after[name]) for name in readers)
    solved = after["model.layers.0.mlp.down_proj.weight"]
    assert not torch.equal(solved, solved.bfloat16().float()), "what is solved has digits of its own"


def test_readers_that_no_refit_solves_keep_their_digits_where_columns_of_them_go(
    tiny_of: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    text, plan = ("--calibration", text_file, *CALIBRATED), tmp_path / "plan.json"
    words = ("prune", tiny_of("mamba"), "--mlp", "50%", *text, *MEASURED, "--save-plan", plan)
    assert run_cli(*words, "--output", tmp_path / "refitted").code == 0
    words = ("prune", tiny_of("mamba"), "--plan", plan, "--refit", "none", "--output", tmp_path / "cut")
    assert run_cli(*words).code == 0
    one, other = (written_tensors(tmp_path / name) for name in ("refitted", "cut"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_it_is_said_once_what_no_refit_makes_up_for(
    tiny_of: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    options = ("--intermediate-pruning-ratio", "0.5", "--calibration", text_file, *CALIBRATED)
    run = run_cli("prune", tiny_of("mamba"), *options, "--importance", "activation", "--output", tmp_path / "out")
    assert run.code == 0, run.stderr
    assert run.stderr.count("Several weights read intermediate_size together") == 1
    assert run.stderr.count("--refit residual is the same as local") == 1


@pytest.mark.parametrize("opened", ["mamba"], indirect=True)
def test_what_several_weights_read_is_missed_where_it_is_tried_out(opened: Opened) -> None:
    """Without any refit, as `--sensitivity` measures it."""
    subject = opened.subject
    target = resolve(subject.architecture, subject.trace.refused, WidthRequest(intermediate_pruning_ratio=0.5))
    plan = by_magnitude(subject, target)
    with torch.inference_mode():
        stream = opened.layered.embed(opened.tokens)
        whole, without = stream.clone(), stream.clone()
        opened.layered.load_layer(0).advance(whole)
        streams = Streams(without, without, 0)
        LayerRefit(opened.layered.load_layer(0), opened.layered, plan, 0, streams).only_remove()
    assert relative_distance(without, whole) > 1e-3
