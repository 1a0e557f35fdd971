#!/usr/bin/env bash
# tokenizers 0.23.3: a `tokenizer.json` whose added token has an id beyond the vocabulary, as it is where unused tokens were
# taken out of the file and the rows of the embedding were left as they are.
#
# Bet: the token has the id that the file gives it, or the file is refused.
# Seen: it gets the next free id, without a word, and so the embedding of another token.
#
#   written: <end> is 200
#   read: <end> is 96
#   saved again: <end> is 96
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$place/packages" tokenizers==0.23.3
cd "$place"
export HF_HUB_OFFLINE=1
PYTHONPATH=packages python3 - > seen.txt <<'END'
import json
from tokenizers import Tokenizer, models
tokenizer = Tokenizer(models.WordLevel({f"w{n}": n for n in range(96)}, unk_token="w0"))
tokenizer.add_special_tokens(["<end>"])
described = json.loads(tokenizer.to_str())
described["added_tokens"][0]["id"] = 200
print("written: <end> is", described["added_tokens"][0]["id"])
read = Tokenizer.from_str(json.dumps(described))
print("read: <end> is", read.encode("<end>").ids[0])
print("saved again: <end> is", json.loads(read.to_str())["added_tokens"][0]["id"])
END
cat seen.txt
diff seen.txt - <<'END'
written: <end> is 200
read: <end> is 96
saved again: <end> is 96
END
