"""Of conversations, what an assistant says is learned alone, if that is asked for."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmprune_cli.heal import loss as losses
from llmprune_cli.heal import training_text
from llmprune_cli.heal.judging import judge
from llmprune_cli.heal.loss import Goal, Student
from llmprune_cli.heal.options import Healing, parse_loss
from llmprune_cli.heal.teacher.resident import ResidentTeacher
from llmprune_cli.heal.training_text import TOGETHER, Schedule, TrainingText, prepare_training
from llmprune_cli.processes import ALONE
from llmprune_cli.text.corpus import Corpus
from llmprune_cli.text.windows import Reader
from support.cli import BY_MAGNITUDE, run_cli
from support.full import in_full
from support.heal_runs import QUICK, interrupt_at, recover, recover_in_two, run_recover
from support.refusals import CHECKPOINT, INTERRUPTED, PLAN, USAGE, assert_refused
from support.stock import written_tensors
from support.tiny import BYTE_LEVEL_VOCABULARY

ON_ANSWERS = ("--loss-on", "assistant")
ANSWER = "I do not know that."


@pytest.fixture(scope="module")
def student(whole: Path) -> Path:
    """Of a model with a chat template."""
    template = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    (whole / "chat_template.jinja").write_text(template)
    folder = whole.with_name("student")
    run = run_cli("prune", whole, *BY_MAGNITUDE, "--mlp", "50%", "--output", folder)
    assert run.code == 0, run.stderr
    return folder


@pytest.fixture(scope="module")
def chats(whole: Path) -> Path:
    """A user says anything, and the assistant always the same."""
    path, drawn = whole.with_name("chats.jsonl"), random.Random(0)
    with path.open("w") as file:
        for _ in range(200):
            asked = "".join(drawn.choices("abcdefghijklmnopqrstuvwxyz ", k=drawn.randrange(20, 60)))
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": ANSWER}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def test_what_is_marked_is_what_the_assistant_says_and_the_rest_is_left_out(
    student: Path, chats: Path, tmp_path: Path
) -> None:
    long = tmp_path / "long.txt"
    long.write_text("Nobody says this, which is plain text. " * 60)
    tokenizer = AutoTokenizer.from_pretrained(student)
    for name in (str(chats), f"{chats}:0.5,{long}:0.5"):
        asked = Healing(tokens="4096", text=name, seq_len=32, batch_tokens=64, loss_on="assistant")
        text = prepare_training(asked, Reader(tokenizer, BYTE_LEVEL_VOCABULARY), 1, TOGETHER, lambda _: None)
        assert text.learned is not None and text.held_out_judged is not None
        for own, which in zip(text.windows[:, 1:], text.learned, strict=True):
            said, rest = tokenizer.decode(own[which]), tokenizer.decode(own[~which])
            is_plain = "No" in said or "plain" in said or "say" in said
            assert which.all() if is_plain else all(part in ANSWER for part in said.split("</s>"))
            assert "know" not in rest and "assistant:" not in said
        assert all(which.any() for which in text.learned)
        judged = "".join(
            tokenizer.decode(own[1:][which]) for own, which in zip(text.held_out, text.held_out_judged, strict=True)
        )
        assert text.held_out_bytes == len(judged.encode())


@pytest.mark.parametrize("kind", ["kl", "ce", "kl+0.25ce"])
def test_loss_and_figures_are_those_of_the_chosen_tokens(
    dense: Path, pruned: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "LOGIT_ELEMENTS", 7 * 96)  # logits of seven tokens
    teacher, model = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (dense, pruned))
    generator = torch.Generator().manual_seed(1)
    windows = torch.randint(0, 96, (3, 24), generator=generator)
    chosen = torch.rand(3, 23, generator=generator) < 0.4
    chosen[1, :16] = False  # all of two parts
    share = 0.25  # of all text; here there are more
    logits, wanted = (own(windows).logits[:, :-1][chosen].log_softmax(-1) for own in (model, teacher))
    kl = functional.kl_div(logits, wanted.detach(), reduction="batchmean", log_target=True)
    ce = functional.cross_entropy(logits, windows[:, 1:][chosen])
    weights = parse_loss(kind)
    expected = (weights.kl * kl + weights.ce * ce) * float(chosen.float().mean()) / share
    expected.backward()
    plain = {name: own.grad for name, own in model.named_parameters()}
    model.zero_grad()
    student = Student(model, weights, 1.0, torch.float32, learned_share=share)
    own = ResidentTeacher(teacher, 1.0, torch.float32)
    found = student(windows, own.goal(windows, torch.arange(3)), chosen)
    found.backward()
    torch.testing.assert_close(found, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name], rtol=1e-4, atol=1e-6, msg=name)
    text = TrainingText(Corpus("", "", ""), windows[:0], torch.arange(0), windows, 100, Schedule(1, 1, 1, 1))
    judged = judge(student, own, TrainingText(**{**vars(text), "held_out_judged": chosen}), 1.0, ALONE)
    assert judged.kl == pytest.approx(float(kl.detach()), rel=1e-4)
    assert judged.perplexity == pytest.approx(float(ce.detach().exp()), rel=1e-4)
    assert judged.bits_per_byte == pytest.approx(float(ce.detach()) * int(chosen.sum()) / 100 / 0.693147, rel=1e-4)


def test_a_model_learns_what_the_assistant_says_and_is_judged_by_that(
    student: Path, chats: Path, tmp_path: Path
) -> None:
    much = ("--loss", "ce", "--tokens", "8192", "--learning-rate", "0.01")
    of_all = recover(student, chats, tmp_path / "of-all", *much)
    learned = recover(student, chats, tmp_path / "learned", *much, *ON_ANSWERS)
    assert learned["loss_on"] == "assistant" and of_all["loss_on"] == "all"
    assert learned["held_out_tokens"] < 0.6 * of_all["held_out_tokens"]
    assert learned["after"]["perplexity"] < 3 < of_all["after"]["perplexity"] < of_all["before"]["perplexity"]
    card = (tmp_path / "learned" / "README.md").read_text()
    assert learned["learned_tokens"] < 0.6 * learned["tokens"] and of_all["learned_tokens"] == of_all["tokens"]
    assert f"trained on {learned['learned_tokens']:,} tokens" in card
    assert "to predict the text itself (`ce`), of what an assistant says in it" in card
    manifest = json.loads((tmp_path / "learned" / "llmprune.json").read_text())
    assert manifest["healing"]["options"]["loss_on"] == "assistant"


def test_shares_are_of_what_is_learned(student: Path, chats: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.txt"
    long.write_text("Nobody says this, which is plain text. " * 300)
    tokenizer = AutoTokenizer.from_pretrained(student)
    name = f"{chats}:0.7,{long}:0.3"
    asked = Healing(tokens="32768", text=name, seq_len=32, batch_tokens=256, loss_on="assistant")
    text = prepare_training(asked, Reader(tokenizer, BYTE_LEVEL_VOCABULARY), 1, TOGETHER, lambda _: None)
    assert text.learned is not None and text.held_out_judged is not None
    for windows, learned in (
        (text.windows[text.order], text.learned[text.order]),
        (text.held_out, text.held_out_judged),
    ):
        is_plain = learned.all(1)
        assert 0 < int(is_plain.sum()) < len(windows)
        assert int(learned[is_plain].sum()) / int(learned.sum()) == pytest.approx(0.3, abs=0.05)


def test_every_text_is_judged_by_and_more_windows_where_few_tokens_count(
    student: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_text, "MOST_HELD_OUT", 1024)
    long, tokenizer = tmp_path / "long.txt", AutoTokenizer.from_pretrained(student)
    long.write_text("Nobody says this, which is plain text. " * 300)
    held = dict[str, TrainingText]()
    for whose in ("all", "assistant"):
        name = f"{chats}:0.97,{long}:0.03"
        asked = Healing(tokens="1M", text=name, seq_len=128, batch_tokens=256, loss_on=whose)
        reader = Reader(tokenizer, BYTE_LEVEL_VOCABULARY)
        held[whose] = prepare_training(asked, reader, 1, TOGETHER, lambda _: None)
        said = [tokenizer.decode(window) for window in held[whose].held_out]
        assert 0 < sum("Nobody" in own for own in said) < len(said)
    assert len(held["assistant"].held_out) > 1.2 * len(held["all"].held_out)


def test_a_student_is_told_how_many_tokens_count(
    student: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost, told = list[float](), list[tuple[float, float]]()
    forward = Student.forward

    def noting(own: Student, input_ids: torch.Tensor, goal: Goal, learned: torch.Tensor) -> torch.Tensor:
        found = forward(own, input_ids, goal, learned)
        told.append((own._learned_share, float(learned.float().mean())))
        lost.append(float(found.detach()))
        return found

    monkeypatch.setattr(Student, "forward", noting)
    result = recover(student, chats, tmp_path / "out", "--loss", "ce", "--learning-rate", "1e-9", *ON_ANSWERS)
    (share,) = {share for share, _ in told}
    means = [mean for _, mean in told]
    assert share == pytest.approx(sum(means) / len(means), rel=1e-4) and max(means) > 1.1 * min(means)
    assert sum(lost) / len(lost) == pytest.approx(math.log(result["before"]["perplexity"]), rel=0.1)


@pytest.mark.parametrize(
    "options", [("--hidden-weight", "1"), ("--learning-rate", "auto"), ("--batch-tokens", "2048", "--tokens", "8192")]
)
def test_it_goes_with_others(student: Path, chats: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    result = recover(student, chats, tmp_path / "out", *ON_ANSWERS, *options)
    assert result["after"]["perplexity"] < result["before"]["perplexity"]


@in_full
def test_two_processes_come_to_the_same(student: Path, chats: Path, tmp_path: Path) -> None:
    one = recover(student, chats, tmp_path / "one", *ON_ANSWERS)
    two = recover_in_two(student, chats, tmp_path / "two", *ON_ANSWERS)
    assert two["after"]["perplexity"] == pytest.approx(one["after"]["perplexity"], rel=0.005)


def test_a_run_goes_on_to_the_same_weights_but_not_with_other_tokens(
    student: Path, chats: Path, tmp_path: Path
) -> None:
    long = ("--tokens", "4096", *ON_ANSWERS)  # two judgements
    recover(student, chats, tmp_path / "whole", *long)
    with pytest.MonkeyPatch.context() as patched:
        interrupt_at(patched, 16, True)
        assert run_recover(student, chats, tmp_path / "out", *long).code == INTERRUPTED
    other = run_recover(student, chats, tmp_path / "out", "--tokens", "4096", "--resume")
    assert_refused(other, PLAN, "loss_on")
    recover(student, chats, tmp_path / "out", *long, "--resume")
    found = written_tensors(tmp_path / "out")
    for name, tensor in written_tensors(tmp_path / "whole").items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=name)


def test_conversations_count_more_than_a_column_of_text_beside_them(student: Path, chats: Path, tmp_path: Path) -> None:
    both = tmp_path / "both.jsonl"
    rows = [{**json.loads(line), "text": "As it is spelled elsewhere."} for line in chats.read_text().splitlines()]
    both.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    few = ("--tokens", "256", *ON_ANSWERS)
    found = [recover(student, text, tmp_path / text.stem, *few) for text in (chats, both)]
    assert found[0]["after"] == found[1]["after"]


def test_a_teacher_writes_what_is_learned_if_it_chats(student: Path, whole: Path, tmp_path: Path) -> None:
    words = ("recover", student, "--text", "self", *QUICK, *ON_ANSWERS, "--output", tmp_path / "out", "--json")
    run = run_cli(*words)
    assert run.code == 0, run.stderr
    assert json.loads(run.stdout)["held_out_tokens"] % 31 != 0  # some of whole windows
    mute = Path(shutil.copytree(whole, tmp_path / "mute"))
    (mute / "chat_template.jinja").unlink()
    refused = run_cli(*words, "--teacher", mute, "--overwrite")
    assert_refused(refused, CHECKPOINT, "mute has no chat template", "--loss-on assistant")


def test_a_streamed_teacher_teaches_the_same(student: Path, chats: Path, tmp_path: Path) -> None:
    found = [
        recover(student, chats, tmp_path / mode, "--loss", "kl", *ON_ANSWERS, "--teacher-mode", mode)
        for mode in ("resident", "streamed")
    ]
    for stage in ("before", "after"):
        resident, streamed = (own[stage]["kl"] for own in found)
        assert streamed == pytest.approx(resident, rel=0.04)  # of tokens that are kept of it, for few predictions
    assert found[0]["is_better"] and found[1]["is_better"]


def test_it_is_shown_what_is_learned(student: Path, chats: Path, tmp_path: Path) -> None:
    few = ("--tokens", "256", "--batch-tokens", "64", "--seq-len", "32")
    run = run_cli("recover", student, "--text", chats, *few, *ON_ANSWERS, "--output", tmp_path / "out")
    assert run.code == 0, run.stderr
    said = re.sub(r"\s+", " ", run.stdout)
    shown = re.search(r"on 256 tokens .* \(kl\+0\.1ce, of the (\d+) that an assistant says, learning rate", said)
    assert shown is not None and 50 < int(shown[1]) < 150
    assert "held-out tokens are an assistant's, by which little can be told" in " ".join(run.stderr.split())


@pytest.mark.parametrize("text", [None, "python-docs", "plain.txt", "wikitext2:0.5,plain.txt:0.5"])
def test_plain_text_has_no_answers(
    student: Path, tmp_path: Path, text: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("plain.txt").write_text("Nobody says this. " * 200)
    named = () if text is None else ("--text", text)
    run = run_cli("recover", student, *named, *ON_ANSWERS, "--output", tmp_path / "out")
    assert_refused(run, USAGE, "--loss-on assistant is about conversations", text or "the default text")


def test_conversations_in_which_no_assistant_speaks(student: Path, chats: Path, tmp_path: Path) -> None:
    text = tmp_path / "asked.jsonl"
    text.write_text(json.dumps({"messages": [{"role": "user", "content": "Why? " * 20}]}) + "\n" * 100)
    run = run_recover(student, text, tmp_path / "out", *ON_ANSWERS)
    assert_refused(run, CHECKPOINT, "asked.jsonl has no conversations in which an assistant speaks")
    text.write_text(json.dumps({"text": "Nobody says this. " * 200}))
    run = run_recover(student, text, tmp_path / "out", *ON_ANSWERS)
    assert_refused(run, CHECKPOINT, "asked.jsonl has no conversations in which an assistant speaks")
    text.write_text(json.dumps({"messages": [{"role": "user", "content": "Why? " * 20}]}) + "\n" * 100)
    run = run_cli(
        "recover", student, "--text", f"{chats}:0.7,{text}:0.3", *QUICK, *ON_ANSWERS, "--output", tmp_path / "out"
    )
    assert_refused(run, CHECKPOINT, "Error: " + str(text) + " has no conversations")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_does_not_tell_where_tokens_are(
    student: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import BatchEncoding

    monkeypatch.setattr(BatchEncoding, "is_fast", False)
    run = run_recover(student, chats, tmp_path / "out", *ON_ANSWERS)
    assert_refused(run, CHECKPOINT, "does not tell which part of a text its tokens are", "--loss-on assistant")
