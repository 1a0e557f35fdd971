"""Log-probabilities of a text in ExecuTorch; run with the python of its own environment, as `in_vllm.py`."""

import json
import sys

import torch
from optimum.executorch import ExecuTorchModelForCausalLM

folder, tokens = sys.argv[1], json.loads(sys.argv[2])
model = ExecuTorchModelForCausalLM.from_pretrained(folder, task="text-generation", recipe="xnnpack")
steps = [model.forward(torch.tensor([[token]]), torch.tensor([step])) for step, token in enumerate(tokens[:-1])]
scores = torch.cat(steps, dim=1).float().log_softmax(-1)[0]
print(json.dumps(scores.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()))
