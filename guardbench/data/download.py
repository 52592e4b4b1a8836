"""Fetches an official archive: shown, resumed where it broke off, checked, unpacked safely."""

from __future__ import annotations

import hashlib
import http.client
import re
import shutil
import stat
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from guardbench.data.catalog import Archive, DatasetInfo
from guardbench.data.files import CACHE_VARIABLE, locked, require_space
from guardbench.data.locate import Located, how_to_place
from guardbench.errors import GuardbenchError
from guardbench.progress import Progress, Stage
from guardbench.store import explained

TIMEOUT_S = 10.0
MAX_STALLS = 3
PAUSE_S = 1.0
SCRATCH_END = ".unpacking"
_PIECE = 1 << 18
_MEGABYTE = 1_000_000


def download_dataset(info: DatasetInfo, located: Located, cache: Path, progress: Progress) -> Path:
    """Fetches and unpacks the archive of `info` below `cache`/downloads; gives its folder.

    Two processes may ask at once: one downloads, the other waits and finds the folder.

    Raises:
        GuardbenchError: the address cannot be reached, the answer is not the archive, or the
            cache cannot be written. An unfinished download stays and is resumed by the next call.
    """
    archive = info.archive
    if archive is None:
        raise GuardbenchError(f"{info.name} cannot be downloaded; {how_to_place(info)}.")
    folder = cache / "downloads" / archive.folder
    with locked(folder, progress, f"download of {info.name}") as held:
        if folder.is_dir():
            return folder
        if held:
            for left in folder.parent.glob(f".{folder.name}.*{SCRATCH_END}"):  # by a kill
                shutil.rmtree(left, ignore_errors=True)
        target = folder.with_name(archive.filename)
        try:
            # The catalogue's sizes are rounded; twice that is certainly not the archive.
            limit = 2 * max(archive.megabytes, 1) * _MEGABYTE
            fetch(archive.url, target, hexdigest=archive.md5, limit=limit, progress=progress)
        except GuardbenchError as error:
            raise GuardbenchError(
                f"{info.name} was not found ({located.searched}) and its download failed: {error} "
                f"By hand: save {archive.url} as {target}, or {how_to_place(info)}."
            ) from error
        unpack(target, folder, archive, progress)
        target.unlink(missing_ok=True)
    return folder


def fetch(
    url: str,
    target: Path,
    *,
    hexdigest: str,
    limit: int,
    progress: Progress,
    timeout: float = TIMEOUT_S,
    allowed: Callable[[str], None] | None = None,
) -> None:
    """Downloads `url` to `target`, by way of `target`.part, which a later call continues.

    A connection that breaks is taken up again with an HTTP Range request, as often as bytes
    arrive; `MAX_STALLS` attempts in a row without any end it. A server that ignores Range makes it
    start from the beginning.

    Args:
        url: an http or https address.
        target: the finished file; if it is there with the right digest, nothing is fetched.
        hexdigest: of the whole file: 32 figures are an MD5, all that some datasets' authors publish, and
            64 a SHA-256.
        limit: bytes beyond which it cannot be the file, so that no server fills the disk.
        progress: where the stage is shown.
        timeout: seconds to wait for a connection, and for each read.
        allowed: asked about `url` and every address that it leads to; raises to refuse one.

    Raises:
        GuardbenchError: unreachable, refused, a web page instead of a file, cut off too often, or
            too long or of the wrong digest (what arrived is then removed).
    """
    if not url.startswith(("https://", "http://")):
        raise GuardbenchError(f"{url}: only http and https addresses can be fetched.")
    opener = urllib.request.build_opener(_Redirects(allowed))
    if target.is_file() and _digest(target, hexdigest) == hexdigest:
        return
    part = target.with_name(f"{target.name}.part")
    with explained(part, option=CACHE_VARIABLE):
        part.parent.mkdir(parents=True, exist_ok=True)
    stalls, furthest = 0, _size(part)
    while not _continue(opener, url, part, limit, progress, timeout):
        time.sleep(PAUSE_S)
        arrived = _size(part)
        stalls = 0 if arrived > furthest else stalls + 1
        furthest = max(furthest, arrived)
        if stalls >= MAX_STALLS:
            raise GuardbenchError(
                f"{url}: the connection broke {stalls} times without progress; {arrived} bytes are "
                f"kept in {part}, and the same command continues from there."
            )
    found = _digest(part, hexdigest)
    if found != hexdigest:
        size = _size(part)
        part.unlink()
        raise GuardbenchError(
            f"{url}: what arrived ({size} bytes) has {_kind(hexdigest)} {found} and not {hexdigest}; it "
            "was removed, so try again or get the file elsewhere."
        )
    part.replace(target)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirect only from https to https, and only where its caller allows it."""

    def __init__(self, allowed: Callable[[str], None] | None) -> None:
        self.allowed = allowed

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """See the base class."""
        if req.full_url.startswith("https://") and not newurl.startswith("https://"):
            raise GuardbenchError(
                f"{req.full_url}: leads to an address without https; not followed."
            )
        if self.allowed is not None:
            self.allowed(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _kind(hexdigest: str) -> str:
    return "MD5" if len(hexdigest) == 32 else "SHA-256"


def _digest(path: Path, like: str) -> str:
    """Hex digest of a file, of the kind of `like`."""
    sha = hashlib.md5(usedforsecurity=False) if _kind(like) == "MD5" else hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            sha.update(piece)
    return sha.hexdigest()


def _continue(
    opener: urllib.request.OpenerDirector,
    url: str,
    part: Path,
    limit: int,
    progress: Progress,
    timeout: float,
) -> bool:
    """One request for what `part` still lacks; gives whether the file is now whole."""
    have = _size(part)
    headers = {"User-Agent": "guardbench", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        request = urllib.request.Request(url, headers=headers)
        response = opener.open(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:
            # Nothing lies after the bytes we have: they are all, or they are of another file.
            if error.headers.get("Content-Range") == f"bytes */{have}":
                return True
            part.unlink(missing_ok=True)
            return False
        raise GuardbenchError(f"{url}: the server answered {error.code} {error.reason}.") from error
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        kept = f"; {have} bytes of it are kept, and the next try continues there" if have else ""
        raise GuardbenchError(f"{url} cannot be reached ({reason}){kept}.") from error
    with response:
        try:
            return _receive(response, url, part, limit, progress)
        except (OSError, http.client.HTTPException):
            return False  # broken off: what arrived is in `part`


def _receive(
    response: http.client.HTTPResponse, url: str, part: Path, limit: int, progress: Progress
) -> bool:
    if "text/html" in response.headers.get("Content-Type", ""):
        raise GuardbenchError(f"{url}: the server answered with a web page instead of the file.")
    start = 0
    if response.status == 206:
        span = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
        if span is None or int(span[1]) != _size(part):
            part.unlink(missing_ok=True)
            return False
        start = _size(part)
    whole = start + response.length if response.length else None
    if whole is not None:
        _within(limit, whole, url, part)
        require_space(part, whole - start)
    with (
        explained(part, option=CACHE_VARIABLE),
        part.open("ab" if start else "wb") as stream,
        progress.stage(
            f"download {part.stem}",
            (whole or start) // _MEGABYTE,
            "MB",
            done=start // _MEGABYTE,
        ) as stage,
    ):
        while piece := response.read(_PIECE):
            _within(limit, stream.tell() + len(piece), url, part)
            stream.write(piece)
            _show(stage, stream.tell())
    return whole is None or _size(part) == whole


def _within(limit: int, size: int, url: str, part: Path) -> None:
    if size > limit:
        part.unlink(missing_ok=True)
        raise GuardbenchError(
            f"{url}: the server sends {size} bytes or more where at most {limit} are expected; "
            "what arrived was removed."
        )


def _show(stage: Stage, position: int) -> None:
    fresh = position // _MEGABYTE - stage.done
    if fresh > 0:
        stage.advance(fresh)


def unpack(archive_file: Path, folder: Path, archive: Archive, progress: Progress) -> None:
    """Unpacks a verified archive so that `folder` appears whole or not at all.

    Raises:
        GuardbenchError: the archive is broken, reaches outside its folder, or lacks it.
    """
    with explained(folder, option=CACHE_VARIABLE):
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Of its own, for where there are no locks and another process unpacks the same.
        made = tempfile.mkdtemp(SCRATCH_END, f".{folder.name}.", folder.parent)
    scratch = Path(made)
    try:
        with explained(folder, option=CACHE_VARIABLE):
            if archive.filename.endswith(".zip"):
                _unzip(archive_file, scratch, progress)
            else:
                _untar(archive_file, scratch, progress)
            inner = scratch / archive.folder
            if not inner.is_dir():
                raise GuardbenchError(f"{archive_file}: holds no folder {archive.folder!r}.")
            if not folder.is_dir():
                inner.replace(folder)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise GuardbenchError(
            f"{archive_file}: cannot be unpacked ({error}); remove it and run again."
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _untar(archive_file: Path, into: Path, progress: Progress) -> None:
    if not hasattr(tarfile, "data_filter"):
        raise GuardbenchError(
            f"{archive_file}: this Python is too old to unpack it safely: take 3.10.12, 3.11.4 or later."
        )
    total = _size(archive_file) // _MEGABYTE
    with (
        archive_file.open("rb") as raw,
        tarfile.open(fileobj=raw, mode="r:*") as tar,
        progress.stage(f"unpack {archive_file.name}", total, "MB") as stage,
    ):
        for member in tar:
            # "data" refuses absolute paths, paths and links that lead out, and devices.
            tar.extract(member, into, filter="data")
            _show(stage, raw.tell())


def _unzip(archive_file: Path, into: Path, progress: Progress) -> None:
    with zipfile.ZipFile(archive_file) as archive:
        members = archive.infolist()
        for member in members:
            path = PurePosixPath(member.filename.replace("\\", "/"))
            if path.is_absolute() or ".." in path.parts or stat.S_ISLNK(member.external_attr >> 16):
                raise GuardbenchError(
                    f"{archive_file}: the entry {member.filename!r} leads out of the archive; "
                    "nothing was unpacked."
                )
        with progress.stage(f"unpack {archive_file.name}", len(members), "files") as stage:
            for member in members:
                archive.extract(member, into)
                stage.advance()
