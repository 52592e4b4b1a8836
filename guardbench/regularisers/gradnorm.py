"""Gradient-norm regularisation, the alternative that GUARD's authors tried (their ablation)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from guardbench.regularisers.base import Batch, require_positive


@dataclass(frozen=True, kw_only=True)
class GradientNorm:
    """`l(x) + weight * mean_i || grad l(x_i) ||_2`, with the gradient in [0, 1] pixels.

    Xue et al., AAAI 2025, ablation (weights 1e-4 to 1), after double backpropagation (Drucker & Le
    Cun, 1992). Needs a second backward through the gradient. The paper's weights are, as its h = 3 suggests,
    for gradients in ImageNet-normalised pixels, which are about 4.4 times smaller than these.

    Attributes:
        weight: factor of the penalty.
    """

    weight: float

    def __post_init__(self) -> None:
        require_positive(weight=self.weight)

    @property
    def cost(self) -> float:
        """See `Regulariser.cost`."""
        return 3.2  # measured, see benchmarks/distilling.py

    def backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """See `Regulariser.backward`."""
        images = batch.images.detach().requires_grad_()
        loss = batch.loss(images)
        # The mean's gradient times N: one image's own loss, as far as batch statistics let it be.
        (slope,) = torch.autograd.grad(loss * batch.count, images, create_graph=True)
        slope = slope / batch.scale
        # The smallest normal number under the root: where a gradient is zero, its norm has none.
        tiny = torch.finfo(slope.dtype).tiny
        norms = (slope.flatten(1).square().sum(1) + tiny).sqrt()
        penalty = self.weight * batch.shared(norms.mean())
        (loss + penalty).backward()  # type: ignore[no-untyped-call]
        return loss.detach(), penalty.detach()
