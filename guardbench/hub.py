"""The Hugging Face Hub as a place to fetch files from: listed first, limited, then checked one by one.

A repository there may hold anything. Only files that were asked for are fetched, at one commit, after
their sizes have been added up; nothing of it is executed, unpickled or followed out of its folder.
`guardbench.hub_set` builds pushing and pulling of distilled sets on this.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.tqdm import tqdm

import guardbench
from guardbench import canonical
from guardbench.errors import GuardbenchError, brief
from guardbench.fields import printable
from guardbench.progress import Progress, Stage
from guardbench.store import atomic_folder, explained, require_free

SUFFIXES = (".parquet", ".safetensors")
EXACT = "images.safetensors"
"""The artifact itself, in what `push` has sent."""
MAX_ENTRIES = 20_000
MAX_FILES = 1_000
# What the wire may bring beyond a file's own size: other transfers than plain HTTP repeat some of it.
_SLACK = 1 << 20

_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+/-]{0,199}")
_PART = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._+=-]{0,120}[A-Za-z0-9_])?")
# The base of all that the HTTP library of this version of huggingface_hub raises; which library that is
# (httpx, httpx2) changes with the version.
_HTTP_ERROR: type[Exception] = next(
    kind
    for kind in HfHubHTTPError.__mro__
    if issubclass(kind, Exception) and kind.__name__ == "HTTPError"
)
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository, as its listing tells it.

    Attributes:
        path: in the repository, with `/`.
        size: in bytes.
        sha256: of the content where the Hub knows it (large files), else None.
    """

    path: str
    size: int
    sha256: str | None


def client() -> HfApi:
    """What all talk with the Hub goes through; endpoint and token are huggingface_hub's usual ones."""
    return HfApi(library_name="guardbench", library_version=guardbench.__version__)


def fetch_dataset(repo: str, revision: str, into: Path, *, limit: int, progress: Progress) -> Path:
    """Fetches the parquet and safetensors files of a dataset repository at one commit, and nothing else.

    Files keep their paths below `into`, which appears when all of them are there and checked. What
    had arrived before an interruption is not fetched again.

    Args:
        repo: `OWNER/NAME`.
        revision: a commit, 40 hexadecimal digits, because a branch may change.
        into: a folder that is not there yet, or is empty.
        limit: bytes of all files together, looked at before anything is fetched.
        progress: where the stage is shown.

    Returns:
        `into`.

    Raises:
        GuardbenchError: no such repository, commit or file; too many bytes or files; a path that could
            mean another place; the connection fails, or what arrived is not what was listed.
    """
    check_repo(repo)
    if not _COMMIT.fullmatch(revision):
        raise GuardbenchError(
            f"{repo}: revision {printable(revision, 60)!r} is no commit; give its 40 hexadecimal "
            "digits, since a branch or tag may change."
        )
    require_free(into)
    if commit_of(repo, revision) != revision:
        raise GuardbenchError(f"{repo}: {revision} names a branch or tag there, not a commit.")
    files = _data_files(repo, revision)
    total = sum(file.size for file in files)
    if total > limit:
        raise GuardbenchError(
            f"{repo}: its {len(files)} data files are {total} bytes together, over the limit of {limit}."
        )
    with downloaded(repo, revision, files, into, progress) as arrived, atomic_folder(into) as part:
        for path, file in arrived.items():
            (part / path).parent.mkdir(parents=True, exist_ok=True)
            file.replace(part / path)
    return into


def check_repo(repo: str) -> None:
    """Raises a GuardbenchError unless `repo` could be the name of a repository, `OWNER/NAME`."""
    if not _REPO.fullmatch(repo) or "--" in repo or ".." in repo or len(repo) > 96:
        raise GuardbenchError(
            f"{printable(repo, 120)!r} is no name of a repository on the Hub; give OWNER/NAME, such as "
            "jane/imagenette-guard-ipc10."
        )


def check_revision(revision: str) -> None:
    """Raises a GuardbenchError unless `revision` could be a branch, a tag or a commit."""
    if not _REVISION.fullmatch(revision) or ".." in revision or "//" in revision:
        raise GuardbenchError(
            f"{printable(revision, 120)!r} is no revision; give a branch, a tag or a commit."
        )


def commit_of(repo: str, revision: str | None) -> str:
    """The commit that `revision` stands for, the head of the main branch by default."""
    with answered(repo):
        commit = client().dataset_info(repo, revision=revision).sha
    if commit is None or not _COMMIT.fullmatch(commit):
        raise GuardbenchError(f"{repo}: the Hub names no commit of it; is anything in it?")
    return commit


def named_files(repo: str, commit: str, paths: Iterable[str]) -> dict[str, RemoteFile]:
    """Those of `paths` that are files of `repo` at `commit`; the rest of it is not looked at."""
    wanted = list(paths)
    with answered(repo):
        found = client().get_paths_info(repo, wanted, revision=commit, repo_type="dataset")
    return {
        entry.path: _remote(entry)
        for entry in found
        if isinstance(entry, RepoFile) and entry.path in wanted
    }


@contextmanager
def downloaded(
    repo: str, commit: str, files: Iterable[RemoteFile], into: Path, progress: Progress
) -> Iterator[dict[str, Path]]:
    """Fetches `files` to a hidden folder beside `into`, checks them, and gives path -> local file.

    The folder goes when the block ends. Where not all files arrive it stays, and the next call with
    the same commit goes on with those that are in it.

    Raises:
        GuardbenchError: as `fetch_dataset`.
    """
    wanted = list(files)
    scratch = into.resolve().with_name(f".{into.resolve().name}.{commit[:12]}.hub")
    arrived: dict[str, Path] = {}
    kilobytes = sum(-(-file.size // 1000) for file in wanted)
    with explained(into), progress.stage(f"download {repo}", kilobytes, "kB") as stage:
        for file in wanted:
            arrived[file.path] = _download(repo, commit, file, scratch, stage)
    try:
        yield arrived
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _download(repo: str, commit: str, file: RemoteFile, scratch: Path, stage: Stage) -> Path:
    done = stage.done - (-file.size // 1000)
    with answered(repo, kept=True):
        client().hf_hub_download(
            repo,
            file.path,
            repo_type="dataset",
            revision=commit,
            local_dir=scratch,
            tqdm_class=_counting(repo, file, stage),
        )
    local = scratch / file.path
    linked = any(
        place.is_symlink() for place in (local, *local.parents) if scratch in place.parents
    )
    if linked or not local.is_file() or local.stat().st_size != file.size:
        shutil.rmtree(scratch, ignore_errors=True)
        raise GuardbenchError(
            f"{repo}: {file.path}: what arrived is not as long as it was listed; try again."
        )
    if file.sha256 is not None and canonical.file_digest(local) != file.sha256:
        shutil.rmtree(scratch, ignore_errors=True)
        raise GuardbenchError(
            f"{repo}: {file.path}: what arrived has not the SHA-256 that was listed; try again."
        )
    stage.advance(done - stage.done)
    return local


def _counting(repo: str, file: RemoteFile, stage: Stage) -> type[tqdm]:
    """A silent bar of huggingface_hub's kind that advances `stage`, and ends what does not end itself."""
    start = stage.done
    whole = -(-file.size // 1000)

    class Counting(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]
            self.received = 0

        def update(self, n: float | None = 1) -> None:
            self.received += int(n or 0)
            if self.received > 2 * file.size + _SLACK:
                raise GuardbenchError(
                    f"{repo}: {file.path}: more arrives than the {file.size} bytes listed; stopped."
                )
            fresh = start + min(self.received // 1000, whole) - stage.done
            if fresh > 0:
                stage.advance(fresh)

        # With these two, transfers that count twice (network and file) do so in two places.
        def update_transfer(self, n: float | None = 1) -> None:
            pass

        def set_transfer_postfix_str(self, text: str = "", refresh: bool = True) -> None:
            pass

    return Counting


def _data_files(repo: str, commit: str) -> list[RemoteFile]:
    """The parquet and safetensors files, by path; a listing without end or with odd names is refused."""
    files: list[RemoteFile] = []
    seen = 0
    with answered(repo):
        for entry in client().list_repo_tree(
            repo, recursive=True, revision=commit, repo_type="dataset"
        ):
            seen += 1
            if seen > MAX_ENTRIES:
                raise GuardbenchError(
                    f"{repo}: it has more than {MAX_ENTRIES} files and folders; put the data in a few."
                )
            if isinstance(entry, RepoFile) and entry.path.endswith(SUFFIXES):
                files.append(_remote(entry))
    # Of what `push` has sent: neither the teacher, which a form names itself, nor the copy as PNGs.
    exact = [file for file in files if file.path.rpartition("/")[2] == EXACT]
    files = exact or files
    if not files:
        raise GuardbenchError(
            f"{repo}: no {' or '.join(SUFFIXES)} file is in it at {commit[:12]}; other kinds are not read."
        )
    if len(files) > MAX_FILES:
        raise GuardbenchError(
            f"{repo}: {len(files)} data files, over the limit of {MAX_FILES}; merge them."
        )
    folded = [file.path.casefold() for file in files]
    for file in files:
        parts = file.path.split("/")
        if len(file.path) > 240 or not all(_PART.fullmatch(part) for part in parts):
            raise GuardbenchError(
                f"{repo}: {printable(file.path, 120)!r}: not a path that is fetched; use letters, "
                "digits and ._+=- in names."
            )
        if folded.count(file.path.casefold()) > 1:
            raise GuardbenchError(
                f"{repo}: {file.path}: another file differs from it by capitals only; rename one."
            )
    return sorted(files, key=lambda file: file.path)


def _remote(entry: RepoFile) -> RemoteFile:
    size = entry.lfs.size if entry.lfs is not None else entry.size
    if not isinstance(size, int) or size < 0:
        raise GuardbenchError(f"{printable(entry.path, 120)!r}: the Hub gives no size of it.")
    return RemoteFile(entry.path, size, None if entry.lfs is None else entry.lfs.sha256)


@contextmanager
def answered(repo: str, *, kept: bool = False) -> Iterator[None]:
    """Turns what huggingface_hub raises into one line: what is wrong with `repo`, and the way out.

    Args:
        kept: files that arrived before the failure stay for the next try.
    """
    try:
        yield
    except (_HTTP_ERROR, OSError, EntryNotFoundError, RuntimeError, ValueError, KeyError) as error:
        cause = _underlying(error)
        if isinstance(cause, OSError) and cause.errno and not isinstance(cause, ConnectionError):
            raise cause from None  # of the disk here, which `explained` knows
        tail = " What has arrived is kept; the same command goes on from there." if kept else ""
        raise GuardbenchError(f"{repo}: {_reason(cause)}{tail}") from error


def _underlying(error: BaseException) -> BaseException:
    """The error that another one was made of: of a lookup or an upload that failed for a reason."""
    wrapped = isinstance(error, LocalEntryNotFoundError) or type(error) in (
        RuntimeError,
        ValueError,
    )
    return error.__cause__ if wrapped and error.__cause__ is not None else error


_KINDS: Mapping[type[BaseException], str] = {  # the first that fits; gated is a kind of not found
    GatedRepoError: f"is gated; ask for access on its page at the Hub, then {_LOGIN}.",
    RepositoryNotFoundError: "no such dataset on the Hub, or a private one that this token may not "
    f"see; check the name, or {_LOGIN}.",
    RevisionNotFoundError: "no such revision; give a branch, a tag or a commit that is there.",
    EntryNotFoundError: "a file that was listed is not there.",
    LocalTokenNotFoundError: f"no token; {_LOGIN}.",
    OfflineModeIsEnabled: "HF_HUB_OFFLINE is set, so the Hub is not asked; unset it.",
}
_STATUSES = {
    401: f"the Hub does not accept this token; {_LOGIN}.",
    403: "this token may not do that; it needs permission to write there "
    "(https://huggingface.co/settings/tokens).",
    409: "the repository changed at the same time; run the same command again.",
    412: "the repository changed at the same time; run the same command again.",
    413: "the Hub finds it too large.",
    429: "too many requests; wait some minutes and run the same command again.",
}


def _reason(error: BaseException) -> str:
    for kind, text in _KINDS.items():
        if isinstance(error, kind):
            return text
    said = printable(brief(error))
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status >= 500:
            return f"the Hub has trouble ({status}); try again later."
        return _STATUSES.get(status, f"the Hub answered {status}: {said}.")
    if isinstance(error, (_HTTP_ERROR, ConnectionError)):
        return f"the Hub cannot be reached ({said}); check the network, and HF_ENDPOINT where it is set."
    return f"the Hub's answer cannot be used ({said})."
