"""`guardbench pull`: a distilled dataset from the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def pull(
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The dataset on the Hub.")],
    output: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            file_okay=False,
            help="Where the set goes: a new folder, or an empty one.",
            show_default=False,
        ),
    ],
    revision: Annotated[
        str | None,
        typer.Option(
            help="A branch, a tag or a commit; by default the main branch.", show_default=False
        ),
    ] = None,
) -> None:
    """Pull a distilled dataset that was pushed to the Hugging Face Hub, and check every digest.

    An interrupted pull goes on, with the files that have arrived, when the same command is given again.

    Example: guardbench pull jane/digits-guard-ipc10 --output digits-guard-ipc10
    """
    from rich.console import Console

    from guardbench.hub_set import pull as pull_set
    from guardbench.progress import Progress

    console = Console(emoji=False)
    pulled = pull_set(repo, output, revision=revision, progress=Progress(console))
    manifest = pulled.manifest
    what = (
        f"{manifest.dataset} at {manifest.resolution} px by {manifest.method}, IPC {manifest.ipc}, "
        f"{manifest.label_kind} labels"
    )
    lines = {
        "pulled" if pulled.fresh else "is there": what,
        "from": f"{repo} at {pulled.commit}",
        "to": str(output),
        "set": manifest.sha256,
    }
    for name, text in lines.items():
        console.print(f"{name:<8} {text}", highlight=False, markup=False, soft_wrap=True)
