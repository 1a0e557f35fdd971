"""`export`: a checkpoint in another format, held against transformers in the runtime that reads it."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import torch

from llmprune_cli.errors import UnsupportedError, VerificationError
from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.folder.integrity import list_files
from llmprune_cli.folder.manifest import MANIFEST_NAME, Manifest, read_manifest, write_manifest
from llmprune_cli.folder.shards import warn_of_large_shards
from llmprune_cli.folder.staging import claimed
from llmprune_cli.folder.tensors import SHORT_DTYPES
from llmprune_cli.formats.registry import LEGACY, MIXES, ExportOptions, Fit, Format, load_format
from llmprune_cli.formats.request import Conversion
from llmprune_cli.formats.verification import PROMPTS, missing_memory, missing_runtime, verify
from llmprune_cli.journal.keys import versions
from llmprune_cli.options import ModelReference, Text
from llmprune_cli.progress import Listener
from llmprune_cli.report.json_results import SCHEMA_VERSION, ExportResult
from llmprune_cli.report.model_card import tell_pruning, write_card
from llmprune_cli.report.runtimes import runtime_fits
from llmprune_cli.sizes import parse_size
from llmprune_cli.source.opening import open_checkpoint, source_folder, text_alone
from llmprune_cli.source.tokenizer import model_reader

SEED = 0  # of the windows that are drawn from text
LOADED = SHORT_DTYPES.values()  # dtypes that a model can be loaded in; others are a format's own


def export(
    reference: ModelReference, output: Path, overwrite: bool, conversion: Conversion, listener: Listener
) -> ExportResult:
    """Write a checkpoint in another format, and hold it against transformers in the runtime that reads it.

    Raises:
        UnsupportedError: no runtime of this format takes the model.
        VerificationError: it is not the same model there, or cannot be compared and has to be.
    """
    form = load_format(conversion.format)
    asked = ExportOptions(
        conversion.dtype, parse_size(conversion.max_shard_size), conversion.converter, conversion.kv_cache
    )
    reference = replace(reference, dtype=asked.dtype if asked.dtype in LOADED else None)
    with open_checkpoint(reference, need_weights=True) as opened:
        checkpoint = text_alone(opened)
        with claimed(output, overwrite, source_folder(reference, checkpoint)) as claim:
            fit = Fit(loads=True, note=f"by {asked.converter}") if asked.converter else form.fit(checkpoint.config)
            if not fit.loads:
                raise UnsupportedError(f"{checkpoint.source} cannot be exported as {conversion.format}: {fit.note}")
            dtype, reason = asked.dtype or form.dtype_for(checkpoint), _why_not_verified(form, checkpoint, conversion)
            manifest, verification = source_manifest(checkpoint), None
            with claim.staged() as staging:
                options = asked if form.keeps_dtypes else replace(asked, dtype=dtype)
                if conversion.imatrix is not None:
                    importance = _importance(checkpoint, conversion.imatrix, reference.device, listener)
                    options = replace(options, importance=importance)
                listener.stage("Exporting", checkpoint.size_bytes)
                checksums = form.write(checkpoint, staging, options, listener.advance)
                warn_of_large_shards(staging, asked.max_shard_bytes, listener.warn)
                if not reason:
                    listener.stage("Verifying", len(PROMPTS))
                    verification = verify(checkpoint, form, staging, dtype, listener.advance)
                pruned = manifest if manifest.is_pruned else None
                write_card(staging, checkpoint, pruned, form, runtime_fits(checkpoint.config), fit.note)
                result = asdict(verification) if verification else None
                exported = {
                    "format": conversion.format,
                    "dtype": dtype,
                    "versions": versions(),
                    "verification": result,
                }
                write_manifest(staging, replace(manifest, export=exported, files=list_files(staging, checksums)))
        files = sorted(path for path in output.rglob("*") if path.is_file())
        return ExportResult(
            schema_version=SCHEMA_VERSION,
            model=checkpoint.source,
            output=str(output),
            format=conversion.format,
            dtype=dtype,
            parameters=checkpoint.parameter_count,
            size_bytes=sum(path.stat().st_size for path in files),
            files=tuple(str(path.relative_to(output)) for path in files),
            note="; ".join(filter(None, (fit.note, _left_unpacked(checkpoint, conversion)))),
            verification=verification,
            unverified=reason or "",
        )


def _left_unpacked(checkpoint: Checkpoint, conversion: Conversion) -> str:
    """What a quantized file has in 16 bits; empty where it has all of it quantized, or is none."""
    if conversion.converter is not None or conversion.dtype not in (*MIXES, *LEGACY):
        return ""
    from llmprune_cli.formats.gguf.blocks.mixes import unpacked

    note = unpacked(checkpoint.config)
    return f"types of 8 bits and less: {note}" if note else ""


def _importance(checkpoint: Checkpoint, text: str, device: str, listener: Listener) -> dict[str, torch.Tensor]:
    """How much each input of each matrix matters on a text, see `measure_importance`.

    Raises:
        CheckpointError: no such text, or no tokenizer.
    """
    from llmprune_cli.commands.prune.decision import layer_device
    from llmprune_cli.coupling.subject import understand
    from llmprune_cli.formats.gguf.blocks.importance import measure_importance
    from llmprune_cli.run.calibration import prepare_calibration
    from llmprune_cli.run.layered_model import LayeredModel

    windows = prepare_calibration(Text(calibration=text), model_reader(checkpoint), SEED, listener.warn).fitted
    model = LayeredModel(understand(checkpoint), layer_device(device))
    listener.stage(f"Measuring importance on {windows.numel():,} tokens", model.layers)
    return measure_importance(model, windows, listener.advance)


def _why_not_verified(form: Format, checkpoint: Checkpoint, conversion: Conversion) -> str | None:
    """Why nothing is compared; None where it is.

    Raises:
        VerificationError: it has to be.
    """
    if conversion.verify is False:
        return "not asked for"
    reason = missing_runtime(form) or missing_memory(checkpoint)
    if conversion.verify and reason:
        raise VerificationError(f"The export cannot be verified: {reason}. Leave out --verify to write it anyway.")
    return reason


def source_manifest(checkpoint: Checkpoint) -> Manifest:
    """What the source's manifest says of how it was made, or else where it is from.

    Raises:
        CheckpointError: it does not say what a model card needs.
    """
    if not (checkpoint.companions / MANIFEST_NAME).is_file():
        return Manifest(source=checkpoint.source, revision=checkpoint.revision)
    manifest = read_manifest(checkpoint.companions)
    if manifest.is_pruned:
        tell_pruning(manifest, checkpoint.companions)
    return manifest
