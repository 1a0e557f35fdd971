"""A short run of what `make fuzz` does at length: readers return or refuse, whatever the bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tools.fuzz.readers import READS, attempt, model_folder, mutated, reader

pytest.importorskip("gguf", reason="pip install 'llmprune[gguf]'")
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner))


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with model_folder() as folder:
        yield folder


@pytest.mark.parametrize("name", READS)
def test_readers_return_or_refuse(name: str, folder: Path) -> None:
    chosen = reader(name, folder)
    good = chosen.seeds[0]

    @settings(
        max_examples=30 if name in ("config", "gguf") else 100,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(data: st.DataObject) -> None:
        if good[:1] == b"{" and data.draw(st.booleans()):
            path, value = data.draw(st.lists(st.integers(0, 50), max_size=5)), data.draw(VALUES)
            text = json.dumps(mutated(json.loads(good), path, value)).encode()
        else:
            at, length = data.draw(st.integers(0, len(good))), data.draw(st.integers(0, 20))
            text = good[:at] + data.draw(st.binary(max_size=20)) + good[at + length :]
        error = attempt(chosen, folder, text)
        assert error is None, f"{text!r}: {error!r}"

    assert attempt(chosen, folder, good) is None
    run()
    (folder / chosen.file).write_bytes(good)
