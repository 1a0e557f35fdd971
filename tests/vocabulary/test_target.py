"""A target is spent on tokens, where that costs less than other widths, and what it can take is shown."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from llmprune_cli.choose.targets.vocabulary import SizedVocabulary, search_vocabulary, sizes_to_try
from llmprune_cli.formats.gguf.writing import weights_bytes
from llmprune_cli.options import ModelReference, Text
from llmprune_cli.plan.document import Vocabulary
from llmprune_cli.run.calibration import prepare_calibration
from llmprune_cli.source.opening import open_checkpoint
from llmprune_cli.text.windows import Reader
from llmprune_cli.vocabulary.rewriting import cut_tokens
from llmprune_cli.vocabulary.tokens import read_tokens
from llmprune_cli.vocabulary.told import tell
from support.cli import Run, run_cli
from support.full import in_full
from support.gguf_exports import tiny
from support.refusals import PLAN, USAGE
from support.stock import written_tensors


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("model") / "model", "llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    return ("--calibration", str(path), "--calibration-seq-len", "40", "--calibration-tokens", "400")


def aimed(model: Path, target: str, *options: str | Path) -> Run:
    run = run_cli("prune", model, "--target", target, *options)
    assert run.code == 0, run.stderr
    return run


def document(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run.stdout)
    return found


@pytest.mark.parametrize(
    ("rows", "least", "share", "sizes"),
    [
        (49152, 512, 1.5, (49152, 36864, 24576, 17216, 12288, 7424, 4928)),
        (49152, 20000, 1.5, (49152, 36864, 24576, 20000)),
        (49152, 512, 0.3, (49152, 36864, 34368)),  # fewer would be more than enough
        (384, 320, 9.0, (384, 320)),
        (384, 448, 9.0, (384,)),
    ],
)
def test_sizes_end_where_tokens_must_stay_or_are_enough(
    rows: int, least: int, share: float, sizes: tuple[int, ...]
) -> None:
    assert sizes_to_try(rows, least, share) == sizes


def test_vocabularies_are_tried_until_one_does_worse() -> None:
    sized = [SizedVocabulary(Vocabulary(100, tuple(range(n))), (0, 0), None) for n in (100, 75, 50, 25, 10)]
    bits: dict[int, float | None] = {100: None, 75: 1.5, 50: 1.25, 25: 1.375, 10: 1.0}
    best, tried = search_vocabulary(sized, lambda own: bits[own.size])
    assert best.size == 50 and [own.tokens for own in tried] == [50, 25, 75]  # no widths fit beside all tokens
    best, tried = search_vocabulary(sized, lambda own: None)
    assert best.size == 10 and tried == ()


def test_all_vocabularies_are_told_the_same_text(model: Path) -> None:
    from tokenizers import Tokenizer

    tokens = read_tokens(json.loads((model / "tokenizer.json").read_text(encoding="utf-8")), "a model")
    whole = Tokenizer.from_file(str(model / "tokenizer.json"))
    ids = whole.encode(Path(__file__).read_text(encoding="utf-8")).ids[: 6 * 40]
    windows = torch.tensor(ids).view(6, 40)
    least = tuple(sorted(tokens.closed(tokens.required)))
    all_of_them, few = tell(tokens, (tuple(range(384)), least), windows)
    reader = Tokenizer.from_str(json.dumps(cut_tokens(tokens, least)))
    for number in range(6):
        some = few.windows[number, : few.lengths[number]].tolist()
        assert {*some} <= {*least} and reader.decode([least.index(i) for i in some]) == whole.decode(some)
        assert whole.decode(all_of_them.windows[number, : all_of_them.lengths[number]].tolist()) == whole.decode(some)
    assert sum(few.lengths) > 1.2 * sum(all_of_them.lengths) and max(few.lengths) == 40
    heads = [sum(len(whole.decode(t.windows[n, :1].tolist())) for n in range(6)) for t in (all_of_them, few)]
    assert few.bytes - all_of_them.bytes == heads[0] - heads[1] > 0


@in_full
def test_a_target_is_spent_on_tokens_where_that_costs_less(model: Path, text: tuple[str, ...], tmp_path: Path) -> None:
    """What is said of each vocabulary is what transformers makes of it, and what is written is what was said."""
    options = (*text, "--refit", "none", "--json")
    plan, output = tmp_path / "plan.json", tmp_path / "out"
    found = document(aimed(model, "88%", *options, "--vocab", "auto", "--save-plan", plan, "--output", output))
    bits = {own["tokens"]: own["bits_per_byte"] for own in found["vocabularies"]}
    assert [*bits] == sorted(bits, key=bits.__getitem__) and bits.keys() == {384, 320}
    for size, own in bits.items():
        assert own == pytest.approx(bits_of(model, size, text, tmp_path), rel=1e-4)
    stays = next(iter(bits))
    assert (found["vocabulary"]["tokens"], found["vocabulary"]["after"]) == (384, stays if stays < 384 else None)
    assert found["after"]["parameters"] <= 0.88 * found["before"]["parameters"]
    assert found["candidates"][0]["parameters"] == found["after"]["parameters"]
    vocabulary = json.loads(plan.read_text())["vocabulary"]
    assert json.loads((output / "config.json").read_text())["vocab_size"] == stays
    assert (len(vocabulary["kept"]) if vocabulary else 384) == stays


def bits_of(model: Path, size: int, text: tuple[str, ...], folder: Path) -> float:
    """Bits per byte of held-out text, by transformers, of what a vocabulary leaves of 88% of the parameters."""
    from torch.nn import functional
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tensors = written_tensors(model)
    whole = sum(tensor.numel() for tensor in tensors.values())
    neuron = sum(t.numel() for name, t in tensors.items() if ".mlp." in name and "down_proj.bias" not in name) // 48
    left = int(0.88 * whole) + 2 * 64 * (384 - size)
    neurons = ("--intermediate-size", str(48 - max(0, -(-(whole - left) // neuron))))
    output, more = folder / f"{size}", ("--vocab-size", str(size)) if size < 384 else ()
    run = run_cli("prune", model, *text, *neurons, *more, "--refit", "none", "--output", output)
    assert run.code == 0, run.stderr
    readers = AutoTokenizer.from_pretrained(model), AutoTokenizer.from_pretrained(output)
    asked = Text(calibration=text[1], calibration_tokens=400, calibration_seq_len=40)
    held_out = prepare_calibration(asked, Reader(readers[0], 384), 0, print).held_out
    tokens = read_tokens(json.loads((model / "tokenizer.json").read_text(encoding="utf-8")), "a model")
    told = tell(tokens, (tuple(range(384)), tuple(kept_by(model, text, folder))), held_out)[0 if size == 384 else 1]
    loaded, nats, count = AutoModelForCausalLM.from_pretrained(output), 0.0, 0
    for window, length in zip(told.windows, told.lengths, strict=True):
        said = readers[0].decode(window[:length])
        ids = torch.tensor([readers[1](said, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            logits = loaded(ids).logits[0, :-1].float()
        nats += float(functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += len(said.encode()) - len(readers[1].decode(ids[0, :1]).encode())
    return nats / math.log(2) / count


def kept_by(model: Path, text: tuple[str, ...], folder: Path) -> list[int]:
    """The tokens that stay of 320."""
    plan = folder / "kept.json"
    if not plan.exists():
        how = ("--mlp", "50%", "--refit", "none", "--vocab-size", "320", "--save-plan", plan, "--dry-run")
        run = run_cli("prune", model, *text, *how)
        assert run.code == 0, run.stderr
    found: list[int] = json.loads(plan.read_text())["vocabulary"]["kept"]
    return found


def test_a_target_that_tokens_reach_alone_takes_nothing_else(
    model: Path, text: tuple[str, ...], tmp_path: Path
) -> None:
    found = document(aimed(model, "96%", *text, "--vocab", "320", "--dry-run", "--json"))
    assert found["before"]["widths"] == found["after"]["widths"] and found["vocabulary"]["after"] == 320
    assert [own["kl"] for own in found["candidates"]] == [0.0] and found["vocabularies"] == []


@in_full
def test_a_size_in_a_type_counts_the_rows_that_go_in_that_type(
    model: Path, text: tuple[str, ...], tmp_path: Path
) -> None:
    from gguf import GGUFReader

    with open_checkpoint(ModelReference(str(model)), need_weights=True) as checkpoint:
        whole = weights_bytes(checkpoint.entries, checkpoint.config, "q8_0")
    left = whole - 2 * 64 * 2 * 34  # of both embeddings, 64 rows of two blocks each
    options = (*text, "--vocab", "320", "--refit", "none", "--json")
    output = ("--output", tmp_path / "out", "--gguf", "q8_0")
    found = document(aimed(model, f"{left} as q8_0", *options, *output))
    assert found["before"]["widths"] == found["after"]["widths"] and found["vocabulary"]["after"] == 320
    (file,) = (tmp_path / "out-gguf").glob("*.gguf")
    assert sum(int(tensor.n_bytes) for tensor in GGUFReader(file).tensors) == left
    found = document(aimed(model, f"{left - 1} as q8_0", *options, "--dry-run"))
    assert found["before"]["widths"] != found["after"]["widths"] and found["vocabulary"]["after"] == 320


@in_full
def test_a_smaller_vocabulary_puts_smaller_targets_within_reach(model: Path, text: tuple[str, ...]) -> None:
    run = run_cli("prune", model, "--target", "58%", *text, "--dry-run")
    assert run.code == PLAN and "the least that the search reaches" in run.stderr, run.stderr
    found = document(aimed(model, "58%", *text, "--vocab", "auto", "--dry-run", "--json", "--refit", "none"))
    assert found["after"]["parameters"] <= 0.58 * found["before"]["parameters"]


@in_full
def test_a_dry_run_goes_on_with_the_tokens_that_it_found(model: Path, text: tuple[str, ...]) -> None:
    shown = aimed(model, "96%", *text, "--vocab-text", text[1], "--vocab", "320", "--dry-run").stdout
    assert "vocabulary" in shown and "--vocab-size 320" in shown and "--vocab-text" in shown.split("To go on")[1]


@in_full
def test_tokens_that_stay_are_said_to_weigh(model: Path, text: tuple[str, ...]) -> None:
    shown = aimed(model, "80%", *text, "--dry-run", "--refit", "none").stdout
    assert "Rows of 384 tokens are" in shown and "--vocab auto" in shown
    shown = aimed(model, "80%", *text, "--dry-run", "--refit", "none", "--vocab", "keep").stdout
    assert "Rows of 384 tokens" not in shown


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--mlp", "50%", "--vocab", "auto"), "give a target"),
        (("--mlp", "50%", "--vocab", "keep"), "give a target"),
        (("--target", "80%", "--vocab", "keep", "--vocab-text", "corpus.txt"), "all do"),
        (("--target", "80%", "--keep-tokens", "tokens.txt"), "--vocab auto"),
        (("--target-speedup", "1.5", "--vocab", "auto"), "finds no number of tokens"),
        (("--target-speedup", "1.5", "--vocab-text", "corpus.txt"), "finds no number of tokens"),
        (("--vocab", "some"), "auto or keep"),
    ],
)
def test_what_would_do_nothing_is_refused(options: tuple[str, ...], words: str, model: Path, tmp_path: Path) -> None:
    run = run_cli("prune", model, *options, "--output", tmp_path / "out")
    assert run.code == USAGE and words in " ".join(run.stderr.replace("│", " ").split()), run.stderr
