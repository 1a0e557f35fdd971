"""`inspect`: what a model is, and what a request would make of it.

What it found out is remembered, and a run that asks again loads no more than that takes: hence the imports within
functions.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from pathlib import Path

from llmprune_cli.options import ModelReference, WidthRequest
from llmprune_cli.progress import LOGGER
from llmprune_cli.report.json_results import SCHEMA_VERSION, InspectResult, VerifyResult
from llmprune_cli.report.summary import summarize
from llmprune_cli.startup.loading import loading
from llmprune_cli.startup.remembered import recall, remember, remembered_in, state_of
from llmprune_cli.vocabulary.request import VocabularyRequest

ALL_TOKENS = VocabularyRequest()


def inspect(reference: ModelReference, request: WidthRequest, tokens: VocabularyRequest = ALL_TOKENS) -> InspectResult:
    """Describe a model from headers, configuration and tokenizer, and what a request would make of it.

    Raises:
        LlmpruneError: it cannot be read, or cannot be pruned so.
    """
    place = _remembered_in(reference, request, tokens)
    known = recall(place, InspectResult)
    if known is None:
        warned = _Warned()
        LOGGER.addFilter(warned)
        try:
            with loading():
                known = _find_out(reference, request, tokens)
        finally:
            LOGGER.removeFilter(warned)
        if not warned.times:  # a warning is for every run
            remember(place, known)
    return known


class _Warned(logging.Filter):
    """Counts warnings, and lets everything pass."""

    times = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Count one."""
        self.times += record.levelno >= logging.WARNING
        return True


def _remembered_in(reference: ModelReference, request: WidthRequest, tokens: VocabularyRequest) -> Path | None:
    """The file for what is found out about a model on this machine; None where its own code may run, or a file says."""
    state = state_of(Path(reference.name))
    if state is None or reference.trust_remote_code or tokens.keep_tokens is not None:
        return None
    return remembered_in("inspect", str(Path.cwd()), asdict(reference), asdict(request), tokens.vocab_size, state)


def _find_out(reference: ModelReference, request: WidthRequest, tokens: VocabularyRequest) -> InspectResult:
    """See `inspect`."""
    from llmprune_cli.apply.proven_widths import leave_unproven
    from llmprune_cli.commands.prune.vocabulary import cut_to, summarize_vocabulary
    from llmprune_cli.coupling.subject import understand
    from llmprune_cli.family.architecture import with_widths
    from llmprune_cli.plan.legal import legal_values
    from llmprune_cli.plan.predict import predict
    from llmprune_cli.plan.requested_widths import refuse_copy, resolve
    from llmprune_cli.report.runtimes import runtime_fits
    from llmprune_cli.source.opening import open_checkpoint, part_to_write

    with open_checkpoint(reference, need_weights=False, need_tokens=tokens.number is not None) as opened:
        checkpoint = part_to_write(opened, dtype=reference.dtype)
        subject = leave_unproven(understand(checkpoint))
        target = None if request.is_empty else resolve(subject.architecture, subject.trace.refused, request)
        after, config, widths, tensors = None, checkpoint.config, subject.widths, checkpoint.entries
        cached_by, layers = subject.architecture.cached_numbers, tuple(range(widths.num_hidden_layers))
        before = summarize((*tensors, *subject.surroundings), widths, cached_by(widths, layers))
        if target is not None:
            if tokens.number is None:
                refuse_copy(subject.architecture, subject.trace, request, target)
            subject.require(target.widths)
            widths, layers, tensors = target.widths, target.layers, predict(subject, target)
            config = with_widths(subject.architecture, widths, target.layers)
        vocabulary, size = summarize_vocabulary(subject, tokens.keep_tokens), None
        if tokens.number is not None:
            tensors, size = cut_to(subject, tokens, tensors)
        if target is not None or size is not None:
            after = summarize((*tensors, *subject.surroundings), widths, cached_by(widths, layers))
        return InspectResult(
            schema_version=SCHEMA_VERSION,
            model=checkpoint.source,
            revision=checkpoint.revision,
            model_type=checkpoint.config.model_type,
            has_weights=checkpoint.has_weights,
            tied_embeddings=bool(getattr(checkpoint.config, "tie_word_embeddings", False)),
            prunable=legal_values(subject.architecture, subject.trace),
            dropped=checkpoint.dropped,
            renamed=checkpoint.renamed,
            before=before,
            after=after,
            vocabulary=replace(vocabulary, after=size),
            deviations=target.deviations if target else (),
            runtimes=runtime_fits(config),
        )


def verify_folder(folder: Path) -> VerifyResult:
    """Hold a folder that `prune` or `export` wrote against the checksums in its manifest.

    Raises:
        CheckpointError, VerificationError: see `check_files`.
    """
    from llmprune_cli.folder.integrity import check_files

    found = check_files(folder)
    return VerifyResult(SCHEMA_VERSION, str(folder), found.files, found.size_bytes, found.parameters)
