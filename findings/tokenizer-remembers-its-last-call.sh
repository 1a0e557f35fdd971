#!/usr/bin/env bash
# transformers 5.23.0: a tokenizer that was called with `truncation=True, max_length=32` for calibration, and is then saved.
#
# Bet: how it was called is no part of the tokenizer, so that `tokenizer.json` stays as it was.
# Seen: truncation and padding of the last call are in `tokenizer.json`. transformers sets them anew in each call; a reader that
# uses the file alone (tokenizers, and the runtimes built on it) cuts every text to 32 tokens, without a word.
#
#   before: truncation None, padding None
#   after: truncation 32, padding BatchLongest
#   text of 100 tokens: 100 in transformers, 32 in tokenizers
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$place/packages" transformers==5.23.0 tokenizers==0.23.3
cd "$place"
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1
PYTHONPATH=packages python3 -W ignore - > seen.txt <<'END'
import json
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
words = Tokenizer(models.WordLevel({"<unk>": 0, "<pad>": 1, **{f"word{n}": n + 2 for n in range(100)}}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<pad>").save_pretrained("tokenizer")

def said():
    found = json.load(open("tokenizer/tokenizer.json"))
    cut, padding = found["truncation"], found["padding"]
    return f"truncation {cut and cut['max_length']}, padding {padding and padding['strategy']}"

print("before:", said())
text = " ".join(f"word{n}" for n in range(100))
tokenizer = AutoTokenizer.from_pretrained("tokenizer")
tokenizer([text, "word1 word2"], truncation=True, max_length=32, padding=True)
tokenizer.save_pretrained("tokenizer")
print("after:", said())
here, there = AutoTokenizer.from_pretrained("tokenizer"), Tokenizer.from_file("tokenizer/tokenizer.json")
print(f"text of 100 tokens: {len(here(text).input_ids)} in transformers, {len(there.encode(text).ids)} in tokenizers")
END
cat seen.txt
diff seen.txt - <<'END'
before: truncation None, padding None
after: truncation 32, padding BatchLongest
text of 100 tokens: 100 in transformers, 32 in tokenizers
END
