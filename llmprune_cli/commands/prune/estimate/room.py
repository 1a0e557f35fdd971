"""Memory and disk that a prune will take, from the sizes of what it holds at a time."""

from __future__ import annotations

from dataclasses import dataclass

import psutil

from llmprune_cli.choose.gradients import GRADIENT_TOKENS
from llmprune_cli.choose.importances import has_gradients
from llmprune_cli.choose.magnitude import SLAB_BYTES
from llmprune_cli.commands.prune.estimate.job import Job
from llmprune_cli.folder.shards import header_bytes
from llmprune_cli.folder.tensors import TensorEntry, split_name
from llmprune_cli.repair.dense_goals import stream_dtype
from llmprune_cli.repair.layer_refit import GRAM_BYTES
from llmprune_cli.repair.least_squares import PRODUCT_ELEMENTS
from llmprune_cli.repair.replay import KEPT_BYTES
from llmprune_cli.run.layer import BATCH_TOKENS
from llmprune_cli.run.perplexity import LOGIT_ELEMENTS
from llmprune_cli.sizes import parse_size
from llmprune_cli.source.tokenizer import companions_of

SMALL_FILES = 12 * 2**10  # configuration, manifest and model card
TEXT_BYTES = 150 * 2**20  # of text, tokenizer and the libraries that read it


@dataclass(frozen=True)
class Memory:
    """Bytes at the most crowded moment."""

    host: int  # of the process, and of files that are memory
    device: int  # of a GPU; 0 without one


def peak_memory(job: Job, on_gpu: bool) -> Memory:
    """The memory that a prune will take at most, besides pages of files, which the system can drop."""
    base, stored = _taken_now(), job.model.checkpoint.entries
    whole = {(split_name(entry.name)[0], entry.shape) for entry in stored}
    cut = [e.size_bytes for e in job.decided.tensors if (split_name(e.name)[0], e.shape) not in whole]
    streaming = min(SLAB_BYTES, max(entry.size_bytes for entry in stored)) + max(cut, default=0)
    if not job.reads_text:
        return Memory(base + streaming, 0)
    if job.bench.text is None:
        base += TEXT_BYTES
    if _keeps_states(job) and job.fills_memory:
        base += job.kept_bytes
    phases = _phases(job)
    if not on_gpu:
        return Memory(base + max(streaming, *(states + products for states, products in phases)), 0)
    host = max(streaming, *(states for states, _ in phases))
    return Memory(base + host, max(products for _, products in phases))


def _taken_now() -> int:
    """Bytes of this process that are no pages of files."""
    now = psutil.Process().memory_info()
    return int(now.rss - getattr(now, "shared", 0))


def _phases(job: Job) -> list[tuple[int, int]]:
    """Of each part of the run: bytes of hidden states, and of what they are multiplied with and what that makes."""
    widths, windows = job.model.widths, job.windows
    channels, vocabulary = widths.hidden_size, int(job.model.checkpoint.config.vocab_size)
    each = job.model.compute.itemsize
    experts = job.decided.subject.architecture.experts_per_token if widths.num_experts else 1
    neurons = max(widths.intermediate_size, widths.moe_intermediate_size)
    heads = widths.num_attention_heads * widths.head_dim
    made = 3 * neurons * experts + 3 * heads + 6 * channels  # numbers that a layer makes of a token
    read = max(neurons, heads)  # numbers that a reader is given
    numbers = 0 if job.bench.offload_dir is not None else job.share * channels
    pruned, dense = 4 * numbers, stream_dtype(job.model).itemsize * numbers
    layer, head = each * job.layer_parameters, 4 * vocabulary * channels
    logits = 4 * min(LOGIT_ELEMENTS, vocabulary * windows.length)
    batch = 4 * made * min(BATCH_TOKENS, job.share)
    judged, ranked = (4 * count * windows.length * channels for count in (windows.judged, job.ranked_windows))
    phases = [(ranked, max(layer + batch, head + 3 * logits))] if ranked else []
    if not job.calibrates:
        return phases
    read_together = 4 * made * min(BATCH_TOKENS, windows.judged * windows.length)
    phases.append((2 * judged, 2 * layer + max(read_together, head + 3 * logits)))
    if job.measures:
        phases.append((2 * dense, layer + batch))
    if job.measures and has_gradients(job.request.choice):
        learned = 3 * 4 * made * min(GRADIENT_TOKENS, job.share)
        narrow = each * vocabulary * channels  # the output projection, in the dtype of the computation
        phases.append((pruned + dense, max(layer + 12 * job.layer_parameters + learned, narrow + 4 * logits)))
    if job.request.choice.settled.refit != "none" and job.repairs:
        kept = sum(min(KEPT_BYTES, size * job.share * each) for size in (neurons, heads)) if numbers else 0
        left = job.decided.target.widths
        stay = max(left.intermediate_size, left.moe_intermediate_size), left.num_attention_heads * left.head_dim
        gram = max(_moments_bytes(k, channels) for k in stay)
        if widths.num_experts:
            gram = max(gram, min(GRAM_BYTES, widths.num_experts * gram))
        product = 12 * min(PRODUCT_ELEMENTS, read**2)
        copies = each * experts * channels * min(BATCH_TOKENS, job.share)  # of what readers make
        phases.append((pruned + 3 * dense + kept, layer + max(batch + copies, product) + gram))
    return phases


def _moments_bytes(kept: int, outputs: int) -> int:
    """What a reader's moments take, with what is solved in their place."""
    return 8 * kept * (2 * kept + 2 * outputs)


def disk_bytes(job: Job, tensors: tuple[TensorEntry, ...], size_bytes: int | None) -> int:
    """Bytes of the folder that is written.

    Args:
        tensors: that go into it, but for those around a language model.
        size_bytes: of all tensors, where it is known better.
    """
    subject = job.decided.subject
    entries = (*tensors, *subject.surroundings)
    weights = sum(entry.size_bytes for entry in entries) if size_bytes is None else size_bytes
    headers = header_bytes(entries, parse_size(job.request.delivery.max_shard_size))
    beside = sum(path.stat().st_size for path in companions_of(subject.checkpoint))
    return weights + headers + beside + SMALL_FILES


def _keeps_states(job: Job) -> bool:
    """Whether anything is worth keeping what the unpruned model makes of the text."""
    return job.calibrates and (job.measures or job.repairs)


def temporary_bytes(job: Job) -> int:
    """Bytes of files that the run makes for itself: hidden states of the unpruned model, and refitted weights."""
    if not _keeps_states(job):
        return 0
    channels, trace = job.model.widths.hidden_size, job.decided.subject.trace
    found = 0 if job.fills_memory else job.kept_bytes
    if job.request.choice.settled.refit != "none":
        templates = {binding.template for binding in trace.readers}
        found += sum(e.size_bytes for e in job.model.checkpoint.entries if split_name(e.name)[0] in templates)
        found += (4 + stream_dtype(job.model).itemsize) * job.windows.fitted * job.windows.length * channels
    return found
