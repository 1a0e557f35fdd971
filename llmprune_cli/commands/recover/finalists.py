"""`prune --finalists`: the best candidates for a size are healed for a while, since that may change which is best."""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from llmprune_cli.commands.evaluate import evaluate
from llmprune_cli.commands.prune import prune
from llmprune_cli.commands.recover.recovery import recover
from llmprune_cli.commands.recover.request import healing_of
from llmprune_cli.commands.requests import PruneRequest
from llmprune_cli.errors import CheckpointError
from llmprune_cli.heal.figures import FinalistResult
from llmprune_cli.heal.options import Healed
from llmprune_cli.options import WidthRequest
from llmprune_cli.processes import join
from llmprune_cli.progress import Listener
from llmprune_cli.report.json_results import CandidateResult, PruneResult
from llmprune_cli.sizes import TARGETS
from llmprune_cli.vocabulary.request import VocabularyRequest

SHARE = 8  # of the tokens that the best one is healed on, one in so many


def prune_to_the_best(request: PruneRequest, listener: Listener) -> PruneResult | None:
    """Search, prune to each of the best candidates beside the output, heal these, and put the best one there, pruned.

    It is put there as well where an error ends the healing of a candidate: the best of those that were healed, or else
    the first one, which was best unhealed.

    Raises:
        LlmpruneError: see `prune` and `recover`.
    """
    output, processes = request.delivery.output, join(request.model.device)
    assert output is not None
    own = output.with_name("finalists")
    statistics = request.scratch.statistics or own / "statistics"
    plain = replace(request, scratch=replace(request.scratch, statistics=statistics), evaluation=None)
    searched = processes.broadcast(prune(_search(plain), listener))
    assert searched is not None
    if not searched.candidates:
        raise CheckpointError("Finalists are judged on text, and there is none. Name some with --calibration.")
    tried: list[tuple[FinalistResult, PruneResult, Path]] = []
    try:
        for number, candidate in enumerate(searched.candidates[: request.delivery.finalists], 1):
            told, place = listener.within(f"Finalist {number}"), own / f"pruned-{number}"
            pruned = prune(_exactly(plain, candidate, searched, place), told)
            processes.broadcast(None)  # what the first one wrote, all of them read
            finalist = _heal_for_a_while(request, candidate, place, told)
            if pruned is not None and finalist is not None:
                tried.append((finalist, pruned, place))
    except BaseException:
        best = min(tried, key=_kl_after)[2] if tried else own / "pruned-1"
        if processes.is_first:
            with suppress(OSError):  # there is none yet, or it is worth less than what ended the run
                best.rename(output)
        raise
    tried.sort(key=_kl_after)
    if processes.is_first:
        tried[0][2].rename(output)
    processes.broadcast(None)
    evaluation = None
    if request.evaluation is not None:
        reference = replace(request.model, name=str(output), revision=None, dtype=None)
        evaluation = evaluate(request.model, (reference,), request.evaluation, listener)
    if not processes.is_first:
        return None
    finalists = tuple(finalist for finalist, _, _ in tried)
    said: dict[str, Any] = {"target": searched.target, "candidates": searched.candidates, "finalists": finalists}
    return replace(tried[0][1], evaluation=evaluation, **said)


def _kl_after(tried: tuple[FinalistResult, PruneResult, Path]) -> float:
    return tried[0].kl_after


def _heal_for_a_while(
    request: PruneRequest, candidate: CandidateResult, pruned: Path, listener: Listener
) -> FinalistResult | None:
    """What comes of a candidate by a share of the tokens; None in processes that do not report."""
    tokens = str(max(1, request.healing.token_count // SHARE))
    request = replace(request, delivery=replace(request.delivery, recover=tokens))
    output = pruned.with_name(f"{pruned.name}-healed")
    healed = recover(healing_of(request, pruned, Healed(output), may_go_on=False), listener)
    if healed is None:
        return None
    shutil.rmtree(output)
    kl = healed.before.kl, healed.after.kl
    return FinalistResult(candidate.widths, candidate.layers, candidate.parameters, *kl)


def _search(request: PruneRequest) -> PruneRequest:
    """What finds the candidates and writes nothing."""
    delivery = replace(request.delivery, output=None, dry_run=True, recover=None, finalists=None, gguf=None)
    return replace(request, delivery=replace(delivery, save_config=None))


def _exactly(request: PruneRequest, candidate: CandidateResult, searched: PruneResult, output: Path) -> PruneRequest:
    """What prunes to the widths and layers of a candidate, with the tokens of all."""
    before, after = asdict(searched.before.widths), asdict(candidate.widths)
    sizes = {name: size for name, size in after.items() if size != before[name] and name != "num_hidden_layers"}
    gone = tuple(sorted({*range(before["num_hidden_layers"])} - {*candidate.layers}))
    widths = WidthRequest(**sizes, drop_layers=gone or None, keep_layers=request.choice.widths.keep_layers)
    cleared: dict[str, Any] = dict.fromkeys((*TARGETS, "context", "batch", "layer_importance"))
    choice = replace(request.choice, widths=widths, **cleared)
    delivery = replace(request.delivery, output=output, finalists=None)
    found = searched.vocabulary.after if searched.vocabulary is not None else None
    vocabulary = VocabularyRequest() if found is None else replace(request.vocabulary, vocab_size=str(found))
    return replace(request, choice=choice, delivery=delivery, vocabulary=vocabulary)
