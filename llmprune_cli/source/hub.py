"""Models on the hub: the files that a command needs, from the hub or from its cache."""

from __future__ import annotations

from collections.abc import Iterable
from glob import escape
from pathlib import Path

from llmprune_cli.errors import CheckpointError, first_line
from llmprune_cli.folder.documents import read_json
from llmprune_cli.folder.shards import INDEX_NAME, NAMED_WEIGHTS, SINGLE_NAME, weight_names, weight_sources
from llmprune_cli.folder.tensors import DTYPES, TensorEntry

MOST_SHARDS = 1000  # of which headers are asked for, one by one

BIN_PATTERNS = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
SMALL_PATTERNS = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py", "README.md", "LICEN[SC]E*", "NOTICE*"]


def fetch(name: str, revision: str | None, need_weights: bool) -> tuple[Path, str]:
    """A snapshot of a repository.

    Args:
        need_weights: without it, only small files are fetched.

    Returns:
        The folder, and the commit.

    Raises:
        CheckpointError: there is no such repository, or none that can be had.
    """
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise CheckpointError(f"{name} does not exist.")
    disable_progress_bars()
    try:
        folder = _snapshot(name, revision, [])
        if need_weights:
            _fetch_weights(name, folder)
    except HFValidationError:
        raise CheckpointError(f"{name!r} is neither an existing path nor a hub id.") from None
    except LocalEntryNotFoundError as error:
        where = f" at revision {revision}" if revision else ""
        raise CheckpointError(
            f"{name}{where} is neither a local path nor in the hub cache, and the hub cannot be reached. "
            "Check the name, the connection and HF_HUB_OFFLINE."
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name} is neither a local path nor a model on the hub that you may read. For a private or gated model, "
            "log in with `hf auth login`."
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"{name} could not be fetched from the hub: {first_line(error)}") from error
    return folder, folder.name


def _snapshot(name: str, revision: str | None, patterns: Iterable[str]) -> Path:
    """The folder of a revision, with its small files and those that match a pattern."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, revision=revision, allow_patterns=[*SMALL_PATTERNS, *patterns]))


def _fetch_weights(name: str, folder: Path) -> None:
    """Get the files that transformers reads the weights from, and no other copy of them that a repository may hold.

    Args:
        folder: the snapshot of the small files, called by its commit, at which the weights are had as well.

    Raises:
        CheckpointError: see `weight_sources` and `weight_names`.
    """
    config = folder / "config.json"
    named = read_json(config).get(NAMED_WEIGHTS) if config.is_file() else None
    _snapshot(name, folder.name, [escape(named if isinstance(named, str) else SINGLE_NAME)])
    sources = [path for path in weight_sources(folder)[:1] if ".safetensors" in path.name]
    patterns = [escape(file) for source in sources for file in weight_names(source)]
    _snapshot(name, folder.name, patterns or BIN_PATTERNS)


def read_headers(name: str, commit: str, folder: Path) -> tuple[TensorEntry, ...]:
    """The tensors of a repository by the headers of its safetensors files, which are read without the weights.

    Args:
        folder: the snapshot of its small files.

    Returns:
        Entries without a shard; none where the hub cannot be asked, or does not know.
    """
    from huggingface_hub import HfApi

    try:
        if NAMED_WEIGHTS in read_json(folder / "config.json"):
            return ()
        if (folder / INDEX_NAME).exists():
            weight_map = read_json(folder / INDEX_NAME)["weight_map"]
            if len({*weight_map.values()}) > MOST_SHARDS:
                return ()
        found = HfApi().get_safetensors_metadata(name, revision=commit)
        shards = sorted(found.files_metadata.items())
        named = [(shard, *item) for shard, file in shards for item in file.tensors.items()]
        if {own: shard for shard, own, _ in named} != found.weight_map:
            return ()
        named.sort(key=lambda item: (item[0], item[2].data_offsets))
        return tuple(TensorEntry(own, tuple(info.shape), DTYPES[info.dtype].code, None) for _, own, info in named)
    except Exception:  # whatever the hub or its files are up to: config.json says enough
        return ()
