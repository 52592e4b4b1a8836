"""Strangers' files: looked at before they are read, and never followed out of their folder.

Nothing here unpickles or executes. Every size is known, and within its limit, before memory is
taken for it.
"""

from __future__ import annotations

import io
import json
import os
import re
import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from guardbench.errors import GuardbenchError, brief
from guardbench.fields import HIDDEN, printable

MOST_BYTES = 8 << 30
"""Of one file of a submission."""
MOST_ENTRIES = 1_100_000
"""Files and folders in a submission."""
HEADER_BYTES = 1 << 20
"""Of a safetensors file's header."""

_PNG = b"\x89PNG\r\n\x1a\n"
_PLAIN_CHUNKS = frozenset(
    b"IHDR IDAT IEND gAMA cHRM sRGB iCCP sBIT bKGD pHYs tIME tEXt zTXt iTXt eXIf".split()
)
_SIDE_BYTES = 1 << 13
"""Of everything in a PNG that is no pixel."""


def require_plain_name(name: str) -> None:
    """Refuses a file's name that could move a terminal, begin a tag, or not be written down.

    Raises:
        GuardbenchError: control or bidirectional characters, `<`, `>`, or bytes that are no UTF-8.
    """
    if re.search(f"[{HIDDEN}<>\ud800-\udfff]", name) or len(name) > 255:
        raise GuardbenchError(
            f"{printable(name)}: is no plain name; rename it to letters and figures."
        )


def inside(folder: Path, relative: str) -> Path:
    """The file or folder `relative` below `folder`.

    Raises:
        GuardbenchError: it leads out of the folder, is or passes through a link, is missing, or is
            neither a file nor a folder.
    """
    shown = printable(relative)
    parts = relative.split("/")
    for part in parts:
        require_plain_name(part)
    if any(part in ("", ".", "..") for part in parts) or "\\" in relative or "\0" in relative:
        raise GuardbenchError(f"{shown}: must be a path below the submission's folder.")
    path = folder
    for part in parts:
        path = path / part
        try:
            mode = path.lstat().st_mode
        except OSError as error:
            raise GuardbenchError(f"{shown}: {error.strerror or error}; add it.") from error
        if stat.S_ISLNK(mode):
            raise GuardbenchError(f"{shown}: is a link; put the file itself there.")
        if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
            raise GuardbenchError(f"{shown}: is neither a file nor a folder; remove it.")
    return path


def plain_file(folder: Path, relative: str, *, most: int = MOST_BYTES) -> Path:
    """The file `relative` below `folder`, of at most `most` bytes; see `inside`."""
    path = inside(folder, relative)
    info = path.lstat()
    if not stat.S_ISREG(info.st_mode):
        raise GuardbenchError(f"{printable(relative)}: is a folder; a file is expected.")
    if info.st_size > most:
        raise GuardbenchError(
            f"{printable(relative)}: has {info.st_size} bytes, the most is {most}; make it smaller."
        )
    return path


def walk(folder: Path, relative: str = "", *, most: int = MOST_ENTRIES) -> Iterator[str]:
    """Every file below `relative`, sorted within its folder, as a path from `folder`.

    Raises:
        GuardbenchError: a link, a special file, or more than `most` entries.
    """
    waiting, seen = [relative], 0
    while waiting:
        here = waiting.pop()
        where, entries = printable(here or folder.name), []
        with readable(where), os.scandir(folder / here) as found:
            for entry in found:
                seen += 1
                if seen > most:
                    raise GuardbenchError(
                        f"{where}: more than {most} files; remove what is not needed."
                    )
                entries.append(entry.name)
        for name in sorted(entries, reverse=True):
            path = f"{here}/{name}" if here else name
            if inside(folder, path).is_dir():
                waiting.append(path)
        for name in sorted(entries):
            path = f"{here}/{name}" if here else name
            if inside(folder, path).is_file():
                yield path


@contextmanager
def readable(where: str) -> Iterator[None]:
    """Inside, the system's refusal to read becomes one line about `where`."""
    try:
        yield
    except OSError as error:
        raise GuardbenchError(f"{where}: cannot be read ({error.strerror or error}).") from error


def read_png(data: bytes, *, side: int, channels: int, where: str) -> npt.NDArray[np.uint8]:
    """The pixels [C, H, W] of a PNG file's bytes.

    Args:
        side: width and height that it must have, so that nothing larger is ever decoded.
        channels: 1 (grey) or 3 (RGB); 8 bits each.
        where: names the file in an error.

    Raises:
        GuardbenchError: not a plain PNG of that shape: another format, 16 bits, a palette or alpha,
            an animation, bytes behind its end, text that is too long, or broken.
    """
    (width, height, depth, colour, _, _, interlaced), packed = _png_parts(data, where)
    if (width, height) != (side, side):
        raise GuardbenchError(f"{where}: is {width} x {height}, resolution says {side}; resize it.")
    wanted = {1: 0, 3: 2}[channels]
    if depth != 8 or colour != wanted:
        kind = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGB with alpha"}
        raise GuardbenchError(
            f"{where}: is {kind.get(colour, colour)} with {depth} bits; save it as 8-bit "
            f"{kind[wanted]}, or send safetensors."
        )
    if interlaced:
        raise GuardbenchError(f"{where}: is interlaced; save it without.")
    _require_exact(packed, side * (side * channels + 1), where)
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            pixels = np.asarray(image)
    # Broad on purpose: Pillow's readers of damaged chunks raise IndexError, KeyError and more, no list of
    # them is complete, and each means the same to the user.
    except Exception as error:
        raise GuardbenchError(
            f"{where}: cannot be decoded ({brief(error)}); save it anew."
        ) from error
    if pixels.shape[:2] != (side, side) or pixels.size != channels * side * side:
        raise GuardbenchError(f"{where}: decodes to another shape than it says; save it anew.")
    return pixels.reshape(side, side, channels).transpose(2, 0, 1)


def _require_exact(packed: list[bytes], size: int, where: str) -> None:
    """Refuses compressed pixels that become more or less than `size` bytes, or have something behind."""
    inflate, found = zlib.decompressobj(), 0
    try:
        for piece in packed:
            found += len(inflate.decompress(piece, size + 1 - found))
            if found > size or inflate.unconsumed_tail:
                break
    except zlib.error as error:
        raise GuardbenchError(f"{where}: cannot be decoded ({error}); save it anew.") from error
    if found != size or inflate.unused_data or inflate.unconsumed_tail or not inflate.eof:
        raise GuardbenchError(f"{where}: holds more or less than its pixels; save it anew.")


def _png_parts(data: bytes, where: str) -> tuple[tuple[int, ...], list[bytes]]:
    """The header's seven numbers of a PNG whose chunks are all plain ones, and its compressed pixels."""
    if not data.startswith(_PNG):
        raise GuardbenchError(f"{where}: is not a PNG; `guardbench convert` reads other formats.")
    at, first, beside = len(_PNG), True, 0
    head: tuple[int, ...] | None = None
    packed: list[bytes] = []
    while at + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        at += 12 + length
        if at > len(data):
            break
        if name not in _PLAIN_CHUNKS:
            raise GuardbenchError(
                f"{where}: holds {name!r}, no part of a plain image; save it anew."
            )
        if first != (name == b"IHDR") or (first and length != 13):
            break
        if first:
            head = struct.unpack_from(">IIBBBBB", data, len(_PNG) + 8)
        if name == b"IDAT" and length:
            packed.append(data[at - 4 - length : at - 4])
        first = False
        beside += 0 if name in (b"IHDR", b"IDAT", b"IEND") else length
        if beside > _SIDE_BYTES:
            raise GuardbenchError(
                f"{where}: holds more than {_SIDE_BYTES} bytes beside its pixels."
            )
        if name == b"IEND":
            if at < len(data):
                raise GuardbenchError(
                    f"{where}: {len(data) - at} bytes follow the image's end; save it anew."
                )
            if head is not None:
                return head, packed
    raise GuardbenchError(f"{where}: is cut off or no whole PNG; save it anew.")


TensorHead = tuple[str, tuple[int, ...]]
_TYPE_BYTES = {
    "F32": 4,
    "F16": 2,
    "U8": 1,
    "I64": 8,
    "I32": 4,
    "F64": 8,
    "BF16": 2,
    "I16": 2,
    "I8": 1,
}


def safetensors_heads(path: Path, where: str) -> dict[str, TensorHead]:
    """Type and shape of every tensor of a safetensors file, from its header alone.

    Raises:
        GuardbenchError: the header is no such header, too long, or does not fit the file's size.
    """
    size = path.stat().st_size
    with readable(where), path.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little") if len(start) == 8 else -1
        if not 2 <= length <= min(HEADER_BYTES, size - 8):
            raise GuardbenchError(
                f"{where}: is no safetensors file of plain tensors; save it anew."
            )
        text = stream.read(length)
    try:
        words = json.loads(text)
        heads = {
            name: (str(entry["dtype"]), tuple(int(extent) for extent in entry["shape"]))
            for name, entry in words.items()
            if name != "__metadata__"
        }
        total = sum(_TYPE_BYTES[kind] * _product(shape) for kind, shape in heads.values())
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        OverflowError,
    ) as error:
        raise GuardbenchError(
            f"{where}: its header cannot be read ({printable(brief(error))}); save it anew."
        ) from error
    if total != size - 8 - length:
        raise GuardbenchError(
            f"{where}: the header speaks of {total} bytes of tensors, the file has "
            f"{size - 8 - length}; save it anew."
        )
    return heads


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for extent in shape:
        if not 0 <= extent < 1 << 40 or product > 1 << 50:
            raise ValueError("an extent that cannot be")
        product *= extent
    return product
