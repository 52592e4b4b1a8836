"""The cells of a suite, run one after another: each by `guardbench run`, in a process of its own.

So a cell that dies, even by running out of memory, takes no other with it, and its record says the memory
that it used itself.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from types import FrameType

from guardbench.pipeline import Settings
from guardbench.records import ResultRecord
from guardbench.suite import Cell, recorded

_SAID = {"overrides": "set"}  # the fields of Settings that the option calls otherwise
_STOPS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]


def words(settings: Settings) -> list[str]:
    """What is typed after `guardbench` for a run of these settings."""
    found = ["run"]
    for each in fields(settings):
        option = "--" + _SAID.get(each.name, each.name).replace("_", "-")
        value = getattr(settings, each.name)
        if value is True:
            found.append(option)
        elif isinstance(value, tuple):
            found += [word for one in value for word in (option, str(one))]
        elif value is not None and value is not False:
            found += [option, str(value)]
    return found


@dataclass(frozen=True)
class Ended:
    """How a cell's run ended: its exit code, and in words why, where that is not 0."""

    code: int
    reason: str = ""

    @property
    def stopped(self) -> bool:
        """Whether somebody asked it to stop, so that the suite does too."""
        return self.code - 128 in _STOPS


class Runner:
    """Runs cells; while `stopping` lasts, a wish to stop reaches the one that runs.

    Args:
        launcher: what comes before `-m guardbench`: by default this Python, else such as
            `accelerate launch --multi_gpu --num_processes 4`.
    """

    def __init__(self, launcher: Sequence[str] = ()) -> None:
        self.launcher = list(launcher) or [sys.executable]
        self._process: subprocess.Popen[str] | None = None
        self._asked: list[int] = []  # the signals that came

    def run(self, settings: Settings) -> Ended:
        """Runs one cell to its end; what it prints is printed."""
        if self._asked:
            return Ended(128 + self._asked[0])
        last = ""
        with subprocess.Popen(
            [*self.launcher, "-m", "guardbench", *words(settings)],
            stderr=subprocess.PIPE, text=True, errors="replace",
            start_new_session=True,  # Ctrl-C reaches it once, through `stopping`, and not twice
        ) as self._process:  # fmt: skip
            assert self._process.stderr is not None
            for number in self._asked:  # while the process began
                self._tell(number)
            for line in self._process.stderr:
                sys.stderr.write(line)
                last = line.strip() or last
        code, self._process = self._process.returncode, None
        if self._asked:
            return Ended(128 + self._asked[0])
        if code < 0:
            killed = signal.Signals(-code).name
            return Ended(128 - code, f"killed by {killed}; out of memory?")
        return Ended(code, last.removeprefix("error: ") if code else "")

    def _tell(self, number: int) -> None:
        """Passes a signal on to the cell, and to all that its launcher has started in its session."""
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError, PermissionError):  # it has just ended
                os.killpg(self._process.pid, number)

    @contextmanager
    def stopping(self) -> Iterator[None]:
        """Inside, SIGINT, SIGTERM and SIGHUP end the cell that runs in its own way, and no other begins."""

        def tell(number: int, _: FrameType | None) -> None:
            self._asked.append(number)
            self._tell(number)

        before = {each: signal.signal(each, tell) for each in _STOPS}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)


@dataclass(frozen=True)
class Result:
    """What became of a cell.

    Attributes:
        state: `done` before or now, `failed`, `cannot be run`, or `to do` where the suite stopped earlier.
        seconds: that this command took for it; None where it did not run.
        reason: why it failed or cannot be run.
        record: what was measured, where it is done.
    """

    cell: Cell
    state: str
    seconds: float | None = None
    reason: str = ""
    record: ResultRecord | None = None


def result_of(cell: Cell, ended: Ended | None = None, seconds: float | None = None) -> Result:
    """The result of a cell that has ended so, or that has not been run by this command."""
    if cell.plan is None:
        return Result(cell, "cannot be run", reason=cell.refusal)
    if cell.record is not None or ended is None:
        return Result(cell, "to do" if cell.record is None else "done", record=cell.record)
    if ended.stopped:
        return Result(cell, "to do", seconds)
    record = recorded(cell.plan) if ended.code == 0 else None
    if record is None:
        return Result(
            cell, "failed", seconds, ended.reason or "it left no record that fits the plan"
        )
    return Result(cell, "done", seconds, record=record)
