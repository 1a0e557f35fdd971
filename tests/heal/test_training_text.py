"""Which text is learned from, and by which a healing is judged."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from llmprune_cli.folder.manifest import read_manifest
from llmprune_cli.heal.options import Healing
from llmprune_cli.heal.training_text import (
    TOGETHER,
    TOGETHER_ON_CPU,
    TrainingText,
    _schedule,
    prepare_training,
    tokens_together,
)
from llmprune_cli.options import ModelReference, Text
from llmprune_cli.run.calibration import SeenText, prepare_calibration
from llmprune_cli.source.opening import open_checkpoint
from llmprune_cli.source.tokenizer import load_tokenizer
from llmprune_cli.text.reading import predicted_bytes
from llmprune_cli.text.windows import Reader
from support.cli import run_cli
from support.heal_runs import run_recover
from support.refusals import CHECKPOINT
from support.tiny import BYTE_LEVEL_VOCABULARY

WORDS = {"plain": "w{:04d} ", "mixed": "v{:04d} "}
PRUNED_BY = ("--mlp", "50%", "--calibration-seq-len", "24", "--calibration-tokens", "1200")


@pytest.fixture(scope="module")
def texts(whole: Path) -> dict[str, Path]:
    """Of words that each occur once."""
    paths = {name: whole.with_name(f"{name}.txt") for name in WORDS}
    for name, path in paths.items():
        path.write_text("".join(WORDS[name].format(number) for number in range(900)))
    return paths


def words_of(folder: Path, windows: torch.Tensor) -> set[str]:
    """Whole words that are in any window."""
    with open_checkpoint(ModelReference(str(folder)), need_weights=True) as checkpoint:
        tokenizer = load_tokenizer(checkpoint)
    return {word for window in windows for word in re.findall(r"[vw]\d{4}", tokenizer.decode(window))}


def training_text(pruned: Path, whole: Path, healing: Healing, warnings: list[str]) -> TrainingText:
    seen = SeenText.of(read_manifest(pruned).calibration)
    assert seen is not None
    with (
        open_checkpoint(ModelReference(str(pruned)), need_weights=True) as own,
        open_checkpoint(ModelReference(str(whole)), need_weights=True) as dense,
    ):
        tokenizer, size = load_tokenizer(own), own.config.vocab_size
        reader = tokenizer if size == dense.config.vocab_size else load_tokenizer(dense)
    return prepare_training(healing, Reader(tokenizer, size), 1, TOGETHER, warnings.append, None, (seen, reader))


@pytest.mark.parametrize("is_mixture_and_cut", [False, True])
def test_text_that_the_prune_was_fitted_on_is_not_held_out(
    is_mixture_and_cut: bool, whole: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    name = f"{texts['plain']}:0.7,{texts['mixed']}:0.3" if is_mixture_and_cut else str(texts["plain"])
    options = ("--vocab-size", "300") if is_mixture_and_cut else ()
    pruned = tmp_path / "pruned"
    run = run_cli("prune", whole, *PRUNED_BY, *options, "--calibration", name, "--output", pruned)
    assert run.code == 0, run.stderr
    asked = Text(calibration=name, calibration_tokens=1200, calibration_seq_len=24)
    with open_checkpoint(ModelReference(str(whole)), need_weights=True) as checkpoint:
        used = prepare_calibration(asked, Reader(load_tokenizer(checkpoint), BYTE_LEVEL_VOCABULARY), 0, print)
    seen, warnings = words_of(whole, used.fitted), list[str]()
    for length in (24, 40):
        few = Healing(tokens="1280", text=name, seq_len=length, batch_tokens=length)
        text = training_text(pruned, whole, few, warnings)
        judged, trained = (words_of(pruned, windows) for windows in (text.held_out, text.windows))
        assert judged and trained and not seen & judged and not seen & trained and not judged & trained
        assert not warnings
    everything = Healing(tokens="100k", text=name, seq_len=40, batch_tokens=40)
    text = training_text(pruned, whole, everything, warnings)
    judged, trained = (words_of(pruned, windows) for windows in (text.held_out, text.windows))
    assert judged and not seen & judged and seen & trained  # what is left is learned from, all of it


def test_each_of_several_texts_has_its_share_and_a_short_one_comes_more_often(
    whole: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("".join(f"u{number:04d} " for number in range(90)))
    asked = Healing(tokens="30k", text=f"{texts['plain']}:0.8,{short}:0.2", seq_len=24, batch_tokens=240)
    warnings = list[str]()
    with open_checkpoint(ModelReference(str(whole)), need_weights=True) as checkpoint:
        tokenizer = load_tokenizer(checkpoint)
        text = prepare_training(asked, Reader(tokenizer, BYTE_LEVEL_VOCABULARY), 1, TOGETHER, warnings.append)
    read = [len(tokenizer(path.read_text())["input_ids"]) // 24 for path in (texts["plain"], short)]
    is_short, held = (
        torch.tensor(["u00" in tokenizer.decode(window) for window in windows])
        for windows in (text.windows, text.held_out)
    )
    assert 0 < int(held.sum()) < len(held) and len(text.windows) + len(held) == sum(read)  # nothing is left out
    counts = torch.bincount(text.order, minlength=len(text.windows))
    assert int(counts[is_short].sum()) == pytest.approx(0.2 * len(text.order), abs=1)
    assert counts[~is_short].max() - counts[~is_short].min() <= 1 and counts[is_short].min() > counts[~is_short].max()
    early = is_short[text.order[: len(text.order) // 4]].float().mean()
    assert float(early) == pytest.approx(0.2, abs=0.1)  # they are mixed
    assert [("short.txt has" in said, "times each" in said) for said in warnings] == [(False, True), (True, True)]


def test_where_no_other_text_is_left_it_is_said_that_what_is_held_out_flatters(
    whole: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    words = ("prune", whole, *PRUNED_BY, "--calibration-tokens", "3000")
    run = run_cli(*words, "--calibration", texts["plain"], "--output", tmp_path / "pruned")
    assert run.code == 0, run.stderr
    long = ("--seq-len", "64", "--batch-tokens", "64")  # so that some of every window was fitted on
    healed = run_recover(tmp_path / "pruned", texts["plain"], tmp_path / "healed", *long)
    assert healed.code == 0 and "flatters" in healed.stderr and "--text" in healed.stderr
    other = run_recover(tmp_path / "pruned", texts["mixed"], tmp_path / "by-other-text")
    assert other.code == 0 and "flatters" not in other.stderr


def test_windows_that_are_longer_than_the_model_reads_are_told(pruned: Path, text_file: Path, tmp_path: Path) -> None:
    run = run_recover(pruned, text_file, tmp_path / "out", "--seq-len", "100000", "--tokens", "256")
    assert run.code == 0 and "Windows have 64 tokens instead of 100,000" in run.stderr, run.stderr


def test_what_a_prune_saw_is_known_by_file_and_split(texts: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(texts["plain"].parent)
    seen = SeenText("plain.txt:0.7,org/set:0.3", "validation", 1200, 24, 0)
    assert seen.share_of(str(texts["plain"]), "validation") == pytest.approx(0.7)
    assert seen.share_of(str(texts["plain"]), "train") == pytest.approx(0.7)  # a file has no splits
    assert seen.share_of("org/set", "validation") == pytest.approx(0.3) and not seen.share_of("org/set", "train")
    assert not seen.share_of(str(texts["mixed"]), "validation")
    assert not SeenText("self", "validation", 1200, 24, 0).share_of("self", "validation")  # written with another seed
    documentation = SeenText("wikitext2:0.7,python-docs:0.3", "validation", 1200, 24, 0)
    assert documentation.share_of("python-docs", "validation") == pytest.approx(0.3)
    assert documentation.share_of("python-docs", "train") == pytest.approx(0.3)  # the same text
    assert not documentation.share_of("python-docs", "test")
    assert SeenText.of(None) is None and SeenText.of({"dataset": "a.txt", "tokens": -1}) is None


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize(
    ("most", "where"),
    [
        (TOGETHER, "cuda:0"),
        (TOGETHER_ON_CPU, "cpu"),
    ],
)
@pytest.mark.parametrize(("batch", "length"), [(1024, 40), (1024, 256), (65536, 512), (200, 512), (5000, 37)])
def test_a_batch_has_the_tokens_that_were_asked_for_few_of_them_together(
    batch: int, length: int, most: int, where: str, processes: int
) -> None:
    schedule = _schedule(10 * batch, batch, length, processes, tokens_together(where))
    asked, made = max(1, batch // length), schedule.together * schedule.accumulated * processes
    assert abs(made - asked) <= processes - 1 + 0.02 * asked
    assert schedule.together * length <= max(most, length)


def test_the_column_that_is_named_is_learned_from(whole: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    """Of rows that have another text, too, in the pruning and in the healing of one command."""
    words = {name: path.read_text().split() for name, path in texts.items()}
    parts = ({name: " ".join(own[at : at + 30]) for name, own in words.items()} for at in range(0, 900, 30))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, parts)))
    asked = Healing(tokens="200", text=str(rows), text_column="mixed", seq_len=24, batch_tokens=48)
    with open_checkpoint(ModelReference(str(whole)), need_weights=True) as checkpoint:
        reader = Reader(load_tokenizer(checkpoint), BYTE_LEVEL_VOCABULARY, 64)
        text = prepare_training(asked, reader, 1, TOGETHER, pytest.fail)
    assert {word[0] for word in words_of(whole, text.windows)} == {"v"}
    pruning = ("--calibration", rows, "--text-column", "mixed", "--recover", "200", "--output", tmp_path / "out")
    run = run_cli("prune", whole, *PRUNED_BY, *pruning, "--json")
    assert run.code == 0, run.stderr
    refused = run_cli("recover", tmp_path / "out", "--text", rows, "--text-column", "none", "--output", tmp_path / "a")
    assert refused.code == CHECKPOINT and "'none'" in refused.stderr


def test_held_out_bytes_are_those_of_the_texts_and_not_of_what_stands_for_unknown_letters(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """Two texts, of letters of one byte and of two, the latter of which the model does not know."""
    for name, letter in (("a.txt", "a"), ("b.txt", "é")):
        (tmp_path / name).write_text(letter * 1000, encoding="utf-8")
    mixture = f"{tmp_path}/a.txt:0.3,{tmp_path}/b.txt:0.7"
    asked = Healing(tokens="1000", text=mixture, seq_len=20, batch_tokens=40)
    with open_checkpoint(ModelReference(str(tiny_llama)), need_weights=True) as checkpoint:
        tokenizer = load_tokenizer(checkpoint)
    held = prepare_training(asked, Reader(tokenizer, 96, 64), 1, TOGETHER, lambda _: None)
    unknown = int((held.held_out[:, 1:] == tokenizer.unk_token_id).sum())
    assert 0 < unknown < held.held_out[:, 1:].numel()
    assert held.held_out_bytes == held.held_out[:, 1:].numel() + unknown
    judged = prepare_calibration(Text(mixture, calibration_seq_len=20), Reader(tokenizer, 96, 64), 0, lambda _: None)
    for windows, parts in ((judged.held_out, judged.held_out_parts), (judged.judged, judged.judged_parts)):
        unknown = int((windows[:, 1:] == tokenizer.unk_token_id).sum())
        count = predicted_bytes(judged.corpus.text, tokenizer, windows, parts.tolist())
        assert count == windows[:, 1:].numel() + unknown


@pytest.mark.parametrize("options", [(), ("--mode", "blocks")])
def test_text_that_an_earlier_healing_learned_from_is_told_once(
    pruned: Path, text_file: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    few, other = ("--tokens", "256", *options), tmp_path / "other.txt"
    other.write_text(text_file.read_text())
    for model, text, times in ((pruned, text_file, 0), (tmp_path / "1", text_file, 1), (tmp_path / "1", other, 0)):
        output = tmp_path / f"{len([*tmp_path.iterdir()])}"
        run = run_recover(model, text, output, *few)
        assert run.code == 0 and run.stderr.count(f"{model} was healed on {text} before") == times, run.stderr
        assert run.stderr.count("llmprune eval") == times
