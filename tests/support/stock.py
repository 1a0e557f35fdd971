"""What stock software makes of a model folder."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from support import ROOT

WIKITEXT2 = Path(os.environ.get("LLMPRUNE_WIKITEXT2", ROOT.parent / "shared" / "data" / "wikitext-2-raw-v1"))


def load_stock(folder: Path, **options: Any) -> Any:
    """Reload strictly: no missing, unexpected or mismatched key."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model.eval()


def assert_generates(model: Any) -> None:
    """Generation with the cache gives the logits of a forward pass without it."""
    tokens = torch.randint(3, 90, (1, 10))
    generated = model.generate(
        tokens, max_new_tokens=4, min_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    with torch.no_grad():
        logits = model(generated.sequences, use_cache=False).logits[:, 9:-1]
    torch.testing.assert_close(torch.stack(generated.logits, 1), logits, rtol=1e-4, atol=1e-4)


def written_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for shard in folder.glob("*.safetensors"):
        tensors.update(load_file(shard))
    return tensors


def stock_loss(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(tokens, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def plain_perplexity(folder: Path, text: str, window: int, limit: int | None = None) -> float:
    """The example's protocol in ten lines of plain transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt", verbose=False).input_ids[0]
    losses = []
    for start in range(0, len(tokens) - window + 1, window)[:limit]:
        batch = tokens[start : start + window].unsqueeze(0)
        with torch.no_grad():
            logits = model(batch).logits.float()
        losses.append(torch.nn.functional.cross_entropy(logits[0, :-1], batch[0, 1:]).item())
    return math.exp(sum(losses) / len(losses))


def written_files(folder: Path) -> dict[str, bytes]:
    """Everything that a calibrated run wrote, but for the speeds that it measured."""
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    manifest = json.loads(files["llmprune.json"])
    for side in ("before", "after"):
        for figure in ("tokens_per_second", "spread"):
            del manifest["calibration"][f"prefill_{figure}_{side}"]
    return {**files, "llmprune.json": json.dumps(manifest).encode()}
