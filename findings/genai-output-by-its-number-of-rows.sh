#!/usr/bin/env bash
# onnxruntime-genai 0.18.0 (onnx-ir 1.1.0, onnxruntime 1.32.0): its builder, and Llamas of several sizes by transformers 5.23.0.
#
# Bet: the output matrix is found by its name, so that a plain Llama of any sizes comes out as it is, or is refused.
# Seen: every linear layer with as many outputs as the vocabulary has tokens is taken for it, one inside a layer, too. With an MLP
# as wide as the vocabulary is large, or as many hidden channels, the graph computes something else from the first token on. Nothing
# is said. So a Llama 3.2 1B, whose MLPs have 8,192 neurons, cannot be cut to 8,192 tokens, but to 8,208 it can.
#
#   vocabulary 512, MLP 496, hidden size 256: equal
#   vocabulary 512, MLP 512, hidden size 256: differs from the first token on
#   vocabulary 512, MLP 1024, hidden size 256: equal
#   vocabulary 256, MLP 512, hidden size 256: differs from the first token on
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$place/packages" \
    torch==2.13.0 transformers==5.23.0 onnxruntime-genai==0.18.0 onnxruntime==1.32.0 onnx-ir==1.1.0 onnx==1.23.2 sentencepiece
cd "$place"
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 TQDM_DISABLE=1 PYTHONPATH=packages
python3 - > seen.txt <<'END'
import shutil
import subprocess
import sys
import numpy as np
import onnxruntime_genai as genai
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
tokens = [3 + 7 * n % 90 for n in range(30)]

def gaps(vocabulary, neurons):
    """The largest difference of a logit behind each token."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(hidden_size=256, head_dim=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
                                         intermediate_size=neurons, vocab_size=vocabulary, bos_token_id=1, eos_token_id=2,
                                         pad_token_id=0, initializer_range=0.1, max_position_embeddings=1024)).eval()
    model.save_pretrained("model")
    words = {word: n for n, word in enumerate(["<unk>", "<s>", "</s>", *(f"w{n}" for n in range(3, vocabulary))])}
    tokenizer = Tokenizer(models.BPE(words, [], unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>").save_pretrained("model")
    build = ["-m", "onnxruntime_genai.models.builder", "-i", "model", "-o", "built", "-p", "fp32", "-e", "cpu", "-c", "cache"]
    subprocess.run([sys.executable, *build], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    built = genai.Model("built")
    settings = genai.GeneratorParams(built)
    settings.set_search_options(max_length=64)
    generator, found = genai.Generator(built, settings), []
    for token in tokens:
        generator.append_tokens(np.array([[token]], dtype=np.int32))
        found.append(generator.get_logits()[0, -1].copy())
    shutil.rmtree("model"), shutil.rmtree("built")
    return np.abs(np.stack(found) - expected).max(1)

for vocabulary, neurons in ((512, 496), (512, 512), (512, 1024), (256, 512)):
    gap = gaps(vocabulary, neurons)
    said = "equal" if gap.max() < 1e-3 else "differs from the first token on" if gap.min() > 0.5 else f"gaps {gap}"
    print(f"vocabulary {vocabulary}, MLP {neurons}, hidden size 256: {said}")
END
cat seen.txt
diff seen.txt - <<'END'
vocabulary 512, MLP 496, hidden size 256: equal
vocabulary 512, MLP 512, hidden size 256: differs from the first token on
vocabulary 512, MLP 1024, hidden size 256: equal
vocabulary 256, MLP 512, hidden size 256: differs from the first token on
END
