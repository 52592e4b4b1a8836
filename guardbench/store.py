"""Files that are either whole or absent: written beside their place, then renamed."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from guardbench.errors import GuardbenchError, brief
from guardbench.interrupts import unbroken

_PROBE = ".guardbench-"
_REFUSALS = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG,
    errno.EFBIG, errno.EIO, errno.ESTALE,
)  # fmt: skip


@contextmanager
def atomic_path(target: Path, *, option: str = "--output") -> Iterator[Path]:
    """Gives a temporary path beside `target`; renames it to `target` when the block ends well.

    Args:
        target: where to.
        option: the command-line option that names another place, for the error.

    Raises:
        GuardbenchError: the folder cannot be written or the disk is full; `target` is as it was.
    """
    with explained(target, option=option):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            prefix=f".{target.name}.", suffix=".part", dir=target.parent
        )
        os.close(handle)
        part = Path(name)
        try:
            yield part
            with part.open("rb+") as stream:
                os.fsync(stream.fileno())
            part.chmod(0o644)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: Path, *, option: str = "--output") -> Iterator[Path]:
    """Gives a fresh folder beside `target`; renames it to `target` when the block ends well.

    Args:
        target: a folder that is not there yet, or is empty.
        option: as in `atomic_path`.

    Raises:
        GuardbenchError: something is there already, or the folder cannot be written, or the disk is
            full; `target` is as it was.
    """
    require_free(target, option=option)
    place = target.resolve()
    with explained(target, option=option):
        place.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{place.name}.", suffix=".part", dir=place.parent))
        try:
            yield part
            part.chmod(0o755)
            if place.is_dir():
                place.rmdir()
            part.replace(place)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def require_free(target: Path, *, option: str = "--output") -> None:
    """Raises a GuardbenchError where there is something at `target`, or it is the current folder."""
    with explained(target, option=option):
        taken = target.exists() and (not target.is_dir() or any(target.iterdir()))
        if taken or target.resolve() == Path.cwd():
            raise GuardbenchError(
                f"{target}: something is there already; choose another folder with {option}."
            )


def write_bytes(target: Path, data: bytes) -> None:
    """Writes `data`, whole or not at all.

    Writers of other libraries report a full disk in ways of their own, so what they make goes
    through memory and this function.
    """
    with unbroken(), atomic_path(target) as part:
        part.write_bytes(data)


def write_text(target: Path, text: str, *, option: str = "--output") -> None:
    """Writes `text` as UTF-8 with Unix line ends, whole or not at all; `option` as in `atomic_path`."""
    with unbroken(), atomic_path(target, option=option) as part:
        part.write_text(text, encoding="utf-8", newline="\n")


def read_text(path: Path, *, what: str, limit: int = 64 << 20) -> str:
    """Reads a UTF-8 file of at most `limit` bytes; `what` names the kind of file in an error."""
    try:
        found = path.stat()
        size = found.st_size
        if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
            raise GuardbenchError(f"{path}: is no ordinary file, as {what} must be.")
        if size > limit:
            raise GuardbenchError(f"{path}: {what} is {size} bytes, over the limit of {limit}.")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise GuardbenchError(f"{path}: {what} is not UTF-8 text ({error.reason}).") from error
    except OSError as error:
        raise GuardbenchError(f"{path}: cannot read {what}: {error.strerror}.") from error


@contextmanager
def explained(target: Path, *, option: str = "--output") -> Iterator[None]:
    """Turns the operating system's refusal to write `target` into one line with the way out.

    So it does with a file or a folder that somebody has removed while it was needed.
    """
    try:
        yield
    except FileNotFoundError as error:
        gone = error.filename or brief(error)
        own = f".{target.name}." if target.parent.is_dir() else _PROBE  # of `atomic_path`
        if Path(gone).name.startswith((_PROBE, own)):
            raise GuardbenchError(
                f"{target}: cannot be written (nothing can be made there); choose another folder with "
                f"{option}."
            ) from error
        raise GuardbenchError(
            f"{gone}: was removed while it was needed; run the same command again."
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise GuardbenchError(
                f"{target}: the disk is full; free some space or choose another folder with {option}."
            ) from error
        if error.errno in _REFUSALS:
            raise GuardbenchError(
                f"{target}: cannot be written ({error.strerror}); choose another folder with {option}."
            ) from error
        raise


def check_writable(folder: Path) -> None:
    """Asks the file system now, not after an hour of work; leaves nothing behind."""
    with explained(folder):
        there = folder.absolute()
        while not there.exists():
            there = there.parent
        if not there.is_dir():
            raise NotADirectoryError(20, "it is a file, not a folder")
        with tempfile.NamedTemporaryFile(prefix=_PROBE, dir=there):
            pass


def check_workspace(folder: Path) -> None:
    """As `check_writable`; and refuses a checkout, whose public boards a workspace's would replace."""
    check_writable(folder)
    if (folder / "baselines").is_dir() and (folder / "pyproject.toml").is_file():
        raise GuardbenchError(
            f"--output {folder}: it is a checkout of guardbench, whose public boards would be replaced; "
            "choose a folder of its own, such as guardbench-runs."
        )
