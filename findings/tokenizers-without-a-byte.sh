#!/usr/bin/env bash
# tokenizers 0.23.3: a byte-level BPE (as of GPT-2, Llama 3, Qwen) from whose vocabulary one of the 256 bytes was cut.
#
# Bet: such a vocabulary is refused, or text with that byte is refused or gets an unknown token.
# Seen: there is no unknown token in these tokenizers, and the byte vanishes without a word: what the model reads and what comes
# back is other text, or a character that is no more. A tokenizer that falls back to bytes (as of Llama 2) gives the unknown token.
#
#   all bytes: 'size 10 zebras, 5 €' comes back as it was
#   without z: 'size 10 zebras, 5 €' comes back as 'sie 10 ebras, 5 €', 19 tokens instead of 21
#   without the first byte of €: 'size 10 zebras, 5 €' comes back as 'size 10 zebras, 5 ??', 20 tokens instead of 21
#   falling back to bytes, without one: ['a', '<unk>', 'b']
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --no-compile --disable-pip-version-check --target "$place/packages" tokenizers==0.23.3
cd "$place"
PYTHONIOENCODING=utf-8 PYTHONPATH=packages python3 -W ignore - > seen.txt <<'END'
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

def byte_level(*without):
    """A tokenizer of single bytes, each written as the character that stands for it."""
    stays = [byte for byte in sorted(pre_tokenizers.ByteLevel.alphabet()) if byte not in without]
    tokenizer = Tokenizer(models.BPE({byte: number for number, byte in enumerate(stays)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer

text = "size 10 zebras, 5 €"
whole = byte_level()
for name, tokenizer in {"all bytes": whole, "without z": byte_level("z"), "without the first byte of €": byte_level("â")}.items():
    ids = tokenizer.encode(text).ids
    back = tokenizer.decode(ids).replace("\N{REPLACEMENT CHARACTER}", "?")
    counts = f", {len(ids)} tokens instead of {len(whole.encode(text).ids)}"
    print(f"{name}: {text!r} comes back as", "it was" if back == text else f"{back!r}{counts}")
pieces = ["<unk>", "a", "b", *(f"<0x{byte:02X}>" for byte in range(256) if byte != 0xE2)]
falling_back = models.BPE({piece: number for number, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
print("falling back to bytes, without one:", Tokenizer(falling_back).encode("a€b").tokens)
END
cat seen.txt
diff seen.txt - <<'END'
all bytes: 'size 10 zebras, 5 €' comes back as it was
without z: 'size 10 zebras, 5 €' comes back as 'sie 10 ebras, 5 €', 19 tokens instead of 21
without the first byte of €: 'size 10 zebras, 5 €' comes back as 'size 10 zebras, 5 ??', 20 tokens instead of 21
falling back to bytes, without one: ['a', '<unk>', 'b']
END
