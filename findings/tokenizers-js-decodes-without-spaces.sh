#!/usr/bin/env bash
# @huggingface/tokenizers 0.2.0, with which transformers.js 4.3.2 decodes, beside transformers 5.23.0: a byte-level tokenizer, as
# PreTrainedTokenizerFast saves it (without `clean_up_tokenization_spaces` in tokenizer_config.json), and with that key.
#
# Bet: tokens are decoded to the text that they were made of, as in transformers; a key that is absent is false.
# Seen: an absent key is true, and spaces before `.`, `,`, `?`, `!`, `'s` and the like are taken out, in commands and code too.
# transformers 5 has false where the key is absent, and reads true as false for such a tokenizer. Only false, written out, makes
# both agree.
#
#   absent: transformers 'git add . && cd .. ; x != y', transformers.js 'git add. && cd.. ; x!= y'
#   true: transformers 'git add . && cd .. ; x != y', transformers.js 'git add. && cd.. ; x!= y'
#   false: transformers 'git add . && cd .. ; x != y', transformers.js 'git add . && cd .. ; x != y'
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --no-compile --disable-pip-version-check --target "$place/packages" transformers==5.23.0
cd "$place"
npm install --silent --no-fund --no-audit --ignore-scripts @huggingface/tokenizers@0.2.0 > npm.txt 2>&1 || { cat npm.txt; exit 1; }
export HF_HUB_OFFLINE=1
cat > look.py <<'END'
import json
from pathlib import Path
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

bytes_ = Tokenizer(models.BPE({letter: at for at, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
bytes_.pre_tokenizer, bytes_.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
seen = []
for key, written in (("absent", {}), ("true", True), ("false", False)):
    PreTrainedTokenizerFast(tokenizer_object=bytes_).save_pretrained(key)
    file = Path(key, "tokenizer_config.json")
    config = json.loads(file.read_text())
    assert "clean_up_tokenization_spaces" not in config
    if key != "absent":
        file.write_text(json.dumps({**config, "clean_up_tokenization_spaces": written}))
    tokenizer = AutoTokenizer.from_pretrained(key)
    ids = tokenizer("git add . && cd .. ; x != y")["input_ids"]
    seen.append({"key": key, "ids": ids, "text": tokenizer.decode(ids)})
print(json.dumps(seen))
END
cat > look.mjs <<'END'
import { readFileSync } from "node:fs";
import { Tokenizer } from "@huggingface/tokenizers";

const read = (file) => JSON.parse(readFileSync(file));
for (const { key, ids, text } of read("seen.json")) {
    const tokenizer = new Tokenizer(read(`${key}/tokenizer.json`), read(`${key}/tokenizer_config.json`));
    console.log(`${key}: transformers '${text}', transformers.js '${tokenizer.decode(ids)}'`);
}
END
PYTHONPATH=packages python3 look.py > seen.json 2> warnings.txt || { cat warnings.txt; exit 1; }
node look.mjs > seen.txt
cat seen.txt
diff seen.txt - <<'END'
absent: transformers 'git add . && cd .. ; x != y', transformers.js 'git add. && cd.. ; x!= y'
true: transformers 'git add . && cd .. ; x != y', transformers.js 'git add. && cd.. ; x!= y'
false: transformers 'git add . && cd .. ; x != y', transformers.js 'git add . && cd .. ; x != y'
END
