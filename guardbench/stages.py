"""Folders of stages, which survive a kill.

A stage is keyed by a digest of everything that shapes its result. Its folder holds checkpoints while
it runs and a `stage.json` once it is finished; a finished stage is never run again.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from guardbench import canonical, interrupts, locks
from guardbench.devices import MemoryMeter, device_name, others_on
from guardbench.errors import GuardbenchError, brief, not_now
from guardbench.processes import Processes
from guardbench.records import StageCost
from guardbench.sealed import read_sealed, write_sealed
from guardbench.store import explained, write_text

CHECKPOINT_EVERY_S = 20.0
_WITHOUT_LOCKS: set[Path] = set()  # workspaces of which it has been said


class _OutdatedError(ValueError):
    """A checkpoint was made from other files than those that are there now."""


@dataclass
class StageFolder:
    """One stage of a run on disk.

    Attributes:
        name: `squeeze`, `recover`, `relabel`, `student 0`, `attack pgd100 0` and so on.
        path: its folder.
        words: everything that shaped its result; `key` is their digest.
        processes: of the run. Its first one reads and writes the folder and tells the others, so each
            method but `due_alone`, `checkpoint`, `checkpoint_own` and `own` must be called by all of them.
        say: where a line goes that the user should see.
        made: the keys of the stages that this run has finished itself.
        commit: of the code that runs.
    """

    name: str
    path: Path
    words: Mapping[str, Any]
    processes: Processes
    say: Callable[[str], None]
    made: set[str]
    commit: str | None
    _alone: bool = field(default=False, init=False)
    _begun: float = field(default=0.0, init=False)
    _told: bool = field(default=False, init=False)
    _made_from: str | None = field(default=None, init=False)
    _spent: float = field(default=0.0, init=False)
    _begun_by: tuple[str | None, ...] = field(default=(), init=False)
    _saved: float = field(default=0.0, init=False)
    _took: float = field(default=0.0, init=False)
    _calls: int = field(default=0, init=False)
    _ask_at: int = field(default=0, init=False)
    _meter: MemoryMeter | None = field(default=None, init=False)

    @property
    def key(self) -> str:
        """SHA-256 of `words`."""
        return canonical.digest(self.words)

    @property
    def checkpoint_path(self) -> Path:
        """Where the unfinished stage keeps its state."""
        return self.path / "checkpoint.pt"

    @property
    def _finished_path(self) -> Path:
        return self.path / "stage.json"

    @property
    def own_path(self) -> Path:
        """Where this process, of several, keeps what `checkpoint` cannot hold of all of them."""
        return self.path / f"checkpoint-{self.processes.rank}-of-{self.processes.count}.pt"

    @property
    def reused(self) -> bool:
        """Whether what it left is of an earlier run, or of another one at the same time."""
        return self.key not in self.made

    @contextlib.contextmanager
    def claimed(self, made_from: str | None = None) -> Iterator[dict[str, Any] | None]:
        """Gives what `finish` stored, or None when the stage is left to the block, and to it alone.

        Args:
            made_from: digest of the files that it works on, where its key holds only what made them: these
                may have been deleted and made anew, with other bits on another device. What was made from
                others is then removed, and the stage left to the block.

        Waits while another process is at it, says who that is, and then reads what it has left. Inside,
        a signal waits for the next checkpoint (`interrupts.inside_stage`).
        """
        self._made_from = made_from
        stored = self.finished()
        if stored is not None:
            yield stored
            return
        with contextlib.ExitStack() as stack:
            self._lock(stack)
            stored = self.processes.from_main(lambda: self._finished(claimed=True))
            if stored is None:
                stack.enter_context(interrupts.inside_stage(self.name))
            yield stored

    def _lock(self, stack: contextlib.ExitStack) -> None:
        """Holds the folder's lock to the end of `stack`; the others hear that it waits."""
        if not self.processes.main:
            while self._told_to_wait(wait=True):
                pass
            return
        lock = self.path / ".lock"
        with explained(lock):
            held = locks.locked(lock, self._waiting, lambda: self._told_to_wait(wait=True))
            self._alone = stack.enter_context(held)
        workspace = self.path.parent.parent
        if not self._alone and workspace not in _WITHOUT_LOCKS:
            _WITHOUT_LOCKS.add(workspace)
            self.say(
                f"{workspace}: no file locks there, so run nothing else in it at the same time: two runs "
                "would make the same stages twice, and could mix them"
            )
        self._told_to_wait(wait=False)

    def _told_to_wait(self, *, wait: bool) -> bool:
        return self.processes.from_main(lambda: wait)

    def _waiting(self, holder: str) -> None:
        self.say(f"{self.name}: waiting for another process that is at it: {holder}")

    def finished(self) -> dict[str, Any] | None:
        """What `finish` stored, or None when the stage has not ended."""
        return self.processes.from_main(self._finished)

    def result(self) -> str:
        """Digest of the files that the finished stage has left."""
        stored = self.finished()
        assert stored is not None, f"{self.name} comes first"
        return canonical.digest(stored["files"])

    def _finished(self, *, claimed: bool = False) -> dict[str, Any] | None:
        """What `finished` gives; where it is `claimed`, what is out of date goes."""
        path = self._finished_path
        if not path.is_file():
            return None
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            seal = stored.pop("seal", None)  # older ones have none
            if seal not in (None, canonical.digest(stored)):
                raise ValueError("it has changed since it was written")
            if stored["key"] != self.key:
                raise ValueError("it belongs to another stage")
            if self._outdated(stored):
                if claimed:
                    self._clear()
                return None
            for name, sha in stored["files"].items():
                if canonical.file_digest(self.path / name) != sha:
                    raise ValueError(f"{name} has changed since it was written")
        except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError) as error:
            raise GuardbenchError(
                f"{path}: {error}; delete the folder and run again to rebuild it."
            ) from error
        except OSError as error:
            raise not_now(path, error) from error
        return dict(stored)

    def begin(self, device: torch.device, made_from: str | None = None) -> dict[str, Any] | None:
        """Starts the clock; returns the last checkpoint of an earlier, unfinished run, if any.

        One that is damaged is set aside with a line, and the stage begins anew.

        Args:
            made_from: as `claimed` has it, for a stage whose result stands by itself once it is finished:
                only what is unfinished is of no use where the files that it was made from are others now.
        """
        assert not (made_from and self._made_from), "the finished result is bound already"
        self._made_from = made_from or self._made_from
        self._begun = self._saved = time.monotonic()
        self._meter = MemoryMeter(device)
        found = self.processes.from_main(self._last_checkpoint)
        if found is None:
            return None
        self._spent, state = found
        return state

    def _last_checkpoint(self) -> tuple[float, dict[str, Any]] | None:
        if self._alone:
            for part in self.path.rglob(".*.part"):  # of a run that was killed while it wrote
                part.unlink(missing_ok=True)
        if not self.checkpoint_path.is_file():
            return None
        try:
            return self._read(self.checkpoint_path)
        except _OutdatedError:
            self._clear()
            return None
        except ValueError as error:
            aside = self.checkpoint_path.with_suffix(".damaged")
            with explained(aside):
                self.checkpoint_path.replace(aside)
            self.say(
                f"{self.checkpoint_path}: unreadable checkpoint ({error}); set aside as {aside.name}, "
                f"and {self.name} begins anew"
            )
            return None

    def _read(self, path: Path) -> tuple[float, dict[str, Any]]:
        """What `_write` wrote; a ValueError when it is damaged, and not when it could not be read now."""
        try:
            data = io.BytesIO(read_sealed(path))
            stored = torch.load(data, map_location="cpu", weights_only=True)
        except ValueError:
            raise
        # Broad on purpose: what is whole is not thrown away because a disk or memory fails once, whatever
        # torch calls that.
        except Exception as error:
            raise GuardbenchError(
                f"{path}: cannot be read now ({brief(error)}); run again to go on from it, or delete it to "
                f"begin {self.name} anew."
            ) from error
        if stored["key"] != self.key:
            raise ValueError("it belongs to another stage")
        if self._outdated(stored):
            raise _OutdatedError("what it was made from is another now")
        self._begun_by = tuple(stored.get("commits", ()))
        return float(stored["seconds"]), dict(stored["state"])

    def _outdated(self, stored: Mapping[str, Any]) -> bool:
        """Whether it was made from other files than those that are there now."""
        return self._made_from is not None and stored.get("made_from") not in (
            None,
            self._made_from,
        )

    def _clear(self) -> None:
        """Removes what was made from files that have been made anew since, with another result.

        Raises:
            GuardbenchError: there are no locks, so that another run may be at it.
        """
        if not self._alone:
            raise GuardbenchError(
                f"{self.path}: what it was made from is another now, and without file locks another run may "
                "be at it; if none is, delete the folder and run again."
            )
        self.say(f"{self.name}: what it was made from is another now, so it begins anew")
        telling = (self.checkpoint_path, self._finished_path)
        with explained(self.path):
            # Last what tells that the others are out of date, or a kill half-way would leave those alone.
            for left in sorted(self.path.iterdir(), key=lambda path: path in telling):
                if left.is_dir():
                    shutil.rmtree(left)
                elif left.name != ".lock":
                    left.unlink()

    def _commits(self) -> list[str | None]:
        """Of the code that has worked on this stage, in order."""
        return [*dict.fromkeys((*self._begun_by, self.commit))]

    @property
    def seconds(self) -> float:
        """Seconds worked on this stage, earlier runs included."""
        return self._spent + time.monotonic() - self._begun

    def due(self) -> bool:
        """Whether the last checkpoint is old enough to be worth another, at most a twentieth of the time.

        Or whether a signal asks for one.
        """
        self._calls += 1
        if self._calls < self._ask_at:
            return False
        old = self.due_alone()
        if self.processes.count > 1:
            # A message a step would slow down short ones, so the next is a second away.
            rate = int(self._calls / max(time.monotonic() - self._begun, 1e-3))
            old, rate = self.processes.from_main(lambda: (old, rate))
            self._ask_at = self._calls + max(1, rate)
        return old

    def due_alone(self) -> bool:
        """The same, by this process's own clock and signals; the others are not asked."""
        elapsed = time.monotonic() - self._saved
        return interrupts.wanted() or elapsed > CHECKPOINT_EVERY_S * max(1.0, self._took)

    def checkpoint(self, state: Mapping[str, Any], *, last: bool = True) -> None:
        """Writes tensors and plain values from which `begin` can go on; those of the first process.

        Args:
            last: whether a signal may end the command now; False where more is to be written.

        Raises:
            interrupts.Interrupted: a signal asked for the checkpoint, and it is written.
        """
        self._write(self.checkpoint_path if self.processes.main else None, state, last=last)

    def checkpoint_own(self, state: Mapping[str, Any]) -> None:
        """Writes where a process other than the first stands, for `own` to find on as many processes.

        One without a disk goes on without a place of its own, and says so once.

        Raises:
            interrupts.Interrupted: as `checkpoint` does.
        """
        try:
            self._write(self.own_path, state, last=True)
        except GuardbenchError as error:
            self._saved = time.monotonic()
            if not self._told:
                self.say(
                    f"{error} Until then this process's part of {self.name} is lost in a crash."
                )
                self._told = True
            interrupts.stop(f"the first process's part of {self.name} is saved")

    def own(self) -> dict[str, Any]:
        """What this process wrote last by `checkpoint_own`; empty where there is nothing to go on from."""
        if not self.own_path.is_file():
            return {}
        try:
            return self._read(self.own_path)[1]
        except ValueError as error:
            self.say(f"{self.own_path}: unreadable checkpoint ({error}); its part begins anew")
            return {}

    def _write(self, path: Path | None, state: Mapping[str, Any], *, last: bool) -> None:
        begun = time.monotonic()
        # torch's writer in C++ is called back, and an error there is fatal.
        with interrupts.unbroken():
            if path is not None:
                buffer = io.BytesIO()
                found = {"key": self.key, "seconds": self.seconds, "commits": self._commits()}
                torch.save({**found, "made_from": self._made_from, "state": dict(state)}, buffer)
                write_sealed(path, buffer.getvalue())
            if last:
                interrupts.stop(f"{self.name} is saved")
        self._saved = time.monotonic()
        self._took = self._saved - begun

    def finish(
        self,
        device: torch.device,
        files: tuple[str, ...] = (),
        *,
        shared: bool = True,
        **facts: Any,
    ) -> dict[str, Any]:
        """Marks the stage as finished with its `files` (in `path`), cost and further `facts`.

        The peak memory is that of the process that took most.

        Args:
            shared: whether all processes of the run worked on it, or one, as on a student.
        """
        assert self._meter is not None, "begin comes first"
        cost = {
            "stage": self.name,
            "seconds": round(self.seconds, 3),
            "peak_memory_bytes": max(self.processes.collect(self._meter.peak())),
            "device": self._device(device, shared=shared),
        }
        stored = self.processes.from_main(lambda: self._finish(files, cost, facts))
        with contextlib.suppress(OSError):
            self.own_path.unlink(missing_ok=True)  # where the first process does not see it
        self.made.add(self.key)
        return stored

    def _device(self, device: torch.device, *, shared: bool) -> str:
        """For a cost. On a GPU that others used as well, the seconds are upper bounds."""
        name = self.processes.times(device_name(device)) if shared else device_name(device)
        return f"{name}, beside other processes" if others_on(device) else name

    def _finish(
        self, files: tuple[str, ...], cost: Mapping[str, Any], facts: Mapping[str, Any]
    ) -> dict[str, Any]:
        stored = {
            "key": self.key,
            "words": dict(self.words),
            "files": {name: canonical.file_digest(self.path / name) for name in files},
            "cost": cost,
            "commits": self._commits(),
            **({} if self._made_from is None else {"made_from": self._made_from}),
            **facts,
        }
        seal = canonical.digest(json.loads(canonical.dumps(stored)))
        write_text(self._finished_path, canonical.dumps({**stored, "seal": seal}))
        for left in (self.checkpoint_path, *self.path.glob("checkpoint-*-of-*.pt")):
            left.unlink(missing_ok=True)
        return stored


def stage_cost(stored: Mapping[str, Any], *, shared: bool) -> StageCost:
    """The cost that `StageFolder.finish` stored, for a record."""
    after = tuple(column["name"] for column in stored["words"].get("after", ()))
    return StageCost(**stored["cost"], shared=shared, after=after)
