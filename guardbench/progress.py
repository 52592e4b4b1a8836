"""One line a stage: a bar with an ETA on a terminal, sparse plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as RichProgress,
)

LOG_EVERY_S = 30.0


def clock(seconds: float) -> str:
    """`12.3 s`, `4 min 05 s` or `2 h 07 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


class Stage:
    """The progress of one stage; `advance` it as units are done, `note` what is worth seeing.

    `total` may be set again where it was only expected.
    """

    def __init__(self, name: str, total: int, unit: str, done: int) -> None:
        self.name, self.total, self.unit, self.done = name, total, unit, done
        self.message = ""
        self._within = 0.0
        self._resumed_at = done
        self._started = self._printed = time.monotonic()

    def advance(self, count: int = 1, message: str | None = None) -> None:
        """Marks `count` more units as done; `message` (such as `loss 0.31`) stands behind the bar."""
        self.done += count
        self._within = 0.0
        if message is not None:
            self.message = message
        self._show()

    def skip(self, count: int) -> None:
        """Marks units as done that cost nothing now, so that no time to come is reckoned by them."""
        self._resumed_at += count
        self.advance(count)

    def within(self, units: float, message: str) -> None:
        """Shows the share of the units to come that is done, until the next `advance`."""
        self._within, self.message = units, message
        self._show()

    @property
    def seconds(self) -> float:
        """Seconds since the stage began."""
        return time.monotonic() - self._started

    def _line(self) -> str:
        done = self.done + self._within
        rate = (done - self._resumed_at) / max(self.seconds, 1e-9)
        left = f", {clock((self.total - done) / rate)} left" if rate else ""
        tail = f"  {self.message}" if self.message else ""
        return f"{self.name}: {self.done}/{self.total} {self.unit}{left}{tail}"

    def _show(self) -> None:
        """Overridden by the stages that have somewhere to print."""


class _LogStage(Stage):
    def __init__(self, console: Console, name: str, total: int, unit: str, done: int) -> None:
        super().__init__(name, total, unit, done)
        self._console = console

    def _show(self) -> None:
        if time.monotonic() - self._printed > LOG_EVERY_S and self.done < self.total:
            self._printed = time.monotonic()
            self._console.print(self._line(), highlight=False, soft_wrap=True)


class _BarStage(Stage):
    def __init__(self, bar: RichProgress, name: str, total: int, unit: str, done: int) -> None:
        super().__init__(name, total, unit, done)
        self._bar = bar
        self._task = bar.add_task(name, total=total, completed=done, unit=unit, message="")

    def _show(self) -> None:
        done = self.done + self._within
        self._bar.update(self._task, completed=done, total=self.total, message=self.message)


class Progress:
    """Where stages report. Without a console they are silent, as library users and tests want."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console

    def say(self, text: str) -> None:
        """One line between stages."""
        if self.console is not None:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def stage(self, name: str, total: int, unit: str = "steps", done: int = 0) -> Iterator[Stage]:
        """Opens a stage of `total` units of which `done` were finished by an earlier run."""
        if self.console is None:
            yield Stage(name, total, unit, done)
            return
        if self.console.is_terminal:
            columns = (
                SpinnerColumn(finished_text="[green]✓"),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[unit]}"),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                TextColumn("[dim]{task.fields[message]}"),
            )
            with RichProgress(*columns, console=self.console) as bar:
                yield _BarStage(bar, name, total, unit, done)
            return
        stage = _LogStage(self.console, name, total, unit, done)
        yield stage
        tail = f"  {stage.message}" if stage.message else ""
        self.console.print(
            f"{name}: {stage.done}/{total} {unit} in {clock(stage.seconds)}{tail}",
            highlight=False,
            soft_wrap=True,
        )
