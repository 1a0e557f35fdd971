"""Models with a tokenizer of every kind, and the same with three quarters of the tokens."""

from __future__ import annotations

from pathlib import Path

from support.cli import BY_MAGNITUDE, run_cli
from support.tiny import save_tiny
from support.tokenizers_of_kinds import learn

TEMPLATE = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '\\n' + message['content'] + '</s>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}"
)


def save_whole(folder: Path, kind: str) -> Path:
    """A random model with a tokenizer of a kind, and rows that no text becomes."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = learn(kind)
    rows = (tokenizer.get_vocab_size() // 64 + 2) * 64
    names = {name: tokenizer.token_to_id(token) for name, token in (("bos", "<s>"), ("eos", "</s>"), ("pad", "<pad>"))}
    changes = {f"{name}_token_id": number for name, number in names.items()}
    save_tiny(folder, vocab_size=rows, shard="1GB", **changes)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return folder


def cut(model: Path, output: Path) -> Path:
    text = output.with_name("text.txt")
    text.write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    options = ("--calibration", text, "--calibration-seq-len", "40", "--calibration-tokens", "400")
    run = run_cli("prune", model, *BY_MAGNITUDE, "--vocab-size", "75%", *options, "--output", output)
    assert run.code == 0, run.stderr
    return output
