"""Which stock software takes a model, known from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmprune_cli.family.widths import read_widths
from llmprune_cli.formats.gguf.blocks.mixes import unpacked
from llmprune_cli.formats.gguf.families import FAMILIES, rope_of, sliding_layers
from llmprune_cli.formats.registry import FORMATS, Fit, load_format

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Families whose classes there take the hidden size for query heads × head dim.
FULL_WIDTH_IN_CTRANSLATE2 = ("llama", "qwen2")
SCALED_IN_CTRANSLATE2 = {  # kinds of RoPE scaling that it has in families that may have others
    **dict.fromkeys(("mistral", "qwen2", "qwen3"), ("default", "linear")),
    "llama": ("default", "linear", "llama3"),
}
WINDOWED_IN_CTRANSLATE2 = ("mistral", "qwen2", "qwen3")
BASE_OF_GEMMA = 10_000  # of RoPE, whatever the configuration says
FULL_WIDTH_IN_MLX = (
    *("apertus", "cohere", "gpt_neox", "granite", "granitemoe", "granitemoehybrid", "internlm3", "jamba", "lfm2"),
    *("lfm2_moe", "minicpm", "mixtral", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "stablelm", "starcoder2"),
)
FOUR_TIMES_IN_MLX = ("gpt2", "gpt_neox")  # families whose MLPs it builds as four times the hidden size
WITHOUT_WINDOWS_IN_MLX = ("mistral", "mixtral", "phi3", "gemma2")  # families whose windows it does not have
FULL_WIDTH_IN_MISTRALRS = (
    *("granitemoehybrid", "lfm2", "lfm2_moe", "llama", "mixtral", "phi3", "qwen2", "smollm3", "starcoder2"),
)
SCALED_IN_MISTRALRS = {  # kinds of RoPE scaling; it refuses others
    **dict.fromkeys(("llama", "smollm3"), ("default", "linear", "llama3")),
    "mistral": ("default", "yarn"),
}
UNSCALED_IN_MISTRALRS = (  # families whose RoPE scaling it never reads
    *("gemma", "gemma2", "glm4", "lfm2", "mixtral", "qwen2", "qwen3", "qwen3_moe", "starcoder2"),
)
# Fields that say whether a family has biases, where it leaves these out.
BIASES_MISTRALRS_LACKS = {
    **dict.fromkeys(("llama", "smollm3"), ("attention_bias", "mlp_bias")),
    **dict.fromkeys(("qwen3", "qwen3_moe"), ("attention_bias",)),
}
FULL_WIDTH_IN_VLLM = ("qwen2", "qwen2_moe", "granitemoe", "internlm2", "minicpm", "jamba")
CAPPED_IN_OPENVINO = (  # families that optimum-intel exports with transformers before 5.5 alone
    *("bitnet", "dbrx", "deepseek_v2", "deepseek_v3", "exaone4", "falcon_mamba", "gemma", "gemma2", "gemma3_text"),
    *("glm", "lfm2", "lfm2_moe", "llama4_text", "mamba", "minicpm3", "qwen3_5_moe_text", "qwen3_5_text"),
    *("qwen3_next", "zamba2"),
)
NO_HEADS_IN_VLLM = (16, 40)  # head dims that its attention on a CPU lacks
EXPERT_STEP = 32  # what the hidden size of experts has to be a multiple of there; in GPT-OSS their own width, too
ROUTED_IN_VLLM = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 320, 384, 448, 512, 576)  # experts, by its CUDA routers
ROUTED_SO_ALONE = ("deepseek_v4",)  # families whose router there has no second way (vllm-project/vllm#50982)
NF4_INPUTS = 64  # what bitsandbytes packs inputs by on processors with AVX-512 (outputs by 32); others take any number
GROUP = 128  # inputs of a matrix that share a scale where nobody asks for another number
MODELS_OF_TRANSFORMERS = 'model_impl="transformers" loads it'


@dataclass(frozen=True)
class RuntimeFit:
    """What is known of a model in one runtime."""

    runtime: str
    loads: bool
    note: str  # why not, or in which form


LLAMACPP = "llama.cpp"
UNWRITTEN = "llama.cpp, without --converter"  # what is said of families that llama.cpp may well have
QUANTIZED_GGUF = "GGUF types of 8 bits and less"


def runtime_fits(config: PretrainedConfig) -> tuple[RuntimeFit, ...]:
    """The runtimes of all export formats, and others where they are known to stumble over this model."""
    forms = [load_format(name) for name in FORMATS]
    renamed = {} if config.model_type in FAMILIES else {LLAMACPP: UNWRITTEN}
    found = {renamed.get(form.runs_in, form.runs_in): form.fit(config) for form in forms}
    is_packed = LLAMACPP in found and found[LLAMACPP].loads
    others = {
        "vLLM": _fit_vllm(config),
        "CTranslate2": _fit_ctranslate2(config),
        "OpenVINO": _fit_openvino(config),
        "mlx-lm": _fit_mlx(config),
        "mistral.rs": _fit_mistralrs(config),
        QUANTIZED_GGUF: Fit(loads=True, note=unpacked(config) if is_packed else ""),
        "bitsandbytes NF4 on AVX-512": _fit_nf4(config),
        "bitsandbytes, torchao, quanto": _fit_quantizers(config),
        "4 bits in groups of 128": _fit_groups(config),
    }
    found |= {name: fit for name, fit in others.items() if fit.note}
    return tuple(RuntimeFit(name, fit.loads, fit.note) for name, fit in found.items())


def _narrow(config: PretrainedConfig) -> str:
    """How query heads and head dim miss the hidden size; empty where they do not."""
    heads, hidden = getattr(config, "num_attention_heads", None), config.hidden_size
    head_dim = getattr(config, "head_dim", None) or (hidden // heads if heads else None)
    if not isinstance(heads, int) or not isinstance(head_dim, int) or heads * head_dim == hidden:
        return ""
    return f"{heads} query heads × {head_dim} is not the hidden size {hidden}"


def _fit_vllm(config: PretrainedConfig) -> Fit:
    """What vLLM 0.32 refuses on a CPU, as seen or, for half of the families, as read in its source."""
    settings = config.to_dict()
    hidden, neurons = settings.get("hidden_size") or 0, settings.get("intermediate_size") or 0
    experts = read_widths(config).num_experts
    if config.model_type in FULL_WIDTH_IN_VLLM and _narrow(config):
        return Fit(False, f"fails: {_narrow(config)}; {MODELS_OF_TRANSFORMERS}")
    if config.model_type == "falcon" and settings.get("ffn_hidden_size") not in (None, 4 * hidden):
        return Fit(False, f"fails: {settings['ffn_hidden_size']} neurons are not 4 × {hidden}")
    if config.model_type in ("gpt_neox", "lfm2"):
        return Fit(False, "gives other numbers for this family on a CPU, pruned or not")
    if config.model_type == "deepseek_v3" and _rope_type(config) == "default":
        return Fit(False, "run eagerly on a CPU, it gives other numbers without YaRN, pruned or not")
    if experts and hidden % EXPERT_STEP:
        return Fit(False, f"has no kernel for experts with a hidden size of {hidden}, no multiple of {EXPERT_STEP}")
    if config.model_type == "gpt_oss" and neurons % EXPERT_STEP:
        return Fit(False, f"has no kernel for experts of {neurons} neurons, no multiple of {EXPERT_STEP}")
    if settings.get("head_dim") in NO_HEADS_IN_VLLM:
        return Fit(False, f"has no attention for a head dim of {settings['head_dim']} on a CPU")
    return _routed(config.model_type, experts)


def _rope_type(config: PretrainedConfig) -> str:
    return str((getattr(config, "rope_parameters", None) or {}).get("rope_type", "default"))


def _routed(family: str, experts: int) -> Fit:
    """Whether CUDA kernels of vLLM (its `csrc/moe`: `topk_softmax`, `topk_softplus_sqrt`) route to so many experts."""
    if not experts or experts in ROUTED_IN_VLLM:
        return Fit(loads=True)
    near = " or ".join(str(count) for count in _around(experts))
    if family in ROUTED_SO_ALONE:
        return Fit(False, f"has no router for {experts} experts on CUDA; it has one for {near}")
    return Fit(loads=True, note=f"on CUDA it routes to {near} experts faster than to {experts}")


def _around(experts: int) -> tuple[int, ...]:
    """The numbers next to this one, below and above, that have kernels of their own."""
    below = [count for count in ROUTED_IN_VLLM if count < experts]
    above = [count for count in ROUTED_IN_VLLM if count > experts]
    return (*below[-1:], *above[:1])


def _fit_ctranslate2(config: PretrainedConfig) -> Fit:
    """What CTranslate2 4.8 was seen to get wrong."""
    if config.model_type == "gemma2":
        return Fit(False, "gives other tokens for this family, pruned or not")
    if config.model_type == "gemma3_text":
        return Fit(False, "fails for this family when a text is longer than its window, pruned or not")
    if config.model_type in ("gpt_neox", "phi", "phi3"):
        return Fit(False, "its converter fails on the configuration as transformers 5 has it, pruned or not")
    if config.model_type == "falcon" and config.new_decoder_architecture:
        return Fit(False, "its converter fails on this family's newer layers, pruned or not")
    rope = _rope_type(config)
    if config.model_type == "llama" and rope == "llama3":
        return Fit(False, "converts it and gives other numbers without a word: Llama 3.1's RoPE scaling, pruned or not")
    if rope not in SCALED_IN_CTRANSLATE2.get(config.model_type, (rope,)):
        return Fit(False, f"its converter fails on RoPE scaling of the kind {rope} in this family, pruned or not")
    is_own = rope == "default" and rope_of(config).get("rope_theta", BASE_OF_GEMMA) == BASE_OF_GEMMA
    if config.model_type == "gemma" and not is_own:
        return Fit(False, "takes RoPE to be Gemma's own and gives other numbers without a word, pruned or not")
    narrow = _narrow(config)
    if not narrow or config.model_type not in FULL_WIDTH_IN_CTRANSLATE2:
        return _windows_in_ctranslate2(config)
    if getattr(config, "num_key_value_heads", None) == config.num_attention_heads:
        return Fit(False, f"converts it and gives WRONG tokens without a word: {narrow}")
    return Fit(False, f"fails at run time: {narrow}")


def _windows_in_ctranslate2(config: PretrainedConfig) -> Fit:
    """How far its attention is right: beyond Mistral's window it fails or goes wrong, and Qwen's it does not have."""
    window = getattr(config, "sliding_window", None)
    is_seen = any(sliding_layers(config)) and window < config.max_position_embeddings
    if config.model_type not in WINDOWED_IN_CTRANSLATE2 or not is_seen:
        return Fit(loads=True)
    return Fit(loads=True, note=f"it is right within the sliding window of {window} tokens only")


def _fit_openvino(config: PretrainedConfig) -> Fit:
    """What OpenVINO 2026.4 does not get, as seen of Gemma 2 and read in its exporter's source."""
    if config.model_type in CAPPED_IN_OPENVINO:
        return Fit(False, "optimum-intel 2.2 takes this family with older versions of transformers alone")
    if config.model_type == "phi":
        return Fit(False, "optimum-intel 2.2 cannot trace this family, pruned or not")
    return Fit(loads=True)


def _fit_nf4(config: PretrainedConfig) -> Fit:
    """Whether products with packed 4-bit weights run, whose inputs and outputs neurons and channels both are."""
    neurons, hidden = getattr(config, "intermediate_size", None), getattr(config, "hidden_size", None)
    for what, size in (("neurons", neurons), ("hidden channels", hidden)):
        if isinstance(size, int) and size % NF4_INPUTS:
            return Fit(False, f"{size} {what} are no multiple of {NF4_INPUTS}; --round-to {NF4_INPUTS} gives one")
    return Fit(loads=True)


def _fit_quantizers(config: PretrainedConfig) -> Fit:
    """What they leave as it is: transformers 5 stacks experts, and they quantize Linear layers alone."""
    experts = read_widths(config).num_experts
    return Fit(loads=True, note="they leave its experts in 16 bits, without a word" if experts else "")


def _fit_groups(config: PretrainedConfig) -> Fit:
    """What becomes of Linear layers whose inputs groups do not divide; experts are told of beside it."""
    widths = read_widths(config)
    neurons = 0 if widths.num_experts else widths.intermediate_size
    odd = [str(inputs) for inputs in (widths.hidden_size, neurons) if inputs % GROUP]
    if not odd:
        return Fit(loads=True)
    cure = "ask for groups of 64 or 32" if widths.hidden_size % GROUP else f"--round-to {GROUP} gives others"
    note = f"torchao and ExecuTorch leave matrices with {' or '.join(odd)} inputs whole, without a word; {cure}"
    return Fit(loads=True, note=note)


def _fit_mlx(config: PretrainedConfig) -> Fit:
    """What mlx-lm 0.32 refuses or gets wrong, as seen or, for half of the families, as read in its source."""
    from llmprune_cli.family.written import NTH_ALONE, nth_layers

    neurons = read_widths(config).intermediate_size
    if config.model_type in FOUR_TIMES_IN_MLX and neurons != 4 * config.hidden_size:
        return Fit(False, f"refuses the weights: {neurons} neurons are not 4 × {config.hidden_size}")
    if config.model_type in FULL_WIDTH_IN_MLX and _narrow(config):
        return Fit(False, f"refuses the weights: {_narrow(config)}")
    if config.model_type == "gpt_oss":
        return Fit(False, "refuses this family's weights as transformers 5 stores them, pruned or not")
    field, settings = NTH_ALONE.get(config.model_type, ""), config.to_dict()
    window = settings.get("sliding_window")
    if config.model_type in WITHOUT_WINDOWS_IN_MLX and window and window < config.max_position_embeddings:
        return Fit(loads=True, note=f"it is right within the sliding window of {window} tokens only")
    windows = field != "sliding_window_pattern" or settings.get("sliding_window")
    if not field or not windows or nth_layers(config.model_type, settings)[field] is not None:
        return Fit(loads=True)
    return Fit(False, f"reads {field} alone, and no such number describes the kinds of layers here")


def _fit_mistralrs(config: PretrainedConfig) -> Fit:
    """What mistral.rs 0.9 refuses, or gets wrong, of a folder, as seen or, for some families, as read in its source."""
    family, rope, settings = config.model_type, _rope_type(config), config.to_dict()
    biases = [name for name in BIASES_MISTRALRS_LACKS.get(family, ()) if settings.get(name)]
    if family == "phi" or biases:
        what = "the bias of the output" if family == "phi" else f"the biases ({' and '.join(biases)})"
        return Fit(False, f"leaves {what} out and gives other numbers without a word, pruned or not")
    if rope != "default" and family in UNSCALED_IN_MISTRALRS:
        return Fit(False, f"never reads RoPE scaling ({rope}) and gives other numbers without a word, pruned or not")
    if rope not in SCALED_IN_MISTRALRS.get(family, (rope,)):
        return Fit(False, f"refuses RoPE scaling of the kind {rope}, pruned or not")
    if family == "mistral" and rope == "yarn" and not {"beta_fast", "beta_slow"} <= config.rope_parameters.keys():
        return Fit(False, "refuses YaRN without beta_fast and beta_slow, pruned or not")
    if family in FULL_WIDTH_IN_MISTRALRS and _narrow(config):
        return Fit(False, f"refuses the weights: {_narrow(config)}")
    if family == "gpt_oss":
        return Fit(False, "reads this family's experts in 4 bits alone")
    if (
        family in ("deepseek_v2", "deepseek_v3")
        and settings["v_head_dim"] != settings["qk_nope_head_dim"] + settings["qk_rope_head_dim"]
    ):
        return Fit(False, "fails at the first token on a CPU, as values are narrower than keys, pruned or not")
    window = settings.get("sliding_window")
    is_seen = bool(window) and window < config.max_position_embeddings
    if not is_seen or not _other_windows(family, settings.get("layer_types") or []):
        return Fit(loads=True)
    note = f"it is right within the sliding window of {window} tokens only, as it gives windows to other layers"
    return Fit(loads=True, note=note)


def _other_windows(family: str, kinds: list[str]) -> bool:
    """Whether mistral.rs gives sliding windows to other layers than these kinds say."""
    has_window = [kind == "sliding_attention" for kind in kinds]
    own = {
        "gemma2": [number % 2 == 0 for number in range(len(kinds))],
        "qwen3": [True] * len(kinds),
        "smollm3": [False] * len(kinds),
    }
    return own.get(family, has_window) != has_window
