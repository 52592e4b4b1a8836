"""Where the cache lies, who builds an entry of it, and what is said when it cannot be written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from guardbench import locks
from guardbench.errors import GuardbenchError
from guardbench.progress import Progress
from guardbench.store import explained

CACHE_VARIABLE = "GUARDBENCH_CACHE"


def cache_root(cache_dir: Path | None) -> Path:
    """The cache folder: `cache_dir`, else GUARDBENCH_CACHE, else `~/.cache/guardbench`.

    Raises:
        GuardbenchError: see `at_home`.
    """
    if cache_dir is not None:
        return at_home(cache_dir, "--cache-dir")
    named = os.environ.get(CACHE_VARIABLE) or "~/.cache/guardbench"
    return at_home(Path(named), CACHE_VARIABLE)


def at_home(path: Path, setting: str) -> Path:
    """`path`, its `~` or `~user` replaced by the home folder.

    Args:
        setting: the option or variable that names it, or that may.

    Raises:
        GuardbenchError: no home folder is known, as in some containers, or no such user.
    """
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise GuardbenchError(
            f"{path}: no such home folder is known here; name a folder by its whole path with {setting}."
        ) from error


def require_space(target: Path, size: int) -> None:
    """Refuses to begin writing `size` bytes beside `target` where they cannot fit.

    Raises:
        GuardbenchError: the file system has less space left than that.
    """
    with explained(target, option=CACHE_VARIABLE):
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
    if free < size:
        raise GuardbenchError(
            f"{target.parent}: {size / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free; "
            f"free some space or choose another folder with {CACHE_VARIABLE}."
        )


@contextmanager
def locked(target: Path, progress: Progress, what: str) -> Iterator[bool]:
    """Lets one process at a time build `target`; says so where it has to wait.

    It gives whether the lock is held, see `locks.locked`: where there are none, two builders both build
    and one's rename wins, which is safe because they build the same. (Two downloads of one archive spoil
    each other; its digest then says so.)

    Raises:
        GuardbenchError: the folder of `target` cannot be written.
    """
    lock = target.with_name(f".{target.name}.lock")

    def waiting(holder: str) -> None:
        progress.say(f"{what}: waiting for another process that is at it: {holder}")

    with ExitStack() as stack:
        with explained(lock, option=CACHE_VARIABLE):
            held = stack.enter_context(locks.locked(lock, waiting))
        yield held


def remove_stale_parts(target: Path) -> None:
    """Removes what a killed builder of `target` left; only for the holder of its lock."""
    for part in target.parent.glob(f".{target.name}.*.part"):
        part.unlink(missing_ok=True)
