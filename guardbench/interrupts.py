"""SIGINT and SIGTERM: the step is finished, its stage saved, and the command ends with 130 or 143.

Between stages a signal ends the command where it stands. Inside one it waits for the next checkpoint, so
that no step is torn and nothing that was computed is lost; a step that takes longer than `GRACE_S` is given
up, and the stage goes on from its last checkpoint. A second signal ends the process at once, unless it is
the first once more, by another way.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

GRACE_S = 3.0
"""How long a step may take that began before the signal."""
_ONE_REQUEST_S = 0.5
"""A scheduler's signal may come by several ways: from it, from the launcher, from the suite."""
_AGAIN_S = 0.5  # an exception that some library's callback swallowed is raised once more after that
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """A signal asked for the end. No `Exception`, so that nothing but the command line takes it."""


@dataclass
class _Ear:
    """What has been heard; signals come to the main thread alone, so there is one a process.

    Attributes:
        pid: the process that hears; those that it forks, such as a loader's workers, it ends itself.
        signum: of the first signal, None before it.
        at: when it came.
        stages, writes: how many `inside_stage` and `unbroken` blocks are open.
        late: whether the grace is over.
        said: how to go on.
    """

    pid: int = 0
    signum: int | None = None
    at: float = 0.0
    stages: int = 0
    writes: int = 0
    late: bool = False
    said: str = "interrupted; run the same command again"


_ear = _Ear()


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Inside, the two signals end the program with one line and their code. Blocks may nest.

    Outside of the main thread, and on Windows, everything is as Python has it.
    """
    ours = signal.getsignal(signal.SIGTERM) is _hear
    main = threading.current_thread() is threading.main_thread()
    if ours or not main or sys.platform == "win32":
        yield
        return
    _ear.pid = os.getpid()
    before = {each: signal.signal(each, _hear) for each in _SIGNALS}
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, _over)
    try:
        yield
    # Broad on purpose: a C extension that is being imported turns what a handler raises into an error of
    # its own. Once a signal has come, whatever ends the program ends it for that reason.
    except BaseException as error:
        if _ear.signum is None or isinstance(error, SystemExit):
            raise
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(_ear.said, file=sys.stderr, flush=True)
        sys.exit(128 + _ear.signum)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for each, handler in before.items():
            signal.signal(each, handler)
        _forget()


@contextlib.contextmanager
def inside_stage(name: str) -> Iterator[None]:
    """Inside, a signal waits for `stop`, for the end of the block, or for `GRACE_S` seconds."""
    _ear.stages += 1
    try:
        yield
    finally:
        _ear.stages -= 1
    stop(f"{name} is finished")


@contextlib.contextmanager
def unbroken() -> Iterator[None]:
    """Inside, as while a file is written, nothing is raised however long it takes."""
    _ear.writes += 1
    try:
        yield
    finally:
        _ear.writes -= 1
    if _ear.signum is not None and not _ear.writes and (_ear.late or not _ear.stages):
        _raise()


def wanted() -> bool:
    """Whether a signal asks for a checkpoint and the end."""
    return _ear.signum is not None


def stop(what: str) -> None:
    """Ends the command if a signal has asked for it.

    Args:
        what: is safe, such as `squeeze is saved`.

    Raises:
        Interrupted: it has.
    """
    if wanted():
        _ear.said = f"interrupted; {what}: run the same command again to go on from there"
        raise Interrupted


def _hear(signum: int, _frame: FrameType | None) -> None:
    if os.getpid() != _ear.pid:
        if signum == signal.SIGTERM:
            os._exit(128 + signum)
        return
    if signum == _ear.signum and time.monotonic() - _ear.at < _ONE_REQUEST_S:
        return
    if _ear.signum is not None:
        shown = "\x1b[?25h" if sys.stderr.isatty() else ""  # the cursor, which a progress bar hides
        os.write(2, f"{shown}left at once; run the same command again\n".encode())
        os._exit(128 + signum)
    _ear.signum, _ear.at = signum, time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, GRACE_S, _AGAIN_S)
    if not _ear.stages and not _ear.writes:
        _raise()


def _over(_signum: int, _frame: FrameType | None) -> None:
    _ear.late = True
    if not _ear.writes:
        _raise()


def _raise() -> None:
    if _ear.stages:
        _ear.said = "interrupted in a long step; run the same command again to go on from the last checkpoint"
    raise Interrupted


def _forget() -> None:
    fresh = _Ear()
    _ear.signum, _ear.late, _ear.said = fresh.signum, fresh.late, fresh.said
