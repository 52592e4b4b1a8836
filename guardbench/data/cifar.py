"""The official CIFAR files: the binary ones directly, the Python ones through torchvision."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from guardbench.canonical import digest
from guardbench.data.catalog import CifarFiles, DatasetInfo, Split
from guardbench.data.locate import Layout
from guardbench.data.source import Item, Shard, Source
from guardbench.errors import GuardbenchError

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE

_Arrays = tuple[npt.NDArray[np.uint8], list[int]]


def cifar_source(info: DatasetInfo, folder: Path, split: Split, layout: Layout) -> Source:
    """CIFAR in the order of the official files; an id is the class and the index in that order.

    Raises:
        GuardbenchError: (when opened) a file is missing, truncated or not the official one.
    """
    files = info.cifar
    if files is None:
        raise ValueError(f"{info.name} is not a CIFAR dataset")

    def items() -> Iterator[Item]:
        if layout == "cifar-python":
            pixels, labels = _read_python(info, folder, split)
        else:
            pixels, labels = _read_binary(info, files, folder, split)
        for index, label in enumerate(labels):
            decode = partial(Image.fromarray, pixels[index])
            yield Item(f"{info.classes[label]}/{index:05d}", label, decode)

    state = [
        (path.name, path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.iterdir())
        if path.is_file()
    ]
    fingerprint = digest([layout, split, state])
    shard = Shard(fingerprint, items, info.count(split))
    return Source(str(folder), info.classes, info.channels, fingerprint, lambda: (shard,))


def _read_binary(info: DatasetInfo, files: CifarFiles, folder: Path, split: Split) -> _Arrays:
    """uint8 [N, 32, 32, 3] and the N labels, from records of label bytes and planes R, G, B."""
    train = split == "train"
    count = files.records_per_train_file if train else files.records_per_test_file
    record = files.label_bytes + _PIXELS
    blocks = []
    for name in files.train if train else files.test:
        path = folder / name
        try:
            raw = np.fromfile(path, dtype=np.uint8)
        except OSError as error:
            raise GuardbenchError(
                f"{path}: cannot be read ({error.strerror}); get {info.name} again."
            ) from error
        if raw.size != count * record:
            raise GuardbenchError(
                f"{path}: {raw.size} bytes where {count * record} are expected; get {info.name} "
                "again."
            )
        blocks.append(raw.reshape(count, record))
    records = np.concatenate(blocks)
    labels = [int(label) for label in records[:, files.label_bytes - 1]]
    if max(labels) >= info.num_classes:
        raise GuardbenchError(
            f"{folder}: label {max(labels)} in a dataset of {info.num_classes} classes; get "
            f"{info.name} again."
        )
    planes = records[:, files.label_bytes :].reshape(-1, 3, _SIDE, _SIDE)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels


def _read_python(info: DatasetInfo, folder: Path, split: Split) -> _Arrays:
    """The same from the pickled files, once each has the MD5 that torchvision knows."""
    from torchvision import datasets  # type: ignore[import-untyped]
    from torchvision.datasets.utils import check_integrity  # type: ignore[import-untyped]

    official: Any = datasets.CIFAR10 if info.name == "cifar10" else datasets.CIFAR100
    # The folder may have been renamed; the files in it are what is checked.
    reader: Any = type("Reader", (official,), {"base_folder": folder.name})
    expected = [*official.train_list, *official.test_list]
    expected.append((official.meta["filename"], official.meta["md5"]))
    for name, md5 in expected:
        if not check_integrity(folder / name, md5):
            raise GuardbenchError(
                f"{folder / name}: missing, or not the official file (MD5 {md5}); get {info.name} "
                "again."
            )
    data = reader(folder.parent, train=split == "train", download=False)
    return np.asarray(data.data, dtype=np.uint8), [int(label) for label in data.targets]
