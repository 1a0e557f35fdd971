#!/usr/bin/env bash
# @huggingface/tokenizers 0.2.0, with which transformers.js 4.3.2 encodes, beside tokenizers 0.23.3: a Unigram vocabulary with
# bytes to fall back to (`byte_fallback`), whole and with its rare pieces taken out.
#
# Bet: what has no piece of its own becomes its bytes, as in Python and as for BPE.
# Seen: it becomes the unknown token, one for a whole run, without a word: the bytes of a Unigram vocabulary are never used for
# reading, and a vocabulary made smaller loses the text that the bytes are there for. The decoder knows them.
#
#   whole, '東京 tower': tokenizers ▁ 東 京 ▁tower, transformers.js ▁ 東 京 ▁tower
#   smaller, '東京 tower': tokenizers ▁ <0xE6> <0x9D> <0xB1> <0xE4> <0xBA> <0xAC> ▁tower, transformers.js ▁ <unk> ▁tower
#   smaller, decoded: tokenizers '東京 tower', transformers.js '東京 tower'
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --no-compile --disable-pip-version-check --target "$place/packages" tokenizers==0.23.3
cd "$place"
npm install --silent --no-fund --no-audit --ignore-scripts @huggingface/tokenizers@0.2.0 > npm.txt 2>&1 || { cat npm.txt; exit 1; }
cat > look.py <<'END'
import json
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

def made(pieces):
    scored = [("<unk>", 0.0), *((f"<0x{byte:02X}>", -20.0) for byte in range(256)), *((piece, -5.0) for piece in pieces)]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return tokenizer

text = "東京 tower"
seen = {"text": text}
for name, pieces in (("whole", ["▁", "東", "京", "▁tower"]), ("smaller", ["▁", "▁tower"])):
    tokenizer = made(pieces)
    tokenizer.save(f"{name}.json")
    encoded = tokenizer.encode(text)
    seen[name] = {"tokens": encoded.tokens, "ids": encoded.ids, "decoded": tokenizer.decode(encoded.ids)}
print(json.dumps(seen))
END
cat > look.mjs <<'END'
import { readFileSync } from "node:fs";
import { Tokenizer } from "@huggingface/tokenizers";

const read = (file) => JSON.parse(readFileSync(file));
const seen = read("seen.json");
const opened = (name) => new Tokenizer(read(`${name}.json`), {});
for (const name of ["whole", "smaller"]) {
    const tokenizer = opened(name);
    const tokens = tokenizer.encode(seen.text).ids.map((id) => tokenizer.id_to_token(id));
    console.log(`${name}, '${seen.text}': tokenizers ${seen[name].tokens.join(" ")}, transformers.js ${tokens.join(" ")}`);
}
const { ids, decoded } = seen.smaller;
console.log(`smaller, decoded: tokenizers '${decoded}', transformers.js '${opened("smaller").decode(ids)}'`);
END
PYTHONPATH=packages python3 look.py > seen.json
node look.mjs > seen.txt
cat seen.txt
diff seen.txt - <<'END'
whole, '東京 tower': tokenizers ▁ 東 京 ▁tower, transformers.js ▁ 東 京 ▁tower
smaller, '東京 tower': tokenizers ▁ <0xE6> <0x9D> <0xB1> <0xE4> <0xBA> <0xAC> ▁tower, transformers.js ▁ <unk> ▁tower
smaller, decoded: tokenizers '東京 tower', transformers.js '東京 tower'
END
