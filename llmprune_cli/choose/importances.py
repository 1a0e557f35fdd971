"""How units and layers are ranked: the two registries of importances.

An importance is one function and one line here; `--help`, its checks and the table in the docs are made of that line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from llmprune_cli.options import Choice


@dataclass(frozen=True)
class Importance:
    """A way to rank units or layers."""

    reads: Literal["weights", "text", "nothing"]
    place: str  # of its function, `module:name`, loaded when it is wanted
    about: str  # one line for the docs
    has_gradients: bool = False  # whether the loss is followed backwards

    def load(self) -> Callable[..., Any]:
        """The function: of a `Measuring` where text is read; else of checkpoint, trace, widths, seed and progress."""
        module, _, name = self.place.partition(":")
        function: Callable[..., Any] = getattr(import_module(f"{__package__}.{module}"), name)
        return function


# Of units. What reads text gives scores of layers, too.
IMPORTANCES: dict[str, Importance] = {
    "consensus": Importance(
        "text",
        "consensus:measure_consensus",
        "the sum of the ranks by `range`, which count twice, and by `taylor`, whose gradients are measured on at most "
        "2,048 of the tokens",
        has_gradients=True,
    ),
    "range": Importance("text", "activity:measure_range", "for neurons, activation norm times weight ranges"),
    "activation": Importance(
        "text",
        "activity:measure_activation",
        "squared weights times mean squared activations ([arXiv 2306.11695](https://arxiv.org/abs/2306.11695))",
    ),
    "taylor": Importance(
        "text",
        "gradients:measure_taylor",
        "weights times gradients of the loss ([arXiv 2305.11627](https://arxiv.org/abs/2305.11627)); for its "
        "backward sweep the input of every layer is kept in a temporary file",
        has_gradients=True,
    ),
    "magnitude": Importance(
        "weights", "magnitude:score_magnitude", "group magnitude as torch-pruning computes it; reads no text"
    ),
    "random": Importance("nothing", "magnitude:score_random", "the baseline; reads no text"),
}
# Of layers.
LAYER_IMPORTANCES: dict[str, Importance] = {
    "influence": Importance(
        "text",
        "layers.importance:score_influence",
        "those that change the direction of the residual stream least ([arXiv 2403.03853](https://arxiv.org/abs/2403.03853))",
    ),
    "loss": Importance(
        "text",
        "layers.importance:score_loss",
        "those whose absence raises the loss least, each tried alone on at most 2,048 tokens",
    ),
}


def reads_text(choice: Choice) -> bool:
    """Whether units are ranked by what they do on text."""
    return IMPORTANCES[choice.settled.importance or ""].reads == "text"


def has_gradients(choice: Choice) -> bool:
    """Whether units are ranked by gradients, too."""
    return IMPORTANCES[choice.settled.importance or ""].has_gradients


def ranks_layers(choice: Choice) -> bool:
    """Whether layers go by what they do on text."""
    if choice.budget is not None:
        return True
    by_text = choice.layer_importance is not None or reads_text(choice)
    return choice.widths.num_hidden_layers is not None and by_text


def needs_text(choice: Choice, has_plan: bool) -> bool:
    """Whether anything is measured on calibration text.

    Args:
        has_plan: whether the units are chosen already.
    """
    measured = reads_text(choice) or ranks_layers(choice)
    return choice.settled.refit != "none" or choice.rotate or (measured and not has_plan)


def needs_activity(choice: Choice) -> bool:
    """Whether units, or layers by their influence, are ranked by what they do on text."""
    return reads_text(choice) or (ranks_layers(choice) and choice.layer_importance != "loss")
