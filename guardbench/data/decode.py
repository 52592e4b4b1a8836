"""Images to pixels: the preprocessing, many at a time, and the digest of what came out."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from guardbench import canonical
from guardbench.data.source import Item, Shard
from guardbench.errors import GuardbenchError

PREPROCESSING = "short-side-centre-v1"
_BLOCK_BYTES = 4 << 20
_MOST_A_BLOCK = 16
_MOST_THREADS = 16


class Block(NamedTuple):
    """Neighbours of one shard: its number, the items, whether they end it, uint8 pixels [n, C, R, R]."""

    shard: int
    items: list[Item]
    last: bool
    pixels: npt.NDArray[np.uint8]


def short_side_centre(image: Image.Image, resolution: int, channels: int) -> npt.NDArray[np.uint8]:
    """The preprocessing `short-side-centre-v1`: uint8 [C, R, R] of one decoded image.

    RGB (or grey, for one channel); the shorter side is resized to R by Pillow's bilinear filter,
    which is antialiased; the centre R x R is kept. The same numbers as torchvision's Resize(R) and
    CenterCrop(R) on a PIL image.
    """
    mode = "RGB" if channels == 3 else "L"
    if image.mode != mode:
        image = image.convert(mode)
    width, height = image.size
    short = min(width, height)
    if short != resolution:
        width, height = (int(resolution * side / short) for side in (width, height))
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - resolution) / 2), round((height - resolution) / 2)
    image = image.crop((left, top, left + resolution, top + resolution))
    pixels = np.asarray(image, dtype=np.uint8).reshape(resolution, resolution, channels)
    return pixels.transpose(2, 0, 1)


def decoded(shards: Sequence[Shard], resolution: int, channels: int) -> Iterator[Block]:
    """All images of `shards` in their order, some at a time.

    Threads decode ahead of what is taken (Pillow frees the interpreter), within a bound of memory.

    Raises:
        GuardbenchError: an image is missing or broken; the line names it.
    """
    workers = min(_MOST_THREADS, _cores())
    size = min(_MOST_A_BLOCK, max(1, _BLOCK_BYTES // (channels * resolution * resolution)))

    def work(items: list[Item]) -> npt.NDArray[np.uint8]:
        block = np.empty((len(items), channels, resolution, resolution), dtype=np.uint8)
        for row, item in zip(block, items, strict=True):
            row[...] = short_side_centre(item.decode(), resolution, channels)
        return block

    coming = _grouped(shards, size)
    failure: GuardbenchError | None = None
    pending: deque[tuple[_Group, Future[npt.NDArray[np.uint8]]]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        try:
            while True:
                while failure is None and len(pending) <= 2 * workers:
                    group = next(coming, None)
                    if group is None:
                        break
                    failure = group.failure
                    pending.append((group, pool.submit(work, group.items)))
                if not pending:
                    break
                group, future = pending.popleft()
                yield Block(group.shard, group.items, group.last, future.result())
        finally:
            for _, future in pending:
                future.cancel()
    if failure is not None:
        raise failure  # when all that was read before it is done


class _Group(NamedTuple):
    """What becomes a block, and what stopped the reading behind it."""

    shard: int
    items: list[Item]
    last: bool
    failure: GuardbenchError | None


def _grouped(shards: Sequence[Shard], size: int) -> Iterator[_Group]:
    """The items of each shard by `size`; a shard without any gives an empty group."""
    for number, shard in enumerate(shards):
        items: list[Item] = []
        try:
            for item in shard.items():
                if len(items) == size:
                    yield _Group(number, items, False, None)
                    items = []
                items.append(item)
        except GuardbenchError as error:
            yield _Group(number, items, False, error)
            return
        yield _Group(number, items, True, None)


def _cores() -> int:
    """Those that this process may use, where the system says so."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed is not None else os.cpu_count() or 1


class Digest:
    """SHA-256 over the preprocessing's version, the classes, ids, labels and pixels of a split."""

    def __init__(self) -> None:
        self._pixels = hashlib.sha256()

    def add(self, pixels: npt.NDArray[np.uint8]) -> None:
        """Takes the pixels of the next images, in the split's order."""
        self._pixels.update(pixels.data)

    def end(
        self,
        classes: tuple[str, ...],
        ids: Sequence[str],
        labels: Sequence[int],
        shape: tuple[int, ...],
    ) -> str:
        """The digest, once all pixels of `shape` [N, C, R, R] have been taken."""
        return canonical.digest(
            {
                "preprocessing": PREPROCESSING,
                "classes": classes,
                "ids": ids,
                "labels": labels,
                "shape": shape,
                "pixels": self._pixels.hexdigest(),
            }
        )
