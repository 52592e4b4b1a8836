"""The numbers that the charts draw, as JSON inside a page; `static/site.js` makes pictures of them."""

from __future__ import annotations

from typing import Any

from guardbench.metrics import Measurement
from guardbench.site.read import Entry, Shown
from guardbench.site.view import curve_points, distinct

Json = dict[str, Any]


def board_data(shown: Shown) -> Json:
    """What a board's page draws: its rows as points, and their curves."""
    return {
        "ranked_by": shown.board.protocol.rank_by.replace("_", " "),
        "rows": [_row(shown, entry) for entry in shown.entries],
        "curves": [
            curve
            for entry in shown.entries
            for curve in row_data(entry, _label(shown, entry))["curves"]
        ],
    }


def row_data(entry: Entry, label: str = "") -> Json:
    """What a row's page draws: its curves; `label` stands before the classifier's name.

    A point is: radius in words, radius, percent, and the ends of its interval.
    """
    return {
        "curves": [
            {
                "row": entry.slug,
                "label": f"{label}: {curve.classifier}" if label else curve.classifier,
                "axis": "radius in l-inf, x 255"
                if curve.norm == "linf"
                else f"radius in {curve.norm}",
                "points": [
                    [
                        point.radius_words,
                        point.radius,
                        *_rounded(point.percent, point.low, point.high),
                    ]
                    for point in curve_points(curve)
                ],
            }
            for _, curve in entry.curves
        ]
    }


def _row(shown: Shown, entry: Entry) -> Json:
    row = entry.row
    return {
        "row": entry.slug,
        "label": _label(shown, entry),
        "track": entry.track,
        "url": f"ipc{shown.board.ipc}/{entry.slug}.html",
        "clean": _span(row.clean),
        "ranked": _span(row.ranked),
        "seconds": row.cost.distill_seconds,
        "device": row.cost.device,
    }


def _label(shown: Shown, entry: Entry) -> str:
    more = distinct(entry, shown)
    return f"{entry.row.method.title} ({more})" if more else entry.row.method.title


def _span(found: Measurement) -> list[float]:
    return _rounded(found.mean, found.low, found.high)


def _rounded(*values: float) -> list[float]:
    return [round(value, 2) for value in values]
