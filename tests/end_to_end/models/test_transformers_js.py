"""transformers.js, which runs models in browsers and in node, goes on with a text as transformers does."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from support.exports import export, needs_onnx, pruned, verified
from support.stock import load_stock
from support.tiny import BYTE_LEVEL_VOCABULARY, save_byte_level

JAVASCRIPT = os.environ.get("LLMPRUNE_JAVASCRIPT", "")
HAS_JAVASCRIPT = bool(JAVASCRIPT) and Path(JAVASCRIPT, "node_modules").is_dir()
needs_javascript = pytest.mark.skipif(not HAS_JAVASCRIPT, reason="run make check-consumers where node and npm are")
TEXT, TOKENS = "The history of the city , x != y .", 16
CHAT = "{% for turn in messages %}[{{ turn['role'] }}]{{ turn['content'] }}{% endfor %}"
MESSAGES = [{"role": "user", "content": "Why?"}]


@needs_onnx
@needs_javascript
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma3_text", "qwen3_moe"])
def test_transformers_js_goes_on_as_transformers_does(family: str, tmp_path: Path) -> None:
    """One text and a batch, in tokens and in letters, with a start token that only `tokenizer.json` tells of."""
    folder = pruned(tmp_path, family, vocab_size=BYTE_LEVEL_VOCABULARY)
    save_byte_level(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    start = TemplateProcessing("<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = start
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    assert "add_bos_token" not in json.loads((folder / "tokenizer_config.json").read_text())
    verified(export(folder, tmp_path / "graph", "onnx"))
    prompts = [torch.randint(3, 90, (1, 9)), torch.randint(3, 90, (2, 20))]
    model, greedy = load_stock(folder), {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}

    def goes_on(ids: torch.Tensor) -> list[list[int]]:
        with torch.no_grad():
            tokens: list[list[int]] = model.generate(
                ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **greedy
            ).tolist()
        return tokens

    found = in_javascript(tmp_path / "graph", prompts)
    assert found["continued"] == [goes_on(ids) for ids in prompts]
    ids = tokenizer(TEXT)["input_ids"]
    assert found["ids"] == ids and ids[0] == tokenizer.bos_token_id and found["decoded"] == TEXT
    assert found["generated_text"] == tokenizer.decode(goes_on(torch.tensor([ids]))[0], skip_special_tokens=True)
    assert found["chat"] == tokenizer.apply_chat_template(MESSAGES, tokenize=False)


def in_javascript(folder: Path, prompts: list[torch.Tensor]) -> dict[str, Any]:
    """What `in_transformers_js.mjs` prints."""
    asked = {
        "folder": str(folder),
        "prompts": [ids.tolist() for ids in prompts],
        "tokens": TOKENS,
        "text": TEXT,
        "messages": MESSAGES,
    }
    script = Path(__file__).with_name("in_transformers_js.mjs")
    done = subprocess.run(["node", script, JAVASCRIPT, json.dumps(asked)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return document
