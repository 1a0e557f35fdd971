"""Tasks of lm-evaluation-harness, asked of models that llmprune has loaded."""

from __future__ import annotations

import io
import logging
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmprune_cli.errors import CheckpointError, UnsupportedError, first_line
from llmprune_cli.progress import Listener
from llmprune_cli.run.questions.figures import TaskResult
from llmprune_cli.run.questions.request import HARNESS, is_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SEEDS = 0, 1234  # of Python's numbers, and of all others, as the harness has them
RESAMPLED = 1000  # times, for standard errors of what is no mean
ALONE = "DISABLE_MULTIPROC"  # says that standard errors are resampled in this process
PLAIN = "none"  # the filter that changes no answer


@dataclass(frozen=True)
class Tasks:
    """Tasks with their questions, ready to be asked of any number of models."""

    loaded: dict[str, Any]  # as the harness has them: tasks, groups and what these are made of

    @property
    def requests(self) -> int:
        """What a model is asked once the harness has made it: for some questions once for each of their answers."""
        return sum(one.repeats for task in self.loaded["tasks"].values() for one in task.instances)


def load_tasks(names: Sequence[str]) -> Tasks:
    """Find tasks by their names, or in files, and read their questions.

    Raises:
        CheckpointError: no such task, or no way to its questions.
        UnsupportedError: one that runs what models write, or shows them pictures.
    """
    from lm_eval.tasks import TaskManager

    with _quiet(), _seeded():
        manager = TaskManager(include_defaults=not all(is_file(name) and _stands_alone(Path(name)) for name in names))
        for name in names:
            if not is_file(name) and name not in manager.task_index:
                near = get_close_matches(name, manager.all_tasks, 1)
                advice = f" Did you mean {near[0]}?" if near else ""
                raise CheckpointError(
                    f"lm-evaluation-harness has no task {name!r}.{advice} `lm_eval ls tasks` lists them all."
                )
        try:
            loaded: dict[str, Any] = dict(manager.load([*names]))
        except Exception as error:  # tasks come with code of every kind
            raise CheckpointError(
                f"The tasks {', '.join(names)} cannot be read: {first_line(error).rstrip('.')}. Their questions come "
                "from the hub, unless a .yaml file names local ones; check HF_HUB_OFFLINE."
            ) from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UnsupportedError(f"{name} runs code that the model writes. Ask it with lm-evaluation-harness itself.")
        if getattr(task, "MULTIMODAL", False):
            raise UnsupportedError(f"{name} asks about pictures or sounds, and llmprune judges language models.")
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return Tasks(loaded)


def ask(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Tasks,
    limit: int | None,
    batch_size: int | None,
    listener: Listener,
) -> tuple[TaskResult, ...]:
    """Ask a model the questions of all tasks.

    Args:
        name: of the model, for people.
        limit: questions of each task; None asks all.
        batch_size: questions at a time; None: as many as fit on a GPU, one on the CPU.
        listener: told after each answer.
    """
    from lm_eval import evaluate
    from lm_eval.api.model import CacheHook
    from lm_eval.models.huggingface import HFLM

    class Answers(CacheHook):  # type: ignore[misc]
        """Is told of every answer."""

        told = 0

        def add_partial(self, attr: str, req: Any, res: Any) -> None:
            """One more answer."""
            if not self.told:
                listener.stage(f"Asking {name}", tasks.requests)
            self.told += 1
            listener.advance(1)

    with _quiet(), _seeded(), torch.inference_mode():
        on_accelerator = any(parameter.device.type in ("cuda", "mps") for parameter in model.parameters())
        asked = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size or ("auto" if on_accelerator else 1))
        asked.set_cache_hook(Answers(None))
        for task in tasks.loaded["tasks"].values():
            task.set_fewshot_seed(seed=SEEDS[1])
        found = evaluate(asked, tasks.loaded, limit=limit, bootstrap_iters=RESAMPLED, log_samples=False)
    return tuple(_figures(found))


def _figures(found: Any) -> Iterator[TaskResult]:
    """What the harness found out, figure by figure."""
    part_of = {part: group for group, parts in found["group_subtasks"].items() for part in parts}
    for task, figures in found["results"].items():
        for key, value in figures.items():
            metric, comma, how = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = figures.get(f"{metric}_stderr,{how}")
            yield TaskResult(
                task=task,
                metric=metric if how == PLAIN else key,
                value=float(value),
                stderr=float(error) if isinstance(error, int | float) else None,
                questions=int(figures["sample_len"]),
                shots=int(found["n-shot"].get(task) or 0),
                version=str(found["versions"].get(task, "")),
                higher_is_better=found["higher_is_better"].get(task, {}).get(metric),
                part_of=part_of.get(task),
            )


def _stands_alone(path: Path) -> bool:
    """Whether a file describes a task, and not a group, which may name tasks of the harness; to know these takes long.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return not any(line.startswith("group") for line in path.read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no .yaml file that can be read: {first_line(error)}") from error


@contextmanager
def _seeded() -> Iterator[None]:
    """Numbers drawn within it are the harness's own, and those drawn after it as if it had not been there."""
    import numpy

    before = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        random.seed(SEEDS[0])
        numpy.random.seed(SEEDS[1])
        torch.manual_seed(SEEDS[1])
        try:
            yield
        finally:
            random.setstate(before[0])
            numpy.random.set_state(before[1])


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness and its libraries draw no bars, print nothing, log errors alone, and start no further processes."""
    from tqdm import tqdm

    drawn, logger = tqdm.__init__, logging.getLogger(HARNESS)
    level, was_alone = logger.level, ALONE in os.environ

    def undrawn(bar: Any, *args: Any, **options: Any) -> None:
        drawn(bar, *args, **{**options, "disable": True})

    tqdm.__init__ = undrawn
    logger.setLevel(logging.ERROR)
    os.environ.setdefault(ALONE, "1")
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        tqdm.__init__ = drawn
        if not was_alone:
            del os.environ[ALONE]
        logger.setLevel(level)
