"""Boards on disk: any schema version in, from a file, a folder, or a revision of the checkout."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guardbench import json_files
from guardbench.board import Board, Index, ranks
from guardbench.errors import GuardbenchError, brief
from guardbench.fields import printable
from guardbench.migrations import Migration, migrate
from guardbench.store import read_text

FOLDER = "leaderboards"
FILE_LIMIT = 64 << 20
REMEDY = "Boards are written by `guardbench leaderboard build`, not by hand; build this one again."


def _to_2(words: dict[str, Any]) -> dict[str, Any]:
    """Version 2 ranks by interval and says what it ranked by; before it nothing was ever lowered."""
    head = words["protocol"]
    tracks = {name: _rows_2(rows, head["rank_by"]) for name, rows in words["tracks"].items()}
    return {**words, "protocol": {**head, "superseded_by": None}, "tracks": tracks}


def _rows_2(rows: list[dict[str, Any]], rank_by: str) -> list[dict[str, Any]]:
    made = []
    for row in sorted(rows, key=lambda row: row["method"]["official"] is not True):
        ranked = dict(row["worst_case"] if rank_by == "worst_case" else row["attacks"][rank_by])
        for name in ("attacks", "excluded"):
            ranked.pop(name, None)
        submitted = row["record"]["path"].startswith("submissions/")
        area = "submissions" if submitted else "baselines"
        new: dict[str, Any] = {
            "ranked": ranked,
            "area": area,
            "links": {},
            "scores": None,
            "history": [],
        }
        made.append({**row, **new})
    found = ranks(
        [(r["method"]["official"], r["ranked"]["low"], r["ranked"]["high"]) for r in made]
    )
    return [{**row, "rank": rank} for row, rank in zip(made, found, strict=True)]


def _as_it_was(words: dict[str, Any]) -> dict[str, Any]:
    """The index of version 1 had the fields of version 2."""
    return words


# MIGRATIONS[k] turns the words of version k + 1 into those of version k + 2. A published entry
# never changes; with each, tests/golden gains a board of the version that it leads to.
BOARD_MIGRATIONS: tuple[Migration, ...] = (_to_2,)
INDEX_MIGRATIONS: tuple[Migration, ...] = (_as_it_was,)


@dataclass(frozen=True)
class BoardFile:
    """A board, and the schema version in which its file was written."""

    version: int
    board: Board

    @property
    def key(self) -> tuple[str, int]:
        """Protocol id and images per class."""
        return self.board.protocol.id, self.board.ipc


@dataclass(frozen=True)
class Boards:
    """Boards of one place.

    Attributes:
        where: as the user named it, printable.
        single: the place is one board file.
        files: protocol id and images per class -> board.
    """

    where: str
    single: bool
    files: dict[tuple[str, int], BoardFile]


def load_board(path: Path) -> Board:
    """Reads and checks a board file, of any schema version there has been.

    Raises:
        GuardbenchError: it cannot be read, is over 64 MiB, is no board, is newer than this
            guardbench, or a field is wrong: one line naming the file, the field and the way out.
    """
    return _load(path).board


def load_index(path: Path) -> Index:
    """Reads and checks `leaderboards/index.json`, of any schema version; errors as `load_board`."""
    text = read_text(path, what="index", limit=FILE_LIMIT)

    def make(words: dict[str, Any]) -> Index:
        return json_files.strictly(Index, _migrated(words, INDEX_MIGRATIONS))

    return json_files.parse(text, make, where=str(path), what="index of boards", remedy=REMEDY)


def parse_board(text: str, where: str) -> BoardFile:
    """As `load_board`, of the text of a file that is called `where` in errors."""

    def make(words: dict[str, Any]) -> BoardFile:
        board = json_files.strictly(Board, _migrated(words, BOARD_MIGRATIONS))
        return BoardFile(words["schema_version"], board)

    return json_files.parse(text, make, where=where, what="board", remedy=REMEDY)


def _migrated(words: dict[str, Any], migrations: Sequence[Migration]) -> dict[str, Any]:
    try:
        return migrate(words, migrations)
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"a field of that schema version is missing or of another kind ({brief(error)})"
        raise ValueError(printable(reason)) from error


def _load(path: Path) -> BoardFile:
    return parse_board(read_text(path, what="board", limit=FILE_LIMIT), str(path))


def read_boards(where: str) -> Boards:
    """The boards of a board file, of a `leaderboards` folder, or of a revision of a git checkout.

    Args:
        where: a file, a folder, or `REV:`, such as `HEAD~1:` or `v1.0:leaderboards/digits`.

    Raises:
        GuardbenchError: there is no such place, no board in it, or one of them cannot be read.
    """
    path = Path(where)
    if path.is_file():
        found = [_load(path)]
    elif path.is_dir():
        found = _of_folder(path)
    elif ":" in where:
        found = _of_revision(where)
    else:
        raise GuardbenchError(
            f"{printable(where)}: neither a board file nor a folder of boards, nor a revision of the "
            "checkout such as HEAD~1: (with its colon)."
        )
    boards: dict[tuple[str, int], BoardFile] = {}
    for file in found:
        if file.key in boards:
            raise GuardbenchError(
                f"{printable(where)}: two boards of {file.key[0]} at IPC {file.key[1]}; name one file."
            )
        boards[file.key] = file
    return Boards(printable(where), path.is_file() or is_board(where.rpartition("/")[2]), boards)


def is_board(name: str) -> bool:
    """Whether a board may be called so: `ipc<k>.json`."""
    return re.fullmatch(r"ipc\d+\.json", name) is not None


def _of_folder(folder: Path) -> list[BoardFile]:
    inner = folder / FOLDER
    top = inner if inner.is_dir() else folder
    paths = sorted(path for path in top.glob("**/ipc*.json") if is_board(path.name))
    if not paths and not (top / "index.json").is_file():
        raise GuardbenchError(
            f"{printable(str(folder))}: no board in it; name a {FOLDER} folder or a board file."
        )
    for path in paths:
        if not path.is_file():
            raise GuardbenchError(f"{printable(str(path))}: not a plain file; remove it.")
    return [_load(path) for path in paths]


def _of_revision(where: str) -> list[BoardFile]:
    revision, _, inner = where.partition(":")
    ask = _asking(where)
    if not revision or revision.startswith("-"):
        raise GuardbenchError(f"{printable(where)}: name a revision before the colon, as HEAD~1:.")
    commit = ask("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}").strip()
    listed = ask("ls-tree", "-r", "-z", "--name-only", "--full-tree", commit, "--", inner or FOLDER)
    paths = [path for path in listed.split("\0") if is_board(path.rpartition("/")[2])]
    if not paths and inner:
        raise GuardbenchError(f"{printable(where)}: no board there.")
    return [parse_board(ask("show", f"{commit}:{path}"), f"{revision}:{path}") for path in paths]


def _asking(where: str) -> Callable[..., str]:
    def ask(*words: str) -> str:
        try:
            run = subprocess.run(["git", *words], capture_output=True, timeout=60, check=True)
            return run.stdout.decode("utf-8")
        except subprocess.CalledProcessError as error:
            said = error.stderr.decode("utf-8", "replace").strip().splitlines()
            reason = printable(said[0], 160) if said else "there is no such revision"
        except (OSError, subprocess.SubprocessError) as error:
            reason = f"git cannot be asked: {brief(error)}"
        except UnicodeDecodeError:
            reason = "what git answers is not UTF-8 text"
        raise GuardbenchError(f"{printable(where)}: {reason}; name a file, a folder or REV:.")

    return ask
