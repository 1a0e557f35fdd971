#!/usr/bin/env bash
# torch 2.13.0, transformers 5.23.0, onnx 1.23.2, onnxruntime 1.32.0: an ONNX graph of a Llama whose embeddings are tied and most
# of its size, as they are of small models, optimized and quantized to 8 bits.
#
# Bet: optimized, the graph is no larger. Quantized, it is a quarter, and all products are of whole numbers.
# Seen: the graph holds the matrix once, and transposes it for the output. onnxruntime folds that, so that the graph which it
# saves holds the matrix twice, and so does the one that its pre-processing for quantization makes. Quantized without this, the
# output stays a product of floats, which the whole matrix is turned back into each time. Quantized after it, as the documentation
# recommends, the matrix is stored twice, and the file is half of what it was.
#
#   exported: 1.0 of the size, the matrix stored 1 times, the output by MatMul
#   optimized and saved: 1.9 of the size, the matrix stored 2 times, the output by MatMul
#   pre-processed: 1.9 of the size, the matrix stored 2 times, the output by MatMul
#   quantized: 0.3 of the size, the matrix stored 1 times, the output by MatMul
#   pre-processed and quantized: 0.5 of the size, the matrix stored 2 times, the output by MatMulInteger
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --no-compile --disable-pip-version-check --target "$place/packages" \
    torch==2.13.0 transformers==5.23.0 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0
cd "$place"
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 TQDM_DISABLE=1
PYTHONPATH=packages python3 - > seen.txt 2> log.txt <<'END' || { cat log.txt; exit 1; }
import os
import onnx
import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quant_pre_process, quantize_dynamic
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=32768)
llama = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)).eval()

class Logits(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.llama = llama

    def forward(self, tokens):
        return self.llama(input_ids=tokens, use_cache=False).logits

tokens = {"tokens": torch.arange(16)[None]}
lengths = ({1: torch.export.Dim("length", min=2, max=128)},)
torch.onnx.export(Logits(), tuple(tokens.values()), "exported.onnx", dynamo=True, external_data=False, verbose=False,
                  input_names=["tokens"], dynamic_shapes=lengths)
options = onnxruntime.SessionOptions()
options.log_severity_level = 3
options.optimized_model_filepath = "optimized.onnx"
onnxruntime.InferenceSession("exported.onnx", options)
quant_pre_process("exported.onnx", "processed.onnx")
quantize_dynamic("exported.onnx", "quantized.onnx", weight_type=QuantType.QInt8)
quantize_dynamic("processed.onnx", "both.onnx", weight_type=QuantType.QInt8)
labels = {"exported": "exported", "optimized": "optimized and saved", "processed": "pre-processed",
          "quantized": "quantized", "both": "pre-processed and quantized"}
for name, label in labels.items():
    graph = onnx.load(f"{name}.onnx").graph
    makers = {output: node for node in graph.node for output in node.output}
    node = makers[graph.output[0].name]
    while node.op_type not in ("MatMul", "MatMulInteger"):
        node = makers[node.input[0]]
    stored = sum(sorted(own.dims) == [64, 32768] for own in graph.initializer)
    size = os.path.getsize(f"{name}.onnx") / os.path.getsize("exported.onnx")
    print(f"{label}: {size:.1f} of the size, the matrix stored {stored} times, the output by {node.op_type}")
END
cat seen.txt
diff seen.txt - <<'END'
exported: 1.0 of the size, the matrix stored 1 times, the output by MatMul
optimized and saved: 1.9 of the size, the matrix stored 2 times, the output by MatMul
pre-processed: 1.9 of the size, the matrix stored 2 times, the output by MatMul
quantized: 0.3 of the size, the matrix stored 1 times, the output by MatMul
pre-processed and quantized: 0.5 of the size, the matrix stored 2 times, the output by MatMulInteger
END
