"""`guardbench submission`: a distilled set of your own, from an empty form to a row on a board."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from guardbench.cli.options import (
    CacheDir,
    DataDir,
    Device,
    DevImages,
    EngineName,
    EngineOption,
    Precision,
    References,
    TierName,
    TierOption,
    make_console,
)
from guardbench.errors import GuardbenchError

if TYPE_CHECKING:
    from rich.console import Console

    from guardbench.submissions.check import Report

app = typer.Typer(
    no_args_is_help=True,
    help="Have a distilled dataset scored: write its form, check it, score it, pack it.\n\n"
    "Example: guardbench submission check submissions/mine",
)

Folder = Annotated[
    Path, typer.Argument(help="The submission's folder, or the zip file that `pack` made of one.")
]


class Labels(str, Enum):
    """The kinds of label, for the option's choices."""

    hard = "hard"
    soft = "soft"
    teacher = "teacher"


class Kind(str, Enum):
    """Where the images lie, for the option's choices."""

    folder = "folder"
    parquet = "parquet"
    safetensors = "safetensors"
    hub = "hub"
    url = "url"


@app.command()
def new(
    folder: Annotated[Path, typer.Argument(help="The folder to make; its name is the row's.")],
    title: Annotated[str | None, typer.Option(help="As people write it.")] = None,
    author: Annotated[list[str] | None, typer.Option(help="May be repeated.")] = None,
    dataset: Annotated[str | None, typer.Option(help="imagenette, cifar10, ...")] = None,
    resolution: Annotated[int | None, typer.Option(help="Side of the images in pixels.")] = None,
    ipc: Annotated[int | None, typer.Option(help="Images per class.")] = None,
    labels: Annotated[Labels | None, typer.Option(help="The track.")] = None,
    licence: Annotated[str | None, typer.Option(help="Of the images, such as CC-BY-4.0.")] = None,
    made: Annotated[str | None, typer.Option(help="How the set was made, in a sentence.")] = None,
    kind: Annotated[Kind, typer.Option(help="How the images lie there.")] = Kind.folder,
    path: Annotated[
        str | None, typer.Option(help="Of the images; images, images.parquet, ... unless told.")
    ] = None,
    repo: Annotated[str | None, typer.Option(help="Of --kind hub: OWNER/NAME.")] = None,
    revision: Annotated[str | None, typer.Option(help="Of --kind hub: a commit.")] = None,
    url: Annotated[str | None, typer.Option(help="Of --kind url: an https address.")] = None,
    sha256: Annotated[str | None, typer.Option(help="Of --kind url: of the file there.")] = None,
    teacher: Annotated[
        str, typer.Option(help="Of --labels teacher: its architecture.")
    ] = "resnet18",
    claimed: Annotated[
        float | None, typer.Option(help="The clean accuracy that you report, in percent.")
    ] = None,
    paper: Annotated[str | None, typer.Option(help="https address.")] = None,
    code: Annotated[str | None, typer.Option(help="https address.")] = None,
    extra_data: Annotated[
        bool, typer.Option("--extra-data", help="More than the training images shaped it.")
    ] = False,
) -> None:
    """Write the form of a submission, and say which files belong beside it.

    On a terminal, what is not given is asked for.

    Example: guardbench submission new submissions/mine --dataset imagenette --resolution 64 --ipc 10
    """
    from guardbench.data.catalog import dataset_info
    from guardbench.methods import method_names
    from guardbench.store import write_text
    from guardbench.submissions.form import FORM, Submission, form_text, layout, unmeasured
    from guardbench.toml_files import checked

    if (folder / FORM).exists():
        raise GuardbenchError(f"{folder / FORM}: is there already; edit it.")
    name = folder.resolve().name
    if name in method_names():
        raise GuardbenchError(
            f"{folder}: {name!r} is a method's own name; call the folder otherwise."
        )
    where: dict[Kind, dict[str, str | None]] = {
        Kind.folder: {"path": path or "images"},
        Kind.parquet: {"path": path or "images.parquet"},
        Kind.safetensors: {"path": path or "images.safetensors"},
        Kind.hub: {"repo": repo, "revision": revision},
        Kind.url: {"url": url, "sha256": sha256},
    }
    said = _answers(
        {
            "title": (title, name),
            "author": (author, None),
            "dataset": (dataset, None),
            "resolution": (resolution, None),
            "ipc": (ipc, "10"),
            "labels": (labels and labels.value, "hard"),
            "licence": (licence, "CC-BY-4.0"),
            "made": (made, None),
            **{field: (given, None) for field, given in where[kind].items()},
        }
    )
    words: dict[str, Any] = {
        "name": name,
        "authors": author or [said.pop("author")],
        "paper": paper,
        "code": code,
        "extra_data": extra_data,
        "claimed_clean": claimed,
        "data": {"kind": kind.value, **{field: said.pop(field) for field in where[kind]}},
        **{field: value for field, value in said.items() if field != "author"},
    }
    if words["labels"] == "teacher":
        words["teacher"] = {"arch": teacher, "path": "teacher.safetensors"}
    if words["labels"] == "soft" and kind is Kind.folder:
        words["soft"] = {"path": "soft.safetensors"}
    form = checked(Submission, words, where="the form")
    info = dataset_info(form.dataset)
    write_text(folder / FORM, form_text(form), option="the argument FOLDER")
    typer.echo(f"wrote {folder / FORM}")
    if (problem := unmeasured(form)) is not None:
        typer.echo(f"note: {problem} Score it with --protocol FILE.toml, a protocol of your own.")
    typer.echo("to be put there:")
    for line in layout(form, info):
        typer.echo(f"  {line}")
    typer.echo(f"then: guardbench submission check {folder}")


def _answers(wanted: dict[str, tuple[Any, str | None]]) -> dict[str, Any]:
    """What was given, by option, or the answer of a person at a terminal.

    Args:
        wanted: what was given of each, or None, and what is offered to who is asked.
    """
    silent = [f"--{name}" for name, (given, _) in wanted.items() if given is None]
    if silent and not sys.stdin.isatty():
        raise GuardbenchError(f"say {', '.join(silent)}; nobody is here to be asked.")
    return {
        name: given if given is not None else _asked(name, default)
        for name, (given, default) in wanted.items()
    }


def _asked(name: str, default: str | None) -> str | int:
    """An answer; a whole number where that is what the form wants."""
    whole = name in ("resolution", "ipc")
    answer: str | int = typer.prompt(name, default=default, type=int if whole else str)
    return answer


@app.command()
def check(
    folder: Folder,
    copies: Annotated[
        bool,
        typer.Option("--copies/--no-copies", help="Look for copies of the dataset's own images."),
    ] = True,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Also write what was found there.", show_default=False),
    ] = None,
    data_dir: DataDir = None,
    cache_dir: CacheDir = None,
) -> None:
    """Look at a submission and list every problem; exit code 1 if there is one.

    Needs no GPU. Where the dataset is at hand, images are compared with all of its images.

    Example: guardbench submission check submissions/mine
    """
    from rich.console import Console

    from guardbench import canonical
    from guardbench.progress import Progress
    from guardbench.store import write_text
    from guardbench.submissions.pack import opened
    from guardbench.submissions.score import check_submission

    console = Console(emoji=False)
    with opened(folder) as there:
        report, _ = check_submission(
            there, data_dir=data_dir, cache_dir=cache_dir, progress=Progress(console), copies=copies
        )
    print_report(console, report)
    if json_file is not None:
        write_text(json_file, canonical.dumps(report.words()), option="--json")
    if report.problems:
        raise typer.Exit(1)


def print_report(console: Console, report: Report) -> None:
    """Prints what is there, what to know of it, and what is wrong."""
    from rich.markup import escape

    from guardbench.fields import printable

    def line(text: str) -> None:
        console.print(escape(text), highlight=False, soft_wrap=True)

    form = report.form
    if form is not None:
        line(f"{form.title} ({form.name}), by {', '.join(form.authors)}")
        line(
            f"  {'dataset':<20}{form.dataset} at {form.resolution} px, IPC {form.ipc}, {form.labels} labels"
        )
    for name, fact in report.facts.items():
        line(f"  {name:<20}{printable(fact)}")
    for note in report.notes:
        console.print(
            f"[yellow]note[/yellow]     {escape(printable(note))}", highlight=False, soft_wrap=True
        )
    for problem in report.problems.listed:
        console.print(
            f"[red]problem[/red]  {escape(str(problem))}", highlight=False, soft_wrap=True
        )
    if found := report.problems.count:
        line(f"{found} problem{'s' * (found != 1)} found")
    elif report.copied is None:
        line("ok, but copies were not looked for")
    else:
        line("ok: nothing is wrong")


@app.command()
def score(
    folder: Folder,
    protocol: Annotated[
        str | None,
        typer.Option(
            help="What is measured; where one fits dataset, resolution and IPC, it need not be named.",
            show_default=False,
        ),
    ] = None,
    device: Device = "auto",
    precision: Precision = "auto",
    engine: EngineOption = EngineName.guardbench,
    tier: TierOption = TierName.official,
    images: DevImages = None,
    references: References = True,
    smoke: Annotated[
        bool,
        typer.Option(
            "--smoke",
            help="Minutes instead of hours, unofficial: one student, a tenth of its epochs, PGD and a short "
            "Square on 50 images. Shows whether it works.",
        ),
    ] = False,
    data_dir: DataDir = None,
    cache_dir: CacheDir = None,
    output: Annotated[
        Path, typer.Option(help="The workspace: artifact, record and boards.")
    ] = Path("guardbench-runs"),
    publish: Annotated[
        bool,
        typer.Option(
            "--publish",
            help="In a checkout: also store the record beside the submission and rebuild leaderboards/.",
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Stop after the plan.")] = False,
) -> None:
    """Check a submission, train the protocol's students on it, attack them, and rank the result.

    A killed run goes on where it stopped when the same command is given again.

    Example: guardbench submission score submissions/mine
    """
    from guardbench.cli.run import print_stages
    from guardbench.forecast import expected_seconds
    from guardbench.progress import Progress
    from guardbench.ranking import threat_text
    from guardbench.report import print_record
    from guardbench.submissions.pack import opened
    from guardbench.submissions.score import Settings, execute_score, plan_score

    console = make_console()
    with opened(folder) as there:
        scoring = plan_score(
            Settings(
                folder=there,
                protocol=protocol,
                device=device,
                precision=precision,
                data_dir=data_dir,
                cache_dir=cache_dir,
                output=output,
                publish=publish,
                engine=engine.value,
                tier=tier.value,
                images=images,
                references=references and not smoke,
                smoke=smoke,
            ),
            Progress(console),
        )
        print_report(console, scoring.report)
        stages = scoring.evaluating.stages
        console.print(
            f"  protocol    {scoring.protocol.id} ({scoring.protocol.digest[:12]})", highlight=False
        )
        print_stages(console, stages, expected_seconds(scoring.run, scoring.protocol, stages))
        if dry_run:
            return
        finished = execute_score(scoring)
    console.print()
    print_record(
        console, finished.record, threat=threat_text(scoring.protocol), paths=finished.paths
    )


@app.command()
def pack(
    folder: Annotated[Path, typer.Argument(help="The submission's folder.")],
    output: Annotated[
        Path | None, typer.Option(help="The zip file; <name>.zip unless told.", show_default=False)
    ] = None,
    data_dir: DataDir = None,
    cache_dir: CacheDir = None,
) -> None:
    """Check a submission and write the one file to send; `check` and `score` take it as it is.

    Example: guardbench submission pack submissions/mine
    """
    from guardbench.canonical import file_digest
    from guardbench.progress import Progress
    from guardbench.submissions.pack import pack as write_pack
    from guardbench.submissions.score import check_submission

    report, _ = check_submission(
        folder, data_dir=data_dir, cache_dir=cache_dir, progress=Progress(), copies=False
    )
    if report.problems:
        first = report.problems.listed[0]
        raise GuardbenchError(f"{first} (all: `guardbench submission check {folder}`)")
    target = output or Path(f"{folder.resolve().name}.zip")
    if folder.is_dir() and target.resolve().is_relative_to(folder.resolve()):
        raise GuardbenchError(
            f"{target}: would lie in the submission itself, as a file that its form does not name; choose "
            "another place with --output."
        )
    size = write_pack(folder, target)
    typer.echo(f"wrote {target}: {size} bytes, SHA-256 {file_digest(target)}")
