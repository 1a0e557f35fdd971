"""A tiny model that llama.cpp can tokenize for."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.gguf_exports import tiny


@pytest.fixture(scope="session")
def byte_level_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("byte-level") / "model", "llama")
