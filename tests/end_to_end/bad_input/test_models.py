"""Models that are missing, cut short or contradict themselves: one clear message, nothing written, nothing changed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from llmprune_cli.startup import model_argument
from support.cli import BY_MAGNITUDE, run_cli
from support.full import examples
from support.gguf_files import gguf_pair
from support.refusals import CHECKPOINT, UNSUPPORTED, assert_prune_refused, assert_refused, edit_json, state_of


@pytest.mark.parametrize("command", ["inspect", "prune", "eval", "export"])
def test_a_missing_path_is_named_by_every_command(tmp_path: Path, command: str) -> None:
    options = {
        "inspect": [],
        "prune": ["--pruning-ratio", "0.5", "--output", tmp_path / "out"],
        "eval": [],
        "export": ["--output", tmp_path / "out"],
    }[command]
    assert_refused(run_cli(command, tmp_path / "nowhere", *options), CHECKPOINT, "nowhere", "does not exist")
    assert not list(tmp_path.iterdir())


def test_a_missing_gguf_file_is_named(tmp_path: Path) -> None:
    assert_prune_refused(tmp_path / "nowhere.gguf", tmp_path, CHECKPOINT, "nowhere.gguf does not exist")


def test_a_file_that_only_claims_to_be_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"not really")
    assert_prune_refused(tmp_path / "model.gguf", tmp_path, CHECKPOINT, "is not a GGUF file")


def test_a_truncated_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03\x00\x00\x00\x05\x00\x00\x00")
    assert_prune_refused(tmp_path / "model.gguf", tmp_path, CHECKPOINT, "model.gguf")


@pytest.mark.parametrize("number", [1, 2])
def test_a_part_of_a_gguf_file_says_how_to_join_them(tmp_path: Path, number: int) -> None:
    gguf = pytest.importorskip("gguf")
    _, whole = gguf_pair(tmp_path, "qwen2")
    source = gguf.GGUFReader(whole)
    writer = gguf.GGUFWriter(None, "qwen2", split_max_tensors=8)
    for key, setting in source.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture" and len(setting.types) == 1:
            writer.add_key_value(key, setting.contents(), setting.types[0])
    for tensor in source.tensors:
        writer.add_tensor(tensor.name, tensor.data.copy(), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file(tmp_path / "parts.gguf")
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (part,) = tmp_path.glob(f"parts-0000{number}-of-*.gguf")
    assert_prune_refused(part, tmp_path, UNSUPPORTED, f"part {number} of", "llama-gguf-split --merge")


@pytest.mark.parametrize("name", ["LlamaForSequenceClassification", "BertForMaskedLM", "LlamaForTokenClassification"])
def test_a_model_for_another_purpose_is_called_by_its_name(model: Path, tmp_path: Path, name: str) -> None:
    edit_json(model / "config.json", lambda config: config.update(architectures=[name]))
    assert_prune_refused(model, tmp_path, UNSUPPORTED, name, "no causal language model")


@pytest.mark.parametrize("begin", [b"\n", b""], ids=["at once", "when it is read"])
@pytest.mark.parametrize("missing", [("sentencepiece",), ("google.protobuf",), ("sentencepiece", "google.protobuf")])
def test_a_tokenizer_that_needs_a_package_names_it_and_ends_the_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...], begin: bytes
) -> None:
    """Nothing is pruned by magnitude instead, which nobody asked for."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    (model / "tokenizer.model").write_bytes(begin + b"unreadable here")
    monkeypatch.setattr(model_argument, "find_spec", lambda name: None if name in missing else name)
    run = run_cli("prune", model, "--intermediate-size", "24", "--output", tmp_path / "out")
    assert_refused(run, UNSUPPORTED, "tokenizer.model", "pip install", missing[0].removeprefix("google."))
    assert not (tmp_path / "out").exists()


def test_a_file_instead_of_a_folder(model: Path, tmp_path: Path) -> None:
    assert_prune_refused(model / "config.json", tmp_path, CHECKPOINT, "neither a model folder nor a .gguf file")


def test_a_folder_without_config(model: Path, tmp_path: Path) -> None:
    (model / "config.json").unlink()
    assert_prune_refused(model, tmp_path, CHECKPOINT, "has no config.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "\udcff"])
def test_a_config_that_is_not_a_json_object(model: Path, tmp_path: Path, text: str) -> None:
    (model / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    assert_prune_refused(model, tmp_path, CHECKPOINT, "config.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", "wide"),
        ("hidden_size", 0),
        ("hidden_size", -64),
        ("num_attention_heads", 0),
        ("num_attention_heads", 7),
        ("num_key_value_heads", 3),
        ("num_hidden_layers", 0),
        ("intermediate_size", None),
        ("model_type", None),
    ],
)
def test_sizes_that_make_no_model(model: Path, tmp_path: Path, field: str, value: object) -> None:
    edit_json(model / "config.json", lambda config: config.update({field: value}))
    before = state_of(tmp_path)
    run = run_cli("prune", model, *BY_MAGNITUDE, "--pruning-ratio", "0.5", "--output", tmp_path / "out")
    assert run.code in (CHECKPOINT, UNSUPPORTED), run.stderr
    assert "Traceback" not in run.stderr and run.stderr.startswith("Error: ")
    assert state_of(tmp_path) == before


def test_a_config_without_weights_where_weights_are_needed(model: Path, tmp_path: Path) -> None:
    for shard in model.glob("*.safetensors*"):
        shard.unlink()
    assert_prune_refused(model, tmp_path, CHECKPOINT, "has no weights")
    assert_refused(run_cli("eval", model), CHECKPOINT, "has no weights")
    assert_refused(run_cli("export", model, "--output", tmp_path / "out"), CHECKPOINT, "has no weights")


def test_a_truncated_shard(model: Path, tmp_path: Path) -> None:
    shard = sorted(model.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    assert_prune_refused(model, tmp_path, CHECKPOINT, shard.name)
    assert_refused(run_cli("inspect", model), CHECKPOINT, shard.name)


def test_an_index_that_names_a_missing_shard(model: Path, tmp_path: Path) -> None:
    shard = sorted(model.glob("*.safetensors"))[-1]
    shard.unlink()
    assert_prune_refused(model, tmp_path, CHECKPOINT, shard.name, "missing")


def test_an_index_that_leaves_its_folder(model: Path, tmp_path: Path) -> None:
    index = model / "model.safetensors.index.json"
    edit_json(index, lambda document: document["weight_map"].update({"lm_head.weight": "../secret.safetensors"}))
    assert_prune_refused(model, tmp_path, CHECKPOINT, "outside its folder")


def test_shapes_that_contradict_the_config(model: Path, tmp_path: Path) -> None:
    edit_json(model / "config.json", lambda config: config.update(intermediate_size=52))
    assert_prune_refused(model, tmp_path, CHECKPOINT, "[48, 64]", "[52, 64]")


def test_fewer_layers_on_disk_than_in_the_config(model: Path, tmp_path: Path) -> None:
    edit_json(model / "config.json", lambda config: config.update(num_hidden_layers=3))
    assert_prune_refused(model, tmp_path, CHECKPOINT, "lacks", "layers.2.")


def test_a_pickle_that_would_run_code(model: Path, tmp_path: Path) -> None:
    import torch

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "owned"),)

    for shard in model.glob("*.safetensors*"):
        shard.unlink()
    torch.save({"weight": Evil()}, model / "pytorch_model.bin")
    assert_prune_refused(model, tmp_path, CHECKPOINT, "pytorch_model.bin")


@pytest.mark.parametrize("model_type", ["vit", "t5", "whisper", "no-such-model"])
def test_an_architecture_that_is_no_causal_lm(tmp_path: Path, model_type: str) -> None:
    (tmp_path / "model").mkdir()
    settings = {"model_type": model_type, "is_encoder_decoder": model_type in ("t5", "whisper")}
    (tmp_path / "model" / "config.json").write_text(json.dumps(settings))
    run = run_cli("inspect", tmp_path / "model")
    assert_refused(run, UNSUPPORTED, model_type)


@pytest.mark.parametrize(("model_type", "within"), [("mllama", "mllama_text_model"), ("mllama_text_model", "")])
def test_a_language_model_that_stands_not_alone(tmp_path: Path, model_type: str, within: str) -> None:
    (tmp_path / "model").mkdir()
    small = {"num_hidden_layers": 2, "vocab_size": 96, "hidden_size": 64, "num_attention_heads": 8}
    settings = {"text_config": {"model_type": within, **small}} if within else small
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": model_type, **settings}))
    run = run_cli("inspect", tmp_path / "model")
    words = [f"within {model_type} does not stand alone"] if within else []
    assert_refused(run, UNSUPPORTED, *words, "AutoModelForCausalLM builds no mllama_text_model", "of another family")


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("bart", "BartForConditionalGeneration"),
        ("whisper", "WhisperForConditionalGeneration"),
        ("marian", "MarianMTModel"),
    ],
)
def test_a_decoder_beside_its_encoder(tmp_path: Path, family: str, name: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(family, architectures=[name])
    config.save_pretrained(tmp_path / "model")
    assert_refused(run_cli("inspect", tmp_path / "model"), UNSUPPORTED, name, "an encoder made", "ForCausalLM")


def test_code_from_the_checkpoint_runs_on_request_only(model: Path, tmp_path: Path) -> None:
    def bring_code(config: dict[str, Any]) -> None:
        config.update(model_type="home-made", auto_map={"AutoConfig": "configuration_home.HomeConfig"})

    edit_json(model / "config.json", bring_code)
    (model / "configuration_home.py").write_text(f"import os; os.mkdir({str(tmp_path / 'owned')!r})")
    assert_prune_refused(model, tmp_path, UNSUPPORTED, "--trust-remote-code")


TOKENIZING = {
    "eval": ["--max-seq-len", "32", "--dataset"],
    "prune": ["--intermediate-size", "24", "--calibration-seq-len", "32", "--output", "out", "--calibration"],
    "export": ["--format", "torch-export", "--output", "out"],
}


@pytest.mark.parametrize("command", examples(TOKENIZING, ["eval", "prune"]))
def test_a_tokenizers_own_code_runs_on_request_only(
    command: str, model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (model / "tokenization_home.py").write_text(
        "from pathlib import Path\nfrom transformers import PreTrainedTokenizerFast\n\n\n"
        "class HomeTokenizer(PreTrainedTokenizerFast):\n    def __init__(self, *args, **options):\n"
        f"        Path({str(tmp_path / 'ran')!r}).touch()\n        super().__init__(*args, **options)\n"
    )
    brought = {"AutoTokenizer": [None, "tokenization_home.HomeTokenizer"]}
    edit_json(
        model / "tokenizer_config.json", lambda config: config.update(tokenizer_class="HomeTokenizer", auto_map=brought)
    )
    words = [*TOKENIZING[command], *([text_file] if command != "export" else [])]
    run = run_cli(command, model, *words)
    assert "Traceback" not in run.stderr and not (tmp_path / "ran").exists()
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    run = run_cli(command, model, "--trust-remote-code", *words)
    assert run.code == 0, run.stderr
    assert (tmp_path / "ran").exists()
