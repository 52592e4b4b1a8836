"""MIM: iterative FGSM with a momentum on the gradient."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from guardbench.attacks.search import search
from guardbench.attacks.stream import Rows
from guardbench.ball import length, per_image, project, require_norm, steepest
from guardbench.errors import GuardbenchError
from guardbench.threat import ThreatModel


@dataclass(frozen=True, kw_only=True)
class MIM:
    """`g <- decay * g + grad / |grad|_1`, then `x <- project(x + step * sign(g))`; from `x` itself.

    Dong et al., "Boosting adversarial attacks with momentum", CVPR 2018 (arXiv:1710.06081),
    algorithm 1 (equations 6 and 7); in l2 the step is `step * g / |g|`. An image
    counts as broken at the first iterate that is misclassified (the worst over the path, see
    `search`).

    Attributes:
        threat: the ball; l-inf or l2.
        steps: gradient steps.
        step: length of a step in [0, 1] pixel units, in the norm of the threat.
        decay: mu in the paper.
    """

    threat: ThreatModel
    steps: int = 20
    step: Fraction = Fraction(1, 255)
    decay: float = 1.0

    def __post_init__(self) -> None:
        require_norm("MIM", self.threat, ("linf", "l2"))
        if self.steps < 1 or self.step <= 0 or self.decay < 0:
            raise GuardbenchError(f"steps and step must be positive, decay not negative: {self}")

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, *, seed: int) -> Tensor:  # noqa: ARG002
        """Adversarial images [N, C, H, W] for images `x` in [0, 1] and labels `y` [N]."""

        def update(rows: Rows, gradient: Tensor) -> Rows:
            momentum = gathered(rows["momentum"], gradient, self.decay)
            ahead = rows["point"] + float(self.step) * steepest(momentum, self.threat.norm)
            return {"point": project(ahead, rows["x"], self.threat), "momentum": momentum}

        return search(model, x, y, update, steps=self.steps, start=at_rest)


def at_rest(x: Tensor, y: Tensor, job: Tensor) -> Rows:  # noqa: ARG001
    """A start at the clean image, without momentum; see `search.Start`."""
    return {"point": x, "momentum": torch.zeros_like(x)}


def gathered(momentum: Tensor, gradient: Tensor, decay: float) -> Tensor:
    """The momentum after one more gradient, scaled to an l1 length of 1 (equation 6), [N, C, H, W]."""
    size = length(gradient, "l1")
    return decay * momentum + gradient / per_image(torch.where(size > 0, size, 1), gradient)
