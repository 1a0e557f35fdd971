"""Log-probabilities of a text in mlx-lm; run with the python of its own environment, as `in_vllm.py`."""

import json
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import load_model

folder, tokens = Path(sys.argv[1]), json.loads(sys.argv[2])
model, _ = load_model(folder)
scores = nn.log_softmax(model(mx.array([tokens])).astype(mx.float32), axis=-1)[0, :-1]
print(json.dumps(mx.take_along_axis(scores, mx.array(tokens[1:])[:, None], axis=-1)[:, 0].tolist()))
