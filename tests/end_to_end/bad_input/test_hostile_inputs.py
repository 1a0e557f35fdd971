"""Hostile inputs are refused with their exit code, quickly and in little memory, and nothing that they bring runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import pytest

from support import TESTS
from support.hostile_inputs import INPUTS

MOST_SECONDS, MOST_BYTES = 2, 500 * 10**6


@pytest.mark.skipif(sys.platform != "linux", reason="runs are forked and watched in /proc")
def test_hostile_inputs_are_refused(record_property: Callable[[str, object], None]) -> None:
    command = [sys.executable, "-m", "support.hostile_inputs"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS)
    assert done.returncode == 0, done.stderr
    *results, marked = map(json.loads, done.stdout.splitlines())
    assert marked == {"name": "ran code", "code": 0}, "code from an input ran"
    assert [result["name"] for result in results] == list(INPUTS) and len(results) >= 60
    wrong = [
        result
        for result in results
        if result["code"] not in INPUTS[result["name"]].codes
        or "Traceback" in result["printed"]
        or result["left"]
        or result["seconds"] > MOST_SECONDS
        or result["bytes"] > MOST_BYTES
    ]
    assert not wrong
    record_property("hostile inputs tried", len(results))
    record_property("hostile inputs refused", len(results) - len(wrong))
