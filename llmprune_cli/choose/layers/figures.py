"""What removing a part of one layer costs, in figures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WidthSensitivity:
    """What the units of one kind are worth, in each layer on its own."""

    width: str  # a field of `Widths`; `num_hidden_layers` where whole layers go
    units: int  # that a layer has
    removed: int  # of them, in one layer at a time
    parameters: int  # that go with these, as a mean over the layers
    kl: tuple[float | None, ...]  # mean KL(whole model ‖ without them) of the next token by layer, nats; None: no units


@dataclass(frozen=True)
class Sensitivity:
    """What is measured of a model, layer by layer."""

    rows: tuple[WidthSensitivity, ...]  # of every width that layers have, and of whole layers
    influence: tuple[float, ...] | None  # how far each layer turns the residual stream; None where no unit read text
