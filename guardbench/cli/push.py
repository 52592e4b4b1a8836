"""`guardbench push`: a distilled dataset to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def push(
    folder: Annotated[
        Path,
        typer.Argument(
            help="A distilled dataset: the `distilled` folder that a run has made, with manifest.json."
        ),
    ],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The dataset on the Hub.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make a new dataset private; refuse a public one.")
    ] = False,
    branch: Annotated[
        str | None,
        typer.Option(
            "--branch",
            "--revision",
            help="Push to this branch, made where it is missing, instead of the main one.",
            show_default=False,
        ),
    ] = None,
    license_: Annotated[
        str,
        typer.Option(
            "--license",
            help="The Hub's identifier of the licence, such as cc-by-4.0. Mind the terms of the dataset "
            "that was distilled.",
        ),
    ] = "unknown",
    record: Annotated[
        Path | None,
        typer.Option(
            help="The record of this very set, for a table of its numbers on the card.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        Path | None,
        typer.Option(
            "--dry-run",
            metavar="DIR",
            file_okay=False,
            help="Write what would be pushed to DIR and stop; asks nothing of the network.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Push a distilled dataset to the Hugging Face Hub, in one commit and with a card.

    The Hub gets the exact artifact and a copy that datasets.load_dataset reads. The token is that of
    `hf auth login`, or HF_TOKEN.

    Example: guardbench push mine/distilled jane/digits-guard-ipc10 --record mine/guard-seed0.json
    """
    from rich.console import Console

    from guardbench.hub_set import Wish, write_push
    from guardbench.hub_set import push as push_set
    from guardbench.progress import Progress
    from guardbench.record_files import load_record

    console = Console(emoji=False)
    progress = Progress(console)
    wish = Wish(
        folder=folder,
        repo=repo,
        private=private,
        branch=branch,
        licence=license_,
        record=None if record is None else load_record(record),
    )
    if dry_run is not None:
        manifest = write_push(wish, dry_run, progress)
        lines = {"written": str(dry_run), "set": manifest.sha256}
    else:
        pushed = push_set(wish, progress)
        state = pushed.commit + ("" if pushed.changed else " (nothing is new)")
        lines = {"pushed": pushed.url, "commit": state, "set": pushed.manifest.sha256}
    for name, text in lines.items():
        console.print(f"{name:<8} {text}", highlight=False, markup=False, soft_wrap=True)
