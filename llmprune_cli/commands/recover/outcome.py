"""What a healing came to, and what is said of it."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from llmprune_cli.commands.recover.task import Task
from llmprune_cli.folder.integrity import list_files
from llmprune_cli.folder.manifest import Manifest, write_manifest
from llmprune_cli.formats.registry import load_format
from llmprune_cli.heal.figures import HealedLayer, HeldOut, RateTrial, Training
from llmprune_cli.journal.keys import versions
from llmprune_cli.report.json_results import SCHEMA_VERSION, RecoverResult
from llmprune_cli.report.model_card import write_card
from llmprune_cli.report.runtimes import runtime_fits


@dataclass(frozen=True)
class Outcome:
    """What a healing came to, in its first process."""

    training: Training
    after: HeldOut  # of what was written
    teacher_mode: str
    trained: int  # parameters
    learning_rate: float
    peak_memory_bytes: int
    trials: tuple[RateTrial, ...]  # of learning rates
    layers: tuple[HealedLayer, ...] = ()  # that were trained one after the other


def deliver(task: Task, outcome: Outcome, started: float, folder: Path, checksums: dict[str, str]) -> RecoverResult:
    """Say how it went: in the card and the manifest of the folder, and to whoever asked.

    Args:
        started: when, by the clock of `time.perf_counter`.
        checksums: of the folder's shards.
    """
    result = _report(task, outcome, time.perf_counter() - started)
    if not result.is_better:
        task.listener.warn(f"{_say_no_gain(task, outcome)} {_advise(task)}")
    manifest = task.manifest or Manifest(source=task.teacher.source, revision=task.teacher.revision)
    figures = {name: value for name, value in asdict(result).items() if name != "push"}  # which comes after it
    said = json.loads(json.dumps({**figures, "options": asdict(task.request.healing), "versions": versions()}))
    manifest = replace(manifest, healing=said, export=None)
    pruned = manifest if manifest.is_pruned else None
    write_card(folder, task.pruned, pruned, load_format("safetensors"), runtime_fits(task.pruned.config))
    write_manifest(folder, replace(manifest, files=list_files(folder, checksums)))
    return result


def _say_no_gain(task: Task, outcome: Outcome) -> str:
    written, pruned, training = task.request.output, task.pruned.source, outcome.training
    before = _loss(task, training.before)
    if training.best.tokens == 0:
        least = min(_loss(task, judged.held_out) for judged in training.curve)
        return (
            f"{written} has the weights of {pruned}, since no state that was judged is better than that on held-out "
            f"text: the least loss is {least:.4f} nats, and {before:.4f} before."
        )
    return (
        f"{written} is no better than {pruned} on held-out text: its loss is {_loss(task, outcome.after):.4f} nats, "
        f"and {before:.4f} before."
    )


def _advise(task: Task) -> str:
    """What may gain more, by the options of the command that was given."""
    if task.request.is_command:
        return "Try a smaller --learning-rate, or more text."
    return "Try more tokens to heal on, --recover N, or more text, --calibration."


def _loss(task: Task, found: HeldOut) -> float:
    """What is learned of what was judged, nats per token."""
    healing = task.request.healing
    return found.loss(healing.loss_weights, healing.temperature)


def _report(task: Task, outcome: Outcome, seconds: float) -> RecoverResult:
    text, healing, training = task.text, task.request.healing, outcome.training
    batch = text.trained_tokens // text.schedule.steps
    return RecoverResult(
        schema_version=SCHEMA_VERSION,
        model=task.pruned.source,
        teacher=task.teacher.source,
        teacher_mode=outcome.teacher_mode,
        output=str(task.request.output),
        dataset=text.corpus.name,
        origin=text.corpus.origin,
        split=healing.text_split,
        tokens=batch * training.steps,
        learned_tokens=round(batch * training.steps * text.learned_share),
        batch_tokens=batch,
        seq_len=text.windows.shape[1],
        held_out_tokens=text.judged_tokens,
        mode=healing.mode,
        loss=healing.loss,
        loss_on=healing.loss_on,
        hidden_weight=healing.hidden_weight,
        learning_rate=outcome.learning_rate,
        tried_rates=outcome.trials,
        trained_parameters=outcome.trained,
        steps=training.steps,
        stopped_early=training.stopped_early,
        before=training.before,
        after=outcome.after,
        is_better=training.best.tokens > 0 and _loss(task, outcome.after) < _loss(task, training.before),
        best_tokens=training.best.tokens,
        curve=training.curve,
        layers=outcome.layers,
        seconds=seconds,
        peak_memory_bytes=outcome.peak_memory_bytes,
        push=None,
    )
