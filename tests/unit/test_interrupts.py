"""Signals as a process gets them: what is finished first, what is given up, and how it ends."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import guardbench
from guardbench import interrupts
from guardbench.interrupts import heard, inside_stage, stop, unbroken, wanted

BEGIN = """
import sys, time
from guardbench import interrupts
from guardbench.interrupts import heard, inside_stage, stop, unbroken, wanted
def sleep(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)
def ready():
    print("ready", flush=True)
"""


def ended(code: str, *signals: signal.Signals, pause: float = 0.0) -> tuple[int, str, str, float]:
    """Exit code, output, errors, and the seconds from the first signal to the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", BEGIN + code],
        env={"PYTHONPATH": str(Path(guardbench.__file__).parents[1])},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    begun = time.monotonic()
    for each in signals:
        process.send_signal(each)
        time.sleep(pause)
    out, errors = process.communicate(timeout=60)
    return process.returncode, out, errors, time.monotonic() - begun


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_step_is_finished_and_saved_first(sent: signal.Signals, code: int) -> None:
    found = ended(
        """
with heard(), inside_stage("squeeze"):
    ready()
    for step in range(100):
        sleep(0.05)
        print("done", step)
        if wanted():
            stop("squeeze is saved")
""",
        sent,
    )
    said = "interrupted; squeeze is saved: run the same command again to go on from there\n"
    assert found[:3] == (code, found[1], said)
    assert 1 <= found[1].count("done") < 50


def test_outside_of_a_stage_nothing_is_waited_for() -> None:
    code, _, said, seconds = ended("with heard():\n ready()\n sleep(30)\n", signal.SIGTERM)
    assert (code, said) == (143, "interrupted; run the same command again\n")
    assert seconds < 5


def test_a_long_step_is_given_up() -> None:
    code, _, said, seconds = ended(
        "interrupts.GRACE_S = 0.3\nwith heard(), inside_stage('a'):\n ready()\n sleep(30)\n",
        signal.SIGTERM,
    )
    assert code == 143
    assert said.count("\n") == 1
    assert "go on from the last checkpoint" in said
    assert 0.3 < seconds < 5
    assert interrupts.GRACE_S <= 3.5, "leaves a second and a half to end within five"


def test_the_end_of_a_stage_is_an_end_too() -> None:
    code, out, said, _ = ended(
        "with heard():\n with inside_stage('clean'):\n  ready()\n  sleep(0.3)\n  print('whole')\n sleep(30)",
        signal.SIGINT,
    )
    assert (code, out) == (130, "whole\n")
    assert "clean is finished" in said


def test_a_file_is_written_to_its_end() -> None:
    code, out, said, _ = ended(
        "interrupts.GRACE_S = 0.1\nwith heard():\n with inside_stage('a'):\n  with unbroken():\n   ready()\n"
        "   sleep(0.5)\n   print('written')\n  sleep(30)",
        signal.SIGTERM,
    )
    assert (code, out) == (143, "written\n")
    assert said.count("\n") == 1


def test_a_second_signal_leaves_at_once() -> None:
    code, out, said, seconds = ended(
        "interrupts.GRACE_S = 50\nwith heard(), inside_stage('a'), unbroken():\n ready()\n sleep(30)\n"
        " print('never')",
        signal.SIGTERM, signal.SIGINT, pause=0.3,
    )  # fmt: skip
    assert (code, out) == (130, "")
    # The first once more is another request when it is not of the same moment.
    again = ended(
        "interrupts.GRACE_S = 50\nwith heard(), inside_stage('a'), unbroken():\n ready()\n sleep(30)\n",
        signal.SIGTERM, signal.SIGTERM, pause=0.8,
    )  # fmt: skip
    assert (again[0], again[2]) == (143, "left at once; run the same command again\n")
    assert said == "left at once; run the same command again\n"
    assert seconds < 5


def test_one_request_that_comes_by_two_ways_is_one() -> None:
    """From the scheduler to all of a job, and once more from the launcher that it stops."""
    code, out, said, _ = ended(
        "interrupts._ONE_REQUEST_S = 5\nwith heard(), inside_stage('a'):\n ready()\n sleep(0.7)\n"
        " print('saved')\n stop('a is saved')\n",
        signal.SIGTERM, signal.SIGTERM, pause=0.1,
    )  # fmt: skip
    assert (code, out) == (143, "saved\n")
    assert said.startswith("interrupted; a is saved")


def test_an_interrupt_that_a_library_swallows_comes_again() -> None:
    code, out, said, _ = ended(
        "interrupts.GRACE_S = 0.3\nwith heard():\n try:\n  ready()\n  sleep(30)\n"
        " except BaseException:\n  print('swallowed')\n sleep(30)",
        signal.SIGTERM,
    )
    assert (code, out) == (143, "swallowed\n")
    assert said.count("\n") == 1


def test_what_an_import_makes_of_an_interrupt_is_no_traceback() -> None:
    code, _, said, _ = ended(
        "with heard():\n try:\n  ready()\n  sleep(30)\n except BaseException:\n"
        "  raise ImportError('initialization failed')",
        signal.SIGTERM,
    )
    assert (code, said) == (143, "interrupted; run the same command again\n")


def test_without_a_signal_nothing_is_changed() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with heard(), heard(), inside_stage("a"), unbroken():
        assert not wanted()
        stop("a is saved")
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
