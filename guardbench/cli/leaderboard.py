"""`guardbench leaderboard`: boards rebuilt from records, and compared with what is committed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from guardbench.errors import GuardbenchError

app = typer.Typer(
    no_args_is_help=True,
    help="Rebuild the boards from the records, or check that they are what the records give.\n\n"
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
    from guardbench.leaderboard import rebuild, write

    folder = _checkout(root)
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
