"""The header of a GGUF file without its vocabulary, whose hundreds of thousands of entries take readers long."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from llmprune_cli.errors import UnsupportedError

LONGEST = 4096  # entries of a list that says something about layers; longer ones are the vocabulary
ROPE_FACTORS = "rope_freqs.weight"  # the one tensor that belongs to the configuration
TOKENS, COUNT = "tokenizer.ggml.tokens", "llmprune.tokens"  # the list, and in its place how long it is
PARTS, PART = "split.count", "split.no"  # of a model in several files
UINT32 = 4  # in the format's own numbering


def header_of(path: Path, folder: Path) -> Path:
    """A file with a GGUF file's header, but for its vocabulary, in a folder; where its tensors would be is a hole.

    Raises:
        UnsupportedError: the file is one of several parts.
        Exception: whatever the reader raises for a broken file.
    """
    reader, left_out = read_briefly(path)
    parts = int(reader.fields[PARTS].contents()) if PARTS in reader.fields else 1
    if parts > 1:
        number = int(reader.fields[PART].contents()) + 1 if PART in reader.fields else "one"
        raise UnsupportedError(
            f"It is part {number} of {parts}. Join them with `llama-gguf-split --merge FIRST_PART OUT`, and give the "
            "result."
        )
    if not left_out or not reader.tensors:
        return path
    settings, count = _settings(reader, left_out)
    infos = [tensor.field for tensor in reader.tensors]
    last = infos[-1]
    tensors = bytes(reader.data[infos[0].offset : last.offset + sum(part.nbytes for part in last.parts)])
    version = int(reader.fields["GGUF.version"].parts[0][0])
    head = struct.pack("<4sIQQ", b"GGUF", version, len(infos), count)
    data = len(head) + len(settings) + len(tensors)
    data += -data % reader.alignment
    brief = folder / path.name
    with brief.open("wb") as file:
        file.write(head + settings + tensors)
        file.truncate(data + len(reader.data) - reader.data_offset)
        for tensor in reader.tensors:
            if tensor.name == ROPE_FACTORS:
                file.seek(data + tensor.data_offset - reader.data_offset)
                file.write(tensor.data.tobytes())
    return brief


def read_briefly(path: Path) -> tuple[Any, dict[int, int]]:
    """A reader that steps over long lists, and their lengths by the places of their values in the file.

    Raises:
        Exception: whatever the reader raises for a broken file.
    """
    from gguf import GGUFReader, GGUFValueType

    left_out: dict[int, int] = {}

    class Brief(GGUFReader):
        """See above."""

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            is_list = GGUFValueType(raw_type) == GGUFValueType.ARRAY and self.byte_order == "I"
            buffer: Any = self.data
            kind, length = struct.unpack_from("<IQ", buffer, orig_offs) if is_list else (0, 0)
            if length <= LONGEST or GGUFValueType(kind) == GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            end, scalar = orig_offs + 12, self.gguf_scalar_to_np.get(GGUFValueType(kind))
            if scalar is not None:
                end += length * scalar().nbytes
            else:
                for _ in range(length):
                    end += 8 + struct.unpack_from("<Q", buffer, end)[0]
            left_out[orig_offs] = length
            return end - orig_offs, [], [], [GGUFValueType.ARRAY, GGUFValueType(kind)]

    return Brief(path), left_out


def _settings(reader: Any, left_out: dict[int, int]) -> tuple[bytes, int]:
    """What is kept of a header as it is stored, and how many keys that are; the size of the vocabulary is one."""
    named = [(name, field) for name, field in reader.fields.items() if not name.startswith("GGUF.")]
    ends = [*(field.offset for _, field in named[1:]), reader.tensors[0].field.offset]
    kept, count = b"", 0
    for (name, field), end in zip(named, ends, strict=True):
        value = field.offset + 8 + len(name.encode()) + 4
        if value not in left_out:
            kept += bytes(reader.data[field.offset : end])
            count += 1
        elif name == TOKENS:
            kept += struct.pack("<Q", len(COUNT)) + COUNT.encode() + struct.pack("<II", UINT32, left_out[value])
            count += 1
    return kept, count
