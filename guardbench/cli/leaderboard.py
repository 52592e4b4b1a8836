"""`guardbench leaderboard`: boards rebuilt from records, and compared with what is committed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from guardbench.errors import GuardbenchError

app = typer.Typer(
    no_args_is_help=True,
    help="Rebuild the boards from the records, check that they are what the records give, tell what "
    "changed between two of them, or lower a row by a stronger attack.\n\n"
    "Example: guardbench leaderboard check",
)

Root = Annotated[
    Path | None,
    typer.Option(
        help="The checkout; by default the nearest folder upwards that holds baselines/.",
        show_default=False,
    ),
]


@app.command()
def build(root: Root = None) -> None:
    """Write leaderboards/ from the records under baselines/ and submissions/.

    Example: guardbench leaderboard build --root ~/guardbench
    """
    from guardbench.leaderboard import alone_at, rebuild, write

    folder = _checkout(root)
    with alone_at(folder):
        texts = rebuild(folder)
        changes = write(folder, texts)
    for line in changes:
        typer.echo(line)
    if not changes:
        typer.echo(f"nothing to do: {len(texts)} files are up to date")


@app.command()
def check(root: Root = None) -> None:
    """Exit with 1 and a diff when leaderboards/ is not what the records give.

    Example: guardbench leaderboard check
    """
    from guardbench.leaderboard import rebuild
    from guardbench.report import differences

    folder = _checkout(root)
    texts = rebuild(folder)
    lines = differences(folder, texts)
    for line in lines:
        typer.echo(line)
    if lines:
        typer.echo(
            "leaderboards/ is not what the records give; run `guardbench leaderboard build`."
        )
        raise typer.Exit(1)
    typer.echo(f"ok: {len(texts)} files are what the records give")


@app.command()
def diff(
    old: Annotated[
        str,
        typer.Argument(
            metavar="OLD",
            help="A board file, a leaderboards folder, or a revision of the checkout with a colon, "
            "such as HEAD~1: or v1.0:leaderboards/digits.",
            show_default=False,
        ),
    ],
    new: Annotated[
        str, typer.Argument(metavar="NEW", help="The same, of what is now.", show_default=False)
    ],
    json: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="FILE",
            dir_okay=False,
            help="Also write the changes to FILE, as JSON.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Tell in words what changed between boards, and why: one line a change, none where none did.

    Example: guardbench leaderboard diff HEAD~1: leaderboards --json changes.json
    """
    from guardbench import canonical
    from guardbench.board_diff import difference
    from guardbench.board_files import read_boards
    from guardbench.store import write_text

    if json is not None and json.resolve() in (Path(old).resolve(), Path(new).resolve()):
        raise GuardbenchError(f"--json {json}: that is one of the boards; name another file.")
    boards = read_boards(old), read_boards(new)
    found = difference(*boards)
    if json is not None:
        write_text(json, canonical.dumps(found.model_dump(mode="json")), option="--json")
    for change in found.changes:
        typer.echo(change.text)
    if not found.changes:
        counts = [len(each.files) for each in boards]
        typer.echo(f"no change; boards compared: {min(counts)}")


@app.command()
def assess(
    record: Annotated[
        Path, typer.Argument(help="A record under baselines/ or submissions/.", show_default=False)
    ],
    measured: Annotated[
        list[Path],
        typer.Argument(
            metavar="CLASSIFIER...",
            help="Records that `guardbench evaluate` made of the record's students, under its protocol; "
            "one a student.",
            show_default=False,
        ),
    ],
    attack: Annotated[
        str, typer.Option(help="The attack of these records to take, such as pgd100.")
    ],
    by: Annotated[str, typer.Option(help="Who made the evaluation.")],
    source: Annotated[
        str, typer.Option(help="Where it can be checked: an https URL, or a line of text.")
    ],
    word: Annotated[
        str | None,
        typer.Option(
            help="Ends the file's name, to tell it from others; by default the attack.",
            show_default=False,
        ),
    ] = None,
    date: Annotated[
        str | None,
        typer.Option(metavar="YYYY-MM-DD", help="By default today.", show_default=False),
    ] = None,
) -> None:
    """Lower a row: write what a later attack broke of a record's students beside the record.

    The record stays as it is. The row takes the worse verdict of both, image by image, and keeps its
    earlier value in its history. Which student a classifier is, its clean verdicts tell. The column is one
    of the protocol, attacked by another seed or engine than the record's.

    Example: guardbench leaderboard assess baselines/guard/results/digits/ipc10-seed0.json
    student0.json student1.json --attack pgd100 --by "A. Reader" --source https://example.org/runs/7
    """
    import datetime

    from guardbench import reassessment
    from guardbench.record_files import load_any_record, load_record
    from guardbench.records import ClassifierRecord

    path = reassessment.assessment_path(record, word or attack.replace(".", "-").replace("+", "-"))
    if path.exists():
        raise GuardbenchError(f"{path}: is there already; say another --word, or remove it.")
    students = []
    for file in measured:
        found = load_any_record(file)
        if not isinstance(found, ClassifierRecord):
            raise GuardbenchError(
                f"{file}: no record of a classifier; `guardbench evaluate` makes one."
            )
        students.append(found)
    made = reassessment.assess(
        load_record(record),
        students,
        attack=attack,
        made_by=by,
        date=date or datetime.date.today().isoformat(),
        source=source,
    )
    reassessment.save_assessment(path, made)
    typer.echo(f"wrote {path}; now run `guardbench leaderboard build`")


def _checkout(root: Path | None) -> Path:
    """The folder that holds `baselines/`."""
    if root is not None:
        if not (root / "baselines").is_dir():
            raise GuardbenchError(f"--root {root}: no baselines/ folder in it; name a checkout.")
        return root
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "baselines").is_dir():
            return folder
    raise GuardbenchError(
        f"no baselines/ folder in {here} or above it; name a checkout with --root."
    )
