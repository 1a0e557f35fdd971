"""The readers of what other people made, each as a function of bytes, with good inputs to start from.

A reader may return or refuse (`LlmpruneError`); whatever else it raises is a finding.
"""

from __future__ import annotations

import json
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from support.cli import BY_MAGNITUDE, run_cli
from support.refusals import edit_json
from support.tiny import BYTE_LEVEL_VOCABULARY, save_byte_level, save_tiny

# What a manifest says of the text that a model was fitted on, and of how it does on others.
CALIBRATION = {
    "dataset": "a.txt:0.7,b.txt:0.3",
    "origin": "a.txt, b.txt",
    "split": "train",
    "tokens": 240,
    "seq_len": 40,
    "seed": 0,
    "kl": 0.1,
    "perplexity_before": 9.1,
    "perplexity_after": 9.5,
    "bits_per_byte_before": 1.1,
    "bits_per_byte_after": 1.2,
    "answers": [{"prompt": "Once", "before": " upon", "after": " again"}],
}


@dataclass(frozen=True)
class Reader:
    """One reader and where it finds its bytes."""

    file: str  # in a model folder
    read: Callable[[Path], object]  # the folder
    seeds: tuple[bytes, ...]


def read_headers(folder: Path) -> None:
    """The header of a shard."""
    from llmprune_cli.folder.shards import read_index

    read_index(folder / "alone")


def read_whole_index(folder: Path) -> None:
    """An index, beside the shards that it should name."""
    from llmprune_cli.folder.shards import read_index

    read_index(folder)


def read_stored_plan(folder: Path) -> None:
    """A plan."""
    from llmprune_cli.plan.document import read_plan

    read_plan(folder / "plan.json", 2**20)


def read_manifest(folder: Path) -> None:
    """A manifest: to verify a folder, to go on in another and in a model card, and for text that is known already."""
    from llmprune_cli.commands.export import source_manifest
    from llmprune_cli.errors import LlmpruneError
    from llmprune_cli.folder.checkpoint import Checkpoint
    from llmprune_cli.folder.integrity import check_files
    from llmprune_cli.formats.registry import load_format
    from llmprune_cli.report.model_card import write_card
    from llmprune_cli.run.calibration import SeenText

    with suppress(LlmpruneError):
        check_files(folder)
    checkpoint = Checkpoint(folder, "model", None, None, (), True, folder)  # type: ignore[arg-type]
    manifest = source_manifest(checkpoint)
    if manifest.is_pruned:
        seen = SeenText.of(manifest.calibration)
        if seen is not None:
            seen.places(1000, seen.share_of("a.txt", "train"))
        write_card(folder / "card", checkpoint, manifest, load_format("safetensors"), ())


def read_configuration(folder: Path) -> None:
    """A configuration, up to the names and shapes of the tensors that it asks for."""
    from llmprune_cli.family.skeleton import expected_index
    from llmprune_cli.family.widths import read_widths
    from llmprune_cli.source.configuration import read_config

    config = read_config(folder, trust_remote_code=False)
    expected_index(config)
    read_widths(config)


def read_gguf(folder: Path) -> None:
    """The header of a GGUF file."""
    from llmprune_cli.source.gguf.reading import describe_gguf

    describe_gguf(folder / "model.gguf", None)


READS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "header": ("alone/model.safetensors", read_headers),
    "index": ("model.safetensors.index.json", read_whole_index),
    "plan": ("plan.json", read_stored_plan),
    "manifest": ("llmprune.json", read_manifest),
    "config": ("config.json", read_configuration),
    "gguf": ("model.gguf", read_gguf),
}


@contextmanager
def model_folder() -> Iterator[Path]:
    """A tiny model in all forms that are read."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        source, pruned = folder / "source", folder / "model"
        sizes = {"vocab_size": BYTE_LEVEL_VOCABULARY, "num_hidden_layers": 1, "hidden_size": 32}
        save_tiny(source, shard="100MB", **sizes)
        save_byte_level(source)
        plan = ("--intermediate-size", "24", "--save-plan", folder / "plan.json", "--max-shard-size", "60KB")
        run = run_cli("prune", source, *BY_MAGNITUDE, *plan, "--output", pruned)
        assert run.code == 0, run.stderr
        run = run_cli("export", source, "--format", "gguf", "--no-verify", "--output", folder / "gguf")
        assert run.code == 0, run.stderr
        edit_json(pruned / "llmprune.json", lambda manifest: manifest.update(calibration=CALIBRATION))
        (folder / "plan.json").rename(pruned / "plan.json")
        next((folder / "gguf").glob("*.gguf")).rename(pruned / "model.gguf")
        for name in ("alone", "card"):
            (pruned / name).mkdir()
        shutil.copyfile(next(pruned.glob("model-00001-*")), pruned / "alone" / "model.safetensors")
        yield pruned


def reader(name: str, folder: Path) -> Reader:
    """One reader, with what it finds in a good folder."""
    file, read = READS[name]
    good = (folder / file).read_bytes()
    if name == "header":
        good = good[: 8 + struct.unpack("<Q", good[:8])[0]] + bytes(64)
    if name == "gguf":
        good = good[:6000]
    return Reader(file, read, (good, *((json.dumps(json.loads(good)).encode(),) if good[:1] == b"{" else ())))


def attempt(chosen: Reader, folder: Path, data: bytes) -> BaseException | None:
    """What a reader raises that it may not."""
    from llmprune_cli.errors import LlmpruneError

    (folder / chosen.file).write_bytes(data)
    try:
        chosen.read(folder)
    except LlmpruneError:
        return None
    except Exception as error:
        return error
    return None


def mutated(document: Any, path: list[int], value: Any) -> Any:
    """A JSON document in which another value stands at some place; the path is counted modulo what there is."""
    if not path or not isinstance(document, dict | list) or not document:
        return value
    if isinstance(document, list):
        at = path[0] % len(document)
        return [*document[:at], mutated(document[at], path[1:], value), *document[at + 1 :]]
    key = list(document)[path[0] % len(document)]
    return {**document, key: mutated(document[key], path[1:], value)}
