"""Jitter: PGD that aims at other classes in turn, by noise on rescaled probabilities."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from guardbench.attacks.search import search
from guardbench.attacks.stream import Rows
from guardbench.ball import content_noise, project, random_start, require_norm, steepest
from guardbench.errors import GuardbenchError
from guardbench.threat import ThreatModel


@dataclass(frozen=True, kw_only=True)
class Jitter:
    """Ascends `|softmax(scale * z / |z|_inf) + noise - onehot(y)|_2` in place of the cross-entropy.

    Schwinn et al., "Exploring misclassifications of robust neural networks to enhance adversarial
    attacks", Applied Intelligence 2023 (arXiv:2105.10304), section 3. The paper's division by the
    perturbation's length concerns images already misclassified, which leave here (see `search`).

    Attributes:
        threat: the ball; l-inf or l2.
        steps: gradient steps.
        step: length of a step in radii of the ball.
        scale: alpha in the paper: the largest logit before the softmax.
        noise: sigma in the paper: standard deviation, on probabilities.
    """

    threat: ThreatModel
    steps: int = 100
    step: float = 0.25
    scale: float = 10.0
    noise: float = 0.1

    def __post_init__(self) -> None:
        require_norm("Jitter", self.threat, ("linf", "l2"))
        if self.steps < 1 or self.step <= 0 or self.scale <= 0 or self.noise < 0:
            raise GuardbenchError(
                f"steps, step and scale must be positive, noise not negative: {self}"
            )

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, *, seed: int) -> Tensor:
        """Adversarial images [N, C, H, W] for images `x` in [0, 1] and labels `y` [N]."""
        size = self.step * float(self.threat.eps)

        def start(x: Tensor, y: Tensor, job: Tensor) -> Rows:  # noqa: ARG001
            return {"point": random_start(x, self.threat, seed)}

        def objective(logits: Tensor, rows: Rows) -> Tensor:
            top, classes = logits.abs().amax(1, keepdim=True).clamp_min(1e-12), logits.shape[1:]
            noise = content_noise(
                rows["x"], seed, "jitter", rows["age"], shape=classes, normal=True
            )
            found = (self.scale * logits / top).softmax(1) + self.noise * noise
            return (found - F.one_hot(rows["y"], *classes)).square().sum()

        def update(rows: Rows, gradient: Tensor) -> Rows:
            ahead = rows["point"] + size * steepest(gradient, self.threat.norm)
            return {"point": project(ahead, rows["x"], self.threat)}

        return search(model, x, y, update, steps=self.steps, start=start, objective=objective)
