"""PGD from where an earlier, smaller radius left off."""

from __future__ import annotations

from torch import Tensor, nn

from guardbench.attacks.ball import project, require_norm, steepest
from guardbench.attacks.search import State, search
from guardbench.threat import ThreatModel

STEP_SHARE = 2.5
"""The steps together reach this many radii, as in Madry et al. (arXiv:1706.06083)."""


class WarmPGD:
    """PGD on the cross-entropy that begins at given images and remembers where it ended.

    Attributes:
        threat: the ball; l-inf or l2.
        ended: [N, C, H, W] after `perturb`: the last iterates, broken or not.
    """

    def __init__(self, threat: ThreatModel, start: Tensor, steps: int) -> None:
        require_norm("the curve", threat, ("linf", "l2"))
        self.threat, self.start, self.steps = threat, start, steps
        self.ended = start

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, *, seed: int) -> Tensor:  # noqa: ARG002
        """Adversarial images [N, C, H, W] for images `x` in [0, 1] and labels `y` [N].

        The start is a row an image; for fewer images (searched again by the harness) it is `x`.
        """
        size = STEP_SHARE * float(self.threat.eps) / self.steps

        def update(state: State, gradient: Tensor, x: Tensor, step: int) -> State:  # noqa: ARG001
            move = steepest(gradient, self.threat.norm)
            return (project(state[0] + size * move, x, self.threat),)

        whole = len(x) == len(self.start)
        start = project(self.start.to(x), x, self.threat) if whole else x
        found, _ = search(model, x, y, (start,), steps=self.steps, update=update)
        if whole:
            self.ended = found.to(self.ended)
        return found
