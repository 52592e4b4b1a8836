"""The images and labels of a submission, whichever way they lie, as plain tensors.

What cannot be read becomes problems, so that one reading names all of them. Values are not judged
here, only what stands between bytes and tensors.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from guardbench import canonical
from guardbench.data.catalog import DatasetInfo
from guardbench.errors import GuardbenchError, brief
from guardbench.fields import printable
from guardbench.submissions.files import (
    TensorHead,
    inside,
    plain_file,
    read_png,
    readable,
    safetensors_heads,
    walk,
)
from guardbench.submissions.form import FORM, Submission
from guardbench.submissions.parquet import parquet_rows, parse_row
from guardbench.submissions.problems import Problems

IMAGE_TYPES = ("F32", "F16", "U8")
LABEL_TYPES = ("I64", "I32", "I16", "U8")
SOFT_TYPES = ("F32", "F16")


@dataclass(frozen=True)
class Content:
    """What a submission holds.

    Attributes:
        images: float32 [N, C, H, W]; meant to lie in [0, 1], which is not checked yet.
        labels: int64 [N].
        soft: float32 [N, K], or None.
        names: of each image, for messages.
        files: path from the submission's folder (or address) -> SHA-256 of what was read.
    """

    images: Tensor
    labels: Tensor
    soft: Tensor | None
    names: tuple[str, ...]
    files: dict[str, str]


def read_content(
    folder: Path, form: Submission, info: DatasetInfo, fetched: Path | None, problems: Problems
) -> Content | None:
    """The images and labels of the submission in `folder`.

    Args:
        fetched: of kinds `hub` and `url`: where the files lie that were fetched; else None.
        problems: gains what is wrong.

    Returns:
        None where nothing could be read.
    """
    data = form.data
    if data.kind == "folder":
        content = _from_folder(folder, data.path or "", form, info, problems)
    else:
        content = _from_files(folder, form, info, fetched, problems)
    if content is not None and form.soft is not None:
        content = _with_soft(folder, form.soft.path, info, content, problems)
    if content is not None and form.teacher is not None:
        with problems.catching(form.teacher.path):
            path = plain_file(folder, form.teacher.path)
            with readable(form.teacher.path):
                content.files[form.teacher.path] = canonical.file_digest(path)
    return content


def _from_files(
    folder: Path, form: Submission, info: DatasetInfo, fetched: Path | None, problems: Problems
) -> Content | None:
    data = form.data
    root, names = (folder, [data.path or ""]) if fetched is None else (fetched, [*walk(fetched)])
    exact = [name for name in names if name.endswith(".safetensors")]
    if data.kind == "hub" and len(exact) > 1:
        exact = [name for name in exact if Path(name).name == "images.safetensors"]
    if data.kind == "safetensors" or (data.kind != "parquet" and exact):
        return _from_safetensors(root, (exact or names)[0], form, info, problems)
    rows = [name for name in names if name.endswith(".parquet") or data.kind == "parquet"]
    return _from_parquet(root, rows, form, info, problems)


def most_of(form: Submission, info: DatasetInfo) -> tuple[int, int]:
    """Images, and bytes of one file, that a submission of this form may have at most."""
    count = 2 * form.ipc * info.num_classes + 16
    return count, count * (4 * info.channels * form.resolution**2 + 4 * info.num_classes + 64) + (
        1 << 22
    )


def _png_bytes(form: Submission, info: DatasetInfo) -> int:
    """Bytes of one PNG at most: twice its pixels, and what may stand beside them."""
    return 2 * info.channels * form.resolution**2 + (1 << 17)


def _from_folder(
    folder: Path, path: str, form: Submission, info: DatasetInfo, problems: Problems
) -> Content | None:
    most, _ = most_of(form, info)
    with problems.catching(path):
        if not inside(folder, path).is_dir():
            raise GuardbenchError(f"{printable(path)}: is a file; kind folder needs a folder.")
        found = [*walk(folder, path, most=most + 2 * info.num_classes)]
        labels_of = _class_folders(folder / path, info)
        images, labels, names, files = [], [], [], {}
        for name in found:
            parts = name.removeprefix(f"{path}/").split("/")
            if len(parts) != 2 or parts[0] not in labels_of:
                problems.add(name, "", "lies in no class folder; move or remove it.", kind="place")
                continue
            with problems.catching(name, "pixels", kind="png"):
                path_of = plain_file(folder, name, most=_png_bytes(form, info))
                with readable(printable(name)):
                    data = path_of.read_bytes()
                images.append(
                    read_png(
                        data, side=form.resolution, channels=info.channels, where=printable(name)
                    )
                )
                labels.append(labels_of[parts[0]])
                names.append(name)
                files[name] = hashlib.sha256(data).hexdigest()
        if images:
            return Content(
                _floats(np.stack(images)), torch.tensor(labels), None, tuple(names), files
            )
        problems.add(path, "", "no image could be read.")
    return None


def _class_folders(root: Path, info: DatasetInfo) -> dict[str, int]:
    """Label by the name of a class folder: the dataset's class keys, or 0 to K - 1 in figures.

    Raises:
        GuardbenchError: the folders are not the dataset's classes.
    """
    found = sorted(path.name for path in root.iterdir() if path.is_dir())
    figures = {str(label): label for label in range(info.num_classes)}
    # Where only the data itself lists the classes, they are WordNet IDs in sorted order.
    keys = info.classes or tuple(name for name in found if re.fullmatch(r"n\d{8}", name))
    known = {key: label for label, key in enumerate(keys)}
    for names in (known, figures):
        if set(found) == set(names) and len(names) == info.num_classes:
            return names
    strange = [name for name in found if name not in known]
    missing = [name for name in known if name not in found]
    what = (
        f"{printable(strange[0])} is no class" if strange else f"{(missing or ['?'])[0]} is missing"
    )
    raise GuardbenchError(
        f"class folders: {what}; {info.name} has {info.num_classes}, "
        f"{', '.join([*known][:3])}, ... (or 0 to {info.num_classes - 1})."
    )


def _from_safetensors(
    root: Path, name: str, form: Submission, info: DatasetInfo, problems: Problems
) -> Content | None:
    most, size = most_of(form, info)
    with problems.catching(name):
        path = plain_file(root, name, most=size)
        heads = safetensors_heads(path, printable(name))
        wanted = {"images": (4, IMAGE_TYPES), "labels": (1, LABEL_TYPES)}
        if form.labels == "soft" and form.soft is None:
            wanted["soft"] = (2, SOFT_TYPES)
        if not _heads_fit(name, heads, wanted, problems):
            return None
        if heads["images"][1][0] > most:
            raise GuardbenchError(
                f"images: {heads['images'][1][0]} of them, IPC {form.ipc} allows "
                f"{form.ipc * info.num_classes}."
            )
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise GuardbenchError(f"cannot be read ({brief(error)}); save it anew.") from error
        count = len(tensors["images"])
        return Content(
            images=_floats(tensors["images"].numpy()),
            labels=tensors["labels"].long(),
            soft=tensors["soft"].float() if "soft" in wanted else None,
            names=tuple(f"{name}: images[{row}]" for row in range(count)),
            files={name: canonical.file_digest(path)},
        )
    return None


def _heads_fit(
    name: str,
    heads: dict[str, TensorHead],
    wanted: dict[str, tuple[int, tuple[str, ...]]],
    problems: Problems,
) -> bool:
    """Whether the tensors are there, of a type that fits and as many dimensions; told where not."""
    good = True
    for tensor, (dimensions, types) in wanted.items():
        if tensor not in heads:
            there = printable(", ".join(sorted(heads)) or "nothing")
            problems.add(name, tensor, f"missing; the file holds {there}. Rename or add it.")
            good = False
            continue
        kind, shape = heads[tensor]
        if kind not in types or len(shape) != dimensions:
            problems.add(
                name,
                tensor,
                f"is {kind} {[*shape]}; it must be one of {', '.join(types)} with {dimensions} "
                "dimensions. Convert it.",
            )
            good = False
    for extra in sorted(heads.keys() - wanted.keys()):
        problems.add(name, extra, "nothing reads this tensor; remove it.", kind="extra")
        good = False
    if good and len({shape[0] for _, shape in heads.values()}) > 1:
        lengths = ", ".join(f"{key} {heads[key][1][0]}" for key in wanted)
        problems.add(name, "", f"one label an image is needed; the lengths are {lengths}.")
        good = False
    return good


def _with_soft(
    folder: Path, name: str, info: DatasetInfo, content: Content, problems: Problems
) -> Content | None:
    with problems.catching(name):
        path = plain_file(
            folder, name, most=(4 * info.num_classes + 8) * len(content.images) + (1 << 20)
        )
        heads = safetensors_heads(path, printable(name))
        if not _heads_fit(name, heads, {"soft": (2, SOFT_TYPES)}, problems):
            return None
        if heads["soft"][1] != (len(content.images), info.num_classes):
            raise GuardbenchError(
                f"soft: is {[*heads['soft'][1]]}, must be [{len(content.images)}, {info.num_classes}]."
            )
        try:
            soft = load_file(path)["soft"].float()
        except (SafetensorError, OSError, ValueError) as error:
            raise GuardbenchError(f"cannot be read ({brief(error)}); save it anew.") from error
        files = {**content.files, name: canonical.file_digest(path)}
        return Content(content.images, content.labels, soft, content.names, files)
    return None


def _from_parquet(
    root: Path, names: Sequence[str], form: Submission, info: DatasetInfo, problems: Problems
) -> Content | None:
    most, size = most_of(form, info)
    inline = form.labels == "soft" and form.soft is None
    images: list[npt.NDArray[np.uint8]] = []
    labels: list[int] = []
    soft: list[list[float]] = []
    places: list[str] = []
    files: dict[str, str] = {}
    if not names:
        problems.add(FORM, "data", "no .safetensors and no .parquet file is there.")
    for name in names:
        with problems.catching(name):
            path = plain_file(root, name, most=size)
            with readable(name):
                files[name] = canonical.file_digest(path)
            for row, words in enumerate(
                parquet_rows(path, soft=inline, most=most - len(labels), size=size)
            ):
                place = f"{name}: image[{row}]"
                with problems.catching(name, f"image[{row}]", kind="png"):
                    data, label, target = parse_row(words)
                    if len(data) > _png_bytes(form, info):
                        raise GuardbenchError(f"has {len(data)} bytes; save it anew.")
                    images.append(
                        read_png(data, side=form.resolution, channels=info.channels, where=place)
                    )
                    labels.append(label)
                    places.append(place)
                    soft += [] if target is None else [target]
    if not images:
        if not problems.count:
            problems.add(names[0], "", "no image could be read.")
        return None
    wide = len({len(row) for row in soft}) == 1 and len(soft) == len(images)
    if inline and not wide:
        problems.add(
            names[0], "soft_label", "missing in some rows, or of different lengths; add it."
        )
        return None
    return Content(
        images=_floats(np.stack(images)),
        labels=torch.tensor(labels),
        soft=torch.tensor(soft) if inline else None,
        names=tuple(places),
        files=files,
    )


def _floats(pixels: npt.NDArray[Any]) -> Tensor:
    """Float32 images; bytes become [0, 1]."""
    tensor = torch.from_numpy(np.ascontiguousarray(pixels))
    return tensor.float().div_(255) if tensor.dtype == torch.uint8 else tensor.float()
