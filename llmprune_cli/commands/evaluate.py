"""`eval`: perplexity and bits per byte of one model, or of several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from llmprune_cli.options import Evaluation, ModelReference
from llmprune_cli.processes import join
from llmprune_cli.progress import Listener
from llmprune_cli.report.json_results import EvalReport
from llmprune_cli.report.model_perplexity import prepare_text, report_perplexity
from llmprune_cli.run.questions.request import TaskRequest
from llmprune_cli.run.questions.tasks import load_tasks
from llmprune_cli.source.opening import open_checkpoint


def evaluate(
    reference: ModelReference,
    others: Sequence[ModelReference],
    evaluation: Evaluation,
    listener: Listener,
    asked: TaskRequest | None = None,
) -> EvalReport:
    """Perplexity and bits per byte of a model, or of several on the same text with windows of the same length.

    Args:
        asked: tasks that they are asked, too.

    Raises:
        LlmpruneError: a model, the text or a task cannot be read.
    """
    tasks = None
    if asked is not None and asked.tasks:
        listener.stage("Reading tasks", len(asked.tasks))
        tasks = load_tasks(asked.tasks)
        listener.advance(len(asked.tasks))
    with ExitStack() as stack:
        processes = join(reference.device)
        checkpoint = stack.enter_context(open_checkpoint(reference, need_weights=True))
        text = prepare_text(checkpoint, reference.device, evaluation, listener)
        sides = [(checkpoint, text)]
        for named in others:
            other = stack.enter_context(open_checkpoint(named, need_weights=True))
            sides.append((other, prepare_text(other, reference.device, evaluation, listener, text)))
        return report_perplexity(sides, reference, evaluation, listener, processes, tasks)
