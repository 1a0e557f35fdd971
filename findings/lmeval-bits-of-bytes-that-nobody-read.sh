#!/usr/bin/env bash
# lm_eval 0.4.13: `bits_per_byte` and `byte_perplexity` of the task `wikitext`.
#
# Bet: bits per byte are the bits of the text that the model was given, divided by the bytes of that text, as everywhere.
# Seen: the model is given the page without WikiText's spaces and @-@ marks, and the bits are divided by the bytes of the page
# with them. (For words, the source says so, and it is how others count them.) A model that spends 2 bits on each byte it reads
# is said to spend 1.700. On WikiText-2's test split the page has 3.9% more bytes than what is read, so bits per byte are 3.8%
# less than those of the same text elsewhere.
#
#   read: The half-life of the (stable) form is 1,200.5 years, which was measured in two ways .
#   85 bytes read, 100 counted: 2 bits for each byte that is read are 1.700 bits per byte
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --no-compile --no-deps --disable-pip-version-check --target "$place/packages" lm_eval==0.4.13
cd "$place"
PYTHONPATH=packages/lm_eval/tasks/wikitext python3 - > seen.txt <<'END'
import math

from preprocess_wikitext import process_results, wikitext_detokenizer

page = {"page": "The half @-@ life of the ( stable ) form is 1 @,@ 200 @.@ 5 years , which was measured in two ways ."}
read = wikitext_detokenizer(page)
size = len(read.encode())
loss, counted = process_results(page, (-2 * math.log(2) * size,))["bits_per_byte"]
print("read:", read)
print(f"{size} bytes read, {counted} counted: 2 bits for each byte that is read are {-loss / counted / math.log(2):.3f} bits per byte")
END
cat seen.txt
diff seen.txt - <<'END'
read: The half-life of the (stable) form is 1,200.5 years, which was measured in two ways .
85 bytes read, 100 counted: 2 bits for each byte that is read are 1.700 bits per byte
END
