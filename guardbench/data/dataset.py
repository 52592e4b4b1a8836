"""A decoded split of a real dataset at one resolution: kept on disk, with batches as tensors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from guardbench.data.cache import Pixels, cached, find, in_memory
from guardbench.data.catalog import SPLITS, DatasetInfo, dataset_info
from guardbench.data.download import download_dataset
from guardbench.data.files import cache_root
from guardbench.data.locate import layout_of, locate
from guardbench.data.shards import is_original
from guardbench.data.source import Source, open_source
from guardbench.errors import GuardbenchError
from guardbench.progress import Progress

_MAX_RESOLUTION = 1024
_COPIED = 1 << 28  # bytes that travel to a GPU at once


@dataclass(frozen=True, eq=False)
class RealDataset:
    """A decoded split.

    Attributes:
        name: the catalogue's name, such as `imagenette`.
        split: `train` or `val`.
        resolution: R, the side of every image in pixels.
        images: uint8 [N, C, R, R], read-only, read from the cache's file as they are indexed.
        labels: int64 [N].
        ids: one stable name an image: its path below the split folder, or `<class>/<index>` for
            files that hold many images.
        classes: class keys (folder names, so WordNet IDs for the ImageNets) in label order.
        digest: SHA-256 over decoded pixels, labels, ids, classes and the preprocessing's version.
    """

    name: str
    split: str
    resolution: int
    images: Pixels
    labels: Tensor
    ids: tuple[str, ...]
    classes: tuple[str, ...]
    digest: str
    _copies: dict[torch.device, Tensor | None] = field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_classes(self) -> int:
        """K: labels are 0 to K - 1."""
        return len(self.classes)

    @property
    def channels(self) -> int:
        """C: 1 (grey) or 3 (RGB)."""
        return int(self.images.shape[1])

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names for people in label order; the keys where the catalogue has no others."""
        return dataset_info(self.name).names or self.classes

    @property
    def complete(self) -> bool:
        """Whether it has as many images as the official split."""
        info = dataset_info(self.name)
        return len(self) == info.count("train" if self.split == "train" else "val")

    def select(self, indices: Sequence[int]) -> Selected:
        """The images at `indices`, not decoded yet."""
        return Selected(self, torch.tensor(indices, dtype=torch.int64))

    def batch(self, indices: Tensor | Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Images as float32 [n, C, R, R] in [0, 1] on `device`, in the order of `indices`.

        Raises:
            IndexError: an index is outside -N to N - 1.
        """
        wanted = torch.as_tensor(indices, dtype=torch.int64).cpu()
        whole = self._resident(torch.device(device))
        if whole is None:
            # Indexing by an array copies; bytes travel, and become floats there.
            pixels = torch.from_numpy(self.images[wanted.numpy()]).to(device)
        else:
            pixels = whole[torch.arange(len(self))[wanted].to(device)]  # a GPU checks no index
        return pixels.to(torch.float32).div_(255)

    def _resident(self, device: torch.device) -> Tensor | None:
        """All images, uint8, on a GPU that has room for them, copied there when they are first asked for."""
        if device.type != "cuda":
            return None
        if device not in self._copies:
            count, size = len(self), math.prod(self.images.shape)
            fits = size < torch.cuda.mem_get_info(device)[0] // 4
            self._copies[device] = (
                self._copied(device, max(1, count * _COPIED // size)) if fits else None
            )
        return self._copies[device]

    def _copied(self, device: torch.device, rows: int) -> Tensor:
        whole = torch.empty(self.images.shape, dtype=torch.uint8, device=device)
        for part in torch.split(torch.arange(len(self)), rows):
            whole[part[0] : part[-1] + 1] = torch.from_numpy(self.images[part.numpy()]).to(device)
        return whole


@dataclass(frozen=True, eq=False)
class Selected:
    """Some images of a split, in an order of their own, decoded to float32 when they are asked for.

    A validation set larger than memory can so be attacked batch by batch.

    Attributes:
        split: whose images.
        order: int64 [N], positions in the split.
    """

    split: RealDataset
    order: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """N, C, R, R."""
        return (len(self.order), *self.split.images.shape[1:])

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        """Images [n, C, R, R] in [0, 1] at a slice, or at int64 or bool [N] positions, of the order."""
        return self.split.batch(self.order[rows])


def load_split(
    name: str,
    split: str,
    *,
    resolution: int,
    data_dir: Path | None,
    cache_dir: Path | None,
    progress: Progress,
    per_class: int | None = None,
) -> RealDataset:
    """Finds, downloads if need be, decodes once and opens the `split` of dataset `name`.

    Args:
        name: a name of the catalogue.
        split: `train` or `val` (of CIFAR, val is the official test set).
        resolution: side R of the images in pixels, 1 to 1024.
        data_dir: see `locate.locate`.
        cache_dir: see `files.cache_root`.
        progress: where downloading and decoding are shown.
        per_class: the number of images that every class must at least have; all are loaded.

    Raises:
        GuardbenchError: anything about the data, the network or the disk that the user can mend;
            one line that names the file or folder.
    """
    info = dataset_info(name)
    known = next((entry for entry in SPLITS if entry == split), None)
    if known is None:
        raise GuardbenchError(f"Unknown split {split!r} of {name}: choose train or val.")
    if not 1 <= resolution <= _MAX_RESOLUTION:
        raise GuardbenchError(
            f"A resolution of {resolution} px is not possible: choose 1 to {_MAX_RESOLUTION}."
        )
    located = locate(name, data_dir, cache_dir=cache_dir)
    if located.kind == "download":
        folder = download_dataset(info, located, cache_root(cache_dir), progress)
        located = replace(located, kind="folder", path=folder, layout=layout_of(info, folder))
    source = open_source(info, located, known)
    if info.embedded:
        entry = in_memory(source, resolution)
    else:
        root = cache_root(cache_dir)
        found = find(source, resolution, root, f"{name}-{split}")
        if found is None and located.layout == "folders":
            # Known before the first image is decoded, so told before.
            listed = [item.label for shard in source.open() for item in shard.items()]
            _require_per_class(info, source, listed, per_class)
        entry = found or cached(source, resolution, root, f"{name}-{split}", progress)
    _require_per_class(info, source, entry.labels, per_class)
    # The folders of Tiny ImageNet, alone without classes of its own, have a level of their own.
    if source.shuffled and not (info.classes and all(is_original(name) for name in entry.ids)):
        _tell_own_names(progress, f"{name}-{split}", source)
    return RealDataset(
        name=name,
        split=split,
        resolution=resolution,
        images=entry.images,
        labels=torch.tensor(entry.labels, dtype=torch.int64),
        ids=entry.ids,
        classes=entry.classes,
        digest=entry.digest,
    )


def _tell_own_names(progress: Progress, what: str, source: Source) -> None:
    if progress.console is not None:
        progress.console.print(
            f"{what}: {source.where} does not give its images the names that the folders have, so its "
            "digest, order and test images are its own",
            highlight=False,
            soft_wrap=True,
        )


def _require_per_class(
    info: DatasetInfo, source: Source, labels: Sequence[int], per_class: int | None
) -> None:
    if per_class is None:
        return
    counts = Counter(labels)
    for label, key in enumerate(source.classes):
        if counts[label] < per_class:
            raise GuardbenchError(
                f"{source.where}: class {info.describe(key)} has {counts[label]} of the "
                f"{per_class} images needed; add images or choose a smaller IPC."
            )
