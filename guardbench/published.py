"""What papers report, beside what is reproduced here, and where a paper contradicts itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction

from guardbench.methods import MethodFile, Published
from guardbench.metrics import Estimate, estimate
from guardbench.protocol import load_protocol, protocol_ids
from guardbench.records import ResultRecord
from guardbench.threat import ThreatModel

ROUNDING = 0.05
"""Percentage points that two printed accuracies may differ by and still agree."""

PAPERS_THREAT = ThreatModel("linf", Fraction(1, 255))
"""Of every robust accuracy that a `method.toml` quotes."""


@dataclass(frozen=True)
class Cell:
    """One accuracy that a paper prints and a record here has measured.

    Attributes:
        method, dataset, ipc: of the paper's row.
        column: `clean` or the attack.
        published: percent.
        resolution: of the paper's images, in pixels.
        source: paper and table.
        record: whose protocol may differ from the paper's; it says which.
        found: of the record.
    """

    method: str
    dataset: str
    ipc: int
    column: str
    published: float
    resolution: int
    source: str
    record: ResultRecord
    found: Estimate

    @property
    def gap(self) -> float:
        """Percentage points that the reproduction lies above the paper."""
        return 100 * float(self.found.share) - self.published


def reproduced(methods: Iterable[MethodFile], records: Iterable[ResultRecord]) -> list[Cell]:
    """Every published cell for which a record has the same method, dataset, IPC and column.

    Robust accuracies only where the record's threat is the papers', l-inf 1/255. A cell that a paper
    prints in several tables is compared with each value once.
    """
    by_name = {method.name: method for method in methods}
    found: dict[tuple[object, ...], Cell] = {}
    for record in records:
        method = by_name.get(record.method.name)
        at_papers_radius = _threat(record) == PAPERS_THREAT
        for row in () if method is None else method.published:
            if (row.dataset, row.ipc) != (record.dataset, record.ipc):
                continue
            for column, value in row.cells.items():
                if column != "clean" and not at_papers_radius:
                    continue
                outcomes = _outcomes(record, column)
                if outcomes is not None:
                    key = (record.result_sha256, column, value)
                    cell = Cell(
                        record.method.name, row.dataset, row.ipc, column, value, row.resolution,
                        row.source, record, outcomes,
                    )  # fmt: skip
                    found.setdefault(key, cell)
    return list(found.values())


def _threat(record: ResultRecord) -> ThreatModel | None:
    """Its protocol's threat model; None for a protocol that is not guardbench's."""
    known = record.protocol in protocol_ids()
    return load_protocol(record.protocol).threat.model if known else None


def _outcomes(record: ResultRecord, column: str) -> Estimate | None:
    if column == "clean":
        return estimate([run.clean for run in record.seeds])
    if column not in record.attack_names:
        return None
    return estimate([run.attacks[column] for run in record.seeds])


def contradictions(methods: Iterable[MethodFile]) -> list[str]:
    """Cells of a paper that cannot all be right, or that can hardly be, a line each.

    Two tables of a paper disagree about one cell; a network is more accurate under attack than on clean
    images, though every attack keeps the clean image as a candidate, or under AutoAttack than under Square,
    which is a part of it. Doubtful: Square, which sees only logits, breaks more than PGD-100, which sees
    gradients, as where gradients are masked; AutoAttack breaks less than PGD-100 by a point or more.
    """
    lines: dict[str, None] = {}
    for method in methods:
        seen: dict[tuple[object, ...], float] = {}
        for row in () if method.published_of else method.published:  # each cell once
            paper = row.source.split(", ")[:2]  # authors, and where and when
            for column, value in row.cells.items():
                earlier = seen.setdefault((*paper, row.dataset, row.ipc, column), value)
                if abs(earlier - value) > ROUNDING:
                    text = f"{column} is {earlier} in one table and {value} in another"
                    lines[_line(IMPOSSIBLE, method, row, text)] = None
            for kind, text in _out_of_order(row.cells):
                lines[_line(kind, method, row, text)] = None
    return list(lines)


IMPOSSIBLE, DOUBTFUL = "contradicts itself", "doubtful"


def _line(kind: str, method: MethodFile, row: Published, text: str) -> str:
    return f"{kind}: {method.name}, {row.dataset}, IPC {row.ipc}: {text}"


def _out_of_order(cells: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    clean, square, pgd, whole = (
        cells.get(column, math.nan) for column in ("clean", "square", "pgd100", "autoattack")
    )
    for column, value in cells.items():
        if column != "clean" and value > clean:
            yield IMPOSSIBLE, f"{value} under {column} is above {clean} clean"
    if whole > square + ROUNDING:
        yield IMPOSSIBLE, f"{whole} under AutoAttack is above {square} under Square, a part of it"
    if square < pgd:
        yield DOUBTFUL, f"{square} under Square is below {pgd} under PGD-100: masked gradients?"
    if whole >= pgd + 1:
        yield DOUBTFUL, f"{whole} under AutoAttack is above {pgd} under PGD-100, a weaker attack"
