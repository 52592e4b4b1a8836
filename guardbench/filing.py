"""Where a finished record goes: into the workspace and its boards, and into a checkout's public ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_args

import guardbench
from guardbench.board import Area
from guardbench.commit import is_named, running_commit
from guardbench.errors import GuardbenchError
from guardbench.leaderboard import (
    alone_at,
    board_path,
    build_workspace_boards,
    public_records,
    rebuild,
    write,
)
from guardbench.protocol import Protocol, load_protocol, protocol_ids
from guardbench.ranking import other_images
from guardbench.record_files import save_record
from guardbench.records import Engine, ResultRecord, TestSet
from guardbench.store import read_text, write_text


def engine_mark(engine: Engine) -> str:
    """The end of a record's file name by whose loops ran AutoAttack, so that both records can stand."""
    return "" if engine == "guardbench" else f"-{engine}"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the record of one run goes.

    Attributes:
        workspace: the run's.
        area, name: of its folder in a checkout, such as `baselines` and `guard`.
        mark: the end of its file name, such as `-seed0`.
        own_protocol: a user's own protocol file, None for a published one.
        checkout: where it is published, None for nowhere.
    """

    workspace: Path
    area: Area
    name: str
    mark: str
    own_protocol: Path | None
    checkout: Path | None

    def record_path(self, protocol: str, ipc: int, tier: str) -> Path:
        """Where the record goes in the workspace."""
        # Boards are built from `records`, where a dev record has no place.
        folder = self.workspace / ("records" if tier == "official" else "dev")
        return folder / protocol / f"ipc{ipc}" / f"{self.name}{self.mark}.json"

    def published_path(self, protocol: str, ipc: int) -> Path | None:
        """Where it goes in the checkout; None where it is not published."""
        if self.checkout is None:
            return None
        folder = self.checkout / self.area / self.name / "results" / protocol
        return folder / f"ipc{ipc}{self.mark}.json"


def file_record(record: ResultRecord, place: Place, warn: Callable[[str], None]) -> dict[str, Path]:
    """Writes a record and brings the boards up to date that it stands on.

    Args:
        warn: told of each older record of the workspace that fits no protocol any more.

    Returns:
        The paths, by what they are.
    """
    board = board_path(record.protocol, record.ipc)
    paths = {"record": place.record_path(record.protocol, record.ipc, record.tier)}
    if record.tier == "official" and place.own_protocol is not None:
        # Kept, so that the workspace's boards can be rebuilt; before the record, which ends the run.
        kept = place.workspace / "protocols" / place.own_protocol.name
        write_text(kept, read_text(place.own_protocol, what="protocol"))
    save_record(paths["record"], record)
    if record.tier == "official":
        refresh_boards(place.workspace, warn)
        paths["board"] = place.workspace / board
    published = place.published_path(record.protocol, record.ipc)
    if place.checkout is not None and published is not None:
        paths["published"] = published
        save_record(published, record)
        refresh_public_boards(place.checkout)
        paths["public board"] = place.checkout / board
    return paths


def refresh_boards(workspace: Path, warn: Callable[[str], None]) -> None:
    """Brings the boards of a workspace up to date by the records that are there, whoever put them there.

    Args:
        warn: as in `file_record`.
    """
    build_workspace_boards(workspace, load=partial(_known_protocol, workspace), warn=warn)


def refresh_public_boards(checkout: Path) -> None:
    """Brings the boards of a checkout up to date by the records that are published in it."""
    with alone_at(checkout):
        write(checkout, rebuild(checkout))


def own_protocol(named: str | None) -> Path | None:
    """The user's own protocol file, if `--protocol` named one."""
    return Path(named) if named is not None and named.endswith(".toml") else None


def _known_protocol(workspace: Path, name: str) -> Protocol:
    """A published protocol, or one of the workspace's own."""
    own = workspace / "protocols" / f"{name}.toml"
    return load_protocol(str(own) if name not in protocol_ids() and own.is_file() else name)


def require_the_boards_images(checkout: Path, protocol: Protocol, tested: TestSet) -> None:
    """Refuses test images that would stand beside none of a protocol's public rows, before the long part.

    Raises:
        GuardbenchError: a record of the protocol is of another list of test images.
    """
    for area in get_args(Area):
        for file in public_records(checkout, area):
            if file.record.protocol == protocol.id and (reason := other_images(tested, file)):
                raise GuardbenchError(f"--publish: {reason}")


def require_known_code(checkout: Path) -> None:
    """Refuses a public row that could not name the code that makes it.

    Raises:
        GuardbenchError: this guardbench is not that of `checkout`, or is not as it was committed.
    """
    ran, commit = Path(guardbench.__file__).resolve().parent.parent, running_commit()
    if ran != checkout.resolve():
        raise GuardbenchError(
            f"--publish: the guardbench that runs is that of {ran}, and a public row is made by the one that "
            f"stands beside it: run python -m pip install -e {checkout} first."
        )
    if not is_named(commit):
        what = "its code or recipes are not committed" if commit else "git knows no commit of it"
        raise GuardbenchError(
            f"--publish: {checkout}: {what}, and a public row names the commit that made it: commit first."
        )


def require_committed(stage: Path, commits: Iterable[str | None]) -> None:
    """Refuses a public row on a finished stage, in the folder `stage`, that other code has made.

    Raises:
        GuardbenchError: one of the `commits` that made it cannot be named.
    """
    if not all(map(is_named, commits)):
        raise GuardbenchError(
            f"--publish: {stage} was made by code that is not committed, or no checkout's; delete it, and it "
            "is made again."
        )


def checkout_for(protocol: Protocol) -> Path:
    """`current_checkout`, for a record under `protocol`, which must be public; see `require_known_code`."""
    if protocol.id not in protocol_ids():
        raise GuardbenchError(
            f"--publish: {protocol.id} is your own protocol; only published ones have public boards."
        )
    checkout = current_checkout()
    require_known_code(checkout)
    return checkout


def current_checkout() -> Path:
    """The checkout around the current folder.

    Raises:
        GuardbenchError: there is none.
    """
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "baselines").is_dir() and (folder / "pyproject.toml").is_file():
            return folder
    raise GuardbenchError("--publish: no checkout of guardbench here; run it inside one.")
