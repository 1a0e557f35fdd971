"""What a prune will take, before it starts: time by trying its steps on two layers, memory and disk by arithmetic."""

from __future__ import annotations

import time
from dataclasses import replace

import psutil

from llmprune_cli.choose.targets.speed import SpeedLimit
from llmprune_cli.commands.prune.decision import Decided
from llmprune_cli.commands.prune.estimate.job import Job
from llmprune_cli.commands.prune.estimate.rehearsal import rehearse
from llmprune_cli.commands.prune.estimate.room import disk_bytes, peak_memory, temporary_bytes
from llmprune_cli.commands.requests import PruneRequest
from llmprune_cli.errors import LlmpruneError, first_line
from llmprune_cli.progress import Estimate, StageEstimate
from llmprune_cli.report.json_results import ModelSummary
from llmprune_cli.run.workbench import Workbench

LEAST_WORK = 2**37  # parameters times tokens of a run that is worth an estimate before its start
MOST_MEMORY = 0.5  # of what is available, that two layers may take
# What two layers of a family, with random hidden states, may come to, and what the machine may lack for them.
UNTIMED = (LlmpruneError, RuntimeError, ValueError, OSError, MemoryError)


def estimate_prune(request: PruneRequest, decided: Decided, bench: Workbench, started: float) -> Estimate | None:
    """What a prune takes; None where it is over sooner than that could be said.

    Args:
        request: with a settled choice.
        started: by `time.perf_counter`, when the command began.
    """
    job, spent = Job(request, decided, bench), time.perf_counter() - started
    work = bench.model.checkpoint.parameter_count * job.windows.fitted * job.windows.length
    if not request.delivery.dry_run and not (job.reads_text and work >= LEAST_WORK):
        return None
    stages = _stages(job)
    memory = peak_memory(job, bench.model.device != "cpu")
    return Estimate(
        seconds=spent + sum(stage.seconds for stage in stages) if stages else None,
        stages=stages,
        candidates=job.candidates,
        memory_bytes=memory.host,
        device_bytes=memory.device,
        disk_bytes=disk_bytes(job, decided.tensors, most_bytes(decided)),
        temporary_bytes=temporary_bytes(job),
    )


def _stages(job: Job) -> tuple[StageEstimate, ...]:
    """The stages with their seconds; none where there is nothing to time."""
    checkpoint, available = job.model.checkpoint, psutil.virtual_memory().available
    is_small = 3 * 4 * job.layer_parameters <= MOST_MEMORY * available
    decided, vocabulary = job.decided, job.decided.vocabulary
    tries_tokens = vocabulary is not None and len(vocabulary.sizes) > 1
    has_other_stages = tries_tokens or isinstance(decided.limit, SpeedLimit)
    if not checkpoint.has_weights or has_other_stages or not is_small:
        return ()
    try:
        return rehearse(job)
    except UNTIMED as error:  # what is only good to know shall end no run; a fault of ours is no such thing
        job.bench.listener.warn(f"The time cannot be told beforehand: {first_line(error)}")
        return ()


def most_bytes(decided: Decided) -> int | None:
    """The bytes of weights that a target leaves at most, by its share of the model; None without one."""
    return None if decided.limit is None else int(decided.limit.share * decided.before.size_bytes)


def going_on(estimate: Estimate, limit: int, after: ModelSummary) -> Estimate:
    """What is left to do when a dry run has found the widths of a target: what it measured is kept.

    Args:
        limit: see `most_bytes`.
    """
    left = tuple(stage for stage in estimate.stages if not stage.chooses)
    return replace(
        estimate,
        seconds=sum(stage.seconds for stage in left) if left else None,
        stages=left,
        candidates=0,
        disk_bytes=estimate.disk_bytes - limit + after.size_bytes,
    )
