"""PGD: projected gradient ascent on the cross-entropy."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from torch import Tensor, nn

from guardbench.attacks.search import search
from guardbench.attacks.stream import Rows
from guardbench.ball import project, random_start, require_norm, steepest
from guardbench.errors import GuardbenchError
from guardbench.threat import ThreatModel


@dataclass(frozen=True, kw_only=True)
class PGD:
    """`x_{t+1} = project(x_t + step * sign(grad CE))`; in l2 the step is `step * grad / |grad|`.

    Madry et al., "Towards deep learning models resistant to adversarial attacks", ICLR 2018
    (arXiv:1706.06083), section 2.1. An image counts as broken at the first iterate that is
    misclassified (the worst over the path, see `search`), where the paper reads the last.

    Attributes:
        threat: the ball; l-inf or l2.
        steps: gradient steps a restart.
        step: length of a step in [0, 1] pixel units, in the norm of the threat.
        random_start: begin at a uniformly random point of the ball instead of the clean image.
        restarts: independent runs; an image that one of them breaks leaves the others.
    """

    threat: ThreatModel
    steps: int = 100
    step: Fraction = Fraction(1, 1020)
    random_start: bool = True
    restarts: int = 1

    def __post_init__(self) -> None:
        require_norm("PGD", self.threat, ("linf", "l2"))
        if self.steps < 1 or self.restarts < 1 or self.step <= 0:
            raise GuardbenchError(f"steps, step and restarts must be positive: {self}")
        if self.restarts > 1 and not self.random_start:
            raise GuardbenchError(f"restarts without a random start repeat one search: {self}")

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, *, seed: int) -> Tensor:
        """Adversarial images [N, C, H, W] for images `x` in [0, 1] and labels `y` [N]."""

        def start(x: Tensor, y: Tensor, job: Tensor) -> Rows:  # noqa: ARG001
            return {"point": random_start(x, self.threat, seed, job) if self.random_start else x}

        def update(rows: Rows, gradient: Tensor) -> Rows:
            ahead = rows["point"] + float(self.step) * steepest(gradient, self.threat.norm)
            return {"point": project(ahead, rows["x"], self.threat)}

        return search(model, x, y, update, steps=self.steps, start=start, jobs=self.restarts)
