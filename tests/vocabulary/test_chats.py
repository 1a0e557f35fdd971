"""What chat templates write stays, so that a prompt is the same tokens as before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmprune_cli.options import ModelReference
from llmprune_cli.source.opening import open_checkpoint
from llmprune_cli.vocabulary.choice import must_stay
from llmprune_cli.vocabulary.rewriting import cut_tokens, open_tokens
from support.refusals import edit_json
from support.tiny import save_tiny

LLAMA = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '</s>\\n\\n' + message['content'] | trim + '</s>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant</s>\\n\\n' }}{% endif %}"
)
CHATML = """{%- for message in messages %}
    {%- if message.role == "user" or message.role == "system" %}
        {{- '<s>' + message.role + '\\n' + message.content + '</s>' + '\\n' }}
    {%- else %}
        {{- '<s>' + message.role + '\\n' + message.content }}
        {{- '</s>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<s>assistant\\n' }}
    {%- if enable_thinking is not defined or not enable_thinking %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
PLAIN = """Below is an instruction that describes a "task". Don't answer it in haste.
{% for message in messages %}
### {{ message['role'] }}:
{{ message['content'] }}
{% endfor %}
### Response:
"""
TURNS = (("system", "x"), ("user", "x"), ("assistant", "x"), ("user", "x"))


@pytest.fixture(scope="module", params=["bytes", "pieces"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer has learned nothing but what templates write, and so has tokens for all of it."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    folder = save_tiny(tmp_path_factory.mktemp("model") / "model", vocab_size=512, shard="1GB")
    tokenizer = Tokenizer(models.BPE())
    if request.param == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        alphabet = [chr(code) for code in range(33, 127)]
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    words = ["system user assistant", "system", "user", "assistant", "<think>\n\n</think>\n\n", "other words go"]
    tokenizer.train_from_iterator([LLAMA.replace("\\n", "\n"), CHATML.replace("\\n", "\n"), PLAIN, *words] * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<unk>", "<s>", "</s>")])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def staying(model: Path) -> frozenset[int]:
    with open_checkpoint(ModelReference(str(model)), need_weights=False) as checkpoint:
        return must_stay(open_tokens(checkpoint), checkpoint, 512, None)


def cut_to(model: Path, kept: frozenset[int]) -> Any:
    from tokenizers import Tokenizer

    with open_checkpoint(ModelReference(str(model)), need_weights=False) as checkpoint:
        return Tokenizer.from_str(json.dumps(cut_tokens(open_tokens(checkpoint), tuple(sorted(kept)))))


@pytest.mark.parametrize("template", [LLAMA, CHATML, PLAIN], ids=["llama", "chatml", "plain"])
def test_a_prompt_is_the_same_tokens_where_no_others_stay(model: Path, template: str) -> None:
    from transformers import AutoTokenizer

    (model / "chat_template.jinja").write_text(template)
    part, whole = cut_to(model, staying(model)), AutoTokenizer.from_pretrained(model)
    assert part.get_vocab_size() < len(whole) - 20
    turns = [{"role": role, "content": content} for role, content in TURNS]
    for some, adds in ((turns, True), (turns[:3], False), (turns[1:2], True)):
        prompt = whole.apply_chat_template(some, tokenize=False, add_generation_prompt=adds)
        assert part.encode(prompt).tokens == whole.backend_tokenizer.encode(prompt).tokens


def test_several_templates_are_read_and_a_faulty_one_stops_nothing(model: Path) -> None:
    (model / "chat_template.jinja").unlink(missing_ok=True)
    found = {}
    for name, template in (("none", ""), ("whole", LLAMA), ("faulty", "{{ '<think>' }}{% $ %}{{ ' ")):
        named = [{"name": "default", "template": template}, {"name": "other", "template": "{{ 'x' }}"}]
        edit_json(model / "tokenizer_config.json", lambda own, named=named: own.update(chat_template=named))
        found[name] = staying(model)
    edit_json(model / "tokenizer_config.json", lambda own: own.pop("chat_template"))
    assert found["none"] < found["whole"] and found["none"] < found["faulty"]
