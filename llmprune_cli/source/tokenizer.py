"""What travels with the weights: the tokenizer, chat templates and the generation config."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune_cli.errors import CheckpointError, first_line
from llmprune_cli.family.skeleton import is_remote
from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.folder.documents import is_there, read_json
from llmprune_cli.startup.model_argument import SENTENCEPIECE, missing_packages, refuse_without_packages
from llmprune_cli.text.windows import Reader

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

MOST_COMPANION_BYTES = 2**28  # the largest tokenizers have 35 MB
# Files that travel with the weights; everything else in a model folder belongs to the weights or to other runtimes.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
VOCABULARIES = ("vocab.json", "vocab.txt", "merges.txt", "tekken.json", "*.model", "*.tiktoken")  # of tokens
# Where the code of a tokenizer names files of its own with tokens, and their names there.
NAMED_FILES = re.compile(r"vocab_files_names\b[^={\n]*=\s*\{([^}]*)\}", re.IGNORECASE)
FILE_NAME = re.compile(r":\s*[\"']([\w.-]+)[\"']")
NEVER_TOKENS = ("config.json", "*.index.json", "*.safetensors", "*.bin", "*.gguf", "*.py")  # whatever code names
OF_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
AS_IT_IS = ("TokenizersBackend", "PreTrainedTokenizerFast")  # classes that run tokenizer.json as it is
SPLIT_SAMPLE = "In 2024, 12,345 dogs didn't walk;  \n\n\tif x == 10: return 'né'"
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")  # of what is seen


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer.

    Raises:
        CheckpointError: there is none, or one of absurd size.
        MissingPackageError: what it needs is not installed.
    """
    from transformers import AutoTokenizer

    folder, source = checkpoint.companions, checkpoint.source
    for name in COMPANIONS:
        _check_size(folder / name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=checkpoint.trust_remote_code)
    except Exception as error:  # tokenizers of every kind raise every kind
        if (folder / SENTENCEPIECE).is_file() and missing_packages():
            refuse_without_packages(source)
        if not has_tokenizer(folder):
            raise CheckpointError(
                f"{source} has no tokenizer, which this needs. Put the model's own beside its weights "
                "(tokenizer.json and tokenizer_config.json)."
            ) from error
        raise CheckpointError(
            f"{source} has no usable tokenizer, which this needs: transformers cannot load its own "
            f"({first_line(error).rstrip('.')}). Download its files again."
        ) from error
    result: PreTrainedTokenizerBase = tokenizer
    return result


def model_reader(checkpoint: Checkpoint) -> Reader:
    """How a checkpoint reads text.

    Raises:
        CheckpointError, MissingPackageError: see `load_tokenizer`.
    """
    return Reader(load_tokenizer(checkpoint), checkpoint.config.get_text_config().vocab_size, longest_text(checkpoint))


def longest_text(checkpoint: Checkpoint) -> int | None:
    """Tokens that a checkpoint can attend to, if it says so."""
    longest: int | None = getattr(checkpoint.config.get_text_config(), "max_position_embeddings", None)
    return longest


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has any file of a tokenizer."""
    return any((folder / name).is_file() for name in OF_TOKENIZERS)


def reader_of(document: str) -> Tokenizer:
    """What reads whole texts as a `tokenizer.json` says, which may hold the cut and the padding of its last call."""
    from tokenizers import Tokenizer

    reader = Tokenizer.from_str(document)
    reader.no_truncation()
    reader.no_padding()
    return reader


def warn_of_other_reading(
    checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, warn: Callable[[str], None]
) -> None:
    """Warn where `tokenizer.json` says to cut texts, or to split them otherwise than transformers does."""
    path, name = checkpoint.companions / "tokenizer.json", type(tokenizer).__name__
    if not path.is_file() or not hasattr(tokenizer, "backend_tokenizer"):
        return
    length = (tokenizer.backend_tokenizer.truncation or {}).get("max_length")
    longest = longest_text(checkpoint)
    if length and (not longest or length < longest):
        warn(
            f"The tokenizer.json of {checkpoint.source} cuts texts to {length:,} tokens, as it was left by a call with "
            "truncation. They are read whole here, as transformers reads them; what reads that file alone cuts them. "
            'Set "truncation" to null in it.'
        )
    if name in AS_IT_IS:
        return
    try:
        reader = reader_of(path.read_text(encoding="utf-8"))
    except Exception:  # a file that the library cannot read says nothing; the class could
        return
    said = reader.encode(SPLIT_SAMPLE, add_special_tokens=False).ids
    if said != tokenizer(SPLIT_SAMPLE, add_special_tokens=False)["input_ids"]:
        warn(
            f"transformers reads the tokenizer of {checkpoint.source} as a {name}, which splits text otherwise than "
            f'its tokenizer.json says, so it may not be read as it was in training. "tokenizer_class": '
            '"PreTrainedTokenizerFast" in tokenizer_config.json makes it read the file.'
        )


def copy_companions(checkpoint: Checkpoint, target: Path) -> None:
    """Copy tokenizer, chat templates and generation config as they are, and the code that these and the model name.

    Raises:
        CheckpointError: one of them cannot be read.
    """
    for source in companions_of(checkpoint):
        place = target / source.relative_to(checkpoint.companions)
        place.parent.mkdir(exist_ok=True)
        copy_small(source, place)


def companions_of(checkpoint: Checkpoint) -> list[Path]:
    """The files that `copy_companions` copies."""
    folder = checkpoint.companions
    named = [folder / name for name in (*COMPANIONS, *(PROCESSORS if checkpoint.whole else ()))]
    further = [path for path in vocabulary_files(folder) if path not in named]
    templates = sorted(folder.glob("additional_chat_templates/*.jinja"))
    return [*(path for path in named if path.is_file()), *further, *templates, *_code_of(checkpoint)]


def vocabulary_files(folder: Path) -> list[Path]:
    """The files that hold tokens beside `tokenizer.json`, as they are usually called or as the tokenizer's class says.

    What is larger than any vocabulary is none.
    """
    found = {path for pattern in VOCABULARIES for path in folder.glob(pattern)}
    found |= {folder / name for name in (*_named_by_class(folder), *_named_by_code(folder)) if name not in COMPANIONS}
    return sorted(path for path in found if path.is_file() and path.stat().st_size <= MOST_COMPANION_BYTES)


def _named_by_class(folder: Path) -> Iterator[str]:
    """The files with tokens that the tokenizer's class names, where it is one of transformers'."""
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    with suppress(Exception):  # a class that is not there, or lacks a package, says so in its own way
        named: Any = tokenizer_class_from_name(str(_settings(folder).get("tokenizer_class")))
        yield from named.vocab_files_names.values()


def _named_by_code(folder: Path) -> Iterator[str]:
    """The files with tokens that a tokenizer's own code names; nothing here runs it."""
    for path in folder.glob("*.py") if _settings(folder).get("auto_map") else ():
        if path.is_file() and path.stat().st_size <= MOST_COMPANION_BYTES:
            for files in NAMED_FILES.findall(path.read_text(encoding="utf-8", errors="replace")):
                names = FILE_NAME.findall(files)
                yield from (name for name in names if not any(map(Path(name).match, NEVER_TOKENS)))


def _settings(folder: Path) -> dict[str, Any]:
    """What `tokenizer_config.json` says, if it is there."""
    path = folder / "tokenizer_config.json"
    return read_json(path, MOST_COMPANION_BYTES) if path.is_file() else {}


def _code_of(checkpoint: Checkpoint) -> list[Path]:
    """The Python files of a model or a tokenizer whose class came with it; nothing here runs them."""
    named = _settings(checkpoint.companions).get("auto_map")
    return sorted(checkpoint.companions.glob("*.py")) if named or is_remote(checkpoint.config) else []


def _check_size(path: Path) -> None:
    size = path.stat().st_size if is_there(path) else 0
    if size > MOST_COMPANION_BYTES:
        most = f"{MOST_COMPANION_BYTES:,}"
        raise CheckpointError(f"{path} has {size:,} bytes, and files of its kind at most {most}. Download it again.")


def copy_small(source: Path, target: Path) -> None:
    """Copy a file that fits into memory.

    Raises:
        CheckpointError: it cannot be read, or has absurd size.
    """
    _check_size(source)
    try:
        content = source.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{source} cannot be read: {error.strerror}.") from error
    target.write_bytes(content)
