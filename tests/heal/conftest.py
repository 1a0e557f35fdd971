"""A pruned model that has something to learn from the one it was made from."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.cli import BY_MAGNITUDE, run_cli
from support.tiny import BYTE_LEVEL_VOCABULARY, save_byte_level, save_tiny


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its embeddings are tied, and it predicts something."""
    folder = tmp_path_factory.mktemp("healing") / "dense"
    return save_tiny(folder, initializer_range=0.2, tie_word_embeddings=True)


@pytest.fixture(scope="session")
def pruned(dense: Path) -> Path:
    folder = dense.with_name("pruned")
    options = ("--intermediate-pruning-ratio", "0.5", "--output", folder)
    run = run_cli("prune", dense, *BY_MAGNITUDE, *options)
    assert run.code == 0, run.stderr
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokens are made of bytes."""
    folder = tmp_path_factory.mktemp("vocabulary") / "whole"
    save_tiny(folder, initializer_range=0.2, vocab_size=BYTE_LEVEL_VOCABULARY)
    save_byte_level(folder)
    return folder
