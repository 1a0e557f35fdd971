"""How a byte-level tokenizer out of a GGUF file splits text, where transformers passes over what the file says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune_cli.progress import LOGGER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PRE_TOKENIZER = "tokenizer.ggml.pre"  # llama.cpp's name of the way in which text is split
# Where a word that is a token is read as that one, whether merges make it or not.
WHOLE_WORDS = (
    *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
    *("tekken", "minicpm5", "youtu", "granite-embed-multi-97m"),
)
# Where every digit stands alone, and all else is split as by GPT-2.
SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2")
LIKE_GPT2 = (
    *("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4", "gigachat", "a.x-4.0"),
    *("mellum", "modern-bert", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "jina-v1-en", "jina-v2-code"),
    "roberta-bpe",
)
BY_WORDS = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}  # GPT-2's way
DIGITS = {"type": "Digits", "individual_digits": True}


def split_as_said(tokenizer: PreTrainedTokenizerBase, header: Mapping[str, Any], path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer with the tokens of its file alone, and the way to split text that the file names.

    transformers gives every byte-level vocabulary GPT-2's class, which brings a token of its own, `<|endoftext|>`; it
    merges words that llama.cpp takes whole, and splits by GPT-2's rule where it does not know the name.

    Args:
        header: the fields of the file's header, by name.
    """
    from tokenizers import Tokenizer

    described = json.loads(tokenizer.backend_tokenizer.to_str())
    if described["model"]["type"] != "BPE":
        return tokenizer
    in_file = [own for own in described["added_tokens"] if own["content"] in described["model"]["vocab"]]
    said = {**described, "added_tokens": in_file, **_splitting(described, header, path)}
    if said != described:
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(said))
    return tokenizer


def _splitting(described: dict[str, Any], header: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What differs in the description of a tokenizer from what transformers makes of its file."""
    if described["model"].get("byte_fallback"):  # one that splits at spaces alone
        return {}
    field = header.get(PRE_TOKENIZER)
    name = str(field.contents()) if field is not None else "default"
    if name in WHOLE_WORDS:
        return {"model": {**described["model"], "ignore_merges": True}}
    if described["pre_tokenizer"] != BY_WORDS or name in LIKE_GPT2:
        return {}
    if name in SINGLE_DIGITS:
        return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [DIGITS, BY_WORDS]}}
    LOGGER.warning(
        f"{path} splits text into words in a way ({name}) that is not known here, and is read as if it were GPT-2's. "
        "Where that matters, give the folder that the file was made from."
    )
    return {}
