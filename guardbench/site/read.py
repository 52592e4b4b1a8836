"""What a site is made of: the boards, and of each row its record, its curves and its picture."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from guardbench import canonical
from guardbench.board import Board, Row
from guardbench.board_files import FOLDER, load_board, load_index
from guardbench.curve_files import Curve, load_curve
from guardbench.errors import GuardbenchError
from guardbench.fields import printable
from guardbench.leaderboard import board_path
from guardbench.protocol import Protocol, load_protocol, protocol_ids
from guardbench.record_files import CURVE_SUFFIX, load_record, record_paths
from guardbench.records import LabelKind, ResultRecord
from guardbench.store import read_text

TRACKS: tuple[LabelKind, ...] = ("hard", "soft", "teacher")
PICTURE_LIMIT = 8 << 20
PICTURE_SIDE = 16384


@dataclass(frozen=True)
class Picture:
    """A PNG: its bytes as they lie on disk, and its size in pixels."""

    data: bytes
    width: int
    height: int


@dataclass(frozen=True)
class Entry:
    """A row, and what lies beside its record.

    Attributes:
        row: as the board has it.
        track: which ranking it stands in.
        record: the file that `row.record` names, its digest checked.
        curves: file name and curve, of `<record stem>*.curve.json`, sorted by name.
        picture: the distilled images, None where there is no PNG of them.
    """

    row: Row
    track: LabelKind
    record: ResultRecord
    curves: tuple[tuple[str, Curve], ...]
    picture: Picture | None

    @property
    def slug(self) -> str:
        """The name of its page: the method's, and a digest of the record's path, which is unique."""
        return f"{self.row.method.name}-{canonical.digest(self.row.record.path)[:8]}"


@dataclass(frozen=True)
class Shown:
    """A board with its rows.

    Attributes:
        board: as its file has it.
        entries: the rows of all tracks, hard, soft, teacher, each in the board's order.
        protocol: what it measures, None where this guardbench does not have that very protocol.
    """

    board: Board
    entries: tuple[Entry, ...]
    protocol: Protocol | None

    @property
    def folder(self) -> str:
        """Where its rows' pages stand in the site."""
        return f"boards/{self.board.protocol.id}/ipc{self.board.ipc}"

    def of(self, track: LabelKind) -> tuple[Entry, ...]:
        """The rows of one track, best first."""
        return tuple(entry for entry in self.entries if entry.track == track)


def find_source(root: Path | None, workspace: Path | None) -> tuple[Path, bool]:
    """The folder to read, and whether it is a workspace.

    Where neither is named: the nearest checkout upwards, else `guardbench-runs/` here.

    Raises:
        GuardbenchError: both are named, or there is nothing.
    """
    if root is not None and workspace is not None:
        raise GuardbenchError("--root and --workspace name one place each; drop one.")
    if workspace is not None:
        return workspace, True
    if root is not None:
        return root, False
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "baselines").is_dir() and (folder / FOLDER).is_dir():
            return folder, False
    if (here / "guardbench-runs" / FOLDER).is_dir():
        return Path("guardbench-runs"), True
    raise GuardbenchError(
        f"no {FOLDER}/ here or above, and no guardbench-runs/ here; name a checkout with --root or "
        "what `guardbench run` wrote with --workspace."
    )


def read_boards(root: Path, *, workspace: bool = False) -> tuple[Shown, ...]:
    """Every board under `root` with all that its pages show, in the order of the index.

    Args:
        root: a checkout, or a workspace of `guardbench run`.
        workspace: which of the two; in a workspace, pictures are found beside the artifacts too.

    Raises:
        GuardbenchError: a file is missing or wrong, or a board is not of the records that lie there;
            the line names the file and the way out.
    """
    again = (
        "run `guardbench run` with this --output again"
        if workspace
        else "run `guardbench leaderboard build`"
    )
    index = root / FOLDER / "index.json"
    if not index.is_file():
        raise GuardbenchError(f"{printable(str(index))}: no boards here; {again}.")
    previews = _previews(root) if workspace else {}
    return tuple(
        _shown(root, load_board(root / board_path(entry.protocol, entry.ipc)), again, previews)
        for entry in load_index(index).boards
    )


def _shown(root: Path, board: Board, again: str, previews: Mapping[str, Path]) -> Shown:
    entries = []
    for track in TRACKS:
        for row in getattr(board.tracks, track):
            path = _plain(root, root / row.record.path)
            if canonical.file_digest(path) != row.record.sha256:
                raise GuardbenchError(
                    f"{printable(row.record.path)}: not the record that its board was built from; {again}."
                )
            record = load_record(path)
            curves = tuple(_curves(root, path, record))
            entries.append(
                Entry(row, track, record, curves, _picture(root, path, record, previews))
            )
    return Shown(board, tuple(entries), _protocol(root, board))


def _plain(root: Path, path: Path) -> Path:
    """`path`, which must be a file inside `root`, not a link out of it."""
    if not path.resolve().is_relative_to(root.resolve()) or not path.is_file():
        raise GuardbenchError(f"{printable(str(path))}: not a plain file inside {root}.")
    return path


def _curves(root: Path, record: Path, measured: ResultRecord) -> Iterator[tuple[str, Curve]]:
    """The curves whose name begins with this record's, and with no longer one beside it."""
    found = sorted(record.parent.glob(f"*{CURVE_SUFFIX}"))
    stems = [path.stem for path in record_paths(record.parent, "*.json")]
    for path in found:
        name = path.name.removesuffix(CURVE_SUFFIX)
        owners = [
            stem for stem in stems if name == stem or name.startswith((f"{stem}-", f"{stem}."))
        ]
        if max(owners, key=len, default=None) != record.stem:
            continue
        curve = load_curve(_plain(root, path))
        if curve.protocol_sha256 != measured.protocol_sha256:
            raise GuardbenchError(
                f"{printable(str(path))}: protocol_sha256: {curve.protocol_sha256[:12]}, the record beside "
                f"it has {measured.protocol_sha256[:12]}; measure the curve again or move it away."
            )
        yield path.name, curve


def _picture(
    root: Path, record: Path, measured: ResultRecord, previews: Mapping[str, Path]
) -> Picture | None:
    beside = record.with_suffix(".png")
    path = beside if beside.exists() else previews.get(measured.artifact.sha256)
    if path is None:
        return None
    small = _plain(root, path).stat().st_size <= PICTURE_LIMIT
    data = path.read_bytes() if small else b""
    size = png_size(data)
    if size is None or not all(0 < side <= PICTURE_SIDE for side in size):
        raise GuardbenchError(
            f"{printable(str(path))}: not a PNG of at most {PICTURE_SIDE} pixels a side and "
            f"{PICTURE_LIMIT >> 20} MiB; draw it again or remove it."
        )
    return Picture(data, *size)


def png_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a PNG; None unless it is one from its first byte to its last."""
    kinds: list[bytes] = []
    place = 8
    while (
        data.startswith(b"\x89PNG\r\n\x1a\n") and place + 12 <= len(data) and b"IEND" not in kinds
    ):
        length, kind = struct.unpack_from(">I4s", data, place)
        end = place + 12 + length
        if (
            end > len(data)
            or zlib.crc32(data[place + 4 : end - 4]).to_bytes(4, "big") != data[end - 4 : end]
        ):
            return None
        kinds.append(kind)
        place = end
    if (
        place != len(data)
        or kinds[:1] != [b"IHDR"]
        or kinds[-1:] != [b"IEND"]
        or b"IDAT" not in kinds
    ):
        return None
    width, height = struct.unpack_from(">II", data, 16)
    return width, height


def _previews(workspace: Path) -> dict[str, Path]:
    """Digest of an artifact -> its preview, for the artifacts that a workspace has kept."""
    found = {}
    for manifest in sorted(workspace.glob("*/*/distilled/manifest.json")):
        preview = manifest.with_name("preview.png")
        if preview.is_file():
            try:
                words = json.loads(read_text(manifest, what="manifest", limit=4 << 20))
            except (ValueError, RecursionError) as error:
                raise GuardbenchError(
                    f"{printable(str(manifest))}: not valid JSON; remove its folder."
                ) from error
            found[canonical.digest(words)] = preview
    return found


def _protocol(root: Path, board: Board) -> Protocol | None:
    """The board's protocol: guardbench's own, or the one that a workspace keeps a copy of."""
    name = board.protocol.id
    own = root / "protocols" / f"{name}.toml"
    if name not in protocol_ids() and not own.is_file():
        return None
    found = load_protocol(name if name in protocol_ids() else str(own))
    return found if found.digest == board.protocol.sha256 else None
