"""Log-probabilities of a text in OpenVINO GenAI; run with the python of its own environment, as `in_vllm.py`."""

import json
import os
import sys
import tempfile

os.environ.update(HF_HUB_OFFLINE="1", DO_NOT_TRACK="1")
folder, tokens = sys.argv[1], json.loads(sys.argv[2])

import numpy  # noqa: E402
from openvino import Tensor, save_model  # noqa: E402
from openvino_genai import ContinuousBatchingPipeline, GenerationConfig, SchedulerConfig  # noqa: E402
from openvino_tokenizers import convert_tokenizer  # noqa: E402
from optimum.intel import OVModelForCausalLM  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

PRECISE = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
with tempfile.TemporaryDirectory() as scratch:
    OVModelForCausalLM.from_pretrained(folder, export=True, load_in_8bit=False, compile=False).save_pretrained(scratch)
    words, text = convert_tokenizer(AutoTokenizer.from_pretrained(folder), with_detokenizer=True)
    save_model(words, f"{scratch}/openvino_tokenizer.xml")
    save_model(text, f"{scratch}/openvino_detokenizer.xml")
    pipeline = ContinuousBatchingPipeline(scratch, SchedulerConfig(), "CPU", PRECISE)
    wanted = GenerationConfig(max_new_tokens=1, echo=True, logprobs=1)
    handle = pipeline.add_request(0, Tensor(numpy.array([tokens])), wanted)
    while pipeline.has_non_finished_requests():
        pipeline.step()
    (found,) = handle.read_all()
print(json.dumps(found.generated_log_probs[1 : len(tokens)]))  # the first has none, the last is of a new token
