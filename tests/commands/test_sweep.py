"""Several sizes in one run: each is what `prune` makes, what they share is measured once, and work is not lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import llmprune_cli
from llmprune_cli.cli.sweep import print_sweep
from llmprune_cli.commands.sweep.request import Kept, Points, Sweep, check_sweep
from llmprune_cli.journal.forms import Json
from llmprune_cli.options import Choice, ModelReference
from llmprune_cli.plan.document import Plan
from llmprune_cli.report.json_results import to_json
from llmprune_cli.report.schemas import DOCUMENTS, adapter_of
from llmprune_cli.run.layered_model import LayeredModel
from support.cli import Run, run_cli
from support.full import examples, in_full
from support.refusals import PLAN, assert_refused
from support.stock import written_tensors
from support.tiny import save_tiny
from tools.schemas import schema_of

COLUMNS = 80
MEASURING = ("Measuring activity", "Measuring gradients")
Words = tuple[str | Path, ...]


@pytest.fixture(scope="module")
def text(text_file: Path) -> Words:
    return "--calibration", text_file, "--calibration-tokens", "160", "--calibration-seq-len", "40"


def done(*words: str | Path) -> Run:
    run = run_cli(*words)
    assert run.code == 0, run.stderr
    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers enough for a search to have a choice."""
    return save_tiny(tmp_path_factory.mktemp("deep") / "model", num_hidden_layers=3, initializer_range=0.15)


@pytest.fixture(scope="module")
def swept(model: Path, text: Words, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """A folder with two sizes, and the run that wrote it."""
    folder = tmp_path_factory.mktemp("swept") / "sizes"
    options = ("--keep-models", "--report", folder / "sizes.svg", "--json")
    with pytest.MonkeyPatch.context() as patched:
        walked, walk = [], LayeredModel.walk
        patched.setattr(LayeredModel, "walk", lambda self, *rest: walked.append(self) or walk(self, *rest))
        run = done("sweep", model, "--targets", "85%,60%", *text, "--output", folder, *options)
    assert len(walked) == 3, "the unpruned model is judged once"
    return folder, run


def without_times(document: Any) -> Any:
    """A document without what differs from run to run."""
    if isinstance(document, dict):
        varying = ("seconds", "output", "prefill_tokens_per_second", "prefill_spread")
        return {name: without_times(value) for name, value in document.items() if name not in varying}
    return [without_times(each) for each in document] if isinstance(document, list) else document


def same_tensors(one: Path, other: Path) -> bool:
    first, second = written_tensors(one), written_tensors(other)
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


def test_a_sweep_may_replace_what_one_of_the_same_sizes_wrote(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sizes" / "85%").mkdir(parents=True)
    for name in ("sweep.json", "85%/config.json"):
        (tmp_path / "sizes" / name).write_text("{}")
    monkeypatch.chdir(tmp_path)
    asked = Sweep(Points(targets=("85%",)), delivery=Kept(Path("sizes"), overwrite=True))
    check_sweep(ModelReference(str(tiny_llama)), asked)
    (tmp_path / ".sizes.llmprune-work").mkdir()  # of a run that died when all but this was done
    check_sweep(ModelReference(str(tiny_llama)), replace(asked, delivery=Kept(Path("sizes"))))


@pytest.mark.parametrize("name", examples(["85%", "60%"], ["85%"]))
def test_each_size_is_what_prune_makes_of_it(
    model: Path, text: Words, swept: tuple[Path, Run], tmp_path: Path, name: str
) -> None:
    folder, run = swept
    (point,) = (each for each in json.loads(run.stdout)["points"] if each["name"] == name)
    expected = json.loads(done("prune", model, "--target", name, *text, "-o", tmp_path / "alone", "--json").stdout)
    assert same_tensors(tmp_path / "alone", folder / point["folder"])
    card, dense = expected["calibration"], json.loads(run.stdout)["dense"]
    assert (point["perplexity"], dense["perplexity"]) == (card["perplexity_after"], card["perplexity_before"])
    assert (point["bits_per_byte"], dense["bits_per_byte"]) == (
        card["bits_per_byte_after"],
        card["bits_per_byte_before"],
    )
    assert point["kl"] == card["kl"] > 0 == dense["kl"]
    assert point["parameters"] == expected["after"]["parameters"] < dense["parameters"]
    done("inspect", folder / point["folder"], "--verify")


def test_what_all_sizes_share_is_measured_once_and_everything_is_kept(swept: tuple[Path, Run]) -> None:
    folder, run = swept
    result = json.loads(run.stdout)
    begun = [line for line in run.stderr.splitlines() if line.endswith(MEASURING)]
    assert begun == [f"60% (1 of 2): {stage}" for stage in MEASURING]
    assert [point["name"] for point in result["points"]] == ["85%", "60%"]
    assert [Plan.load(folder / p["plan"]).after.to_json() == p["widths"] for p in result["points"]] == [True, True]
    listed = ["60%", "60%.json", "85%", "85%.json", "sizes.svg", "sweep.json"]
    assert sorted(path.name for path in folder.iterdir()) == listed and len(list(folder.parent.iterdir())) == 1
    assert json.loads((folder / "sweep.json").read_text()) == result
    drawn = (folder / "sizes.svg").read_text()
    assert all(said in drawn for said in ("unpruned", "85%", "60%", "KL divergence", "parameters, millions"))
    adapter_of(DOCUMENTS["sweep"]).validate_json(run.stdout, strict=True)
    assert result.keys() == schema_of("sweep")["properties"].keys()


ASKED_OF = ModelReference("whole", revision="v2", trust_remote_code=True)
ASKED = Sweep(Points(mlp=(0.25,)), Choice(refit="local", seed=3))


def test_the_table_fits_into_80_columns_and_says_how_to_go_on(
    swept: tuple[Path, Run], capsys: pytest.CaptureFixture[str]
) -> None:
    result = adapter_of(DOCUMENTS["sweep"]).validate_json(swept[1].stdout)
    print_sweep(result, ASKED_OF, ASKED)
    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if "sizes" not in line]
    assert max(map(len, lines)) <= COLUMNS and "…" not in shown, shown
    for said in ("unpruned", "85%", "60%", "plexity", "neurons", "KL", "byte", "Wrote", "  llmprune eval"):
        assert said in shown, shown
    assert "hidden" not in shown, "only what varies has a column"
    print_sweep(replace(result, points=tuple(replace(own, folder=None) for own in result.points)), ASKED_OF, ASKED)
    (going_on,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("  llmprune prune"))
    assert "--refit local --seed 3" in going_on and "--revision v2 --trust-remote-code" in going_on
    wide = replace(result.dense.widths, num_attention_heads=128, num_key_value_heads=16, intermediate_size=53_248)
    dense = replace(result.dense, widths=wide, parameters=405 * 10**9, size_bytes=811 * 10**9, perplexity=1e12)
    for widths in (wide, replace(wide, num_experts=128, hidden_size=16_384)):
        print_sweep(replace(result, dense=replace(dense, widths=widths), output=None), ASKED_OF, ASKED)
        shown = capsys.readouterr().out
        assert max(map(len, shown.splitlines())) <= COLUMNS and "…" not in shown and "53,248" in shown, shown


def test_work_goes_on_after_the_last_finished_size(
    model: Path, text: Words, swept: tuple[Path, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("sweep", model, "--targets", "85%,60%", *text, "--keep-models", "--output", tmp_path / "out", "--json")
    write = Json.write

    def write_and_stop(self: Json[Any], path: Path, value: Any) -> None:
        write(self, path, value)
        if path.name.startswith("judged") and path.parent.name == "85%":
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Json, "write", write_and_stop)
        stopped = run_cli(*command)
    assert stopped.code == 130 and "--resume goes on from there" in " ".join(stopped.stderr.split())
    assert not (tmp_path / "out").exists()
    run, (folder, whole) = done(*command, "--resume"), swept
    assert "60% (1 of 2)" not in run.stderr and not any(stage in run.stderr for stage in MEASURING)
    trying = "85% (2 of 2): Trying"
    assert run.stderr.count(trying) == whole.stderr.count(trying) - 1, "what was judged is not tried again"
    assert without_times(json.loads(run.stdout)) == without_times(json.loads(whole.stdout))
    assert same_tensors(tmp_path / "out" / "60%", folder / "60%")
    assert same_tensors(tmp_path / "out" / "85%", folder / "85%")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_python_gets_the_same_and_ratios_of_one_width_are_tried_too(
    tiny_llama: Path, text: Words, text_file: Path, tmp_path: Path
) -> None:
    command = ("sweep", tiny_llama, "--mlp", "25%,50%", "--importance", "range", "--output", tmp_path / "out", *text)
    shown = done(*command, "-q")
    assert shown.stderr == "" and "llmprune prune " in shown.stdout and "out/mlp-25%.json" in shown.stdout
    settings = {"calibration": text_file, "calibration_tokens": 160, "calibration_seq_len": 40, "importance": "range"}
    found = llmprune_cli.sweep(tiny_llama, mlp=("25%", 0.5), **settings)
    written = json.loads((tmp_path / "out" / "sweep.json").read_text())
    for point in written["points"]:
        assert Plan.load(tmp_path / "out" / point.pop("plan")).after.to_json() == point["widths"]
    same = json.loads(to_json(found))
    assert [point.pop("plan") for point in same["points"]] == [None, None]
    assert without_times(same) == without_times(written)
    assert [point["name"] for point in same["points"]] == ["mlp-25%", "mlp-50%"]
    assert run_cli(*command).code == 6  # what is there is replaced only when asked


@in_full
def test_a_sweep_is_replaced_when_asked_and_depths_are_tried_too(model: Path, text: Words, tmp_path: Path) -> None:
    command = ("sweep", model, "--depths", "2,1", *text, "--output", tmp_path / "out")
    assert "Nothing was kept" in done(*command[:-2]).stdout
    done(*command)
    assert "neurons" not in done(*command, "--overwrite").stdout
    assert len(Plan.load(tmp_path / "out" / "2-layers.json").layers) == 2


def test_a_size_that_removes_nothing_is_named(model: Path, text: Words, tmp_path: Path) -> None:
    run = run_cli("sweep", model, "--depths", "2,3", *text, "--output", tmp_path / "out")
    assert_refused(run, PLAN, "3-layers: Nothing would go")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_what_reads_no_text_is_refused(tiny_llama: Path, method: str) -> None:
    run = run_cli("sweep", tiny_llama, "--mlp", "25%,50%", "--importance", method, "--refit", "none")
    assert run.code == 2 and "judges on text" in run.stderr


def test_a_model_without_a_tokenizer_is_refused(make_tiny: Callable[..., Path], tmp_path: Path) -> None:
    model = make_tiny()
    for path in model.glob("tokenizer*"):
        path.unlink()
    run = run_cli("sweep", model, "--mlp", "25%,50%", "-o", tmp_path / "out")
    assert run.code == 3 and "Traceback" not in run.stderr and not (tmp_path / "out").exists(), run.stderr
