"""Text that a model writes itself, to be calibrated or healed on."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoTokenizer

from llmprune_cli.options import ModelReference
from llmprune_cli.progress import Listener
from llmprune_cli.run import calibration
from llmprune_cli.source import own_text
from llmprune_cli.source.full_model import load_model
from llmprune_cli.source.opening import open_checkpoint
from llmprune_cli.text.conversations import Spelled
from llmprune_cli.text.names import WITH_CONVERSATIONS
from support.cli import run_cli
from support.heal_runs import recover
from support.refusals import CHECKPOINT, assert_refused
from support.stock import written_tensors
from support.tiny import BYTE_LEVEL_VOCABULARY, save_byte_level, save_tiny

CHAT = "{% for turn in messages %}[{{ turn['role'] }}]{{ turn['content'] }}[/{{ turn['role'] }}]{% endfor %}"
CHAT += "{% if add_generation_prompt %}[assistant]{% endif %}"
ASKED = ("--mlp", "50%", "--calibration-tokens", "256", "--calibration-seq-len", "32")


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("writing") / "model"
    save_tiny(folder, initializer_range=0.15, vocab_size=BYTE_LEVEL_VOCABULARY, max_position_embeddings=64)
    save_byte_level(folder)
    return folder


def test_a_model_is_calibrated_on_what_it_writes_itself(
    writer: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same seed writes the same text, in a mixture as well."""
    monkeypatch.setattr(calibration, "JUDGED_TOKENS", 512)
    outputs = tmp_path / "one", tmp_path / "two"
    for output in outputs:
        run = run_cli("prune", writer, *ASKED, "--calibration", "self", "--output", output, "--json")
        assert run.code == 0, run.stderr
    card = json.loads(run.stdout)["calibration"]
    assert card["dataset"] == "self" and card["origin"] == f"text that {writer} wrote itself"
    assert card["tokens"] == 256 and card["held_out_tokens"] == 17 * 31  # which is 512 at least
    assert (outputs[0] / "model.safetensors").read_bytes() == (outputs[1] / "model.safetensors").read_bytes()
    mixture = ("--calibration", f"self:0.5,{text_file}:0.5", "--seed", "1")
    run = run_cli("prune", writer, *ASKED, *mixture, "--output", tmp_path / "mixed")
    assert run.code == 0, run.stderr
    assert written_tensors(tmp_path / "mixed").keys() == written_tensors(outputs[0]).keys()


def test_a_teacher_writes_what_its_student_learns_from(writer: Path, tmp_path: Path) -> None:
    pruned = tmp_path / "pruned"
    options = ("--importance", "magnitude", "--refit", "none", "--output", pruned)
    assert run_cli("prune", writer, "--mlp", "50%", *options).code == 0
    result = recover(pruned, Path("self"), tmp_path / "healed")
    assert result["origin"] == f"text that {writer} wrote itself" and result["is_better"]


def test_a_model_without_room_writes_nothing(writer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: whole._replace(available=1000))
    run = run_cli("prune", writer, *ASKED, "--calibration", "self", "--device", "cpu", "--output", tmp_path / "out")
    assert_refused(run, CHECKPOINT, "no room for", "'self'")
    assert not list(tmp_path.iterdir())


def test_a_model_is_not_judged_by_what_it_writes_itself(writer: Path) -> None:
    assert_refused(run_cli("eval", writer, "--dataset", "self"), CHECKPOINT, "not judged", "Give a text")


def written_by(writer: Path, template: str | None, seed: int = 0, tokens: int = 300) -> str:
    """Text that a model writes itself whose tokenizer has a chat template."""
    return spelled_by(writer, template, seed, tokens).text


def spelled_by(writer: Path, template: str | None, seed: int = 0, tokens: int = 300) -> Spelled:
    """The same with what an assistant says in it."""
    tokenizer = AutoTokenizer.from_pretrained(writer)
    tokenizer.chat_template = template
    with open_checkpoint(ModelReference(str(writer)), need_weights=True) as checkpoint:
        place = own_text.Place("cpu", torch.float32)
        return own_text.write_text(checkpoint, tokenizer, place, tokens, seed, Listener())


def test_a_model_with_a_chat_template_writes_conversations(writer: Path) -> None:
    text = written_by(writer, CHAT)
    assert re.fullmatch(r"(\[user\].+?\[/user\]\[assistant\].+?(\[/assistant\])?(?=\[user\]|$))+", text, re.DOTALL)
    assert text.count("[user]") > 3 and text == written_by(writer, CHAT) != written_by(writer, CHAT, seed=1)
    assert len(AutoTokenizer.from_pretrained(writer)(text)["input_ids"]) >= 300
    answers = spelled_by(writer, CHAT).answers
    assert answers is not None
    assert [text[first:end] for first, end in answers] == re.findall(
        r"(?<=\[/user\]\[assistant\]).+?(?:\[/assistant\])?(?=\[user\]|$)", text, re.DOTALL
    )


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{% for turn in messages %}{{ turn['content'] }}{% endfor %}",  # which adds nothing
        "{{ raise_exception('a system prompt first') }}",
        CHAT.replace("turn['content']", "turn['content'] | upper"),
        "x" * 3000 + CHAT,  # which leaves no room for a conversation
    ],
)
def test_a_model_without_a_template_that_serves_writes_documents(writer: Path, template: str | None) -> None:
    assert written_by(writer, template) == written_by(writer, None)


@pytest.mark.parametrize("is_over", [True, False])
def test_a_turn_ends_where_the_model_ends_it(writer: Path, monkeypatch: pytest.MonkeyPatch, is_over: bool) -> None:
    """A question where anything special comes, or the template's own words, which some models write on.

    An answer has all that comes before its end; one that was cut short has no end.
    """
    tokenizer = AutoTokenizer.from_pretrained(writer)
    asked, answered = (
        tokenizer.encode(own, add_special_tokens=False) for own in ("Why?[/user][assistant]No", "<unk>So it is")
    )
    end = [tokenizer.eos_token_id, 5, 6]
    said = [[*asked, *end], [*answered, *(end if is_over else ())]]
    monkeypatch.setattr(own_text._Writer, "_sampled", lambda *_: [said.pop(0)])
    text = written_by(writer, CHAT, tokens=1)
    assert text == "[user]Why?[/user][assistant]<unk>So it is" + "[/assistant]" * is_over


def test_a_turn_ends_at_an_added_token_of_the_template(writer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not all tokenizers call such a token special, and not all models name it as an end."""
    tokenizer = AutoTokenizer.from_pretrained(writer)
    tokenizer.add_tokens(["<turn>", "<think>"])
    tokenizer.chat_template = (
        "{% for turn in messages %}{{ turn['role'] }}:{{ turn['content'] }}<turn>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    said = [
        tokenizer.encode(own, add_special_tokens=False)
        for own in ("Why?<turn>user: no", "<think>So it is<turn>user: more")
    ]
    monkeypatch.setattr(own_text._Writer, "_sampled", lambda *_: [said.pop(0)])
    with open_checkpoint(ModelReference(str(writer)), need_weights=True) as checkpoint:
        place = own_text.Place("cpu", torch.float32)
        text = own_text.write_text(checkpoint, tokenizer, place, 1, 0, Listener())
    assert text == Spelled("user:Why?<turn>assistant:<think>So it is<turn>", ((25, 46),))


def test_an_answer_keeps_the_space_that_it_begins_with(writer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some tokenizers leave it out where tokens are spelled alone."""
    whole = own_text.spelled
    monkeypatch.setattr(own_text, "spelled", lambda tokenizer, ids: whole(tokenizer, ids).removeprefix(" "))
    tokenizer = AutoTokenizer.from_pretrained(writer)
    said = [tokenizer.encode(own, add_special_tokens=False) for own in ("Why?", " So it is")]
    monkeypatch.setattr(own_text._Writer, "_sampled", lambda *_: [[*said.pop(0), tokenizer.eos_token_id]])
    assert written_by(writer, CHAT, tokens=1) == "[user]Why?[/user][assistant] So it is[/assistant]"


def test_a_model_that_falls_silent_now_and_then_is_asked_again(writer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Spelled("one")
    rounds = [[one], [], [], [one], [], [], [one], [], [], []]
    with open_checkpoint(ModelReference(str(writer)), need_weights=True) as checkpoint:
        model = load_model(checkpoint, "cpu", "float32")
    own = own_text._Writer(model, AutoTokenizer.from_pretrained(writer))
    count = len(own._tokenizer.encode("one", add_special_tokens=False))
    assert own.fill(2 * count + 1, lambda _: rounds.pop(0), Listener()) == 3 * [one]
    assert own.fill(1, lambda _: rounds.pop(0), Listener()) == [] and not rounds


def test_what_a_template_leaves_out_of_a_conversation_is_kept(writer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some leave out what a model thought before it answered."""
    thinking = CHAT.replace("{{ turn['content'] }}", "{{ turn['content'].split('</think>')[-1] }}")
    tokenizer = AutoTokenizer.from_pretrained(writer)
    said = [tokenizer.encode(own, add_special_tokens=False) for own in ("Why?", "Well</think>So")]
    monkeypatch.setattr(own_text._Writer, "_sampled", lambda *_: [[*said.pop(0), tokenizer.eos_token_id]])
    text = written_by(writer, thinking, tokens=1)
    assert text == "[user]Why?[/user][assistant]Well</think>So[/assistant]"


def test_a_model_that_says_nothing_as_a_user_writes_documents(writer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = own_text._Writer._sampled
    end = AutoTokenizer.from_pretrained(writer).eos_token_id

    def mute(self: own_text._Writer, begun: list[list[int]], most: int, ends: set[int]) -> list[list[int]]:
        return [[end]] * len(begun) if len(begun[0]) > 1 else sample(self, begun, most, ends)

    monkeypatch.setattr(own_text._Writer, "_sampled", mute)
    assert written_by(writer, CHAT) == written_by(writer, None)


def test_a_model_that_chats_is_told_once_which_text_keeps_its_answers(
    writer: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no text was named: what heals the model in the same run reads the same, and has nothing to add."""
    model, wikitext = tmp_path / "model", tmp_path / "wikitext" / "validation.jsonl"
    shutil.copytree(writer, model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    told = list[str]()
    own_text.warn_of_no_conversations(None, tokenizer, told.append)
    tokenizer.chat_template = CHAT
    own_text.warn_of_no_conversations(str(text_file), tokenizer, told.append)
    assert not told
    tokenizer.save_pretrained(model)
    wikitext.parent.mkdir()
    wikitext.write_text(json.dumps({"text": text_file.read_text()}))
    monkeypatch.setenv("LLMPRUNE_WIKITEXT2", str(wikitext.parent))
    one = ("prune", model, *ASKED, "--importance", "activation", "--recover", "1024", "--output", tmp_path / "out")
    two = ("recover", tmp_path / "out", "--tokens", "1024", "--output", tmp_path / "healed")
    for command in (one, two):
        run = run_cli(*command)
        assert run.code == 0 and run.stderr.count("has no conversations") == 1, run.stderr
        assert WITH_CONVERSATIONS in run.stderr
