"""Adversarial training inside a distiller, attacked in pixel space with the protocol's threat model.

All attacks here see the batch's own BN statistics and do not move the running ones: the network is
attacked as it is trained. The loss that is minimised moves them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from guardbench.ball import project, require_norm, steepest
from guardbench.models import running_statistics_kept
from guardbench.regularisers.base import Batch, require_positive
from guardbench.threat import ThreatModel


def ascend(
    batch: Batch,
    start: Tensor,
    loss_at: Callable[[Tensor], Tensor],
    *,
    threat: ThreatModel,
    steps: int,
    step: float,
) -> Tensor:
    """Images [N, C, H, W] after gradient steps that raise `loss_at`, each projected onto the ball.

    Args:
        batch: whose images are the centres of the balls.
        start: where to begin, inside the balls.
        loss_at: scalar loss of images.
        threat: l-inf or l2.
        steps: how many.
        step: length of a step as a share of the radius.
    """
    move = step * float(threat.eps)
    adv = start
    with running_statistics_kept(batch.model):
        for _ in range(steps):
            leaf = adv.detach().requires_grad_()
            (slope,) = torch.autograd.grad(loss_at(leaf), leaf)
            adv = project(adv + move * steepest(slope, threat.norm), batch.images, threat)
    return adv.detach()


def uniform_start(batch: Batch, threat: ThreatModel) -> Tensor:
    """A random point of every image's ball, drawn from the batch's generator, clipped to [0, 1].

    Uniform in l-inf; in l2 a random direction at a radius whose volume is uniform.
    """
    images, eps = batch.images, float(threat.eps)
    if threat.norm == "linf":
        noise = (batch.drawn(torch.rand, *images.shape[1:]) * 2 - 1) * eps
    else:
        noise = batch.drawn(torch.randn, *images.shape[1:])
        radius = batch.drawn(torch.rand) ** (1 / images[0].numel())
        length = torch.linalg.vector_norm(noise.flatten(1), dim=1)
        noise = noise * (eps * radius / length).view(-1, 1, 1, 1)
    return project(images + noise.to(images), images, threat)


@dataclass(frozen=True, kw_only=True)
class AdversarialTraining:
    """The loss at images that PGD has found, in the place of the loss at the images.

    Madry et al., ICLR 2018 (arXiv:1706.06083), equation 2.1 and section 4: a random start in the
    ball, 7 steps of a quarter of the radius.

    Attributes:
        threat: the protocol's; l-inf or l2.
        steps: of PGD.
        step: a step's length as a share of the radius.
    """

    threat: ThreatModel
    steps: int = 7
    step: float = 0.25

    def __post_init__(self) -> None:
        require_norm("adversarial training", self.threat, ("linf", "l2"))
        require_positive(steps=self.steps, step=self.step)

    @property
    def cost(self) -> float:
        """See `Regulariser.cost`: a step of PGD is a forward and a backward to the images alone."""
        return 1 + self.steps * 2 / 3

    def backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """See `Regulariser.backward`; the loss is that at the attacked images, the penalty 0."""
        adv = ascend(
            batch,
            uniform_start(batch, self.threat),
            batch.loss,
            threat=self.threat,
            steps=self.steps,
            step=self.step,
        )
        loss = batch.loss(adv)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach(), torch.zeros_like(loss)
