"""A teacher that runs once, one decoder layer in memory at a time, and whose likeliest tokens are kept in files."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from llmprune_cli.errors import CheckpointError, OutputError, PlanError
from llmprune_cli.folder.documents import read_json, replace_file
from llmprune_cli.folder.scratch import filled_alone
from llmprune_cli.heal.loss import Goal, Predicted
from llmprune_cli.heal.teacher.token_map import TokenMap
from llmprune_cli.heal.teacher.unfinished import Unfinished
from llmprune_cli.journal.keys import differences, model_identity, text_identity, versions
from llmprune_cli.progress import Listener
from llmprune_cli.run.divergence import predicted
from llmprune_cli.run.layered_model import LayeredModel
from llmprune_cli.run.states import allocate

RECORD = "teacher.json"  # written last: what the other files hold
LOGS, TOKENS, STATES = "log-probabilities.bin", "tokens.bin", "hidden-states.bin"
LEAST = -60000.0  # a log-probability that float16 holds
LIKELIEST = 64  # tokens that are kept of each prediction,
DRAWN = 64  # and how many are drawn from all others, by their probabilities, to stand for them (arXiv 2503.16870)

DRAWN_BY = (
    "Which windows of a text are taken depends on --seq-len, --tokens, --seed, --loss-on, and on which of them the "
    "pruned model was fitted on, --calibration-tokens."
)


@dataclass(frozen=True)
class StreamedTeacher:
    """What a teacher predicted on some windows, in files that are mapped into memory."""

    logs: torch.Tensor  # log-probabilities of K likeliest tokens, of all others, of S of these, float16 [N, T−1, K+1+S]
    tokens: torch.Tensor  # ids of the likeliest and of those that were drawn, int32 [N, T−1, K+S]
    likeliest: int  # K
    states: torch.Tensor | None = None  # the residual stream behind layers that are followed, bfloat16 [L, N, T, D]
    first: int = 0  # the number of the first window; of those before it nothing is asked

    def goal(self, windows: torch.Tensor, numbers: torch.Tensor) -> Goal:
        """What it predicted on the windows with these numbers, [B]."""
        return _StreamedGoal(self, numbers.cpu() - self.first, windows.device)

    judged_goal = goal

    def keep(self, number: int, places: slice, logs: torch.Tensor, generator: torch.Generator) -> None:
        """Keep what it predicts at some places of a window.

        Args:
            logs: log-probabilities of all tokens, float32 [n, V].
        """
        likeliest = logs.topk(self.likeliest)
        others = logs.scatter(-1, likeliest.indices, -torch.inf)
        count = self.tokens.shape[-1] - self.likeliest
        drawn = likeliest.indices[:, :0]
        if count:
            chances = others.softmax(-1).nan_to_num(1.0)  # where nothing is left for others, any of them counts nothing
            drawn = torch.multinomial(chances.cpu(), count, replacement=True, generator=generator).to(logs.device)
        tokens = torch.cat([likeliest.indices, drawn], -1)
        kept = [likeliest.values, others.logsumexp(-1, keepdim=True), logs.gather(-1, drawn)]
        self.logs[number, places] = torch.cat(kept, -1).clamp_min(LEAST).cpu().to(torch.float16)
        self.tokens[number, places] = tokens.cpu().to(torch.int32)


@dataclass(frozen=True)
class _StreamedGoal:
    teacher: StreamedTeacher
    rows: torch.Tensor  # of the windows, [B]
    place: torch.device

    @cached_property
    def logs(self) -> torch.Tensor:
        """Those of the windows, [n, K+1+S]."""
        return self.teacher.logs[self.rows].to(self.place).float().flatten(0, 1)

    @cached_property
    def tokens(self) -> torch.Tensor:
        """Those of the windows, [n, K+S]."""
        return self.teacher.tokens[self.rows].to(self.place).long().flatten(0, 1)

    def prepare(self) -> None:
        pass  # it is in files

    @property
    def streams(self) -> Iterable[torch.Tensor]:
        states = self.teacher.states
        return () if states is None else (own[self.rows].to(self.place) for own in states)

    def at(self, places: slice) -> Predicted:
        likeliest = self.teacher.likeliest
        known = self.logs[places, : likeliest + 1].log_softmax(-1)  # what rounding left
        drawn = self.logs[places, likeliest + 1 :]
        logs = torch.cat([known[:, :-1], drawn], -1)
        each = known[:, -1:].exp() / max(1, drawn.shape[-1])
        weights = torch.cat([known[:, :-1].exp(), each.expand(drawn.shape)], -1)
        return Predicted(logs, self.tokens[places], weights)


def cache_key(
    model: LayeredModel, windows: torch.Tensor, temperature: float, tokens: TokenMap | None, layers: tuple[int, ...]
) -> dict[str, Any]:
    """Everything that decides what is kept of a teacher on windows [N, T]."""
    identity = {f"teacher's {name}": value for name, value in model_identity(model.checkpoint).items()}
    return {
        **identity,
        "text": text_identity(windows),
        "temperature": temperature,
        "tokens kept": [LIKELIEST, DRAWN],
        "compute dtype": str(model.compute),
        "vocabulary": None if tokens is None else tokens.identity(),
        "layers with hidden states": list(layers) or None,
        "versions": versions(),
    }


def _check_room(
    model: LayeredModel, windows: torch.Tensor, files: tuple[_File, ...], folder: Path, kept_free: int
) -> None:
    """Make sure that a folder has room for what is kept, meanwhile for hidden states, and later for what else comes.

    Raises:
        OutputError: it does not.
    """
    predictions, states = (sum(own.size_bytes for own in some) for some in (files[:2], files[2:]))
    meanwhile = 4 * windows.numel() * model.widths.hidden_size
    free = shutil.disk_usage(folder).free
    if predictions + states + max(meanwhile, kept_free) > free:
        behind_layers = f", its hidden states for --hidden-weight {states:,}" if states else ""
        training = f", and the training takes {kept_free:,} then" if kept_free else ""
        raise OutputError(
            f"{folder} has room for {free:,} bytes, and what the teacher predicts takes {predictions:,}"
            f"{behind_layers}, with {meanwhile:,} more while it runs{training}. Name another folder with "
            "--teacher-cache, or give fewer --tokens."
        )


def stream_teacher(
    model: LayeredModel,
    windows: torch.Tensor,
    temperature: float,
    folder: Path,
    listener: Listener,
    tokens: TokenMap | None = None,
    layers: tuple[int, ...] = (),
    kept_free: int = 0,
) -> StreamedTeacher:
    """Run a teacher over windows [N, T], unless a folder holds what it predicts there already.

    What is filled is this run's alone until it is whole.

    Args:
        tokens: where the student, whose the windows are, has fewer.
        layers: behind which its residual stream is kept, too.
        kept_free: bytes on the disk of the folder that the training will take.

    Raises:
        PlanError: the folder holds what another one predicts, or on other text.
        CheckpointError: what it holds is damaged.
        OutputError: there is no room, or another run is filling the folder.
    """
    vocabulary = int(model.architecture.config.get_text_config().vocab_size) if tokens is None else len(tokens.numbers)
    files = _files(model, windows, vocabulary, layers, folder)
    key = json.loads(json.dumps(cache_key(model, windows, temperature, tokens, layers)))
    if (folder / RECORD).exists():
        return _kept(folder, key, files)
    with filled_alone(folder, "--teacher-cache"):
        if (folder / RECORD).exists():  # since a moment ago
            return _kept(folder, key, files)
        for file in files:  # of a run that was cut short
            file.path.unlink(missing_ok=True)
        _check_room(model, windows, files, folder, kept_free)
        try:
            for file in files:
                with file.path.open("wb") as opened:
                    allocate(opened.fileno(), file.size_bytes)
        except OSError as error:
            raise OutputError(
                f"{folder} cannot be written: {error.strerror}. Choose another --teacher-cache."
            ) from error
        teacher = _mapped(files, is_new=True)
        with torch.inference_mode():
            _fill(teacher, model, windows, temperature, folder, listener, tokens, layers)
        replace_file(folder / RECORD, [json.dumps(key).encode()])
    return teacher


def _kept(folder: Path, key: dict[str, Any], files: tuple[_File, ...]) -> StreamedTeacher:
    """What a folder holds, held against what it should be."""
    different = differences(read_json(folder / RECORD, None), key)
    if different:
        windows = f" {DRAWN_BY}" if any(own.startswith("text ") for own in different) else ""
        raise PlanError(
            f"{folder} holds what another teacher predicts, or on other text: {'; '.join(different)}.{windows} Choose "
            "another --teacher-cache."
        )
    for file in files:
        if not file.path.is_file() or file.path.stat().st_size != file.size_bytes:
            raise CheckpointError(f"{file.path} is damaged. Remove {folder}, and the teacher runs again.")
    return _mapped(files, is_new=False)


def _fill(
    teacher: StreamedTeacher,
    model: LayeredModel,
    windows: torch.Tensor,
    temperature: float,
    folder: Path,
    listener: Listener,
    tokens: TokenMap | None,
    layers: tuple[int, ...],
) -> None:
    read = windows if tokens is None else tokens.read(windows)
    listener.stage("Running the teacher", model.layers)
    for number, (states, items) in enumerate(model.walk(read, folder=folder)):  # noqa: B007 - the last are wanted
        if teacher.states is not None and number in layers:
            teacher.states[layers.index(number)].copy_(states)
        listener.advance(1)
    generator = torch.Generator().manual_seed(0)
    ends = model.load_ends(exact=True, compute=model.compute)
    listener.stage("Keeping what it predicts", len(windows))
    for number, places, _ in predicted(ends, windows):
        logs = functional.log_softmax(ends.logits(states[number : number + 1, places], items)[0] / temperature, -1)
        if places.start == 0:
            unfinished = None if tokens is None else Unfinished(tokens, windows[number : number + 1])
            listener.advance(1)
        teacher.keep(number, places, logs if unfinished is None else unfinished.follow(places, logs), generator)


@dataclass(frozen=True)
class _File:
    """A tensor in a file."""

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        """Bytes of the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def _files(
    model: LayeredModel, windows: torch.Tensor, vocabulary: int, layers: tuple[int, ...], folder: Path
) -> tuple[_File, ...]:
    """Where log-probabilities, tokens and, behind some layers, hidden states are kept, see `StreamedTeacher`."""
    count, length = windows.shape
    likeliest = min(LIKELIEST, vocabulary)
    kept = likeliest + (DRAWN if likeliest < vocabulary else 0)
    logs = _File(folder / LOGS, (count, length - 1, kept + 1), torch.float16)
    tokens = _File(folder / TOKENS, (count, length - 1, kept), torch.int32)
    states = _File(folder / STATES, (len(layers), count, length, model.widths.hidden_size), torch.bfloat16)
    return (logs, tokens, states) if layers else (logs, tokens)


def _mapped(files: tuple[_File, ...], is_new: bool) -> StreamedTeacher:
    """Tensors that lie in the files; what is written to them is kept where these are new."""
    logs, tokens, *states = (
        torch.from_file(str(own.path), shared=is_new, size=math.prod(own.shape), dtype=own.dtype).view(*own.shape)
        for own in files
    )
    return StreamedTeacher(logs, tokens, min(LIKELIEST, tokens.shape[-1]), states[0] if states else None)
