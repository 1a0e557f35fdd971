"""Which tasks a user wants to have asked, and what can be told of them in a moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from llmprune_cli.errors import CheckpointError, MissingPackageError, UsageError
from llmprune_cli.folder.documents import is_there
from llmprune_cli.options import EVALUATION, Option

HARNESS = "lm_eval"
FILES = (".yaml", ".yml")


def parse_tasks(text: str) -> tuple[str, ...]:
    """Names of tasks, with commas between them.

    Raises:
        UsageError: there is none between two commas, or one twice.
    """
    names = tuple(part.strip() for part in text.split(","))
    if not all(names) or len({*names}) < len(names):
        raise UsageError(f"give names such as arc_easy,hellaswag, each of them once, not {text!r}.")
    return names


@dataclass(frozen=True)
class TaskRequest:
    """What is asked of a model."""

    tasks: Annotated[
        tuple[str, ...],
        Option(
            "Tasks of lm-evaluation-harness, such as arc_easy,hellaswag, or .yaml files of that kind.",
            EVALUATION,
            is_common=True,
            parse=parse_tasks,
        ),
    ] = ()


def check_tasks(names: Sequence[str]) -> None:
    """Refuse what cannot be asked, before anything is loaded.

    Raises:
        CheckpointError: a file of a task that does not exist, or one of questions alone.
        MissingPackageError: lm-evaluation-harness is not installed.
    """
    for name in names:
        if is_file(name) and not is_there(Path(name)):
            raise CheckpointError(f"{name} does not exist. Give the .yaml file of a task, or the name of one.")
        if not is_file(name) and Path(name).is_file():
            raise CheckpointError(
                f"{name} is no task. Give a .yaml file that describes one and names it: dataset_path: json, and "
                f"dataset_kwargs: {{data_files: {{test: {name}}}}}. The guide shows a whole one under Accuracies."
            )
    if names and find_spec(HARNESS) is None:
        raise MissingPackageError("--tasks needs lm-evaluation-harness: pip install 'llmprune[tasks]'")


def is_file(name: str) -> bool:
    """Whether the file of a task is meant, and not the name of one."""
    return name.endswith(FILES)
