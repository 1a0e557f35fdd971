"""What users do wrong: one clear message on stderr, the documented exit code, nothing written and nothing changed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import BY_MAGNITUDE, Run, run_cli
from llmprune_cli.errors import CheckpointError

USAGE, CHECKPOINT, UNSUPPORTED, PLAN, OUTPUT, VERIFICATION, MEMORY, INTERRUPTED = 2, 3, 4, 5, 6, 7, 9, 130


def state_of(folder: Path) -> dict[str, str]:
    """Every path below a folder, with a digest of the files."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def assert_refused(run: Run, code: int, *words: str) -> None:
    assert run.code == code, run.stderr
    assert run.stdout == ""
    assert "Traceback" not in run.stderr
    for word in words:
        assert word in run.stderr, run.stderr


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama that a test may damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def assert_prune_refused(model: Path, tmp_path: Path, code: int, *words: str, options: tuple[str, ...] = ()) -> None:
    before = state_of(tmp_path)
    run = run_cli("prune", model, *BY_MAGNITUDE, *(options or ("--pruning-ratio", "0.5")), "--output", tmp_path / "out")
    assert_refused(run, code, *words)
    assert state_of(tmp_path) == before


# --- the model -----------------------------------------------------------------------------------------------------


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


TOKENS = ("--calibration-tokens", "240", "--calibration-seq-len", "40")
NEURONS = ("--intermediate-size", "24")
CALIBRATED = (*TOKENS, *NEURONS)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("model.embed_tokens.weight", 3e37, "The embedding turns text into NaN"),
        ("model.layers.1.self_attn.v_proj.weight", float("inf"), "Layer 1"),
        ("model.layers.1.mlp.down_proj.weight", float("nan"), "Layer 1"),
        ("model.layers.1.mlp.down_proj.weight", 3e37, "Layer 1"),
        ("model.norm.weight", float("inf"), "The final norm or the output projection"),
        ("lm_head.weight", float("nan"), "The final norm or the output projection"),
    ],
)
def test_weights_that_are_no_numbers(
    model: Path, text_file: Path, tmp_path: Path, name: str, value: float, said: str
) -> None:
    damage(model, name, value)
    run = run_cli("prune", model, *CALIBRATED, "--calibration", text_file, "--output", tmp_path / "out")
    assert_refused(run, CHECKPOINT, said, "damaged")
    assert not (tmp_path / "out").exists()


def with_a_neuron_beyond_float32(model: Path) -> None:
    """Weights that are numbers, as is what their layer makes of text; but in between the squares are too large."""
    damage(model, "model.layers.1.mlp.up_proj.weight", 1e23, last_axis=False)
    damage(model, "model.layers.1.mlp.down_proj.weight", 1e-24)


@pytest.mark.parametrize("importance", ["range", "activation", "consensus"])
def test_no_importance_swallows_infinity(model: Path, text_file: Path, tmp_path: Path, importance: str) -> None:
    with_a_neuron_beyond_float32(model)
    ways = ("--importance", importance, "--refit", "none", "--calibration", text_file)
    run = run_cli("prune", model, *CALIBRATED, *ways, "--output", tmp_path / "out")
    assert_refused(run, CHECKPOINT, "The scores by", "damaged")


@pytest.mark.parametrize("refit", ["local", "residual"])
def test_no_refit_swallows_infinity(model: Path, text_file: Path, tmp_path: Path, refit: str) -> None:
    with_a_neuron_beyond_float32(model)
    ways = ("--importance", "random", "--refit", refit, "--calibration", text_file)
    run = run_cli("prune", model, *CALIBRATED, *ways, "--output", tmp_path / "out")
    assert_refused(run, CHECKPOINT, "model.layers.1.mlp.down_proj.weight reads is too large for float32")


@pytest.mark.parametrize("refit", ["local", "residual"])
def test_solved_weights_that_their_dtype_cannot_hold(
    make_tiny: Callable[..., Path], text_file: Path, tmp_path: Path, refit: str
) -> None:
    """Neurons twice, so that one of each pair has to do the work of both, with weights beyond 65,504."""
    from safetensors.torch import load_file, save_file

    model = make_tiny(dtype="float16", shard="10MB")
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if "up_proj" in name or "gate_proj" in name:
            tensor[24:] = tensor[:24]
        elif "down_proj" in name:
            tensor.copy_(tensor.sign() * 6e4)[:, 24:] = tensor[:, :24].sign() * 6e4
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    ways = ("--importance", "range", "--refit", refit, "--calibration", text_file)
    run = run_cli("prune", model, *CALIBRATED, *ways, "--output", tmp_path / "out")
    assert_refused(run, VERIFICATION, "model.layers.0.mlp.down_proj.weight would be written", "as float16")


@pytest.mark.parametrize(
    "ways",
    [
        ("--importance", "range", *NEURONS),
        ("--importance", "taylor", *NEURONS),
        ("--importance", "random", "--refit", "local", *NEURONS),
        ("--importance", "random", "--refit", "none", "--layers", "1", "--layer-importance", "loss"),
        ("--rotate", "--hidden-size", "32", "--refit", "none"),
    ],
    ids=["activity", "gradients", "refit", "leaving out layers", "rotation"],
)
def test_every_sweep_over_layers_stops_at_the_damaged_one(
    model: Path, text_file: Path, tmp_path: Path, ways: tuple[str, ...]
) -> None:
    damage(model, "model.layers.1.mlp.down_proj.weight", float("nan"))
    run = run_cli("prune", model, *TOKENS, *ways, "--calibration", text_file, "--output", tmp_path / "out")
    assert_refused(run, CHECKPOINT, "Layer 1 turns text into NaN", "damaged")


def test_a_search_stops_at_a_damaged_output_projection(model: Path, text_file: Path, tmp_path: Path) -> None:
    damage(model, "lm_head.weight", float("nan"))
    ways = ("--target-params", "80%", "--importance", "range", "--calibration", text_file)
    run = run_cli("prune", model, *TOKENS, *ways, "--output", tmp_path / "out")
    assert_refused(run, CHECKPOINT, "The final norm or the output projection", "damaged")


def test_weights_that_are_all_zero_are_no_damage(model: Path, tmp_path: Path) -> None:
    for projection in ("gate_proj", "up_proj", "down_proj"):
        damage(model, f"model.layers.1.mlp.{projection}.weight", 0.0, everywhere=True)
    run = run_cli("prune", model, *BY_MAGNITUDE, *NEURONS, "--output", tmp_path / "out")
    assert run.code == 0, run.stderr


def test_scores_that_are_no_numbers_choose_nothing(model: Path, tmp_path: Path) -> None:
    damage(model, "model.layers.1.mlp.gate_proj.weight", float("nan"))
    assert_prune_refused(model, tmp_path, CHECKPOINT, "The scores by hidden_size are NaN", "damaged")
    cut = ("--intermediate-size", "24")
    assert_prune_refused(model, tmp_path, CHECKPOINT, "intermediate_size of layer 1", "damaged", options=cut)


def damage(model: Path, name: str, value: float, last_axis: bool = True, everywhere: bool = False) -> None:
    """Put a value into one element of a vector, into one column or row of a matrix, or everywhere."""
    from safetensors.torch import load_file, save_file

    for shard in model.glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            tensors[name][... if everywhere else (..., 0) if last_axis else 0] = value
            save_file(tensors, shard, metadata={"format": "pt"})
            return
    raise AssertionError(name)


@pytest.mark.parametrize("model_type", ["vit", "t5", "whisper", "no-such-model"])
def test_an_architecture_that_is_no_causal_lm(tmp_path: Path, model_type: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": model_type}))
    run = run_cli("inspect", tmp_path / "model")
    assert_refused(run, UNSUPPORTED, model_type)


def test_code_from_the_checkpoint_runs_on_request_only(model: Path, tmp_path: Path) -> None:
    def bring_code(config: dict[str, Any]) -> None:
        config.update(model_type="home-made", auto_map={"AutoConfig": "configuration_home.HomeConfig"})

    edit_json(model / "config.json", bring_code)
    (model / "configuration_home.py").write_text(f"import os; os.mkdir({str(tmp_path / 'owned')!r})")
    assert_prune_refused(model, tmp_path, UNSUPPORTED, "--trust-remote-code")


@pytest.mark.parametrize(
    "command",
    [
        ["eval", "--max-seq-len", "32", "--dataset"],
        ["prune", "--intermediate-size", "24", "--calibration-seq-len", "32", "--output", "out", "--calibration"],
        ["export", "--format", "torch-export", "--output", "out"],
    ],
    ids=lambda words: words[0],
)
def test_a_tokenizers_own_code_runs_on_request_only(
    command: list[str], model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    words = [*command[1:], *([text_file] if command[-1].startswith("--") else [])]
    run = run_cli(command[0], model, *words)
    assert "Traceback" not in run.stderr and not (tmp_path / "ran").exists()
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    run = run_cli(command[0], model, "--trust-remote-code", *words)
    assert run.code == 0, run.stderr
    assert (tmp_path / "ran").exists()


# --- the widths ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--num-attention-heads", "5"), ("Legal values: 2, 4, 6, 8",)),
        (("--num-attention-heads", "10"), ("1 to 8",)),
        (("--num-key-value-heads", "3"), ("1 to 2",)),
        (("--hidden-size", "65"), ("1 to 64",)),
        (("--intermediate-size", "1000"), ("1 to 48",)),
        (("--intermediate-pruning-ratio", "0.99"), ("intermediate_size",)),
        (("--pruning-ratio", "0.5", "--round-to", "100"), ("100",)),
    ],
)
def test_infeasible_widths_name_the_legal_ones(
    model: Path, tmp_path: Path, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    assert_prune_refused(model, tmp_path, PLAN, *words, options=options)


@pytest.mark.parametrize("ratio", ["-0.1", "1", "1.5", "nan", "inf", "half"])
@pytest.mark.parametrize("option", ["--pruning-ratio", "--head-pruning-ratio"])
def test_a_ratio_that_is_no_fraction(model: Path, tmp_path: Path, option: str, ratio: str) -> None:
    assert_prune_refused(model, tmp_path, USAGE, option, options=(option, ratio))


@pytest.mark.parametrize("option", ["--hidden-size", "--intermediate-size", "--num-attention-heads", "--round-to"])
def test_a_size_below_one(model: Path, tmp_path: Path, option: str) -> None:
    assert_prune_refused(model, tmp_path, USAGE, option, options=(option, "0"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["prune"],
        ["prune", "MODEL"],
        ["prune", "MODEL", "--pruning-ratio", "0.5"],
        ["prune", "MODEL", "--output", "out"],
        ["prune", "MODEL", "--pruning-ratio", "0.5", "--dry-run", "--eval"],
        ["prune", "MODEL", "--pruning-ratio", "0.5", "--plan", "plan.json", "--output", "out"],
        ["prune", "MODEL", "--pruning-ratio", "0.5", "--output", "out", "--importance", "vibes"],
        ["eval", "MODEL", "--device", "tpu"],
        ["eval", "MODEL", "--max-seq-len", "1"],
        ["eval", "MODEL", "--dtype", "int8"],
        ["export", "MODEL"],
        ["export", "MODEL", "--output", "out", "--format", "papyrus"],
        ["frobnicate"],
    ],
)
def test_wrong_usage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(run_cli(*arguments), USAGE)
    assert not list(tmp_path.iterdir())


def test_a_size_that_is_no_size(model: Path, tmp_path: Path) -> None:
    assert_prune_refused(model, tmp_path, PLAN, "5QB", options=("--pruning-ratio", "0.5", "--max-shard-size", "5QB"))


# --- plans ---------------------------------------------------------------------------------------------------------


def test_a_plan_made_for_another_model(model: Path, make_tiny: Callable[..., Path], tmp_path: Path) -> None:
    assert (
        run_cli("prune", model, *BY_MAGNITUDE, "--pruning-ratio", "0.5", "--save-plan", tmp_path / "plan.json").code
        == 0
    )
    other = make_tiny("llama", intermediate_size=56)
    assert_prune_refused(
        other, tmp_path, PLAN, "made for another model", options=("--plan", str(tmp_path / "plan.json"))
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan.pop("keep"),
        lambda plan: plan.update(plan_version=99),
        lambda plan: plan["keep"]["hidden_size"].update({"": [0, 1]}),
        lambda plan: plan["keep"]["hidden_size"].update({"": list(range(40, 72))}),
        lambda plan: plan["keep"].pop("intermediate_size"),
        lambda plan: plan["keep"]["intermediate_size"].pop("1"),
        lambda plan: plan["after"].update(hidden_size="wide"),
        lambda plan: plan.update(surprise=1),
    ],
)
def test_a_plan_that_contradicts_itself(
    model: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    path = tmp_path / "plan.json"
    assert run_cli("prune", model, *BY_MAGNITUDE, "--pruning-ratio", "0.5", "--save-plan", path).code == 0
    edit_json(path, change)
    before = state_of(tmp_path)
    run = run_cli("prune", model, *BY_MAGNITUDE, "--plan", path, "--output", tmp_path / "out")
    assert run.code in (CHECKPOINT, PLAN), run.stderr
    assert "Error: " in run.stderr and state_of(tmp_path) == before


def test_a_plan_that_cannot_be_saved(model: Path, tmp_path: Path) -> None:
    path = str(model / "config.json" / "plan.json")
    assert_prune_refused(
        model, tmp_path, OUTPUT, "--save-plan", options=("--pruning-ratio", "0.5", "--save-plan", path)
    )


# --- the output ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", [["prune", *BY_MAGNITUDE, "--pruning-ratio", "0.5"], ["export"]], ids=lambda words: words[0]
)
@pytest.mark.parametrize("place", [".", "inside", ".."])
def test_an_output_that_overlaps_the_input(model: Path, tmp_path: Path, command: list[str], place: str) -> None:
    before = state_of(tmp_path)
    run = run_cli(command[0], model, *command[1:], "--output", model / place, "--overwrite")
    assert_refused(run, OUTPUT, "overlap")
    assert state_of(tmp_path) == before


def test_an_output_that_holds_something(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    assert_prune_refused(model, tmp_path, OUTPUT, "not empty")
    assert_prune_refused(
        model, tmp_path, OUTPUT, "not a model folder", options=("--pruning-ratio", "0.5", "--overwrite")
    )


def test_an_output_that_is_a_file(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    assert_prune_refused(model, tmp_path, OUTPUT, "is not a folder")


def test_overwrite_replaces_a_model_folder(model: Path, tmp_path: Path) -> None:
    options = ["--intermediate-size", "24", "--output", tmp_path / "out"]
    assert run_cli("prune", model, *BY_MAGNITUDE, *options).code == 0
    first = state_of(tmp_path / "out")
    assert_refused(run_cli("prune", model, *BY_MAGNITUDE, *options), OUTPUT, "--overwrite")
    assert run_cli("prune", model, *BY_MAGNITUDE, *options, "--overwrite").code == 0
    assert state_of(tmp_path / "out") == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_an_output_on_a_read_only_folder(model: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        if not Path("/proc/self").exists():
            pytest.skip("root can write everywhere on this system")
        target = Path("/proc/llmprune-out")
    else:
        target = tmp_path / "closed" / "out"
        target.parent.mkdir(mode=0o500)
    for command in (["prune", model, *BY_MAGNITUDE, "--pruning-ratio", "0.5"], ["export", model]):
        assert_refused(run_cli(*command, "--output", target), OUTPUT, "Cannot write")


# --- the text ------------------------------------------------------------------------------------------------------


def test_an_unknown_dataset(model: Path, tmp_path: Path) -> None:
    assert_refused(run_cli("eval", model, "--dataset", "no/such-dataset"), CHECKPOINT, "no/such-dataset")
    options = ("--pruning-ratio", "0.5", "--eval", "--dataset", "no/such-dataset")
    assert_prune_refused(model, tmp_path, CHECKPOINT, "no/such-dataset", options=options)


def test_a_text_shorter_than_one_window(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("too short")
    assert_refused(run_cli("eval", model, "--dataset", text), CHECKPOINT, "9 tokens", "--max-seq-len")
    options = ("--pruning-ratio", "0.5", "--eval", "--dataset", str(text))
    assert_prune_refused(model, tmp_path, CHECKPOINT, "9 tokens", options=options)


@pytest.mark.parametrize(("name", "content"), [("a.txt", b"\xff\xfe\xff"), ("a.parquet", b"no"), ("a.docx", b"PK")])
def test_a_text_that_cannot_be_read(model: Path, tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert_refused(run_cli("eval", model, "--dataset", tmp_path / name), CHECKPOINT, name)


def test_a_model_without_tokenizer(model: Path, text_file: Path) -> None:
    for path in model.glob("token*"):
        path.unlink()
    assert_refused(run_cli("eval", model, "--dataset", text_file), CHECKPOINT, "tokenizer")


# --- interruption --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 540 MB, all zeros, whose writing takes long enough to be interrupted."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from llmprune_cli.family.architecture import expected_index

    folder = tmp_path_factory.mktemp("large") / "model"
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=16,
        num_attention_heads=16,
        vocab_size=512,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in expected_index(config).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("interruption", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_an_interrupted_prune_leaves_nothing(large_model: Path, tmp_path: Path, interruption: str) -> None:
    command = [sys.executable, "-m", "llmprune_cli", "prune", large_model, *BY_MAGNITUDE, "--intermediate-size", "4090"]
    command += ["--importance", "random", "--output", tmp_path / "out"]
    child = subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells ignore it for what they run behind
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / ".out.llmprune-work" / "new" / "model.safetensors").exists():
        assert child.poll() is None and time.monotonic() < deadline, "no writing was seen"
        time.sleep(0.005)
    child.send_signal(getattr(signal, interruption))
    stdout, stderr = child.communicate(timeout=60)
    assert child.returncode == INTERRUPTED, stderr
    assert stdout == "" and "Traceback" not in stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such terminals")
def test_a_terminal_that_goes_away(large_model: Path, tmp_path: Path) -> None:
    import fcntl
    import pty
    import termios

    command = [sys.executable, "-m", "llmprune_cli", "prune", large_model, *BY_MAGNITUDE, "--intermediate-size", "4090"]
    command += ["--importance", "random", "--output", tmp_path / "out"]
    terminal, its_end = pty.openpty()
    child = subprocess.Popen(
        list(map(str, command)),
        stdin=its_end,
        stdout=its_end,
        stderr=its_end,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(its_end)
    os.set_blocking(terminal, False)
    deadline = time.monotonic() + 120
    while not (tmp_path / ".out.llmprune-work" / "new" / "model.safetensors").exists():
        assert child.poll() is None and time.monotonic() < deadline, "no writing was seen"
        with contextlib.suppress(BlockingIOError):
            os.read(terminal, 4096)
        time.sleep(0.005)
    os.close(terminal)
    assert child.wait(timeout=60) == INTERRUPTED
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error", ["torch.empty(2**50, dtype=torch.uint8)", "numpy.empty(2**50)", "cuda", "mapped", "refused"]
)
def test_memory_that_runs_out(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, error: str) -> None:
    import numpy
    import torch

    from llmprune_cli.commands import pipeline

    def exhaust(*_: object) -> None:
        shortage = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 16.00 GiB.")
        if error == "cuda":
            raise shortage
        if error == "mapped":
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        if error == "refused":
            raise CheckpointError("It cannot be loaded.") from shortage
        eval(error, {"torch": torch, "numpy": numpy})

    monkeypatch.setattr(pipeline, "inspect", exhaust)
    assert_refused(run_cli("inspect", tiny_llama), MEMORY, "Memory ran out: ", "--calibration-tokens")
