"""One process at a time: a file that the kernel locks, and that says who holds it.

The lock is flock's, so that it dies with its process, however that ends. On NFS it reaches other machines
where the mount has locking (`nolock` and `local_lock=flock` leave it on the machine); a file system without
any, such as Lustre without `-o flock`, has none, and then two processes may build the same thing.
(The `filelock` package empties the file at each attempt, and so could not say who holds it.)
"""

from __future__ import annotations

import datetime
import errno
import os
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_LIMIT = 400  # characters of what a lock says of its holder
_POLL_S, _MINUTE = 0.25, 60
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


@contextmanager
def locked(
    lock: Path, waiting: Callable[[str], None], again: Callable[[], object] = lambda: None
) -> Iterator[bool]:
    """Holds the lock file `lock` to the end of the block; it is removed with it.

    Args:
        lock: made if it is not there, with its folder.
        waiting: hears who holds it, such as `pid 12 on node3 since 2026-01-02 14:02:11: guardbench run`,
            before this process waits.
        again: called once a minute while it waits.

    Gives:
        Whether it is held; False where the file system or the platform has no such locks.

    Raises:
        OSError: the folder cannot be written.
    """
    handle, held = _taken(lock, waiting, again)
    try:
        if held:
            os.ftruncate(handle, 0)
            os.pwrite(handle, _holder().encode(), 0)
        yield held
    finally:
        if held and _is(handle, lock):
            lock.unlink(missing_ok=True)
        os.close(handle)


def _taken(
    lock: Path, waiting: Callable[[str], None], again: Callable[[], object]
) -> tuple[int, bool]:
    while True:
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            held = _take(handle, waiting, again)
        except BaseException:
            os.close(handle)
            raise
        if not held or _is(handle, lock):
            return handle, held
        os.close(handle)  # whoever held it has removed it: the lock is another file by now


def _take(handle: int, waiting: Callable[[str], None], again: Callable[[], object]) -> bool:
    if sys.platform == "win32":
        return False
    asked = 0
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if asked == 0:
                said = os.pread(handle, 4 * _LIMIT, 0).decode(errors="replace")
                waiting("".join(c for c in said if c.isprintable()) or "it has not said who it is")
            asked += 1
            if asked % (_MINUTE / _POLL_S) == 0:
                again()
            time.sleep(_POLL_S)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return False
        else:
            return True


def _is(handle: int, lock: Path) -> bool:
    """Whether the open file is still the one at that path."""
    try:
        return os.path.samestat(os.fstat(handle), lock.stat())
    except FileNotFoundError:
        return False


def _holder() -> str:
    # For people alone: nothing is decided by this clock.
    since = datetime.datetime.now().isoformat(sep=" ", timespec="seconds")
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    return f"pid {os.getpid()} on {socket.gethostname()} since {since}: {shlex.join(words)}"[
        :_LIMIT
    ]
