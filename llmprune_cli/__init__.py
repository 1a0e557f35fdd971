"""Structured pruning of causal language models into smaller dense checkpoints that stock software loads."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmprune_cli.commands.api import evaluate, export, inspect, prune, recover, sweep
    from llmprune_cli.commands.push import push
    from llmprune_cli.errors import LlmpruneError, UsageError
    from llmprune_cli.plan.document import Plan
    from llmprune_cli.progress import Progress

__version__ = "0.1.0"
__all__ = [
    "LlmpruneError",
    "Plan",
    "Progress",
    "UsageError",
    "evaluate",
    "export",
    "inspect",
    "prune",
    "push",
    "recover",
    "sweep",
]

# Where each name is from; it is imported when it is asked for, so that `--help` stays quick.
_HOMES = {
    **dict.fromkeys(("inspect", "prune", "sweep", "recover", "evaluate", "export"), "commands.api"),
    **dict.fromkeys(("LlmpruneError", "UsageError"), "errors"),
    "push": "commands.push",
    "Plan": "plan.document",
    "Progress": "progress",
}


def __getattr__(name: str) -> Any:
    """The names of the Python API."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
