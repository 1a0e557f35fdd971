"""What everybody gets wrong once: each is told at once, with what, where and what next."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from llmprune_cli.cli import app
from llmprune_cli.interruption import INTERRUPTED
from support.cli import run_cli
from support.refusals import CHECKPOINT, OUTPUT, PLAN, UNSUPPORTED, USAGE, assert_refused

MOST_SECONDS = 1.5  # CPU time of a process, which is all that it waits for


@dataclass(frozen=True)
class Mistake:
    """A command, how it ends, and words of what it says."""

    words: tuple[str, ...]
    code: int
    said: tuple[str, ...]


def prune(*words: str) -> tuple[str, ...]:
    return "prune", "model", *words, "--output", "out"


def recover(*words: str) -> tuple[str, ...]:
    return "recover", "model", *words, "-o", "out"


def sweep(*words: str) -> tuple[str, ...]:
    return "sweep", "model", *words


HALF = ("--pruning-ratio", "50%")
LONG = 300 * "x"  # more than a file's name may have
MISTAKES = {
    "a target above the model": Mistake(prune("--target-params", "6B"), PLAN, ("51,520", "removes nothing", "85%")),
    "a size above the model": Mistake(prune("--target-size", "4GiB"), PLAN, ("206,080 bytes", "removes nothing")),
    "all of the model": Mistake(prune("--target-params", "100%"), PLAN, ("removes nothing",)),
    "a target below all": Mistake(prune("--target-params", "2%"), PLAN, ("out of reach", "more than 6,144")),
    "a share without its sign": Mistake(prune("--target-params", "0.85"), USAGE, ("--target-params", "85%?")),
    "billions without a B": Mistake(prune("--target-params", "6"), USAGE, ("6B or 6%?",)),
    "a size without a unit": Mistake(prune("--target-size", "4"), USAGE, ("--target-size", "4GiB?")),
    "a size in a type that is not there": Mistake(
        prune("--target-size", "4GiB as q4_k"), USAGE, ("not as q4_k", "Did you mean q4_k_m?")
    ),
    "a size in no type": Mistake(prune("--target-size", "4GiB as"), USAGE, ("--target-size", "500MB, 5GB or 4GiB")),
    "a model that is not faster": Mistake(prune("--target-speedup", "0.8"), USAGE, ("--target-speedup", "1.5")),
    "a speed that is none": Mistake(prune("--target-speedup", "fast"), USAGE, ("--target-speedup", "'fast'")),
    "two targets": Mistake(prune("--target-speedup", "2", "--target", "85%"), USAGE, ("say the same thing",)),
    "a context of parameters": Mistake(prune("--target", "85%", "--context", "8192"), USAGE, ("in bytes",)),
    "a batch of a size": Mistake(prune("--target", "100KB", "--target-batch", "2"), USAGE, ("--target-speedup",)),
    "a percentage without its sign": Mistake(prune("--pruning-ratio", "25"), USAGE, ("25%?",)),
    "a layer that is not there": Mistake(prune("--drop-layers", "1,99"), PLAN, ("Layer 99 cannot", "layers 0 to 1")),
    "a text that is not there": Mistake(prune(*HALF, "--calibration", "nope.txt"), CHECKPOINT, ("nope.txt does not",)),
    "a broken line": Mistake(prune(*HALF, "--calibration", "bad.jsonl"), CHECKPOINT, ("bad.jsonl, line 1",)),
    "another encoding": Mistake(prune(*HALF, "--calibration", "latin.txt"), CHECKPOINT, ("iconv -f WINDOWS-1252",)),
    "no such column": Mistake(
        prune(*HALF, "--calibration", "good.jsonl", "--text-column", "body"), CHECKPOINT, ("'body'", "article, title")
    ),
    "no telling which column": Mistake(
        prune(*HALF, "--calibration", "good.jsonl"), CHECKPOINT, ("article, title", "--text-column")
    ),
    "a text of another kind": Mistake(
        ("eval", "model", "--dataset", "thesis.docx"), CHECKPOINT, ("thesis.docx", ".txt")
    ),
    "a plan that is not there": Mistake(prune("--plan", "plan.json"), CHECKPOINT, ("plan.json does not exist",)),
    "a plan to save below a file": Mistake(
        prune(*HALF, "--save-plan", "good.jsonl/plan.json"), OUTPUT, ("good.jsonl is no folder", "another --save-plan")
    ),
    "a plan to save as a folder": Mistake(prune(*HALF, "--save-plan", "taken"), OUTPUT, ("taken is a folder",)),
    "a plan in the place of the model": Mistake(
        prune(*HALF, "--save-plan", "model/config.json"), OUTPUT, ("lies in the model's folder", "--save-plan")
    ),
    "a plan in the place of the text": Mistake(
        prune(*HALF, "--calibration", "story.txt", "--save-plan", "story.txt"), OUTPUT, ("story.txt", "--save-plan")
    ),
    "a plan in the place of a part of the text": Mistake(
        prune(*HALF, "--calibration", "story.txt:0.5,good.md:0.5", "--save-plan", "./story.txt"),
        OUTPUT,
        ("story.txt", "--save-plan"),
    ),
    "a recipe in the place of the tokens": Mistake(
        prune("--vocab-size", "64", "--vocab-text", "good.md", "--keep-tokens", "a.yaml", "--save-config", "a.yaml"),
        OUTPUT,
        ("a.yaml", "--save-config"),
    ),
    "a recipe in the place of the plan": Mistake(
        prune(*HALF, "--save-plan", "same.json", "--save-config", "same.json"), OUTPUT, ("same.json", "--save-config")
    ),
    "an output without a name": Mistake(("prune", "model", *HALF, "-o", "."), OUTPUT, ("no name", "such as pruned")),
    "an output with a file's name": Mistake(
        ("prune", "model", *HALF, "-o", "out.gguf"), OUTPUT, ("A folder is written", "out.gguf")
    ),
    "a project for a model": Mistake(
        ("prune", "model", *HALF, "-o", "project", "--overwrite"), OUTPUT, ("project is not a model folder", "yourself")
    ),
    "statistics in a sweep": Mistake(
        sweep("--mlp", "10%", "-o", "out", "--statistics", "out/kept"), OUTPUT, ("out/kept", "--statistics")
    ),
    "statistics in an export": Mistake(
        prune(*HALF, "--gguf", "q8_0", "--statistics", "out-gguf/kept"), OUTPUT, ("out-gguf/kept", "--statistics")
    ),
    "a recipe to save below a file": Mistake(
        prune(*HALF, "--save-config", "good.jsonl/a.yaml"), OUTPUT, ("good.jsonl is no folder", "--save-config")
    ),
    "a model that is not there": Mistake(("inspect", "./nowhere"), CHECKPOINT, ("nowhere does not exist",)),
    "sensitivity beside widths": Mistake(
        ("inspect", "model", "--sensitivity", "--mlp", "25%"), USAGE, ("leave out the width options",)
    ),
    "sensitivity beside fewer tokens": Mistake(
        ("inspect", "model", "--sensitivity", "--vocab-size", "50%"), USAGE, ("leave out the width options",)
    ),
    "checksums beside fewer tokens": Mistake(
        ("inspect", "model", "--verify", "--vocab-size", "50%"), USAGE, ("--verify plans nothing",)
    ),
    "sensitivity beside checksums": Mistake(("inspect", "model", "--sensitivity", "--verify"), USAGE, ("--verify",)),
    "a text for no measurement": Mistake(
        ("inspect", "model", "--calibration", "good.jsonl"), USAGE, ("give --sensitivity",)
    ),
    "sensitivity on a text that is not there": Mistake(
        ("inspect", "model", "--sensitivity", "--calibration", "nope.txt"), CHECKPOINT, ("nope.txt does not",)
    ),
    "sensitivity without weights": Mistake(("inspect", "bare", "--sensitivity"), CHECKPOINT, ("bare has no weights",)),
    "a picture of another kind": Mistake(
        ("inspect", "model", "--sensitivity", "--report", "layers.pdf"), USAGE, (".png or an .svg", "layers.pdf")
    ),
    "an adapter": Mistake(("inspect", "adapter"), CHECKPOINT, ("LORA adapter of org/base", "Merge")),
    "an encoder": Mistake(("prune", "bert", *HALF, "--output", "out"), UNSUPPORTED, ("BertModel", "an encoder")),
    "an encoder with its head": Mistake(
        ("prune", "masked", *HALF, "--output", "out"), UNSUPPORTED, ("BertForMaskedLM", "an encoder", "such as Llama")
    ),
    "a folder of GGUF files": Mistake(("inspect", "ggufs"), CHECKPOINT, ("Give one of them", "ggufs/a.gguf")),
    "a device of others": Mistake(
        ("eval", "model", "--device", "mps"), CHECKPOINT, ("no device 'mps'", "--device cpu")
    ),
    "an output that is taken": Mistake(
        ("prune", "model", *HALF, "--output", "taken"), OUTPUT, ("not empty", "--overwrite")
    ),
    "an output within the input": Mistake(("export", "model", "--output", "model/out"), OUTPUT, ("overlap",)),
    "more tokens than there are": Mistake(prune("--vocab-size", "500000"), PLAN, ("500,032", "has 96", "Give fewer")),
    "tokens by no text": Mistake(
        prune("--vocab-size", "50%", "--vocab-text", "nope.txt"), CHECKPOINT, ("nope.txt does not",)
    ),
    "tokens to keep of no file": Mistake(
        prune("--vocab-size", "50%", "--keep-tokens", "nope.txt"), USAGE, ("nope.txt cannot be read: No such file",)
    ),
    "a type that is not there": Mistake(
        ("export", "model", "--format", "gguf", "--dtype", "q4_k", "-o", "out"), USAGE, ("Did you mean q4_k_m?", "q8_0")
    ),
    "a type of another format": Mistake(
        ("export", "model", "--dtype", "q4_k_m", "-o", "out"), USAGE, ("safetensors has no --dtype q4_k_m", "float16")
    ),
    "a type to prune to that is not there": Mistake(prune(*HALF, "--gguf", "q5"), USAGE, ("Did you mean q5_k_m?",)),
    "a GGUF of nothing": Mistake(("prune", "model", *HALF, "--dry-run", "--gguf", "q4_k_m"), USAGE, ("--output",)),
    "a file for a folder": Mistake(("export", "model", "-o", "out.gguf"), USAGE, ("names a folder", "out.gguf")),
    "a manifest that is none": Mistake(("recover", "torn", "-o", "out"), CHECKPOINT, ("torn/llmprune.json is not",)),
    "a model that nobody pruned": Mistake(("recover", "model", "-o", "out"), CHECKPOINT, ("Give --teacher",)),
    "a model that was pruned elsewhere": Mistake(
        ("recover", "moved", "-o", "out"), CHECKPOINT, ("made from ./gone", "does not exist", "Give --teacher if")
    ),
    "a teacher that is not there": Mistake(recover("--teacher", "./nobody"), CHECKPOINT, ("nobody does not exist",)),
    "an adapter as a teacher": Mistake(recover("--teacher", "adapter"), CHECKPOINT, ("LORA adapter of org/base",)),
    "a lesson that is not there": Mistake(recover("--text", "nope.txt"), CHECKPOINT, ("nope.txt does not",)),
    "no tokens to heal on": Mistake(recover("--tokens", "0"), USAGE, ("--tokens", "65k")),
    "a learning rate in words": Mistake(recover("--learning-rate", "small"), USAGE, ("'small'", "nor auto")),
    "hidden states that count less than nothing": Mistake(recover("--hidden-weight", "-1"), USAGE, ("from 0 on",)),
    "a way to heal that is not there": Mistake(recover("--mode", "block"), USAGE, ("Did you mean blocks?",)),
    "adapters of single layers": Mistake(
        recover("--mode", "blocks", "--lora", "4"), USAGE, ("--lora is about the whole model", "--mode blocks")
    ),
    "finalists of no target": Mistake(
        prune(*HALF, "--recover", "1M", "--finalists", "3"), USAGE, ("--recover and a --target",)
    ),
    "finalists without healing": Mistake(
        prune("--target", "80%", "--finalists", "3"), USAGE, ("--recover and a --target",)
    ),
    "a single finalist": Mistake(prune("--target", "80%", "--recover", "1M", "--finalists", "1"), USAGE, ("2",)),
    "healing into what is taken": Mistake(("recover", "model", "-o", "taken"), OUTPUT, ("not empty", "--overwrite")),
    "a task that is not there": Mistake(("eval", "model", "--tasks", "nope.yaml"), CHECKPOINT, ("nope.yaml does not",)),
    "a task without a name": Mistake(("eval", "model", "--tasks", "a,,b"), USAGE, ("arc_easy,hellaswag",)),
    "a push to no repository": Mistake(("push", "model", "pruned"), USAGE, ("'pruned'", "ORG/NAME")),
    "a push of what others made": Mistake(("push", "model", "me/pruned"), CHECKPOINT, ("llmprune.json", "hf upload")),
    "a push of nothing": Mistake(("push", "nowhere", "me/pruned"), CHECKPOINT, ("nowhere is no folder",)),
    "a name on the hub that is none": Mistake(prune(*HALF, "--push-to", "pruned"), USAGE, ("Write ORG/NAME",)),
    "a push without the hub": Mistake(recover("--push-to", "me/healed"), OUTPUT, ("HF_HUB_OFFLINE is set",)),
    "healing without an output": Mistake(("recover", "model"), USAGE, ("--output DIR",)),
    "more than all": Mistake(prune("--mlp", "150%"), USAGE, ("150% is no pruning ratio", "such as 0.25")),
    "less than nothing": Mistake(prune("--mlp=-25%"), USAGE, ("-25% is no pruning ratio", "such as 0.25")),
    "one ratio of all": Mistake(sweep("--mlp", "10%,100%"), USAGE, ("--mlp", "100% is no pruning ratio")),
    "no layers at all": Mistake(prune("--layers", "0"), USAGE, ("--layers", "whole number from 1 on, not '0'")),
    "no windows at all": Mistake(("eval", "model", "--limit", "0"), USAGE, ("--limit", "from 1 on, not '0'")),
    "a number in words": Mistake(
        prune(*HALF, "--calibration-tokens", "many"), USAGE, ("--calibration-tokens", "from 2 on, not 'many'")
    ),
    "a temperature in words": Mistake(recover("--temperature", "hot"), USAGE, ("--temperature", "not 'hot'")),
    "healing while it is pruned": Mistake(prune("--lora", "4"), USAGE, ("--lora", "options: llmprune recover --lora)")),
    "an importance by its paper": Mistake(prune(*HALF, "--importance", "wanda"), USAGE, ("Did you mean activation?",)),
    "a type by its bits": Mistake(
        ("export", "model", "--format", "gguf", "--dtype", "int4", "-o", "out"), USAGE, ("Did you mean q4_k_m?",)
    ),
    "a type of other formats": Mistake(
        ("export", "model", "--format", "genai", "--dtype", "q4_k_m", "-o", "out"), USAGE, ("Did you mean int4?",)
    ),
    "a target without a unit": Mistake(prune("--target", "4"), USAGE, ("--target", "4B, 4GiB or 4%?")),
    "a broken plan": Mistake(prune("--plan", "bad.jsonl"), CHECKPOINT, ("bad.jsonl is not", "with --save-plan")),
    "a plan of nothing": Mistake(prune("--plan", "nothing.json"), CHECKPOINT, ("nothing.json is not", "--save-plan")),
    "a recipe that is not there": Mistake(prune("--config", "nope.yaml"), CHECKPOINT, ("nope.yaml", "Check the path")),
    "a text for a model": Mistake(
        ("prune", "story.txt", *HALF, "-o", "out"), CHECKPOINT, ("story.txt is neither", "Give one of these")
    ),
    "weights for a model": Mistake(
        ("prune", "torn/model.safetensors", *HALF, "-o", "out"), CHECKPOINT, ("is neither", "Give the folder: torn.")
    ),
    "checksums of what others made": Mistake(
        ("inspect", "model", "--verify"), CHECKPOINT, ("model has no llmprune.json", "that llmprune wrote")
    ),
    "all layers": Mistake(prune("--drop-layers", "0-1"), PLAN, ("all 2 layers", "Name fewer")),
    "more layers than there are": Mistake(prune("--layers", "3"), PLAN, ("num_hidden_layers = 3", "1 to 2")),
    "more channels than there are": Mistake(prune("--hidden-size", "65"), PLAN, ("hidden_size = 65", "1 to 64")),
    "more heads than there are": Mistake(prune("--num-attention-heads", "10"), PLAN, ("1 to 8",)),
    "more neurons than there are": Mistake(prune("--intermediate-size", "1000"), PLAN, ("has 48", "1 to 48")),
    "more neurons to look at": Mistake(("inspect", "model", "--intermediate-size", "1000"), PLAN, ("1 to 48",)),
    "more experts than there are": Mistake(
        ("prune", "routed", "--experts", "9", "--dry-run"), PLAN, ("num_experts = 9", "1 to 8")
    ),
    "a model that is nowhere": Mistake(
        ("inspect", "nosuch"), CHECKPOINT, ("nosuch is neither", "hub cache", "HF_HUB_OFFLINE")
    ),
    "a model that is nearly called so": Mistake(("inspect", "modle"), CHECKPOINT, ("Did you mean model?",)),
    "a model that is called as none is": Mistake(
        ("inspect", "what is this?"), CHECKPOINT, ("'what is this?'", "nor a hub id", "Check the path")
    ),
    "a broken line behind others": Mistake(
        prune(*HALF, "--calibration", "late.jsonl"), CHECKPOINT, ("late.jsonl, line 101",)
    ),
    "statistics in a file": Mistake(
        prune(*HALF, "--statistics", "story.txt"), OUTPUT, ("story.txt is not a writable folder", "--statistics")
    ),
    "hidden states in a file": Mistake(prune(*HALF, "--offload-dir", "story.txt"), OUTPUT, ("--offload-dir",)),
    "a sweep of nothing": Mistake(sweep(), USAGE, ("say what to try", "--targets 90%,80%,70%")),
    "a sweep of two things": Mistake(
        sweep("--targets", "90%,80%", "--mlp", "10%"), USAGE, ("--targets and --mlp one at a time",)
    ),
    "targets that are none": Mistake(sweep("--targets", "90%,small"), USAGE, ("--targets", "'small'", "such as 6B")),
    "targets without their signs": Mistake(sweep("--targets", "0.9,0.8"), USAGE, ("--targets", "90%?")),
    "ratios that are called alike": Mistake(sweep("--mlp", "10%,0.1000000001"), USAGE, ("two ratios come to 10%",)),
    "a target that is there twice": Mistake(sweep("--targets", "80%,90%,80.0%"), USAGE, ("80.0% is there twice",)),
    "ratios that are none": Mistake(sweep("--mlp", "10%,half"), USAGE, ("--mlp", "'half'")),
    "a ratio of nothing": Mistake(sweep("--mlp", "0,10%"), USAGE, ("--mlp", "removes nothing")),
    "one target above the model": Mistake(sweep("--targets", "90%,6B"), PLAN, ("51,520", "removes nothing")),
    "one target below all": Mistake(sweep("--targets", "90%,2%"), PLAN, ("out of reach",)),
    "a sweep into what is taken": Mistake(
        sweep("--targets", "90%,80%", "-o", "taken"), OUTPUT, ("not empty", "--overwrite")
    ),
    "models to keep, and no place": Mistake(sweep("--mlp", "10%", "--keep-models"), USAGE, ("give --output DIR",)),
    "going on with what was not kept": Mistake(sweep("--mlp", "10%", "--resume"), USAGE, ("give --output DIR",)),
    "a sweep that heals on no number": Mistake(sweep("--mlp", "10%", "--recover", "lots"), USAGE, ("'lots'", "1M")),
    "a sweep that heals where nothing trains": Mistake(
        sweep("--mlp", "10%", "--recover", "1k", "--device", "cuda:1"), USAGE, ("CUDA_VISIBLE_DEVICES",)
    ),
    "healing where nothing trains": Mistake(
        prune("--mlp", "10%", "--recover", "1k", "--device", "cuda:1"), USAGE, ("CUDA_VISIBLE_DEVICES",)
    ),
    "a text for a sweep that is not there": Mistake(
        sweep("--mlp", "10%,20%", "--calibration", "nope.txt"), CHECKPOINT, ("nope.txt does not",)
    ),
    "a text without a name": Mistake(prune(*HALF, "--calibration", ""), USAGE, ("'' names no text", "Give a file")),
    "a model for a text": Mistake(prune(*HALF, "--calibration", "model"), CHECKPOINT, ("a model and no text", "Give")),
    "a split of a file": Mistake(
        prune(*HALF, "--calibration", "good.jsonl", "--text-column", "title", "--calibration-split", "train"),
        USAGE,
        ("--calibration-split train", "good.jsonl has none", "Leave it out"),
    ),
    "a split of a file to judge by": Mistake(
        ("eval", "model", "--dataset", "python-docs", "--split", "foo"),
        USAGE,
        ("--split foo", "python-docs has the splits test, validation, train"),
    ),
    "a text that nothing reads, and that is not there": Mistake(
        prune(*HALF, "--importance", "random", "--refit", "none", "--calibration", "nope.txt"),
        CHECKPOINT,
        ("nope.txt does not",),
    ),
    "a window by another name": Mistake(prune(*HALF, "--seqlen", "64"), USAGE, ("options: --calibration-seq-len)",)),
    "a window to learn from by another name": Mistake(recover("--seqlen", "64"), USAGE, ("options: --seq-len)",)),
    "a split of lessons": Mistake(
        recover("--text", "story.txt", "--text-split", "foo"), USAGE, ("--text-split foo", "story.txt has none")
    ),
    "a packed text that is none": Mistake(
        prune(*HALF, "--calibration", "plain.txt.gz"), CHECKPOINT, ("plain.txt.gz cannot be read: Not a gzipped file",)
    ),
    "a packed text that is cut short": Mistake(
        recover("--text", "cut.jsonl.gz"), CHECKPOINT, ("cut.jsonl.gz cannot be read: Compressed file ended",)
    ),
    "a day in a recipe that is none": Mistake(prune("--config", "day.yaml"), CHECKPOINT, ("month must be in 1..12",)),
    "a recipe in a tag": Mistake(prune("--config", "tag.yaml"), CHECKPOINT, ("tag.yaml is not a readable recipe",)),
    "a recipe without end": Mistake(prune("--config", "/dev/zero"), CHECKPOINT, ("/dev/zero has more than",)),
    "a recipe that names nothing": Mistake(prune("--config", "none.yaml"), USAGE, ("such as `layers: 27`",)),
    "tokens by the thousand digits": Mistake(prune("--vocab-size", "9" * 5000), USAGE, ("such as 32000",)),
    "healing by the thousand digits": Mistake(recover("--tokens", "9" * 5000), USAGE, ("such as 65k",)),
    "layers by the thousand digits": Mistake(prune("--drop-layers", "9" * 5000), USAGE, ("such as 3,7,-1",)),
    "a size by the hundred digits": Mistake(prune("--target", f"{'9' * 400}GB"), USAGE, ("500MB, 5GB or 4GiB",)),
    "a seed that is none": Mistake(recover("--seed", "9" * 30), USAGE, ("--seed", "from 0 to 4294967295")),
    "shares that are none": Mistake(prune(*HALF, "--calibration", "a.txt:1,b.txt:nan"), USAGE, ("a share above 0",)),
    "an output with too long a name": Mistake(("prune", "model", *HALF, "-o", LONG), OUTPUT, ("File name too long",)),
    "a model with too long a name": Mistake(
        ("prune", LONG, *HALF, "-o", "out"), CHECKPOINT, (f"{LONG} does not exist",)
    ),
    "a push of what has too long a name": Mistake(("push", LONG, "me/pruned"), CHECKPOINT, ("is no folder",)),
    "a text with too long a name": Mistake(
        prune(*HALF, "--calibration", f"{LONG}.txt"), CHECKPOINT, (f"{LONG}.txt does not",)
    ),
    "a recipe with too long a name": Mistake(prune("--config", f"{LONG}.yaml"), CHECKPOINT, ("File name too long",)),
}


@pytest.fixture
def place(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with everything that the mistakes are made with."""
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(tiny_llama)
    Path("good.jsonl").write_text(json.dumps({"article": "Once", "title": "A tale"}) + "\n")
    Path("bad.jsonl").write_text('{"text": "Once\n{"text": "upon a time"}\n')
    Path("routed").mkdir()
    Path("routed", "config.json").write_text('{"model_type": "mixtral", "num_local_experts": 8}')
    Path("late.jsonl").write_text(100 * '{"text": "Once"}\n' + "upon a time\n")
    Path("nothing.json").write_text("{}")
    Path("story.txt").write_text("Once upon a time. " * 100)
    Path("latin.txt").write_bytes("Es war einmal ein Käse.".encode("latin-1"))
    Path("thesis.docx").write_bytes(b"PK\x03\x04")
    for folder in ("adapter", "bert", "masked", "ggufs", "taken", "bare"):
        Path(folder).mkdir()
    Path("adapter", "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')
    Path("bert", "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    Path("masked", "config.json").write_text('{"model_type": "bert", "architectures": ["BertForMaskedLM"]}')
    Path("bare", "config.json").write_text((tiny_llama / "config.json").read_text())
    Path("ggufs", "a.gguf").write_bytes(b"GGUF")
    Path("taken", "thesis.tex").write_text("years of work")
    for folder, said in (("torn", '{"widths": 7}'), ("moved", '{"source": "./gone"}')):
        Path(folder).mkdir()
        Path(folder, "config.json").write_text((tiny_llama / "config.json").read_text())
        Path(folder, "model.safetensors").symlink_to(next(tiny_llama.glob("*.safetensors")))
        Path(folder, "llmprune.json").write_text(said)
    Path("project").mkdir()
    Path("project", "config.json").write_text('{"port": 8080}')
    Path("project", "thesis.tex").write_text("years of work")
    Path("good.md").write_text("Once upon a time. " * 100)
    Path("a.yaml").write_text("a")
    Path("plain.txt.gz").write_text("Once")
    Path("cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "Once"}\n')[:-9])
    Path("day.yaml").write_text("layers: 2001-99-99\n")
    Path("tag.yaml").write_text("layers: !!timestamp soon\n")
    Path("none.yaml").write_text("- layers\n")
    return tmp_path


@pytest.mark.skipif(sys.platform == "darwin", reason="has the device that others lack")
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_with_what_where_and_what_next(place: Path, name: str) -> None:
    mistake, before = MISTAKES[name], sorted(place.rglob("*"))
    assert_refused(run_cli(*mistake.words), mistake.code, *mistake.said)
    assert sorted(place.rglob("*")) == before


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
@pytest.mark.parametrize(
    "words",
    [
        prune(*HALF, "--calibration", "pipe.txt"),
        prune("--vocab-size", "50%", "--keep-tokens", "pipe.txt"),
        recover("--text", "pipe.jsonl"),
        ("inspect", "pipe.gguf"),
        ("prune", "holed", "--target", "80%", "--calibration", "pipe.txt", "--output", "out"),
    ],
)
def test_nobody_waits_for_a_pipe(place: Path, words: tuple[str, ...]) -> None:
    for name in ("pipe.txt", "pipe.jsonl", "pipe.gguf"):
        os.mkfifo(name)
    Path("holed").mkdir()
    Path("holed", "config.json").write_bytes(Path("model", "config.json").read_bytes())
    os.mkfifo("holed/model.safetensors")
    assert_refused(run_cli(*words), CHECKPOINT, "is not a regular file")


def test_no_mistake_waits_for_a_library(place: Path) -> None:
    """All in one process, which has to load what they need but once, and none of the large ones."""
    script = (
        "import io, json, sys, time\nfrom contextlib import redirect_stderr\nfrom llmprune_cli.__main__ import main\n"
        "ended = []\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    started = time.process_time()\n"
        "    with redirect_stderr(io.StringIO()):\n"
        "        try: main(words)\n"
        "        except SystemExit as end: ended.append([end.code, time.process_time() - started])\n"
        "loaded = {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
        "print(json.dumps([ended, sorted(loaded), time.process_time()]))"
    )
    commands = json.dumps([mistake.words for mistake in MISTAKES.values()])
    done = subprocess.run([sys.executable, "-c", script, commands], capture_output=True, text=True, check=True)
    ended, loaded, total = json.loads(done.stdout.splitlines()[-1])
    assert [code for code, _ in ended] == [mistake.code for mistake in MISTAKES.values()] and not loaded
    start = total - sum(seconds for _, seconds in ended)  # of a process, before it looks at its arguments
    slow = {name: seconds for name, (_, seconds) in zip(MISTAKES, ended, strict=True) if start + seconds > MOST_SECONDS}
    assert not slow, f"{slow} after {start:.2f}"


def test_a_target_below_what_a_search_reaches_is_told_before_anything_is_measured(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMPRUNE_WIKITEXT2", str(place / "taken"))  # no text, so that measuring would fail
    run = run_cli(*prune("--target-params", "20%"))
    assert_refused(run, PLAN, "least that the search reaches", "Ask for", "up to less than 51,520")


@pytest.mark.parametrize(
    ("family", "settings", "ratio", "why"),
    [
        ("qwen2", {"num_key_value_heads": 1}, "--kv-group-pruning-ratio", "One of the KV groups stays"),
        (
            "bloom",
            {"n_head": 4, "n_layer": 2},
            "--head-pruning-ratio",
            "in hidden_size and num_attention_heads: the slopes of its position bias (ALiBi)",
        ),
    ],
)
def test_a_ratio_that_a_family_cannot_give_alone_makes_no_copy(
    make_tiny: Callable[..., Path], tmp_path: Path, family: str, settings: dict[str, int], ratio: str, why: str
) -> None:
    model = make_tiny(family, **settings)
    run = run_cli(
        "prune", model, ratio, "0.3", "--importance", "random", "--refit", "none", "--output", tmp_path / "out"
    )
    assert_refused(run, PLAN, why)
    assert not (tmp_path / "out").exists()


def test_a_percentage_is_taken_wherever_a_ratio_is(tiny_llama: Path, tmp_path: Path) -> None:
    Path(tmp_path, "recipe.yaml").write_text("intermediate_pruning_ratio: 50%\n")
    asked = (("--intermediate-pruning-ratio", "50%"), ("--config", tmp_path / "recipe.yaml"))
    for words in asked:
        run = run_cli("inspect", tiny_llama, *words, "--json")
        assert run.code == 0 and json.loads(run.stdout)["after"]["widths"]["intermediate_size"] == 24, run.stderr


def test_a_disk_without_room_is_told_before_anything_is_written(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmprune_cli.folder import staging

    usage = staging.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    options = ("--intermediate-size", "24", "--importance", "random", "--refit", "none")
    run = run_cli("prune", tiny_llama, *options, "--output", tmp_path / "out")
    assert_refused(run, OUTPUT, "bytes", "has room for 1,000", "another --output")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("module", "words", "said"),
    [
        ("heal.options", recover("--lora", "4"), "--lora needs the peft package: pip install 'llmprune[lora]'"),
        ("formats.request", ("export", "model", "--format", "onnx", "-o", "out"), "pip install 'llmprune[onnx]'"),
        ("formats.request", ("export", "model", "--format", "genai", "-o", "out"), "pip install 'llmprune[genai]'"),
    ],
)
def test_a_package_that_is_missing_is_told_before_anything_is_read(
    place: Path, monkeypatch: pytest.MonkeyPatch, module: str, words: tuple[str, ...], said: str
) -> None:
    Path("model").unlink()  # so that reading it would be told first
    monkeypatch.setattr(f"llmprune_cli.{module}.find_spec", lambda name: None)
    assert_refused(run_cli(*words), UNSUPPORTED, said)


def test_an_interruption_that_becomes_an_error_is_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where torch asks a storage for its length, and takes what that raises for an answer."""

    def lose_it(_: object) -> None:
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise ValueError("could not determine the shape")

    monkeypatch.setattr(app, "run", lose_it)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell ignores for what it runs behind
    try:
        run = run_cli("inspect", "anything")
    finally:
        signal.signal(signal.SIGINT, before)
    assert run.code == INTERRUPTED and "shape" not in run.stderr
    monkeypatch.undo()
    assert run_cli("inspect", "./nowhere").code == CHECKPOINT  # the next run was not interrupted
