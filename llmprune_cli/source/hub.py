"""Models on the hub: the files that a command needs, from the hub or from its cache."""

from __future__ import annotations

from pathlib import Path

from llmprune_cli.errors import CheckpointError, first_line
from llmprune_cli.folder.documents import read_json
from llmprune_cli.folder.shards import INDEX_NAME, NAMED_WEIGHTS, weight_sources
from llmprune_cli.folder.tensors import DTYPES, TensorEntry

MOST_SHARDS = 1000  # of which headers are asked for, one by one

WEIGHT_PATTERNS = ["*.safetensors", "*.safetensors.index.json"]
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
    from huggingface_hub import snapshot_download
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
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=SMALL_PATTERNS))
        if need_weights:
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=SMALL_PATTERNS + WEIGHT_PATTERNS))
            if not any(".safetensors" in path.name for path in weight_sources(folder)):
                folder = Path(snapshot_download(name, revision=revision, allow_patterns=SMALL_PATTERNS + BIN_PATTERNS))
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
