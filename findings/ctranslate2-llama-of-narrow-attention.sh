#!/usr/bin/env bash
# CTranslate2 4.8.5: a Llama whose query heads × head dim is less than its hidden size, a KV head for each query head.
#
# Bet: it converts and computes what transformers does, or it is refused.
# Seen: it converts without a word and computes something else; the same weights called `mistral` come out exact.
#
#   llama: differs
#   mistral: equal
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$place/packages" \
    torch==2.13.0 ctranslate2==4.8.5 transformers==5.23.0 sentencepiece
cd "$place"
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 TQDM_DISABLE=1
PYTHONPATH=packages python3 - > seen.txt <<'END'
import torch, ctranslate2
from ctranslate2.converters import TransformersConverter
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
words = ["<unk>", "<s>", "</s>", *(f"w{n}" for n in range(93))]
tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
tokens = [3 + 7 * n % 90 for n in range(24)]
sizes = dict(hidden_size=256, head_dim=32, num_attention_heads=4, num_key_value_heads=4, intermediate_size=192,
             num_hidden_layers=3, vocab_size=96, bos_token_id=1, eos_token_id=2, initializer_range=0.1)
weights = None
for kind in ("llama", "mistral"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    weights = weights or model.state_dict()
    model.load_state_dict(weights)
    model.save_pretrained(kind)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>").save_pretrained(kind)
    with torch.no_grad():
        scores = model(torch.tensor([tokens])).logits.log_softmax(-1)[0, :-1]
    expected = scores.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    TransformersConverter(kind).convert(f"{kind}-converted")
    generator = ctranslate2.Generator(f"{kind}-converted", compute_type="float32")
    (found,) = generator.score_batch([[words[token] for token in tokens]])
    gap = float((torch.tensor(found.log_probs) - expected).abs().max())
    print(f"{kind}: {'equal' if gap < 1e-3 else 'differs'}")
END
cat seen.txt
diff seen.txt - <<'END'
llama: differs
mistral: equal
END
