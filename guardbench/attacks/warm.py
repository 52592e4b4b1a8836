"""PGD from where an earlier, smaller radius left off."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from guardbench.attacks.search import State, search
from guardbench.ball import project, require_norm, steepest
from guardbench.threat import ThreatModel

STEP_SHARE = 2.5
"""The steps together reach this many radii, as in Madry et al. (arXiv:1706.06083)."""


class WarmPGD:
    """PGD on the cross-entropy that begins where the last call for the same images ended.

    Attributes:
        threat: the ball, which the caller widens between calls; l-inf or l2.
        ended: [N, C, H, W], the last iterates, broken or not.
    """

    def __init__(self, threat: ThreatModel, x: Tensor, steps: int) -> None:
        require_norm("the curve", threat, ("linf", "l2"))
        self.threat, self.x, self.ended, self.steps = threat, x, x.clone(), steps

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, *, seed: int) -> Tensor:  # noqa: ARG002
        """Adversarial images [N, C, H, W] for some of its images and their labels `y` [N]."""
        size = STEP_SHARE * float(self.threat.eps) / self.steps

        def update(state: State, gradient: Tensor, x: Tensor, step: int) -> State:  # noqa: ARG001
            move = steepest(gradient, self.threat.norm)
            return (project(state[0] + size * move, x, self.threat),)

        self.x, self.ended = self.x.to(x.device), self.ended.to(x.device)
        rows = torch.stack([(self.x == image).flatten(1).all(1).int().argmax() for image in x])
        start = project(self.ended[rows], x, self.threat)
        found, _ = search(model, x, y, (start,), steps=self.steps, update=update)
        self.ended[rows] = found
        return found
