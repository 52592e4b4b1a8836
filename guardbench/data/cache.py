"""Decoded images, built once: one memory-mapped uint8 array and one JSON a split and resolution.

An entry is finished when its JSON is there, which is written last; both appear by renaming.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from guardbench import canonical
from guardbench.data.files import cache_writes, locked, remove_stale_parts, require_space
from guardbench.data.source import Listing, Source
from guardbench.errors import GuardbenchError
from guardbench.progress import Progress
from guardbench.store import atomic_path, read_text, write_text

PREPROCESSING = "short-side-centre-v1"
_FORMAT = 1
_META_LIMIT = 1 << 30
_SHOW_EVERY = 64


@dataclass(frozen=True, eq=False)
class Entry:
    """One split at one resolution: `images` is uint8 [N, C, R, R] and read-only."""

    images: npt.NDArray[np.uint8]
    labels: tuple[int, ...]
    ids: tuple[str, ...]
    classes: tuple[str, ...]
    digest: str


def short_side_centre(image: Image.Image, resolution: int, channels: int) -> npt.NDArray[np.uint8]:
    """The preprocessing `short-side-centre-v1`: uint8 [C, R, R] of one decoded image.

    RGB (or grey, for one channel); the shorter side is resized to R by Pillow's bilinear filter,
    which is antialiased; the centre R x R is kept. The same numbers as torchvision's Resize(R) and
    CenterCrop(R) on a PIL image.
    """
    image = image.convert("RGB" if channels == 3 else "L")
    width, height = image.size
    short = min(width, height)
    if short != resolution:
        width, height = (int(resolution * side / short) for side in (width, height))
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - resolution) / 2), round((height - resolution) / 2)
    image = image.crop((left, top, left + resolution, top + resolution))
    pixels = np.asarray(image, dtype=np.uint8).reshape(resolution, resolution, channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def render(
    source: Source, listing: Listing, resolution: int, sink: BinaryIO, progress: Progress, what: str
) -> str:
    """Writes all images of `listing` to `sink` as one uint8 array in order; gives the digest.

    The digest is a SHA-256 over the preprocessing's version, the classes, ids, labels and pixels.

    Raises:
        GuardbenchError: an image is missing or broken; the line names it.
    """

    def one(index: int) -> bytes:
        return short_side_centre(listing.read(index), resolution, source.channels).tobytes()

    count, waiting = len(listing.ids), 0
    sha = hashlib.sha256()
    with progress.stage(f"decode {what}", count, "images") as stage:
        for pixels in _in_order(one, count):
            # Plain writes, not a writable memory map: a full disk is then an error and no signal.
            sink.write(pixels)
            sha.update(pixels)
            waiting += 1
            if waiting == _SHOW_EVERY:
                stage.advance(waiting)
                waiting = 0
        if waiting:
            stage.advance(waiting)
    return canonical.digest(
        {
            "preprocessing": PREPROCESSING,
            "classes": source.classes,
            "ids": listing.ids,
            "labels": listing.labels,
            "shape": (count, source.channels, resolution, resolution),
            "pixels": sha.hexdigest(),
        }
    )


def _in_order(work: Callable[[int], bytes], count: int) -> Iterator[bytes]:
    """`work(0)` to `work(count - 1)` in order, from threads (Pillow frees the interpreter)."""
    workers = min(16, os.cpu_count() or 1)
    pending: deque[Future[bytes]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        try:
            for index in range(count):
                pending.append(pool.submit(work, index))
                if len(pending) > 4 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def in_memory(source: Source, resolution: int, progress: Progress, what: str) -> Entry:
    """An entry that is too small to be worth a file."""
    listing = source.open()
    sink = io.BytesIO()
    found = render(source, listing, resolution, sink, progress, what)
    shape = (len(listing.ids), source.channels, resolution, resolution)
    images = np.frombuffer(sink.getvalue(), dtype=np.uint8).reshape(shape)
    return Entry(images, listing.labels, listing.ids, source.classes, found)


def cached(source: Source, resolution: int, root: Path, name: str, progress: Progress) -> Entry:
    """The entry of `source` at `resolution` below `root`, built first if need be.

    One process builds and others wait. What a killed builder left is removed; an entry that was
    truncated or does not hold together is built again; changed data have another key.

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
    what = f"{name} at {resolution} px"
    entry = _read(target, source, resolution)
    if entry is not None:
        return entry
    with locked(target, progress, what) as held:
        if held:
            entry = _read(target, source, resolution)
            if entry is not None:
                return entry
            remove_stale_parts(target)
            remove_stale_parts(_meta_path(target))
        _build(target, source, resolution, progress, what)
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


def _build(target: Path, source: Source, resolution: int, progress: Progress, what: str) -> None:
    listing = source.open()
    shape = (len(listing.ids), source.channels, resolution, resolution)
    require_space(target, int(np.prod(shape)))
    with cache_writes(target):
        _meta_path(target).unlink(missing_ok=True)
        with atomic_path(target) as part, cache_writes(target), part.open("wb") as stream:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(stream, header)
            found = render(source, listing, resolution, stream, progress, what)
            stream.flush()
        meta = {
            "format": _FORMAT,
            "preprocessing": PREPROCESSING,
            "source": source.fingerprint,
            "shape": shape,
            "classes": source.classes,
            "ids": listing.ids,
            "labels": listing.labels,
            "digest": found,
        }
        write_text(_meta_path(target), canonical.dumps(meta))


def _read(target: Path, source: Source, resolution: int) -> Entry | None:
    """The finished entry; None where there is none, or where it is not whole."""
    try:
        text = read_text(_meta_path(target), what="the cache's index", limit=_META_LIMIT)
        meta = json.loads(text)
        images = np.load(target, mmap_mode="r", allow_pickle=False)
        ids, labels, classes = tuple(meta["ids"]), tuple(meta["labels"]), tuple(meta["classes"])
        shape, found = tuple(meta["shape"]), str(meta["digest"])
    except (GuardbenchError, OSError, EOFError, ValueError, KeyError, TypeError):
        return None
    whole = (
        images.dtype == np.uint8
        and images.shape == shape
        and shape == (len(ids), source.channels, resolution, resolution)
        and len(labels) == len(ids)
        and classes == source.classes
        and meta.get("source") == source.fingerprint
        and target.stat().st_size == images.offset + images.nbytes
    )
    return Entry(images, labels, ids, classes, found) if whole else None
