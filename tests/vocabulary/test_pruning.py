"""Tokens go with their rows, and what stays is computed as before."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from llmprune_cli.options import ModelReference, Text
from llmprune_cli.run.calibration import prepare_calibration
from llmprune_cli.source.opening import open_checkpoint
from llmprune_cli.text.windows import Reader
from llmprune_cli.vocabulary.choice import must_stay
from llmprune_cli.vocabulary.rewriting import open_tokens
from support.cli import BY_MAGNITUDE, run_cli
from support.full import examples
from support.gguf_exports import export, needs_llamacpp, tiny, verified
from support.refusals import CHECKPOINT, PLAN, UNSUPPORTED, USAGE, assert_prune_refused, assert_refused, edit_json
from support.tiny import BYTE_LEVEL_VOCABULARY


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    return ("--calibration", str(path), "--calibration-seq-len", "40", "--calibration-tokens", "400")


def cut(model: Path, output: Path, *options: str) -> Path:
    run = run_cli("prune", model, *BY_MAGNITUDE, "--vocab-size", "320", *options, "--output", output)
    assert run.code == 0, run.stderr
    return output


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", examples(["llama", "gemma2", "phi"], ["gemma2", "phi"]))
def test_kept_tokens_keep_their_logits(family: str, tied: bool, text: tuple[str, ...], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if family == "phi" and tied:
        pytest.skip("its output projection has biases, and stands alone")
    model = tiny(tmp_path / "model", family, tie_word_embeddings=tied)
    folder = cut(model, tmp_path / "cut", *text, "--save-plan", str(tmp_path / "plan.json"))
    kept = json.loads((tmp_path / "plan.json").read_text())["vocabulary"]["kept"]
    whole, part = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float64).eval() for f in (model, folder))
    assert part.config.vocab_size == len(kept) == 320
    assert part.config.eos_token_id == kept.index(whole.config.eos_token_id)
    before, after = (AutoTokenizer.from_pretrained(f) for f in (model, folder))
    ids = after("the model and the text")["input_ids"]
    old = [kept[number] for number in ids]
    assert after.decode(ids) == before.decode(old)
    assert after.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"
    with torch.no_grad():
        logits, cut_logits = whole(torch.tensor([old])).logits[..., kept], part(torch.tensor([ids])).logits
    assert (logits - cut_logits).abs().max() <= 1e-12
    again = tmp_path / "again"
    run = run_cli("prune", model, *BY_MAGNITUDE, "--plan", tmp_path / "plan.json", "--output", again)
    assert run.code == 0, run.stderr
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()
    edit_json(model / "tokenizer.json", swap_two_tokens)
    run = run_cli("prune", model, *BY_MAGNITUDE, "--plan", tmp_path / "plan.json", "--output", tmp_path / "other")
    assert_refused(run, PLAN, "another tokenizer")


def swap_two_tokens(document: dict[str, Any]) -> None:
    vocabulary = document["model"]["vocab"]
    one, other = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]


def test_tokens_stay_that_settings_or_templates_name(byte_level: Path, tmp_path: Path) -> None:
    vocabulary = json.loads((byte_level / "tokenizer.json").read_text())["model"]["vocab"]
    (one, first), (other, second) = sorted(vocabulary.items(), key=lambda own: -own[1])[:2]
    model, templates = tmp_path / "model", tmp_path / "model" / "additional_chat_templates"
    shutil.copytree(byte_level, model)
    assert not {first, second} & staying(model)
    edit_json(model / "tokenizer_config.json", lambda own: own.update(extra_special_tokens={"image_token": one}))
    templates.mkdir()
    (templates / "tools.jinja").write_text("{{ '" + other.replace("Ġ", " ") + "' }}")
    assert {first, second} < staying(model)


def staying(model: Path, keep: Path | None = None) -> frozenset[int]:
    with open_checkpoint(ModelReference(str(model)), need_weights=False) as checkpoint:
        return must_stay(open_tokens(checkpoint), checkpoint, BYTE_LEVEL_VOCABULARY, keep)


def test_a_file_of_tokens_has_numbers_only_where_every_line_is_one(byte_level: Path, tmp_path: Path) -> None:
    model, keep = shutil.copytree(byte_level, tmp_path / "model"), tmp_path / "keep.txt"
    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    (one, first), (other, second), (last, third) = sorted(vocabulary.items(), key=lambda own: -own[1])[:3]
    respelled = {str(second) if token == one else token: number for token, number in vocabulary.items()}
    edit_json(model / "tokenizer.json", lambda own: own["model"].update(merges=[], vocab=respelled))
    for lines, kept in ((f"{second}\n{third}\n", {second, third}), (f"{second}\n{last}\n", {first, third})):
        keep.write_text(lines, encoding="utf-8")
        assert staying(model, keep) & {first, second, third} == kept, lines
    keep.write_text(f"{second}\n{third}\n", encoding="utf-8")
    assert f"The texts {second} are tokens, too" in run_cli("inspect", model, "--keep-tokens", keep).stderr
    for lines, why in ((f"{other}\n383\n", "'383', which is no token"), ("7\n383\n", "'383', which is no number")):
        keep.write_text(lines, encoding="utf-8")
        run = run_cli("inspect", model, "--keep-tokens", keep)
        assert_refused(run, USAGE, why, "every line is a whole number")


def test_tokens_go_together_with_neurons(text: tuple[str, ...], byte_level: Path, tmp_path: Path) -> None:
    folder = cut(byte_level, tmp_path / "cut", *text, "--intermediate-pruning-ratio", "0.5")
    manifest = json.loads((folder / "llmprune.json").read_text())
    assert manifest["widths"]["after"]["vocab_size"] == 320
    assert run_cli("inspect", folder, "--verify").code == 0


def test_other_files_with_tokens_are_left_out(text: tuple[str, ...], byte_level: Path, tmp_path: Path) -> None:
    model, others = shutil.copytree(byte_level, tmp_path / "model"), ("merges.txt", "own.tiktoken", "tekken.json")
    for name in others:
        (model / name).write_text("what tokenizer.json would contradict")
    command = ("prune", model, *BY_MAGNITUDE, "--vocab-size", "320", *text, "--output", tmp_path / "cut")
    run = run_cli(*command)
    assert run.code == 0 and f"{', '.join(others)} left out: tokenizer.json says what stays" in run.stderr
    assert not {*others} & {path.name for path in (tmp_path / "cut").iterdir()}


def test_both_models_are_judged_by_the_bytes_of_the_same_text(
    text: tuple[str, ...], byte_level: Path, tmp_path: Path
) -> None:
    """Bits per byte are those that transformers gives for the text that the first model's windows hold."""
    corpus, folder = Path(text[1]), tmp_path / "cut"
    limited = ("--dataset", corpus, "--max-seq-len", "32", "--limit", "9")
    chart = tmp_path / "card.svg"
    run = run_cli(
        *("prune", byte_level, "--vocab-size", "320", *text, "--output", folder, "--json", "--report", chart),
        *("--mlp", "50%", "--importance", "activation", "--refit", "local", "--eval", *limited),
    )
    assert run.code == 0, run.stderr
    document = json.loads(run.stdout)
    assert "vocabulary" not in run.stderr and "Compare bits per byte" in run.stderr
    card, (first, second) = document["calibration"], document["evaluation"]["results"]
    assert card["kl"] is None and [row["stream_error"] for row in card["layers"]] == [None] * 4
    assert all(0 < row["refit_error"] <= row["removal_error"] for row in card["layers"])
    words = " ".join(ElementTree.parse(chart).getroot().itertext())
    assert "units removed" in words and "bits per byte" in words and "384 → 320 tokens" in words
    assert not {"perplexity", "KL"} & {*words.split()} and f"{card['bits_per_byte_after']:.3f}" in words
    for model, bits in ((byte_level, card["bits_per_byte_before"]), (folder, card["bits_per_byte_after"])):
        assert bits == pytest.approx(judged_bits(byte_level, model, text), rel=1e-3)
    assert [first["same_tokens"], second["same_tokens"], second["kl"]] == [True, False, None]
    whole, part = (nats_and_bytes(model, corpus, first) for model in (byte_level, folder))
    assert first["bits_per_byte"] == pytest.approx(whole[0] / math.log(2) / whole[1], rel=1e-4)
    assert second["bits_per_byte"] == pytest.approx(part[0] / math.log(2) / part[1], rel=1e-4)
    assert (first["bytes"], second["bytes"]) == (whole[1], part[1])
    assert first["tokens"] == 9 * 32 < second["tokens"]  # of the same text
    shown = run_cli("eval", byte_level, folder, *limited, "-q").stdout
    assert "bits/byte" in shown and f"{second['bits_per_byte']:.3f}" in shown and "ratio" not in shown


def judged_bits(whole: Path, model: Path, text: tuple[str, ...]) -> float:
    """Bits per byte of the text that the report card judges by, read with a model's own tokens by transformers."""
    from torch.nn import functional
    from transformers import AutoModelForCausalLM, AutoTokenizer

    readers = [AutoTokenizer.from_pretrained(folder) for folder in (whole, model)]
    options = Text(calibration=text[1], calibration_tokens=400, calibration_seq_len=40)
    drawn = prepare_calibration(options, Reader(readers[0], BYTE_LEVEL_VOCABULARY), 0, print)
    told = [readers[1](readers[0].decode(w), add_special_tokens=False)["input_ids"] for w in drawn.judged]
    length = min(40, *map(len, told))
    windows = torch.tensor([ids[:length] for ids in told])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model)(windows).logits[:, :-1].float()
    nats = float(functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="sum"))
    return nats / math.log(2) / sum(len(readers[1].decode(w[1:]).encode()) for w in windows)


def nats_and_bytes(model: Path, corpus: Path, first: dict[str, Any]) -> tuple[float, int]:
    """Negative log-likelihood of the text in the first model's windows, cut into windows of 32, and its bytes."""
    from torch.nn import functional
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = corpus.read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(model)
    if "cut" in model.name:
        whole = AutoTokenizer.from_pretrained(first["model"])
        text = whole.decode(whole(text)["input_ids"][: 9 * 32])
    ids = tokenizer(text)["input_ids"]
    ids = ids if "cut" in model.name else ids[: 9 * 32]
    loaded, nats, count = AutoModelForCausalLM.from_pretrained(model), 0.0, 0
    for start in range(0, len(ids), 32):
        window = torch.tensor([ids[start : start + 32]])
        with torch.no_grad():
            logits = loaded(window).logits[0, :-1].float()
        nats += float(functional.cross_entropy(logits, window[0, 1:], reduction="sum")) if window.shape[1] > 1 else 0
        count += len(tokenizer.decode(window[0, 1:]).encode())
    return nats, count


@needs_llamacpp
def test_llama_cpp_reads_the_tokens_that_stay(text: tuple[str, ...], byte_level: Path, tmp_path: Path) -> None:
    verified(export(cut(byte_level, tmp_path / "cut", *text), tmp_path / "gguf", "--dtype", "f32"))


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("byte-level") / "model", "llama")


def test_what_cannot_be_cut_is_refused(byte_level: Path, tmp_path: Path) -> None:
    def refuse(code: int, *words: str, options: tuple[str, ...] = ("--vocab-size", "320")) -> None:
        assert_prune_refused(tmp_path / "model", tmp_path, code, *words, options=options)

    shutil.copytree(byte_level, tmp_path / "model")
    refuse(PLAN, "must stay", options=("--vocab-size", "64"))
    refuse(PLAN, "Give fewer", options=("--vocab-size", "384"))
    refuse(USAGE, "32000", options=("--vocab-size", "many"))
    keep = tmp_path / "keep.txt"
    keep.write_text("e\nno-such-token\n")
    refuse(USAGE, "no-such-token", options=("--vocab-size", "320", "--keep-tokens", str(keep)))
    tokenizer = tmp_path / "model" / "tokenizer.json"
    edit_json(tokenizer, lambda document: document["model"].update(type="WordPiece"))
    refuse(UNSUPPORTED, "WordPiece")
    tokenizer.unlink()
    refuse(UNSUPPORTED, "tokenizer.json")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda document: document["model"].update(merges=[["a", "b", "c"]]), "is no tokenizer that can be read"),
        (lambda document: document.update(added_tokens=[{"content": "x"}]), "is no tokenizer that can be read"),
    ],
)
def test_a_damaged_tokenizer_is_refused(
    byte_level: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    folder = shutil.copytree(byte_level, tmp_path / "model")
    edit_json(folder / "tokenizer.json", change)
    assert_prune_refused(folder, tmp_path, CHECKPOINT, "tokenizer.json", said, options=("--vocab-size", "320"))


def test_a_chat_template_in_another_encoding_is_refused(byte_level: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(byte_level, tmp_path / "model")
    (folder / "chat_template.jinja").write_bytes("{{ 'Käse' }}".encode("latin-1"))
    words = ("chat_template.jinja is not UTF-8 text: byte 0xe4 at 5",)
    assert_prune_refused(folder, tmp_path, CHECKPOINT, *words, options=("--vocab-size", "320"))
