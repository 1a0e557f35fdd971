#!/usr/bin/env bash
# transformers 5.23.0: `apply_chat_template(..., return_assistant_tokens_mask=True)`, with a template that marks what is an answer.
#
# Bet: the tokens of all answers; where the text is cut from the left, of those that are left.
# Seen: an answer whose first character belongs to no token is passed over, and all later ones with it, without a word. Such are a
# space within `{% generation %}` for a byte-level tokenizer with `trim_offsets`, which it has unless told otherwise, and an answer
# that was cut off. What is trained on answers alone learns from none of them.
#
#   trim_offsets=False: two, four
#   trim_offsets=False, last 5 of 12 tokens, ": three A : four": nothing
#   trim_offsets unless told otherwise: nothing
#   warnings: 0
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --no-compile --disable-pip-version-check --target "$place/packages" \
    transformers==5.23.0 tokenizers==0.23.3 jinja2==3.1.6
cd "$place"
export HF_HUB_OFFLINE=1
PYTHONPATH=packages python3 - > seen.txt <<'END'
import logging
import warnings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as of_transformers
template = (
    "{% for message in messages %}{% if message.role == 'assistant' %}A:{% generation %} {{ message.content }}{% endgeneration %}"
    "{% else %}U: {{ message.content }}{% endif %}{% endfor %}"
)
said = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]

class Counted(logging.Handler):
    records = []
    def emit(self, record):
        self.records.append(record)

of_transformers.add_handler(Counted(logging.WARNING))

def show(label, step, length=None):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, min_frequency=1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([" one two three four U: A:"] * 3, trainer)
    tokenizer.post_processor, tokenizer.decoder = step, decoders.ByteLevel()
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, truncation_side="left")
    cut = dict(truncation=True, max_length=length) if length else {}
    messages = [dict(role=role, content=content) for role, content in said]
    found = whole.apply_chat_template(messages, chat_template=template, return_assistant_tokens_mask=True, return_dict=True, **cut)
    tokens = [whole.decode([number]).strip() for number in found["input_ids"]]
    answers = [token for token, marked in zip(tokens, found["assistant_masks"], strict=True) if marked]
    text = f', last {length} of 12 tokens, "{" ".join(tokens)}"' if length else ""
    print(f"{label}{text}: {', '.join(answers) or 'nothing'}")

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    show("trim_offsets=False", processors.ByteLevel(trim_offsets=False))
    show("trim_offsets=False", processors.ByteLevel(trim_offsets=False), 5)
    show("trim_offsets unless told otherwise", processors.ByteLevel())
about = [record for record in Counted.records if "PyTorch" not in record.getMessage()] + [one for one in caught if "mask" in str(one.message)]
print("warnings:", len(about))
END
cat seen.txt
diff seen.txt - <<'END'
trim_offsets=False: two, four
trim_offsets=False, last 5 of 12 tokens, ": three A : four": nothing
trim_offsets unless told otherwise: nothing
warnings: 0
END
