#!/usr/bin/env bash
# mistral.rs 0.9.5: families with RoPE scaling (YaRN and linear, by 4), as transformers 4.57.6 saves them.
#
# Bet: what a family cannot scale is refused, as Llama's YaRN is ("unknown variant").
# Seen: these families never look at `rope_scaling`: the model is read, without a word, as if it had none.
# Qwen's model cards tell users to put YaRN there for long texts.
#
#   qwen2: without equal, yarn other numbers (to one without: equal), linear other numbers (to one without: equal)
#   qwen3: without equal, yarn other numbers (to one without: equal), linear other numbers (to one without: equal)
#   qwen3_moe: without equal, yarn other numbers (to one without: equal), linear other numbers (to one without: equal)
#   starcoder2: without equal, yarn other numbers (to one without: equal), linear other numbers (to one without: equal)
#   glm4: without equal, yarn other numbers (to one without: equal), linear other numbers (to one without: equal)
#   gemma2: without equal, yarn other numbers (to one without: equal), linear other numbers (to one without: equal)
#   lfm2: without equal, yarn other numbers (to one without: equal), linear other numbers (to one without: equal)
#   llama: linear equal
#   llama: yarn refused, unknown variant `yarn`
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
yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
linear = {"rope_type": "linear", "factor": 4.0}
experts = {"num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 64, "norm_topk_prob": True}
convolutions = {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False}
kinds = [("qwen2", {}), ("qwen3", {"head_dim": 32}), ("qwen3_moe", {"head_dim": 32, **experts}), ("starcoder2", {}), ("glm4", {"head_dim": 32}),
         ("gemma2", {"head_dim": 32}), ("lfm2", convolutions)]
for kind, own in kinds:
    seen = []
    for scaling in (None, yarn, linear):
        folder = f"{kind}-{scaling and scaling['rope_type']}"
        model = make(folder, kind, **own, rope_scaling=scaling)
        whole = expected(model) if scaling is None else whole
        ours = found(folder)
        seen.append(equal(ours, expected(model)) + (f" (to one without: {equal(ours, whole)})" if scaling else ""))
    print(f"SEEN {kind}: without {seen[0]}, yarn {seen[1]}, linear {seen[2]}", flush=True)
make("llama-linear", "llama", rope_scaling=linear)
print("SEEN llama: linear", equal(found("llama-linear"), expected(make("again", "llama", rope_scaling=linear))))
make("llama-yarn", "llama", rope_scaling=yarn)
try:
    found("llama-yarn")
except ValueError as error:
    print("SEEN llama: yarn refused,", str(error).partition(",")[0])
END
sed -n 's/^SEEN //p' log.txt > seen.txt
cat seen.txt
diff seen.txt - <<'END'
qwen2: without equal, yarn other numbers (to one without: equal), linear other numbers (to one without: equal)
qwen3: without equal, yarn other numbers (to one without: equal), linear other numbers (to one without: equal)
qwen3_moe: without equal, yarn other numbers (to one without: equal), linear other numbers (to one without: equal)
starcoder2: without equal, yarn other numbers (to one without: equal), linear other numbers (to one without: equal)
glm4: without equal, yarn other numbers (to one without: equal), linear other numbers (to one without: equal)
gemma2: without equal, yarn other numbers (to one without: equal), linear other numbers (to one without: equal)
lfm2: without equal, yarn other numbers (to one without: equal), linear other numbers (to one without: equal)
llama: linear equal
llama: yarn refused, unknown variant `yarn`
END
