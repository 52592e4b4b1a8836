"""Numbers of a board in words."""

from __future__ import annotations

from guardbench.board import BoardHead, Row
from guardbench.fields import printable
from guardbench.metrics import Measurement


def words(value: object) -> str:
    """A value of a board's head."""
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def column(head: BoardHead) -> str:
    """What the rows of a board are ranked by."""
    return "worst case" if head.rank_by == "worst_case" else printable(head.rank_by)


def rank(row: Row) -> str:
    """The rank of a row."""
    return "unranked" if row.rank is None else f"rank {row.rank}"


def percent(found: Measurement) -> str:
    """A mean with its interval."""
    return f"{found.mean:.1f}% ({found.low:.1f} to {found.high:.1f})"


def numbers(a: Measurement, b: Measurement) -> str:
    """Two means, in as many digits as tell them apart."""
    digits = 1 if round(a.mean, 1) != round(b.mean, 1) else 4
    return f"{a.mean:.{digits}f}% -> {b.mean:.{digits}f}%"


def from_to(a: Measurement, b: Measurement) -> str:
    """How one measurement changed into another."""
    if a.mean != b.mean:
        return f"{numbers(a, b)} ({b.low:.1f} to {b.high:.1f})"
    if (a.low, a.high) != (b.low, b.high):
        return f"{b.mean:.1f}% as before, interval {a.low:.2f} to {a.high:.2f} -> {b.low:.2f} to {b.high:.2f}"
    return f"{b.mean:.1f}% as before, with other seeds, images or distances"
