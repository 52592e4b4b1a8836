"""`guardbench doctor`: what this machine has of what guardbench needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from guardbench.cli.options import CacheDir, DataDir, Device


def doctor(
    json: Annotated[
        bool, typer.Option("--json", help="Print everything as JSON, for a bug report.")
    ] = False,
    seconds: Annotated[
        float, typer.Option(help="What the speed check may take.", min=0.1, max=600)
    ] = 10.0,
    device: Device = "auto",
    data_dir: DataDir = None,
    cache_dir: CacheDir = None,
    output: Annotated[Path, typer.Option(help="Where results would go.")] = Path("guardbench-runs"),
) -> None:
    """Look at versions, devices, precision, data, disk and speed, and say what to do where one is wrong.

    Ends with 1 where a red line makes `guardbench run --dataset digits` impossible, else with 0. The home
    folder is shown as ~ and no token is.

    Example: guardbench doctor

    Example: guardbench doctor --json > report.json
    """
    from dataclasses import asdict

    from rich.console import Console
    from rich.markup import escape

    from guardbench.doctor import Places, examine, private

    console = Console(emoji=False)
    places = Places(device=device, data_dir=data_dir, cache_dir=cache_dir, output=output)
    found = []
    for line in examine(places, seconds):
        found.append(line)
        if not json:
            mark = f"[{line.state}]{line.state:<6}[/{line.state}]"
            text = f"{mark}  [bold]{escape(line.name)}[/bold]  {escape(private(line.found))}"
            console.print(text, highlight=False, soft_wrap=True)
            if line.remedy:
                console.print(
                    f"        -> {escape(private(line.remedy))}", highlight=False, soft_wrap=True
                )
    impossible = any(line.state == "red" and line.vital for line in found)
    if json:
        from guardbench import canonical

        lines = [
            {
                key: private(value) if isinstance(value, str) else value
                for key, value in asdict(line).items()
            }
            for line in found
        ]
        typer.echo(canonical.dumps({"digits_can_be_run": not impossible, "lines": lines}), nl=False)
    elif impossible:
        console.print("a red line above makes `guardbench run --dataset digits` impossible")
    raise typer.Exit(int(impossible))
