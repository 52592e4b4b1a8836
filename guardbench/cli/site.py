"""`guardbench site`: the boards as a static site, built into a folder and looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from guardbench.interrupts import Interrupted

app = typer.Typer(
    no_args_is_help=True,
    help="Render the boards as a static site that needs neither a server nor a network.\n\n"
    "Example: guardbench site build --output site",
)

Root = Annotated[
    Path | None,
    typer.Option(
        help="The checkout; by default the nearest folder upwards that holds baselines/ and leaderboards/, "
        "or else guardbench-runs/ here.",
        show_default=False,
    ),
]
Workspace = Annotated[
    Path | None,
    typer.Option(
        help="Instead of a checkout: what `guardbench run` has written, such as guardbench-runs.",
        show_default=False,
    ),
]
Output = Annotated[Path, typer.Option(help="The folder of the site; other files in it stay.")]


@app.command()
def build(root: Root = None, workspace: Workspace = None, output: Output = Path("site")) -> None:
    """Write the site: a page a board, a page a row. Open its index.html.

    Example: guardbench site build --workspace guardbench-runs --output site
    """
    _build(root, workspace, output)
    typer.echo(f"open   {output / 'index.html'}")


@app.command()
def serve(
    root: Root = None,
    workspace: Workspace = None,
    output: Output = Path("site"),
    port: Annotated[
        int, typer.Option(help="On 127.0.0.1; 0 takes any that is free.", min=0, max=65535)
    ] = 8000,
    open_: Annotated[bool, typer.Option("--open", help="Show it in a browser.")] = False,
) -> None:
    """Bring the site up to date and serve it on this machine until Ctrl-C.

    Example: guardbench site serve --port 8000 --open
    """
    from guardbench.site.serve import HOST, make_server

    _build(root, workspace, output)
    with make_server(output, port) as server:
        address = f"http://{HOST}:{server.server_port}/"
        typer.echo(f"serve  {address} (Ctrl-C ends it)")
        if open_:
            import webbrowser

            webbrowser.open(address)
        try:
            server.serve_forever()
        except Interrupted:
            typer.echo("")


def _build(root: Path | None, workspace: Path | None, output: Path) -> None:
    from guardbench.site.build import render, write_site
    from guardbench.site.read import find_source, read_boards

    folder, own = find_source(root, workspace)
    boards = read_boards(folder, workspace=own)
    files = render(boards)
    changes = write_site(output, files)
    rows = sum(len(shown.entries) for shown in boards)
    typer.echo(
        f"site   boards: {len(boards)}, rows: {rows}, files: {len(files)} ({changes} written or removed)"
    )
