#!/usr/bin/env bash
# transformers 5.23.0 and 4.57.6: a `tokenizer.json` that splits numbers into digits before byte-level BPE, whose
# `tokenizer_config.json` names the class GPT2Tokenizer.
#
# Bet: `tokenizer.json` is what runs, as the library tokenizers runs it.
# Seen: the newer one takes vocabulary and merges out of the file and builds GPT-2's own splitting around them, without a
# word. Where the merges were learned with another splitting, as here, text is read as other tokens; merges that were
# learned with the splitting of the file leave nothing to see.
#
#   tokenizers: ['in', 'Ġ', '2', '0', '2', '4']
#   4.57.6: ['in', 'Ġ', '2', '0', '2', '4']
#   5.23.0: ['in', 'Ġ2024']
#   5.23.0, class PreTrainedTokenizerFast: ['in', 'Ġ', '2', '0', '2', '4']
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$place/new" transformers==5.23.0
python3 -m pip install --quiet --disable-pip-version-check --target "$place/old" transformers==4.57.6
cd "$place"
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1
cat > read.py <<'END'
import sys
import transformers
tokenizer = transformers.AutoTokenizer.from_pretrained("tokenizer")
print(f"{transformers.__version__}{sys.argv[1]}:", tokenizer.tokenize("in 2024"))
END
PYTHONPATH=new python3 - > seen.txt <<'END'
import json
from pathlib import Path
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig
bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer, tokenizer.decoder = bytes_alone, decoders.ByteLevel()
alphabet = bytes_alone.alphabet()
wanted = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False)
tokenizer.train_from_iterator(["in 2024 in 2024"] * 20, wanted)
tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_alone])
LlamaConfig(vocab_size=300).save_pretrained("tokenizer")
tokenizer.save("tokenizer/tokenizer.json")
special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<end>")
Path("tokenizer/tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **special}))
print("tokenizers:", tokenizer.encode("in 2024").tokens)
END
PYTHONPATH=old python3 read.py "" >> seen.txt
PYTHONPATH=new python3 read.py "" >> seen.txt
sed -i s/GPT2Tokenizer/PreTrainedTokenizerFast/ tokenizer/tokenizer_config.json
PYTHONPATH=new python3 read.py ", class PreTrainedTokenizerFast" >> seen.txt
cat seen.txt
diff seen.txt - <<'END'
tokenizers: ['in', 'Ġ', '2', '0', '2', '4']
4.57.6: ['in', 'Ġ', '2', '0', '2', '4']
5.23.0: ['in', 'Ġ2024']
5.23.0, class PreTrainedTokenizerFast: ['in', 'Ġ', '2', '0', '2', '4']
END
