"""Adding an importance or a format is one function or module and one line: help, checks and docs follow."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import llmprune_cli
from support import TESTS
from support.full import in_full

PACKAGE = Path(llmprune_cli.__file__).parent
FUNCTION = '''

def score_first(checkpoint: Checkpoint, trace: Trace, widths: Widths, seed: int, progress: Progress) -> Scores:
    """The first units stay."""
    scores: Scores = defaultdict(dict)
    for width, instance in instances(checkpoint, trace):
        scores[width][instance] = -torch.arange(getattr(widths, width), dtype=torch.float32)
    return dict(scores)
'''
IMPORTANCE = '    "first": Importance("nothing", "magnitude:score_first", "the first units stay, for comparison"),\n'
MODULE = '''
"""Names of tensors, one a line."""

from llmprune_cli.formats.registry import Fit, Format


def write_names(checkpoint, folder, options, progress):
    """Write them."""
    (folder / "names.txt").write_text("\\n".join(checkpoint.by_name))
    return {}


NAMES = Format(
    runs_in="a reader",
    write=write_names,
    fit=lambda config: Fit(loads=True),
    loading="`cat`",
)
'''
FORMAT = '    "names": Entry("names:NAMES", ("float32",)),\n'


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with one more of each."""
    root = tmp_path_factory.mktemp("extended")
    package = Path(shutil.copytree(PACKAGE, root / "llmprune_cli", ignore=shutil.ignore_patterns("__pycache__")))
    with (package / "choose" / "magnitude.py").open("a") as file:
        file.write(FUNCTION)
    (package / "formats" / "names.py").write_text(MODULE)
    for name, before, line in (
        ("choose/importances.py", '    "random": Importance(', IMPORTANCE),
        ("formats/registry.py", '    "gguf": ', FORMAT),
    ):
        path = package / name
        text = path.read_text()
        assert text.count(before) == 1
        path.write_text(text.replace(before, line + before))
    return root


def run(root: Path, *commands: tuple[str | Path, ...]) -> list[str]:
    """What the commands of the copy print, one after the other in one process."""
    environment = {**os.environ, "PYTHONPATH": str(root), "COLUMNS": "200", "RANK": "0"}
    listed = [{"arguments": [*map(str, command)]} for command in commands]
    (root / "commands.json").write_text(json.dumps(listed))
    driver = (sys.executable, TESTS / "support" / "several_commands.py", "commands.json", ".")
    done = subprocess.run(driver, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ended = json.loads((root / "0.json").read_text())
    assert all(code == 0 for code, _, _ in ended), ended
    return [stdout for _, stdout, _ in ended]


@in_full
def test_a_new_importance_or_format_is_one_function_or_module_and_one_line(extended: Path, tiny_llama: Path) -> None:
    prune = ("prune", tiny_llama, "--intermediate-size", "24", "--importance", "first", "--refit", "none")
    prune += ("--output", extended / "out", "--save-plan", extended / "plan.json")
    export = ("export", tiny_llama, "--format", "names", "--dtype", "float32", "--output", extended / "n", "--json")
    helped, _, other_help, exported = run(extended, ("prune", "--help"), prune, ("export", "--help"), export)
    assert "first" in helped.split("--importance")[1].split("--layer-importance")[0]
    plan = json.loads((extended / "plan.json").read_text())
    assert set(map(tuple, plan["keep"]["intermediate_size"].values())) == {tuple(range(24))}
    assert "names" in other_help.split("--format")[1].split("--output")[0]
    shown = json.loads(exported)
    assert shown["format"] == "names" and "lm_head.weight" in (extended / "n" / "names.txt").read_text()
    assert "`cat`" in (extended / "n" / "README.md").read_text()


def test_the_docs_list_what_there_is() -> None:
    from llmprune_cli.choose.importances import IMPORTANCES, LAYER_IMPORTANCES
    from llmprune_cli.repair import REFITS

    page = (PACKAGE.parent / "docs" / "calibration.md").read_text(encoding="utf-8")
    for name, about in [*((n, i.about) for n, i in {**IMPORTANCES, **LAYER_IMPORTANCES}.items()), *REFITS.items()]:
        assert f"| `{name}`" in page and f" | {about} |" in page, f"run make matrix: {name}"
