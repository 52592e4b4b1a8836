"""`guardbench show`: the table of a record again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from guardbench.errors import GuardbenchError


def show(
    record: Annotated[
        Path, typer.Argument(help="A record file, as `run` and `evaluate` name it at their end.")
    ],
) -> None:
    """Print the table of a record: accuracies with their intervals, and the cost of each stage.

    Example: guardbench show baselines/guard/results/digits/ipc10-seed0.json
    """
    from rich.console import Console

    from guardbench.record_files import load_any_record
    from guardbench.report import print_record

    loaded = load_any_record(record)
    print_record(
        Console(emoji=False), loaded, threat=_threat(loaded.protocol, loaded.protocol_sha256)
    )


def _threat(protocol: str, digest: str) -> str | None:
    """The threat model in words, where that very protocol comes with this guardbench."""
    from guardbench.protocol import load_protocol
    from guardbench.ranking import threat_text

    try:
        known = load_protocol(protocol)
    except GuardbenchError:
        return None
    return threat_text(known) if known.digest == digest else None
