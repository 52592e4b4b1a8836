"""Data folders: one folder a split, one a class; and Tiny ImageNet's annotated val folder."""

from __future__ import annotations

import difflib
import os
import stat
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path

from PIL import Image

from guardbench.canonical import digest
from guardbench.data.catalog import DatasetInfo, Split
from guardbench.data.locate import WORDNET_ID
from guardbench.data.source import Item, Shard, Source, read_image
from guardbench.errors import GuardbenchError
from guardbench.fields import printable
from guardbench.store import read_text

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
_ANNOTATIONS = "val_annotations.txt"
_SHOWN = 3

# A file below its split folder: its id, label, size and time of last change.
_File = tuple[str, int, int, int]


def folder_source(info: DatasetInfo, root: Path, split: Split) -> Source:
    """The images of `root`/{train,val|test}/<class>/, by class, then by name.

    A class folder may keep its files in `images/`, as Tiny ImageNet does. Links are followed.

    Raises:
        GuardbenchError: the split folder is missing; a class folder is missing, misnamed or empty;
            an image is missing.
    """
    folder = _split_folder(info, root, split)
    classes = _classes(info, root, folder)
    if (folder / _ANNOTATIONS).is_file():
        files = _annotated(folder, classes)
    else:
        _compare(info, _subfolders(folder), classes, folder)
        files = [
            file
            for label, name in enumerate(classes)
            for file in _class_files(info, folder, name, label)
        ]
    fingerprint = digest([folder.name, list(classes), files])

    def shards() -> list[Shard]:
        classwise = groupby(files, key=lambda file: file[1])
        return [_shard(folder, list(members)) for _, members in classwise]

    return Source(str(folder), classes, info.channels, fingerprint, shards)


def _shard(folder: Path, files: list[_File]) -> Shard:
    """The images of one class."""

    def items() -> Iterator[Item]:
        for name, label, *_ in files:
            yield Item(name, label, partial(_read, folder, name))

    return Shard(digest(files), items, len(files))


def _read(folder: Path, name: str) -> Image.Image:
    return read_image(folder / name)  # the path is made in the thread that decodes


def _split_folder(info: DatasetInfo, root: Path, split: Split) -> Path:
    names = info.split_folders(split)
    for name in names:
        if (root / name).is_dir():
            return root / name
    looked = " or ".join(f"{name}/" for name in names)
    raise GuardbenchError(
        f"{root}: {info.name} has no {split} split there (looked for {looked}); add it, or name "
        "another folder with --data-dir."
    )


def _subfolders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(
            entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")
        )


def _classes(info: DatasetInfo, root: Path, folder: Path) -> tuple[str, ...]:
    """The class keys in label order: the catalogue's, or the sorted WordNet IDs of the data."""
    if info.classes:
        return info.classes
    listed = root / "wnids.txt"
    train = root / "train"
    if listed.is_file():
        where, found = listed, sorted(read_text(listed, what="the list of classes").split())
    else:
        where = train if train.is_dir() else folder
        found = _subfolders(where)
    strange = [name for name in found if not WORDNET_ID.fullmatch(name)]
    if strange:
        raise GuardbenchError(
            f"{where}: unexpected class {_some(strange)}; the classes of {info.name} are WordNet "
            "IDs, such as n01440764: rename or remove what is not."
        )
    if len(set(found)) != info.num_classes:
        raise GuardbenchError(
            f"{where}: {len(set(found))} classes where {info.name} has {info.num_classes}; "
            "complete the data, or name another folder with --data-dir."
        )
    return tuple(found)


def _some(names: Iterable[str]) -> str:
    shown = list(names)
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return ", ".join(shown[:_SHOWN]) + more


def _compare(info: DatasetInfo, found: list[str], classes: tuple[str, ...], folder: Path) -> None:
    missing = [name for name in classes if name not in set(found)]
    unexpected = [name for name in found if name not in set(classes)]
    if not missing and not unexpected:
        return
    said = []
    if unexpected:
        hints = []
        for name in unexpected:
            near = difflib.get_close_matches(name, missing, n=1, cutoff=0.6)
            hints.append(f"{name!r}" + (f" (did you mean {near[0]}?)" if near else ""))
        said.append(f"unexpected class folder {_some(hints)}")
    if missing:
        said.append(f"missing class folder {_some(info.describe(name) for name in missing)}")
    raise GuardbenchError(
        f"{folder}: {'; '.join(said)}; {info.name} has {len(classes)} class folders: rename, add "
        "or remove, or name another folder with --data-dir."
    )


def _class_files(info: DatasetInfo, folder: Path, name: str, label: int) -> Iterator[_File]:
    """The image files of one class, sorted by name; a class without any is an error."""
    inner = folder / name / "images"
    where, prefix = (inner, f"{name}/images") if inner.is_dir() else (folder / name, name)
    count = 0
    for file in _images_in(where, prefix, label):
        yield file
        count += 1
    if not count:
        raise GuardbenchError(
            f"{where}: class {info.describe(name)} has no images ({', '.join(EXTENSIONS)}); add "
            "them, or name another folder with --data-dir."
        )


def _images_in(where: Path, prefix: str, label: int) -> list[_File]:
    files: list[_File] = []
    with os.scandir(where) as entries:
        for entry in entries:
            if entry.name.startswith(".") or not entry.name.lower().endswith(EXTENSIONS):
                continue
            try:
                entry.name.encode()
                state = entry.stat()
            except UnicodeEncodeError as error:
                raise GuardbenchError(
                    f"{printable(entry.path)}: the name is not UTF-8; rename the file."
                ) from error
            except FileNotFoundError as error:
                raise GuardbenchError(
                    f"{entry.path}: the image is missing (a link to nothing); restore or remove it."
                ) from error
            if not stat.S_ISDIR(state.st_mode) and not stat.S_ISREG(state.st_mode):
                raise GuardbenchError(
                    f"{entry.path}: is no ordinary file, as an image must be; remove it."
                )
            if stat.S_ISREG(state.st_mode):
                files.append((f"{prefix}/{entry.name}", label, state.st_size, state.st_mtime_ns))
    return sorted(files)


def _annotated(folder: Path, classes: tuple[str, ...]) -> list[_File]:
    """Tiny ImageNet's val: `images/` and lines of file name, WordNet ID and a box (not used).

    Sorted by class and then by name, as a folder of classes would be.
    """
    listed = folder / _ANNOTATIONS
    label_of = {name: label for label, name in enumerate(classes)}
    present = {Path(file[0]).name: file for file in _images_in(folder / "images", "images", 0)}
    files: list[_File] = []
    for number, line in enumerate(read_text(listed, what="the annotations").splitlines(), start=1):
        if not line.strip():
            continue
        fields = line.split("\t")
        if len(fields) < 2 or fields[1] not in label_of:
            near = difflib.get_close_matches("".join(fields[1:2]), classes, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise GuardbenchError(
                f"{listed}, line {number}: expected a file name, a tab and one of the "
                f"{len(classes)} classes{hint}; get the file again."
            )
        file = present.pop(fields[0], None)
        if file is None:
            raise GuardbenchError(
                f"{folder / 'images' / fields[0]}: the image is missing, or listed twice, in line "
                f"{number} of {listed}; restore it."
            )
        files.append((file[0], label_of[fields[1]], file[2], file[3]))
    if present:
        raise GuardbenchError(
            f"{folder / 'images' / min(present)}: the image has no line in {listed} "
            f"({len(present)} such); remove it or get the list again."
        )
    empty = sorted(set(classes) - {classes[file[1]] for file in files})
    if empty:
        raise GuardbenchError(f"{listed}: no images of class {_some(empty)}; get the file again.")
    return sorted(files, key=lambda file: (file[1], file[0]))
