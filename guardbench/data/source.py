"""What the cache builds from: classes, a fingerprint that is cheap, and images one after another."""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from guardbench.data.catalog import DatasetInfo, Split
from guardbench.data.locate import Located
from guardbench.errors import GuardbenchError

# Pillow's other decoders are never run on a data folder (one of them starts a PostScript program).
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP")


@dataclass(frozen=True)
class Item:
    """One image as its source holds it: `decode` may be called once, in any thread."""

    id: str
    label: int
    decode: Callable[[], Image.Image]


@dataclass(frozen=True)
class Shard:
    """Images that are decoded and kept together: a class folder, a parquet file, a tar.

    Attributes:
        fingerprint: changes when its files change; made without reading the images.
        items: its images, in the order in which they are stored.
        count: how many; None where only reading them tells.
    """

    fingerprint: str
    items: Callable[[], Iterator[Item]]
    count: int | None = None


@dataclass(frozen=True)
class Source:
    """A split as it lies on disk, or on the Hub.

    Attributes:
        where: the folder, for messages.
        classes: class keys in label order.
        channels: 1 (grey) or 3 (RGB).
        fingerprint: changes when the files change; made without reading the images.
        open: lists the shards; may read the files where the labels are inside them.
        expected: how many images there are, where the shards do not say it; for the progress alone.
        shuffled: whether the images come in any order; they are then put in that of class and id,
            which is that of folders, so that the container does not show in the dataset's digest.
    """

    where: str
    classes: tuple[str, ...]
    channels: int
    fingerprint: str
    open: Callable[[], Sequence[Shard]]
    expected: int = 0
    shuffled: bool = False


def open_source(info: DatasetInfo, located: Located, split: Split) -> Source:
    """The source of `split` of a located dataset.

    Raises:
        GuardbenchError: the split or a class is missing, misnamed or empty, or a file is broken.
    """
    if located.kind == "embedded":
        return digits_source(info, split)
    if located.layout in ("parquet", "tars"):
        from guardbench.data.shards import shard_source

        return shard_source(info, located, split)
    if located.path is None:
        raise ValueError(f"{info.name} has not been downloaded yet")
    if located.layout in ("cifar-binary", "cifar-python"):
        from guardbench.data.cifar import cifar_source

        return cifar_source(info, located.path, split, located.layout)
    from guardbench.data.folders import folder_source

    return folder_source(info, located.path, split)


def read_image(source: Path | bytes, where: str | None = None) -> Image.Image:
    """Decodes one JPEG, PNG, BMP or WebP file completely, as it is stored (EXIF is not applied).

    Args:
        source: the file, or its bytes.
        where: names the image in an error; the file's path if not given.

    Raises:
        GuardbenchError: the file is missing, truncated or not an image; the line names it.
    """
    opened = io.BytesIO(source) if isinstance(source, bytes) else source
    named = where or str(opened)
    try:
        with Image.open(opened, formats=_FORMATS) as image:
            image.load()
            return image
    except FileNotFoundError as error:
        raise GuardbenchError(f"{named}: the image is missing; restore it.") from error
    except UnidentifiedImageError as error:
        raise GuardbenchError(
            f"{named}: not an image that can be read (JPEG, PNG, BMP or WebP); restore or remove it."
        ) from error
    except (
        OSError,
        SyntaxError,  # Pillow's own way to say that a PNG is broken
        ValueError,
        EOFError,
        struct.error,
        Image.DecompressionBombError,
    ) as error:
        raise GuardbenchError(
            f"{named}: the image cannot be decoded ({error}); restore or remove it."
        ) from error


def digits_source(info: DatasetInfo, split: Split) -> Source:
    """scikit-learn's 1797 digits, 8 x 8 with 17 grey levels, which become 0 to 255.

    The split is ours, since there is no official one within the package: in each class the images
    are ordered by the SHA-256 of their index, and the first quarter is for validation.
    """
    import numpy as np
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    bunch = load_digits()
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    targets = [int(target) for target in bunch.target]
    chosen: list[int] = []
    for label in range(info.num_classes):
        members = [index for index, target in enumerate(targets) if target == label]
        members.sort(key=lambda index: hashlib.sha256(str(index).encode()).hexdigest())
        cut = len(members) // 4
        chosen += sorted(members[:cut] if split == "val" else members[cut:])

    def items() -> Iterator[Item]:
        for index in chosen:
            yield Item(
                f"{info.classes[targets[index]]}/{index:05d}",
                targets[index],
                partial(Image.fromarray, pixels[index]),
            )

    fingerprint = hashlib.sha256(pixels.tobytes()).hexdigest()
    shard = Shard(fingerprint, items, len(chosen))
    return Source("scikit-learn", info.classes, info.channels, fingerprint, lambda: (shard,))
