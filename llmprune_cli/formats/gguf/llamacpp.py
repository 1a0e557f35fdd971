"""llama.cpp with an exported GGUF file loaded, asked over its server's own interface."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, Request, build_opener

import torch

from llmprune_cli.errors import VerificationError
from llmprune_cli.formats.registry import Continuation

PATIENCE = 600  # seconds for an answer
CONTEXT = 256  # tokens; llama.cpp rounds up to multiples of it
LIKELIEST = 1024  # tokens whose log-probabilities are asked for behind the first place, where all are


class LlamaCpp:
    """A running server."""

    def __init__(self, address: str) -> None:
        """Talk to the server at an address."""
        self.address = address
        self.open = build_opener(ProxyHandler({})).open
        self.vocabulary = int(self._ask("/v1/models")["data"][0]["meta"]["n_vocab"])
        self.whole = [[self._ask("/tokenize", {"content": "a"})["tokens"][-1], 1e6]]

    def _ask(self, path: str, question: dict[str, Any] | None = None) -> dict[str, Any]:
        body = json.dumps(question).encode() if question is not None else None
        try:
            request = Request(self.address + path, body, {"Content-Type": "application/json"})
            with self.open(request, timeout=PATIENCE) as response:
                answer: dict[str, Any] = json.load(response)
        except HTTPError as error:
            reason = error.read().decode(errors="replace")
            raise VerificationError(f"llama.cpp refuses {path}: {reason}. Nothing was kept.") from error
        except (URLError, OSError) as error:
            raise VerificationError(f"llama.cpp stopped answering ({error}). Nothing was kept.") from error
        return answer

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens around it."""
        return list(self._ask("/tokenize", {"content": text, "add_special": True})["tokens"])

    def continue_greedily(self, prompt: torch.Tensor, tokens: int) -> Continuation:
        """Go on with a prompt; behind the first place only the likeliest tokens have log-probabilities."""
        ids, log_probs = prompt.tolist(), torch.full((tokens, self.vocabulary), -torch.inf)
        for place in range(tokens):
            likeliest = self._likeliest(ids, self.vocabulary if place == 0 else min(LIKELIEST, self.vocabulary))
            found, values = zip(*((token["id"], token["logprob"]) for token in likeliest), strict=True)
            log_probs[place, list(found)] = torch.tensor([math.nan if value is None else value for value in values])
            ids.append(int(log_probs[place].argmax()))
        return Continuation(torch.tensor(ids[len(prompt) :]), log_probs)

    def _likeliest(self, ids: list[int], number: int) -> list[dict[str, Any]]:
        """The likeliest next tokens with their log-probabilities, of the logits as they are.

        The server says nothing of a token that is a part of a character only, so that it is made to choose another.
        """
        question = {"prompt": ids, "n_predict": 1, "n_probs": number, "temperature": 0, "logit_bias": self.whole}
        return list(self._ask("/completion", question)["completion_probabilities"][0]["top_logprobs"])


@contextmanager
def open_llamacpp(folder: Path) -> Iterator[LlamaCpp]:
    """Load the GGUF file in a folder.

    Raises:
        VerificationError: llama.cpp does not load it.
    """
    path = next(folder.glob("*.gguf"))
    module = "llmprune_cli.formats.gguf.llamacpp_server"
    command = [sys.executable, "-m", module, str(path), str(CONTEXT), str(torch.get_num_threads())]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            if not address.startswith("http"):
                raise VerificationError(f"llama.cpp does not load the export: {_reason(log)}. Nothing was kept.")
            yield LlamaCpp(address)
        finally:
            process.kill()
            process.communicate()


def _reason(log: IO[bytes]) -> str:
    """What llama.cpp said last about an error."""
    log.seek(0)
    lines = log.read().decode(errors="replace").strip().splitlines()
    telling = [line for line in lines if "error" in line.lower() or "assert" in line.lower()]
    return (telling or lines or ["it said nothing"])[0].strip()
