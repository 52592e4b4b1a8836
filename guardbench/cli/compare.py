"""`guardbench compare`: two records side by side, and whether their difference stands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from guardbench.errors import GuardbenchError


def compare(
    a: Annotated[
        Path, typer.Argument(metavar="A", help="A record file, as `run` names it at its end.")
    ],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one, of the same protocol.")],
    json: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="FILE",
            dir_okay=False,
            help="Also write the comparison to FILE, as JSON.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Pair two records image by image, and say which is higher and whether that stands.

    Example: guardbench compare guard-seed0.json sre2l-seed0.json --json comparison.json
    """
    from rich.console import Console

    from guardbench import canonical
    from guardbench.compare import compare as compare_records
    from guardbench.record_files import load_any_record
    from guardbench.report import print_comparison
    from guardbench.store import write_text

    if json is not None and json.resolve() in (a.resolve(), b.resolve()):
        raise GuardbenchError(f"--json {json}: that is one of the records; name another file.")
    found = compare_records(load_any_record(a), load_any_record(b))
    if json is not None:
        write_text(json, canonical.dumps(found.model_dump(mode="json")), option="--json")
    print_comparison(Console(emoji=False), found)
