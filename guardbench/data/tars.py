"""Tars in webdataset's layout, read in one pass and never unpacked: `<key>.jpg`, `<key>.cls` or `.json`."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from guardbench.data.shard_files import ShardFile
from guardbench.data.shards import Entry
from guardbench.errors import GuardbenchError, brief
from guardbench.fields import printable

_IMAGES = ("jpg", "jpeg", "png", "bmp", "webp")
_MOST_BYTES = {**dict.fromkeys(_IMAGES, 256 << 20), "cls": 1 << 10, "json": 1 << 20}
_BLOCK = 512
# A read that goes to the file gives up the interpreter, and gets it back behind the decoding threads.
_BUFFER_BYTES = 4 << 20


@dataclass
class _Sample:
    """Neighbours in a tar that share a key."""

    key: str
    image: tuple[str, bytes] | None = None
    label: int | str | None = None
    name: str | None = None


def tar_entries(file: ShardFile) -> Iterator[Entry]:
    """The samples of a tar, one in memory at a time.

    A name in it is only ever a name: nothing is written, and links and folders are passed over.

    Raises:
        GuardbenchError: it is no tar or is cut off, or a sample has no image, no label, or too large a
            part: the line names the file and the sample.
    """
    path = Path(file.address)
    try:
        with (
            path.open("rb", buffering=_BUFFER_BYTES) as stream,
            tarfile.open(fileobj=stream, mode="r:") as archive,
        ):
            sample: _Sample | None = None
            last = "its beginning"
            for member in iter(archive.next, None):
                archive.members.clear()  # type: ignore[attr-defined]  # it remembers all that it has seen
                last = member.name
                if not member.isfile():
                    continue
                key, kind = _split(member.name)
                if kind not in _MOST_BYTES or not key or key.endswith("/"):
                    continue
                if sample is not None and sample.key != key:
                    yield _entry(file, sample)
                    sample = None
                sample = sample or _Sample(key)
                _take(sample, kind, _content(archive, member, kind, file), file)
            if sample is not None:
                yield _entry(file, sample)
            _require_end(stream, archive.offset, f"{path}, behind {printable(last, 100)}")
    except (tarfile.TarError, OSError, EOFError, ValueError, RecursionError) as error:
        raise GuardbenchError(
            f"{path}: cannot be read as a tar ({printable(brief(error))}); get the shard again."
        ) from error


def _split(name: str) -> tuple[str, str]:
    """Key and kind: the name up to the first dot of its last part, and what follows, in small letters."""
    folder, slash, last = name.rpartition("/")
    stem, _, kind = last.partition(".")
    return folder + slash + stem, kind.lower()


def _content(
    archive: tarfile.TarFile, member: tarfile.TarInfo, kind: str, file: ShardFile
) -> bytes:
    where = f"{file.address}: {printable(member.name, 200)}"
    if member.size > _MOST_BYTES[kind]:
        raise GuardbenchError(
            f"{where}: {member.size} bytes, over the limit of {_MOST_BYTES[kind]}; remove it."
        )
    stream = archive.extractfile(member)
    data = b"" if stream is None else stream.read()
    if len(data) != member.size:
        raise GuardbenchError(f"{where}: cut off; get the shard again.")
    return data


def _take(sample: _Sample, kind: str, data: bytes, file: ShardFile) -> None:
    """Puts one file of a sample where it belongs."""
    if kind in _IMAGES:
        sample.image = kind, data
        return
    where = f"{file.address}: {printable(f'{sample.key}.{kind}', 200)}"
    try:
        text = data.decode("utf-8").strip()
        if kind == "cls":
            sample.label = int(text) if text.lstrip("-").isdecimal() else text
            return
        words = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GuardbenchError(
            f"{where}: cannot be read ({printable(brief(error))}); get the shard again."
        ) from error
    if not isinstance(words, dict):
        return
    label, name = words.get("label", words.get("cls")), words.get("filename")
    if sample.label is None and isinstance(label, int | str) and not isinstance(label, bool):
        sample.label = label
    if isinstance(name, str):
        sample.name = name


def _entry(file: ShardFile, sample: _Sample) -> Entry:
    where = f"{file.address}: {printable(sample.key, 200)}"
    if sample.image is None:
        raise GuardbenchError(
            f"{where}: has a label and no image ({', '.join(_IMAGES)}); get the shard again."
        )
    if sample.label is None:
        raise GuardbenchError(
            f"{where}: has no label; a webdataset has <key>.cls, or `label` in <key>.json, beside the image."
        )
    kind, data = sample.image
    name = sample.name or f"{sample.key}.{kind}"
    return Entry(f"{where}.{kind}", sample.key, name, sample.label, data)


def _require_end(stream: BinaryIO, offset: int, where: str) -> None:
    """Refuses a tar that does not end as tars do: tarfile takes a broken header for the end."""
    stream.seek(offset)
    if stream.read(_BLOCK) != bytes(_BLOCK):
        raise GuardbenchError(f"{where}: the tar is cut off or damaged there; get the shard again.")
