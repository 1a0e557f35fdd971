"""The model that a command is about: a checkpoint, and what was found out about its architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import PretrainedConfig

from llmprune_cli.coupling.discovery import trace
from llmprune_cli.coupling.trace import Trace
from llmprune_cli.coupling.twin import cached_by, one_thread, settle_head_dim
from llmprune_cli.errors import PlanError
from llmprune_cli.family.architecture import Architecture, discover
from llmprune_cli.family.cache import Cached
from llmprune_cli.family.skeleton import is_remote
from llmprune_cli.family.widths import HEAD_COUNTS, Width, Widths
from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.folder.tensors import TensorEntry
from llmprune_cli.processes import ALONE, Processes
from llmprune_cli.startup.remembered import recall, remember, remembered_in


@dataclass(frozen=True)
class Subject:
    """A checkpoint together with what was found out about its architecture."""

    checkpoint: Checkpoint
    architecture: Architecture
    trace: Trace
    processes: Processes = ALONE  # that share the text on which the model is run
    folded_norms: Mapping[str, float] = field(default_factory=dict)  # see `surgery.pruned_tensors`

    @property
    def widths(self) -> Widths:
        """The widths before pruning."""
        return self.architecture.widths

    @property
    def surroundings(self) -> tuple[TensorEntry, ...]:
        """See `Checkpoint.surroundings`."""
        return self.checkpoint.surroundings

    def require(self, widths: Widths) -> None:
        """Make sure that this family can be pruned to these widths.

        Raises:
            PlanError: it cannot in one of those that change.
        """
        refused = [width for width in widths.changed_from(self.widths) if width in self.trace.refused]
        if refused:
            reason = self.trace.refused[refused[0]]
            named = " and ".join(width for width in refused if self.trace.refused[width] == reason)  # that go together
            raise PlanError(f"{self.architecture.config.model_type} cannot be pruned in {named}: {reason}.")


def understand(checkpoint: Checkpoint, processes: Processes = ALONE) -> Subject:
    """Trace a checkpoint's architecture and hold the trace against its shapes.

    Args:
        processes: that share the text on which the model is run.

    Raises:
        UnsupportedError: no twin can be built.
    """
    shapes = {entry.name: entry.shape for entry in checkpoint.entries}
    architecture, traced = find_coupling(discover(checkpoint.config, shapes))
    traced = traced.fitting(shapes, architecture.widths)
    if checkpoint.whole is not None:
        within = refused_within(checkpoint.whole.config)
        if architecture.hidden_follows_heads:  # none of the two goes without the other
            within |= dict.fromkeys(map(str, HEAD_COUNTS), within[Width.HIDDEN])
        traced = replace(traced, refused={**traced.refused, **within})
    return Subject(checkpoint, architecture, traced, processes)


def refused_within(whole: PretrainedConfig) -> dict[str, str]:
    """The widths of a language model that its multimodal model relies on, and why."""
    remedy = "--text-only writes the language model alone"
    refused = {Width.HIDDEN: f"the projector of its vision or audio tower meets the hidden size; {remedy}"}
    deepstack = getattr(getattr(whole, "vision_config", None), "deepstack_visual_indexes", None)
    if deepstack:
        refused[Width.LAYERS] = f"features of images enter the first {len(deepstack)} layers; {remedy}"
    return {str(width): reason for width, reason in refused.items()}


@dataclass(frozen=True)
class Coupling:
    """What a twin says about an architecture, as it is remembered."""

    explicit_head_dim: bool  # see `Architecture`
    hidden_follows_heads: bool
    cached: tuple[Cached, ...] | None
    trace: Trace


def find_coupling(architecture: Architecture) -> tuple[Architecture, Trace]:
    """The architecture with settled heads and its trace: from the user's cache, or from a twin, which takes seconds.

    Raises:
        UnsupportedError: no twin can be built.
    """
    place = known_architecture("", architecture)
    known = recall(place, Coupling)
    if known is None:
        with one_thread():
            settled = settle_head_dim(architecture)
            rules = settled.explicit_head_dim, settled.hidden_follows_heads
            known = Coupling(*rules, cached_by(settled), trace(settled))
        remember(place, known)
    settled = replace(
        architecture,
        explicit_head_dim=known.explicit_head_dim,
        hidden_follows_heads=known.hidden_follows_heads,
        cached=known.cached,
    )
    return settled, known.trace


def known_architecture(kind: str, architecture: Architecture, *more: str) -> Path | None:
    """The file for what is found out about an architecture; None where it runs code that comes with a checkpoint.

    Args:
        kind: of what is found out.
        more: what it follows from as well.
    """
    config = architecture.config
    if is_remote(config):
        return None
    own = replace(architecture, config=None)  # type: ignore[arg-type]
    settings = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}  # wherever it lies
    name = "-".join(filter(None, (config.model_type, kind)))
    return remembered_in(name, type(config).__name__, settings, repr(own), *more)
