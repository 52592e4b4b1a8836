"""Parquet shards and webdataset tars as a source: what an entry's image is called, and of which class.

The same pixels under the same original file names have the digest that they have as folders.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from guardbench.canonical import digest
from guardbench.data.catalog import DatasetInfo, Split
from guardbench.data.locate import WORDNET_ID, Located
from guardbench.data.shard_files import ShardFile, shard_files
from guardbench.data.source import Item, Shard, Source, read_image
from guardbench.errors import GuardbenchError
from guardbench.fields import printable
from guardbench.store import read_text

# `n01440764_10026` and `ILSVRC2012_val_00000293`: what the files of every ImageNet are called.
_ORIGINAL = re.compile(r"n\d{8}_\d+|ILSVRC2012_val_\d{8}")
# Hugging Face's copies have the class behind the name: `ILSVRC2012_val_00000293_n01440764.JPEG`.
_WITH_CLASS = re.compile(r"(.+)_(n\d{8})")


class Entry(NamedTuple):
    """One image as a container has it.

    Attributes:
        where: which entry of which file, for messages.
        key: its name within the shard, unique there.
        name: the original file's, with or without folders; None where the container has none.
        label: a number, or the class's key.
        data: the encoded image.
    """

    where: str
    key: str
    name: str | None
    label: int | str
    data: bytes


def shard_source(info: DatasetInfo, located: Located, split: Split) -> Source:
    """The images of a split from parquet shards or tars, one file after another.

    Raises:
        GuardbenchError: the split or a shard is missing, or the classes' order is not known; when read,
            an entry that is no image or has no label, and a shard that is cut off: the line names the
            file and the entry.
    """
    place = located.url or located.path
    assert place is not None, "it has been located"
    files = shard_files(info, place, split, located.layout)
    classes = class_keys(info, located.path)

    def opened() -> list[Shard]:
        if located.layout == "parquet":
            from guardbench.data.parquet import label_names, parquet_entries, parquet_rows

            names = _check_names(info, files[0], classes, label_names(files[0]))
            counts = [parquet_rows(file) for file in files]
            return [
                _shard(file, classes, partial(parquet_entries, file, names), count)
                for file, count in zip(files, counts, strict=True)
            ]
        from guardbench.data.tars import tar_entries

        return [_shard(file, classes, partial(tar_entries, file), None) for file in files]

    fingerprint = digest([located.layout, split, classes, [file.state for file in files]])
    return Source(
        str(place),
        classes,
        info.channels,
        fingerprint,
        opened,
        expected=info.count(split),
        shuffled=True,
    )


def class_keys(info: DatasetInfo, folder: Path | None) -> tuple[str, ...]:
    """The class keys in label order: the catalogue's, or the sorted ones of `wnids.txt` in the folder.

    Raises:
        GuardbenchError: neither says it.
    """
    if info.classes:
        return info.classes
    listed = None if folder is None else folder / "wnids.txt"
    found: list[str] = []
    if listed is not None and listed.is_file():
        found = sorted(set(read_text(listed, what="the list of classes").split()))
    if len(found) != info.num_classes:
        raise GuardbenchError(
            f"{listed or info.name}: {len(found)} classes where {info.name} has {info.num_classes}; shards "
            "have numbers for classes, so put its wnids.txt beside them."
        )
    return tuple(found)


def _check_names(
    info: DatasetInfo, file: ShardFile, classes: tuple[str, ...], names: tuple[str, ...] | None
) -> tuple[str, ...] | None:
    """The shards' own names of labels where they are the class keys; None where they are for people."""
    if names is None:
        return None
    if len(names) != len(classes):
        raise GuardbenchError(
            f"{file.address}: {len(names)} classes where {info.name} has {len(classes)}; name the folder "
            "of the dataset itself."
        )
    return names if set(names) == set(classes) else None


def _shard(
    file: ShardFile,
    classes: tuple[str, ...],
    entries: Callable[[], Iterator[Entry]],
    count: int | None,
) -> Shard:
    label_of = {key: label for label, key in enumerate(classes)}

    def items() -> Iterator[Item]:
        for entry in entries():
            label = _label(entry, label_of)
            name = _image_id(entry, classes[label], file)
            yield Item(name, label, partial(read_image, entry.data, entry.where))

    return Shard(digest([*file.state]), items, count)


def _label(entry: Entry, label_of: dict[str, int]) -> int:
    """The entry's label; where its name says its class, both must say the same."""
    label = label_of.get(entry.label, -1) if isinstance(entry.label, str) else entry.label
    if not 0 <= label < len(label_of):
        raise GuardbenchError(
            f"{entry.where}: label {printable(str(entry.label), 60)} is none of the {len(label_of)} "
            "classes; get the shard again, or name the folder of the dataset itself."
        )
    said = _class_in(entry.name)
    if said in label_of and label_of[said] != label:
        raise GuardbenchError(
            f"{entry.where}: label {entry.label}, but its name says {said}, which is label "
            f"{label_of[said]}: the classes are in another order than the sorted one; get the official "
            "shards."
        )
    return label


def _class_in(name: str | None) -> str:
    """The WordNet ID that is a part of a file's name or path; "" where there is none."""
    found = re.findall(r"(?<![0-9a-z])n\d{8}(?![0-9])", name or "")
    return str(found[-1]) if found else ""


def _image_id(entry: Entry, key: str, file: ShardFile) -> str:
    """`<class>/<original file name>`; with the shard's name and the key where there is no original name."""
    path = PurePosixPath(entry.name or "")
    stem, ending = path.stem, path.suffix
    with_class = _WITH_CLASS.fullmatch(stem)
    if with_class is not None and with_class[2] == key:
        stem = with_class[1]
    if WORDNET_ID.fullmatch(key):
        if not _ORIGINAL.fullmatch(stem):
            return f"{key}/{printable(file.name)}/{printable(entry.key)}"
        ending = ".JPEG"  # in the original, whatever a container calls it
    if not stem:
        return f"{key}/{printable(file.name)}/{printable(entry.key)}"
    return f"{key}/{printable(stem)}{printable(ending, 10)}"


def is_original(name: str) -> bool:
    """Whether an id has an original file's name, so that its digest is that of the folders."""
    return name.count("/") == 1
