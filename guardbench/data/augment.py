"""Augmentations of a batch of tensors, drawn from a generator and applied apart from the drawing.

What was drawn is a small tensor, so that a view can be stored and seen again by another network.
Draws happen on the generator's device; a CPU generator gives the same views on every device.
"""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

RATIO = (3 / 4, 4 / 3)
_TRIES = 10


class CutBox(NamedTuple):
    """The rectangle, in pixels, that CutMix takes from the other image; `lam` is the area kept."""

    top: int
    left: int
    height: int
    width: int
    lam: float


def draw_crops(
    n: int,
    size_in: int | tuple[int, int],
    scale: tuple[float, float],
    generator: torch.Generator,
    ratio: tuple[float, float] = RATIO,
) -> Tensor:
    """Boxes of `n` random resized crops: int64 [n, 4] of top, left, height, width, in pixels.

    The distribution is that of torchvision's RandomResizedCrop: an area uniform in `scale` of the
    image, an aspect log-uniform in `ratio`, ten tries to fit, else the centre as near as can be.

    Args:
        n: number of boxes.
        size_in: side of the images, or (height, width).
        scale: range of the area, with 0 < low <= high <= 1.
        generator: what is drawn from.
        ratio: range of width over height.

    Raises:
        ValueError: a range is empty or out of bounds.
    """
    height, width = (size_in, size_in) if isinstance(size_in, int) else size_in
    if not 0 < scale[0] <= scale[1] <= 1 or not 0 < ratio[0] <= ratio[1]:
        raise ValueError(f"scale {scale} or ratio {ratio} is not a range within bounds")
    where = generator.device
    drawn = torch.rand((4, n, _TRIES), generator=generator, dtype=torch.float64, device=where)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * drawn[0])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = torch.exp(low + (high - low) * drawn[1])
    w = torch.round(torch.sqrt(area * aspect))
    h = torch.round(torch.sqrt(area / aspect))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    top = torch.floor(drawn[2] * (height - h + 1)).clamp(max=height - h)
    left = torch.floor(drawn[3] * (width - w + 1)).clamp(max=width - w)
    tries = torch.stack((top, left, h, w), dim=-1)
    first = fits.to(torch.uint8).argmax(dim=1)
    boxes = tries[torch.arange(n, device=where), first]
    fallback = torch.tensor(_centre(height, width, ratio), dtype=torch.float64, device=where)
    return torch.where(fits.any(dim=1, keepdim=True), boxes, fallback).to(torch.int64)


def _centre(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int, int, int]:
    h, w = height, width
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


def draw_flips(n: int, generator: torch.Generator) -> Tensor:
    """Which of `n` images are mirrored: bool [n], each with probability one half."""
    return torch.rand(n, generator=generator, device=generator.device) < 0.5


def apply_crops(images: Tensor, boxes: Tensor, flip: Tensor | None, size: int) -> Tensor:
    """Cuts each image's box out, resizes it to `size` and mirrors it where told, in one sampling.

    Equal to torchvision's resized_crop (bilinear, antialias=False) image by image, and
    differentiable in `images`. A crop is at most as large as its image, so that without
    antialiasing nothing is lost as long as `size` is not smaller than the images.

    Args:
        images: float [n, C, H, W].
        boxes: [n, 4] of top, left, height, width in pixels, inside the image.
        flip: bool [n], or None for no mirroring.
        size: side of the result.

    Returns:
        float [n, C, size, size], of the images' dtype.
    """
    height, width = images.shape[-2:]
    top, left, h, w = boxes.to(images.device, torch.float32).unbind(1)
    rows, columns = _centres(top, h, size), _centres(left, w, size)
    if flip is not None:
        columns = torch.where(flip.to(images.device)[:, None], columns.flip(1), columns)
    if images.is_cuda and images.requires_grad:
        return sample_axes(images, rows, columns)
    # grid_sample counts from -1, the outer edge of the first pixel, to 1, that of the last.
    across = ((2 * columns + 1) / width - 1)[:, None, :].expand(-1, size, -1)
    down = ((2 * rows + 1) / height - 1)[:, :, None].expand(-1, -1, size)
    grid = torch.stack((across, down), dim=-1)
    sampled = F.grid_sample(
        images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    return sampled.to(images.dtype)


def _centres(start: Tensor, extent: Tensor, size: int) -> Tensor:
    """Where the `size` pixels of a result lie along one side: float32 [n, size], in source pixels.

    Held within the box, so that no pixel beside it shines in: torchvision cuts before it resizes.
    """
    steps = torch.arange(size, device=start.device, dtype=torch.float32) + 0.5
    inside = steps[None, :] * (extent[:, None] / size) - 0.5
    return start[:, None] + torch.minimum(inside.clamp(min=0), extent[:, None] - 1)


def sample_axes(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Bilinear sampling on a grid of rows and columns, as two products of matrices; zero outside.

    For gradients on a GPU, where grid_sample's backward adds atomically in an order that changes
    from run to run, and a resumed recover would not end with the images of an unbroken one; and
    where a gradient is differentiated again, which grid_sample cannot do.

    Args:
        images: [N, C, H, W].
        rows, columns: float [N or 1, size], where the result's pixels lie, in source pixels.

    Returns:
        [N, C, size, size], of the images' dtype.
    """
    with torch.autocast(images.device.type, enabled=False):
        down = hat(rows, images.shape[-2])
        across = hat(columns, images.shape[-1])
        sampled = down[:, None] @ images.float() @ across[:, None].transpose(-1, -2)
    return sampled.to(images.dtype)


def hat(centres: Tensor, extent: int) -> Tensor:
    """Bilinear weights [n, size, extent]: one minus the distance to a source pixel, above zero."""
    pixels = torch.arange(extent, device=centres.device, dtype=torch.float32)
    return (1 - (centres[:, :, None] - pixels).abs()).clamp(min=0)


def draw_cutmix(
    n: int, size_in: int | tuple[int, int], alpha: float, generator: torch.Generator
) -> tuple[Tensor, CutBox]:
    """The partners (a permutation, int64 [n]) and the rectangle of one CutMix (Yun et al., 2019).

    The rectangle has the image's aspect and 1 - Beta(alpha, alpha) of its area, around a centre
    uniform in the image, and is cut at the border; `lam` is what is then left of the first image.

    Raises:
        ValueError: `alpha` is not positive.
    """
    if alpha <= 0:
        raise ValueError(f"alpha {alpha} is not positive")
    height, width = (size_in, size_in) if isinstance(size_in, int) else size_in
    where = generator.device
    # torch's Beta takes no generator; a seed drawn from ours makes the standard library's exact.
    seed = int(torch.randint(1 << 62, (1,), generator=generator, device=where).item())
    cut = math.sqrt(1 - random.Random(seed).betavariate(alpha, alpha))
    permutation = torch.randperm(n, generator=generator, device=where)
    centre = torch.rand(2, generator=generator, dtype=torch.float64, device=where).tolist()
    top, bottom = _span(int(centre[0] * height), int(height * cut), height)
    left, right = _span(int(centre[1] * width), int(width * cut), width)
    lam = 1 - (bottom - top) * (right - left) / (height * width)
    return permutation, CutBox(top, left, bottom - top, right - left, lam)


def _span(centre: int, extent: int, limit: int) -> tuple[int, int]:
    return max(centre - extent // 2, 0), min(centre + extent // 2, limit)


def apply_cutmix(images: Tensor, permutation: Tensor, box: CutBox) -> Tensor:
    """A copy of [n, C, H, W] in which each image's rectangle is that of its partner's."""
    rows = slice(box.top, box.top + box.height)
    columns = slice(box.left, box.left + box.width)
    mixed = images.clone()
    mixed[:, :, rows, columns] = images[permutation.to(images.device), :, rows, columns]
    return mixed
