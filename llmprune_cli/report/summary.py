"""A model in a few rows: its tensors, folded over layers and added up."""

from __future__ import annotations

from collections.abc import Sequence

from llmprune_cli.family.widths import Widths
from llmprune_cli.folder.tensors import Shape, TensorEntry, split_name
from llmprune_cli.report.json_results import ModelSummary, TensorRow


def summarize(entries: Sequence[TensorEntry], widths: Widths, cached: int | None) -> ModelSummary:
    """Fold tensors over layers and add them up.

    Args:
        cached: numbers that the model keeps of a token, see `Architecture.cached_numbers`.
    """
    folded: dict[tuple[str, Shape, str], list[TensorEntry]] = {}
    for entry in entries:
        folded.setdefault((split_name(entry.name)[0], entry.shape, entry.dtype), []).append(entry)
    rows = tuple(
        TensorRow(template, _ranges(members), len(members), shape, dtype, sum(e.numel for e in members))
        for (template, shape, dtype), members in folded.items()
    )
    widest = max(entries, key=lambda entry: entry.numel)
    return ModelSummary(
        widths=widths,
        parameters=sum(entry.numel for entry in entries),
        size_bytes=sum(entry.size_bytes for entry in entries),
        kv_cache_bytes_per_token=None if cached is None else cached * widest.size_bytes // widest.numel,
        tensors=rows,
    )


def _ranges(entries: list[TensorEntry]) -> str:
    numbers = sorted({found[0] for found in (split_name(entry.name)[1] for entry in entries) if found})
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)
