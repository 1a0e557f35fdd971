"""Recipes: options in a file, which flags beat, and which repeat a run from the folder that it wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from llmprune_cli import UsageError, prune
from support.cli import BY_MAGNITUDE, run_cli
from support.stock import written_tensors


def same_tensors(one: Path, other: Path) -> bool:
    first, second = written_tensors(one), written_tensors(other)
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


def test_the_folder_that_a_run_wrote_repeats_it(tiny_llama: Path, tmp_path: Path, text_file: Path) -> None:
    text = ("--calibration", text_file, "--calibration-tokens", "600", "--calibration-seq-len", "40", "--seed", "3")
    asked = ("--intermediate-size", "24", "--drop-layers", "-1", *text, "--save-config", tmp_path / "recipe.yaml")
    assert run_cli("prune", tiny_llama, *asked, "--output", tmp_path / "a").code == 0
    recipe = json.loads((tmp_path / "a" / "llmprune.json").read_text())["recipe"]
    assert recipe["importance"] == "consensus" and recipe["drop_layers"] == [-1] and "output" not in recipe
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text()) == recipe
    for number, source in enumerate((tmp_path / "a", tmp_path / "a" / "llmprune.json", tmp_path / "recipe.yaml")):
        run = run_cli("prune", "--config", source, "--output", tmp_path / str(number))
        assert run.code == 0, run.stderr
        assert same_tensors(tmp_path / "a", tmp_path / str(number))
    prune(config=tmp_path / "a", output=tmp_path / "python")
    assert same_tensors(tmp_path / "a", tmp_path / "python")
    assert run_cli("inspect", "--verify", tmp_path / "a").code == 0


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("recipe.yaml", "model: {}\nintermediate-size: 24\nimportance: magnitude\nrefit: none\n"),
        ("recipe.toml", 'model = "{}"\nintermediate_size = 24\nimportance = "magnitude"\nrefit = "none"\n'),
        ("recipe.json", '{{"model": "{}", "intermediate_size": 24, "importance": "magnitude", "refit": "none"}}'),
    ],
)
def test_every_kind_of_file_is_read_and_a_flag_beats_it(
    tiny_llama: Path, tmp_path: Path, name: str, content: str
) -> None:
    (tmp_path / name).write_text(content.format(tiny_llama))
    for flags, neurons in (((), 24), (("--intermediate-size", "16"), 16)):
        run = run_cli("prune", "--config", tmp_path / name, *flags, "--dry-run", "--json")
        assert run.code == 0, run.stderr
        assert json.loads(run.stdout)["after"]["widths"]["intermediate_size"] == neurons
    assert prune(config=tmp_path / name, dry_run=True, intermediate_size=16) is not None


def test_every_command_takes_a_recipe(tiny_llama: Path, tmp_path: Path, text_file: Path) -> None:
    recipes = {
        "inspect": {"pruning_ratio": 0.5, "json": True},
        "eval": {"dataset": str(text_file), "max_seq_len": 32, "limit": 2, "json": True},
        "export": {"output": str(tmp_path / "out"), "dtype": "float16", "json": True},
    }
    for command, options in recipes.items():
        (tmp_path / f"{command}.yaml").write_text(yaml.safe_dump({"model": str(tiny_llama), **options}))
        run = run_cli(command, "--config", tmp_path / f"{command}.yaml")
        assert run.code == 0 and json.loads(run.stdout), run.stderr
    assert list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("name", "content", "code", "said"),
    [
        ("r.yaml", "intermediate_pruning_ration: 0.5", 2, "did you mean intermediate_pruning_ratio?"),
        ("r.yaml", "mlps: 25%", 2, "did you mean mlp?"),
        ("r.yaml", "jsn: true", 2, "did you mean json?"),
        ("r.yaml", "command: export\nmodel: x", 2, "a recipe of `export`, not of `prune`"),
        ("r.yaml", "- a list", 2, "has to name options"),
        ("r.yaml", "layers: [", 3, "not a readable recipe"),
        ("r.yaml", "pruning_ratio: 1.5", 2, "a pruning ratio is a fraction"),
        ("r.toml", "layers 27", 3, "not a readable recipe"),
        ("r.json", '{"layers": ', 3, "not readable JSON"),
        ("r.yaml", None, 3, "cannot be read"),
        ("llmprune.json", '{"schema_version": 1, "source": "x"}', 2, "without a recipe"),
        ("llmprune.json", '{"trust_remote_code": true, "output": "x", "overwrite": true}', 2, "without a recipe"),
        ("llmprune.json", '{"schema_version": 1, "recipe": {"trust_remote_code": true}}', 2, "trust_remote_code"),
        ("llmprune.json", '{"schema_version": 1, "recipe": {"output": "/x", "overwrite": true}}', 2, "no option"),
    ],
)
def test_a_bad_recipe_is_refused(
    tiny_llama: Path, tmp_path: Path, name: str, content: str | None, code: int, said: str
) -> None:
    """What comes with models of other people may not say whom to trust, or what to replace."""
    if content is not None:
        (tmp_path / name).write_text(content)
    run = run_cli("prune", tiny_llama, *BY_MAGNITUDE, "--config", tmp_path / name, "--output", tmp_path / "out")
    assert run.code == code and said in " ".join(run.stderr.replace("│", " ").split()), run.stderr
    assert not (tmp_path / "out").exists() and "Traceback" not in run.stderr


def test_python_refuses_a_bad_recipe_too(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("layerz: 3")
    with pytest.raises(UsageError, match="did you mean layers"):
        prune(tiny_llama, config=tmp_path / "r.yaml", dry_run=True)
    with pytest.raises(UsageError, match="did you mean mlp"):
        prune(tiny_llama, mlps="25%", dry_run=True)
