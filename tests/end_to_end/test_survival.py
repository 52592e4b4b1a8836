"""Kills, signals, other processes, full disks and damage: healed or told in one line, and nothing lost."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command import clean_environment, quick_protocol

SCRIPT = Path(__file__).with_name("survive.py")
SEED, KILLS, STOPS = 1, 20, 8


@pytest.fixture(scope="module")
def struck(tmp_path_factory) -> dict[str, Any]:
    """What `survive.py` prints, which compares the digests of all runs that came to their end."""
    folder = tmp_path_factory.mktemp("struck")
    words = ["run", "--method", "guard", "--protocol", str(quick_protocol(folder)), "--ipc", "1",
             "--set", "squeeze.epochs=3", "--set", "recover.iterations=150"]  # fmt: skip
    command = [sys.executable, str(SCRIPT), str(folder), str(SEED), str(KILLS), str(STOPS), *words]
    command += ["--", "--set", "recover.lr=0.05"]
    environment = clean_environment() | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    for each in found["kills"] + found["stops"]:
        print(
            "{signal} {into_it:.2f} s into {stage}, ended after {to_the_end:.2f} s".format(**each)
        )
    return found


def kinds(strikes: list[dict[str, Any]]) -> set[str]:
    return {each["stage"].split()[0] for each in strikes}


def test_a_run_killed_at_twenty_random_moments_gives_the_unbroken_runs_record(struck) -> None:
    """As every process begins with other global generators, no stage draws from them either."""
    kills = struck["kills"]
    assert [each["code"] for each in kills] == [-9] * KILLS
    assert {"squeeze", "recover", "student", "checks"} <= kinds(kills)
    assert len(kinds(kills) & {"pgd100", "fgsm", "mim", "cw", "square"}) >= 2
    assert len(kinds(kills)) >= 9, "spread over all of it"


def test_a_run_that_signals_stop_at_random_moments_does_too(struck) -> None:
    for each in struck["stops"]:
        assert each["code"] == {"SIGINT": 130, "SIGTERM": 143}[each["signal"]]
        assert each["to_the_end"] < 5
        assert each["said"].count("\n") == 1, "one line and no traceback"
        assert "run the same command again" in each["said"]
    assert any("is saved" in each["said"] for each in struck["stops"])


def test_two_runs_at_once_share_a_teacher_and_lose_no_row(struck) -> None:
    found = struck["together"]
    assert found["codes"] == [0, 0], found["errors"]
    waited = [
        line
        for text in found["said"]
        for line in text.splitlines()
        if line.startswith("squeeze: waiting for another process that is at it: pid ")
    ]
    assert len(waited) == 1, "one waits for the other"
    assert "guardbench run --method guard" in waited[0]
    assert sorted(found["squeezed"]) == [False, True], "the teacher is built once"
    assert found["unbroken"], "the result is that of a run alone"
    assert found["rows"] == 2
