"""Locks between processes: who holds one is said, and none outlives its holder."""

import errno
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from accelerate import Accelerator

import guardbench
from guardbench import locks
from guardbench.locks import locked
from guardbench.progress import Progress
from guardbench.runtime import Run

HOLDER = """
import sys, time
from pathlib import Path
from guardbench.locks import locked
sys.argv = ["/usr/bin/guardbench", "run", "--method", "guard"]
with locked(Path(%r), print):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(lock: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER % str(lock)],
        env={"PYTHONPATH": str(Path(guardbench.__file__).parents[1])},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_lock_names_its_holder_and_dies_with_it(tmp_path) -> None:
    lock = tmp_path / "stage" / ".lock"
    with holder(lock) as process:
        said: list[str] = []

        def heard(text: str) -> None:
            said.append(text)
            process.send_signal(signal.SIGKILL)  # which leaves the file and no lock

        with locked(lock, heard) as held:
            assert held
            assert lock.read_text().startswith("pid ")
    (text,) = said
    assert text.startswith(f"pid {process.pid} on ")
    assert text.endswith(": guardbench run --method guard")
    assert "\n" not in text
    assert not lock.exists()
    with locked(lock, heard):
        assert len(said) == 1, "nobody to wait for"


def test_one_after_the_other_and_never_two(tmp_path) -> None:
    """Each removes the file as it leaves, so that those who wait find another one in its place."""
    lock, inside, most, turns = tmp_path / ".lock", 0, 0, 0

    def work() -> None:
        nonlocal inside, most, turns
        for _ in range(20):
            with locked(lock, lambda _: None) as held:
                inside += 1
                most = max(most, inside)
                time.sleep(0.001)  # in which others try
                turns += held and lock.exists()
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, turns) == (1, 80)
    assert not (tmp_path / ".lock").exists()


def test_a_removed_folder_takes_no_other_holders_lock_along(tmp_path) -> None:
    lock = tmp_path / ".lock"
    with locked(lock, print):
        lock.unlink()
        lock.write_text("another's")
    assert lock.read_text() == "another's"


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch) -> None:
    def refuses(_handle: int, _how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", refuses)
    with locked(tmp_path / ".lock", print) as held:
        assert not held
    said: list[str] = []
    run = Run(accelerator=Accelerator(cpu=True), workspace=tmp_path, seed=0, progress=Progress())
    for number in range(2):
        folder = run.stage("s", "k", {"a": number})
        folder.say = said.append
        with folder.claimed():
            pass
    (line,) = said
    assert line.startswith(f"{tmp_path}: no file locks there")


def test_a_lock_that_fails_otherwise_is_no_lock_that_is_absent(tmp_path, monkeypatch) -> None:
    def fails(_handle: int, _how: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(locks.fcntl, "flock", fails)
    with pytest.raises(OSError, match="Input/output"), locked(tmp_path / ".lock", print):
        pass
