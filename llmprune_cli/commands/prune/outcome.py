"""What a prune came to, and what is said of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llmprune_cli.choose.importances import ranks_layers
from llmprune_cli.choose.targets.search import Candidate
from llmprune_cli.commands.requests import PruneRequest
from llmprune_cli.coupling.subject import Subject
from llmprune_cli.errors import first_line
from llmprune_cli.family.architecture import with_widths
from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.options import Choice, ModelReference
from llmprune_cli.plan.document import Plan
from llmprune_cli.plan.requested_widths import Target
from llmprune_cli.progress import Estimate, Listener
from llmprune_cli.report.json_results import (
    SCHEMA_VERSION,
    CalibrationResult,
    CandidateResult,
    CountedSize,
    EvalReport,
    ModelSummary,
    PruneResult,
)
from llmprune_cli.report.model_perplexity import EvalText, prepare_text, report_perplexity
from llmprune_cli.report.runtimes import runtime_fits
from llmprune_cli.run.questions.figures import Answered
from llmprune_cli.run.questions.prompts import PROMPTS, answer_prompts
from llmprune_cli.run.speed.figures import SpeedResult
from llmprune_cli.run.workbench import Workbench
from llmprune_cli.source.opening import open_checkpoint
from llmprune_cli.vocabulary.figures import TriedVocabulary, VocabularySummary


@dataclass(frozen=True)
class Outcome:
    """What a run came to, in its first process."""

    subject: Subject
    choice: Choice
    target: Target
    before: ModelSummary
    after: ModelSummary
    plan: Plan | None  # None for a dry run of widths alone
    candidates: tuple[Candidate, ...]
    card: CalibrationResult | None
    evaluated: EvalText | None  # what it is to be evaluated on
    vocabulary: VocabularySummary | None  # see `told_of_tokens`
    vocabularies: tuple[TriedVocabulary, ...] = ()  # see `Selection`
    speed: SpeedResult | None = None  # where a time was asked for
    counted: CountedSize | None = None  # see `PruneResult`
    estimate: Estimate | None = None  # of what it takes


def options_said(request: PruneRequest, outcome: Outcome) -> dict[str, Any]:
    """What was asked for, as manifests say it."""
    choice, plan, stored = outcome.choice, outcome.plan, request.delivery.plan
    assert plan is not None
    return {
        **asdict(choice.widths),
        **{name: str(value) for name, value in asdict(request.vocabulary).items() if value is not None},
        "target": choice.budget.to_json() if choice.budget else None,
        "importance": plan.importance,
        "layer_importance": choice.layer_importance,
        "refit": choice.refit,
        "rotate": choice.rotate,
        "seed": plan.seed,
        "plan": str(stored) if stored else None,
        "dtype": request.model.dtype,
        "compute_dtype": choice.compute_dtype,
    }


def answer_both(checkpoint: Checkpoint, folder: Path, bench: Workbench) -> tuple[Answered, ...]:
    """What a model that chats answers before and after pruning; nothing where it does not, or is large.

    Args:
        folder: of the pruned one.
    """
    how = bench.model.device, bench.model.compute, bench.listener
    try:
        if not bench.answers:
            bench.answers.extend(answer_prompts(checkpoint, *how))
        if not bench.answers:
            return ()
        reference = ModelReference(str(folder), trust_remote_code=checkpoint.trust_remote_code)
        with open_checkpoint(reference, need_weights=True) as pruned:
            after = answer_prompts(pruned, *how)
    except Exception as error:  # what is only shown shall not undo hours of work, whatever templates and models raise
        bench.listener.warn(f"The report card shows no answers, as the model gave none: {first_line(error)}")
        return ()
    return tuple(Answered(*row) for row in zip(PROMPTS, bench.answers, after, strict=False))


def evaluate_both(
    request: PruneRequest, checkpoint: Checkpoint, output: Path | None, outcome: Outcome, listener: Listener
) -> EvalReport | None:
    """Perplexity before and after."""
    if request.evaluation is None or outcome.evaluated is None:
        return None
    pruned = replace(request.model, name=str(output), revision=None)
    name = str(request.delivery.output) if request.delivery.output else f"{checkpoint.source} (pruned)"
    with open_checkpoint(pruned, need_weights=True) as opened:
        text = outcome.evaluated
        if outcome.plan is not None and outcome.plan.vocabulary is not None:
            text = prepare_text(opened, request.model.device, request.evaluation, listener, outcome.evaluated)
        sides = [(checkpoint, outcome.evaluated), (replace(opened, source=name), text)]
        return report_perplexity(sides, request.model, request.evaluation, listener)


def report(
    request: PruneRequest, checkpoint: Checkpoint, outcome: Outcome, evaluated: EvalReport | None, seconds: float
) -> PruneResult:
    """The result of the command."""
    choice, plan, target, delivery = outcome.choice, outcome.plan, outcome.target, request.delivery
    config = with_widths(outcome.subject.architecture, target.widths, target.layers)
    return PruneResult(
        schema_version=SCHEMA_VERSION,
        model=checkpoint.source,
        revision=checkpoint.revision,
        output=None if delivery.dry_run or delivery.output is None else str(delivery.output),
        target=str(choice.budget) if choice.budget else None,
        counted=outcome.counted,
        protected_layers=target.protected,
        dropped_layers=_dropped(outcome),
        importance=plan.importance if plan else choice.importance or "",
        refit=choice.refit or "",
        seed=plan.seed if plan else choice.seed,
        before=outcome.before,
        after=outcome.after,
        deviations=target.deviations,
        runtimes=runtime_fits(config),
        candidates=tuple(
            CandidateResult(c.target.widths, c.target.layers, c.parameters, c.kl) for c in outcome.candidates
        ),
        vocabulary=outcome.vocabulary,
        vocabularies=outcome.vocabularies,
        speed=outcome.speed,
        seconds=seconds,
        estimate=outcome.estimate,
        calibration=outcome.card,
        recovery=None,
        finalists=(),
        evaluation=evaluated,
        export=None,
        push=None,
    )


def _dropped(outcome: Outcome) -> tuple[int, ...]:
    """Numbers of the layers that go; none where that is measured on text and was not."""
    if outcome.plan is None and ranks_layers(outcome.choice):
        return ()
    return tuple(sorted({*range(outcome.before.widths.num_hidden_layers)} - {*outcome.target.layers}))
