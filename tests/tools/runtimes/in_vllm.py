"""Log-probabilities of a text in vLLM; run with the python of its own environment: `in_vllm.py FOLDER TOKENS.json`."""

import json
import os
import sys

os.environ.update(
    HF_HUB_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1"
)
folder, tokens = sys.argv[1], json.loads(sys.argv[2])

from vllm import LLM, SamplingParams  # noqa: E402

model = LLM(model=folder, dtype="float32", enforce_eager=True, max_model_len=64, skip_tokenizer_init=True)
wanted = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
(found,) = model.generate([{"prompt_token_ids": tokens}], wanted, use_tqdm=False)
steps = zip(tokens[1:], found.prompt_logprobs[1:], strict=True)
print(json.dumps([step[token].logprob for token, step in steps]))
