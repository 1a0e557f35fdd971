"""Export to ONNX: one graph for reading a prompt and for going on with it token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmprune_cli.errors import UnsupportedError, VerificationError, first_line
from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.folder.documents import read_json, write_json
from llmprune_cli.formats.graphs import (
    CACHED_KINDS,
    EXAMPLE,
    example_past,
    fit_graph,
    layer_kinds,
    load_traceable,
    traced_quietly,
    with_cache,
    without_cache,
    write_beside,
)
from llmprune_cli.formats.registry import FLOAT_LIMITS, Continuation, ExportOptions, Fit, Format
from llmprune_cli.source.tokenizer import MOST_COMPANION_BYTES, load_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

FILE, WEIGHTS = "model.onnx", "model.onnx_data"  # by which names browsers fetch them
IN_JAVASCRIPT = {"dtype": "fp32", "use_external_data_format": True}  # which files those are, whatever is in them
PAST, PRESENT = "past_key_values", "present"
SPACED = "a , b . c ?"
BATCH, NEW = "batch_size", "sequence_length"  # axes by the names that transformers.js knows them by


def fit_onnx(config: PretrainedConfig) -> Fit:
    """Whether a graph holds a model, and if so, whether its cache as well."""
    if all(kind in CACHED_KINDS for kind in layer_kinds(config)) or not fit_graph(config).loads:
        return fit_graph(config)
    return Fit(loads=True, note=f"with --no-kv-cache: {config.model_type} keeps more than keys and values")


def write_onnx(
    checkpoint: Checkpoint, folder: Path, options: ExportOptions, progress: Callable[[int], None]
) -> dict[str, str]:
    """Write the graph, its weights beside it in a file of their own.

    With a cache its inputs are `input_ids` [B, T], `attention_mask` [B, cached + T], `position_ids` [B, T] and
    `past_key_values.N.key` and `.value` [B, K, cached, P] for each layer N, its outputs `logits` [B, T, V] and
    `present.N.key` and `.value`; `cached` is 0 for a new prompt. Without one, `input_ids` and `logits`.

    Raises:
        UnsupportedError: the model has no such graph, or a package is missing.
    """
    try:
        import onnx  # noqa: F401
        import onnx_ir
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(f"Writing ONNX needs more packages: pip install 'llmprune[onnx]' ({error}).") from error
    model = load_traceable(checkpoint, options.dtype)
    graph, example, names, sizes = _cached(model) if options.kv_cache else _plain(model)
    with traced_quietly(checkpoint):
        program: Any = torch.onnx.export(
            graph,
            example,
            dynamo=True,
            dynamic_shapes=sizes,
            input_names=names,
            output_names=["logits", *(name.replace(PAST, PRESENT) for name in names if name.startswith(PAST))],
            external_data=True,
            verbose=False,
        )
    onnx_ir.save(program.model, folder / FILE, external_data=WEIGHTS)
    write_beside(checkpoint, model, folder)
    if options.kv_cache:  # without one, transformers.js goes on from the newest token alone
        _prepare_for_javascript(checkpoint, folder)
    progress(checkpoint.size_bytes)
    return {}


Graph = tuple["torch.nn.Module", tuple[Any, ...], list[str], dict[str, Any]]  # module, example, inputs, dynamic axes


def _plain(model: PreTrainedModel) -> Graph:
    sequences, _, tokens = EXAMPLE
    example = (torch.zeros(sequences, tokens, dtype=torch.long),)
    return without_cache(model), example, ["input_ids"], {"input_ids": {0: BATCH, 1: NEW}}


def _cached(model: PreTrainedModel) -> Graph:
    sequences, cached, tokens = EXAMPLE
    past = example_past(model)
    ids = torch.zeros(sequences, tokens, dtype=torch.long)
    mask = torch.ones(sequences, cached + tokens, dtype=torch.long)
    positions = torch.arange(cached, cached + tokens).expand(sequences, tokens)
    names = [f"{PAST}.{layer}.{part}" for layer, part in product(range(len(past)), ("key", "value"))]
    sizes = {
        "input_ids": {0: BATCH, 1: NEW},
        "attention_mask": {0: BATCH, 1: "total_sequence_length"},
        "position_ids": {0: BATCH, 1: NEW},
        "past": [({0: BATCH, 2: "past_sequence_length"},) * 2] * len(past),
    }
    inputs = ["input_ids", "attention_mask", "position_ids", *names]
    return with_cache(model), (ids, mask, positions, past), inputs, sizes


def _prepare_for_javascript(checkpoint: Checkpoint, folder: Path) -> None:
    """Say in `config.json` which files are there, and in `tokenizer_config.json` what transformers knows without it.

    transformers.js takes out spaces before punctuation unless it is told not to. Its pipeline puts no start token
    before a text unless it is told to. It looks for chat templates nowhere else, and reads no tokenizer but
    `tokenizer.json`.
    """
    try:
        tokenizer = load_tokenizer(checkpoint)
        ids, bare = tokenizer(SPACED)["input_ids"], tokenizer(SPACED, add_special_tokens=False)["input_ids"]
    except Exception:  # tokenizers of every kind raise every kind, and a graph needs none
        return
    if not (folder / "tokenizer.json").is_file():
        if not tokenizer.is_fast:
            return
        tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    config = folder / "config.json"
    write_json(config, read_json(config) | {"transformers.js_config": IN_JAVASCRIPT})
    path = folder / "tokenizer_config.json"
    said = read_json(path, MOST_COMPANION_BYTES) if path.is_file() else {}
    cleans = tokenizer.decode(bare) != tokenizer.decode(bare, clean_up_tokenization_spaces=False)
    said["clean_up_tokenization_spaces"] = cleans
    templates = tokenizer.chat_template
    if templates:
        several = isinstance(templates, dict)
        named = [{"name": name, "template": own} for name, own in templates.items()] if several else templates
        said["chat_template"] = named
    if tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]:
        said["add_bos_token"] = True
    write_json(path, said)


class OnnxModel:
    """A session of ONNX Runtime."""

    def __init__(self, session: Any) -> None:
        """Run a session whose graph is one of `write_onnx`."""
        self.session = session
        self.inputs = {given.name: given for given in session.get_inputs()}

    def run(self, ids: torch.Tensor, past: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
        """Logits [B, T, V] of token ids [B, T] behind a cache, and the longer cache."""
        import numpy

        cached = next(iter(past.values())).shape[2] if past else 0
        positions = numpy.arange(cached, cached + ids.shape[1])[None].repeat(len(ids), 0)
        given = {"input_ids": ids.numpy(), "attention_mask": numpy.ones((len(ids), cached + ids.shape[1]), "int64")}
        given |= {"position_ids": positions, **past}
        logits, *present = self.session.run(None, {name: given[name] for name in self.inputs})
        return torch.from_numpy(logits).float(), dict(zip(past, present, strict=True))

    def empty_past(self, sequences: int = 1) -> dict[str, Any]:
        """The cache before the first token, by the names of its inputs; empty where the graph has none."""
        import numpy

        kinds = {"tensor(float)": "float32", "tensor(float16)": "float16"}
        return {
            name: numpy.zeros((sequences, given.shape[1], 0, given.shape[3]), kinds[given.type])
            for name, given in self.inputs.items()
            if name.startswith(PAST)
        }

    def continue_greedily(self, prompt: torch.Tensor, tokens: int) -> Continuation:
        """Go on with a prompt, with the cache where there is one."""
        past, ids = self.empty_past(), prompt
        log_probs: list[torch.Tensor] = []
        for _ in range(tokens):
            logits, past = self.run((ids[-1:] if past and log_probs else ids)[None], past)
            log_probs.append(logits[0, -1].log_softmax(-1))
            ids = torch.cat([ids, log_probs[-1].argmax()[None]])
        return Continuation(ids[len(prompt) :], torch.stack(log_probs))


@contextmanager
def open_onnx(folder: Path) -> Iterator[OnnxModel]:
    """Load the graph in a folder on the CPU.

    Raises:
        VerificationError: ONNX Runtime does not load it.
    """
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3  # errors
    try:
        session = onnxruntime.InferenceSession(str(folder / FILE), settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # it raises kinds of its own
        raise VerificationError(
            f"ONNX Runtime does not load the export: {first_line(error)}. Nothing was kept."
        ) from error
    yield OnnxModel(session)


ONNX = Format(
    runs_in="ONNX Runtime",
    write=write_onnx,
    fit=fit_onnx,
    loading='`onnxruntime.InferenceSession("FILE")`: token ids and a key-value cache in, logits and the cache out.',
    file="*.onnx",
    package="onnxruntime",
    extra="onnx",
    runtime=open_onnx,
    limits=FLOAT_LIMITS,
)
