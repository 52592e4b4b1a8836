"""What a board file holds: the models of `leaderboards/<protocol>/ipc<k>.json`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from guardbench.metrics import Measurement, WorstMeasurement
from guardbench.records import Artifact, Method, Name, Sha256, Strict, only_const

BOARD_VERSION: Literal[1] = 1


class Cost(Strict):
    """Of all stages, those whose artifact an earlier run made included."""

    distill_seconds: float
    evaluate_seconds: float
    peak_memory_bytes: int
    device: str


class Source(Strict):
    """The record file behind a row: its path from the root, and the digest of its bytes."""

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


class Row(Strict):
    """One record on a board."""

    rank: int = Field(ge=1)
    method: Method
    clean: Measurement
    attacks: dict[str, Measurement]
    worst_case: WorstMeasurement | None
    cost: Cost
    storage: Artifact
    flags: tuple[str, ...]
    record: Source
    provenance: RowProvenance


class Tracks(Strict):
    """Rows by what the labels are; ranks are within a track and mean nothing across."""

    hard: tuple[Row, ...]
    soft: tuple[Row, ...]
    teacher: tuple[Row, ...]


class BoardHead(Strict):
    """The protocol of a board."""

    id: Name
    title: str
    sha256: Sha256
    dataset: Name
    resolution: int
    threat: str
    rank_by: str
    attacks: tuple[str, ...]


class Board(Strict):
    """A file `leaderboards/<protocol>/ipc<k>.json`."""

    schema_version: Literal[1] = Field(default=BOARD_VERSION, json_schema_extra=only_const)
    protocol: BoardHead
    ipc: int
    tracks: Tracks
