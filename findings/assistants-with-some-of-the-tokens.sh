#!/usr/bin/env bash
# transformers 5.23.0: `generate` with an `assistant_model` whose vocabulary has another size, and both tokenizers given.
#
# Bet: sampling goes with every assistant that greedy search goes with, best of all where each of its tokens is the model's, too;
# and an assistant that has helped is what it was before.
# Seen: where each of its tokens is the model's, or where both share a tokenizer and one has more rows, sampling raises an
# AttributeError. Where one of its tokens is not the model's, sampling goes, and leaves the assistant with its head cut and its
# embeddings renumbered: alone, it predicts fewer tokens from then on, and `save_pretrained` would write that.
#
#   some of the tokens: greedy goes, sampling AttributeError, afterwards the assistant is what it was
#   more rows: greedy goes, sampling AttributeError, afterwards the assistant is what it was
#   a token of its own: greedy goes, sampling goes, afterwards the assistant has 289 of 290 logits
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --no-compile --disable-pip-version-check --target "$place/packages" torch==2.13.0 transformers==5.23.0
cd "$place"
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 TQDM_DISABLE=1
PYTHONPATH=packages python3 -W ignore - > log.txt <<'END'
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

def reader(merges):
    vocabulary = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(vocabulary)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")

def model(rows):
    torch.manual_seed(1)
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.1)
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=rows, bos_token_id=0, eos_token_id=0, pad_token_id=0)).eval()

pairs = [(first, second) for first in "abcdefgh" for second in "abcdefgh"]
every, some, own = reader(pairs), reader(pairs[:32]), reader([*pairs[:32], ("x", "y")])
whole, prompt = model(len(every)), every("abc", return_tensors="pt")["input_ids"]
kinds = {"some of the tokens": (len(some), some), "more rows": (len(every) + 64, every), "a token of its own": (len(own), own)}
for name, (rows, tokenizer) in kinds.items():
    assistant, text, told = model(rows), torch.tensor([[5, 6, 7]]), []
    with torch.no_grad():
        before = assistant(input_ids=text).logits
    for sampled in (False, True):
        torch.manual_seed(0)
        helped = dict(assistant_model=assistant, tokenizer=every, assistant_tokenizer=tokenizer)
        try:
            whole.generate(prompt, max_new_tokens=8, do_sample=sampled, top_k=0, pad_token_id=0, **helped)
            told.append("goes")
        except AttributeError as error:
            told.append(type(error).__name__)
    with torch.no_grad():
        after = assistant(input_ids=text).logits
    count = f"has {after.shape[-1]} of {before.shape[-1]} logits"
    state = "is what it was" if after.shape == before.shape and torch.equal(after, before) else count
    print(f"SEEN {name}: greedy {told[0]}, sampling {told[1]}, afterwards the assistant {state}")
END
sed -n 's/^SEEN //p' log.txt > seen.txt
cat seen.txt
diff seen.txt - <<'END'
some of the tokens: greedy goes, sampling AttributeError, afterwards the assistant is what it was
more rows: greedy goes, sampling AttributeError, afterwards the assistant is what it was
a token of its own: greedy goes, sampling goes, afterwards the assistant has 289 of 290 logits
END
