"""`guardbench submission pack` and what unpacks it: one zip file, the same to the byte everywhere."""

from __future__ import annotations

import re
import shutil
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from guardbench.errors import GuardbenchError, brief
from guardbench.fields import NAME, printable
from guardbench.store import atomic_path, explained
from guardbench.submissions.files import MOST_BYTES, MOST_ENTRIES, require_plain_name, walk
from guardbench.submissions.form import FORM, load_form
from guardbench.tensor_files import directory_bytes

RATIO = 200
"""Most bytes that a byte of a packed file may become; images and weights hardly shrink."""
_EPOCH = (1980, 1, 1, 0, 0, 0)


def pack(folder: Path, target: Path) -> int:
    """Writes the submission in `folder` as one zip file; its results are left out.

    Returns:
        Bytes of the file.

    Raises:
        GuardbenchError: a file cannot be read, or the target cannot be written.
    """
    name = load_form(folder).name
    with (
        atomic_path(target) as part,
        zipfile.ZipFile(part, "w") as packed,
    ):
        for path in sorted(walk(folder)):
            if path.startswith("results/"):
                continue
            entry = zipfile.ZipInfo(f"{name}/{path}", _EPOCH)
            # Stored as they are, for PNGs and weights hardly shrink: so no library's version shows.
            entry.compress_type, entry.create_system = zipfile.ZIP_STORED, 3
            entry.external_attr = 0o100644 << 16
            entry.file_size = (folder / path).stat().st_size
            with (folder / path).open("rb") as source, packed.open(entry, "w") as stream:
                shutil.copyfileobj(source, stream)
    return target.stat().st_size


@contextmanager
def opened(submission: Path) -> Iterator[Path]:
    """The submission's folder; of a packed one, a temporary folder that goes when the block ends."""
    if not submission.is_file():
        yield submission
        return
    with tempfile.TemporaryDirectory(prefix="guardbench-") as beside:
        yield unpack(submission, Path(beside))


def unpack(packed: Path, parent: Path) -> Path:
    """Unpacks what `pack` wrote into a new folder below `parent`, whole or not at all.

    Returns:
        The submission's folder, `parent/<name>`.

    Raises:
        GuardbenchError: not such a file, or one that is hostile: links, encrypted or doubled entries,
            names that lead elsewhere, more than it may hold, or more than it says.
    """
    where = printable(packed.name)
    try:
        _check_directory(packed, where)
        with zipfile.ZipFile(packed) as archive:
            entries = archive.infolist()
            name = _checked(entries, packed.stat().st_size, where)
            target = parent / name
            if target.exists():
                raise GuardbenchError(
                    f"{target}: is there already; remove it, or unpack elsewhere."
                )
            with explained(parent):
                parent.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(prefix=".unpack-", dir=parent) as beside:
                    for entry in entries:
                        if not entry.is_dir():
                            _extract(archive, entry, Path(beside), where)
                    (Path(beside) / name).replace(target)
            return target
    except (
        zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, NotImplementedError, RuntimeError,
        EOFError, ValueError, struct.error,
    ) as error:  # fmt: skip
        shown = printable(brief(error))
        raise GuardbenchError(f"{where}: is no packed submission ({shown}).") from error


def _check_directory(packed: Path, where: str) -> None:
    """Refuses an archive whose directory alone is longer than that of `MOST_ENTRIES` plain files."""
    length = directory_bytes(packed, packed.stat().st_size)
    if length > 200 * MOST_ENTRIES:
        raise GuardbenchError(f"{where}: its directory has {length} bytes; not unpacked.")


def _checked(entries: list[zipfile.ZipInfo], size: int, where: str) -> str:
    """The one folder of an archive whose entries are all plain; nothing has been read of them yet."""
    if len(entries) > MOST_ENTRIES:
        raise GuardbenchError(f"{where}: holds more than {MOST_ENTRIES} files.")
    total = sum(entry.file_size for entry in entries)
    if total > MOST_BYTES or total > RATIO * size:
        raise GuardbenchError(f"{where}: {size} bytes would become {total}; not unpacked.")
    tops, seen = set(), set()
    for entry in entries:
        shown = f"{where}: {printable(entry.filename)}"
        parts = PurePosixPath(entry.filename).parts
        raw = entry.filename.rstrip("/").split("/")
        hostile = any(part in ("", ".", "..") for part in raw) or "\\" in entry.filename
        if hostile or entry.filename.startswith("/") or ":" in raw[0]:
            raise GuardbenchError(f"{shown}: leads out of the folder; not unpacked.")
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise GuardbenchError(f"{shown}: is a link or a special file; not unpacked.")
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise GuardbenchError(f"{shown}: is compressed in an unusual way; not unpacked.")
        if entry.flag_bits & 0x1:
            raise GuardbenchError(f"{shown}: is encrypted; not unpacked.")
        if entry.filename in seen:
            raise GuardbenchError(f"{shown}: stands twice; not unpacked.")
        for part in raw:
            require_plain_name(part)
        seen.add(entry.filename)
        tops.add(parts[0])
    if len(tops) != 1 or f"{next(iter(tops))}/{FORM}" not in seen:
        raise GuardbenchError(f"{where}: must hold one folder with a {FORM}.")
    name = str(next(iter(tops)))
    if not re.fullmatch(NAME, name):
        raise GuardbenchError(f"{where}: {printable(name)}: is no name of a submission.")
    return name


def _extract(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, into: Path, where: str) -> None:
    target = into / entry.filename
    target.parent.mkdir(parents=True, exist_ok=True)
    left = entry.file_size
    with archive.open(entry) as source, target.open("xb") as stream:
        while piece := source.read(1 << 20):
            left -= len(piece)
            if left < 0:
                raise GuardbenchError(
                    f"{where}: {printable(entry.filename)} is longer than it says; not unpacked."
                )
            stream.write(piece)
