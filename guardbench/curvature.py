"""The curvature regulariser of GUARD (Xue et al., AAAI 2025, section 4, after CURE).

With l the loss, z_i = grad l(x_i) / ||grad l(x_i)|| and h a length in input space, GUARD flattens the
loss around the training images so that one step along z changes little. Two forms exist:

- as in the paper (its regularised objective; CURE, Moosavi-Dezfooli et al. 2019, equation 7):
  `l(x) + weight * mean_i || grad l(x_i + h z_i) - grad l(x_i) ||^2`, a second-order quantity;
- as in the authors' released code: `l(x) + weight * | l(x + h z) - l(x) |` on batch means.

`h` is given as a root mean square change a pixel in [0, 1] units, so that it means the same at every
resolution: the length of the step is `h * sqrt(C * H * W)`. The paper's h = 3 in ImageNet-normalised
pixels at 224 px is about 0.45/255 a pixel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from guardbench.models import running_statistics_kept
from guardbench.regularisers.base import Batch, require_positive


@dataclass(frozen=True, kw_only=True)
class FirstOrderCurvature:
    """The form of the released code, `weight * | l(x + h z) - l(x) |`, with z held constant.

    The penalty is an absolute difference of two losses, so its gradient in the weights is a signed
    sum of two gradients: with s the sign of `l(x + h z) - l(x)`, the whole gradient is
    `(1 - weight s) grad l(x) + weight s grad l(x + h z)`. One backward at x gives its first part and
    the direction z together; a step costs two plain ones.

    The second pass uses its own batch's BN statistics and does not move the running ones: taken in
    eval mode from the first step, a network can learn to be constant in eval mode alone.

    Attributes:
        weight: factor of the penalty (beta in the released code).
        h: root mean square change a pixel of the step, in [0, 1] units.
    """

    weight: float
    h: float

    def __post_init__(self) -> None:
        require_positive(weight=self.weight, h=self.h)

    @property
    def cost(self) -> float:
        """See `Regulariser.cost`."""
        return 2.0

    def backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """See `Regulariser.backward`."""
        images = batch.images.detach().requires_grad_()
        loss = batch.loss(images)
        loss.backward()  # type: ignore[no-untyped-call]
        assert images.grad is not None
        with running_statistics_kept(batch.model):
            moved = batch.loss(images.detach() + step_along(images.grad, self.h))
        rise = moved.detach() - loss.detach()
        signed = self.weight * torch.sign(rise)
        for parameter in batch.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(1 - signed)
        (signed * moved).backward()  # type: ignore[no-untyped-call]
        return loss.detach(), self.weight * rise.abs()


@dataclass(frozen=True, kw_only=True)
class DoubleBackwardCurvature:
    """The form of the paper, `weight * mean_i || grad l(x_i + h z_i) - grad l(x_i) ||^2`.

    `l` here is one image's own loss, so the batch-mean loss is scaled by N before it is
    differentiated. z is held constant. Needs a second backward through the gradients.

    Attributes:
        weight: factor of the penalty (lambda in the paper).
        h: root mean square change a pixel of the step, in [0, 1] units.
    """

    weight: float
    h: float

    def __post_init__(self) -> None:
        require_positive(weight=self.weight, h=self.h)

    @property
    def cost(self) -> float:
        """See `Regulariser.cost`."""
        return 4.0

    def backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """See `Regulariser.backward`."""
        count = len(batch.images)
        images = batch.images.detach().requires_grad_()
        loss = batch.loss(images)
        (here,) = torch.autograd.grad(loss * count, images, create_graph=True)
        there_images = (images.detach() + step_along(here.detach(), self.h)).requires_grad_()
        with running_statistics_kept(batch.model):
            moved = batch.loss(there_images)
        (there,) = torch.autograd.grad(moved * count, there_images, create_graph=True)
        penalty = self.weight * (there - here).flatten(1).square().sum(1).mean()
        (loss + penalty).backward()  # type: ignore[no-untyped-call]
        return loss.detach(), penalty.detach()


def step_along(gradient: Tensor, h: float) -> Tensor:
    """`h * sqrt(C * H * W) * z`: each image's gradient [N, C, H, W] scaled to the step's length.

    An image whose gradient is zero stays where it is.
    """
    length = h * math.sqrt(gradient[0].numel())
    norms: Tensor = torch.linalg.vector_norm(gradient.flatten(1), dim=1).view(-1, 1, 1, 1)
    return length * gradient / norms.clamp_min(torch.finfo(gradient.dtype).tiny)
