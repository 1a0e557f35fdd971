"""Export to a graph of torch's own, which needs torch alone to run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.formats.graphs import EXAMPLE, fit_graph, load_traceable, traced_quietly, without_cache, write_beside
from llmprune_cli.formats.registry import FLOAT_LIMITS, Continuation, ExportOptions, Format

FILE = "model.pt2"


def write_torch_export(
    checkpoint: Checkpoint, folder: Path, options: ExportOptions, progress: Callable[[int], None]
) -> dict[str, str]:
    """Write the graph from token ids [B, T] to logits [B, T, V], for any B and T, with the weights in it.

    Raises:
        UnsupportedError: the model has no graph.
    """
    model = load_traceable(checkpoint, options.dtype)
    sequences, _, tokens = EXAMPLE
    sizes = {"input_ids": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    example = torch.zeros(sequences, tokens, dtype=torch.long)
    with traced_quietly(checkpoint):
        program = torch.export.export(without_cache(model), (example,), dynamic_shapes=sizes)
        torch.export.save(program, folder / FILE)
    write_beside(checkpoint, model, folder)
    progress(checkpoint.size_bytes)
    return {}


class TorchProgram:
    """A loaded graph."""

    def __init__(self, graph: torch.nn.Module) -> None:
        """Run a graph from token ids to logits."""
        self.graph = graph

    def continue_greedily(self, prompt: torch.Tensor, tokens: int) -> Continuation:
        """Go on with a prompt, all of it anew for each token."""
        ids, log_probs = prompt, []
        for _ in range(tokens):
            log_probs.append(self.graph(ids[None])[0, -1].float().log_softmax(-1))
            ids = torch.cat([ids, log_probs[-1].argmax()[None]])
        return Continuation(ids[len(prompt) :], torch.stack(log_probs))


@contextmanager
def open_torch_program(folder: Path) -> Iterator[TorchProgram]:
    """Load the graph in a folder."""
    yield TorchProgram(torch.export.load(folder / FILE).module())


TORCH_EXPORT = Format(
    runs_in="torch.export",
    write=write_torch_export,
    fit=fit_graph,
    loading='`torch.export.load("FILE").module()`: token ids in, logits out.',
    file="*.pt2",
    package="torch",
    runtime=open_torch_program,
    limits=FLOAT_LIMITS,
)
