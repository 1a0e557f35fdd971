"""Tiny real checkpoints and a way to run the command line as users do."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import torch

    from llmprune_cli.coupling.subject import Subject
    from llmprune_cli.run.layered_model import LayeredModel

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TQDM_DISABLE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # tiny tensors, and pytest-xdist already keeps every core busy

WIKITEXT2 = Path(
    os.environ.get("LLMPRUNE_WIKITEXT2", Path(__file__).parents[2] / "shared" / "data" / "wikitext-2-raw-v1")
)

BYTE_LEVEL_VOCABULARY = 384  # of the models that `save_byte_level` gives a tokenizer
BY_MAGNITUDE = ("--importance", "magnitude", "--refit", "none")  # as torch-pruning's example does, without any text
BY_CHANCE = ("--importance", "random", "--refit", "none")


@dataclass(frozen=True)
class Run:
    """What a finished command left."""

    code: int
    stdout: str
    stderr: str


def run_cli(*args: str | Path) -> Run:
    """Run `llmprune` within this process: the same code, without the seconds that imports take."""
    from llmprune_cli.__main__ import main

    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr), pytest.raises(SystemExit) as ended:
        main([str(arg) for arg in args])
    code = ended.value.code
    return Run(code if isinstance(code, int) else int(code is not None), stdout.getvalue(), stderr.getvalue())


def run_process(*args: str | Path, env: dict[str, str] | None = None, cwd: Path | None = None) -> Run:
    """Run `llmprune` in a process of its own."""
    command = [sys.executable, "-m", "llmprune_cli", *map(str, args)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=cwd, env={**os.environ, **(env or {})}
    )
    return Run(done.returncode, done.stdout, done.stderr)


def tiny_config(family: str = "llama", **changes: object) -> object:
    """A configuration whose widths differ from each other and prune to legal ones at one half."""
    from transformers import AutoConfig

    sizes = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    return AutoConfig.for_model(family, **{**sizes, **changes})


def save_tiny(
    folder: Path, family: str = "llama", dtype: str = "float32", shard: str = "40KB", **changes: object
) -> Path:
    """Save a random checkpoint with a tokenizer; biases and norms are random too, so that losing one is seen."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """A byte-like tokenizer of 96 tokens, trained on nothing but the printable characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = [chr(code) for code in range(32, 124)]
    vocabulary = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", "\n", *characters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    fast.save_pretrained(folder)


def save_byte_level(folder: Path, steps: object = None, whole_words: bool = False) -> None:
    """A byte-level BPE tokenizer whose words are GPT-2's or those of the steps given."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from llmprune_cli.export.verification import PROMPTS

    tokenizer = Tokenizer(models.BPE(ignore_merges=whole_words))
    tokenizer.pre_tokenizer = steps or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BYTE_LEVEL_VOCABULARY - 8,  # fewer tokens than embeddings, as padded models have
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*PROMPTS, Path(__file__).read_text(encoding="utf-8")], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    fast.save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded float32 Llama: hidden 64, 8 query heads for 2 KV heads, intermediate 48, untied."""
    return save_tiny(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some English, in the tiny tokenizer's alphabet."""
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, and then it does so again. " * 40)
    return path


@pytest.fixture
def make_tiny(tmp_path: Path) -> Callable[..., Path]:
    """Save a tiny checkpoint of any family below the test's own folder."""

    def make(family: str = "llama", **options: object) -> Path:
        return save_tiny(tmp_path / f"{family}-model", family, **options)  # type: ignore[arg-type]

    return make


@dataclass(frozen=True)
class Opened:
    """A tiny checkpoint of a family, and the stock model of it."""

    subject: Subject
    model: Any
    tokens: torch.Tensor

    @property
    def layered(self) -> LayeredModel:
        """The same, to be run one layer at a time."""
        return self.subject.layered("cpu")


@pytest.fixture
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opened]:
    """A family by name."""
    import torch

    import families
    from llmprune_cli.coupling.subject import understand
    from llmprune_cli.source.full_model import load_model
    from llmprune_cli.source.opening import ModelReference, open_checkpoint
    from test_checkpoint_forms import rewrite

    family = request.param
    # weights so large that every unit matters
    settings = {**families.SIZES, **families.FAMILIES[family], "initializer_range": 0.15}
    saved = save_tiny(tmp_path / "saved", families.model_type(family), **settings)
    folder = rewrite(saved, tmp_path / "model", with_random_correction)
    with open_checkpoint(ModelReference(str(folder)), need_weights=True) as checkpoint:
        subject = understand(checkpoint)
        tokens = torch.randint(3, 90, (4, 24), generator=torch.Generator().manual_seed(1))
        yield Opened(subject, load_model(checkpoint, "cpu", "float32"), tokens)


def with_random_correction(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The biases that a router adds behind its scores start as zeros: give them a say."""
    import torch

    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.randn(tensor.shape, generator=generator) if name.endswith("correction_bias") else tensor
        for name, tensor in tensors.items()
    }


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Add up what the tests counted, over all workers."""
    totals: dict[str, int] = {}
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, value in report.user_properties:
            totals[name] = totals.get(name, 0) + value
    for name, total in totals.items():
        terminalreporter.write_line(f"{name}: {total}")
