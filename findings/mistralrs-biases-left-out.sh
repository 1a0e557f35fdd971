#!/usr/bin/env bash
# mistral.rs 0.9.5: models with biases, as transformers 4.57.6 saves them (`attention_bias`, `mlp_bias`; Phi's output has one).
#
# Bet: biases that are in the file are added, or the model is refused, as it is where a tensor has another shape.
# Seen: those of Llama, SmolLM3, Qwen3 and Qwen3-MoE and that of Phi's output are never read, without a word: the numbers are
# those of the same model with these biases at zero. So every Phi-1, 1.5 and 2 is another model there.
#
#   llama, attention_bias: other numbers, without them equal
#   llama, mlp_bias: other numbers, without them equal
#   smollm3, attention_bias: other numbers, without them equal
#   smollm3, mlp_bias: other numbers, without them equal
#   qwen3, attention_bias: other numbers, without them equal
#   qwen3_moe, attention_bias: other numbers, without them equal
#   glm4, attention_bias: equal, without them other numbers
#   gemma2, attention_bias: equal, without them other numbers
#   phi, lm_head.bias: other numbers, without them equal
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
experts = {"num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 64, "norm_topk_prob": True}
kinds = [("llama", "attention_bias", {}), ("llama", "mlp_bias", {}), ("smollm3", "attention_bias", {}), ("smollm3", "mlp_bias", {}),
         ("qwen3", "attention_bias", {"head_dim": 32}), ("qwen3_moe", "attention_bias", {"head_dim": 32, **experts}),
         ("glm4", "attention_bias", {"head_dim": 32}), ("gemma2", "attention_bias", {"head_dim": 32}), ("phi", "lm_head.bias", {})]
for kind, which, own in kinds:
    folder = f"{kind}-{which}"
    model = make(folder, kind, **own, **({which: True} if kind != "phi" else {}))
    ours, right = found(folder), expected(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (kind != "phi" and name.endswith(".bias")) or name == "lm_head.bias":
                parameter.zero_()
    print(f"SEEN {kind}, {which}: {equal(ours, right)}, without them {equal(ours, expected(model))}", flush=True)
END
sed -n 's/^SEEN //p' log.txt > seen.txt
cat seen.txt
diff seen.txt - <<'END'
llama, attention_bias: other numbers, without them equal
llama, mlp_bias: other numbers, without them equal
smollm3, attention_bias: other numbers, without them equal
smollm3, mlp_bias: other numbers, without them equal
qwen3, attention_bias: other numbers, without them equal
qwen3_moe, attention_bias: other numbers, without them equal
glm4, attention_bias: equal, without them other numbers
gemma2, attention_bias: equal, without them other numbers
phi, lm_head.bias: other numbers, without them equal
END
