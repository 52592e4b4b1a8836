"""The command line around the verbs: what a machine refuses is one line, and who speaks."""

import errno
import os
import sys
from pathlib import Path

import pytest
import torch

from guardbench.cli.options import process_rank
from guardbench.errors import GuardbenchError
from guardbench.store import check_workspace, check_writable, read_text, write_text


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "memory ran out; what was saved stays"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might"), "memory ran out"),
        (MemoryError(), "memory ran out"),
        (
            PermissionError(errno.EACCES, "Permission denied", "data/n1"),
            "data/n1: Permission denied",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "a file, or what is printed, cannot be written: No space",
        ),
    ],
)
def test_what_a_machine_refuses_is_one_line(
    error: Exception, said: str, monkeypatch, capsys
) -> None:
    from guardbench import cli

    def fails(**_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "app", fails)
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # which may be replaced
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
def test_where_nothing_can_be_made_nothing_was_removed() -> None:
    with pytest.raises(GuardbenchError, match=r"/proc/x\.json: cannot be written"):
        write_text(Path("/proc/x.json"), "{}")


def test_a_file_without_an_end_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(GuardbenchError, match="no ordinary file, as record must be"):
            read_text(path, what="record")


@pytest.mark.parametrize(
    ("rank", "world", "found"), [("1", "2", 1), ("1", "1", 0), ("1", "", 0), ("x", "2", 0)]
)
def test_a_rank_that_is_left_over_silences_nothing(monkeypatch, rank, world, found) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    assert process_rank() == found


def test_a_checkout_is_no_workspace(tmp_path: Path, monkeypatch) -> None:
    """Its public boards have no record under `records/`, and would be removed."""
    (tmp_path / "baselines").mkdir()
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path, Path()):
        with pytest.raises(GuardbenchError, match="it is a checkout of guardbench"):
            check_workspace(folder)
        check_writable(folder)  # a plot or a table may lie there
    check_workspace(tmp_path / "guardbench-runs")
