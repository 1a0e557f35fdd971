"""What transformers makes of a configuration, without memory."""

from __future__ import annotations

import pytest

from llmprune_cli.family import skeleton
from support.tiny import tiny_config


def test_the_shapes_of_a_configuration_are_found_once_and_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    built, whole = [], skeleton.build_skeleton
    monkeypatch.setattr(skeleton, "build_skeleton", lambda config: built.append(config) or whole(config))
    skeleton._shapes.cache_clear()
    first = skeleton.expected_index(tiny_config())
    kept = dict(first)
    first.clear()
    assert skeleton.expected_index(tiny_config()) == kept and len(built) == 1
    wider = skeleton.expected_index(tiny_config(intermediate_size=56))
    assert wider.keys() == kept.keys() and wider != kept and len(built) == 2
