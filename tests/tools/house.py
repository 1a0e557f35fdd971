"""Hold the package to the limits of its layout: sizes of folders, files and functions, and homes of libraries.

`make lint` runs it. Exit status 1 means that something is too large, or in the wrong place.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "llmprune_cli"
MOST_FILES, MOST_LINES = 9, 350  # of a folder, of a file
MOST_FUNCTION_LINES, MOST_PARAMETERS = 60, 10
MOST_VISITS = 12  # files that a part of the options is named in
PARTS = ("Choice", "Text", "Delivery", "Scratch")
# What `--help` loads: no library but Typer and Rich.
LIGHT = {"errors", "interruption", "options", "processes", "progress", "sizes", "__main__", "__init__"}
LIGHT |= {
    "text",
    "text.files",
    "text.columns",
    "text.names",
    "startup.model_argument",
    "startup.config_checks",
    "run",
    "run.questions",
    "run.questions.request",
    "commands",
    "commands.requests",
    "commands.inspect",
    "commands.inspect.request",
    "commands.named_options",
    "commands.push",
    "commands.sweep",
    "commands.sweep.request",
    "choose",
    "choose.importances",
    "repair",
    "heal",
    "heal.options",
    "formats",
    "formats.request",
    "cli",
    "startup",
    "startup.loading",
}
HEAVY = {"torch", "transformers", "pydantic", "accelerate", "safetensors", "huggingface_hub", "datasets", "yaml"}
LATE = {
    "datasets",
    "matplotlib",
    "gguf",
    "onnx",
    "onnxruntime",
    "onnxruntime_genai",
    "xllamacpp",
    "torch_pruning",
    "peft",
    "lm_eval",
}
# The only folders that may name a library.
HOMES = {
    "typer": {"cli"},
    "rich": {"cli"},
    "yaml": {"commands"},
    "datasets": {"text"},
    "accelerate": {"run", "processes"},
    "torch_pruning": {"apply"},
    "peft": {"heal"},
    "lm_eval": {"run"},
    "xllamacpp": {"formats"},
    "matplotlib": {"report"},
    "filelock": {"folder"},
    "huggingface_hub": {"source", "report", "commands", "startup"},
    "onnxruntime": {"formats"},
}


def problems() -> Iterator[str]:
    """Everything that is not as it should be, in words."""
    files: dict[Path, int] = defaultdict(int)
    visits: dict[str, set[Path]] = defaultdict(set)
    for path in sorted(PACKAGE.rglob("*.py")):
        files[path.parent] += 1
        name, text = path.relative_to(PACKAGE), path.read_text(encoding="utf-8")
        lines, tree = text.count("\n"), ast.parse(text)
        if lines > MOST_LINES:
            yield f"{name} has {lines} lines; at most {MOST_LINES}."
        yield from (f"{name}: {problem}" for problem in functions(tree))
        yield from (f"{name}: {problem}" for problem in imports(tree, name))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "llmprune_cli.options":
                for alias in node.names:
                    visits[alias.name].add(name)
    for folder, count in files.items():
        if count > MOST_FILES:
            yield f"{folder.relative_to(PACKAGE.parent)} has {count} files; at most {MOST_FILES}."
    for part in PARTS:
        if len(visits[part]) > MOST_VISITS:
            yield f"{part} is named in {len(visits[part])} files; at most {MOST_VISITS}."


def functions(tree: ast.Module) -> Iterator[str]:
    """Functions that are too long or take too much."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if lines > MOST_FUNCTION_LINES:
                yield f"{node.name} has {lines} lines; at most {MOST_FUNCTION_LINES}."
            arguments = node.args
            count = len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs)
            if count > MOST_PARAMETERS:
                yield f"{node.name} has {count} parameters; at most {MOST_PARAMETERS}."


def imports(tree: ast.Module, name: Path) -> Iterator[str]:
    """Libraries that are named where they should not be, or are loaded too early."""
    module = ".".join(name.with_suffix("").parts).removesuffix(".__init__")
    folder = name.parts[0].removesuffix(".py")
    is_light = module in LIGHT or folder == "cli"
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            named = [node.module or ""]
        elif isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        else:
            continue
        for library in {each.split(".")[0] for each in named}:
            if folder not in HOMES.get(library, {folder}):
                yield f"{library} has its home in {', '.join(sorted(HOMES[library]))}."
            if id(node) in top and (library in LATE or (is_light and library in HEAVY)):
                yield f"{library} is imported at the top."


def main() -> int:
    """Print all problems."""
    found = list(problems())
    print("\n".join(found) or "The house is in order.")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
