"""The model card of what was written: what it was made of, how, with which result, and how to load it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from huggingface_hub import ModelCard, ModelCardData, metadata_load

from llmprune_cli import __version__
from llmprune_cli.errors import CheckpointError, first_line
from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.folder.documents import is_there
from llmprune_cli.folder.manifest import MANIFEST_NAME, Manifest
from llmprune_cli.formats.registry import Format
from llmprune_cli.heal import ON_ANSWERS
from llmprune_cli.heal.options import parse_loss
from llmprune_cli.report.runtimes import RuntimeFit
from llmprune_cli.source.tokenizer import copy_small

Row: TypeAlias = tuple[str, str, str]
CARD = "README.md"
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
WHOLE_LOADING = """```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(".", dtype="auto")
processor = AutoProcessor.from_pretrained(".")
```"""
TEMPLATE = Path(__file__).with_name("model_card.md")


def write_card(
    folder: Path,
    checkpoint: Checkpoint,
    manifest: Manifest | None,
    form: Format,
    fits: Sequence[RuntimeFit],
    note: str = "",
) -> None:
    """Write a model card into a staging folder, and copy the licence of the source.

    Raises:
        CheckpointError: the manifest is not one, or a licence cannot be read.

    Args:
        manifest: how the model was pruned; None where it was not.
        form: the format of what lies in the folder.
        fits: which runtimes load the model.
        note: in which form it was written, where that is not the usual one.
    """
    for pattern in LICENCES:
        for path in checkpoint.companions.glob(pattern):
            if path.is_file():
                copy_small(path, folder / path.name)
    source = checkpoint.source if manifest is None else manifest.source or checkpoint.source
    rows, how, answers = tell_pruning(manifest, checkpoint.companions) if manifest is not None else ([], "", [])
    card = ModelCard.from_template(
        _front_matter(checkpoint, source, manifest is not None),
        template_path=str(TEMPLATE),
        title=f"{_code(Path(source).name)}{', pruned' if manifest else ''}",
        written_by=f"Written by llmprune {__version__} from {_code(source)}.",
        rows=rows,
        answers=answers,
        how=how,
        loading=_loading(folder, form, checkpoint),
        note=" ".join(f"{text[0].upper()}{text[1:]}." for text in (note, _part(checkpoint)) if text),
        fits=fits if form.keeps_dtypes else (),
    )
    (folder / CARD).write_text(f"{str(card).rstrip()}\n", encoding="utf-8", errors="replace")


def tell_pruning(manifest: Manifest, folder: Path) -> tuple[list[Row], str, list[Row]]:
    """What was removed, as rows of a table, and how; and prompts, each with how it goes on before and after that.

    Args:
        folder: that holds the manifest.

    Raises:
        CheckpointError: it does not say that.
    """
    try:
        answers = (manifest.calibration or {}).get("answers", ())
        told = [(own["prompt"], _code(own["before"]), _code(own["after"])) for own in answers]
        return *_pruning(manifest), told
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(
            f"{folder / MANIFEST_NAME} is not a manifest of llmprune ({first_line(error)}). Remove it."
        ) from error


def _code(text: str) -> str:
    """A name as Markdown shows it whatever is in it."""
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    return f"{fence}{space}{' '.join(text.split())}{space}{fence}"


def _front_matter(checkpoint: Checkpoint, source: str, is_pruned: bool) -> ModelCardData:
    known = _known(checkpoint.companions / CARD)
    is_hub_id = HUB_ID.fullmatch(source) is not None and not is_there(Path(source))
    return ModelCardData(
        base_model=source if is_hub_id else known.get("base_model"),
        license=known.get("license"),
        license_name=known.get("license_name"),
        license_link=known.get("license_link"),
        language=known.get("language"),
        library_name="transformers",
        pipeline_tag="image-text-to-text" if checkpoint.whole else "text-generation",
        tags=["llmprune", *(["pruned"] if is_pruned else [])],
    )


def _known(path: Path) -> dict[str, Any]:
    """The front matter of the source's own card; empty where that has none that can be read."""
    try:
        return dict(metadata_load(path) or {}) if path.is_file() else {}
    except Exception:  # whatever YAML there is, it is not ours to judge
        return {}


def _pruning(manifest: Manifest) -> tuple[list[Row], str]:
    """What was removed, as rows of a table, and how."""
    options, widths, parameters = manifest.options, manifest.widths, manifest.parameters
    if options is None or widths is None or parameters is None or manifest.layers is None:
        raise ValueError("it does not say what was pruned")
    rows = [("parameters", f"{parameters.before:,}", f"{parameters.after:,}")]
    rows += [(n, f"{old:,}", f"{widths.after[n]:,}") for n, old in widths.before.items() if old != widths.after[n]]
    card = manifest.calibration
    if card:
        where = f"on held-out text of {card['dataset']}"
        if "bits_per_byte_after" in card:  # which manifests of 0.1 lack
            before, after = card["bits_per_byte_before"], card["bits_per_byte_after"]
            rows.append((f"bits per byte {where}", f"{before:.3f}", f"{after:.3f}"))
        if card["kl"] is not None:
            shown = f"perplexity {where}"
            rows.append((shown, f"{card['perplexity_before']:,.2f}", f"{card['perplexity_after']:,.2f}"))
            rows.append(("mean KL divergence of the next token there, nats", "", f"{card['kl']:.3f}"))
    how = f"Units were chosen by `{options['importance']}`"
    repaired = options["refit"] != "none"
    how += f", and what reads the removed ones was solved anew (`{options['refit']}`)" if repaired else ""
    text = f" on {card['tokens']:,} tokens of {_code(card['origin'])}" if card else ""
    whole, layers = widths.before["num_hidden_layers"], len(manifest.layers)
    kept = f" {layers} of {whole} layers stay." if layers < whole else ""
    return rows, f"{how}{text}. {_training(manifest)}{kept} All of it is in `{MANIFEST_NAME}`."


def _training(manifest: Manifest) -> str:
    """Whether and how it was trained afterwards."""
    healing = manifest.healing
    if healing is None:
        return "Nothing was trained."
    learned = parse_loss(healing["loss"])
    wanted = (f"what {_code(healing['teacher'])} predicts", learned.kl), ("the text itself", learned.ce)
    what = f"to predict {' and '.join(name for name, weight in wanted if weight)} (`{healing['loss']}`)"
    if healing.get("loss_on") == ON_ANSWERS:
        what += ", of what an assistant says in it"
    if healing.get("mode") == "blocks":
        what = f"layer by layer, to turn its hidden states into those of {_code(healing['teacher'])}"
    kl = f"{healing['before']['kl']:.3f} to {healing['after']['kl']:.3f} nats"
    came = f"which took the KL divergence on held-out text from {kl}"
    if healing.get("trained_parameters") == 0:
        came = "on which held-out text gained nothing, so that the weights are those from before"
    count = healing.get("learned_tokens", healing["tokens"])  # which earlier versions did not tell apart
    return f"Then it was trained on {count:,} tokens of {_code(healing['origin'])} {what}, {came}."


def _part(checkpoint: Checkpoint) -> str:
    """Which part of a multimodal model was pruned, or is all that is left of it."""
    around = checkpoint.around
    if around is None:
        return ""
    kind = f"a {around.config.model_type} model"
    if around.is_written:
        return f"this is {kind}, of which the language model alone was pruned: its vision or audio tower is as it was"
    return f"this is the language model alone of {kind}, without its vision or audio tower and projector"


def _loading(folder: Path, form: Format, checkpoint: Checkpoint) -> str:
    if checkpoint.whole is not None:
        return WHOLE_LOADING
    file = next((path.name for path in folder.glob(form.file)), "") if form.file else ""
    return form.loading.replace("FILE", file).replace("PATH", ".")
