"""Rows of a file of decoded images, read when they are asked for and never mapped into memory.

A page of a memory map counts as resident memory from the first look at it, and a map of a file that was
cut short ends the process with a signal; a plain read does neither.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt

from guardbench.errors import GuardbenchError

Array = npt.NDArray[np.uint8]


class PixelFile:
    """uint8 [N, C, R, R] in a file, read-only; indexing gives arrays of its own in memory.

    The file stays open, so that one that is deleted can be read to the end. Safe in threads.

    Attributes:
        shape: N, C, R, R.
    """

    def __init__(
        self,
        path: Path,
        *,
        offset: int,
        shape: tuple[int, ...],
        rows: Sequence[int] | None = None,
    ) -> None:
        """Opens the file.

        Args:
            path: the file.
            offset: bytes before the first row.
            shape: N, C, R, R.
            rows: where in the file image i lies, for all N; in their order where not given.

        Raises:
            OSError: it cannot be opened.
        """
        self.shape = shape
        self._path, self._offset = path, offset
        self._size = int(np.prod(shape[1:]))
        self._rows = None if rows is None else np.asarray(rows, dtype=np.int64)
        self._stream = path.open("rb", buffering=0)
        self._turn = threading.Lock()
        weakref.finalize(self, self._stream.close)

    def __len__(self) -> int:
        return self.shape[0]

    @overload
    def __getitem__(self, index: int) -> Array: ...

    @overload
    def __getitem__(self, index: slice | npt.NDArray[np.int64]) -> Array: ...

    def __getitem__(self, index: int | slice | npt.NDArray[np.int64]) -> Array:
        """Image [C, R, R] of an index, or images [n, C, R, R] of a slice or of int64 [n] positions.

        Raises:
            IndexError: a position outside -N to N - 1.
            GuardbenchError: the file has been cut short.
        """
        if isinstance(index, slice):
            return self._read(np.arange(*index.indices(len(self))))
        wanted = np.asarray(index, dtype=np.int64)
        if wanted.size and not (-len(self) <= wanted.min() and wanted.max() < len(self)):
            raise IndexError(f"{wanted.min()} to {wanted.max()} in {len(self)} images")
        found = self._read(np.atleast_1d(wanted) % max(1, len(self)))
        return found if wanted.ndim else found[0]

    def _read(self, wanted: npt.NDArray[np.int64]) -> Array:
        found = np.empty((len(wanted), *self.shape[1:]), dtype=np.uint8)
        flat = found.reshape(-1).data
        places = wanted if self._rows is None else self._rows[wanted]
        first = 0
        while first < len(places):  # a run of neighbours is one read
            last = first + 1
            while last < len(places) and places[last] == places[last - 1] + 1:
                last += 1
            at = self._offset + int(places[first]) * self._size
            self._fill(flat[first * self._size : last * self._size], at)
            first = last
        return found

    def _fill(self, buffer: memoryview, at: int) -> None:
        with self._turn:
            self._stream.seek(at)
            while buffer:
                read = self._stream.readinto(buffer)
                if not read:
                    raise GuardbenchError(
                        f"{self._path}: the cache was cut short while it was in use; run again to "
                        "build it anew."
                    )
                buffer = buffer[read:]
