"""Texts that benchmarks judge models by: two that llmprune knows, and some that nothing is fitted on or heals with."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterable
from pathlib import Path

PARTS = 64  # of so many files a text is made
PART_LENGTH = 4000  # characters
LICENSE_LENGTH = 1500  # before them, as files begin with licences
ANSWERS = "its own answers"
ANSWER_TOKENS = 192  # at most
QUESTIONS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain photosynthesis to a child.",
    "How do I boil an egg?",
    "Translate 'good morning' to Spanish.",
    "Give me three tips for sleeping better.",
    "What is 12 times 8?",
    "Write a Python function that adds two numbers.",
    "Who wrote Romeo and Juliet?",
    "Summarize the water cycle.",
    "Suggest a name for a cat.",
    "Why is the sky blue?",
    "Write an email asking for a day off.",
    "What should I cook with rice and eggs?",
    "What is the largest planet?",
    "Tell me a joke.",
)


def write_documentation(path: Path) -> Path:
    """What `python-docs` calibrates on, as a file, for programs and builds that read another part under this name."""
    from llmprune_cli.text.corpus import load_corpus

    path.write_text(load_corpus("python-docs", "validation").text, encoding="utf-8")
    return path


def write_judged_texts(folder: Path, dense: Path | None = None) -> dict[str, str]:
    """What `eval` reads, by the name that tables give it; what llmprune does not know is written into a folder.

    Args:
        dense: a model whose answers are read, too, if it chats.
    """
    import torch

    source = _write_parts(folder / "source.txt", Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    headers = _write_parts(folder / "headers.txt", Path(torch.__file__).parent.glob("include/ATen/*.h"))
    own = {"WikiText-2": "wikitext2", "documentation": "python-docs"}
    own |= {"Python's source": str(source), "C++ headers": str(headers)}
    answers = write_answers(dense, folder) if dense is not None else None
    return own if answers is None else {**own, ANSWERS: str(answers)}


def write_answers(dense: Path, folder: Path) -> Path | None:
    """What a model that chats answers to `QUESTIONS`, sampled from what it predicts, as a file of conversations."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = folder / "answers.jsonl"
    if path.exists():
        return path
    tokenizer = AutoTokenizer.from_pretrained(dense)
    if tokenizer.chat_template is None:
        return None
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    torch.manual_seed(0)
    rows = []
    for question in QUESTIONS:
        asked = [{"role": "user", "content": question}]
        given = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": ANSWER_TOKENS}
        answer = model.generate(**given, **how)[0, given["input_ids"].shape[1] :]
        said = {"role": "assistant", "content": tokenizer.decode(answer, skip_special_tokens=True)}
        rows.append(json.dumps({"messages": [*asked, said]}))
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


def _write_parts(path: Path, files: Iterable[Path]) -> Path:
    """Parts of files that lie evenly among these."""
    found = sorted(files)
    chosen = found[:: max(1, len(found) // PARTS)]
    texts = (file.read_text(encoding="utf-8", errors="ignore")[LICENSE_LENGTH:][:PART_LENGTH] for file in chosen)
    path.write_text("\n\n".join(texts), encoding="utf-8")
    return path
