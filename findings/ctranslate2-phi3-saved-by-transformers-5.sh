#!/usr/bin/env bash
# CTranslate2 4.8.5: a Phi-3 that transformers 5.23.0 saved, with plain rotary embeddings.
#
# Bet: it converts, as a Llama of the same sizes does.
# Seen: the converter raises a KeyError: it asks the configuration for the kind of its scaling under a name of old.
#
#   llama: converted
#   phi3: KeyError: 'type'
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$place/packages" \
    torch==2.13.0 ctranslate2==4.8.5 transformers==5.23.0 sentencepiece
cd "$place"
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 TQDM_DISABLE=1
PYTHONPATH=packages python3 - > seen.txt <<'END'
from ctranslate2.converters import TransformersConverter
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
words = ["<unk>", "<s>", "</s>", *(f"w{n}" for n in range(93))]
tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
sizes = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=4, intermediate_size=96,
             num_hidden_layers=2, vocab_size=96, bos_token_id=1, eos_token_id=2, pad_token_id=2)
for kind in ("llama", "phi3"):
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).save_pretrained(kind)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>").save_pretrained(kind)
    try:
        TransformersConverter(kind).convert(f"{kind}-converted")
        print(f"{kind}: converted")
    except Exception as error:
        print(f"{kind}: {type(error).__name__}: {error}")
END
cat seen.txt
diff seen.txt - <<'END'
llama: converted
phi3: KeyError: 'type'
END
