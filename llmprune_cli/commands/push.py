"""`push`: a folder that llmprune wrote goes to the hub, once it is what was written, and in one commit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune_cli import __version__
from llmprune_cli.errors import CheckpointError, OutputError, UsageError, first_line
from llmprune_cli.folder.documents import is_there
from llmprune_cli.progress import Listener, Told

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

    from llmprune_cli.report.json_results import PushResult

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
LOG_IN = "Run `hf auth login`, or set HF_TOKEN to a token that may write"


def push(folder: str | Path, repository: str, *, public: bool = False, progress: Told | None = None) -> PushResult:
    """Upload a folder that llmprune wrote to the hub.

    Args:
        folder: that `prune`, `recover` or `export` wrote.
        repository: ORG/NAME on the hub; it is made where there is none.
        public: everybody may see what is made; without it, nothing goes where everybody sees it.
        progress: told how far it is.

    Raises:
        LlmpruneError: see `check_push` and `upload`.
    """
    check_push(Path(folder), repository)
    return upload(Path(folder), repository, public, Listener(progress))


def check_push(folder: Path, repository: str) -> None:
    """Refuse what can be refused in a moment, before anything is asked of the hub.

    Raises:
        UsageError: no name of a repository.
        CheckpointError: no folder that llmprune wrote.
        OutputError: nobody is logged in, or the hub is not to be used.
    """
    from llmprune_cli.folder.manifest import MANIFEST_NAME

    _check_name(repository)
    if not (is_there(folder) and folder.is_dir()):
        raise CheckpointError(f"{folder} is no folder. Give one that llmprune wrote.")
    if not (folder / MANIFEST_NAME).is_file():
        raise CheckpointError(
            f"{folder} has no {MANIFEST_NAME}, so nothing says whether it is whole. `hf upload {repository} {folder}` "
            "uploads any folder."
        )
    _check_login()


def check_push_to(repository: str | None, is_public: bool) -> None:
    """The same for what a run is yet to write.

    Raises:
        UsageError, OutputError: see `check_push`.
    """
    if repository is None and is_public:
        raise UsageError("--public is for what is uploaded; give --push-to ORG/NAME.")
    if repository is not None:
        _check_name(repository)
        _check_login()


def ask_hub(repository: str | None, is_public: bool, listener: Listener) -> None:
    """Ask the hub, before the work of a run, whether its result will find a place there; nothing is made yet.

    Args:
        repository: see `push`; where it is None, nothing is asked.

    Raises:
        OutputError: it will not.
    """
    if repository is None:
        return
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    api = HfApi()
    listener.stage("Asking the hub", 1)
    with _explained(repository, "Nothing was done yet."):
        _check_role(api)
        with suppress(RepositoryNotFoundError):
            _check_seen(api.model_info(repository), repository, is_public)


def _check_name(repository: str) -> None:
    if not HUB_ID.fullmatch(repository):
        raise UsageError(f"{repository!r} is no name on the hub. Write ORG/NAME; your own name may be the ORG.")


def _check_login() -> None:
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise OutputError("HF_HUB_OFFLINE is set, and a push needs the hub. Unset it.")
    if get_token() is None:
        raise OutputError(f"You are not logged in to the hub. {LOG_IN}.")


def upload(folder: Path, repository: str, is_public: bool, listener: Listener) -> PushResult:
    """Ask the hub, hold the folder against its checksums, and upload what belongs to the model.

    Weights that the repository has from before, under names that the folder does not have, go in the same commit: stock
    software might load them instead of these.

    Raises:
        VerificationError: the folder is not what was written.
        OutputError: the hub does not take it. The folder stays as it is.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    from llmprune_cli.folder.integrity import WEIGHTS, check_files
    from llmprune_cli.report.json_results import SCHEMA_VERSION, PushResult

    disable_progress_bars()
    api = HfApi()
    rest = f"{folder} is as it was; `llmprune push {folder} {repository}{' --public' if is_public else ''}` goes on"
    rest = f"{rest}, and uploads nothing twice."
    listener.stage("Asking the hub", 1)
    with _explained(repository, rest):
        there = _open_repository(api, repository, is_public)
    listener.stage("Verifying", 1)
    check_files(folder)
    names = _names(folder)
    sizes = {name: (folder / name).stat().st_size for name in names}
    additions = {name: CommitOperationAdd(name, folder / name) for name in names}
    present = [file.rfilename for file in there.siblings or ()]
    outdated = tuple(name for name in present if name.endswith(WEIGHTS) and name not in sizes)
    listener.stage("Uploading", sum(sizes.values()))
    with _explained(repository, rest):
        for name, addition in additions.items():
            if name.endswith(WEIGHTS):
                api.preupload_lfs_files(repository, [addition], free_memory=False)
                listener.advance(sizes[name])
        deletions = [CommitOperationDelete(name) for name in outdated]
        message = f"Upload what llmprune {__version__} wrote"
        commit = api.create_commit(repository, [*additions.values(), *deletions], commit_message=message)
        listener.stand_at(sum(sizes.values()), "")
    return PushResult(
        schema_version=SCHEMA_VERSION,
        folder=str(folder),
        repository=repository,
        url=f"{api.endpoint}/{repository}",
        commit=commit.oid,
        private=bool(there.private),
        files=tuple(names),
        size_bytes=sum(sizes.values()),
        removed=outdated,
    )


def _open_repository(api: HfApi, repository: str, is_public: bool) -> ModelInfo:
    """The repository, which is made where there is none.

    Raises:
        OutputError: it cannot be written with this token, or everybody may see it and that was not asked for.
    """
    _check_role(api)
    api.create_repo(repository, private=not is_public, exist_ok=True)
    there = api.model_info(repository)
    _check_seen(there, repository, is_public)
    return there


def _check_role(api: HfApi) -> None:
    token: dict[str, Any] = api.whoami().get("auth", {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise OutputError(f"Your token for the hub may only read. {LOG_IN}.")


def _check_seen(there: ModelInfo, repository: str, is_public: bool) -> None:
    if not there.private and not is_public:
        raise OutputError(
            f"{repository} is there already, and everybody may see it. Give --public to push to it, or another name."
        )


def _names(folder: Path) -> list[str]:
    """The files of the model: those of its manifest, and what is for people to read."""
    from llmprune_cli.folder.manifest import read_manifest
    from llmprune_cli.folder.staging import is_listed

    listed = read_manifest(folder).files or {}
    return sorted({*listed, *(path.name for path in folder.iterdir() if path.is_file() and not is_listed(path.name))})


@contextmanager
def _explained(repository: str, rest: str) -> Iterator[None]:
    """What the hub and the way to it are up to, in words.

    Args:
        rest: what is said then.

    Raises:
        OutputError: see above.
    """
    from huggingface_hub.errors import HfHubHTTPError

    of_the_way: Any = HfHubHTTPError.__bases__  # what its HTTP library raises, and the system
    try:
        yield
    except (*of_the_way, ValueError, RuntimeError) as error:
        said = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        status = said.response.status_code if isinstance(said, HfHubHTTPError) else None
        if status == 401:
            raise OutputError(f"The hub does not know your token. {LOG_IN}. {rest}") from error
        if status == 403:
            raise OutputError(
                f"Your token may not write to {repository} ({first_line(said)}). {LOG_IN} there. {rest}"
            ) from error
        raise OutputError(f"Nothing can be pushed to {repository}: {first_line(said)}. {rest}") from error
