#!/usr/bin/env bash
# CTranslate2 4.8.5: a Llama with the rotary scaling of Llama 3.1, its own numbers and others, beside transformers 5.23.0.
#
# Bet: what it converts it computes exactly, or it refuses the kind of scaling.
# Seen: without scaling, or with linear scaling, it is exact. With `llama3` it is not, in float32, from the third token on, and
# the farther off the more `original_max_position_embeddings` differs from 8,192. Not a word of it.
#
#   no scaling: equal
#   linear: equal
#   llama3 as in Llama 3.1: differs
#   llama3 of a context of 32: differs, by more than ten times as much
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$place/packages" \
    torch==2.13.0 ctranslate2==4.8.5 transformers==5.23.0 sentencepiece
cd "$place"
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 TQDM_DISABLE=1
PYTHONPATH=packages python3 - > seen.txt <<'END'
import ctranslate2
import torch
from ctranslate2.converters import TransformersConverter
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
words = ["<unk>", "<s>", "</s>", *(f"w{n}" for n in range(93))]
tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
tokens = [3 + 7 * n % 90 for n in range(30)]
sizes = dict(hidden_size=256, head_dim=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96, num_hidden_layers=2,
             vocab_size=96, bos_token_id=1, eos_token_id=2, initializer_range=0.2, max_position_embeddings=131072)
llama3 = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)

def gap(rope):
    """The largest difference of a token's log-probability."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=rope)).eval()
    model.save_pretrained("model")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>").save_pretrained("model")
    with torch.no_grad():
        scores = model(torch.tensor([tokens])).logits.log_softmax(-1)[0, :-1]
    expected = scores.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    TransformersConverter("model").convert("converted", force=True)
    generator = ctranslate2.Generator("converted", compute_type="float32")
    (found,) = generator.score_batch([[words[token] for token in tokens]])
    return float((torch.tensor(found.log_probs) - expected).abs().max())

def said(gap):
    return "equal" if gap < 1e-3 else "differs" if gap > 0.02 else f"gap {gap}"

print("no scaling:", said(gap(dict(rope_type="default", rope_theta=500000.0))))
print("linear:", said(gap(dict(rope_type="linear", rope_theta=500000.0, factor=4.0))))
own = gap({**llama3, "original_max_position_embeddings": 8192})
print("llama3 as in Llama 3.1:", said(own))
other = gap({**llama3, "original_max_position_embeddings": 32})
print(f"llama3 of a context of 32: {said(other)}, by {'more' if other > 10 * own else 'less'} than ten times as much")
END
cat seen.txt
diff seen.txt - <<'END'
no scaling: equal
linear: equal
llama3 as in Llama 3.1: differs
llama3 of a context of 32: differs, by more than ten times as much
END
