"""A run that is struck by signals at random moments, and resumed after each; see test_survival.py.

    python survive.py FOLDER SEED KILLS STOPS WORD... -- MORE...

Runs `guardbench WORD...` in FOLDER/whole, unbroken; in FOLDER/kill-0 until SIGKILL has struck it so often;
in FOLDER/stop-0 until SIGINT and SIGTERM, by turns, have; and in FOLDER/together beside one with `MORE...`.
Two thirds of the moments are drawn over the kinds of stages, which are of very different length: one of
that kind, and a moment of the time that it took; the others evenly over the time of the unbroken run.
Processes are forks of this one, which has imported everything, so that each costs tenths of a second; every
one begins with another state of the global random generators. Prints one JSON object.
"""

import contextlib
import json
import os
import random
import select
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

import guardbench.pipeline
import guardbench.report  # noqa: F401 - imported for the forks
from guardbench import stages as stage_folders
from guardbench.__main__ import main
from guardbench.figures import new_figure, save_png
from guardbench.interrupts import heard
from guardbench.progress import Progress, Stage
from guardbench.record_files import load_record
from guardbench.records import ResultRecord


class Process:
    """`guardbench` in a folder, and the stages that it has reported as it began them."""

    def __init__(self, folder: Path, words: list[str], number: int, every: float) -> None:
        folder.mkdir(exist_ok=True)
        self.begun = time.monotonic()
        self.stages: list[tuple[str, float]] = []
        self.log = folder / f"log-{number}"
        self._status: int | None = None
        self._reports, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                os.close(self._reports)
                code = _run(folder, words, number, every, writer, self.log)
            finally:
                os._exit(code)
        os.close(writer)
        while not self.stages:
            assert self.listen(60), "it ended before it began"

    def listen(self, seconds: float) -> bool:
        """Waits so long at most; whether the process still runs."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if select.select([self._reports], [], [], left)[0]:
                told = os.read(self._reports, 1 << 16).decode()
                if not told:
                    return False
                self.stages += [(name, time.monotonic()) for name in told.splitlines()]
                return True
        return True

    def end(self) -> int:
        """Its exit status, as `os.waitpid` gives it."""
        while self._status is None and self.listen(60):
            pass
        if self._status is None:
            os.close(self._reports)
            self._status = os.waitpid(self.pid, 0)[1]
        return self._status

    def said(self) -> str:
        """What it has written to stderr."""
        return self.log.with_suffix(".err").read_text()


def _run(folder: Path, words: list[str], number: int, every: float, reports: int, log: Path) -> int:
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)
    stage_folders.CHECKPOINT_EVERY_S = every
    real = Progress.stage

    @contextmanager
    def told(self: Progress, name: str, *args: object, **words: object) -> Iterator[Stage]:
        os.write(reports, f"{name}\n".encode())
        with real(self, name, *args, **words) as stage:  # type: ignore[arg-type]
            yield stage

    Progress.stage = told  # type: ignore[method-assign]
    for stream in (1, 2):
        path = log if stream == 1 else log.with_suffix(".err")
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), stream)
    os.chdir(folder)
    sys.argv = ["guardbench", *words]
    try:
        with heard():  # as from the first line of guardbench.__main__ on
            os.write(reports, b"planning\n")
            main()
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def records_of(folder: Path) -> list[ResultRecord]:
    return [load_record(p) for p in sorted(folder.glob("guardbench-runs/records/*/*/*.json"))]


def digest_of(folder: Path) -> str:
    (record,) = records_of(folder)
    return record.result_sha256


Moment = tuple[str, float]
"""A stage of the unbroken run, and a share of the time that it took."""


class Survival:
    """One unbroken run, and runs that signals strike."""

    def __init__(self, folder: Path, seed: int, words: list[str]) -> None:
        self.folder, self.words, self.number = folder, words, 0
        self.draw = random.Random(seed)
        whole = self.start("whole", 1e9)
        assert whole.end() == 0, whole.said()
        self.digest = digest_of(folder / "whole")
        starts = [moment for _, moment in whole.stages]
        self.names = [name for name, _ in whole.stages]
        self.took = [b - a for a, b in zip(starts, [*starts[1:], time.monotonic()], strict=True)]

    def start(self, name: str, every: float, more: Sequence[str] = ()) -> Process:
        self.number += 1
        return Process(self.folder / name, [*self.words, *more], self.number, every)

    def moments(self, count: int) -> list[Moment]:
        """In the order of the run."""
        alike: dict[str, list[int]] = {}
        for stage, name in enumerate(self.names):
            alike.setdefault(name.split()[0], []).append(stage)
        few = min(len(alike), 2 * count // 3)
        kinds = self.draw.sample(list(alike.values()), few)
        places = [self.draw.choice(stages) + self.draw.random() for stages in kinds]
        for _ in range(count - few):
            left = self.draw.uniform(0, sum(self.took))
            for stage, took in enumerate(self.took):
                if left < took:
                    places.append(stage + left / took)
                    break
                left -= took
        return [(self.names[int(place)], place % 1) for place in sorted(places)]

    def strike(
        self, name: str, signals: list[signal.Signals], every: float
    ) -> list[dict[str, Any]]:
        """Strikes runs of one workspace until all signals have struck; of several, where one ends before."""
        moments, struck, workspace = self.moments(len(signals)), list[dict[str, Any]](), 0
        while True:
            process = self.start(f"{name}-{workspace}", every)
            if moments and self.reaches(process, *moments[0]):
                sent, kind = time.monotonic(), signals[len(struck)]
                os.kill(process.pid, kind)
                code = os.waitstatus_to_exitcode(process.end())
                inside, since = process.stages[-1]
                if code:
                    struck.append(
                        {
                            "signal": kind.name, "code": code, "said": process.said(), "stage": inside,
                            "into_it": sent - since, "into_the_process": sent - process.begun,
                            "to_the_end": time.monotonic() - sent,
                        }
                    )  # fmt: skip
                    moments.pop(0)
                    continue
            assert os.waitstatus_to_exitcode(process.end()) == 0, process.said()
            assert digest_of(self.folder / f"{name}-{workspace}") == self.digest
            if not moments:
                return struck
            workspace += 1

    def together(self, more: list[str]) -> dict[str, Any]:
        """Two at once in one workspace: the same command, and one with `more` words."""
        folder = self.folder / "together"
        both = [self.start("together", 1e9), self.start("together", 1e9, more)]
        codes = [os.waitstatus_to_exitcode(process.end()) for process in both]
        records = records_of(folder)
        (board,) = folder.glob("guardbench-runs/leaderboards/*/ipc*.json")
        return {
            "codes": codes,
            "errors": [process.said() for process in both],
            "said": [process.log.read_text() for process in both],
            "unbroken": self.digest in [record.result_sha256 for record in records],
            "squeezed": [not c.shared for r in records for c in r.cost if c.stage == "squeeze"],
            "rows": sum(len(rows) for rows in json.loads(board.read_text())["tracks"].values()),
        }

    def reaches(self, process: Process, stage: str, share: float) -> bool:
        """Waits for a moment of a stage, or of what is left after it; False where the process has ended."""
        ahead = dict(zip(self.names, self.took, strict=True))
        for name in self.names[: self.names.index(stage)]:
            del ahead[name]
        alive = True
        while alive and process.stages[-1][0] not in ahead:
            alive = process.listen(60)
        name, begun = process.stages[-1]
        while alive and (left := begun + share * ahead.get(name, 0) - time.monotonic()) > 0:
            alive = process.listen(left)
        return alive


def prepare(words: list[str], folder: Path) -> None:
    """Imports what is imported late, so that no fork need: by a plan, an optimizer's step, a figure."""
    torch.set_num_threads(1)  # a fork has none of its parent's threads
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1).step()
    save_png(folder / "figure.png", new_figure())
    sys.argv = ["guardbench", *words, "--output", str(folder / "planned"), "--dry-run"]
    with contextlib.redirect_stdout(None), contextlib.suppress(SystemExit):
        main()


if __name__ == "__main__":
    where, seed, kills, stops, *typed = sys.argv[1:]
    split = typed.index("--")
    typed, more = typed[:split], typed[split + 1 :]
    prepare(typed, Path(where))
    survival = Survival(Path(where), int(seed), typed)
    found = {
        "stages": survival.names,
        "kills": survival.strike("kill", [signal.SIGKILL] * int(kills), 0.02),
        # Nothing is written between strikes but what a signal asks for.
        "stops": survival.strike(
            "stop", [(signal.SIGTERM, signal.SIGINT)[k % 2] for k in range(int(stops))], 1e9
        ),
    }
    found["together"] = survival.together(more)
    print(json.dumps(found))
