"""`guardbench suite`: many runs, planned as one and gone on with until all are done."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    several_processes,
)
from guardbench.errors import GuardbenchError

if TYPE_CHECKING:
    from rich.console import Console

    from guardbench.pipeline import Settings
    from guardbench.suite_file import Wanted
    from guardbench.suite_run import Result, Runner
    from guardbench.suite_table import Part


def suite(
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FILE]",
            help="A TOML file of matrices (see README); --methods, --protocols and --ipcs choose from it.",
            show_default=False,
        ),
    ] = None,
    methods: Annotated[
        str, typer.Option(metavar="A,B", help="Such as guard,sre2l.", show_default=False)
    ] = "",
    datasets: Annotated[
        str, typer.Option(metavar="A,B", help="Such as digits,imagenette.", show_default=False)
    ] = "",
    protocols: Annotated[
        str,
        typer.Option(
            metavar="A,B", help="Ids such as imagenette-64, or files.", show_default=False
        ),
    ] = "",
    ipcs: Annotated[
        str,
        typer.Option(metavar="N,N", help="Images per class; by default 10.", show_default=False),
    ] = "",
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="STAGE.FIELD=VALUE",
            help="Of every cell, as `guardbench run --set`.",
            show_default=False,
        ),
    ] = None,
    references: References = False,
    shard: Annotated[
        str,
        typer.Option(
            metavar="I/N",
            help="Run the Ith of N parts, as a scheduler's array or a CI matrix counts them, from 1 on.",
            show_default=False,
        ),
    ] = "1/1",
    skip: Annotated[
        bool,
        typer.Option(
            "--skip", help="Leave out cells that cannot be run, instead of refusing the suite."
        ),
    ] = False,
    launch: Annotated[
        str,
        typer.Option(
            metavar="COMMAND",
            help="What starts each cell, such as 'accelerate launch --multi_gpu --num_processes 4'.",
            show_default=False,
        ),
    ] = "",
    seed: Annotated[int, typer.Option(help="Root of every random choice.", min=0)] = 0,
    device: Device = "auto",
    precision: Precision = "auto",
    engine: EngineOption = EngineName.guardbench,
    tier: TierOption = TierName.official,
    images: DevImages = None,
    data_dir: DataDir = None,
    cache_dir: CacheDir = None,
    output: Annotated[
        Path, typer.Option(help="The workspace, which all cells and shards may share.")
    ] = Path("guardbench-runs"),
    publish: Annotated[
        bool,
        typer.Option(
            "--publish", help="As `guardbench run --publish`; what is published is left alone."
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Stop after the plan.")] = False,
    json: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="FILE",
            dir_okay=False,
            help="Also write the plan and what became of it to FILE, as JSON.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Run every method under every protocol at every IPC, what they share once, and go on where it stopped.

    Ends with 1 when a cell failed; the others are run all the same. Give the same command again to go on.

    Example: guardbench suite --methods guard,sre2l --datasets digits --ipcs 1,10

    Example: guardbench suite leaderboards/records.toml --shard 2/8 --dry-run
    """
    number, of = _shard(shard)
    wanted = _wanted(file, methods, datasets, protocols, ipcs, tuple(set_ or ()), references)
    from rich.console import Console

    from guardbench.data.files import cache_root
    from guardbench.pipeline import Settings
    from guardbench.suite_run import Runner
    from guardbench.suite_table import as_json, print_plan, print_summary, require_room, room

    if several_processes():  # each would run every cell
        raise GuardbenchError(
            "guardbench suite is one process that starts the others: run it without a launcher, and name "
            "the launcher with --launch."
        )
    launcher = _launcher(launch)
    common = Settings(
        method="", dataset=None, protocol=None, ipc=0, seed=seed, device=device, precision=precision,
        data_dir=data_dir, cache_dir=cache_dir, output=output, publish=publish, engine=engine.value,
        tier=tier.value, images=images,
    )  # fmt: skip
    console = Console(emoji=False)
    part = _plan(console, wanted, common, number, of, decode=not dry_run, skip=skip)
    folders = room(part, output, cache_root(cache_dir))
    print_plan(console, part, folders)
    if launcher:
        console.print("expected times are of one process a cell, not of those that --launch starts")
    _require_all(part, skip)
    results, code = [], 0
    if dry_run:
        from guardbench.suite_run import result_of

        results = [result_of(cell) for cell in part.cells]
    else:
        require_room(part, folders)
        results, code = _run(console, part, Runner(launcher))
        console.print()
        print_summary(console, results)
        _boards(console, common)
    if json is not None:
        from guardbench.store import write_text

        write_text(json, as_json(part, results), option="--json")
    if code > 128:
        typer.echo("interrupted; run the same command again to go on from here", err=True)
    raise typer.Exit(code)


def _shard(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    number, of = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= number <= of:
        raise GuardbenchError(f"--shard {text}: write I/N with I from 1 to N, such as 2/4.")
    return number, of


def _launcher(text: str) -> list[str]:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise GuardbenchError(f"--launch {text}: {error}; quote it as a shell would.") from error
    if words and shutil.which(words[0]) is None:
        raise GuardbenchError(f"--launch {text}: no command {words[0]} on this machine.")
    return words


def _list(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _wanted(
    file: Path | None,
    methods: str,
    datasets: str,
    protocols: str,
    ipcs: str,
    overrides: tuple[str, ...],
    references: bool,
) -> list[Wanted]:
    """The cells that the options, or the file, name."""
    numbers = _list(ipcs)
    if not all(re.fullmatch("[0-9]{1,7}", word) and int(word) for word in numbers):
        raise GuardbenchError(f"--ipcs {ipcs}: write numbers from 1 on, such as 1,10.")
    counts = tuple(int(word) for word in numbers)
    from guardbench.suite_file import Matrix, cells, narrowed, read_suite, unique

    if file is not None:
        if datasets or overrides or references:
            raise GuardbenchError(
                f"{file}: --datasets, --set and --references stand in the file; what chooses from it is "
                "--methods, --protocols and --ipcs."
            )
        return narrowed(read_suite(file), _list(methods), _list(protocols), counts)
    if not _list(methods) or not _list(datasets) + _list(protocols):
        raise GuardbenchError(
            "say what to run: a FILE, or --methods guard,sre2l with --datasets digits or --protocols ID."
        )
    matrix = Matrix.model_construct(
        methods=_list(methods), protocols=_list(protocols), datasets=_list(datasets),
        ipcs=counts or (10,), set=overrides, references=references,
    )  # fmt: skip
    return unique(cells(matrix, Path()), "the options")


def _plan(
    console: Console,
    wanted: list[Wanted],
    common: Settings,
    number: int,
    of: int,
    *,
    decode: bool,
    skip: bool,
) -> Part:
    """This shard's cells; where they will be run, with their images decoded and looked at."""
    from dataclasses import replace

    from guardbench.progress import Progress
    from guardbench.suite import divide, official_suite, ordered, plan_suite, prepared
    from guardbench.suite_table import Part, division

    progress = Progress(console)
    with console.status("planning") if console.is_terminal else nullcontext():
        whole = plan_suite(wanted, common, progress)
        # One shard has all; several agree by what no machine moves, which is planned for its own sake.
        shards = divide(official_suite(wanted, common, progress), of) if of > 1 else [whole.cells]
    names = {cell.name for cell in shards[number - 1]}
    mine = [cell for cell in whole.cells if cell.name in names]
    if decode and (skip or all(cell.plan is not None for cell in mine)):
        fresh = any(cell.to_do and cell.plan and not cell.plan.decoded for cell in mine)
        mine = prepared(mine)
        if fresh:  # stages are known by their images, and so is what of them is done
            refused = {cell.name: cell for cell in mine if cell.plan is None}
            whole = plan_suite([cell.wanted for cell in mine], common, progress)
            mine = [refused.get(cell.name, cell) for cell in whole.cells]
    order = ordered(whole, mine)
    behind = [cell for cell in mine if cell not in order]
    return Part(
        replace(whole, cells=tuple(mine)), (*order, *behind), f"{number}/{of}", division(shards)
    )


def _require_all(part: Part, skip: bool) -> None:
    if part.refused and not skip:
        raise GuardbenchError(
            f"{len(part.refused)} of {len(part.cells)} cells cannot be run, as said above; mend that, or "
            "leave them out with --skip."
        )


def _run(console: Console, part: Part, runner: Runner) -> tuple[list[Result], int]:
    """Runs what is to do; gives all results and the exit code."""
    from guardbench.suite_run import result_of, words

    found, code = {}, 0
    to_do = [cell for cell in part.cells if cell.to_do]
    with runner.stopping():
        for place, cell in enumerate(to_do, 1):
            command = shlex.join(["guardbench", *words(cell.settings)])
            console.print()
            console.rule(f"{place} of {len(to_do)}: {cell.name}", characters="-")
            console.print(command, markup=False, highlight=False, soft_wrap=True)
            sys.stdout.flush()
            begun = time.monotonic()
            ended = runner.run(cell.settings)
            found[cell.name] = result_of(cell, ended, time.monotonic() - begun)
            if ended.stopped:
                code = ended.code
                break
            code = max(code, int(found[cell.name].state == "failed"))
    return [found.get(cell.name) or result_of(cell) for cell in part.cells], code


def _boards(console: Console, common: Settings) -> None:
    """Brings the boards up to date by all records that are there, those of other shards among them."""
    from rich.markup import escape

    from guardbench.filing import current_checkout, refresh_boards, refresh_public_boards

    def warn(line: str) -> None:
        console.print(f"[yellow]not ranked:[/yellow] {escape(line)}", highlight=False)

    if common.tier == "official" and (common.output / "records").is_dir():
        refresh_boards(common.output, warn)
    if common.publish:  # a cell may have been killed between its record and the boards
        refresh_public_boards(current_checkout())
