"""Figures as PNG files; the only door to matplotlib."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from guardbench.store import write_bytes


def new_figure(**options: Any) -> Any:
    """A matplotlib figure that needs no screen; `options` are those of `matplotlib.figure.Figure`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    return Figure(**options)


def save_png(path: Path, figure: Any) -> None:
    """Writes a figure, whole or not at all, with the same bytes each time."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    write_bytes(path, buffer.getvalue())
