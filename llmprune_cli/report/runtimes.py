"""Which stock software takes a model, known from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmprune_cli.formats import FORMATS, load_format
from llmprune_cli.formats.format import Fit

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FULL_WIDTH_IN_CTRANSLATE2 = ("llama", "qwen2")  # it assumes query heads × head dim to be the hidden size


@dataclass(frozen=True)
class RuntimeFit:
    """What is known of a model in one runtime."""

    runtime: str
    loads: bool
    note: str  # why not, or in which form


def runtime_fits(config: PretrainedConfig) -> tuple[RuntimeFit, ...]:
    """The runtimes of all export formats, and others where they are known to stumble over this model."""
    forms = [load_format(name) for name in FORMATS]
    found = {form.runs_in: form.fit(config) for form in forms}
    others = {"CTranslate2": _fit_ctranslate2(config), "mlx-lm": _fit_mlx(config)}
    found |= {name: fit for name, fit in others.items() if fit.note}
    return tuple(RuntimeFit(name, fit.loads, fit.note) for name, fit in found.items())


def _fit_ctranslate2(config: PretrainedConfig) -> Fit:
    heads, head_dim = getattr(config, "num_attention_heads", None), getattr(config, "head_dim", None)
    if config.model_type not in FULL_WIDTH_IN_CTRANSLATE2 or not heads or not head_dim:
        return Fit(loads=True)
    if heads * head_dim == config.hidden_size:
        return Fit(loads=True)
    return Fit(
        False, f"fails at run time: {heads} query heads × {head_dim} is not the hidden size {config.hidden_size}"
    )


def _fit_mlx(config: PretrainedConfig) -> Fit:
    from llmprune_cli.family.written import NTH_ALONE, nth_layers

    field, settings = NTH_ALONE.get(config.model_type, ""), config.to_dict()
    windows = field != "sliding_window_pattern" or settings.get("sliding_window")
    if not field or not windows or nth_layers(config.model_type, settings)[field] is not None:
        return Fit(loads=True)
    return Fit(False, f"reads {field} alone, and no such number describes the kinds of layers here")
