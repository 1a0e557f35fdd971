"""A hub on this machine that takes what is pushed to it, over the protocol of the real one."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

TOKEN, USER = "hf_of_the_tests", "tests"


@dataclass
class Hub:
    """What a hub knows, and how it answers."""

    address: str = ""
    role: str = "write"  # of the token
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)  # of each repository
    private: dict[str, bool] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)  # large files, by checksum
    commits: int = 0
    refuses: dict[str, int] = field(default_factory=dict)  # status to answer with, by a part of the path
    asked: list[str] = field(default_factory=list)  # every request


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        self.answer(b"")

    def do_POST(self) -> None:
        self.answer(self.body())

    def do_PUT(self) -> None:
        self.answer(self.body())

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, body: bytes) -> None:
        path = self.path.split("?")[0]
        self.hub.asked.append(f"{self.command} {path}")
        refused = next((status for part, status in self.hub.refuses.items() if part in path), None)
        is_upload = path.startswith("/blobs/")  # whose address is all that it takes
        if refused is None and not is_upload and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            refused = 401
        status, said = (refused, {"error": "so it is"}) if refused else _answer(self.hub, path, body)
        content = json.dumps(said).encode()
        self.send_response(status)
        missing = {"X-Error-Code": "RepoNotFound"} if status == 404 else {}
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content)), **missing}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Stay quiet."""


def _answer(hub: Hub, path: str, body: bytes) -> tuple[int, Any]:
    parts = path.strip("/").split("/")
    if path == "/api/whoami-v2":
        token = {"accessToken": {"role": hub.role}}
        return 200, {"type": "user", "name": USER, "orgs": [], "auth": token}
    if path == "/api/validate-yaml":
        return 200, {"errors": [], "warnings": []}
    if path == "/api/repos/create":
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        hidden = asked.get("private", asked.get("visibility") == "private")
        return _create(hub, name, hidden)
    if parts[0] == "blobs":
        hub.blobs[parts[1]] = body
        return 200, {}
    if path.endswith(".git/info/lfs/objects/batch"):
        return 200, {"objects": [_upload(hub, blob) for blob in json.loads(body)["objects"]]}
    name = "/".join(parts[2:4])
    if name not in hub.files:
        return 404, {"error": "Repository not found"}
    if "preupload" in parts:
        return 200, {"files": [_mode(file) for file in json.loads(body)["files"]]}
    if "commit" in parts:
        return 200, _commit(hub, name, [json.loads(line) for line in body.splitlines()])
    siblings = [{"rfilename": file} for file in hub.files[name]]
    return 200, {"id": name, "sha": f"{hub.commits:040}", "private": hub.private[name], "siblings": siblings}


def _create(hub: Hub, name: str, is_private: bool) -> tuple[int, Any]:
    status = 409 if name in hub.files else 200
    hub.files.setdefault(name, {})
    hub.private.setdefault(name, is_private)
    return status, {"url": f"{hub.address}/{name}", "id": name, "error": "You already created this model repo"}


def _upload(hub: Hub, blob: dict[str, Any]) -> dict[str, Any]:
    upload = {"href": f"{hub.address}/blobs/{blob['oid']}", "header": {}}
    return blob if blob["oid"] in hub.blobs else {**blob, "actions": {"upload": upload}}


def _mode(file: dict[str, Any]) -> dict[str, Any]:
    is_large = file["path"].endswith((".safetensors", ".gguf"))
    return {"path": file["path"], "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}


def _commit(hub: Hub, name: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
    for line in lines:
        value = line["value"]
        if line["key"] == "file":
            hub.files[name][value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            content = hub.blobs[value["oid"]]
            assert hashlib.sha256(content).hexdigest() == value["oid"] and len(content) == value["size"]
            hub.files[name][value["path"]] = content
        elif line["key"] == "deletedFile":
            del hub.files[name][value["path"]]
    hub.commits += 1
    return {"commitOid": f"{hub.commits:040}", "commitUrl": f"{hub.address}/{name}/commit/{hub.commits:040}"}


@contextmanager
def hub_that_takes() -> Iterator[Hub]:
    """Serve an empty hub."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def log_in(patched: pytest.MonkeyPatch, hub: Hub, home: Path, token: str | None = TOKEN) -> None:
    """Make this process a user of a hub; it read its own environment long ago."""
    from huggingface_hub import constants

    patched.setattr(constants, "HF_HUB_OFFLINE", False)
    patched.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patched.setattr(constants, "ENDPOINT", hub.address)
    patched.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    patched.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    if token is None:
        patched.delenv("HF_TOKEN", raising=False)
    else:
        patched.setenv("HF_TOKEN", token)
