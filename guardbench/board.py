"""What a board file holds: the models of `leaderboards/<protocol>/ipc<k>.json` and of the index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from guardbench.ddranking import Scores
from guardbench.fields import Name, Sha256, Strict, only_const
from guardbench.metrics import Measurement, WorstMeasurement
from guardbench.records import Artifact, Method

BOARD_VERSION: Literal[2] = 2

Area = Literal["baselines", "submissions"]
"""The folder that holds a row's record: a method of ours, or a stranger's set."""


class Cost(Strict):
    """Of all stages, those whose artifact an earlier run made included."""

    distill_seconds: float
    evaluate_seconds: float
    peak_memory_bytes: int
    device: str


class Source(Strict):
    """A file behind a row: its path from the root, and the digest of its bytes."""

    path: str
    sha256: Sha256


class RowProvenance(Strict):
    """The essentials; the rest is in the record."""

    guardbench: str
    torch: str | None
    commit: str | None
    device: str
    precision: dict[str, str]
    test_data_sha256: Sha256


class Past(Strict):
    """An earlier value of a row.

    Attributes:
        ranked: what the row was ranked by until then.
        reason: why it no longer holds, in words.
        source: the file that changed it.
    """

    ranked: Measurement
    reason: str
    source: Source


class Row(Strict):
    """One record on a board.

    Attributes:
        rank: 1 + the rows of its track whose whole interval lies above this row's (`ranks`); None
            for an unofficial row, whose recipe somebody changed.
        area: whose it is.
        links: `paper` and `code`, where known: an https URL, or plain text.
        ranked: what the row is ranked by, after any later, stronger evaluation has lowered it.
        clean, attacks: as the record measured them.
        worst_case: over the bounded attacks, lowered likewise.
        scores: DD-Ranking's; None where the record holds no references.
        history: earlier values of `ranked`, oldest first.
    """

    rank: int | None = Field(ge=1)
    area: Area
    method: Method
    links: dict[str, str]
    ranked: Measurement
    clean: Measurement
    attacks: dict[str, Measurement]
    worst_case: WorstMeasurement | None
    scores: Scores | None
    cost: Cost
    storage: Artifact
    flags: tuple[str, ...]
    history: tuple[Past, ...]
    record: Source
    provenance: RowProvenance


class Tracks(Strict):
    """Rows by what the labels are; ranks are within a track and mean nothing across."""

    hard: tuple[Row, ...]
    soft: tuple[Row, ...]
    teacher: tuple[Row, ...]


class BoardHead(Strict):
    """The protocol of a board; `superseded_by` names a newer one, whose numbers do not compare."""

    id: Name
    title: str
    sha256: Sha256
    superseded_by: Name | None = None
    dataset: Name
    resolution: int
    threat: str
    rank_by: str
    attacks: tuple[str, ...]


class Board(Strict):
    """A file `leaderboards/<protocol>/ipc<k>.json`."""

    schema_version: Literal[2] = Field(default=BOARD_VERSION, json_schema_extra=only_const)
    protocol: BoardHead
    ipc: int
    tracks: Tracks


class IndexEntry(Strict):
    """One board in the index; `path` is from `leaderboards/`, `rows` counts the rows of each track."""

    path: str
    protocol: Name
    protocol_sha256: Sha256
    title: str
    dataset: Name
    resolution: int
    ipc: int
    rows: dict[str, int]


class Index(Strict):
    """The file `leaderboards/index.json`: every board, by protocol and IPC."""

    schema_version: Literal[2] = Field(default=BOARD_VERSION, json_schema_extra=only_const)
    boards: tuple[IndexEntry, ...]


def ranks(rows: Sequence[tuple[bool, float, float]]) -> list[int | None]:
    """Ranks with ties by interval: 1 + the rows that are surely better.

    A row is surely better where the whole of its interval lies above the other's. So rows whose
    intervals overlap may share a rank, and one row of wide interval does not push another down.

    Args:
        rows: official or not, and the low and high end of the interval, of the rows of one track.

    Returns:
        A rank a row, in the order of `rows`; None for an unofficial one, which takes no rank from
        the others either.
    """
    lows = [low for official, low, _ in rows if official]
    return [1 + sum(low > high for low in lows) if official else None for official, _, high in rows]
