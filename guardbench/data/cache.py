"""Decoded images, built once: one file of uint8 rows and one JSON a split and resolution.

Rows are appended in the order in which a source has its images, so that nothing is held in memory; what
a builder has finished of its shards stands in a journal, and a killed build goes on behind it. An entry
is finished when both are there; they appear by renaming, the rows last.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from guardbench import canonical
from guardbench.data.decode import PREPROCESSING, Block, Digest, decoded
from guardbench.data.files import (
    CACHE_VARIABLE,
    locked,
    remove_stale_parts,
    require_space,
)
from guardbench.data.pixels import PixelFile
from guardbench.data.source import Shard, Source
from guardbench.errors import GuardbenchError
from guardbench.progress import Progress
from guardbench.store import explained, read_text, write_text

_FORMAT = 1
_META_LIMIT = 1 << 30
_HEADER_BYTES = 128
_JOURNAL_EVERY_S = 5.0
_READ_BYTES = 8 << 20
_VERIFIED_BYTES = 2 << 30
"""Rows up to this size are compared with their digest when they are opened: seconds at most."""

Pixels = npt.NDArray[np.uint8] | PixelFile


@dataclass(frozen=True, eq=False)
class Entry:
    """One split at one resolution: `images` is uint8 [N, C, R, R] and read-only."""

    images: Pixels
    labels: tuple[int, ...]
    ids: tuple[str, ...]
    classes: tuple[str, ...]
    digest: str


def in_memory(source: Source, resolution: int) -> Entry:
    """An entry that is too small to be worth a file."""
    ids, labels, rows, sha = [], [], [], Digest()
    for block in decoded(source.open(), resolution, source.channels):
        ids += [item.id for item in block.items]
        labels += [item.label for item in block.items]
        rows.append(block.pixels)
        sha.add(block.pixels)
    images = np.concatenate(rows)
    images.flags.writeable = False
    found = sha.end(source.classes, ids, labels, images.shape)
    return Entry(images, tuple(labels), tuple(ids), source.classes, found)


def cached(source: Source, resolution: int, root: Path, name: str, progress: Progress) -> Entry:
    """The entry of `source` at `resolution` below `root`, built first if need be.

    One process builds and others wait. A build that was killed, or stopped at a broken image, goes on
    behind its last whole shard; an entry that was truncated or does not hold together is built again;
    changed data have another key, and keep the shards before the first that changed. So is one whose
    bytes no longer give its digest, unless it is larger than 2 GiB, which would take long to read.

    Args:
        source: what to decode.
        resolution: R, in pixels.
        root: the cache folder.
        name: dataset and split, such as `imagenette-val`, for file names and messages.
        progress: where the stage is shown.

    Raises:
        GuardbenchError: a broken image, a folder that cannot be written, or a full disk.
    """
    target = _target(source, resolution, root, name)
    entry = _read(target, source, resolution)
    if entry is not None:
        return entry
    what = f"{name} at {resolution} px"
    place = target.with_name(f"{name}-{resolution}px")
    with locked(place, progress, what) as held:
        entry = _read(target, source, resolution)
        if entry is not None:
            return entry
        if held:
            remove_stale_parts(_meta_path(target))
            remove_stale_parts(place.with_name(f".{place.name}.journal"))
        else:  # two may build, so each has files of its own
            place = place.with_name(f"{place.name}-{os.getpid()}")
        with explained(target, option=CACHE_VARIABLE):
            _meta_path(target).unlink(missing_ok=True)
            _Build(target, place, source, resolution).run(progress, what, kept=held)
    entry = _read(target, source, resolution)
    if entry is None:
        raise GuardbenchError(f"{target}: the cache changed while it was built; run again.")
    return entry


def find(source: Source, resolution: int, root: Path, name: str) -> Entry | None:
    """What `cached` would return without building anything; None where it would have to build."""
    return _read(_target(source, resolution, root, name), source, resolution)


def _target(source: Source, resolution: int, root: Path, name: str) -> Path:
    key = canonical.digest([_FORMAT, PREPROCESSING, name, resolution, source.fingerprint])
    return root / "datasets" / f"{name}-{resolution}px-{key[:16]}.npy"


def _meta_path(target: Path) -> Path:
    return target.with_suffix(".json")


class _Build:
    """One build of an entry: rows in a `.part` file, and a line of the journal for each whole shard."""

    def __init__(self, target: Path, place: Path, source: Source, resolution: int) -> None:
        self.target, self.source, self.resolution = target, source, resolution
        self.part = place.with_name(f".{place.name}.part")
        self.journal = place.with_name(f".{place.name}.journal")
        self.shape = (source.channels, resolution, resolution)
        self.size = int(np.prod(self.shape))
        self.made_by = canonical.digest([_FORMAT, PREPROCESSING, source.classes])
        self.shards = source.open()
        self.ids: list[str] = []
        self.labels: list[int] = []
        self.unsaved: list[str] = []
        self.finished = 0  # shards
        self.sha = Digest()

    def run(self, progress: Progress, what: str, *, kept: bool) -> None:
        """Builds the entry.

        Args:
            kept: whether the part and its journal stay where the build does not come to its end.
        """
        try:
            self._resume()
            left = self.shards[self.finished :]
            known = sum(shard.count or 0 for shard in left)
            whole = all(shard.count is not None for shard in left)
            total = len(self.ids) + known if whole else self.source.expected
            require_space(self.target, known * self.size)
            with self.part.open("r+b" if self.part.exists() else "w+b") as stream:
                stream.truncate(_HEADER_BYTES + len(self.ids) * self.size)
                if not self.source.shuffled:
                    self._digest_of(stream, progress, what)
                stream.seek(0, os.SEEK_END)
                with (
                    progress.stage(f"decode {what}", total, "images", len(self.ids)) as stage,
                    contextlib.closing(self._decode(left, stream)) as blocks,
                ):
                    for block in blocks:
                        self._append(stream, block)
                        stage.advance(len(block.items))
                    stage.total = stage.done
                self._end(stream, progress, what)
            self.journal.unlink(missing_ok=True)
        finally:
            if not (kept and self.journal.exists()):
                self.part.unlink(missing_ok=True)
                self.journal.unlink(missing_ok=True)

    def _resume(self) -> None:
        """Takes over the first shards as far as an earlier build finished them and none has changed."""
        room = self.part.stat().st_size - _HEADER_BYTES if self.part.is_file() else 0
        lines = []
        with contextlib.suppress(FileNotFoundError):
            lines = self.journal.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = []
        for shard, line in zip(self.shards, lines, strict=False):
            try:
                words = json.loads(line)
                ids, labels = words["ids"], words["labels"]
            except (ValueError, KeyError, TypeError):  # the kill came while it was written
                break
            if words["shard"] != self._name(shard) or len(ids) * self.size > room:
                break
            room -= len(ids) * self.size
            self.ids += ids
            self.labels += labels
            kept.append(line + "\n")
        self.finished = len(kept)
        self.journal.parent.mkdir(parents=True, exist_ok=True)
        if kept:
            write_text(self.journal, "".join(kept), option=CACHE_VARIABLE)
        else:
            self.journal.unlink(missing_ok=True)

    def _name(self, shard: Shard) -> str:
        return canonical.digest([self.made_by, shard.fingerprint])

    def _digest_of(self, stream: BinaryIO, progress: Progress, what: str) -> None:
        """Takes the rows that are there, in the file's order or in that of class and id, into the digest."""
        count = len(self.ids)
        rows = PixelFile(
            self.part,
            offset=_HEADER_BYTES,
            shape=(count, *self.shape),
            rows=self.order if self.source.shuffled else None,
        )
        stream.flush()
        step = max(1, _READ_BYTES // self.size)
        if count:
            with progress.stage(f"digest {what}", count, "images") as stage:
                for first in range(0, count, step):
                    found = rows[first : first + step]
                    self.sha.add(found)
                    stage.advance(len(found))

    @property
    def order(self) -> list[int]:
        """The rows by class and id."""
        return sorted(range(len(self.ids)), key=lambda row: (self.labels[row], self.ids[row]))

    def _decode(self, left: Sequence[Shard], stream: BinaryIO) -> Generator[Block]:
        """The images of the shards that are left; a shard goes to the journal when its last is behind."""
        first, saved, seen = len(self.ids), time.monotonic(), set(self.ids)
        saver = ThreadPoolExecutor(1)  # so that nobody waits for the disk
        saving: Future[None] | None = None
        try:
            for block in decoded(left, self.resolution, self.source.channels):
                for item in block.items:
                    if item.id in seen:
                        raise GuardbenchError(
                            f"{self.source.where}: two images are called {item.id}; remove or rename one."
                        )
                    seen.add(item.id)
                yield block
                if block.last:
                    first = self._close(left[block.shard], first)
                if time.monotonic() - saved > _JOURNAL_EVERY_S and (not saving or saving.done()):
                    saving, saved = self._flush(stream, saver, saving), time.monotonic()
        finally:
            self._flush(stream, saver, saving).result()
            saver.shutdown()

    def _close(self, shard: Shard, first: int) -> int:
        words = {"shard": self._name(shard), "ids": self.ids[first:], "labels": self.labels[first:]}
        self.unsaved.append(json.dumps(words) + "\n")
        return len(self.ids)

    def _flush(
        self, stream: BinaryIO, saver: ThreadPoolExecutor, before: Future[None] | None
    ) -> Future[None]:
        """Puts the rows on the disk and then, in the journal, the shards that they are of."""
        if before is not None:
            before.result()
        stream.flush()
        lines, self.unsaved = self.unsaved, []

        def save() -> None:
            if lines:
                os.fsync(stream.fileno())
                self._save(lines)

        return saver.submit(save)

    def _save(self, lines: Sequence[str]) -> None:
        with self.journal.open("a", encoding="utf-8", newline="\n") as stream:
            stream.writelines(lines)
            stream.flush()
            os.fsync(stream.fileno())

    def _append(self, stream: BinaryIO, block: Block) -> None:
        # Plain writes, not a writable memory map: a full disk is then an error and no signal.
        stream.write(block.pixels.data)
        self.ids += [item.id for item in block.items]
        self.labels += [item.label for item in block.items]
        if not self.source.shuffled:
            self.sha.add(block.pixels)

    def _end(self, stream: BinaryIO, progress: Progress, what: str) -> None:
        """Writes the header and the index, and gives the file its name.

        The name comes last, since without it the rows and the journal are still there to go on from.
        """
        ids, labels = self.ids, self.labels
        rows: list[int] | None = None
        if self.source.shuffled:
            self._digest_of(stream, progress, what)
            rows = self.order
            ids, labels = [ids[row] for row in rows], [labels[row] for row in rows]
        shape = (len(ids), *self.shape)
        stream.seek(0)
        stream.write(_header(shape))
        stream.flush()
        os.fsync(stream.fileno())
        self.part.chmod(0o644)
        self.target.unlink(missing_ok=True)  # an older one is not of the index to come
        meta = {
            "format": _FORMAT,
            "preprocessing": PREPROCESSING,
            "source": self.source.fingerprint,
            "shape": shape,
            "classes": self.source.classes,
            "ids": ids,
            "labels": labels,
            "digest": self.sha.end(self.source.classes, ids, labels, shape),
        }
        if rows is not None and rows != sorted(rows):
            meta["rows"] = rows
        write_text(_meta_path(self.target), canonical.dumps(meta), option=CACHE_VARIABLE)
        self.part.replace(self.target)


def _header(shape: tuple[int, ...]) -> bytes:
    """NumPy's header of a uint8 array; it leaves room for any number of images."""
    header = io.BytesIO()
    words = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, words)
    if header.tell() != _HEADER_BYTES:
        raise ValueError(f"NumPy's header has {header.tell()} bytes")
    return header.getvalue()


def _read(target: Path, source: Source, resolution: int) -> Entry | None:
    """The finished entry; None where there is none, or where it is not whole."""
    try:
        text = read_text(_meta_path(target), what="the cache's index", limit=_META_LIMIT)
        meta = json.loads(text)
        ids, labels, classes = tuple(meta["ids"]), tuple(meta["labels"]), tuple(meta["classes"])
        shape, found = tuple(meta["shape"]), str(meta["digest"])
        with target.open("rb") as stream:
            header = stream.read(_HEADER_BYTES)
        rows = meta.get("rows")
        whole = (
            shape == (len(ids), source.channels, resolution, resolution)
            and header == _header(shape)
            and len(labels) == len(ids)
            and (rows is None or sorted(rows) == list(range(len(ids))))
            and classes == source.classes
            and meta.get("source") == source.fingerprint
            and target.stat().st_size == _HEADER_BYTES + int(np.prod(shape))
        )
        if not whole:
            return None
        images = PixelFile(target, offset=_HEADER_BYTES, shape=shape, rows=rows)
        if not _holds(target, images, found, (classes, ids, labels, shape)):
            return None
    except (GuardbenchError, OSError, ValueError, KeyError, TypeError):
        return None
    return Entry(images, labels, ids, classes, found)


_HELD: dict[tuple[str, int, int, str], bool] = {}  # each file is read once a process


def _holds(target: Path, images: PixelFile, digest: str, words: tuple[Any, ...]) -> bool:
    """Whether the rows give `digest`; taken as given where there are too many to look."""
    now = target.stat()
    if now.st_size > _VERIFIED_BYTES:
        return True
    key = (str(target), now.st_mtime_ns, now.st_ino, digest)
    if key not in _HELD:
        sha, step = Digest(), max(1, _READ_BYTES // max(1, int(np.prod(images.shape[1:]))))
        for first in range(0, len(images), step):
            sha.add(images[first : first + step])
        _HELD[key] = sha.end(*words) == digest
    return _HELD[key]
