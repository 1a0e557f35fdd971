"""What a model that chats says before and after pruning, on its report card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoTokenizer

from llmprune_cli.options import ModelReference
from llmprune_cli.progress import QUIET
from llmprune_cli.run.questions.prompts import ANSWER_TOKENS, PROMPTS, answer_prompts
from llmprune_cli.source.opening import open_checkpoint
from support.cli import CALIBRATED, run_cli
from support.stock import load_stock
from support.tiny import save_tiny

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant]"


@pytest.fixture
def chatting(tmp_path: Path) -> Path:
    folder = save_tiny(tmp_path / "model", initializer_range=0.15)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def prune(model: Path, text: Path, out: Path, *options: str) -> dict[str, Any]:
    measured = ("--importance", "activation", "--refit", "none", "--calibration", text, *CALIBRATED)
    asked = ("--intermediate-size", "24", *measured, "--output", out)
    run = run_cli("prune", model, *asked, "--json", *options)
    assert run.code == 0, run.stderr
    card: dict[str, Any] = json.loads(run.stdout)["calibration"]
    return {**card, "said": run.stderr}


def said_by(folder: Path) -> list[str]:
    """What transformers generates, prompt by prompt."""
    model, tokenizer = load_stock(folder), AutoTokenizer.from_pretrained(folder)
    answers = []
    for prompt in PROMPTS:
        spelled = f"[user] {prompt}\n[assistant]"
        ids = torch.tensor([tokenizer.encode(spelled, add_special_tokens=False)])
        with torch.inference_mode():
            written = model.generate(ids, max_new_tokens=ANSWER_TOKENS, do_sample=False, pad_token_id=0)
        answers.append(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return answers


def test_a_model_that_chats_answers_before_and_after(chatting: Path, text_file: Path, tmp_path: Path) -> None:
    card = prune(chatting, text_file, tmp_path / "out")
    found = [(own["prompt"], own["before"], own["after"]) for own in card["answers"]]
    assert found == list(zip(PROMPTS, said_by(chatting), said_by(tmp_path / "out"), strict=True))
    assert all(before for _, before, _ in found) and any(before != after for _, before, after in found)
    assert json.loads((tmp_path / "out" / "llmprune.json").read_text())["calibration"]["answers"] == card["answers"]
    page = (tmp_path / "out" / "README.md").read_text()
    assert "## What it says" in page and all(f"- **{prompt}**" in page for prompt in PROMPTS), page
    assert page.count("- before: `") == page.count("- after: `") == 3
    shown = run_cli("export", tmp_path / "out", "--output", tmp_path / "again")
    assert shown.code == 0 and "## What it says" in (tmp_path / "again" / "README.md").read_text(), shown.stderr


def test_what_would_take_much_memory_is_not_asked_nor_what_does_not_chat(
    chatting: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answers() -> tuple[str, ...]:
        with open_checkpoint(ModelReference(str(chatting)), need_weights=True) as checkpoint:
            return answer_prompts(checkpoint, "cpu", torch.float32, QUIET)

    assert len(answers()) == len(PROMPTS)
    with monkeypatch.context() as patched:
        size, whole = sum(path.stat().st_size for path in chatting.glob("*.safetensors")), psutil.virtual_memory()
        patched.setattr(psutil, "virtual_memory", lambda: whole._replace(available=3 * size))
        assert answers() == ()
    (chatting / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert answers() == ()


def test_a_sweep_asks_nothing_that_it_does_not_show(chatting: Path, text_file: Path) -> None:
    measured = ("--importance", "activation", "--refit", "none", "--calibration", text_file, *CALIBRATED)
    run = run_cli("sweep", chatting, "--mlp", "25%,50%", *measured)
    assert run.code == 0 and "Judging" in run.stderr and "Answering" not in run.stderr, run.stderr


def test_a_sweep_that_keeps_its_models_shows_in_each_card_what_prune_shows(
    chatting: Path, text_file: Path, tmp_path: Path
) -> None:
    measured = ("--importance", "activation", "--refit", "none", "--calibration", text_file, *CALIBRATED)
    run = run_cli("sweep", chatting, "--mlp", "25%,50%", *measured, "--keep-models", "--output", tmp_path / "sizes")
    assert run.code == 0, run.stderr
    assert run.stderr.count("Answering") == 3, "the unpruned model answers once"
    alone = tmp_path / "alone"
    assert run_cli("prune", chatting, "--mlp", "50%", *measured, "--output", alone).code == 0
    kept = tmp_path / "sizes" / "mlp-50%"
    said, expected = (json.loads((path / "llmprune.json").read_text())["calibration"] for path in (kept, alone))
    assert said["answers"] == expected["answers"] and len(said["answers"]) == len(PROMPTS)
    assert "## What it says" in (kept / "README.md").read_text()


def test_a_template_that_fails_is_said_and_undoes_nothing(chatting: Path, text_file: Path, tmp_path: Path) -> None:
    (chatting / "chat_template.jinja").write_text("{{ raise_exception('only for tools') }}")
    card = prune(chatting, text_file, tmp_path / "out")
    assert card["answers"] == [] and "shows no answers" in card["said"] and "only for tools" in card["said"]
    assert "What it says" not in (tmp_path / "out" / "README.md").read_text()
