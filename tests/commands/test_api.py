"""Python gets what the command line gets: the same results, the same bytes, the same refusals, and no output."""

from __future__ import annotations

import inspect as signatures
import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import llmprune_cli
from llmprune_cli import LlmpruneError, Plan, Progress, UsageError, evaluate, export, inspect, prune
from llmprune_cli.report.json_results import to_json
from support.cli import BY_MAGNITUDE, run_cli
from support.full import in_full
from support.stock import written_tensors

VARYING = ("seconds", "tokens_per_second", "peak_memory_bytes", "output", "model", "files")
SPEEDS = ("per_second", "prefill_spread")  # in the names of what a card measures
MAGNITUDE = {"importance": "magnitude", "refit": "none"}


def plain(document: Any) -> Any:
    """A document without what differs from run to run."""
    if isinstance(document, dict):
        kept = (n for n in document if n not in VARYING and not any(speed in n for speed in SPEEDS))
        return {n: plain(document[n]) for n in kept}
    return [plain(item) for item in document] if isinstance(document, list) else document


def same(result: Any, run: Any) -> bool:
    assert run.code == 0, run.stderr
    return bool(plain(json.loads(to_json(result))) == plain(json.loads(run.stdout)))


def same_folders(one: Path, other: Path) -> bool:
    first, second = written_tensors(one), written_tensors(other)
    assert first.keys() == second.keys()
    files = {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
    return files and all(first[name].equal(second[name]) for name in first)


def test_inspect_and_magnitude(tiny_llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    looked = inspect(tiny_llama, pruning_ratio=0.5)
    pruned = prune(tiny_llama, output=tmp_path / "a", pruning_ratio=0.5, **MAGNITUDE)
    assert capfd.readouterr() == ("", "")
    assert same(looked, run_cli("inspect", tiny_llama, "--pruning-ratio", "0.5", "--json"))
    command = ("prune", tiny_llama, "--output", tmp_path / "b", "--pruning-ratio", "0.5", *BY_MAGNITUDE, "--json")
    assert same(pruned, run_cli(*command)) and same_folders(tmp_path / "a", tmp_path / "b")
    assert inspect(tmp_path / "a", verify=True).parameters == pruned.after.parameters  # type: ignore[union-attr]


def test_a_calibrated_prune_its_plan_and_its_progress(tiny_llama: Path, tmp_path: Path, text_file: Path) -> None:
    text = {"calibration": text_file, "calibration_tokens": 600, "calibration_seq_len": 40}
    seen: list[Progress] = []
    asked: dict[str, Any] = {"intermediate_size": 24, "layers": 1, **text}
    result = prune(tiny_llama, output=tmp_path / "a", save_plan=tmp_path / "plan.json", progress=seen.append, **asked)
    flags = [part for name, value in asked.items() for part in (f"--{name.replace('_', '-')}", value)]
    assert same(result, run_cli("prune", tiny_llama, "--output", tmp_path / "b", *flags, "--json"))
    assert same_folders(tmp_path / "a", tmp_path / "b")
    assert {"Measuring activity", "Refitting (residual)", "Writing"} <= {step.stage for step in seen}
    assert all(0 <= step.done <= step.total for step in seen)
    plan = Plan.load(tmp_path / "plan.json")
    plan.save(tmp_path / "again.json")
    assert plan.layers == (0,) or plan.layers == (1,)
    prune(tiny_llama, output=tmp_path / "c", plan=tmp_path / "again.json", **text)
    assert same_folders(tmp_path / "a", tmp_path / "c")


def test_evaluate_and_export(tiny_llama: Path, tmp_path: Path, text_file: Path) -> None:
    windows: dict[str, Any] = {"dataset": str(text_file), "max_seq_len": 32, "limit": 3}
    report = evaluate(tiny_llama, compare=tiny_llama, **windows)
    flags = ("--dataset", text_file, "--max-seq-len", "32", "--limit", "3", "--json")
    assert same(report, run_cli("eval", tiny_llama, "--compare", tiny_llama, *flags))
    exported = export(tiny_llama, output=tmp_path / "a", dtype="bf16", max_shard_size="25KB")
    command = ("export", tiny_llama, "--output", tmp_path / "b", "--dtype", "bf16", "--max-shard-size", "25KB")
    assert same(exported, run_cli(*command, "--json")) and same_folders(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"intermediate_pruning_ration": 0.5}, "did you mean intermediate_pruning_ratio?"),
        ({"layers": "ten"}, "layers: Input should be a valid integer"),
        ({"layers": 0}, "layers: 0 is less than 1"),
        ({"pruning_ratio": 1.5}, "is no pruning ratio: give a fraction"),
        ({"pruning_ratio": 0.5, "importance": "magic"}, "'magic' is none of consensus, range"),
        ({"target_params": "6B", "target_size": "4GiB"}, "say the same thing"),
        ({"layers": 1, "drop_layers": (0,)}, "give one of them"),
        ({"target_size": "4QB"}, "--target-size: '4QB' is not a size"),
        ({"mlp": "25%", "intermediate_pruning_ratio": 0.5}, "is another name of"),
        ({}, "say what to prune"),
    ],
)
def test_wrong_use_is_an_error_before_any_work(
    tiny_llama: Path, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError) as refused:
        prune(tiny_llama, output=tmp_path / "out", **options)
    assert said in str(refused.value) and refused.value.exit_code == 2 and not list(tmp_path.iterdir())


def test_other_errors_keep_their_code_and_warnings_go_to_the_log(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(LlmpruneError) as refused:
        inspect(tmp_path / "nowhere")
    assert refused.value.exit_code == 3
    bare = Path(shutil.copytree(tiny_llama, tmp_path / "bare"))
    for path in bare.glob("tokenizer*"):
        path.unlink()
    prune(bare, output=tmp_path / "out", intermediate_size=24)
    assert "So units go by magnitude" in caplog.text and capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("short", "name"),
    [
        ("mlp", "intermediate_pruning_ratio"),
        ("heads", "head_pruning_ratio"),
        ("kv_groups", "kv_group_pruning_ratio"),
        ("hidden", "hidden_pruning_ratio"),
    ],
)
def test_options_have_their_short_names_here_and_in_recipes(
    tiny_llama: Path, tmp_path: Path, short: str, name: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{short}: 50%\n")
    asked = inspect(tiny_llama, **{name: 0.5})
    assert asked.after is not None and asked.after.widths != asked.before.widths
    assert inspect(tiny_llama, **{short: "50%"}) == inspect(tiny_llama, config=recipe) == asked
    run = run_cli("inspect", tiny_llama, "--config", recipe, "--json")
    assert run.code == 0 and json.loads(run.stdout)["after"]["widths"] == asdict(asked.after.widths)


def test_functions_show_what_they_take() -> None:
    shown = signatures.signature(prune).parameters
    assert {"model", "output", "layers", "experts", "importance", "calibration_tokens", "dataset"} <= shown.keys()
    assert shown["calibration_tokens"].default == 32768 and shown["importance"].default is None
    assert all(getattr(llmprune_cli, name) for name in llmprune_cli.__all__)


def test_functions_load_what_they_need_and_a_prune_loads_no_trainer(tiny_llama: Path) -> None:
    """And names of stages, which Python sets on the package when they are imported, hide none of them."""
    script = (
        "import sys\nfrom llmprune_cli import evaluate, export, inspect, prune, recover, sweep\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'takes seconds'\n"
        f"prune({str(tiny_llama)!r}, intermediate_size=24, importance='magnitude', refit='none', dry_run=True)\n"
        "assert not {'datasets', 'transformers.trainer'} & set(sys.modules), 'takes a second'\n"
        "from llmprune_cli import evaluate, export, inspect, prune, recover, sweep\n"
        "assert all(map(callable, (evaluate, export, inspect, prune, recover, sweep)))"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@in_full
def test_a_notebook_runs(tiny_llama: Path, tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat", reason="pip install 'llmprune[notebook]'")
    pytest.importorskip("nbconvert")
    pytest.importorskip("ipykernel")
    cells = [
        "from llmprune_cli import evaluate, prune",
        f"result = prune({str(tiny_llama)!r}, output='out', pruning_ratio=0.5, importance='magnitude', refit='none')",
        "print(result.after.parameters)",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbformat.write(notebook, tmp_path / "page.ipynb")
    command = [sys.executable, "-m", "nbconvert", "--execute", "--to", "notebook", "--inplace", "page.ipynb"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outputs = [output for cell in nbformat.read(tmp_path / "page.ipynb", 4).cells for output in cell.outputs]
    (printed,) = (output["text"] for output in outputs if output.get("name") == "stdout")
    assert run_cli("prune", tiny_llama, "--output", tmp_path / "b", "--pruning-ratio", "0.5", *BY_MAGNITUDE).code == 0
    assert same_folders(tmp_path / "out", tmp_path / "b") and int(printed) > 0
