"""What can be told of a model argument in a moment, from names and small files, before any library is loaded."""

from __future__ import annotations

import json
import math
import re
import struct
import sys
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from llmprune_cli.errors import CheckpointError, MissingPackageError, PlanError
from llmprune_cli.folder.documents import check_regular, is_there, read_json
from llmprune_cli.options import ModelReference
from llmprune_cli.sizes import Budget, size_text
from llmprune_cli.startup.config_checks import MERGE, MOST_BYTES, describe_adapter, read_settings

MOST_HEADER_BYTES = 100 * 10**6
HUB_ID = r"[\w.-]+(/[\w.-]+)?"
LONGEST_ID = 96  # characters of a hub id, at most
MAGIC = b"GGUF"
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
SENTENCEPIECE = "tokenizer.model"
NEEDED = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}  # to read it, by module
GPUS = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # one of which Linux has where torch finds CUDA


def check_model(reference: ModelReference, needs_weights: bool) -> None:
    """Refuse an argument that names no model, or one for another purpose; what is on the hub passes.

    Raises:
        CheckpointError: nothing there, or no model.
        UnsupportedError: a model for another purpose, or a package that is missing.
    """
    path = Path(reference.name)
    _check_device(reference.device)
    if not is_there(path):
        is_path = path.suffix == ".gguf" or reference.name.startswith((".", "/", "~")) or reference.name.count("/") > 1
        if is_path or len(reference.name) > LONGEST_ID:
            raise CheckpointError(f"{path} does not exist. Check the path of the model.")
        _check_cached(reference)
        return
    if path.suffix == ".gguf":
        _check_gguf(path)
    elif not path.is_dir():
        raise CheckpointError(f"{path} is neither a model folder nor a .gguf file. {_instead_of(path)}")
    else:
        _check_folder(path, needs_weights)


def _check_cached(reference: ModelReference) -> None:
    """Refuse what no repository is called, and what is not in the hub's cache where the hub is not to be asked.

    Raises:
        CheckpointError: see above.
    """
    from huggingface_hub import constants

    name = reference.name
    if not re.fullmatch(HUB_ID, name):
        raise CheckpointError(f"{name!r} is neither an existing path nor a hub id. Check the path of the model.")
    cached = Path(constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}")
    if constants.HF_HUB_OFFLINE and not is_there(cached):
        raise CheckpointError(
            f"{name} is neither a local path nor in the hub cache, and HF_HUB_OFFLINE keeps the hub from being asked. "
            f"{_near(name)}Check the name, or unset HF_HUB_OFFLINE."
        )


def _near(name: str) -> str:
    """A question about the path beside which a name is hardly another one; nothing where there is none."""
    path = Path(name)
    if not path.parent.is_dir():
        return ""
    found = get_close_matches(path.name, [own.name for own in path.parent.iterdir()], 1)
    return f"Did you mean {path.parent / found[0]}? " if found else ""


def _instead_of(file: Path) -> str:
    """What to give for a file that is no model."""
    has_model = (file.parent / "config.json").is_file()
    return f"Give the folder: {file.parent}." if has_model else "Give one of these, or an id of the hub (ORG/NAME)."


def has_weights(model: str) -> bool:
    """Whether a model's weights are here, in its folder or file; those on the hub are not."""
    path = Path(model)
    if path.suffix == ".gguf":
        return is_there(path)
    return any(True for pattern in WEIGHTS for _ in path.glob(pattern)) if is_there(path) and path.is_dir() else False


def check_tokenizer(model: str) -> None:
    """Refuse a tokenizer that packages are missing for.

    Raises:
        MissingPackageError: see above.
    """
    folder = Path(model)
    path = folder / SENTENCEPIECE
    is_alone = path.is_file() and not (folder / "tokenizer.json").exists()
    if is_alone and _beginning(path, 1) == b"\n" and missing_packages():  # as its format begins, and tiktoken's not
        refuse_without_packages(model)


def missing_packages() -> list[str]:
    """Those that reading `tokenizer.model` needs and that are not installed."""
    return [package for package, module in NEEDED.items() if not _is_installed(module)]


def refuse_without_packages(model: str) -> NoReturn:
    """Say which packages a tokenizer needs.

    Raises:
        MissingPackageError: always.
    """
    missing = missing_packages()
    raise MissingPackageError(
        f"{model} has its tokenizer in {SENTENCEPIECE} alone, and reading that needs {' and '.join(missing)}: "
        f"pip install {' '.join(missing)}."
    )


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package above it is missing
        return False


def _check_gguf(path: Path) -> None:
    check_regular(path)
    if _beginning(path, len(MAGIC)) != MAGIC:
        raise CheckpointError(f"{path} is not a GGUF file. Download it again.")
    if find_spec("gguf") is None:
        raise MissingPackageError("Reading a GGUF file needs the gguf package: pip install 'llmprune[gguf]'")


def _beginning(path: Path, count: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(count)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error


def _check_folder(folder: Path, needs_weights: bool) -> None:
    read_settings(folder)
    if needs_weights and not any(True for pattern in WEIGHTS for _ in folder.glob(pattern)):
        adapter = describe_adapter(folder)
        if adapter:
            raise CheckpointError(f"{folder} holds {adapter} and no weights. {MERGE} and give the merged model.")
        if not any(folder.glob("*.safetensors.index.json")):
            raise CheckpointError(f"{folder} has no weights (*.safetensors or pytorch_model*.bin), which this needs.")


def _check_device(device: str) -> None:
    """Refuse a kind of device that this system cannot have; torch knows about the others.

    Raises:
        CheckpointError: see above.
    """
    has_none = sys.platform == "linux" and not any(Path(gpu).exists() for gpu in GPUS)
    if (device.startswith("cuda") and has_none) or (device == "mps" and sys.platform != "darwin"):
        raise CheckpointError(f"There is no device {device!r} on this machine. Try --device cpu.")


# --- targets --------------------------------------------------------------------------------------------------------


def check_target(budget: Budget | None, model: str, tokens_may_go: bool = False) -> None:
    """Refuse a size that headers alone say to be more than the model, or less than its embedding.

    Args:
        tokens_may_go: whether the embedding can shrink.

    Raises:
        PlanError: see above.
    """
    if budget is None or budget.kind == "speedup" or (budget.dtype, budget.context) != (None, None):
        return
    if budget.kind == "share" and budget.amount >= 1:
        raise PlanError("A target of 100% removes nothing. Ask for a smaller share.")
    counted = _stored_sizes(Path(model))
    if counted is None:
        return
    whole, embedding, size_bytes, embedding_bytes = counted
    most, least = (size_bytes, embedding_bytes) if budget.kind == "bytes" else (whole, embedding)
    limit = budget.limit(whole, size_bytes)

    def amount(number: float) -> str:
        return f"{number:,.0f} bytes ({size_text(number)})" if budget.kind == "bytes" else f"{number:,.0f} parameters"

    if limit >= most:
        raise PlanError(
            f"The model has {amount(most)}, so a target of {amount(limit)} removes nothing. Ask for less, such as 85%: "
            f"{amount(0.85 * most)}."
        )
    if limit <= least and not tokens_may_go:
        raise PlanError(
            f"A target of {amount(limit)} is out of reach: the least is more than {amount(least)}, which the largest "
            f"tensor outside the layers has alone. Ask for clearly more, such as half of the model's {amount(most)}."
        )


def _stored_sizes(folder: Path) -> tuple[int, int, int, int] | None:
    """Parameters and bytes by the headers of safetensors files, of all tensors and of the largest outside the layers.

    None where they say nothing of the kind: other weights, quantized ones, or damage, which others find.
    """
    try:
        settings = read_json(folder / "config.json", MOST_BYTES) if folder.is_dir() else {}
        headers = [_header(path) for path in sorted(folder.glob("*.safetensors"))] if settings else []
    except (CheckpointError, OSError, ValueError, struct.error):
        return None
    if not headers or "quantization_config" in settings or "text_config" in settings:
        return None
    counted = []
    try:
        for name, own in (item for header in headers for item in header.items() if item[0] != "__metadata__"):
            first, end = own["data_offsets"]
            in_layers = any(part.isdigit() for part in name.split("."))
            counted.append((math.prod(own["shape"]), end - first, in_layers))
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    outside = max(((count, size) for count, size, in_layers in counted if not in_layers), default=(0, 0))
    return sum(c for c, _, _ in counted), outside[0], sum(s for _, s, _ in counted), outside[1]


def _header(path: Path) -> dict[str, Any]:
    check_regular(path)
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > MOST_HEADER_BYTES:
            raise ValueError(length)
        return dict(json.loads(file.read(length)))
