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
    """Write the form of a submission; on a terminal, what is not given is asked for.

    Example: guardbench submission new submissions/mine --dataset imagenette --resolution 64 --ipc 10
    """
    from pydantic import ValidationError

    from guardbench.protocol import first_problem
    from guardbench.store import write_text
    from guardbench.submissions.form import FORM, Submission, form_text

    if (folder / FORM).exists():
        raise GuardbenchError(f"{folder / FORM}: is there already; edit it.")
    kind_path = {
        "folder": "images",
        "parquet": "images.parquet",
        "safetensors": "images.safetensors",
    }
    data: dict[str, Any] = {"kind": kind.value, "path": path or kind_path.get(kind.value)}
    if kind in (Kind.hub, Kind.url):
        fields = {"repo": repo, "revision": revision}
        if kind is Kind.url:
            fields = {"url": url, "sha256": sha256}
        data = {"kind": kind.value, **{name: _asked(given, name) for name, given in fields.items()}}
    label_kind = _asked(labels.value if labels else None, "labels", "hard")
    words: dict[str, Any] = {
        "name": folder.resolve().name,
        "title": _asked(title, "title", folder.resolve().name),
        "authors": author or [_asked(None, "author")],
        "paper": paper,
        "code": code,
        "licence": _asked(licence, "licence", "CC-BY-4.0"),
        "dataset": _asked(dataset, "dataset"),
        "resolution": _number(resolution, "resolution"),
        "ipc": _number(ipc, "ipc", "10"),
        "labels": label_kind,
        "made": _asked(made, "made"),
        "extra_data": extra_data,
        "claimed_clean": claimed,
        "data": data,
    }
    if label_kind == "teacher":
        words["teacher"] = {"arch": teacher, "path": "teacher.safetensors"}
    try:
        form = Submission.model_validate(words)
    except ValidationError as error:
        raise GuardbenchError(f"{folder / FORM}: {first_problem(error)}.") from error
    write_text(folder / FORM, form_text(form))
    typer.echo(f"wrote {folder / FORM}")
    where = form.data.path or "what the form names"
    typer.echo(f"put the images at {where}, then: guardbench submission check {folder}")


def _number(given: int | None, field: str, default: str | None = None) -> int:
    text = _asked(given, field, default)
    if not text.isascii() or not text.isdigit():
        raise GuardbenchError(f"{field}: {text!r} is no whole number.")
    return int(text[:9])


def _asked(given: Any, field: str, default: str | None = None) -> str:
    """What was given, or the answer of a person at a terminal."""
    if given is not None:
        return str(given)
    if not sys.stdin.isatty():
        raise GuardbenchError(f"--{field.replace('_', '-')}: say it (nobody is here to be asked).")
    return str(typer.prompt(field, default=default))


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

    from guardbench.records import printable

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
            help="What is measured; by default the one that fits dataset, resolution and IPC.",
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
    from guardbench.pipeline import expected_seconds
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
