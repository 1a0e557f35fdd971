"""Structured pruning of causal language models into smaller dense checkpoints that stock software loads."""

__version__ = "0.1.0"
