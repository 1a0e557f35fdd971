"""What `make test-all` runs and `make test` leaves out: other examples of what a test that is run holds already."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from support.families import EVERY

in_full = pytest.mark.skipif(not EVERY, reason="make test-all runs it")


def examples(every: Iterable[Any], some: Sequence[Any]) -> list[Any]:
    """The values of a parameter: some of them by default, every one under `make test-all`."""
    return [value if value in some else pytest.param(value, marks=in_full) for value in every]
