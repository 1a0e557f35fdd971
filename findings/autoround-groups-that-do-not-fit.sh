#!/usr/bin/env bash
# auto-round 0.16.1, transformers 5.23.0, on a CPU: a Llama rounded to 4 bits in groups of 128 (W4A16, `iters=0`), whose MLP has
# 1,024 neurons, and 1,088 as after pruning.
#
# Bet: groups that do not fit are an error, or the layer is named and stays in 16 bits.
# Seen: each row is filled up with zeros to whole groups, so that what is stored is as wide as 1,152 neurons, without a word. What
# it wrote it cannot read: it gives these layers a place that takes no weights, transformers lists the stored ones as unexpected and
# goes on, and the first text ends in a TypeError. A hidden size of 576, as SmolLM2-135M has it, comes to the same in every layer.
#
#   1024 neurons: stored for 1024, unexpected 0, reads a text: True
#   1088 neurons: stored for 1152, unexpected 6, reads a text: TypeError
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --no-compile --disable-pip-version-check --target "$place/packages" \
    torch==2.13.0 transformers==5.23.0 auto-round==0.16.1
cd "$place"
export HF_HUB_OFFLINE=1 TQDM_DISABLE=1
cat > look.py <<'END'
import torch
from auto_round import AutoRound
from safetensors import safe_open
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

def look():
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(256)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1", bos_token="w2")
    sizes = dict(hidden_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=256)
    for neurons in (1024, 1088):
        llama = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=neurons, tie_word_embeddings=False))
        llama.to(torch.bfloat16).save_pretrained("whole")
        tokenizer.save_pretrained("whole")
        rounded = AutoRound("whole", scheme="W4A16", iters=0, disable_opt_rtn=True, nsamples=4, seqlen=32)
        rounded.quantize_and_save(f"rounded-{neurons}", format="auto_round")
        with safe_open(f"rounded-{neurons}/model.safetensors", "pt") as file:
            stored = 8 * file.get_slice("model.layers.0.mlp.down_proj.qweight").get_shape()[0]  # eight in an int32
        model, said = AutoModelForCausalLM.from_pretrained(f"rounded-{neurons}", output_loading_info=True)
        try:
            read = bool(model(torch.arange(32)[None]).logits.isfinite().all())
        except TypeError as error:
            read = type(error).__name__
        print(f"SEEN {neurons} neurons: stored for {stored}, unexpected {len(said['unexpected_keys'])}, reads a text: {read}")

if __name__ == "__main__":  # auto-round starts processes
    look()
END
PYTHONPATH=packages python3 look.py > log.txt 2> warnings.txt || { cat warnings.txt; exit 1; }
grep '^SEEN ' log.txt | cut -d' ' -f2- > seen.txt
cat seen.txt
diff seen.txt - <<'END'
1024 neurons: stored for 1024, unexpected 0, reads a text: True
1088 neurons: stored for 1152, unexpected 6, reads a text: TypeError
END
