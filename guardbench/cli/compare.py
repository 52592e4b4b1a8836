"""`guardbench compare`: two records side by side, and whether their difference stands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from guardbench.errors import GuardbenchError


def compare(
    records: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="A B",
            help="Two record files of one protocol, as `run` names them at its end. With --paper: "
            "any number; those that came with guardbench where none is named.",
            show_default=False,
        ),
    ] = None,
    paper: Annotated[
        bool,
        typer.Option("--paper", help="Put each record beside what papers report for its method."),
    ] = False,
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

    Example: guardbench compare --paper
    """
    if paper:
        if json is not None:
            raise GuardbenchError("--json goes with two records, not with --paper; drop one.")
        _beside_papers(records)
        return
    if records is None or len(records) != 2:
        raise GuardbenchError("compare takes two records, A and B (or --paper); see --help.")
    a, b = records
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


def _beside_papers(paths: list[Path] | None) -> None:
    from rich.console import Console

    from guardbench.methods import load_method, method_names, methods_folder
    from guardbench.published import contradictions, reproduced
    from guardbench.record_files import load_record, record_paths
    from guardbench.report import print_paper

    methods = [load_method(name) for name in method_names()]
    chosen = paths or record_paths(methods_folder(), "*/results/*/*.json")
    cells = reproduced(methods, [load_record(path) for path in chosen])
    if paths and not cells:
        raise GuardbenchError(
            "no paper that guardbench knows reports the method, dataset and IPC of these records."
        )
    print_paper(Console(emoji=False), cells, contradictions(methods))
