"""A prune that is yet to come: what it will do, and with how much text."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from llmprune_cli.choose.consensus import GRADIENT_SHARE_TOKENS
from llmprune_cli.choose.importances import has_gradients, needs_text
from llmprune_cli.choose.selection import SEARCH_TOKENS
from llmprune_cli.choose.targets.search import most_candidates
from llmprune_cli.commands.prune.decision import Decided
from llmprune_cli.commands.requests import PruneRequest
from llmprune_cli.folder.tensors import split_name
from llmprune_cli.repair.dense_goals import places_of, stream_dtype
from llmprune_cli.run.calibration import HELD_OUT_SHARE, windows_to_judge_by
from llmprune_cli.run.layered_model import LayeredModel
from llmprune_cli.run.states import are_worth_keeping, lies_in_memory, states_bytes
from llmprune_cli.run.workbench import Workbench
from llmprune_cli.source.tokenizer import longest_text


@dataclass(frozen=True)
class Job:
    """What a prune is asked for, and what it will work with."""

    request: PruneRequest  # with a settled choice
    decided: Decided
    bench: Workbench  # without text in a dry run that reads none

    @property
    def model(self) -> LayeredModel:
        """The unpruned model."""
        return self.bench.model

    @property
    def calibrates(self) -> bool:
        """Whether the model is run on text."""
        return needs_text(self.request.choice, self.decided.plan is not None)

    @property
    def ranked_windows(self) -> int:
        """Windows of text on which tokens are ranked; none where all stay, or a plan says which."""
        vocabulary, windows = self.decided.vocabulary, self.windows
        if vocabulary is None or self.decided.plan is not None:
            return 0
        text = vocabulary.text
        if text is None:
            return max(1, self.request.text.calibration_tokens // windows.length)
        parts = ((len(own), int(text.tokens * share) // own.shape[1]) for own, share in text.parts)
        return sum(min(count, max(1, wanted)) for count, wanted in parts)

    @property
    def reads_text(self) -> bool:
        """Whether the model is run on text, to calibrate or to rank tokens."""
        return self.calibrates or self.ranked_windows > 0

    @property
    def repairs(self) -> bool:
        """Whether anything is refitted, as nothing is where only tokens go."""
        decided = self.decided
        return decided.vocabulary is None or bool(decided.target.widths.changed_from(decided.subject.widths))

    @property
    def searches(self) -> bool:
        """Whether candidates are tried."""
        return self.decided.limit is not None

    @property
    def measures(self) -> bool:
        """Whether units or layers are chosen."""
        decided = self.decided
        changed = decided.target.widths.changed_from(decided.subject.widths)
        return decided.plan is None and (self.searches or bool(changed))

    @property
    def candidates(self) -> int:
        """How many are tried at most."""
        keep_layers = self.request.choice.widths.keep_layers
        return most_candidates(self.decided.subject, keep_layers) if self.searches else 0

    @cached_property
    def windows(self) -> Windows:
        """How much text there is, or will be if there is as much as is asked for."""
        text, asked = self.bench.text, self.request.text
        if text is not None:
            held_out, judged = len(text.held_out), max(len(text.judged), len(text.held_out))
            return Windows(text.fitted.shape[1], len(text.fitted), held_out, judged)
        longest = longest_text(self.model.checkpoint)
        length = min(asked.calibration_seq_len, longest or asked.calibration_seq_len)
        fitted = max(1, asked.calibration_tokens // length)
        return Windows(length, fitted, max(1, fitted // HELD_OUT_SHARE), windows_to_judge_by(length))

    @property
    def share(self) -> int:
        """Tokens that this process fits on."""
        processes = self.decided.subject.processes
        return -(-self.windows.fitted // processes.count) * self.windows.length

    @property
    def dense_bytes(self) -> int:
        """Of what the unpruned model makes of the text, before, within and behind every layer."""
        tokens = self.share + (SEARCH_TOKENS * 3 // 2 if self.searches else 0)
        return states_bytes(tokens, self.model.widths.hidden_size, places_of(self.model), stream_dtype(self.model))

    @property
    def keeps_dense(self) -> bool:
        """Whether there is room for that."""
        return self.model.device == "cpu" and are_worth_keeping(self.dense_bytes, self.bench.all_layers_dir)

    @property
    def kept_bytes(self) -> int:
        """Of that, what is kept in a file: all of it, or between layers what gradients cannot do without."""
        if self.keeps_dense:
            return self.dense_bytes
        choice = self.request.choice.settled
        if not self.measures or not has_gradients(choice):
            return 0
        tokens = self.share if choice.importance == "taylor" else min(self.share, GRADIENT_SHARE_TOKENS)
        return states_bytes(tokens, self.model.widths.hidden_size, self.model.layers + 1, stream_dtype(self.model))

    @property
    def fills_memory(self) -> bool:
        """Whether that file is memory, where no folder on a disk was found for it."""
        return lies_in_memory(self.bench.all_layers_dir)

    @cached_property
    def layer_parameters(self) -> int:
        """Of the largest layer."""
        sizes: dict[int, int] = {}
        for entry in self.model.checkpoint.entries:
            for number in split_name(entry.name)[1][:1]:
                sizes[number] = sizes.get(number, 0) + entry.numel
        return max(sizes.values(), default=0)


@dataclass(frozen=True)
class Windows:
    """How many windows of text."""

    length: int  # tokens of each
    fitted: int  # of all processes
    held_out: int
    judged: int
