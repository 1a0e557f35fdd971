"""Log-probabilities of a text in mistral.rs; run with the python of its own environment, as `in_vllm.py`.

It gives those of the next token alone, so that every beginning of the text is read.
"""

import json
import sys
import tempfile
from pathlib import Path

from mistralrs import ChatCompletionRequest, ModelDType, Runner, Which

folder, tokens = Path(sys.argv[1]), json.loads(sys.argv[2])
ROWS = json.loads((folder / "config.json").read_text())["vocab_size"]
with tempfile.TemporaryDirectory() as scratch:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    # One of the decoders that it knows.
    tokenizer["decoder"] = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
    own = Path(scratch, "tokenizer.json")
    own.write_text(json.dumps(tokenizer))
    model = Which.Plain(str(folder), tokenizer_json=str(own), dtype=ModelDType.F32)
    runner = Runner(model, no_paged_attn=True, prefix_cache_n=0)
scores = []
for length in range(1, len(tokens)):
    text = runner.detokenize_text(tokens[:length], False)
    asked = ChatCompletionRequest(text, "default", logprobs=True, top_logprobs=ROWS, max_tokens=1, temperature=0)
    (next_token,) = runner.send_chat_completion_request(asked).choices[0].logprobs.content
    scores.append({each.token: each.logprob for each in next_token.top_logprobs}[tokens[length]])
print(json.dumps(scores))
