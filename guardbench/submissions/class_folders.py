"""Folders of images, one a class, as SRe2L writes them and as everybody else does."""

from __future__ import annotations

import difflib
import os
import re
import struct
import warnings
import zlib
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from guardbench.data.catalog import DatasetInfo
from guardbench.data.locate import WORDNET_ID
from guardbench.errors import GuardbenchError, brief
from guardbench.fields import printable
from guardbench.submissions.files import MOST_ENTRIES
from guardbench.submissions.pixels import MOST_SIDE, MOST_VALUES

EXTENSIONS = (".jpg", ".jpeg", ".png")
MOST_IMAGE_BYTES = 64 << 20
_FORMATS = ("JPEG", "PNG")
_SRE2L = re.compile(r"new(\d{3,6})")
_SRE2L_FILE = re.compile(r"class(\d{3,6})_id\d+\.\w+")


def read_class_folders(
    folder: Path, info: DatasetInfo | None
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Images uint8 [N, C, R, R] by class and then by name, labels int64 [N], and what was found.

    Labels are the numbers of `new000`, or of folders that are all numbers; else the place of the
    folder's name among the dataset's classes; where that is not known, in sorted order.

    Raises:
        GuardbenchError: no images, a link, a folder that names no class, a file that cannot be
            decoded, images that differ in size, or more than `MOST_VALUES` values.
    """
    names, others = _entries(folder, folders=True)
    files = {name: _entries(folder / name, folders=False) for name in names}
    others += sum(passed for _, passed in files.values())
    full = [name for name in names if files[name][0]]
    if not full:
        raise GuardbenchError(
            f"{folder}: no images ({', '.join(EXTENSIONS)}) in folders, one a class, and no images_*.pt, "
            "res_*.pt or arrays; name the folder or the file that holds them."
        )
    labels, how = _labels(folder, full, info)
    order = sorted(full, key=lambda name: labels[name])
    images, formats, grey = _decode(folder, [(n, f) for n in order for f in files[n][0]], info)
    said = [f"layout: {len(full)} class folders, {at_most(order)}; {how}"]
    jpegs = formats.count("JPEG")
    lossy = "lossy; their pixels are those that the files decode to"
    said.append(f"format: {jpegs} JPEG ({lossy})" if jpegs else f"format: {len(formats)} PNG")
    if jpegs and jpegs < len(formats):
        said[-1] += f", {len(formats) - jpegs} PNG"
    if grey:
        said.append(f"colour: {grey} grey images, repeated in three channels")
    if others:
        said.append(f"passed over: {others} entries that are no images or no class folders")
    spread = [labels[name] for name in order for _ in files[name][0]]
    return torch.from_numpy(images), torch.tensor(spread, dtype=torch.int64), tuple(said)


def _entries(folder: Path, *, folders: bool) -> tuple[list[str], int]:
    """The sorted folders, or images, in a folder, and how many other entries there are."""
    found, others = [], 0
    for entry in listed(folder):
        if entry.is_symlink():
            shown = printable(f"{folder.name}/{entry.name}")
            raise GuardbenchError(f"{shown}: is a link; put the file itself there.")
        if folders:
            wanted = entry.is_dir(follow_symlinks=False)
        else:
            image = entry.name.lower().endswith(EXTENSIONS)
            wanted = image and entry.is_file(follow_symlinks=False)
        if wanted and not entry.name.startswith("."):
            found.append(entry.name)
        else:
            others += 1
    return sorted(found), others


def _labels(
    folder: Path, names: Sequence[str], info: DatasetInfo | None
) -> tuple[dict[str, int], str]:
    """The label of each class folder, and in words where it comes from."""
    numbered = [_SRE2L.fullmatch(name) for name in names]
    if all(numbered):
        labels = {name: int(found[1]) for name, found in zip(names, numbered, strict=True) if found}
        return labels, "SRe2L's names, whose numbers are the labels"
    if all(name.isascii() and name.isdigit() and len(name) < 7 for name in names):
        labels = {name: int(name) for name in names}
        if len(set(labels.values())) == len(labels):
            return labels, "their numbers are the labels"
    if info is None or not info.classes:
        if info is not None and len(names) != info.num_classes:
            raise GuardbenchError(
                f"{folder}: {len(names)} class folders with images, {info.name} has "
                f"{info.num_classes} classes; add those that are missing, remove what is none."
            )
        if info is not None and not all(WORDNET_ID.fullmatch(name) for name in names):
            raise GuardbenchError(
                f"{folder}: the classes of {info.name} are WordNet IDs in sorted order, and some folders "
                "have other names; rename them to IDs, to numbers from 0, or to SRe2L's new000."
            )
        return {name: place for place, name in enumerate(names)}, "labels in their sorted order"
    place = {key: label for label, key in enumerate(info.classes)}
    for label, key in enumerate(info.names):
        place.setdefault(_same(key), label)
    labels = {}
    for name in names:
        known = name if name in place else _same(name)
        if known not in place:
            near = difflib.get_close_matches(name, place, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise GuardbenchError(
                f"{folder}: class folder {printable(name, 80)} is no class of {info.name}{hint}; "
                "rename it to one, to newNNN or to its number."
            )
        if place[known] in labels.values():
            raise GuardbenchError(
                f"{folder}: class folder {printable(name, 80)} is there under another name too; "
                "put all of its images into one."
            )
        labels[name] = place[known]
    return labels, f"labels are {info.name}'s"


def _same(name: str) -> str:
    return name.lower().replace("_", " ").replace("-", " ")


def _decode(
    folder: Path, files: Sequence[tuple[str, str]], info: DatasetInfo | None
) -> tuple[npt.NDArray[np.uint8], list[str], int]:
    """The pixels [N, C, R, R] of files in class folders, their formats, and how many grey were spread."""
    side, channels, pixels = 0, info.channels if info else 0, np.empty((0,), np.uint8)
    formats, grey, first = [], 0, ""
    for place, (name, file) in enumerate(files):
        where = printable(f"{folder.name}/{name}/{file}")
        _check_name(name, file, where)
        one, kind = _read_image(folder / name / file, where)
        if not place:
            side, first, channels = one.shape[0], where, channels or one.shape[2]
            if len(files) * channels * side * side > MOST_VALUES:
                raise GuardbenchError(
                    f"{folder}: {len(files)} images of {side} x {side} are more than {MOST_VALUES} "
                    "values; send fewer."
                )
            pixels = np.empty((len(files), channels, side, side), np.uint8)
        if one.shape[:2] != (side, side):
            raise GuardbenchError(
                f"{where}: is {one.shape[1]} x {one.shape[0]}, and {first} {side} wide; all must be "
                "squares of one size: resize it."
            )
        if one.shape[2] > channels:
            raise GuardbenchError(
                f"{where}: is in colour, where one channel is expected; save all as 8-bit grey."
            )
        grey += one.shape[2] < channels
        pixels[place] = one.transpose(2, 0, 1)
        formats.append(kind)
    return pixels, formats, grey


def _check_name(name: str, file: str, where: str) -> None:
    """A file that SRe2L calls by a class lies in that class's folder."""
    folder, own = _SRE2L.fullmatch(name), _SRE2L_FILE.fullmatch(file)
    if folder and own and int(folder[1]) != int(own[1]):
        raise GuardbenchError(
            f"{where}: its name says class {int(own[1])}, its folder class {int(folder[1])}; move it."
        )


def _read_image(path: Path, where: str) -> tuple[npt.NDArray[np.uint8], str]:
    """Pixels [H, W, C] of one 8-bit grey or RGB image, and its format."""
    try:
        if path.lstat().st_size > MOST_IMAGE_BYTES:
            raise GuardbenchError(f"{where}: over {MOST_IMAGE_BYTES >> 20} MiB; save it anew.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our limit is lower
            with Image.open(path, formats=_FORMATS) as image:
                width, height, mode, kind = *image.size, image.mode, image.format
                if max(width, height) > MOST_SIDE:
                    raise GuardbenchError(
                        f"{where}: says that it is {width} x {height}; the most is {MOST_SIDE} x "
                        f"{MOST_SIDE}: resize it."
                    )
                if mode not in ("L", "RGB"):
                    raise GuardbenchError(
                        f"{where}: its pixels are {mode}; save it as 8-bit grey or RGB, without "
                        "palette and alpha."
                    )
                pixels = np.array(image)
    except UnidentifiedImageError:
        raise GuardbenchError(f"{where}: is no JPEG and no PNG; save it as one.") from None
    except Image.DecompressionBombError:
        raise GuardbenchError(
            f"{where}: says that it has far too many pixels; the most is {MOST_SIDE} x {MOST_SIDE}."
        ) from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
        raise GuardbenchError(
            f"{where}: cannot be decoded ({printable(brief(error))}); save it anew."
        ) from error
    return pixels.reshape(height, width, -1), str(kind)


def listed(folder: Path) -> list[os.DirEntry[str]]:
    """What lies in a folder.

    Raises:
        GuardbenchError: it cannot be read, or holds more than `MOST_ENTRIES`.
    """
    shown = printable(str(folder), 1000)
    try:
        with os.scandir(folder) as entries:
            found = list(islice(entries, MOST_ENTRIES + 1))
    except OSError as error:
        raise GuardbenchError(f"{shown}: cannot be read ({error.strerror}).") from error
    if len(found) > MOST_ENTRIES:
        raise GuardbenchError(f"{shown}: more than {MOST_ENTRIES} entries; send fewer.")
    return found


def at_most(names: Sequence[str], most: int = 3) -> str:
    """The first names, fit to be shown, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(printable(name, 60) for name in names[:most]) + more
