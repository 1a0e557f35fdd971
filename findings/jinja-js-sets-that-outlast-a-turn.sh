#!/usr/bin/env bash
# @huggingface/jinja 0.5.11, with which transformers.js 4.3.2 renders chats, beside transformers 5.23.0 and Jinja2 3.1.6.
#
# Bet: a chat template that both take makes the same prompt, or one of them raises an error.
# Seen: three ways to another prompt, without a word. What a turn sets (`set`) is still set in the next one, where Jinja begins
# each anew: with lines as in GLM-5.2's template, an answer without reasoning repeats the reasoning of the one before, and a turn
# of the user is given the role of the model. What a turn wrote before a `continue` or `break` is dropped. And `strip`, `lstrip`
# and `rstrip` do not read what they are given and take all white space: `lstrip('\n')`, as in Qwen3's template, takes the
# indentation of code too.
#
#   reasoning: transformers '<plan>one<>two', transformers.js '<plan>one<plan>two'
#   role: transformers '[user]a[model]b[user]c', transformers.js '[user]a[model]b[model]c'
#   continue: transformers '[user]a[assistant][user]c', transformers.js '[user]a[user]c'
#   lstrip: transformers '    return 1', transformers.js 'return 1'
#   rstrip: transformers 'a, b', transformers.js 'a, b,'
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --no-compile --disable-pip-version-check --target "$place/packages" \
    transformers==5.23.0 jinja2==3.1.6
cd "$place"
npm install --silent --no-fund --no-audit --ignore-scripts @huggingface/jinja@0.5.11 > npm.txt 2>&1 || { cat npm.txt; exit 1; }
export HF_HUB_OFFLINE=1
cat > look.py <<'END'
import json
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), unk_token="a")
answers = [{"role": "assistant", "content": "one", "reasoning": "plan"}, {"role": "assistant", "content": "two"}]
turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]
called = [turns[0], {**turns[1], "content": ""}, turns[2]]
cases = {
    "reasoning": (
        "{% for m in messages %}{% if m.reasoning is defined %}{% set thought = m.reasoning %}{% endif %}"
        "<{{ thought }}>{{ m.content }}{% endfor %}",
        answers,
    ),
    "role": (
        "{% set role = 'user' %}{% for m in messages %}{% if m.role == 'assistant' %}{% set role = 'model' %}{% endif %}"
        "[{{ role }}]{{ m.content }}{% endfor %}",
        turns,
    ),
    "continue": (
        "{% for m in messages %}[{{ m.role }}]{% if not m.content %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
        called,
    ),
    "lstrip": ("{{ messages[0].content.lstrip('\\n') }}", [{"role": "assistant", "content": "\n\n    return 1"}]),
    "rstrip": ("{{ messages[0].content.rstrip(',') }}", [{"role": "user", "content": "a, b,"}]),
}
rendered = [
    {
        "name": name,
        "template": template,
        "messages": messages,
        "expected": tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False),
    }
    for name, (template, messages) in cases.items()
]
print(json.dumps(rendered))
END
cat > look.mjs <<'END'
import { readFileSync } from "node:fs";
import { Template } from "@huggingface/jinja";

for (const { name, template, messages, expected } of JSON.parse(readFileSync("cases.json"))) {
    const seen = new Template(template).render({ messages });
    console.log(`${name}: transformers '${expected}', transformers.js '${seen}'`);
}
END
PYTHONPATH=packages python3 look.py > cases.json 2> warnings.txt || { cat warnings.txt; exit 1; }
node look.mjs > seen.txt
cat seen.txt
diff seen.txt - <<'END'
reasoning: transformers '<plan>one<>two', transformers.js '<plan>one<plan>two'
role: transformers '[user]a[model]b[user]c', transformers.js '[user]a[model]b[model]c'
continue: transformers '[user]a[assistant][user]c', transformers.js '[user]a[user]c'
lstrip: transformers '    return 1', transformers.js 'return 1'
rstrip: transformers 'a, b', transformers.js 'a, b,'
END
