"""Recipes: the options of a run in a file, which `--config` reads and `prune --save-config` writes."""

from __future__ import annotations

import json
import shlex
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from llmprune_cli.commands.named_options import options_of, refuse_unknown
from llmprune_cli.commands.requests import PruneRequest
from llmprune_cli.errors import CheckpointError, UsageError, first_line
from llmprune_cli.folder.documents import is_there, read_json, replace_file
from llmprune_cli.folder.manifest import MANIFEST_NAME
from llmprune_cli.heal.options import Healing
from llmprune_cli.options import Choice, Delivery, ModelReference, Text
from llmprune_cli.vocabulary.request import VocabularyRequest

if TYPE_CHECKING:
    from llmprune_cli.run.calibration import CalibrationText

CHECK = "Check the path that --config names, and the file."
MOST_BYTES = 2**20
RECIPE_KINDS = (ModelReference, Choice, Text, Delivery, VocabularyRequest)
COMMAND, MODEL = "command", "model"
# What a recipe does not hold: where results go, how far a run is, and whom the user trusts.
ELSEWHERE = {"output", "overwrite", "dry_run", "save_plan", "save_config", "report", "trust_remote_code"}
ELSEWHERE |= {"push_to", "public"}


def recipe_of(request: PruneRequest, choice: Choice, text: CalibrationText | None) -> dict[str, Any]:
    """Everything that decides what `prune` writes, by the names of its options; defaults are left out.

    Args:
        choice: with the method that is used.
        text: that is used; its name is kept, also where the user left it open.
    """
    calibration = request.text
    if text is not None:
        calibration = replace(calibration, calibration=text.corpus.name)
    parts = (request.model, choice, calibration, request.delivery, request.vocabulary)
    found: dict[str, Any] = {COMMAND: "prune", MODEL: request.model.name}
    for part in parts:
        for name, value in given(part).items():
            if name not in ELSEWHERE:
                found[name] = value
    return found


def given(part: ModelReference | Choice | Text | Delivery | VocabularyRequest | Healing) -> dict[str, Any]:
    """The options of a value that are not at their defaults, ready for JSON."""
    found = {}
    for own in options_of(type(part)):
        holder = part.widths if isinstance(part, Choice) and not hasattr(part, own.attribute) else part
        value = getattr(holder, own.attribute)
        if value != own.default:
            found[own.name] = (
                list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
            )
    return found


def as_words(recipe: dict[str, Any], *others: str) -> str:
    """A recipe as the words of a command line, quoted for a shell.

    Args:
        others: models beside its own.
    """
    words = [shlex.quote(str(name)) for name in (recipe[MODEL], *others)]
    for name, value in recipe.items():
        if name in (COMMAND, MODEL) or value is False:
            continue
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
            continue
        shown = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        words.append(f"{flag} {shlex.quote(shown)}" if not shown.startswith("-") else f"{flag}={shlex.quote(shown)}")
    return " ".join(words)


def trusted(model: ModelReference) -> dict[str, bool]:
    """The option without which a model with code of its own is not loaded, where that was given."""
    return {"trust_remote_code": True} if model.trust_remote_code else {}


def save_recipe(recipe: dict[str, Any], path: Path) -> None:
    """Write a recipe as YAML or JSON.

    Raises:
        OutputError: the file cannot be written.
    """
    if path.suffix.lower() == ".json":
        text = json.dumps(recipe, indent=2) + "\n"
    else:
        text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    replace_file(path, [text.encode()], "Choose another --save-config.")


def read_recipe(path: Path, command: str) -> dict[str, Any]:
    """The options in a recipe, a manifest or a folder with one, by name.

    Raises:
        CheckpointError: it cannot be read.
        UsageError: it is not a recipe, or one of another command.
    """
    path = path / MANIFEST_NAME if is_there(path) and path.is_dir() else path
    document = _read(path)
    if path.name == MANIFEST_NAME or "schema_version" in document:
        document = _of_manifest(path, document)
    made_for = document.pop(COMMAND, command)
    if made_for != command:
        raise UsageError(f"{path} is a recipe of `{made_for}`, not of `{command}`.")
    return {str(name).replace("-", "_"): value for name, value in document.items() if value is not None}


def _of_manifest(path: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """The recipe in a manifest, which comes with models of other people: it may say what to make, and no more."""
    recipe = manifest.get("recipe")
    if not isinstance(recipe, dict):
        raise UsageError(f"{path} was written without a recipe, so that it cannot be repeated.")
    known = {own.name for kind in RECIPE_KINDS for own in options_of(kind)} - ELSEWHERE
    refuse_unknown(recipe.keys() - {COMMAND, MODEL}, known, f"The recipe in {path}")
    return dict(recipe)


def _read(path: Path) -> dict[str, Any]:
    if path.suffix.lower() == ".json":
        return read_json(path, advice=CHECK)
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. {CHECK}") from error
    if len(content) > MOST_BYTES:
        raise CheckpointError(f"{path} has more than the {MOST_BYTES:,} bytes that recipes have at most.")
    try:
        text = content.decode()
        document = tomllib.loads(text) if path.suffix.lower() == ".toml" else yaml.safe_load(text)
    except Exception as error:  # yaml raises whatever tags such as !!int or !!timestamp lead it to
        reason = " ".join(str(error).split()) or first_line(error)
        raise CheckpointError(f"{path} is not a readable recipe ({reason}). Correct it.") from error
    if not isinstance(document, dict):
        raise UsageError(f"{path} is not a recipe: it has to name options, such as `layers: 27`.")
    return document
