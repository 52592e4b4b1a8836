"""Contestants that take turns on one machine, so that a neighbour's load or a slow minute hits all alike.

Each runs in a process of its own; all but one are stopped (SIGSTOP). Its seconds are those in which it ran.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

TURN_S = 5.0
_PR_SET_PDEATHSIG = 1


def in_turns(
    prepare: Callable[..., Callable[[], Any]], contestants: dict[str, tuple[Any, ...]]
) -> dict[str, tuple[Any, float]]:
    """Runs all contestants to their end and gives the result and the seconds of each.

    Args:
        prepare: gets the arguments of a contestant, loads what it needs (which is not timed), and gives what
            is timed; a function of a module, since the processes are spawned. Results are plain values.
        contestants: arguments by name.
    """
    spawn = multiprocessing.get_context("spawn")
    running: dict[str, tuple[Any, Connection]] = {}
    for name, words in contestants.items():
        here, there = spawn.Pipe()
        process = spawn.Process(target=_contestant, args=(prepare, words, there), daemon=True)
        process.start()
        there.close()
        running[name] = process, here
    for process, pipe in running.values():
        pipe.recv()  # it is ready
        os.kill(process.pid, signal.SIGSTOP)
    for _, pipe in running.values():
        pipe.send(None)
    found: dict[str, tuple[Any, float]] = {}
    seconds = dict.fromkeys(running, 0.0)
    try:
        while running:
            for name, (process, pipe) in [*running.items()]:
                begun = time.perf_counter()
                os.kill(process.pid, signal.SIGCONT)
                ended = pipe.poll(TURN_S)
                if not ended:
                    os.kill(process.pid, signal.SIGSTOP)
                seconds[name] += time.perf_counter() - begun
                if ended:
                    found[name] = pipe.recv(), seconds[name]
                    process.join()
                    del running[name]
    finally:
        for process, _ in running.values():
            process.kill()
    return {name: found[name] for name in contestants}


def _contestant(
    prepare: Callable[..., Callable[[], Any]], words: tuple[Any, ...], pipe: Connection
) -> None:
    if (
        sys.platform == "linux"
    ):  # a benchmark that is killed leaves no contestant running beside the next
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    timed = prepare(*words)
    pipe.send(None)
    pipe.recv()
    pipe.send(timed())
