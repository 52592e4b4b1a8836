"""All boards: what `leaderboards/` holds is a pure function of the files of the checkout.

`rebuild` makes every file of `leaderboards/`, `build_workspace_boards` those of what was run in a
workspace; `write` brings what is on disk up to date. Nothing here reads a clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from guardbench import canonical
from guardbench.board import Area, Board, Index, IndexEntry
from guardbench.board_files import FOLDER, is_board
from guardbench.ddranking import whole_set
from guardbench.errors import GuardbenchError
from guardbench.fields import Strict, printable
from guardbench.locks import locked
from guardbench.ranking import (
    BoardProtocol,
    RecordFile,
    build_leaderboard,
    commonest,
    mismatch,
    other_images,
)
from guardbench.reassessment import FOLDER as ASSESSMENTS
from guardbench.reassessment import Assessment, AssessmentFile, assessed_path, load_assessment
from guardbench.record_files import load_record, record_paths
from guardbench.records import ResultRecord
from guardbench.store import explained, write_text

LINK_LIMIT = 400  # characters
SCHEMAS: dict[str, type[Strict]] = {
    "assessment": Assessment,
    "board": Board,
    "index": Index,
    "record": ResultRecord,
}
"""Name of a JSON Schema in `leaderboards/` -> whose it is."""


def board_path(protocol: str, ipc: int) -> Path:
    """Where a board stands, from the root: `leaderboards/<protocol>/ipc<k>.json`."""
    return Path(FOLDER) / protocol / f"ipc{ipc}.json"


def read_records(
    root: Path, pattern: str, warn: Callable[[str], None] | None = None
) -> list[RecordFile]:
    """Loads every record under `root` that matches the glob `pattern`, sorted by path.

    Args:
        warn: told of each that cannot be read, which is then left out; it is an error when absent.

    Raises:
        GuardbenchError: one cannot be read, is wrong, or is a link that leads out of `root`.
    """
    files = []
    for path in record_paths(root, pattern):
        try:
            _require_inside(root, path)
            name = path.relative_to(root).as_posix()
            files.append(RecordFile(name, canonical.file_digest(path), load_record(path)))
        except GuardbenchError as error:
            if warn is None:
                raise
            warn(str(error))
    return files


def public_records(root: Path, area: Area) -> list[RecordFile]:
    """The records that are published in a checkout, of methods or of submissions; see `read_records`."""
    return read_records(root, f"{area}/*/results/**/*.json")


Loader = Callable[[str], BoardProtocol]


def rebuild(root: Path, *, load: Loader | None = None) -> dict[Path, str]:
    """Every file of `leaderboards/` from what lies under `baselines/` and `submissions/`.

    That is the records, later assessments of them, and the links of `method.toml` and
    `submission.toml`.

    Args:
        root: the checkout.
        load: protocol id -> protocol; guardbench's own protocols when absent.

    Returns:
        Path from `root` -> text: the boards, `index.json` and the JSON Schemas.

    Raises:
        GuardbenchError: a record cannot stand on any board, or an assessment does not fit its
            record; the line names the file.
    """
    files: list[RecordFile] = []
    for area in get_args(Area):
        found = public_records(root, area)
        assessed = _read_assessments(root, area, [file.path for file in found])
        links: dict[str, dict[str, str]] = {}
        for file in found:
            folder, name = file.path.split("/")[1], file.record.method.name
            if folder != name:
                raise GuardbenchError(
                    f"{printable(file.path)}: method.name: {name!r} stands in the folder of "
                    f"{printable(folder)!r}; move it to {area}/{name}/results/."
                )
            if name not in links:
                links[name] = _links(root, area, name)
            later = tuple(assessed.get(file.path, ()))
            files.append(replace(file, links=links[name], assessments=later))
    return _render(files, load or _load_protocol)


def _read_assessments(
    root: Path, area: str, records: Iterable[str]
) -> dict[str, list[AssessmentFile]]:
    """Path of a record -> the assessments of it, sorted by path."""
    known, found = set(records), dict[str, list[AssessmentFile]]()
    for path in sorted(root.glob(f"{area}/*/{ASSESSMENTS}/**/*.json")):
        _require_inside(root, path)
        name = path.relative_to(root).as_posix()
        record = assessed_path(name)
        if record is None or record not in known:
            should = "NAME.WORD.json where the record is NAME.json" if record is None else record
            raise GuardbenchError(
                f"{printable(name)}: no record that it could be of ({printable(should)}); put the "
                "record back, or remove this file."
            )
        file = AssessmentFile(name, canonical.file_digest(path), load_assessment(path))
        found.setdefault(record, []).append(file)
    return found


def _links(root: Path, area: Area, name: str) -> dict[str, str]:
    """`paper` and `code` of a method or a submission; what is no line of text is left out."""
    from guardbench.toml_files import read_toml

    path = root / area / name / ("method.toml" if area == "baselines" else "submission.toml")
    if not path.exists():
        return {}
    _require_inside(root, path)
    words = read_toml(path, what=path.stem)
    found = {key: words.get(key) for key in ("paper", "code")}
    return {
        key: text
        for key, text in found.items()
        if isinstance(text, str) and 0 < len(text) <= LINK_LIMIT and text.isprintable()
    }


def _require_inside(root: Path, path: Path) -> None:
    if not path.resolve().is_relative_to(root.resolve()) or not path.is_file():
        raise GuardbenchError(f"{printable(str(path))}: not a plain file inside {root}; remove it.")


def _render(
    files: Sequence[RecordFile], load: Loader, warn: Callable[[str], None] | None = None
) -> dict[Path, str]:
    protocols: dict[str, BoardProtocol] = {}
    fitting: dict[str, list[RecordFile]] = {}
    refused: list[str] = []
    for file in files:
        try:
            protocol = _protocol_of(file, protocols, load)
            reason = mismatch(file.record, protocol, file.record.ipc)
            if reason:
                raise GuardbenchError(f"{printable(file.path)}: {reason}")
        except GuardbenchError as error:
            refused.append(str(error))
        else:
            fitting.setdefault(protocol.id, []).append(file)
    groups: dict[tuple[str, int], list[RecordFile]] = {}
    for name, some in fitting.items():
        lists = [file.record.test.list_sha256 for file in some]
        usual = some[lists.index(str(commonest(lists)))]
        for file in some:
            if reason := other_images(file.record.test, usual):
                refused.append(f"{printable(file.path)}: {reason}")
            else:
                groups.setdefault((name, file.record.ipc), []).append(file)
    for line in refused:
        if warn is None:
            raise GuardbenchError(line)
        warn(line)
    boards = {
        (name, ipc): build_leaderboard(group, protocols[name], ipc, _whole_set(name, groups))
        for (name, ipc), group in groups.items()
    }
    texts = {board_path(*key): canonical.dumps(board) for key, board in boards.items()}
    texts[Path(FOLDER) / "index.json"] = canonical.dumps(_index(boards))
    for name, model in SCHEMAS.items():
        schema = model.model_json_schema(mode="serialization")
        texts[Path(FOLDER) / f"{name}.schema.json"] = canonical.dumps(schema)
    return dict(sorted(texts.items()))


def _whole_set(protocol: str, groups: Mapping[tuple[str, int], list[RecordFile]]) -> float | None:
    """See `ddranking.whole_set`, over all IPCs of a protocol."""
    files = [file for (name, _), group in groups.items() if name == protocol for file in group]
    return whole_set(file.record for file in sorted(files, key=lambda file: file.path))


def _protocol_of(file: RecordFile, known: dict[str, BoardProtocol], load: Loader) -> BoardProtocol:
    name = file.record.protocol
    if name not in known:
        try:
            known[name] = load(name)
        except GuardbenchError as error:
            raise GuardbenchError(f"{printable(file.path)}: protocol: {error}") from error
    return known[name]


def _load_protocol(name: str) -> BoardProtocol:
    from guardbench.protocol import load_protocol

    return load_protocol(name)


def _index(boards: Mapping[tuple[str, int], Mapping[str, Any]]) -> dict[str, Any]:
    entries = []
    for name, ipc in sorted(boards):
        board = boards[name, ipc]
        head = board["protocol"]
        entry = IndexEntry(
            path=board_path(name, ipc).relative_to(FOLDER).as_posix(),
            protocol=name,
            protocol_sha256=head["sha256"],
            title=head["title"],
            dataset=head["dataset"],
            resolution=head["resolution"],
            ipc=ipc,
            rows={track: len(rows) for track, rows in board["tracks"].items()},
        )
        entries.append(entry)
    return Index(boards=tuple(entries)).model_dump(mode="json")


def build_workspace_boards(
    workspace: Path, *, load: Loader | None = None, warn: Callable[[str], None] | None = None
) -> list[Path]:
    """Brings the boards of what was run in `workspace` up to date.

    Args:
        workspace: holds `records/<protocol>/ipc<k>/*.json`; gains `leaderboards/`.
        load: protocol id -> protocol; guardbench's own protocols when absent.
        warn: told of each record that cannot be read, or not stand on a board, such as one of an older
            protocol; such a record is an error when absent.

    Returns:
        The board files, sorted.

    Raises:
        GuardbenchError: a file cannot be read or written, or a record cannot stand on a board.
    """
    with alone_at(workspace):
        files = read_records(workspace, "records/*/ipc*/*.json", warn)
        texts = _render(files, load or _load_protocol, warn)
        write(workspace, texts)
    return [workspace / path for path in texts if is_board(path.name)]


def stale_boards(root: Path, texts: Mapping[Path, str]) -> list[Path]:
    """Boards under `root` that no record supports."""
    found = (path.relative_to(root) for path in root.glob(f"{FOLDER}/*/*.json"))
    return sorted(path for path in found if is_board(path.name) and path not in texts)


@contextmanager
def alone_at(root: Path) -> Iterator[None]:
    """Inside, no other process rebuilds the boards under `root`.

    Of two runs that end at the same time, the one that had read fewer records must not write last.
    """
    lock = root / FOLDER / ".lock"
    with ExitStack() as stack:
        with explained(lock):
            # Held for a moment: who has it is not worth a line.
            stack.enter_context(locked(lock, lambda _holder: None))
        yield


def write(root: Path, texts: Mapping[Path, str]) -> list[str]:
    """Writes what differs, each file whole or not at all, and removes boards without a record.

    Returns:
        One line a change, such as `wrote leaderboards/digits/ipc10.json`.
    """
    changes = []
    for path, text in texts.items():
        target = root / path
        if not target.is_file() or target.read_bytes() != text.encode():
            write_text(target, text)
            changes.append(f"wrote {path.as_posix()}")
    for path in stale_boards(root, texts):
        (root / path).unlink()
        if not any((root / path).parent.iterdir()):
            (root / path).parent.rmdir()
        changes.append(f"removed {path.as_posix()}: no record supports it")
    return changes
