"""Inputs that somebody made to break a reader: how each is made, the command that meets it, and its exit code.

`python -m support.hostile_inputs`, run from `tests/`, tries all of them in a forked process, which has imported
everything already, and prints a line of JSON for each: its name, the exit code, the seconds, the memory that was taken
in bytes, and what was printed and left.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llmprune_cli.commands.evaluate
import llmprune_cli.commands.export  # noqa: F401 (imported once, for all forked processes)
from support.cli import BY_MAGNITUDE, run_cli
from support.tiny import BYTE_LEVEL_VOCABULARY, save_byte_level, save_tiny

SECONDS = 10  # after which a run is killed: five times what is allowed
HUGE, DEEP = 2**60, 100_000
PRUNE = ("prune", "MODEL", *BY_MAGNITUDE, "--pruning-ratio", "0.5", "--output", "OUT")
EVAL = ("eval", "MODEL", "--dataset", "TEXT", "--max-seq-len", "32", "--limit", "1", "--device", "cpu")
EXPORT = ("export", "MODEL", "--output", "OUT")
VERIFY = ("inspect", "MODEL", "--verify")
REPLAY = ("prune", "MODEL", *BY_MAGNITUDE, "--plan", "PLAN", "--output", "OUT")


@dataclass(frozen=True)
class Hostile:
    """One input."""

    make: Callable[[Path], object]  # changes a good model folder
    command: tuple[str, ...]
    codes: tuple[int, ...]  # any of which is right


INPUTS: dict[str, Hostile] = {}


def hostile(name: str, make: Callable[[Path], object], command: tuple[str, ...] = PRUNE, *codes: int) -> None:
    """Name an input."""
    assert name not in INPUTS, name
    INPUTS[name] = Hostile(make, command, codes or (3,))


def edit(file: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Change a JSON file of the model."""

    def make(folder: Path) -> None:
        document = json.loads((folder / file).read_text())
        change(document)
        (folder / file).write_text(json.dumps(document))

    return make


def content(file: str, data: bytes) -> Callable[[Path], object]:
    """Put other bytes in a file's place."""
    return lambda folder: (folder / file).write_bytes(data)


def sparse(file: str, size_bytes: int) -> Callable[[Path], object]:
    """Put a file of zeros in a file's place that takes no room on the disk."""

    def make(folder: Path) -> None:
        (folder / file).write_bytes(b"")
        os.truncate(folder / file, size_bytes)

    return make


def replaced(file: str, put: Callable[[Path], object]) -> Callable[[Path], object]:
    """Put something else than a file in its place."""

    def make(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        put(folder / file)

    return make


def moved_out(file: str) -> Callable[[Path], object]:
    """Put a link in a file's place, to the same bytes outside of the folder."""

    def make(folder: Path) -> None:
        elsewhere = folder.parent / "elsewhere"
        shutil.move(folder / file, elsewhere)
        (folder / file).symlink_to(elsewhere)

    return make


# --- safetensors ---------------------------------------------------------------------------------------------------

SHARD = "model-00001-of-00001.safetensors"
WEIGHTS, INDEX, CONFIG, PLAN, MANIFEST = (
    "model.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "plan.json",
    "llmprune.json",
)


def shard(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A file in the format of safetensors."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Change the header of the weights and leave the data as it is."""

    def make(folder: Path) -> None:
        whole = (folder / WEIGHTS).read_bytes()
        size = struct.unpack("<Q", whole[:8])[0]
        document = json.loads(whole[8 : 8 + size])
        change(document)
        (folder / WEIGHTS).write_bytes(shard(json.dumps(document).encode(), whole[8 + size :]))

    return make


def first(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Change what the header says of the first tensor."""
    return header(lambda document: change(document["lm_head.weight"]))


def twice(folder: Path) -> None:
    """Name one tensor twice in one header."""
    whole = (folder / WEIGHTS).read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    text = whole[8 : 8 + size].decode()
    entry = json.dumps(json.loads(text)["model.norm.weight"])
    doubled = text.rstrip().removesuffix("}") + ',"model.norm.weight":' + entry + "}"
    (folder / WEIGHTS).write_bytes(shard(doubled.encode(), whole[8 + size :]))


NORM = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
hostile("weights: empty", content(WEIGHTS, b""))
hostile("weights: seven bytes", content(WEIGHTS, b"\0" * 7))
hostile("weights: a header without end", content(WEIGHTS, shard(b"{}", length=2**63)))
hostile("weights: a header longer than the file", content(WEIGHTS, shard(b"{}", length=1000)))
hostile("weights: a header of nothing", content(WEIGHTS, shard(b"")))
hostile("weights: no JSON", content(WEIGHTS, shard(b"<html>")))
hostile("weights: a list", content(WEIGHTS, shard(b"[]")))
hostile("weights: no UTF-8", content(WEIGHTS, shard(b'{"\xff": 1}')))
hostile("weights: a deep header", content(WEIGHTS, shard(b'{"a":' * DEEP + b"1" + b"}" * DEEP)))
hostile("weights: zeros for a terabyte", sparse(WEIGHTS, 10**12))
hostile("weights: a header of 200 MB", lambda f: (sparse(WEIGHTS, 200 * 10**6)(f), patch(f / WEIGHTS, 199 * 10**6)))
hostile("weights: a tensor twice", twice)
hostile("weights: overlapping", first(lambda entry: entry.update(data_offsets=[4, 4 + entry["data_offsets"][1]])))
hostile("weights: out of range", first(lambda entry: entry.update(data_offsets=[0, HUGE])))
hostile("weights: backwards", first(lambda entry: entry.update(data_offsets=entry["data_offsets"][::-1])))
hostile("weights: negative offsets", first(lambda entry: entry.update(data_offsets=[-8, 8])))
hostile("weights: a huge shape", first(lambda entry: entry.update(shape=[HUGE, HUGE])))
hostile("weights: a negative shape", first(lambda entry: entry.update(shape=[-1, 64])))
hostile("weights: a fractional shape", first(lambda entry: entry.update(shape=[1.5, 64])))
hostile("weights: an unknown dtype", first(lambda entry: entry.update(dtype="X99")))
hostile("weights: a wrong dtype", first(lambda entry: entry.update(dtype="I32")))
hostile("weights: a quantized dtype", first(lambda entry: entry.update(dtype="F8_E4M3", shape=[384, 64])))
hostile("weights: another shape", first(lambda entry: entry.update(shape=entry["shape"][::-1])))
hostile("weights: a gap", header(lambda d: d.update(hole={**NORM, "data_offsets": [10**6, 10**6 + 16]})))
hostile("weights: a stranger", header(lambda document: document.update({"evil": document.pop("lm_head.weight")})))
hostile("weights: metadata of numbers", header(lambda document: document.update({"__metadata__": {"a": 1}})))
hostile("weights: cut short", lambda folder: os.truncate(folder / WEIGHTS, 50_000))
hostile(
    "weights: more than the header says", lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes() + b"x" * 9)
)
hostile("weights: a folder", replaced(WEIGHTS, lambda path: path.mkdir()))
hostile("weights: a pipe", replaced(WEIGHTS, os.mkfifo))
hostile("weights: a device", replaced(WEIGHTS, lambda path: path.symlink_to("/dev/zero")))
hostile("weights: a link to elsewhere", moved_out(WEIGHTS))
hostile("weights: a link to itself", replaced(WEIGHTS, lambda path: path.symlink_to(path)))


def patch(path: Path, length: int) -> None:
    """Write the length of a header into a file."""
    with path.open("r+b") as file:
        file.write(struct.pack("<Q", length))


# --- the index -----------------------------------------------------------------------------------------------------


def index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], object]:
    """Give the model an index, with something wrong in the map from tensors to files."""

    def make(folder: Path) -> None:
        document = read_index_of(folder)
        changed = change(document["weight_map"])
        if changed is not None:
            document["weight_map"] = changed
        (folder / INDEX).write_text(json.dumps(document))

    return in_a_shard(make)


def in_a_shard(change: Callable[[Path], object]) -> Callable[[Path], object]:
    """Give the one file of weights the name of a shard, so that the index counts, and change the index."""

    def make(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / SHARD)
        change(folder)

    return make


def read_index_of(folder: Path) -> dict[str, Any]:
    """An index of the one shard."""
    whole = (folder / SHARD).read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    names = [name for name in json.loads(whole[8 : 8 + size]) if name != "__metadata__"]
    return {"metadata": {}, "weight_map": dict.fromkeys(names, SHARD)}


def outside(path: str) -> Callable[[Path], object]:
    """Have the index name a file by some path."""
    return index(lambda names: dict.fromkeys(names, path))


def linked_shard(folder: Path) -> None:
    """Have the index name a link to the weights, which lie outside of the folder."""
    outside("shard.safetensors")(folder)
    shutil.move(folder / SHARD, folder.parent / "elsewhere")
    (folder / "shard.safetensors").symlink_to(folder.parent / "elsewhere")


hostile("index: an absolute path", outside("/etc/passwd"))
hostile("index: a path upwards", outside(f"../{SHARD}"))
hostile("index: a link to elsewhere", linked_shard)
hostile("index: a missing file", outside("no.safetensors"))
hostile("index: no name", outside(""))
hostile("index: the folder itself", outside("."))
hostile("index: a zero byte in a name", outside("a\0.safetensors"))
hostile("index: a name without end", outside("x" * 10_000))
hostile("index: a list", index(lambda names: [names]))
hostile("index: numbers", index(lambda names: dict.fromkeys(names, 1)))
hostile("index: a tensor that is not there", index(lambda names: names.update(evil=SHARD)))
hostile("index: a tensor left out", index(lambda names: names.pop("lm_head.weight") and None))
hostile("index: deep", in_a_shard(content(INDEX, b'{"weight_map":' * DEEP + b"1" + b"}" * DEEP)))
hostile("index: a terabyte", in_a_shard(sparse(INDEX, 10**12)))
hostile("index: a pipe", in_a_shard(replaced(INDEX, os.mkfifo)))
hostile("index: a million files", index(lambda names: {f"t{n}": f"f{n}.safetensors" for n in range(10**6)}))

# --- the configuration ---------------------------------------------------------------------------------------------


def setting(name: str, value: object) -> Callable[[Path], object]:
    """Change one setting."""
    return edit(CONFIG, lambda config: config.update({name: value}))


for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"):
    for value in (-1, 0, 10**12, "64", 64.5, [64], None, True):
        hostile(f"config: {name} is {value!r}", setting(name, value), PRUNE, 3, 4, 5)
hostile("config: a billion layers", setting("num_hidden_layers", 10**9))
hostile("config: heads of nothing", setting("head_dim", 0), PRUNE, 3, 4)
hostile("config: more KV heads than heads", setting("num_key_value_heads", 10**6), PRUNE, 3, 4)
hostile("config: other neurons than the tensors", setting("intermediate_size", 4096))
hostile("config: other layers than the tensors", setting("num_hidden_layers", 100))
hostile("config: no number", setting("rms_norm_eps", float("nan")), PRUNE, 3, 4)
hostile(
    "config: a number without end", content(CONFIG, b'{"model_type": "llama", "hidden_size": 1' + b"0" * 10**6 + b"}")
)
hostile("config: deep", content(CONFIG, b'{"a":' * DEEP + b"1" + b"}" * DEEP))
hostile("config: a terabyte", sparse(CONFIG, 10**12))
hostile("config: a million keys", edit(CONFIG, lambda c: c.update({f"k{n}": n for n in range(10**6)})), PRUNE, 3)
hostile("config: no UTF-8", content(CONFIG, b"\xff\xfe"))
hostile("config: a list as model type", setting("model_type", ["llama"]))
hostile("config: an unknown model type", setting("model_type", "../../evil"), PRUNE, 4)
hostile(
    "config: code of its own",
    lambda f: (setting("model_type", "evil")(f), setting("auto_map", {"AutoConfig": "evil.E"})(f)),
    PRUNE,
    4,
)
hostile("config: a word for the quantization", setting("quantization_config", "fp8"), PRUNE, 3, 4)
hostile("config: an unknown quantization", setting("quantization_config", {"quant_method": "evil"}), PRUNE, 3, 4)
hostile("config: a word for RoPE", setting("rope_parameters", "fast"), PRUNE, 3, 4)
hostile("config: RoPE of an unknown kind", setting("rope_parameters", {"rope_type": "evil"}), PRUNE, 3, 4)
hostile("config: kinds of a million layers", setting("layer_types", ["full_attention"] * 10**6), PRUNE, 3, 4)
hostile("config: a dtype that is code", setting("dtype", "os.system"), PRUNE, 3, 4)
hostile("config: a billion experts", edit(CONFIG, lambda c: c.update(model_type="mixtral", num_local_experts=10**9)))
hostile("config: a pipe", replaced(CONFIG, os.mkfifo))
hostile("config: a folder", replaced(CONFIG, lambda path: path.mkdir()))
hostile("config: a link to elsewhere", moved_out(CONFIG))
hostile("config: a link to a device", replaced(CONFIG, lambda path: path.symlink_to("/dev/zero")))

# --- plans ---------------------------------------------------------------------------------------------------------


def chosen(change: Callable[[dict[str, list[Any]]], object]) -> Callable[[Path], object]:
    """Change the neurons that a plan keeps."""
    return edit(PLAN, lambda plan: change(plan["keep"]["intermediate_size"]))


hostile("plan: deep", content(PLAN, b"[" * DEEP + b"]" * DEEP), REPLAY)
hostile("plan: a terabyte", sparse(PLAN, 10**12), REPLAY)
hostile("plan: a list", content(PLAN, b"[]"), REPLAY)
hostile("plan: a pipe", replaced(PLAN, os.mkfifo), REPLAY)
hostile("plan: a folder", replaced(PLAN, lambda path: path.mkdir()), REPLAY)
hostile("plan: a device", replaced(PLAN, lambda path: path.symlink_to("/dev/zero")), REPLAY)
hostile("plan: nothing kept", edit(PLAN, lambda plan: plan.update(keep={})), REPLAY, 3, 5)
hostile("plan: words as units", chosen(lambda units: units.update({"0": ["a"] * 24})), REPLAY)
hostile("plan: units that are not there", chosen(lambda units: units.update({"0": list(range(100, 124))})), REPLAY)
hostile("plan: negative units", chosen(lambda units: units.update({"0": list(range(-24, 0))})), REPLAY)
hostile("plan: a unit twice", chosen(lambda units: units.update({"0": [0] * 24})), REPLAY)
hostile("plan: a huge unit", chosen(lambda units: units.update({"0": [*range(23), 10**300]})), REPLAY)
hostile("plan: a layer that is not there", chosen(lambda units: units.update({"7": units.pop("0")})), REPLAY, 3, 5)
hostile("plan: huge widths", edit(PLAN, lambda plan: plan["before"].update(hidden_size=10**15)), REPLAY, 3, 5)
hostile(
    "plan: huge widths of what is chosen",
    edit(PLAN, lambda plan: plan["before"].update(intermediate_size=10**15)),
    REPLAY,
    3,
    5,
)
hostile("plan: words as widths", edit(PLAN, lambda plan: plan["before"].update(hidden_size="64")), REPLAY, 3, 5)
hostile("plan: an unknown field", edit(PLAN, lambda plan: plan.update(evil=1)), REPLAY)
hostile("plan: of another model", edit(PLAN, lambda plan: plan.update(fingerprint="0" * 64)), REPLAY, 3, 5)
hostile("plan: a number for a name", edit(PLAN, lambda plan: plan.update(importance=7)), REPLAY)
hostile("plan: words as deviations", edit(PLAN, lambda plan: plan.update(deviations=7)), REPLAY)

# --- manifests -----------------------------------------------------------------------------------------------------

hostile("manifest: deep", content(MANIFEST, b'{"a":' * DEEP + b"1" + b"}" * DEEP), EXPORT)
hostile("manifest: a terabyte", sparse(MANIFEST, 10**12), EXPORT)
hostile("manifest: a list", content(MANIFEST, b"[]"), EXPORT)
hostile("manifest: a pipe", replaced(MANIFEST, os.mkfifo), EXPORT)
hostile("manifest: words for widths", content(MANIFEST, b'{"widths": "all", "files": {}}'), EXPORT)
hostile("manifest: half of one", content(MANIFEST, b'{"widths": {"before": {}, "after": {}}}'), EXPORT)
hostile("manifest: nothing to verify", content(MANIFEST, b'{"files": []}'), VERIFY)
hostile("manifest: a path upwards", content(MANIFEST, b'{"files": {"../x": {"size_bytes": 1}}}'), VERIFY, 7)
hostile("manifest: an absolute path", content(MANIFEST, b'{"files": {"/dev/zero": {"size_bytes": 0}}}'), VERIFY, 7)
hostile("manifest: a zero byte", content(MANIFEST, b'{"files": {"a\\u0000": {}}}'), VERIFY, 3, 7)
hostile(
    "manifest: sizes that are words",
    content(MANIFEST, b'{"files": {"config.json": {"size_bytes": "1"}}}'),
    VERIFY,
    3,
    7,
)
hostile("manifest: no files at all", content(MANIFEST, b'{"files": {}}'), VERIFY, 7)

# --- pickles -------------------------------------------------------------------------------------------------------


class Evil:
    """What runs a command when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {MARK}",)


MARK = Path(tempfile.gettempdir(), f"hostile-{os.getpid()}-ran")


def as_bin(data: Callable[[], bytes]) -> Callable[[Path], object]:
    """Have a pickle instead of safetensors."""

    def make(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / "pytorch_model.bin").write_bytes(data())

    return make


def saved(value: object) -> bytes:
    """What `torch.save` makes of a value."""
    import torch

    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    """A zip archive."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return file.getvalue()


hostile("pickle: code", as_bin(lambda: pickle.dumps(Evil())))
hostile("pickle: code in a saved file", as_bin(lambda: saved({"lm_head.weight": Evil()})))
hostile("pickle: garbage", as_bin(lambda: b"\x80\x04garbage"))
hostile("pickle: a list", as_bin(lambda: saved([1, 2])))
hostile("pickle: no tensors", as_bin(lambda: saved({"a": "b"})))
hostile("pickle: an empty archive", as_bin(lambda: zipped({})))
hostile("pickle: a bomb in an archive", as_bin(lambda: zipped({"archive/data.pkl": b"\0" * 10**8})))
hostile("pickle: a pipe", lambda folder: ((folder / WEIGHTS).unlink(), os.mkfifo(folder / "pytorch_model.bin")))

# --- GGUF ----------------------------------------------------------------------------------------------------------


def gguf(data: bytes) -> Callable[[Path], object]:
    """A GGUF file beside the folder's other files."""
    return lambda folder: (folder / "model.gguf").write_bytes(data)


def gguf_text(text: bytes) -> bytes:
    """A string of the format."""
    return struct.pack("<Q", len(text)) + text


FROM_GGUF = ("prune", "MODEL/model.gguf", *PRUNE[2:])
LLAMA = gguf_text(b"general.architecture") + struct.pack("<I", 8) + gguf_text(b"llama")


def gguf_header(tensors: int, keys: int, rest: bytes = b"", version: int = 3) -> bytes:
    """The beginning of a file."""
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest


def gguf_array(kind: int, length: int) -> bytes:
    """A key with an array that claims some length."""
    return gguf_text(b"a") + struct.pack("<IIQ", 9, kind, length)


def gguf_tensor(dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    """What a header says of a tensor."""
    sizes = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return gguf_text(b"token_embd.weight") + sizes + struct.pack("<IQ", kind, offset)


hostile("gguf: no more than its name", gguf(b"GGUF"), FROM_GGUF)
hostile("gguf: another version", gguf(gguf_header(0, 0, version=99)), FROM_GGUF)
hostile("gguf: nothing in it", gguf(gguf_header(0, 0)), FROM_GGUF)
hostile("gguf: keys without end", gguf(gguf_header(0, HUGE, LLAMA)), FROM_GGUF)
hostile("gguf: tensors without end", gguf(gguf_header(HUGE, 1, LLAMA)), FROM_GGUF)
hostile("gguf: a text without end", gguf(gguf_header(0, 1, struct.pack("<Q", HUGE) + b"general")), FROM_GGUF)
hostile("gguf: an array without end", gguf(gguf_header(0, 2, LLAMA + gguf_array(4, HUGE))), FROM_GGUF)
hostile("gguf: texts without end", gguf(gguf_header(0, 2, LLAMA + gguf_array(8, HUGE))), FROM_GGUF)
hostile(
    "gguf: arrays in arrays",
    gguf(gguf_header(0, 2, LLAMA + gguf_array(9, 1) + struct.pack("<IQ", 9, 1) * 5000)),
    FROM_GGUF,
)
hostile(
    "gguf: a kind that is none", gguf(gguf_header(0, 2, LLAMA + gguf_text(b"a") + struct.pack("<I", 77))), FROM_GGUF
)
hostile("gguf: a huge tensor", gguf(gguf_header(1, 1, LLAMA + gguf_tensor((HUGE, HUGE)))), FROM_GGUF)
hostile("gguf: a tensor beyond the end", gguf(gguf_header(1, 1, LLAMA + gguf_tensor((4,), offset=HUGE))), FROM_GGUF)
hostile("gguf: a tensor of many dimensions", gguf(gguf_header(1, 1, LLAMA + gguf_tensor((1,) * 9))), FROM_GGUF)
hostile("gguf: a tensor of no kind", gguf(gguf_header(1, 1, LLAMA + gguf_tensor((4,), kind=9999))), FROM_GGUF)
hostile(
    "gguf: a number as its architecture",
    gguf(gguf_header(0, 1, gguf_text(b"general.architecture") + struct.pack("<II", 4, 7))),
    FROM_GGUF,
)
hostile("gguf: an unknown architecture", gguf(gguf_header(0, 1, LLAMA.replace(b"llama", b"evil!"))), FROM_GGUF, 3, 4)
hostile("gguf: a terabyte of zeros", lambda f: (gguf(b"GGUF")(f), os.truncate(f / "model.gguf", 10**12)), FROM_GGUF)
hostile("gguf: a pipe", lambda folder: os.mkfifo(folder / "model.gguf"), FROM_GGUF)

# --- tokenizers ----------------------------------------------------------------------------------------------------

TOKENIZER = "tokenizer.json"


def longer_vocabulary(folder: Path) -> None:
    """Tokens that the model has no embeddings for."""
    edit(TOKENIZER, lambda t: t["model"]["vocab"].update({c: n + 5000 for c, n in t["model"]["vocab"].items()}))(folder)


hostile("tokenizer: no JSON", content(TOKENIZER, b"{"), EVAL)
hostile("tokenizer: deep", content(TOKENIZER, b'{"a":' * DEEP + b"1" + b"}" * DEEP), EVAL)
hostile("tokenizer: a list", content(TOKENIZER, b"[]"), EVAL)
hostile("tokenizer: of another kind", edit(TOKENIZER, lambda t: t["model"].update(type="Evil")), EVAL)
hostile("tokenizer: of another model", longer_vocabulary, EVAL)
hostile("tokenizer: missing", lambda folder: (folder / TOKENIZER).unlink(), EVAL)
hostile("tokenizer: a pipe", replaced(TOKENIZER, os.mkfifo), EVAL)
hostile("tokenizer: a terabyte", sparse(TOKENIZER, 10**12), EVAL)
hostile("tokenizer: a terabyte to copy", sparse(TOKENIZER, 10**12))
hostile("licence: a terabyte", sparse("LICENSE", 10**12))
hostile(
    "tokenizer: code of its own",
    edit(
        "tokenizer_config.json", lambda t: t.update(auto_map={"AutoTokenizer": ["evil.E", None]}, tokenizer_class="E")
    ),
    EVAL,
    0,
    3,
)
hostile("tokenizer: a link to elsewhere", moved_out(TOKENIZER), EXPORT)

# --- names ---------------------------------------------------------------------------------------------------------

for name in (
    "../model",
    "a/b/c",
    "~/model",
    "C:\\model",
    "",
    "a\0b",
    "x" * 10_000,
    "a b",
    "/",
    ".",
    "a/../..",
    "évil/модель",
    "--",
):
    hostile(f"name: {name[:20]!r}", lambda folder: None, ("inspect", "--", name), 2, 3, 4)


# --- trying them ---------------------------------------------------------------------------------------------------


def make_model(folder: Path) -> None:
    """A good model, a plan for it and a text."""
    sizes = {"vocab_size": BYTE_LEVEL_VOCABULARY, "num_hidden_layers": 2}
    save_tiny(folder / "model", shard="1GB", **sizes)
    save_byte_level(folder / "model")
    (folder / "text.txt").write_text("It is only a text.\n" * 50)
    plan = ["--intermediate-size", "24", "--save-plan", folder / "model" / PLAN, "--dry-run"]
    run = run_cli("prune", folder / "model", *BY_MAGNITUDE, *plan)
    assert run.code == 0, run.stderr


def attempt(case: Hostile, good: Path, place: Path) -> dict[str, Any]:
    """Meet one input."""
    folder = place / "model"
    shutil.copytree(good / "model", folder)
    case.make(folder)
    words = {"OUT": str(place / "out"), "PLAN": str(folder / PLAN), "TEXT": str(good / "text.txt")}
    arguments = [words.get(word, word.replace("MODEL", str(folder))) for word in case.command]
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
    started, before = time.perf_counter(), status_bytes("VmRSS")
    signal.alarm(SECONDS)
    try:
        run = run_cli(*arguments)
        code, printed = run.code, run.stdout + run.stderr
    except BaseException:
        code, printed = 1, traceback.format_exc()
    signal.alarm(0)
    return {
        "code": code,
        "seconds": time.perf_counter() - started,
        "bytes": status_bytes("VmHWM") - before,
        "printed": printed[-3000:],
        "left": sorted(path.name for path in place.iterdir() if path.name not in ("model", "elsewhere")),
    }


def status_bytes(field: str) -> int:
    """What Linux says of this process's memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    return 0


def attempt_all(names: list[str], good: Path) -> None:
    """Meet inputs one after the other, and print a line of JSON for each."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (status_bytes("VmData") + 4 * 10**9, hard))  # the machine survives
    for name in names:
        with tempfile.TemporaryDirectory(dir=good.parent) as place:
            print(json.dumps({"name": name, **attempt(INPUTS[name], good, Path(place))}), flush=True)


def attempt_in_children(names: list[str], good: Path) -> None:
    """Meet inputs in a forked process, and in another from the next input on if one of them ends it."""
    while names:
        reader, writer = os.pipe()
        process = os.fork()
        if process == 0:
            os.dup2(writer, sys.stdout.fileno())
            attempt_all(names, good)
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as lines:
            met = [print(line, end="", flush=True) for line in lines]
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if code:
            ended = {"name": names[len(met)], "code": code, "seconds": SECONDS, "bytes": 0, "printed": "", "left": []}
            print(json.dumps(ended), flush=True)
        names = names[len(met) + 1 :]


def main() -> None:
    """Try all, or those whose names contain a word."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    with tempfile.TemporaryDirectory(prefix="hostile-") as name:
        good = Path(name, "good")
        good.mkdir()
        make_model(good)
        attempt_in_children([name for name in INPUTS if word in name], good)
        print(json.dumps({"name": "ran code", "code": int(MARK.exists())}))


if __name__ == "__main__":
    main()
