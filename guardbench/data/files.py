"""Where the cache lies, who builds an entry of it, and what is said when it cannot be written."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from guardbench.errors import GuardbenchError
from guardbench.progress import Progress

if sys.platform != "win32":
    import fcntl

CACHE_VARIABLE = "GUARDBENCH_CACHE"
_WAY_OUT = f"choose another cache folder with {CACHE_VARIABLE}"
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


def cache_root(cache_dir: Path | None) -> Path:
    """The cache folder: `cache_dir`, else GUARDBENCH_CACHE, else `~/.cache/guardbench`."""
    if cache_dir is not None:
        return cache_dir.expanduser()
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named).expanduser() if named else Path.home() / ".cache" / "guardbench"


@contextmanager
def cache_writes(target: Path) -> Iterator[None]:
    """Turns a refusal to write below the cache into one line that names the cache's setting.

    `store.explained` does the same for results, whose way out is `--output`.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise GuardbenchError(
                f"{target}: the disk is full; free some space or {_WAY_OUT}."
            ) from error
        if error.errno in _REFUSED:
            raise GuardbenchError(
                f"{target}: cannot be written ({error.strerror}); {_WAY_OUT}."
            ) from error
        raise


def require_space(target: Path, size: int) -> None:
    """Refuses to begin writing `size` bytes beside `target` where they cannot fit.

    Raises:
        GuardbenchError: the file system has less space left than that.
    """
    with cache_writes(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
    if free < size:
        raise GuardbenchError(
            f"{target.parent}: {size / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free; "
            f"free some space or {_WAY_OUT}."
        )


@contextmanager
def locked(target: Path, progress: Progress, what: str) -> Iterator[bool]:
    """Lets one process at a time build `target`; says so where it has to wait.

    The lock is the kernel's (flock), so that it dies with its process, however that ends. It
    gives whether it is held: a file system or a platform without such locks gives False, and then
    two builders both build and the last rename wins, which is safe because they build the same.

    Raises:
        GuardbenchError: the folder of `target` cannot be written.
    """
    lock = target.with_name(f".{target.name}.lock")
    with cache_writes(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        yield _take(handle, progress, what)
    finally:
        os.close(handle)


def _take(handle: int, progress: Progress, what: str) -> bool:
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if progress.console is not None:
            progress.console.print(
                f"{what}: waiting for another process that is at it", soft_wrap=True
            )
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def remove_stale_parts(target: Path) -> None:
    """Removes what a killed builder of `target` left; only for the holder of its lock."""
    for part in target.parent.glob(f".{target.name}.*.part"):
        part.unlink(missing_ok=True)
