"""What README and docs promise: every command line and every block of Python runs, and tables are what is."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmprune_cli.report.schemas import DOCUMENTS, adapter_of
from support import ROOT
from support.cli import BY_MAGNITUDE, run_cli
from support.families import HEADS_OF_16
from support.full import examples, in_full
from support.hub import hub_that_takes, log_in
from support.tiny import BYTE_LEVEL_VOCABULARY, save_byte_level, save_tiny
from tools import schemas, support_matrix
from tools.demo import recording

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
MODEL = Path("meta-llama", "Llama-3.1-8B")  # what the pages call it; here a folder of that name
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # what huggingface_hub is told
SHOWN = (ROOT / "README.md",)  # run by default
SENTENCES = {"test": 240, "validation": 80}  # a window of 4,096 tokens to evaluate, one of 2,048 to calibrate on
REGISTRIES = ("importances", "layer importances", "refits")  # tables that need no model
OTHERS = ("make ", "mlx_lm.", "#")  # run by other tests, or by people


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def command_lines(block: str) -> Iterator[str]:
    """The lines of a shell block, continued ones joined; what goes to Python's standard input is left out."""
    lines = iter(block.replace("\\\n", " ").splitlines())
    for line in lines:
        if line.startswith("cat > "):
            body = iter(lines.__next__, "END")
            Path(line.split()[2]).write_text("\n".join(body) + "\n")
        elif "<<'END'" in line:
            list(iter(lines.__next__, "END"))
        elif line.strip() and not line.startswith(OTHERS):
            yield line


WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in which the names of the pages mean something small, and a hub that takes what is pushed."""
    monkeypatch.chdir(tmp_path)
    settings = {**HEADS_OF_16, "vocab_size": BYTE_LEVEL_VOCABULARY}
    save_tiny(MODEL, num_hidden_layers=4, initializer_range=0.15, **settings)
    save_byte_level(MODEL)
    sentence = "The quick brown fox jumps over the lazy dog, and then it does so again. "
    Path("corpus.txt").write_text(sentence * SENTENCES["test"])
    Path("wikitext").mkdir()
    for split, count in SENTENCES.items():
        text = "".join(f"{number} {sentence}" for number in range(count))  # of which no window is there twice
        Path("wikitext", f"{split}.jsonl").write_text(json.dumps({"text": f"{split}: {text}"}) + "\n")
    monkeypatch.setenv("LLMPRUNE_WIKITEXT2", str(tmp_path / "wikitext"))
    with hub_that_takes() as hub:
        log_in(monkeypatch, hub, tmp_path)
        yield tmp_path


@pytest.mark.parametrize("page", examples(PAGES, SHOWN), ids=lambda page: page.name)
def test_every_command_line_runs(page: Path, place: Path) -> None:
    for block in blocks(page, "sh"):
        if block.startswith("#!"):
            continue
        for line in command_lines(block):
            words = shlex.split(line, comments=True)
            assert words[0] in ("llmprune", "accelerate"), line
            words = words[1:] if words[0] == "llmprune" else words[words.index("llmprune_cli") + 1 :]
            if "--output" in words:
                shutil.rmtree(words[words.index("--output") + 1], ignore_errors=True)
            run = run_cli(*words)
            assert run.code == 0, f"{page.name}: {line}\n{run.stderr}"


@pytest.mark.parametrize("page", examples(WITH_PYTHON, SHOWN), ids=lambda page: page.name)
def test_every_block_of_python_runs(page: Path, place: Path) -> None:
    if page.name == "README.md":
        assert run_cli("prune", MODEL, *BY_MAGNITUDE, "--pruning-ratio", "0.5", "--output", "pruned").code == 0
    names: dict[str, object] = {}
    for block in blocks(page, "python"):
        if "FAMILIES" not in block and "Family(" not in block:  # an entry, not a script
            exec(compile(block, page.name, "exec"), names)


@in_full
def test_every_row_of_what_people_want_runs(place: Path) -> None:
    rows = re.findall(
        r"^\| [a-z].* \| `llmprune (.*)` \|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(rows) > 20
    gguf = run_cli("export", MODEL, "--format", "gguf", "--output", "whole")
    assert gguf.code == 0, gguf.stderr
    shutil.copy(*place.glob("whole/*.gguf"), "model.gguf")
    Path("chat.jsonl").write_text(
        json.dumps({"prompt": "Who jumps? " * 90, "completion": "The quick fox. " * 90}) + "\n"
    )
    size = sum(path.stat().st_size for path in MODEL.glob("*.safetensors"))
    small = {"MODEL": str(MODEL), "8192": "64", "32768": "64", "1M": "16k", "YOUR_NAME/pruned": "someone/pruned"}
    small |= {
        "4GiB": f"{size * 0.8e-3:.0f}KB",
        "22GiB": f"{size * 0.9e-3:.0f}KB",
        "4GiB as q4_k_m": f"{size * 0.25e-3:.0f}KB as q8_0",
    }
    small |= {"2": "1.05", "q4_k_m": "q8_0", "20-25": "1-2", "arc_easy,hellaswag": ""}
    for row in rows:
        words = [small.get(word, word) for word in shlex.split(row)]
        if "--tasks" in words:  # which the hub has
            continue
        for output in (words[number + 1] for number, word in enumerate(words) if word == "-o"):
            for folder in (output, f"{output}-gguf"):
                shutil.rmtree(folder, ignore_errors=True)
        run = run_cli(*words)
        assert run.code == 0, f"{row}\n{run.stderr}"


def test_the_row_about_python_runs(place: Path) -> None:
    (line,) = re.findall(
        r"^\| [a-z].* \| `(from llmprune_cli .*)` \|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    exec(line.replace("MODEL", str(MODEL)), {})
    assert Path("pruned", "llmprune.json").is_file()


def test_the_recorded_session_is_small_and_names_no_machine() -> None:
    drawn = (ROOT / "docs" / "terminal.svg").read_text(encoding="utf-8")
    assert "docs/terminal.svg" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(drawn.encode()) < recording.MOST_BYTES
    said = re.sub(r"<[^>]*>", "", drawn).replace("&#160;", " ")
    for command in recording.commands("wikitext2"):
        assert command in said
    assert not re.search(r"/(tmp|home|root|work|Users)/", said)


def test_every_make_target_that_is_promised_runs_something() -> None:
    root = ROOT
    listed = re.findall(r"^\.PHONY: (.*)$", (root / "Makefile").read_text(), re.MULTILINE)
    named = (re.findall(r"`make ([a-z0-9-]+)[` ]", page.read_text(encoding="utf-8")) for page in PAGES)
    promised = {*" ".join(listed).split(), *(target for page in named for target in page)}
    assert {"bench-quality", "bench-memory", "test"} <= promised
    for target in promised:
        dry = subprocess.run(["make", "--dry-run", "--always-make", target], cwd=root, capture_output=True, text=True)
        assert dry.returncode == 0 and "Nothing to be done" not in dry.stdout, f"make {target}: {dry.stderr}"


@in_full
@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
def test_the_script_of_the_guide_runs(tiny_llama: Path, tmp_path: Path, text_file: Path) -> None:
    script = next(block for block in blocks(ROOT / "docs" / "guide.md", "sh") if block.startswith("#!"))
    (tmp_path / "chain.sh").write_text(script)
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "chain.sh", str(tiny_llama), str(text_file)], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("table", examples(support_matrix.TABLES, REGISTRIES))
def test_tables_are_what_inspect_and_the_registries_say(table: str) -> None:
    page, make = support_matrix.TABLES[table]
    start, end = support_matrix.marks(table)
    assert start + make() + end in (ROOT / "docs" / page).read_text(encoding="utf-8"), "run make matrix"


def test_the_readme_fits_on_a_page() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


@pytest.mark.parametrize("name", DOCUMENTS)
def test_schemas_are_those_of_what_is_printed(name: str) -> None:
    assert (schemas.FOLDER / f"{name}.json").read_text(encoding="utf-8") == schemas.as_text(name), "run make schemas"


def test_documents_are_what_their_schemas_say(tiny_llama: Path, tmp_path: Path, text_file: Path) -> None:
    windows = ("--dataset", text_file, "--max-seq-len", "32")
    out, plan = tmp_path / "out", tmp_path / "plan.json"
    printed = {
        "inspect": ("inspect", tiny_llama, "--pruning-ratio", "0.5"),
        "prune": ("prune", tiny_llama, "--pruning-ratio", "0.5", *BY_MAGNITUDE, "--output", out, "--eval", *windows),
        "inspect-verify": ("inspect", "--verify", out),
        "eval": ("eval", out, *windows),
        "export": ("export", out, "--output", tmp_path / "exported"),
    }
    for name, command in printed.items():
        run = run_cli(*command, "--json", *(("--save-plan", plan) if name == "prune" else ()))
        assert run.code == 0, run.stderr
        adapter_of(DOCUMENTS[name]).validate_json(run.stdout, strict=True)
        schema = schemas.schema_of(name)
        assert json.loads(run.stdout).keys() == schema["properties"].keys() == {*schema["required"]}
    assert json.loads(plan.read_text()).keys() == schemas.schema_of("plan")["properties"].keys()
