"""What a folder's `config.json` says, and what is refused in it before any library is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmprune_cli.errors import CheckpointError, PlanError, UnsupportedError
from llmprune_cli.folder.documents import is_there, read_json
from llmprune_cli.options import WidthRequest

MOST_BYTES = 2 * 2**20
ADAPTER_CONFIG = "adapter_config.json"
MERGE = "Merge it first (merge_and_unload of peft, then save_pretrained)"
# How the names of classes end that do something else than to go on with a text.
OTHER_PURPOSES = (
    *("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice"),
    "ForImageClassification",
)
OF_ENCODERS = ("ForMaskedLM", "ForNextSentencePrediction", "ForPreTraining")
# Encoders, of which transformers makes language models only where their configuration says `is_decoder`.
ENCODERS = (
    *(
        "bert",
        "roberta",
        "xlm-roberta",
        "xlm-roberta-xl",
        "camembert",
        "electra",
        "megatron-bert",
        "big_bird",
        "rembert",
    ),
    *("roformer", "ernie", "xmod", "data2vec-text", "roc_bert", "roberta-prelayernorm"),
)
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")  # what configurations call their number
# How they call the numbers of units that can be asked for, where all mean the same by that.
COUNTED = {
    **{width: (width,) for width in ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")},
    "num_experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "num_hidden_layers": LAYERS,
}
BESIDE_ANOTHER = ("decoder", "encoder", "num_decoder", "num_encoder")  # how settings begin where other names may count
MOST = {"layer": 2048, "expert": 8192}  # by how the names of settings end


def read_settings(folder: Path) -> dict[str, Any]:
    """What `config.json` says, of which no model is refused here that transformers would load.

    Raises:
        CheckpointError: there is none, or one with numbers that no model has.
        UnsupportedError: it is of a model that does not go on with a text.
    """
    path = folder / "config.json"
    if not path.exists():
        refuse_without_config(folder)
    settings = read_json(path, MOST_BYTES)
    check_counts(path, settings)
    check_purpose(path, settings)
    return settings


def refuse_without_config(folder: Path) -> None:
    """Say what a folder without `config.json` is.

    Raises:
        CheckpointError: always.
    """
    if adapter := describe_adapter(folder):
        raise CheckpointError(f"{folder} holds {adapter} and no model. {MERGE} and give the merged model.")
    if ggufs := sorted(path.name for path in folder.glob("*.gguf")):
        raise CheckpointError(f"{folder} has no config.json, but GGUF files. Give one of them: {folder / ggufs[0]}")
    raise CheckpointError(f"{folder} has no config.json, so it is not a model folder. Check the path of the model.")


def describe_adapter(folder: Path) -> str:
    """What adapter of peft lies in a folder, in words; empty where none does.

    Raises:
        CheckpointError: its configuration cannot be read.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        return ""
    settings = read_json(path, MOST_BYTES)
    base = settings.get("base_model_name_or_path")
    return f"a {settings.get('peft_type', 'PEFT')} adapter{f' of {base}' if base else ''} ({ADAPTER_CONFIG})"


def check_purpose(path: Path, settings: dict[str, Any]) -> None:
    """Refuse models that do not go on with a text.

    Raises:
        UnsupportedError: see above.
    """
    named = settings.get("architectures")
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    kind = settings.get("model_type")
    what = names[0] if names else f"{kind} model"
    is_encoder = kind in ENCODERS and not settings.get("is_decoder")
    if is_encoder or any(name.endswith(OF_ENCODERS) for name in names):
        raise UnsupportedError(
            f"{path} describes a {what}, an encoder and no causal language model. llmprune prunes models that go on "
            "with a text, such as Llama, Qwen or Mistral."
        )
    for name in names:
        if name.endswith(OTHER_PURPOSES):
            raise UnsupportedError(
                f"{path} describes a {name}, which is no causal language model. Give the language model that it was "
                "made from."
            )
    is_decoder = any(name.endswith("ForCausalLM") for name in names)
    if settings.get("is_encoder_decoder") is True and "text_config" not in settings and not is_decoder:
        raise UnsupportedError(
            f"{path} describes a {what}, whose decoder reads what an encoder made. llmprune prunes models that go on "
            "with a text alone; a decoder that does is saved as its ForCausalLM class."
        )


def check_counts(path: Path, settings: dict[str, Any]) -> None:
    """Refuse numbers of layers and experts that no model has: each of them takes time before any tensor is looked at.

    Raises:
        CheckpointError: see above.
    """
    for name, value in settings.items():
        if isinstance(value, dict):
            check_counts(path, value)
        for word, most in MOST.items():
            if name.rstrip("s").endswith(word) and isinstance(value, int) and value > most:
                raise CheckpointError(f"{path}: {name} is {value:,}, and models have at most {most:,}.")


def check_widths(model: str, widths: WidthRequest) -> None:
    """Refuse layers that a folder's configuration says there are none of, and more units than it says there are.

    Raises:
        PlanError: see above.
    """
    path = Path(model) / "config.json"
    settings = read_json(path, MOST_BYTES) if is_there(path) else {}
    whole = next((settings[name] for name in LAYERS if isinstance(settings.get(name), int)), None)
    if whole is not None and whole > 0:
        widths.check_layer_numbers(whole)
    if any(name.startswith(BESIDE_ANOTHER) for name in settings):
        return
    for width, names in COUNTED.items():
        asked = getattr(widths, width)
        most = next((settings[name] for name in names if isinstance(settings.get(name), int)), None)
        if asked is not None and most is not None and asked > most:
            raise PlanError(f"{width} = {asked} is not possible: the model has {most}. Legal values: 1 to {most}.")


def vocabulary_of(model: str) -> int | None:
    """The tokens that a folder's configuration says the model knows, if it does."""
    path = Path(model) / "config.json"
    settings = read_json(path, MOST_BYTES) if is_there(path) else {}
    own = settings["text_config"] if isinstance(settings.get("text_config"), dict) else settings
    rows = own.get("vocab_size")
    return rows if isinstance(rows, int) else None
