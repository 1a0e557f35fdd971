"""The model that a command is about: a checkpoint, and what was found out about its architecture."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from llmprune_cli import __version__
from llmprune_cli.coupling.discovery import trace
from llmprune_cli.coupling.trace import Trace
from llmprune_cli.coupling.twin import one_thread, settle_head_dim
from llmprune_cli.errors import LlmpruneError, UnsupportedError
from llmprune_cli.family.architecture import Architecture, discover
from llmprune_cli.family.skeleton import is_remote
from llmprune_cli.family.widths import Widths
from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.folder.documents import replace_file
from llmprune_cli.processes import ALONE, Processes

PACKAGES = ("torch", "transformers")  # that decide what is found out
CODE = ("coupling", "family")  # folders of the package that find it out


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

    def require(self, widths: Widths) -> None:
        """Make sure that this family can be pruned to these widths.

        Raises:
            UnsupportedError: it cannot in one of those that change.
        """
        for width in widths.changed_from(self.widths):
            if width in self.trace.refused:
                family = self.architecture.config.model_type
                raise UnsupportedError(f"{family} cannot be pruned in {width}: {self.trace.refused[width]}.")


def understand(checkpoint: Checkpoint, processes: Processes = ALONE) -> Subject:
    """Trace a checkpoint's architecture and hold the trace against its shapes.

    Args:
        processes: that share the text on which the model is run.

    Raises:
        UnsupportedError: no twin can be built, or the shapes follow other rules.
    """
    shapes = {entry.name: entry.shape for entry in checkpoint.entries}
    architecture, traced = find_coupling(discover(checkpoint.config, shapes))
    traced.check(shapes, architecture.widths)
    return Subject(checkpoint, architecture, traced, processes)


@dataclass(frozen=True)
class Coupling:
    """What a twin says about an architecture, as it is remembered."""

    explicit_head_dim: bool  # see `Architecture`
    hidden_follows_heads: bool
    trace: Trace


def find_coupling(architecture: Architecture) -> tuple[Architecture, Trace]:
    """The architecture with settled heads and its trace: from the user's cache, or from a twin, which takes seconds.

    Raises:
        UnsupportedError: no twin can be built.
    """
    place = _remembered_in(architecture)
    known = _recall(place)
    if known is None:
        with one_thread():
            settled = settle_head_dim(architecture)
            known = Coupling(settled.explicit_head_dim, settled.hidden_follows_heads, trace(settled))
        _remember(place, known)
    settled = replace(
        architecture,
        explicit_head_dim=known.explicit_head_dim,
        hidden_follows_heads=known.hidden_follows_heads,
    )
    return settled, known.trace


def _remembered_in(architecture: Architecture) -> Path | None:
    """The file for what is found out about an architecture; None where it runs code that comes with a checkpoint."""
    config = architecture.config
    if is_remote(config):
        return None
    code = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in _code()]
    own = replace(architecture, config=None)  # type: ignore[arg-type]
    versions = [__version__, *map(version, PACKAGES)]
    key = json.dumps([type(config).__name__, config.to_dict(), repr(own), versions, code], sort_keys=True, default=str)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "llmprune" / f"{config.model_type}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _code() -> list[Path]:
    package = Path(__file__).parents[1]
    return sorted(path for folder in CODE for path in (package / folder).glob("*.py"))


def _recall(place: Path | None) -> Coupling | None:
    """What a file remembers; None where there is none that can be read."""
    try:
        return None if place is None else TypeAdapter(Coupling).validate_json(place.read_bytes())
    except (OSError, ValidationError):
        return None


def _remember(place: Path | None, found: Coupling) -> None:
    """Write it, if the user's cache can be written."""
    if place is None:
        return
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        replace_file(place, [TypeAdapter(Coupling).dump_json(found)])
    except (OSError, LlmpruneError):
        return
