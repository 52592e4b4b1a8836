"""The adversarial training of GUARD's released code, to be measured beside the proper one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from guardbench.models import Classifier, running_statistics_kept
from guardbench.regularisers.base import Batch, require_positive


@dataclass(frozen=True, kw_only=True)
class ReleasedAdversarial:
    """PGD as the authors of GUARD released it: on normalised images that are clamped to [0, 1].

    A setting that is not adversarial training in the protocol's threat model: the attack sees images
    that are normalised already, yet cuts them to [0, 1], so that every pixel below the dataset's mean is
    lost; and in one variant of that code, followed here, the radius, in normalised units, is that of h (3
    by default), which is larger than that range. So an attacked image need not keep anything of its own,
    and nothing can be learned from it. Steps and their length are ours. See FirstOrderCurvature for what
    h is elsewhere.

    Attributes:
        radius: l-inf, in normalised units.
        steps: of PGD, from a random start.
        step: a step's length as a share of the radius.
    """

    radius: float = 3.0
    steps: int = 7
    step: float = 0.25

    def __post_init__(self) -> None:
        require_positive(radius=self.radius, steps=self.steps, step=self.step)

    @property
    def cost(self) -> float:
        """See `Regulariser.cost`."""
        return 1 + self.steps * 2 / 3

    def backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """See `Regulariser.backward`; the loss is that at the attacked images, the penalty 0."""
        model = batch.model
        assert isinstance(model, Classifier), "it attacks behind the normalisation"

        def loss_at(normalised: Tensor) -> Tensor:
            with batch.autocast():
                logits = model.backbone(normalised.contiguous(memory_format=torch.channels_last))
            return batch.loss_of(logits.float())

        centre = model.normalise(batch.images)
        noise = batch.drawn(torch.rand, *centre.shape[1:]) * 2 - 1
        adv = (centre + self.radius * noise.to(centre)).clamp(0, 1)
        with running_statistics_kept(model):
            for _ in range(self.steps):
                leaf = adv.detach().requires_grad_()
                (slope,) = torch.autograd.grad(loss_at(leaf), leaf)
                moved = adv + self.step * self.radius * slope.sign()
                adv = moved.clamp(centre - self.radius, centre + self.radius).clamp(0, 1)
        loss = loss_at(adv)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach(), torch.zeros_like(loss)
