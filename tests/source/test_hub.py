"""Hub ids: from a cache that was filled before, and from a local server that speaks the hub's protocol."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

from llmprune_cli.errors import CheckpointError
from llmprune_cli.source.hub import fetch
from support.cli import BY_MAGNITUDE, run_cli, run_process

REPOSITORY, COMMIT = "tests/tiny-llama", "0123456789abcdef0123456789abcdef01234567"


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@contextmanager
def hub_of(folder: Path, gives_headers: bool = True) -> Iterator[tuple[str, list[str]]]:
    """Serve a folder as the only repository of a hub; yields the address and the files that were downloaded whole.

    Args:
        gives_headers: whether parts of files can be had.
    """
    downloaded: list[str] = []

    def named(file: Path) -> str:
        return file.relative_to(folder).as_posix()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            body = self.answer()
            if body is not None:
                self.wfile.write(body)

        def answer(self) -> bytes | None:
            path = unquote(self.path.split("?")[0])
            body, headers = b"", {}
            if path in (f"/api/models/{REPOSITORY}/revision/{revision}" for revision in ("v1", "main", COMMIT)):
                names = sorted(map(named, files_of(folder)))
                siblings = [{"rfilename": name} for name in names]
                body = json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": siblings}).encode()
                headers = {"Content-Type": "application/json"}
            elif path.startswith(f"/api/models/{REPOSITORY}/tree/"):
                files = [
                    {"type": "file", "path": named(file), "size": file.stat().st_size, "oid": ""}
                    for file in files_of(folder)
                ]
                body, headers = json.dumps(files).encode(), {"Content-Type": "application/json"}
            elif path.startswith(f"/{REPOSITORY}/resolve/") and (folder / path.split("/", 5)[5]).is_file():
                file = folder / path.split("/", 5)[5]
                body = file.read_bytes()
                headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
                part = self.headers.get("Range")
                if part and gives_headers:
                    first, last = map(int, part.removeprefix("bytes=").split("-"))
                    body = body[first : last + 1]
                elif part:
                    body, headers = b"no part of it", {}
                elif self.command == "GET":
                    downloaded.append(named(file))
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return None
            self.send_response(200)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            return body

        def log_message(self, *_: object) -> None:
            """Stay quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", downloaded
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def of_user(address: str, home: Path) -> dict[str, str]:
    """The environment of a user of this hub."""
    return {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}


def use_hub(patched: pytest.MonkeyPatch, address: str | None, home: Path) -> None:
    """What that environment sets, in a process that read its own long ago; None for being offline."""
    from huggingface_hub import constants

    patched.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    patched.setattr(constants, "HF_HUB_OFFLINE", address is None)
    patched.setattr(constants, "HF_HUB_DISABLE_XET", True)
    if address is not None:
        patched.setattr(constants, "ENDPOINT", address)
        patched.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")


def test_a_revision_resolves_offline_from_the_cache(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "home" / "hub" / f"models--{REPOSITORY.replace('/', '--')}"
    shutil.copytree(tiny_llama, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(COMMIT)
    use_hub(monkeypatch, None, tmp_path / "home")
    options = ["--revision", "v1", "--pruning-ratio", "0.5", "--json"]
    inspected = run_cli("inspect", REPOSITORY, *options)
    assert inspected.code == 0, inspected.stderr
    pruned = run_cli("prune", REPOSITORY, *BY_MAGNITUDE, *options, "--output", tmp_path / "out")
    assert pruned.code == 0, pruned.stderr
    manifest = json.loads((tmp_path / "out" / "llmprune.json").read_text())
    assert (manifest["source"], manifest["revision"]) == (REPOSITORY, COMMIT)
    before, after = json.loads(inspected.stdout)["after"], json.loads(pruned.stdout)["after"]
    assert (before["widths"], before["parameters"]) == (after["widths"], after["parameters"])
    unknown = run_cli("inspect", REPOSITORY, "--revision", "v2")
    assert unknown.code == 3 and "v2" in unknown.stderr and "Traceback" not in unknown.stderr


def test_a_revision_resolves_from_a_server(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub_of(tiny_llama) as (address, downloaded):
        command = ("inspect", REPOSITORY, "--revision", "v1", "--json")
        inspected = run_process(*command, env=of_user(address, tmp_path / "home"))
        assert inspected.code == 0, inspected.stderr
        assert downloaded and not any(name.endswith(".safetensors") for name in downloaded), downloaded
        summary = json.loads(inspected.stdout)
        assert summary["revision"] == COMMIT
        use_hub(monkeypatch, address, tmp_path / "home")
        pruned = run_cli(
            *("prune", REPOSITORY, *BY_MAGNITUDE, "--revision", "v1"),
            *("--pruning-ratio", "0.5", "--output", tmp_path / "out"),
        )
        assert pruned.code == 0, pruned.stderr
        assert {path.name for path in tiny_llama.glob("*.safetensors")} <= set(downloaded)
    local = run_cli("prune", tiny_llama, *BY_MAGNITUDE, "--pruning-ratio", "0.5", "--output", tmp_path / "local")
    assert local.code == 0, local.stderr
    shards = sorted(path.name for path in (tmp_path / "local").glob("*.safetensors"))
    assert [(tmp_path / "out" / name).read_bytes() for name in shards] == [
        (tmp_path / "local" / name).read_bytes() for name in shards
    ]


OTHER_COPIES = ("consolidated.safetensors", "model.fp16.safetensors", "original/model.safetensors", "pytorch_model.bin")


@pytest.mark.parametrize(("shard", "named"), [("40KB", None), ("10MB", None), ("10MB", "weights [1].safetensors")])
def test_no_other_copy_of_the_weights_is_downloaded(
    make_tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard: str, named: str | None
) -> None:
    model = shutil.copytree(make_tiny(shard=shard), tmp_path / "model")
    others = OTHER_COPIES
    (model / "original").mkdir()
    for other in OTHER_COPIES:
        (model / other).write_bytes(b"another copy")
    if named:
        (model / "model.safetensors").replace(model / named)
        others = ("model.safetensors", *OTHER_COPIES)
        (model / "model.safetensors").write_bytes(b"what nobody reads")
        settings = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**settings, "transformers_weights": named}))
    read = {path.name for path in model.glob("*.safetensors")} - {*others}
    assert len(read) > 1 if shard == "40KB" else len(read) == 1
    with hub_of(model) as (address, downloaded):
        use_hub(monkeypatch, address, tmp_path / "home")
        folder, commit = fetch(REPOSITORY, "v1", need_weights=True)
    assert {name for name in downloaded if ".safetensors" in name or ".bin" in name} - {
        "model.safetensors.index.json"
    } == read
    assert commit == COMMIT and read <= {path.name for path in folder.iterdir()}
    use_hub(monkeypatch, None, tmp_path / "home")
    assert fetch(REPOSITORY, "v1", need_weights=True) == (folder, commit)


def test_pickled_weights_are_downloaded_where_there_are_no_others(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside safetensors files that transformers does not read."""
    model = shutil.copytree(tiny_llama, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors*"))
    for name in ("consolidated.safetensors", "pytorch_model.bin"):
        (model / name).write_bytes(b"weights")
    with hub_of(model) as (address, downloaded):
        use_hub(monkeypatch, address, tmp_path / "home")
        fetch(REPOSITORY, "main", need_weights=True)
    assert "pytorch_model.bin" in downloaded and "consolidated.safetensors" not in downloaded


def test_an_index_that_names_files_elsewhere_is_refused_before_they_are_downloaded(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "original/*"}}))
    with hub_of(model) as (address, downloaded):
        use_hub(monkeypatch, address, tmp_path / "home")
        with pytest.raises(CheckpointError, match="outside its folder"):
            fetch(REPOSITORY, "main", need_weights=True)
    assert not any(name.endswith(".safetensors") for name in downloaded)


@pytest.mark.parametrize("shard", ["10MB", "40KB"])
def test_tensors_are_those_of_the_headers_and_not_of_the_configuration(
    make_tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard: str
) -> None:
    """Weights in bfloat16 below a configuration that says float32."""
    model = make_tiny(dtype="bfloat16", shard=shard)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    local = json.loads(run_cli("inspect", model, "--json").stdout)
    assert {row["dtype"] for row in local["before"]["tensors"]} == {"BF16"}
    for gives_headers in (True, False):
        with hub_of(model, gives_headers) as (address, downloaded):
            use_hub(monkeypatch, address, tmp_path / f"home-{gives_headers}")
            run = run_cli("inspect", REPOSITORY, "--json")
            assert run.code == 0, run.stderr
            assert not any(name.endswith(".safetensors") for name in downloaded), downloaded
        found = json.loads(run.stdout)
        assert found["has_weights"] == gives_headers
        assert found["before"]["parameters"] == local["before"]["parameters"]
        assert (found["before"] == local["before"]) == gives_headers, "without headers, config.json is believed"


@pytest.mark.parametrize("name", ["tests/unknown", "gated"])
def test_a_repository_that_the_server_does_not_have(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with hub_of(tiny_llama) as (address, _):
        use_hub(monkeypatch, address, tmp_path / "home")
        run = run_cli("inspect", name)
    assert run.code == 3 and run.stdout == "" and "Traceback" not in run.stderr
    assert name in run.stderr and "hf auth login" in run.stderr


def test_a_name_that_can_be_no_hub_id() -> None:
    run = run_cli("inspect", "what is this?")
    assert run.code == 3 and "neither an existing path nor a hub id" in run.stderr
