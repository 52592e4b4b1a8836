"""The images and labels of a submission, whichever way they lie, as plain tensors.

What cannot be read becomes problems, so that one reading names all of them. Values are not judged
here, only what stands between bytes and tensors.
"""

from __future__ import annotations

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
from guardbench.records import printable
from guardbench.submissions.files import (
    TensorHead,
    inside,
    plain_file,
    read_png,
    safetensors_heads,
    walk,
)
from guardbench.submissions.form import FORM, Submission
from guardbench.submissions.problems import Problems

IMAGE_TYPES = ("F32", "F16", "U8")
LABEL_TYPES = ("I64", "I32", "I16", "U8")
SOFT_TYPES = ("F32", "F16")
_LONGEST_ROW = 1 << 20
"""Bytes of one row of a parquet file beside its image."""


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
        assert data.path is not None, "the form says so"
        return _from_folder(folder, data.path, form, info, problems)
    root, names = (folder, [data.path or ""]) if fetched is None else (fetched, [*walk(fetched)])
    exact = [name for name in names if name.endswith(".safetensors")]
    if data.kind == "hub" and len(exact) > 1:
        exact = [name for name in exact if Path(name).name == "images.safetensors"]
    if data.kind == "safetensors" or (data.kind != "parquet" and exact):
        content = _from_safetensors(root, (exact or names)[0], form, info, problems)
    else:
        rows = [name for name in names if name.endswith(".parquet") or data.kind == "parquet"]
        content = _from_parquet(root, rows, form, info, problems)
    if content is None or form.soft is None:
        return content
    return _with_soft(folder, form.soft.path, info, content, problems)


def most_of(form: Submission, info: DatasetInfo) -> tuple[int, int]:
    """Images, and bytes of one file, that a submission of this form may have at most."""
    count = 2 * form.ipc * info.num_classes + 16
    return count, count * (4 * info.channels * form.resolution**2 + 4 * info.num_classes + 64) + (
        1 << 22
    )


def _from_folder(
    folder: Path, path: str, form: Submission, info: DatasetInfo, problems: Problems
) -> Content | None:
    most, size = most_of(form, info)
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
            with problems.catching(name, "pixels"):
                data = plain_file(folder, name, most=size).read_bytes()
                images.append(
                    read_png(
                        data, side=form.resolution, channels=info.channels, where=printable(name)
                    )
                )
                labels.append(labels_of[parts[0]])
                names.append(name)
                files[name] = canonical.file_digest(folder / name)
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
    # Where only the data itself lists the classes, their order is the sorted one.
    keys = info.classes or tuple(found)
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
            files[name] = canonical.file_digest(path)
            for row, words in enumerate(_parquet_rows(path, form, most - len(labels), size)):
                place = f"{name}: image[{row}]"
                with problems.catching(name, f"image[{row}]"):
                    data, label, target = _row(words)
                    images.append(
                        read_png(data, side=form.resolution, channels=info.channels, where=place)
                    )
                    labels.append(label)
                    places.append(place)
                    soft += [] if target is None else [target]
    if not images:
        return None
    wide = len({len(row) for row in soft}) == 1 and len(soft) == len(images)
    if form.labels == "soft" and form.soft is None and not wide:
        problems.add(
            names[0], "soft_label", "missing in some rows, or of different lengths; add it."
        )
        return None
    return Content(
        images=_floats(np.stack(images)),
        labels=torch.tensor(labels),
        soft=torch.tensor(soft) if form.labels == "soft" and form.soft is None else None,
        names=tuple(places),
        files=files,
    )


def _parquet_rows(path: Path, form: Submission, most: int, size: int) -> list[dict[str, Any]]:
    """The rows of a parquet file that has the columns which are read, and no more of them than `most`.

    Raises:
        GuardbenchError: it is no parquet file, lacks a column, or would take more memory than `size`.
    """
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        with path.open("rb") as stream:
            file = parquet.ParquetFile(
                stream, thrift_string_size_limit=1 << 24, thrift_container_size_limit=1 << 20
            )
            head = file.metadata
            columns = [*file.schema_arrow.names]
            wanted = ["image", "label", *(["soft_label"] if form.labels == "soft" else [])]
            if lacking := [name for name in wanted if name not in columns]:
                raise GuardbenchError(
                    f"has no column {lacking[0]}; it has {printable(', '.join(columns))}."
                )
            unpacked = sum(head.row_group(i).total_byte_size for i in range(head.num_row_groups))
            if head.num_rows > most or unpacked > size:
                raise GuardbenchError(
                    f"{head.num_rows} rows of {unpacked} bytes, more than IPC {form.ipc} allows."
                )
            rows: list[dict[str, Any]] = []
            for batch in file.iter_batches(batch_size=256, columns=wanted, use_threads=False):
                if batch.nbytes > size:
                    raise GuardbenchError(f"unpacks to more than {size} bytes.")
                rows += batch.to_pylist()
            return rows
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, OverflowError) as error:
        raise GuardbenchError(
            f"cannot be read ({printable(brief(error))}); write it anew."
        ) from error


def _row(words: dict[str, Any]) -> tuple[bytes, int, list[float] | None]:
    """Image bytes, label and soft label of a parquet row."""
    image, label, soft = words["image"], words["label"], words.get("soft_label")
    data = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(data, bytes):
        raise GuardbenchError("image: holds no bytes; store the image itself and not its path.")
    if not isinstance(label, int) or not 0 <= label < 1 << 31:
        raise GuardbenchError(f"label: {printable(str(label), 40)} is no class number from 0 on.")
    if soft is None:
        return data, label, None
    if not isinstance(soft, list) or not all(isinstance(value, float) for value in soft):
        raise GuardbenchError("soft_label: must be a list of floats.")
    return data, label, soft


def _floats(pixels: npt.NDArray[Any]) -> Tensor:
    """Float32 images; bytes become [0, 1]."""
    tensor = torch.from_numpy(np.ascontiguousarray(pixels))
    return tensor.float().div_(255) if tensor.dtype == torch.uint8 else tensor.float()
