#!/usr/bin/env bash
# tokenizers 0.23.3 and sentencepiece 0.2.3: a Unigram vocabulary loses a piece that a text has never been cut into.
#
# Bet: that text keeps its tokens. Those that it has are all there, and the best of all ways to cut it still is.
# Seen: an unknown character costs as much as the worst piece of the vocabulary, and 10 more. Without a bad piece it is cheap, and
# where a character has no piece of its own, a way with an unknown token wins over one that has none. With bytes to fall back to,
# that is how bytes come into a text which needs none of them. Both libraries do the same.
#
#   tokenizers, unknown: ab|cd, without zz <unk>|bcd
#   tokenizers, bytes: ab|cd, without zz <0x61>|bcd
#   sentencepiece, unknown: ab|cd, without zz <unk>|bcd
#   sentencepiece, bytes: ab|cd, without zz <0x61>|bcd
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --no-compile --disable-pip-version-check --target "$place/packages" \
    tokenizers==0.23.3 sentencepiece==0.2.3 protobuf==7.36.2
cd "$place"
export HF_HUB_OFFLINE=1
PYTHONPATH=packages python3 -W ignore - > seen.txt <<'END'
from sentencepiece import SentencePieceProcessor
from sentencepiece import sentencepiece_model_pb2 as protobuf
from tokenizers import Tokenizer, models
kinds = protobuf.ModelProto.SentencePiece
pieces = [("ab", -20.0), ("cd", -20.0), ("bcd", -1.0), ("zz", -100.0)]
all_bytes = [(f"<0x{byte:02X}>", 0.0) for byte in range(256)]

def vocabulary(falls_back, without):
    return [("<unk>", 0.0), *(all_bytes if falls_back else []), *(piece for piece in pieces if piece[0] != without)]

def by_tokenizers(falls_back, without=None):
    found = vocabulary(falls_back, without)
    encoded = Tokenizer(models.Unigram(found, unk_id=0, byte_fallback=falls_back)).encode("abcd")
    return "|".join(found[number][0] for number in encoded.ids)

def by_sentencepiece(falls_back, without=None):
    model, found = protobuf.ModelProto(), vocabulary(falls_back, without)
    for number, (piece, score) in enumerate(found):
        kind = kinds.UNKNOWN if number == 0 else kinds.BYTE if piece.startswith("<0x") else kinds.NORMAL
        model.pieces.add(piece=piece, score=score, type=kind)
    model.trainer_spec.model_type = protobuf.TrainerSpec.UNIGRAM
    model.trainer_spec.vocab_size = len(found)
    model.trainer_spec.byte_fallback = falls_back
    model.normalizer_spec.name, model.normalizer_spec.add_dummy_prefix = "identity", False
    numbers = SentencePieceProcessor(model_proto=model.SerializeToString()).encode("abcd")
    return "|".join(found[number][0] for number in numbers)

for name, way in (("tokenizers", by_tokenizers), ("sentencepiece", by_sentencepiece)):
    for falls_back in (False, True):
        print(f"{name}, {'bytes' if falls_back else 'unknown'}: {way(falls_back)}, without zz {way(falls_back, 'zz')}")
END
cat seen.txt
diff seen.txt - <<'END'
tokenizers, unknown: ab|cd, without zz <unk>|bcd
tokenizers, bytes: ab|cd, without zz <0x61>|bcd
sentencepiece, unknown: ab|cd, without zz <unk>|bcd
sentencepiece, bytes: ab|cd, without zz <0x61>|bcd
END
