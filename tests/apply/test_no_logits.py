"""Of a configuration whose models give no numbers nothing is proven, and nothing but that is said."""

from collections.abc import Callable
from pathlib import Path

import pytest

from support.cli import BY_MAGNITUDE, run_cli
from support.refusals import UNSUPPORTED, assert_refused, edit_json


@pytest.mark.parametrize(
    "options", [("--pruning-ratio", "0.5"), ("--drop-layers", "0"), ("--mlp", "50%"), ("--heads", "50%"), ()]
)
def test_a_model_without_numbers_is_refused_as_a_whole(
    make_tiny: Callable[..., Path], tmp_path: Path, options: tuple[str, ...]
) -> None:
    model = make_tiny("llama")
    edit_json(model / "config.json", lambda settings: settings.update(rms_norm_eps=float("nan")))
    command = ("prune", model, *BY_MAGNITUDE, *options, "--output", tmp_path / "out") if options else ("inspect", model)
    assert_refused(run_cli(*command), UNSUPPORTED, "no finite logits", "config.json")
    assert not (tmp_path / "out").exists()
