"""What `inspect --sensitivity` is asked for, see `llmprune_cli.options`."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from llmprune_cli.commands.named_options import options_of
from llmprune_cli.commands.requests import PruneRequest, check_prune
from llmprune_cli.errors import UsageError
from llmprune_cli.folder.manifest import require_manifest
from llmprune_cli.options import OUTPUT, Choice, Delivery, ModelReference, Option, Scratch, Text, WidthRequest
from llmprune_cli.sizes import check_chart
from llmprune_cli.startup.config_checks import check_widths
from llmprune_cli.startup.model_argument import check_model
from llmprune_cli.vocabulary.request import VocabularyRequest, check_vocabulary

# Options of `prune` that have no part in it.
LEFT_OUT = (
    *("dtype", "keep_layers", "vocab_text", "resume", "layer_importance", "refit", "rotate"),
    *("context", *(own.name for own in options_of(Choice) if own.name.startswith("target"))),
)


@dataclass(frozen=True)
class Measured:
    """What would go, or how it is measured what parts of layers are worth."""

    choice: Choice = field(default_factory=Choice)
    text: Text = field(default_factory=Text)
    scratch: Scratch = field(default_factory=Scratch)
    tokens: VocabularyRequest = field(default_factory=VocabularyRequest)
    report: Annotated[
        Path | None, Option("Draw the sensitivity of all layers into a .png or .svg file.", OUTPUT, check=check_chart)
    ] = None

    @property
    def widths(self) -> WidthRequest:
        """The widths that are asked for."""
        return self.choice.widths

    def check_use(self, verify: bool, sensitivity: bool) -> None:
        """Refuse what does not go with a flag, or goes with one that is not there.

        Raises:
            UsageError: see above.
        """
        if verify and sensitivity:
            raise UsageError("--verify measures nothing; leave out --sensitivity.")
        plans = not self.widths.is_empty or self.tokens != VocabularyRequest()
        if verify and plans:
            raise UsageError("--verify plans nothing; leave out the width options.")
        if sensitivity and plans:
            raise UsageError("--sensitivity takes a part of every width in turn; leave out the width options.")
        plain = replace(self, choice=replace(self.choice, widths=WidthRequest()), tokens=VocabularyRequest())
        if not sensitivity and plain != Measured():
            raise UsageError("calibration, method and --report say how to measure; give --sensitivity with them.")

    def request(self, model: ModelReference) -> PruneRequest:
        """What `prune` would be asked for that reads text and weights, and writes no model."""
        choice = replace(self.choice, widths=WidthRequest(num_hidden_layers=1), refit="residual")
        delivery = Delivery(dry_run=True, save_plan=Path(tempfile.gettempdir(), "plan.json"))
        return PruneRequest(model, choice, self.text, delivery, self.scratch)


def check_inspect(model: ModelReference, asked: Measured, verify: bool, sensitivity: bool) -> None:
    """Refuse what can be refused in a moment, before any library is loaded; nothing is written.

    Raises:
        LlmpruneError: see there.
    """
    asked.check_use(verify, sensitivity)
    if sensitivity:
        _check_sensitivity(model, asked)
    elif verify:
        require_manifest(Path(model.name))
    else:
        _check_plain(model, asked)


def _check_plain(model: ModelReference, asked: Measured) -> None:
    check_model(model, needs_weights=False)
    check_widths(model.name, asked.widths)
    if asked.tokens.vocab_size is not None:
        asked.tokens.check(has_target=False)
    check_vocabulary(asked.tokens, model.name)


def _check_sensitivity(model: ModelReference, asked: Measured) -> None:
    from llmprune_cli.report.chart import check_chart_target

    if asked.report is not None:
        check_chart_target(asked.report, None)
    check_prune(asked.request(model))
