"""Which stored tensor is which: names that checkpoints carry, resolved by transformers' own loading rules."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from llmprune_cli.errors import CheckpointError, UnsupportedError
from llmprune_cli.family.layers import further_layers
from llmprune_cli.family.skeleton import build_skeleton
from llmprune_cli.folder.tensors import split_name

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Buffers that older checkpoints store, that no current model reads and that not every family lists.
STRAY = re.compile(r"(rotary_emb\.inv_freq|\.attn\.(masked_)?bias|\.attn\.causal_mask|\.attention\.(masked_)?bias)$")

# Parts that predict further tokens, whatever a family calls them.
FURTHER = re.compile(r"(^|\.)mtp[._]")

# A tensor's place: its parameter in memory, the conversion that leads there if any, and the numbers in its name, which
# tell apart the experts that such a conversion stacks.
Place = tuple[str, str | None, tuple[int, ...]]


@dataclass(frozen=True)
class Names:
    """What the tensors of a checkpoint are."""

    canonical: dict[str, str]  # stored name → name that `save_pretrained` writes today, of the tensors in use
    dropped: tuple[str, ...]  # stored names that the model does not use
    aliases: tuple[tuple[str, str], ...] = ()  # of those, the second copies of tied tensors, and the first copies
    around: tuple[str, ...] = ()  # stored names of the multimodal model's other parts, where all of these are there


class Rules:
    """transformers' rules from stored names to the parameters of one model."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Collect the rules that `from_pretrained` would apply to this class."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        mapping = get_model_conversion_mapping(model)
        self.renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
        self.converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
        self.prefix = model.base_model_prefix
        self.tied = model.all_tied_weights_keys.keys()
        self.parameters = model.state_dict()
        self.buffers = {name for name, _ in model.named_buffers()} - self.parameters.keys()
        self.further = further_layers(model.config.get_text_config())
        self.ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]

    def locate(self, name: str) -> Place:
        """The place of a stored tensor; nothing says yet that the model has it."""
        from transformers.core_model_loading import rename_source_key

        known = self.prefix, self.parameters
        memory, pattern = rename_source_key(name, self.renamings, self.converters, *known)
        if memory not in self.parameters and name in self.parameters:
            memory, pattern = rename_source_key(name, [], [], *known)
        return memory, pattern, split_name(name)[1] if pattern else ()

    def ignores(self, name: str) -> bool:
        """Whether the model leaves such a tensor out without a word."""
        memory = self.locate(name)[0]
        listed = any(pattern.search(memory) for pattern in (*self.ignored, FURTHER))
        is_further = any(number in self.further for number in split_name(memory)[1][:1])
        return listed or is_further or memory in self.buffers or bool(STRAY.search(name))


class OuterRules(Rules):
    """The rules of a multimodal model, leading to the parameters of its text model."""

    def __init__(self, outer: PreTrainedModel, text: PreTrainedModel) -> None:
        """Find the text model within the outer one."""
        super().__init__(outer)
        base = text.base_model_prefix
        inside = {type(text): "", type(getattr(text, base)): f"{base}."}
        found = [(path, inside[type(module)]) for path, module in outer.named_modules() if type(module) in inside]
        own = getattr(text, base).state_dict().keys()  # by which it is known where it has a class of its own
        found += [(path, f"{base}.") for path, m in outer.named_modules() if path and m.state_dict().keys() == own]
        path, self.text_prefix = found[0] if found else ("", "")
        self.path = f"{path}."

    def locate(self, name: str) -> Place:
        """The place in the text model; a part that sees or hears keeps its name in the outer model."""
        memory, pattern, numbers = super().locate(name)
        if memory.startswith(self.path):
            memory = self.text_prefix + memory.removeprefix(self.path)
        return memory, pattern, numbers

    def ignores(self, name: str) -> bool:
        """Whether the text model leaves such a tensor out: a buffer, or part of what is not text."""
        return super().ignores(name) or super().locate(name)[0] in self.parameters

    def surrounds(self, name: str) -> bool:
        """Whether a stored tensor is a parameter of the multimodal model outside the text model."""
        memory = super().locate(name)[0]
        return memory in self.parameters and not memory.startswith(self.path)

    def lacks(self, stored: Collection[str]) -> bool:
        """Whether the multimodal model has parameters that none of the stored tensors leads to."""
        found = {super(OuterRules, self).locate(name)[0] for name in stored}
        return bool(self.parameters.keys() - found - self.tied)


def resolve_names(
    text: PreTrainedModel, outer: PreTrainedModel | None, expected: Collection[str], stored: Collection[str]
) -> Names:
    """Give every stored tensor the name that `save_pretrained` writes today, or drop it.

    Args:
        text: skeleton of the causal language model.
        outer: skeleton of the multimodal model that the checkpoint holds, if it does.
        expected: names that `save_pretrained` writes for `text`.
        stored: names in the checkpoint's headers.

    Raises:
        CheckpointError: two stored tensors claim one name, or one is unknown to the model.
        UnsupportedError: a tensor that would have to be converted, not just renamed.
    """
    holders = {name: name for name in stored if name in expected}
    others = sorted(name for name in stored if name not in expected)
    if not others:
        return Names(holders, ())
    own = Rules(text)
    rules = [own] if outer is None else [own, OuterRules(outer, text)]
    names = {own.locate(name): name for name in expected}
    unused = []
    for name in others:
        found = [names[place] for rule in rules if (place := rule.locate(name)) in names]
        if found:
            _claim(holders, found[0], name)
        else:
            unused.append(name)
    dropped, aliases = [], []
    tied = {
        alias: names[place]
        for alias, source in text.all_tied_weights_keys.items()
        if (place := own.locate(source)) in names
    }
    for name in unused:
        aliased = [tied[memory] for rule in rules if (memory := rule.locate(name)[0]) in tied]
        if aliased and aliased[0] not in holders:
            _claim(holders, aliased[0], name)
        elif aliased:
            aliases.append((name, holders[aliased[0]]))
        elif any(rule.ignores(name) for rule in rules):
            dropped.append(name)
        else:
            raise _unusable(text, name, rules)
    canonical = {name: claimed for claimed, name in holders.items()}
    around: tuple[str, ...] = ()
    if isinstance(rules[-1], OuterRules) and not rules[-1].lacks(stored):
        around = tuple(name for name in dropped if rules[-1].surrounds(name))
    left_out = (*(name for name in dropped if name not in around), *(alias for alias, _ in aliases))
    return Names(canonical, left_out, tuple(aliases), around)


def outer_model(config: PretrainedConfig) -> PreTrainedModel:
    """The skeleton of a multimodal configuration, with every part that it has.

    Raises:
        UnsupportedError, CheckpointError: see `build_skeleton`.
    """
    from transformers import AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return build_skeleton(config)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForImageTextToText.from_config(config)
    except Exception as error:  # every family raises its own kind
        raise CheckpointError(f"config.json does not describe a {config.model_type} model: {error}") from error
    return model


def usual_outer_model(config: PretrainedConfig) -> PreTrainedModel | None:
    """The multimodal model that a text model is usually published in, as `gemma3_text` is in `gemma3`, if any."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    family = config.model_type.removesuffix("_text")
    if family == config.model_type or family not in CONFIG_MAPPING:
        return None
    outer: Any = CONFIG_MAPPING[family]
    try:
        return outer_model(outer(text_config=config.to_dict()))
    except Exception:  # a guess only: what it would have explained stays unknown
        return None


def _claim(holders: dict[str, str], canonical: str, name: str) -> None:
    if canonical in holders:
        raise CheckpointError(f"The checkpoint stores {canonical} as {holders[canonical]} and as {name}. Remove one.")
    holders[canonical] = name


def _unusable(text: PreTrainedModel, name: str, rules: list[Rules]) -> CheckpointError | UnsupportedError:
    family = text.config.model_type
    for rule in rules:
        memory = rule.locate(name)[0]
        if memory in rules[0].parameters:
            return UnsupportedError(
                f"{name} is stored in another layout than the one that transformers writes for {family}, and would "
                f"have to be converted to {memory}. Load the checkpoint with transformers and save it again."
            )
    return CheckpointError(
        f"The checkpoint has {name}, unknown to the model ({family}). If it is a leftover, which transformers reads "
        "past, load the model with transformers, save it again, and give the result."
    )
