"""Turn the residual stream so that its channels are principal components, the least of which can go.

SliceGPT's idea (arXiv 2401.15024) in a form that stock models hold. The weights w of an RMSNorm move into the weights
that read it, W diag(w); a norm without weights commutes with every orthogonal Q [D, D]; so readers become W diag(w) Q,
writers Qᵀ W, embeddings E Q, and the model computes what it did. One Q serves all layers, where SliceGPT has one for
each, whose changes from one to the next need weights of their own that no stock model has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from llmprune_cli.coupling.subject import Subject, understand
from llmprune_cli.errors import UnsupportedError
from llmprune_cli.family.architecture import reconfigure
from llmprune_cli.family.skeleton import expected_index
from llmprune_cli.folder.scratch import scratch_space
from llmprune_cli.folder.shards import read_index, write_shards
from llmprune_cli.folder.tensors import TensorEntry, split_name
from llmprune_cli.repair.residual_stream import Norm, ResidualStream
from llmprune_cli.run.layer import check_states
from llmprune_cli.run.layered_model import LayeredModel

NormWeights = dict[Norm, dict[tuple[int, ...], "torch.Tensor"]]  # by the numbers in their names, [D]
SHARD_BYTES = 5 * 10**9


def principal_components(
    model: LayeredModel, windows: torch.Tensor, folder: Path | None, progress: Callable[[int], None]
) -> torch.Tensor:
    """Q, orthogonal, float64 [D, D]: directions of the residual stream in its columns, those with most energy first.

    Eigenvectors of Σ h hᵀ/‖h‖² over all tokens before the first and behind each layer: every token and every layer
    weighs the same, as it does to the norms that read them.

    Args:
        windows: token ids, [N, T], of which each process runs its share.
        folder: of the hidden states, see `new_states`.
        progress: told after each layer.
    """
    size = model.widths.hidden_size
    moment = torch.zeros(size, size, dtype=torch.float64)

    def add(stream: torch.Tensor) -> None:
        for window in stream:
            unit = torch.nn.functional.normalize(window, dim=-1)
            moment.add_((unit.T @ unit).double().cpu())

    with torch.inference_mode():
        stream = model.embed(model.share(windows), folder)
        add(stream)
        for number in range(model.layers):
            model.load_layer(number).advance(stream)
            check_states(stream, f"Layer {number}")
            add(stream)
            progress(1)
        model.processes.sum_(moment)
        vectors = torch.linalg.eigh(moment).eigenvectors.flip(1)
        model.processes.copy_from_first_(vectors)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    components: torch.Tensor = (vectors * largest.sign()).clone()  # an eigenvector has no sign of its own
    return components


def untie(subject: Subject) -> tuple[Subject, int]:
    """The subject with an output projection of its own, known from headers, and how many parameters that adds.

    The final norm's weights move into the output projection alone, so that it is the embedding no longer.

    Raises:
        UnsupportedError: the family has no untied form.
    """
    checkpoint = subject.checkpoint
    if not getattr(checkpoint.config, "tie_word_embeddings", False):
        return subject, 0
    config = reconfigure(checkpoint.config, {"tie_word_embeddings": False})
    added = [name for name in expected_index(config) if name not in checkpoint.by_name]
    if len(added) != 1:
        raise UnsupportedError(f"{config.model_type} cannot be rotated: its embeddings cannot be untied.")
    embedding = checkpoint.by_name[_embedding(subject)]
    head = replace(embedding, name=added[0], stored_name=embedding.stored_name or embedding.name)
    apart = understand(replace(checkpoint, config=config, entries=(*checkpoint.entries, head)), subject.processes)
    return apart, head.numel


def _embedding(subject: Subject) -> str:
    """The largest tensor outside the layers."""
    outside = [entry for entry in subject.checkpoint.entries if not split_name(entry.name)[1]]
    return max(outside, key=lambda entry: entry.numel).name


def rotate(
    subject: Subject, stream: ResidualStream, components: torch.Tensor, folder: Path, progress: Callable[[int], None]
) -> Subject:
    """The same model in other channels, written into a folder tensor by tensor.

    Args:
        subject: whose output projection is its own, see `untie`.
        components: Q, [D, D].
        progress: told the bytes of each tensor.
    """
    checkpoint = subject.checkpoint
    weights: NormWeights = {norm: {} for norm in stream.norms}
    templates = {norm.weight: norm for norm in stream.norms}
    vectors = tuple(entry for entry in checkpoint.entries if split_name(entry.name)[0] in templates)
    for entry, tensor in replace(checkpoint, entries=vectors).tensors():
        template, numbers = split_name(entry.name)
        norm = templates[template]
        weights[norm][numbers] = tensor.double() + norm.offset

    def stream_out() -> Iterator[tuple[TensorEntry, torch.Tensor]]:
        for entry, tensor in checkpoint.tensors():
            template, numbers = split_name(entry.name)
            yield entry, _rotated(tensor, template, numbers, stream, weights, components)
            progress(entry.size_bytes)

    with scratch_space():
        write_shards(folder, checkpoint.entries, stream_out(), SHARD_BYTES)
        checkpoint.config.save_pretrained(folder)
    written = replace(checkpoint, folder=folder, entries=read_index(folder), dropped=(), renamed=(), stamps={})
    folded = {norm.weight: norm.offset for norm in stream.norms}
    return replace(understand(written, subject.processes), folded_norms=folded)


def _rotated(
    tensor: torch.Tensor,
    template: str,
    numbers: tuple[int, ...],
    stream: ResidualStream,
    weights: NormWeights,
    components: torch.Tensor,
) -> torch.Tensor:
    norm_templates = {norm.weight: norm for norm in stream.norms}
    if template in norm_templates:
        return tensor.new_full(tensor.shape, 1 - norm_templates[template].offset)
    if template not in stream.axes:
        return tensor
    along = tensor.movedim(stream.axes[template], -1).double()
    if template in stream.readers:
        own = weights[stream.readers[template]]
        along = along * own[numbers[:1] if numbers[:1] in own else ()]
    return (along @ components).movedim(-1, stream.axes[template]).to(tensor.dtype).contiguous()
