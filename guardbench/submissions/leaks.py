"""Whether distilled images are copies: of validation images, which is a leak, or of training images.

A perceptual hash would only preselect pairs; here every image is compared with every real one, which
a matrix product does in seconds. The feature of an image is its thumbnail, made comparable: brightness and
contrast do not count. Mirror images and centre crops are looked for as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from guardbench.data.dataset import RealDataset
from guardbench.progress import Progress

SIDE = 16
"""Of a thumbnail, in pixels."""
CROPS = (1.0, 0.85, 0.7)
"""Shares of the side that the crops of real images keep."""
NEAR = 0.35
"""Distance of two features under which one image may be made from the other."""
NEARER = 0.5
"""A leak lies at most this share as far from its validation image as from any training image. Honest images
are about as far from both, since both splits are drawn alike."""
COPY = 0.1
"""Distance from a training image under which an image is counted as a copy of it."""
_BATCH = 256


@dataclass(frozen=True)
class Nearest:
    """The nearest image of a split, for each of N images.

    Attributes:
        distance: between the features, float32 [N], 0 to 2.
        position: of the nearest one in the split, int64 [N].
        exact: bool [N], equal to it in every pixel when rounded to 8 bits.
    """

    distance: Tensor
    position: Tensor
    exact: Tensor


@dataclass(frozen=True)
class Leaks:
    """The nearest validation and the nearest training image of every distilled one."""

    val: Nearest
    train: Nearest

    @property
    def leaked(self) -> Tensor:
        """Copies of validation images, exact or altered: bool [N]."""
        near = (self.val.distance < NEAR) & (self.val.distance < NEARER * self.train.distance)
        return self.val.exact & ~self.train.exact | near

    @property
    def copied(self) -> Tensor:
        """Copies of training images: bool [N]."""
        return ~self.leaked & (self.train.exact | (self.train.distance < COPY))


def find_leaks(images: Tensor, train: RealDataset, val: RealDataset, progress: Progress) -> Leaks:
    """Compares every image with every image of both splits.

    Args:
        images: float32 [N, C, R, R] in [0, 1].
        train, val: at the same resolution.
        progress: where the work is shown.
    """
    with progress.stage("look for copies", len(train) + len(val), "images") as bar:
        return Leaks(
            val=_nearest(images, val, bar.advance), train=_nearest(images, train, bar.advance)
        )


def features(images: Tensor) -> Tensor:
    """Thumbnails of images [n, C, R, R], flattened, with mean 0 and length 1; of a flat image 0."""
    small = F.interpolate(images, (SIDE, SIDE), mode="area").flatten(1)
    return F.normalize(small - small.mean(1, keepdim=True), dim=1, eps=1e-3)


def _views(images: Tensor) -> Iterator[Tensor]:
    """The images' centre crops."""
    side = images.shape[-1]
    for share in CROPS:
        kept = max(round(side * share), 1)
        first = (side - kept) // 2
        yield images[..., first : first + kept, first : first + kept]


def _nearest(images: Tensor, split: RealDataset, told: Callable[[int], None]) -> Nearest:
    count = len(images)
    mine = features(torch.cat([images, images.flip(-1)]))
    best, position = torch.full((count,), -1.0), torch.zeros(count, dtype=torch.int64)
    for first in range(0, len(split), _BATCH):
        rows = torch.arange(first, min(first + _BATCH, len(split)))
        real = _shrunk(split.batch(rows))
        likeness = torch.stack([mine @ features(view).T for view in _views(real)]).amax(0)
        value, column = likeness.view(2, count, -1).amax(0).max(1)
        better = value > best
        best, position = (
            torch.where(better, value, best),
            torch.where(better, rows[column], position),
        )
        told(len(rows))
    exact = torch.cat(
        [
            (_bytes(mine_) == _bytes(split.batch(there))).flatten(1).all(1)
            for mine_, there in zip(
                torch.split(images, _BATCH), torch.split(position, _BATCH), strict=True
            )
        ]
    )
    return Nearest((2 - 2 * best.clamp(max=1)).sqrt(), position, exact)


def _shrunk(images: Tensor) -> Tensor:
    """Large images at a quarter or so of their side, which thumbnails cannot tell from the whole."""
    factor = images.shape[-1] // (4 * SIDE)
    return F.avg_pool2d(images, factor) if factor > 1 else images


def _bytes(images: Tensor) -> Tensor:
    return images.mul(255).round().to(torch.uint8)
