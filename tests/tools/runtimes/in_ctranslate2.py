"""Log-probabilities of a text in CTranslate2; run with the python of its own environment, as `in_vllm.py`."""

import json
import sys
import tempfile
from pathlib import Path

import ctranslate2
from ctranslate2.converters import TransformersConverter

folder, tokens = sys.argv[1], json.loads(sys.argv[2])
with tempfile.TemporaryDirectory() as scratch:
    TransformersConverter(folder).convert(scratch, force=True)
    words = json.loads(Path(scratch, "vocabulary.json").read_text(encoding="utf-8"))
    (found,) = ctranslate2.Generator(scratch, compute_type="float32").score_batch([[words[token] for token in tokens]])
print(json.dumps(found.log_probs))
