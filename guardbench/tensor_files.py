"""Tensors out of strangers' files: .pt, .npz, .npy, .safetensors; no code in them is ever run.

Sizes are read from a file's directory or header and compared with limits before memory is taken.
"""

from __future__ import annotations

import io
import re
import stat
import warnings
import zipfile
from math import prod
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from guardbench.errors import GuardbenchError, brief
from guardbench.fields import printable

MOST_BYTES = 8 << 30
"""Of one file, and of all that an archive unpacks to."""
MOST_ENTRIES = 100_000
"""Of one archive."""
MOST_RATIO = 200
"""Bytes unpacked for a byte packed, of an entry beyond `FREE_BYTES`; noise and photographs give 1 to 5."""
FREE_BYTES = 16 << 20
PICKLE_BYTES = 64 << 20
"""Of the part of a .pt archive that says what its tensors are called."""
HEADER_BYTES = 8 << 10
"""Of a .npy header, which is some 120 long."""

DIRECTORY_BYTES = 16 << 20
"""Of an archive, 160 for an entry; and of a safetensors header."""

_TAIL_BYTES = (1 << 16) + 256  # the longest comment, and the records before it
_ZIP = b"PK\x03\x04"


def load_torch(path: Path, *, where: str | None = None) -> Any:
    """What `torch.save` wrote: tensors within lists, tuples and dictionaries.

    NumPy scalars, such as accuracies that a script saved beside its tensors, become None: of NumPy
    nothing is built from such a file.

    Args:
        path: archive of torch.save, or its format before version 1.6.
        where: names the file in an error; its path if not given.

    Raises:
        GuardbenchError: absent, too large, an archive that torch.save does not write, damaged, or it
            needs code to be read.
    """
    where = where or printable(str(path), 1000)
    if _present(path, where).startswith(_ZIP):
        for entry in check_archive(path, where=where):
            if entry.compress_type != zipfile.ZIP_STORED:
                raise _damaged(where, "an entry is compressed, which torch.save never does")
            if entry.filename.endswith(".pkl") and entry.file_size > PICKLE_BYTES:
                raise _damaged(where, f"its pickle has {entry.file_size} bytes")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([*_INERT]):
            warnings.simplefilter("ignore")  # torch's remarks on pickles, before it refuses them
            return torch.load(path, map_location="cpu", weights_only=True)
    # Broad on purpose: torch's restricted unpickler raises struct.error, KeyError and more for a
    # damaged or hostile file, and each means the same to the user.
    except Exception as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        # Torch's own words are a number, or how to let any code run.
        other = "it holds more than tensors, or torch.save did not write it whole"
        why = f"it names {named[1]}" if named else other
        raise _damaged(where, why) from error


class _InertType:
    """Stands for numpy.dtype, and does nothing."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


def _inert_scalar(*_: object) -> None:
    """Stands for the function that makes a NumPy scalar out of bytes."""


_INERT = (
    (_InertType, "numpy.dtype"),
    (_inert_scalar, "numpy.core.multiarray.scalar"),
    (_inert_scalar, "numpy._core.multiarray.scalar"),
)


def load_safetensors(path: Path, *, where: str | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name.

    Raises:
        GuardbenchError: absent, too large, with a header beyond `DIRECTORY_BYTES`, or no such file.
    """
    where = where or printable(str(path), 1000)
    header = int.from_bytes(_present(path, where), "little")
    if header > DIRECTORY_BYTES:
        raise _damaged(where, f"a header of {header} bytes")
    try:
        return dict(load_file(path))
    # Broad on purpose: the library's own error, OSError, and what NumPy or torch say to a type
    # they do not have.
    except Exception as error:
        raise _damaged(where, brief(error)) from error


def load_npz(path: Path, *, where: str | None = None) -> dict[str, Tensor]:
    """The arrays of a .npz file by name.

    Raises:
        GuardbenchError: absent, too large, unpacking to too much, holding objects or strange names,
            or damaged.
    """
    where = where or printable(str(path), 1000)
    found: dict[str, Tensor] = {}
    entries = check_archive(path, where=where)
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in entries:
                name = printable(entry.filename, 80)
                if not entry.filename.endswith(".npy"):
                    raise GuardbenchError(f"{where}: {name}: is no array; remove it.")
                with archive.open(entry) as stream:
                    key = entry.filename.removesuffix(".npy")
                    found[key] = _read_npy(stream, entry.file_size, f"{where}: {name}")
    # Broad on purpose: zipfile raises many kinds for a damaged archive, some of them undocumented.
    except Exception as error:
        if isinstance(error, GuardbenchError):
            raise
        raise _damaged(where, brief(error)) from error
    return found


def load_npy(path: Path, *, where: str | None = None) -> Tensor:
    """The array of a .npy file.

    Raises:
        GuardbenchError: absent, too large, holding objects, or damaged.
    """
    where = where or printable(str(path), 1000)
    _present(path, where)
    with path.open("rb") as stream:
        return _read_npy(stream, path.stat().st_size, where)


def check_archive(path: Path, *, where: str) -> list[zipfile.ZipInfo]:
    """The entries of a ZIP archive, all of which may be unpacked in memory.

    Raises:
        GuardbenchError: it is damaged, has too many entries, unpacks to more than `MOST_BYTES` or to
            more than its size can mean, or an entry is a link, encrypted, twice there, or has a name
            that leads elsewhere.
    """
    if not _present(path, where).startswith(_ZIP):
        raise _damaged(where, "it begins as no archive does")
    size = path.stat().st_size
    if directory_bytes(path, size) > DIRECTORY_BYTES:
        raise GuardbenchError(f"{where}: more than {MOST_ENTRIES} entries; save fewer arrays.")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    # Broad on purpose, as in load_npz.
    except Exception as error:
        raise _damaged(where, brief(error)) from error
    if len(entries) > MOST_ENTRIES:
        raise GuardbenchError(f"{where}: more than {MOST_ENTRIES} entries; save fewer arrays.")
    total, names = 0, set()
    for entry in entries:
        name = entry.filename
        total += entry.file_size
        parts = PurePosixPath(name).parts
        if not name or name[0] == "/" or ".." in parts or "\\" in name:
            raise _strange(where, name, "a name that leads out of it")
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise _strange(where, name, "a link")
        if name in names:
            raise _strange(where, name, "there twice")
        if entry.flag_bits & 1:
            raise _strange(where, name, "encrypted")
        if entry.compress_size > size or (
            entry.file_size > max(FREE_BYTES, MOST_RATIO * entry.compress_size)
        ):
            raise _strange(
                where, name, f"{entry.compress_size} bytes that unpack to {entry.file_size}"
            )
        names.add(name)
    if total > MOST_BYTES:
        raise GuardbenchError(
            f"{where}: unpacks to {total} bytes, the most is {MOST_BYTES}; make it smaller."
        )
    return entries


def directory_bytes(path: Path, size: int) -> int:
    """How long an archive says that its directory is, which zipfile reads whole into memory.

    What looks like an end record is looked at wherever it stands, so that a comment hides none.
    """
    with path.open("rb") as stream:
        stream.seek(max(0, size - _TAIL_BYTES))
        tail = stream.read()
    ends = [tail[at.start() + 12 :][:4] for at in re.finditer(b"PK\x05\x06", tail)]
    wide = [tail[at.start() + 40 :][:8] for at in re.finditer(b"PK\x06\x06", tail)]
    said = [int.from_bytes(field, "little") for field in (*ends, *wide)]
    return max((length for length in said if length != 0xFFFFFFFF), default=0)


def _present(path: Path, where: str) -> bytes:
    """The first eight bytes of a file that is there and not too large."""
    try:
        info = path.stat()
        if stat.S_ISREG(info.st_mode):
            with path.open("rb") as stream:
                start = stream.read(8)
        else:
            raise FileNotFoundError
    except (FileNotFoundError, NotADirectoryError, ValueError):
        raise GuardbenchError(f"{where}: no such file.") from None
    except OSError as error:
        raise GuardbenchError(f"{where}: cannot be read ({error.strerror}).") from error
    if info.st_size > MOST_BYTES:
        raise GuardbenchError(f"{where}: over {MOST_BYTES >> 30} GiB; make it smaller.")
    return start


def _read_npy(stream: IO[bytes], size: int, where: str) -> Tensor:
    """The array in a stream of `size` bytes, which its header must fit exactly."""
    try:
        head = stream.read(10)
        if head[:6] != b"\x93NUMPY" or head[6:8] not in (b"\x01\x00", b"\x02\x00"):
            raise _damaged(where, "it begins as no array of numbers does")
        wide = head[6] == 2
        head += stream.read(2) if wide else b""
        length = int.from_bytes(head[8:], "little")
        if length > HEADER_BYTES:
            raise _damaged(where, f"a header of {length} bytes")
        text = io.BytesIO(head[8:] + stream.read(length))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on headers that Python 2 wrote
            formats = np.lib.format
            read = formats.read_array_header_2_0 if wide else formats.read_array_header_1_0
            shape, fortran, dtype = read(text)
        if dtype.kind not in "biuf" or dtype.itemsize > 8 or dtype.subdtype is not None:
            raise GuardbenchError(
                f"{where}: holds {printable(str(dtype), 60)}, not numbers; objects are never "
                "unpickled. Save plain arrays."
            )
        count = prod(shape) if all(extent >= 0 for extent in shape) else -1
        left = size - len(head) - length
        if count * dtype.itemsize != left:
            raise _damaged(where, f"{left} bytes of pixels do not fit its header")
        raw = bytearray(left)
        if stream.readinto(raw) != left or stream.read(1):  # type: ignore[attr-defined]
            raise _damaged(where, "cut off")
    # Broad on purpose: NumPy evaluates the header as a literal, which fails in many ways.
    except Exception as error:
        if isinstance(error, GuardbenchError):
            raise
        raise _damaged(where, brief(error)) from error
    flat = np.frombuffer(raw, dtype=dtype)
    array = flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)
    return torch.from_numpy(array.astype(dtype.newbyteorder("="), order="C", copy=False))


def _damaged(where: str, why: str) -> GuardbenchError:
    return GuardbenchError(
        f"{where}: cannot be read as tensors alone ({printable(why, 160)}); code in it is never run. "
        "Save plain tensors with safetensors."
    )


def _strange(where: str, name: str, what: str) -> GuardbenchError:
    return GuardbenchError(f"{where}: {printable(name, 80)}: is {what}; save the file anew.")
