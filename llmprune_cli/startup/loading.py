"""Loading libraries without pauses."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

LARGE = "torch"  # with what it brings along, nearly all that is loaded


@contextmanager
def loading() -> Iterator[None]:
    """Within it no garbage is collected: next to nothing that loading makes is any, and looking takes a quarter of it.

    What a process has loaded first is left out of later collections as well, the one at its end among them.
    """
    is_first, was_enabled = LARGE not in sys.modules, gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_first:
            gc.freeze()
        if was_enabled:
            gc.enable()
