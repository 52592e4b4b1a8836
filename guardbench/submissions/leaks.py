"""Whether distilled images are copies: of validation images, which is a leak, or of training images.

A perceptual hash would only preselect pairs; here every image is compared with every real one, which
matrix products do in seconds. The feature of an image is its thumbnail, made comparable: brightness,
contrast and tint do not count, nor does it whether it is a negative. Sought are the image and its mirror
in the real image and its crops, its other turns and flips and its quarters in the real image, and what
lies within a border.

Not found are crops of less than about 0.7 of the side, mosaics of crops, turns by 10 degrees, borders of
an eighth of the side, small pieces pasted into another image, blends of half and half, and whatever
was learnt from validation images without looking like one. Crops between the sought ones, blends of
eight parts in ten, single negated channels and cut-outs are found in part. At 8 px strong noise and bent
tone curves hide an image as well. A low distance is a reason to look; the absence of one proves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from guardbench.data.dataset import RealDataset
from guardbench.progress import Progress

SIDE = 8
"""Of a thumbnail, in pixels."""
INNER = (0.9, 0.8)
"""Shares of the side that the centres of submitted images keep: they may be shifted or have a border."""
CROPS = (*INNER, 0.85, 0.75, 0.7)
"""Shares of the side that the crops of real images keep: each at the centre, the corners and half-way."""
NEAR = 0.45
"""Distance of two features under which one image may be made from the other."""
NEARER = 0.5
"""A leak lies at most this share as far from its validation image as from any training image. Honest images
are about as far from both, since both splits are drawn alike."""
COPY = 0.1
"""Distance from a training image under which an image is counted as a copy of it."""
_LEAST_CONTRAST = 0.002
"""Standard deviation of a channel's thumbnail below which it counts less: half a step of 8 bits."""
_QUARTERED = 32
"""Sides, in pixels, from which on the quarters of an image are looked at."""
_SAMPLED = 64
"""Pixels a side that are kept at least where large images are sampled."""
_BATCH = 256
_PRODUCT = 1 << 20
"""The most values of a product of features: few enough for a processor's cache."""

_PLACES = (0.0, 0.5, 1.0)
"""Of crops, down and across."""
_VIEWS = tuple(1 + share * len(_PLACES) ** 2 for share in range(len(CROPS) + 1))
"""Of a real image: the whole alone, and with the crops of the first one, two, ... shares."""


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
    """The nearest validation and the nearest training image of every distilled one.

    Of an image whose quarters were made from several real ones, both are those of one quarter: the one
    nearest to a validation image where one leaks, and else, where all four are nearer to training images
    than the whole is, the furthest.
    """

    val: Nearest
    train: Nearest

    @property
    def leaked(self) -> Tensor:
        """Copies of validation images, exact or altered: bool [N]."""
        return self.val.exact & ~self.train.exact | _leaks(self.val.distance, self.train.distance)

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
    mine = _Submitted(images)
    with progress.stage("look for copies", len(train) + len(val), "images") as bar:
        of_val = _search(mine, val, bar.advance)
        of_train = _search(mine, train, bar.advance)
    part = _telling(of_val.distance, of_train.distance)
    return Leaks(val=of_val.at(part), train=of_train.at(part))


def _leaks(val: Tensor, train: Tensor) -> Tensor:
    return (val < NEAR) & (val < NEARER * train)


def _telling(val: Tensor, train: Tensor) -> Tensor:
    """Which part of each image decides, int64 [N], by the distances [P, N] of its parts."""
    leaking = torch.where(_leaks(val, train), val, torch.inf)
    least, part = leaking.min(0)
    furthest, quarter = train[1:].max(0) if len(train) > 1 else train.max(0)
    honest = torch.where(furthest < train[0], 1 + quarter, 0)
    return torch.where(least.isfinite(), part, honest)


def features(thumbnails: Tensor) -> Tensor:
    """Of thumbnails [n, C, h, w], [n, h * w]: of length 1, and 0 of a flat image.

    Each channel is freed of its mean and contrast before they are added up.
    """
    flat = thumbnails.flatten(2)
    flat = flat - flat.mean(2, keepdim=True)
    flat = F.normalize(flat, dim=2, eps=_LEAST_CONTRAST * flat.shape[2] ** 0.5).sum(1)
    # Channels that cancel each other out leave rounding errors, which must not be blown up.
    return F.normalize(flat, dim=1, eps=0.2)


def _thumbnails(images: Tensor, share: float = 1.0, places: tuple[float, ...] = (0.0,)) -> Tensor:
    """Thumbnails of squares of images [n, C, R, R]: [P * P, n, C, cells, cells], the mean colours of cells.

    Args:
        share: of the side that a square keeps.
        places: P places of it down and across, each with every other: how much of the rest lies before it.
    """
    side, count = images.shape[-1], len(places)
    starts = [(1 - share) * place * side for place in places]
    cells = torch.cat([_cells(side, start, start + share * side) for start in starts])
    thumbnails = (images @ cells.T).mT @ cells.T
    small = len(cells) // count
    thumbnails = thumbnails.view(*images.shape[:2], count, small, count, small)
    return thumbnails.permute(4, 2, 0, 1, 5, 3).reshape(-1, *images.shape[:2], small, small)


def _cells(side: int, first: float, last: float) -> Tensor:
    """How much of each cell between two places of a side each pixel covers: [cells, side]."""
    edges = torch.linspace(first, last, min(SIDE, side) + 1, dtype=torch.float64)
    pixels = torch.arange(side, dtype=torch.float64)
    covered = torch.minimum(edges[1:, None], pixels + 1) - torch.maximum(edges[:-1, None], pixels)
    covered = covered.clamp(min=0)
    return (covered / covered.sum(1, keepdim=True)).to(torch.float32)


def _views(images: Tensor) -> Tensor:
    """Features of real images [n, C, R, R], [V, n, F]: whole, and nine crops of each share."""
    thumbnails = [_thumbnails(images), *(_thumbnails(images, share, _PLACES) for share in CROPS)]
    return torch.cat([_many(some) for some in thumbnails])


def _many(thumbnails: Tensor) -> Tensor:
    """Features of thumbnails [V, n, C, h, w]: [V, n, F]."""
    return features(thumbnails.flatten(0, 1)).view(*thumbnails.shape[:2], -1)


class _Submitted:
    """Submitted images as they are sought.

    Attributes:
        images: float32 [N, C, R, R].
        sought: for each variant its part (0 the whole, 1 to 4 a quarter), its features [N, F], and with
            how many of a real image's views they are compared.
        rows: of the images by the sampled bytes of them.
    """

    def __init__(self, images: Tensor) -> None:
        self.images = images
        self.rows: dict[bytes, list[int]] = {}
        pieces: list[list[tuple[int, Tensor, int]]] = []
        for first in range(0, len(images), _BATCH):
            piece = _bytes(_sampled(images[first : first + _BATCH]))
            for row, pixels in enumerate(piece.numpy(), first):
                self.rows.setdefault(pixels.tobytes(), []).append(row)
            pieces.append(list(_variants(piece.to(torch.float32).div_(255))))
        self.sought = [
            (part, torch.cat([found for _, found, _ in same]), views)
            for same in zip(*pieces, strict=True)
            for part, _, views in same[:1]
        ]
        self.parts = 1 + max(part for part, _, _ in self.sought)


def _variants(images: Tensor) -> Iterator[tuple[int, Tensor, int]]:
    """Part, features [n, F] and how many views are compared, of every variant of images [n, C, R, R]."""
    (whole,) = _thumbnails(images)
    sought = [(0, whole, _VIEWS[-1])]
    sought += [
        (0, _thumbnails(images, share, (0.5,))[0], views)
        for share, views in zip(INNER, _VIEWS[1:], strict=False)
    ]
    sought += [(0, whole.rot90(turns, (2, 3)), 1) for turns in (1, 2, 3)]
    if images.shape[-1] >= _QUARTERED:
        quarters = _thumbnails(images, 0.5, (0.0, 1.0))
        sought += [(part, quarter, 1) for part, quarter in enumerate(quarters, 1)]
    for part, thumbnails, views in sought:
        yield part, features(thumbnails), views
        yield part, features(thumbnails.flip(-1)), views


@dataclass(frozen=True)
class _Found:
    """The nearest images of a split by part, [P, N]; `same` [N]: the position of an equal one, or -1."""

    distance: Tensor
    position: Tensor
    same: Tensor

    def at(self, part: Tensor) -> Nearest:
        """By the parts, int64 [N], that decide."""
        exact = self.same >= 0
        distance = self.distance.gather(0, part[None])[0]
        position = self.position.gather(0, part[None])[0]
        return Nearest(
            distance=torch.where(exact, 0.0, distance),
            position=torch.where(exact, self.same, position),
            exact=exact,
        )


def _search(mine: _Submitted, split: RealDataset, told: Callable[[int], None]) -> _Found:
    count = len(mine.images)
    best = torch.full((mine.parts, count), -1.0)
    position = torch.zeros(mine.parts, count, dtype=torch.int64)
    same = torch.full((count,), -1, dtype=torch.int64)
    for first in range(0, len(split), _BATCH):
        real = np.array(_sampled(split.images[first : first + _BATCH]))
        for there, pixels in enumerate(real, first):
            for row in mine.rows.get(pixels.tobytes(), ()):
                if np.array_equal(_bytes(mine.images[row]).numpy(), split.images[there]):
                    same[row] = there
        views = _views(torch.from_numpy(real).to(torch.float32).div_(255))
        for part, sought, seen in mine.sought:
            _improve(best[part], position[part], sought, views[:seen], first)
        told(len(real))
    return _Found((2 - 2 * best.clamp(max=1)).sqrt(), position, same)


def _improve(best: Tensor, position: Tensor, sought: Tensor, views: Tensor, first: int) -> None:
    """Writes to `best` [N] and `position` [N] where a view [V, n, F] is more like what is sought [N, F]."""
    step = max(_PRODUCT // (len(sought) * len(views)), 1)
    for start in range(0, views.shape[1], step):
        some = views[:, start : start + step]
        likeness = sought @ some.flatten(0, 1).T
        # A negative is as much of a copy.
        rows = (torch.maximum(likeness.amax(1), -likeness.amin(1)) > best).nonzero().flatten()
        best[rows], column = likeness[rows].abs().max(1)
        position[rows] = first + start + column % some.shape[1]


_Images = TypeVar("_Images", Tensor, "npt.NDArray[np.uint8]")


def _sampled(images: _Images) -> _Images:
    """Pixels at even distances of large images [n, C, R, R], as a view: thumbnails hardly differ.

    The step is odd and the margins are equal, so that a mirror image is sampled at the same pixels.
    """
    side = images.shape[-1]
    step = (max(side // _SAMPLED, 1) - 1) // 2 * 2 + 1
    first = (side - 1) * (step + 1) // 2 % step
    return images[..., first::step, first::step]


def _bytes(images: Tensor) -> Tensor:
    return images.mul(255).round().to(torch.uint8)
