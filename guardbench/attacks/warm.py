"""PGD from where an earlier, smaller radius left off."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from guardbench.attacks.search import search
from guardbench.attacks.stream import Rows
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

        def places(x: Tensor) -> Tensor:
            return torch.stack([(self.x == image).flatten(1).all(1).int().argmax() for image in x])

        def start(x: Tensor, y: Tensor, job: Tensor) -> Rows:  # noqa: ARG001
            return {"point": project(self.ended[places(x)], x, self.threat)}

        def update(rows: Rows, gradient: Tensor) -> Rows:
            ahead = rows["point"] + size * steepest(gradient, self.threat.norm)
            return {"point": project(ahead, rows["x"], self.threat)}

        self.x, self.ended = self.x.to(x.device), self.ended.to(x.device)
        found = search(model, x, y, update, steps=self.steps, start=start)
        self.ended[places(x)] = found
        return found
