"""TRADES: accuracy on clean images, and the same answer in the ball around them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from guardbench.ball import project, require_norm
from guardbench.models import running_statistics_kept
from guardbench.regularisers.adversarial import ascend
from guardbench.regularisers.base import Batch, require_positive
from guardbench.threat import ThreatModel


@dataclass(frozen=True, kw_only=True)
class Trades:
    """`CE(f(x), y) + beta * KL(f(x) || f(x'))`, where x' is the image in the ball that raises the KL.

    Zhang et al., ICML 2019 (arXiv:1901.08573), algorithm 1: x' starts from x plus normal noise of
    0.001. The gradient of the KL goes through both of its sides.

    Attributes:
        threat: the protocol's; l-inf or l2.
        beta: weight of robustness against accuracy (1 / lambda in the paper).
        steps: of the attack.
        step: a step's length as a share of the radius.
    """

    threat: ThreatModel
    beta: float = 6.0
    steps: int = 10
    step: float = 0.25

    def __post_init__(self) -> None:
        require_norm("TRADES", self.threat, ("linf", "l2"))
        require_positive(beta=self.beta, steps=self.steps, step=self.step)

    @property
    def cost(self) -> float:
        """See `Regulariser.cost`."""
        return 2 + 1 / 3 + self.steps * 2 / 3

    def backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """See `Regulariser.backward`; the penalty is beta times the KL, a mean over images."""
        images = batch.images
        with torch.no_grad(), running_statistics_kept(batch.model):
            wanted = F.log_softmax(batch.logits(images), dim=1)
        noise = 0.001 * batch.drawn(torch.randn, *images.shape[1:]).to(images)
        adv = ascend(
            batch,
            project(images + noise, images, self.threat),
            lambda x: batch.shared(divergence(wanted, F.log_softmax(batch.logits(x), dim=1))),
            threat=self.threat,
            steps=self.steps,
            step=self.step,
        )
        here = batch.logits(images)
        loss = batch.loss_of(here)
        there = F.log_softmax(batch.logits(adv), dim=1)
        penalty = self.beta * batch.shared(divergence(F.log_softmax(here, dim=1), there))
        (loss + penalty).backward()  # type: ignore[no-untyped-call]
        return loss.detach(), penalty.detach()


def divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """KL(wanted || found) of log-probabilities [N, K], a mean over images."""
    return F.kl_div(found, wanted, reduction="batchmean", log_target=True)
