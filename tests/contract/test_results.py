"""What README says of the published records is what the boards hold, to the digit that it prints."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from guardbench.methods import methods_folder
from guardbench.metrics import estimate
from guardbench.record_files import load_record

ROOT = methods_folder().parent
README = ROOT / "README.md"
pytestmark = pytest.mark.skipif(
    not (README.is_file() and (ROOT / "leaderboards").is_dir()), reason="not in a checkout"
)
TABLE = re.compile(r"^`([a-z0-9-]+)`, IPC (\d+),.*?\n\n((?:\|.*\n)+)", re.MULTILINE)


def tables() -> list[tuple[str, str, str]]:
    """Protocol, IPC and text of each table of results in README."""
    return TABLE.findall(README.read_text(encoding="utf-8")) if README.is_file() else []


def told(row: dict[str, Any], column: str) -> set[str]:
    """What may stand in a column of a row."""
    if column == "rank":
        return {str(row["rank"])}
    if column == "method":
        return {row["method"]["title"] + (" †" if row["flags"] else "")}
    if column in ("IOR", "LRS", "ARS"):
        value = (row["scores"] or {}).get(column.lower())
        if value is None:
            return {"-"}
        return {f"{100 * value:+.1f}" if column == "IOR" else f"{value:.3f}"}
    name = column.replace(" ", "_")
    found = row[name] if name in ("clean", "worst_case") else row["attacks"][name]
    mean = f"{found['mean']:.1f}"
    return {mean, f"{mean} ({found['low']:.1f} to {found['high']:.1f})"}


def test_there_are_tables() -> None:
    assert {(protocol, ipc) for protocol, ipc, _ in tables()} >= {
        ("digits", "10"),
        ("imagenette-64", "10"),
    }


@pytest.mark.parametrize(("protocol", "ipc", "text"), tables(), ids=lambda part: part[:20])
def test_the_tables_of_readme_are_the_boards(protocol: str, ipc: str, text: str) -> None:
    head, _, *lines = (
        [cell.strip() for cell in line.strip("|\n").split("|")] for line in text.splitlines()
    )
    board = json.loads((ROOT / "leaderboards" / protocol / f"ipc{ipc}.json").read_text())
    tracks = (
        dict.fromkeys(line[head.index("track")] for line in lines)
        if "track" in head
        else board["tracks"]
    )
    rows = [
        {**row, "track": track}
        for track in tracks
        for row in board["tracks"][track]
        if row["ranked"]
    ]
    assert sum(len(found) for found in board["tracks"].values()) == len(lines) == len(rows)
    for row, line in zip(rows, lines, strict=True):
        for column, cell in zip(head, line, strict=True):
            assert cell in ({row["track"]} if column == "track" else told(row, column)), line


@pytest.mark.parametrize("method", ["guard", "sre2l"])
def test_the_published_digits_records_keep_what_newcomers_are_promised(method: str) -> None:
    """An eps at which 20 to 80% survive, so that the table says something; and at most 2 GB."""
    record = load_record(
        Path(methods_folder() / method / "results" / "digits" / "ipc10-seed0.json")
    )
    assert 0.2 < estimate([run.attacks["autoattack"] for run in record.seeds]).share < 0.8
    assert max(cost.peak_memory_bytes for cost in record.cost) <= 2e9
