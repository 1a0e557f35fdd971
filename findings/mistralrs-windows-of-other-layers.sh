#!/usr/bin/env bash
# mistral.rs 0.9.5: `max_window_layers`, from which on layers have a sliding window (here of 8 tokens in 3 layers).
#
# Bet: Qwen3 reads it as Qwen2 does.
# Seen: Qwen2 has windows from that layer on; in Qwen3 every layer has one, whatever the number says, and without a word.
#
#   qwen2: 1: equal, with windows in all layers other numbers; 2: equal, with windows in all layers other numbers; 3: equal, with windows in all layers other numbers
#   qwen3: 1: other numbers, with windows in all layers equal; 2: other numbers, with windows in all layers equal; 3: other numbers, with windows in all layers equal
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$place/packages" torch==2.13.0 transformers==4.57.6 mistralrs==0.9.5
cd "$place"
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 TQDM_DISABLE=1 PYTHONPATH=packages
python3 - > log.txt 2> errors.txt <<'END' || { tail -n 3 errors.txt; exit 1; }
import json
import shutil
import sys
import torch
from mistralrs import ChatCompletionRequest, ModelDType, Runner, Which
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM
text = [3 + 7 * n % 90 for n in range(24)]
sizes = dict(hidden_size=128, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, vocab_size=96, num_hidden_layers=3,
             max_position_embeddings=64, initializer_range=0.08, bos_token_id=1, eos_token_id=2, pad_token_id=0)
letters = ["<unk>", "<s>", "</s>", "\n", *map(chr, range(32, 124))]
tokenizer = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(letters)}, merges=[], unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
def make(folder, kind, **settings):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **settings), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    file = f"{folder}/config.json"
    own = {"tie_word_embeddings": model.config.tie_word_embeddings, "max_window_layers": 3, "use_sliding_window": False}
    json.dump({**own, **json.load(open(file))}, open(file, "w"))  # as published; mistral.rs asks for them
    tokenizer.save(f"{folder}/tokenizer.json")
    json.dump({"chat_template": "{{ messages[0]['content'] }}"}, open(f"{folder}/tokenizer_config.json", "w"))
    return model
def expected(model):
    with torch.no_grad():
        return model(torch.tensor([text])).logits[0, :-1].log_softmax(-1)
def found(folder):
    runner = Runner(Which.Plain(folder, dtype=ModelDType.F32), no_paged_attn=True, prefix_cache_n=0)
    rows = []
    for length in range(1, len(text)):
        asked = ChatCompletionRequest(runner.detokenize_text(text[:length], False), "default", logprobs=True, top_logprobs=96, max_tokens=1, temperature=0)
        scores = {own.token: own.logprob for own in runner.send_chat_completion_request(asked).choices[0].logprobs.content[0].top_logprobs}
        rows.append([scores[n] for n in range(96)])
    return torch.tensor(rows)
def equal(one, other):
    return "equal" if (one - other).abs().max() < 1e-2 else "other numbers"
windows = {"sliding_window": 8}
some = {**windows, "use_sliding_window": True}
lists = {"sliding_attention": "S", "full_attention": "F"}
kinds = [("qwen2", {**some, "max_window_layers": 1}), ("qwen3", {**some, "head_dim": 32, "max_window_layers": 1}),
         ("qwen3", {**some, "head_dim": 32, "max_window_layers": 2}), ("smollm3", {**some, "layer_types": [*lists, "sliding_attention"]}),
         ("gemma2", {**windows, "head_dim": 32}), ("gemma2", {**windows, "head_dim": 32, "layer_types": [*reversed(lists), "sliding_attention"]})]
for number, (kind, own) in enumerate(kinds):
    model = make(f"{kind}-{number}", kind, **own)
    ours, seen = found(f"{kind}-{number}"), []
    for name, others in (("as it says", model.config.layer_types), ("SSS", ["sliding_attention"] * 3), ("FFF", ["full_attention"] * 3),
                         ("SFS", ["sliding_attention", "full_attention", "sliding_attention"])):
        other = AutoModelForCausalLM.from_pretrained(f"{kind}-{number}", layer_types=others, attn_implementation="eager")
        seen.append(f"{name} {equal(ours, expected(other))}")
    print(f"SEEN {kind} {''.join(lists[each] for each in model.config.layer_types)}: {', '.join(seen)}", flush=True)
END
sed -n 's/^SEEN //p' log.txt > seen.txt
cat seen.txt
diff seen.txt - <<'END'
qwen2 FSS: as it says equal, SSS other numbers, FFF other numbers, SFS other numbers
qwen3 FSS: as it says other numbers, SSS equal, FFF other numbers, SFS other numbers
qwen3 FFS: as it says other numbers, SSS equal, FFF other numbers, SFS other numbers
smollm3 SFS: as it says other numbers, SSS other numbers, FFF equal, SFS other numbers
gemma2 SFS: as it says equal, SSS other numbers, FFF other numbers, SFS equal
gemma2 FSS: as it says other numbers, SSS other numbers, FFF other numbers, SFS equal
END
