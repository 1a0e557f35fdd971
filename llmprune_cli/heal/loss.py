"""What a pruned model loses on the tokens that follow, a few tokens' logits at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from llmprune_cli.heal.head import Gradients, Head, cast_once
from llmprune_cli.heal.layers import following, relative_error
from llmprune_cli.heal.options import LossWeights
from llmprune_cli.run.perplexity import LOGIT_ELEMENTS, head_logits, without_head
from llmprune_cli.run.precision import multiplying_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel


LEAST = -1e4  # a log-probability; of logits that a model masks, it is infinite


@dataclass(frozen=True)
class Predicted:
    """What a teacher predicts after n tokens: log-probabilities at the temperature of the loss."""

    logs: torch.Tensor  # of all tokens, [n, V], or of K among them
    tokens: torch.Tensor | None = None  # the ids of these, [n, K]
    weights: torch.Tensor | None = None  # how much each of them counts: its probability, or that of those it stands for

    def only(self, chosen: torch.Tensor | None) -> Predicted:
        """After some of the tokens, see `only`."""
        tokens, weights = (None if own is None else only(own, chosen) for own in (self.tokens, self.weights))
        return Predicted(only(self.logs, chosen), tokens, weights)


def only(rows: torch.Tensor, chosen: torch.Tensor | None) -> torch.Tensor:
    """Some of n rows, [n, ...], which [n] of bool says; None: all."""
    return rows if chosen is None else rows[chosen]


class Goal(Protocol):
    """What a teacher predicts after each token of some windows but their last, one window after the other."""

    @property
    def streams(self) -> Iterable[torch.Tensor]:
        """Its residual stream behind each layer that is followed, [B, T, D]; none where none is."""

    def prepare(self) -> None:
        """Do now what takes memory of its own, before that of a student is taken."""

    def at(self, places: slice) -> Predicted:
        """A part of it."""


def divergence(logits: torch.Tensor, predicted: Predicted, temperature: float) -> torch.Tensor:
    """Sum over tokens of KL(teacher ‖ student) · τ², logits divided by τ (arXiv 1503.02531, section 2).

    Where some of the teacher's tokens alone are known, this is what the sum over all of them is in the mean.

    Args:
        logits: of the student, float32 [n, V].
    """
    logits = logits if temperature == 1 else logits / temperature
    if predicted.tokens is None:
        whole: torch.Tensor = _Divergence.apply(logits, predicted.logs)  # type: ignore[no-untyped-call]
        return whole * temperature**2
    assert predicted.weights is not None
    logs = functional.log_softmax(logits, -1)
    return (predicted.weights * (predicted.logs - logs.gather(-1, predicted.tokens))).sum() * temperature**2


def reverse_divergence(logits: torch.Tensor, predicted: Predicted, temperature: float) -> torch.Tensor:
    """Sum over tokens of KL(student ‖ teacher) · τ², logits divided by τ (MiniLLM, arXiv 2306.08543, section 2).

    Of a teacher that is known as a whole: tokens that it would not say, which count most here, are those that nobody
    keeps of it.

    Args:
        logits: of the student, float32 [n, V].
    """
    assert predicted.tokens is None
    logs = functional.log_softmax(logits if temperature == 1 else logits / temperature, -1)
    return (logs.exp() * (logs - predicted.logs.clamp_min(LEAST))).sum() * temperature**2


class _Divergence(torch.autograd.Function):
    """Sum of KL(p ‖ q) over n tokens, of logits [n, V] and log p [n, V]; its gradient by the logits is q − p."""

    @staticmethod
    def forward(context: Any, logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        logs, chances = functional.log_softmax(logits, -1), wanted.exp()
        total = (wanted - logs).mul_(chances).sum()
        if context.needs_input_grad[0]:
            context.save_for_backward(logs.exp_().sub_(chances))
        return total

    @staticmethod
    def backward(context: Any, scale: torch.Tensor) -> Any:
        (gradient,) = context.saved_tensors
        return gradient * scale, None


def hidden_states(model: PreTrainedModel, windows: torch.Tensor) -> torch.Tensor:
    """What a model's head is given for every token of windows [B, T] but their last, [B·(T−1), D]."""
    output: torch.Tensor = without_head(model)(input_ids=windows, use_cache=False).last_hidden_state
    return output[:, :-1].flatten(0, 1)


def parts(count: int, vocabulary: int) -> Iterator[slice]:
    """Places of so many tokens, cut so that the logits of one part are few."""
    size = max(1, LOGIT_ELEMENTS // vocabulary)
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))


class _InParts(torch.autograd.Function):
    """A sum over parts of hidden states whose gradients are formed with it, so that one part is in memory."""

    @staticmethod
    def forward(
        context: Any, part_of: Callable[[torch.Tensor, slice], torch.Tensor], student: Student, *tensors: torch.Tensor
    ) -> torch.Tensor:
        hidden, *weights = tensors
        own_gradient = torch.zeros_like(hidden)
        total = hidden.new_zeros((), dtype=torch.float32)
        with student.head_cast_once() as head:
            gradients = Gradients(weights, head)
            for places in parts(len(hidden), student.vocabulary):
                with torch.enable_grad():
                    own = hidden[places].detach().requires_grad_()
                    part = part_of(own, places)
                    found = torch.autograd.grad(part, [own, *weights], allow_unused=True)
                total += part.detach()
                own_gradient[places] = found[0]
                gradients.add(found[1:])
                del part, found
        context.save_for_backward(own_gradient, *gradients.finished())
        return total

    @staticmethod
    def backward(context: Any, scale: torch.Tensor) -> Any:
        return None, None, *(None if own is None else own.mul_(scale) for own in context.saved_tensors)


class Student(nn.Module):
    """A pruned model together with what it loses: what a trainer trains.

    It always runs as it will be used, without dropout. Its state is that of the weights that are trained, each once.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        weights: LossWeights,
        temperature: float,
        compute: torch.dtype,
        hidden_weight: float = 0.0,
        learned_share: float = 1.0,
    ) -> None:
        """Wrap a model.

        Args:
            weights: of the parts of the loss.
            compute: dtype of products.
            hidden_weight: of the relative error of the residual stream, mean over layers, beside that.
            learned_share: of the tokens that follow another one: those that count, in the mean over all text.
        """
        super().__init__()
        self.model = model
        self._weights, self._temperature, self._compute = weights, temperature, compute
        self._hidden_weight, self._learned_share = hidden_weight, learned_share

    @property
    def vocabulary(self) -> int:
        """Logits of a token."""
        return int(self.model.config.get_text_config().vocab_size)

    def forward(self, input_ids: torch.Tensor, goal: Goal, learned: torch.Tensor | None = None) -> torch.Tensor:
        """Mean over tokens of the loss on windows [B, T], in nats.

        Args:
            learned: which tokens but the first of each window count, [B, T−1] of bool. What these lose is divided by
                how many count in as many windows of all text, so that a token counts alike in each step.
        """
        with following(self.model, None if self._hidden_weight else ()) as streams:
            hidden = self.hidden_states(input_ids)
        wanted = input_ids[:, 1:].flatten()
        counted = len(wanted) * self._learned_share

        def part_of(own: torch.Tensor, places: slice) -> torch.Tensor:
            chosen = None if learned is None else learned.flatten()[places]
            logits = self.logits(only(own, chosen))
            lost = logits.new_zeros(())
            if self._weights.kl:
                apart = reverse_divergence if self._weights.is_reverse else divergence
                goal_there = goal.at(places).only(chosen)
                lost = lost + self._weights.kl * apart(logits, goal_there, self._temperature)
            if self._weights.ce:
                following_there = only(wanted[places], chosen)
                lost = lost + self._weights.ce * functional.cross_entropy(logits, following_there, reduction="sum")
            return lost / counted

        weights = [own for own in self.model.get_output_embeddings().parameters() if own.requires_grad]
        lost: torch.Tensor = _InParts.apply(part_of, self, hidden, *weights)  # type: ignore[no-untyped-call]
        if self._hidden_weight:
            errors = [relative_error(*pair) for pair in zip(streams, goal.streams, strict=True)]
            lost = lost + self._hidden_weight * torch.stack(errors).mean()
        return lost

    def hidden_states(self, windows: torch.Tensor) -> torch.Tensor:
        """What the head is given for every token of windows [B, T] but their last, [B·(T−1), D]."""
        with multiplying_in(self._compute, windows.device):
            return hidden_states(self.model, windows)

    def head_cast_once(self) -> AbstractContextManager[Head | None]:
        """See `cast_once`: within it, weights of the head must not change."""
        return cast_once(self.model.get_output_embeddings(), self._compute)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [n, D] to logits, float32 [n, V]."""
        with multiplying_in(self._compute, hidden.device):
            return head_logits(self.model, hidden[None])[0].float()

    def train(self, mode: bool = True) -> Student:
        """Stay as it is used, whatever is asked for."""
        return super().train(False)

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:  # type: ignore[override]
        """The weights that are trained, by name."""
        return {name: own.detach() for name, own in self.named_parameters() if own.requires_grad}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Replace them."""
        own = self.state_dict()
        for name in own.keys() & state_dict.keys():
            own[name].copy_(state_dict[name])
        missing, unexpected = own.keys() - state_dict.keys(), state_dict.keys() - own.keys()
        return nn.modules.module._IncompatibleKeys([*missing], [*unexpected])
