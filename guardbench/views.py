"""The views of distilled images that students learn from and teachers label.

A view is drawn from a seed alone, so a teacher can label today exactly the view that a student
sees tomorrow, and only the logits need to be stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from guardbench.canonical import derive_seed
from guardbench.data.augment import (
    CutBox,
    apply_crops,
    apply_cutmix,
    draw_crops,
    draw_cutmix,
    draw_flips,
)
from guardbench.protocol import Student


@dataclass(frozen=True)
class View:
    """One batch: which images, and what is done to them before a network sees them.

    Attributes:
        indices: int64 [b], positions in the distilled set.
        boxes: int64 [b, 4], the crops.
        flips: bool [b].
        mix: CutMix's partners (int64 [b], whose rectangle each image gets) and rectangle, or None.
    """

    indices: Tensor
    boxes: Tensor
    flips: Tensor
    mix: tuple[Tensor, CutBox] | None

    def render(self, images: Tensor, device: torch.device | None = None) -> Tensor:
        """The view [b, C, R, R] of the distilled set's images [N, C, R, R], both in [0, 1].

        Args:
            device: where the view is made; where the images are if not given.
        """
        picked = images[self.indices.to(images.device)].to(device or images.device)
        views = apply_crops(picked, self.boxes, self.flips, images.shape[-1])
        return views if self.mix is None else apply_cutmix(views, *self.mix)


def epoch_views(
    student: Student, *, images: int, resolution: int, seed: int, epoch: int
) -> Iterator[View]:
    """The views of one epoch in order; every image of the set is seen once.

    Args:
        student: batch size, crop scale, flip and CutMix of the protocol.
        images: how many the distilled set has.
        seed, epoch: name the random choice.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "views", epoch))
    order = torch.randperm(images, generator=generator)
    for indices in torch.split(order, student.batch_size):
        count = len(indices)
        boxes = draw_crops(count, resolution, student.crop_scale, generator)
        flips = draw_flips(count, generator) & student.flip
        mix = None
        if student.cutmix:
            mix = draw_cutmix(count, resolution, student.cutmix, generator)
        yield View(indices, boxes, flips, mix)
