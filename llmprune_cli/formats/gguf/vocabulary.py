"""A checkpoint's tokenizer as a GGUF file holds it: byte-level BPE with a named pre-tokenizer, or SentencePiece."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune_cli.errors import CheckpointError, UnsupportedError
from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.progress import LOGGER
from llmprune_cli.source.tokenizer import load_tokenizer, reader_of
from llmprune_cli.startup.config_checks import vocabulary_of

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

# The text by whose tokens llama.cpp's converter recognises a pre-tokenizer.
CHECK = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 3 "
    "33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= "
    "нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure "
    "I'll make it, 'D you like some tea? We'Ve a'lL"
)
# llama.cpp's names by the SHA-256 of the list of that text's tokens, for tokenizers of the families written here.
BY_TOKENS: Mapping[str, str] = {
    "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5": "llama-bpe",  # Llama 3
    "c136ed14d01c2745d4f60a9596ae66800e2b61fa45643e72436041855ad4089d": "smaug-bpe",
    "63b97e4253352e6f357cc59ea5b583e3a680eaeaf2632188c2b952de2588485e": "tekken",  # Mistral Nemo
    "0e9433cbbb161f89e264eb32e8e64bfe69e834973ffca5d41d3948a604a3e2a3": "pixtral",
    "d5f1dd6f980fec569fb218a81a7658ac45fc56b38c5a0adeb1c232fbe04ef5ec": "seed-coder",
    "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249": "smollm",  # SmolLM, SmolLM2
    "049ecf7629871e3041641907f3de7c733e4dbfdc736f57d882ba0b0845599754": "deepseek-llm",
    "347715f544604f9118bb75ed199f68779f423cabb20db6de6f31b908d04d7821": "deepseek-coder",
    "b3f499bb4255f8ca19fccd664443283318f2fd2414d5e0b040fbdd0cc195d6c5": "deepseek-r1-qwen",
    "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",  # Qwen 1.5, 2, 2.5, 3
    "d4540891389ea895b53b399da6ac824becc30f2fba0e9ddbb98f92e55ca0e97c": "qwen2",
    "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454": "gpt-2",
    "0fe1cf6eda062318a1af7270f3331a85c539a01778ff948e24388e949c5282f4": "gpt-2",
    "b6dc8df998e1cfbdc4eac8243701a65afe638679230920b50d6f17d81c098166": "olmo",  # GPT-NeoX, OLMo, MPT
    "a8594e3edff7c29c003940395316294b2c623e09894deebbc65f33f1515df79e": "dbrx",  # OLMo 2, Phi-4
    "8aeee3860c56296a157a1fe2fad249ec40aa59b1bb5709f4ade11c4e6fe652ed": "falcon",
    "9d032fcbd5501f4a38150912590928bfb36091efb5df11b8e2124b0390e3fb1e": "falcon3",
    "35d91631860c815f952d711435f48d356ebac988362536bed955d43bfa436e34": "starcoder",  # StarCoder 2
    "6221ad2852e85ce96f791f476e0b390cf9b474c9e3d1362f53a24a06dc8220ff": "refact",  # Granite 3
    "ccc2ef013c104be7bae2965776d611e1d7a8a2a9c547dd93a682c9a9fc80352e": "gpt-4o",
    "fcace8b9cac38ce847670c970cd5892031a753a1ef381abd1d9af00f713da085": "phi-2",
}
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The same by rule, for a tokenizer whose vocabulary is another: expression or step, whether whole words beat merges.
BY_RULE: Mapping[tuple[tuple[str, ...], bool], str] = {
    (("bytes by words",), False): "gpt-2",
    (("single digits", "bytes by words"), False): "smollm",
    ((WORDS + r"\p{N}{1,3}" + REST, "bytes"), True): "llama-bpe",
    ((WORDS + r"\p{N}{1,3}" + REST, "bytes"), False): "dbrx",
    ((WORDS + r"\p{N}" + REST, "bytes"), False): "qwen2",
}
DEFAULT = "default"  # SentencePiece's
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
SPACE = "▁"
UNREACHABLE = -10000.0  # score of a token that no merge makes


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id, as many as the model has embeddings."""

    model: str  # llama.cpp's name of the algorithm
    pre_tokenizer: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...] = ()  # SentencePiece's
    space_prefix: bool | None = None  # whether text gets a space in front; SentencePiece's


def add_vocabulary(writer: GGUFWriter, checkpoint: Checkpoint) -> None:
    """Add tokens, merges, special tokens and chat template.

    Added tokens without an embedding are left out, as by llama.cpp's converter, and a warning names them.

    Raises:
        CheckpointError: no tokenizer, or one with more tokens of its own than the model has embeddings.
        UnsupportedError: a tokenizer of another kind, or with a pre-tokenizer that llama.cpp has no name for.
    """
    from gguf import SpecialVocab

    tokenizer = load_tokenizer(checkpoint)
    size = int(checkpoint.config.vocab_size)
    vocabulary = read_vocabulary(tokenizer, size)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre_tokenizer)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.space_prefix)
    rowless = [added.content for number, added in sorted(tokenizer.added_tokens_decoder.items()) if number >= size]
    if rowless:
        names = ", ".join(rowless)
        LOGGER.warning(f"{names} left out of the GGUF file: the model has {size:,} rows, and none for such a number.")
    with _quietly():  # it says the same again
        special = SpecialVocab(checkpoint.companions, load_merges=not vocabulary.scores, n_vocab=size)
    special.add_special_token = added_tokens(tokenizer)
    special.add_to_gguf(writer, quiet=True)


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep to itself what the package gguf warns of."""
    logger = logging.getLogger("gguf.vocab")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """Whether the tokenizer begins every text with its first and ends it with its last token."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    return {
        "bos": whole[0] == tokenizer.bos_token_id and whole[0] != plain[0],
        "eos": whole[-1] == tokenizer.eos_token_id and whole[-1] != plain[-1],
    }


def read_vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """The vocabulary of a fast tokenizer.

    Args:
        size: number of embeddings; tokens that the tokenizer lacks are filled up, added ones beyond them left out.

    Raises:
        CheckpointError, UnsupportedError: see `add_vocabulary`.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refused(f"a tokenizer of the kind {type(tokenizer).__name__}")
    described, vocabulary = json.loads(backend.to_str()), tokenizer.get_vocab()
    pre_tokenizer = _recognize(described, vocabulary, tokenizer(CHECK)["input_ids"], size)
    by_id = {number: token for token, number in vocabulary.items()}
    pieces = pre_tokenizer == DEFAULT
    rows = [_token(by_id.get(number), number, tokenizer, pieces) for number in range(size)]
    tokens, types = tuple(text for text, _ in rows), tuple(kind for _, kind in rows)
    if not pieces:
        return Vocabulary("gpt2", pre_tokenizer, tokens, types)
    scores = _scores(described["model"], by_id, size)
    return Vocabulary("llama", pre_tokenizer, tokens, types, scores, _space_prefix(described))


def knows_tokenizer(folder: Path) -> bool:
    """Whether the `tokenizer.json` of a model folder can be written: a quick look, which loads no tokenizer."""
    size, path = vocabulary_of(str(folder)), folder / "tokenizer.json"
    if size is None or not path.is_file():
        return False
    document = path.read_text(encoding="utf-8")
    try:
        reader = reader_of(document)
        _recognize(json.loads(document), reader.get_vocab(), reader.encode(CHECK).ids, size)
    except Exception:  # what tokenizers has against a file is of no kind of its own
        return False
    return True


def _recognize(described: Mapping[str, Any], vocabulary: Mapping[str, int], check: list[int], size: int) -> str:
    """llama.cpp's name for how a fast tokenizer splits text.

    Args:
        described: what it says of itself.
        vocabulary: ids by token.
        check: what it makes of `CHECK`.
        size: number of embeddings.

    Raises:
        CheckpointError, UnsupportedError: see `add_vocabulary`.
    """
    model = described["model"]
    if model["type"] != "BPE":
        raise _refused(f"a tokenizer of the kind {model['type']}")
    added = {token["id"] for token in described.get("added_tokens") or ()}
    highest = max({*vocabulary.values()} - added | {*check})
    if highest >= size:
        raise CheckpointError(f"The tokenizer has {highest + 1} tokens and the model {size} embeddings.")
    pieces = model.get("byte_fallback") and "<0x0A>" in model["vocab"]
    for step in _steps(described["normalizer"], "normalizers"):
        if step["type"] not in (("Prepend", "Replace") if pieces else ("NFC",)):
            raise _refused(f"this tokenizer's way of normalizing text ({step['type']})")
    return DEFAULT if pieces else name_pre_tokenizer(check, described)


def _token(token: str | None, number: int, tokenizer: PreTrainedTokenizerBase, pieces: bool) -> tuple[str, int]:
    """A token's text and llama.cpp's type of it."""
    from gguf import TokenType

    if token is None:
        return f"[PAD{number}]", TokenType.UNUSED
    added = tokenizer.added_tokens_decoder.get(number)
    if added is None:
        return token, TokenType.BYTE if BYTE_TOKEN.fullmatch(token) else TokenType.NORMAL
    if pieces and token == tokenizer.unk_token:
        return token, TokenType.UNKNOWN
    if added.special or re.fullmatch(r"<\|.*\|>|<｜.*｜>|<unused\d+>|<pad>|<mask>", token):
        return token, TokenType.CONTROL
    return token.replace(SPACE, " "), TokenType.USER_DEFINED


def _scores(model: Mapping[str, Any], by_id: Mapping[int, str], size: int) -> tuple[float, ...]:
    """Scores by which SentencePiece's algorithm merges in the order of the merges: the first makes the best token."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        ranks.setdefault("".join(merge if isinstance(merge, list) else merge.split(" ")), rank)
    return tuple(-float(ranks[token]) if token in ranks else UNREACHABLE for token in map(by_id.get, range(size)))


def _space_prefix(described: Mapping[str, Any]) -> bool:
    """Whether a tokenizer puts a space in front of a text, by its normalizer or its pre-tokenizer."""
    steps = [*_steps(described["normalizer"], "normalizers"), *_steps(described["pre_tokenizer"], "pretokenizers")]
    prepends = any(step["type"] == "Prepend" for step in steps)
    return prepends or any(step.get("prepend_scheme", "never") != "never" for step in steps)


def _steps(described: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    if described is None:
        return []
    return list(described.get(name, [])) if described["type"] == "Sequence" else [described]


def name_pre_tokenizer(check: list[int], described: Mapping[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer splits text: by its tokens of `CHECK`, or by its rule.

    Raises:
        UnsupportedError: neither is known.
    """
    known = BY_TOKENS.get(sha256(str(check).encode()).hexdigest())
    rule = tuple(_step(step) for step in _steps(described["pre_tokenizer"], "pretokenizers"))
    known = known or BY_RULE.get((rule, bool(described["model"].get("ignore_merges"))))
    if known is None:
        way = "this tokenizer's way of splitting text into words (its pre-tokenizer)"
        raise _refused(way, " It knows none whose vocabulary was cut: prune without --vocab-size for that.")
    return known


def _step(step: Mapping[str, Any]) -> str:
    """One step of a pre-tokenizer, in the words of `BY_RULE`."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": by_words}:
            return "bytes by words" if by_words else "bytes"
        case {"type": "Digits", "individual_digits": True}:
            return "single digits"
        case {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}:
            return str(expression)
    return json.dumps(step)


def _refused(what: str, more: str = "") -> UnsupportedError:
    return UnsupportedError(
        f"llama.cpp's name for {what} is not known here. If your llama.cpp knows it, pass its "
        f"convert_hf_to_gguf.py as --converter PATH, which then writes the file.{more}"
    )
