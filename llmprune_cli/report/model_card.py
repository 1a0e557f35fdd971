"""The model card of what was written: what it was made of, how, with which result, and how to load it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmprune_cli import __version__
from llmprune_cli.errors import CheckpointError
from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.folder.documents import is_there
from llmprune_cli.folder.manifest import MANIFEST_NAME
from llmprune_cli.report.runtimes import RuntimeFit
from llmprune_cli.source.tokenizer import copy_small

CARD = "README.md"
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
LOADING = {
    "safetensors": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```""",
    "gguf": "`llama-cli -m FILE`, and whatever else is built on llama.cpp.",
    "onnx": '`onnxruntime.InferenceSession("FILE")`: token ids and a key-value cache in, logits and the cache out.',
    "genai": "`onnxruntime_genai.Model(FOLDER)`, where FOLDER is this folder.",
    "torch-export": '`torch.export.load("FILE").module()`: token ids in, logits out.',
}
FILES = {"gguf": "*.gguf", "onnx": "*.onnx", "torch-export": "*.pt2"}


def write_card(
    folder: Path, checkpoint: Checkpoint, manifest: dict[str, Any] | None, form: str, fits: Sequence[RuntimeFit]
) -> None:
    """Write a model card into a staging folder, and copy the licence of the source.

    Raises:
        CheckpointError: the manifest is not one, or a licence cannot be read.

    Args:
        manifest: how the model was pruned; None where it was not.
        form: the format of what lies in the folder.
        fits: which runtimes take the model.
    """
    for pattern in LICENCES:
        for path in checkpoint.companions.glob(pattern):
            if path.is_file():
                copy_small(path, folder / path.name)
    try:
        source, pruning = _source(checkpoint, manifest), _pruning(manifest) if manifest else []
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{checkpoint.companions / MANIFEST_NAME} is not a manifest of llmprune ({error!r}). Remove it."
        ) from error
    parts = [
        f"---\n{_front_matter(checkpoint, source, manifest is not None)}\n---",
        f"# {_code(Path(source).name)}{', pruned' if manifest else ''}",
        f"Written by llmprune {__version__} from {_code(source)}.",
        *pruning,
        "## Loading it",
        _loading(folder, form),
        *([_runtimes(fits)] if form == "safetensors" else ()),
    ]
    (folder / CARD).write_text("\n\n".join(parts) + "\n", encoding="utf-8", errors="replace")


def _source(checkpoint: Checkpoint, manifest: dict[str, Any] | None) -> str:
    source = manifest["source"] if manifest else checkpoint.source
    if not isinstance(source, str):
        raise TypeError("source is no name")
    return source


def _code(text: str) -> str:
    """A name as Markdown shows it whatever is in it."""
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    return f"{fence}{space}{' '.join(text.split())}{space}{fence}"


def _front_matter(checkpoint: Checkpoint, source: str, is_pruned: bool) -> str:
    from huggingface_hub import ModelCardData

    known = _known(checkpoint.companions / CARD)
    is_hub_id = HUB_ID.fullmatch(source) is not None and not is_there(Path(source))
    data = ModelCardData(
        base_model=source if is_hub_id else known.get("base_model"),
        license=known.get("license"),
        license_name=known.get("license_name"),
        license_link=known.get("license_link"),
        language=known.get("language"),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["llmprune", *(["pruned"] if is_pruned else [])],
    )
    return str(data.to_yaml())


def _known(path: Path) -> dict[str, Any]:
    """The front matter of the source's own card; empty where that has none that can be read."""
    from huggingface_hub import metadata_load

    try:
        return dict(metadata_load(path) or {}) if path.is_file() else {}
    except Exception:  # whatever YAML there is, it is not ours to judge
        return {}


def _pruning(manifest: dict[str, Any]) -> list[str]:
    options, before, after = manifest["options"], manifest["widths"]["before"], manifest["widths"]["after"]
    rows = [("parameters", *(f"{manifest['parameters'][side]:,}" for side in ("before", "after")))]
    rows += [(name, f"{old:,}", f"{after[name]:,}") for name, old in before.items() if old != after[name]]
    card = manifest.get("calibration")
    if card:
        shown = f"perplexity on held-out text of {card['dataset']}"
        rows.append((shown, f"{card['perplexity_before']:,.2f}", f"{card['perplexity_after']:,.2f}"))
        rows.append(("mean KL divergence of the next token there, nats", "", f"{card['kl']:.3f}"))
    table = ["| | before | after |", "|---|---:|---:|", *(f"| {' | '.join(row)} |" for row in rows)]
    how = f"Units were chosen by `{options['importance']}`"
    repaired = options["refit"] != "none"
    how += f", and what reads the removed ones was solved anew (`{options['refit']}`)" if repaired else ""
    text = f" on {card['tokens']:,} tokens of {_code(card['origin'])}" if card else ""
    layers = len(manifest["layers"])
    kept = f" {layers} of {before['num_hidden_layers']} layers stay." if layers < before["num_hidden_layers"] else ""
    facts = f"{how}{text}. Nothing was trained.{kept} All of it is in `{MANIFEST_NAME}`."
    return ["## What was removed", "\n".join(table), facts]


def _loading(folder: Path, form: str) -> str:
    file = next((path.name for path in folder.glob(FILES[form])), "") if form in FILES else ""
    return LOADING[form].replace("FILE", file).replace("PATH", ".")


def _runtimes(fits: Sequence[RuntimeFit]) -> str:
    rows = [f"| {fit.runtime} | {'yes' if fit.loads else 'no'} | {fit.note} |" for fit in fits]
    return "\n".join(["| runtime | takes it | |", "|---|---|---|", *rows])
