#!/usr/bin/env bash
# transformers 5.23.0, gguf 0.19.0: the tokenizer of a GGUF file with a byte-level vocabulary that has no
# `<|endoftext|>`, as those of Llama 3 and of many others have none.
#
# Bet: the tokenizer has the tokens that the file lists, as many as the model has embeddings.
# Seen: it has one more. The vocabulary is handed to the class GPT2Tokenizer, which adds its own end of text behind the
# last token; a text that spells it is read as a number that no embedding has.
#
#   tokens in the file: 260
#   tokens of the tokenizer: 261
#   read as: [256, 260]
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 gguf==0.19.0
cd "$place"
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1
env/bin/python - > seen.txt <<'END'
import gguf
import numpy
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<begin>", "<end>", "ab", "cd"]
kinds = [gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * 2
writer = gguf.GGUFWriter("model.gguf", "llama")
writer.add_vocab_size(len(tokens))
writer.add_context_length(64)
writer.add_embedding_length(32)
writer.add_feed_forward_length(64)
writer.add_block_count(1)
writer.add_head_count(2)
writer.add_head_count_kv(2)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("llama-bpe")
writer.add_token_list(tokens)
writer.add_token_types(kinds)
writer.add_token_merges(["a b", "c d"])
writer.add_bos_token_id(256)
writer.add_eos_token_id(257)
writer.add_tensor("token_embd.weight", numpy.zeros((len(tokens), 32), numpy.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
tokenizer = AutoTokenizer.from_pretrained(".", gguf_file="model.gguf")
print("tokens in the file:", len(tokens))
print("tokens of the tokenizer:", len(tokenizer))
print("read as:", tokenizer("<begin><|endoftext|>", add_special_tokens=False)["input_ids"])
END
cat seen.txt
diff seen.txt - <<'END'
tokens in the file: 260
tokens of the tokenizer: 261
read as: [256, 260]
END
