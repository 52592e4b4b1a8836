"""VMI-FGSM: MIM whose gradient is tuned by its variance around the iterate."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from guardbench.attacks.mim import at_rest, gathered
from guardbench.attacks.search import search
from guardbench.attacks.stream import Fitting, Rows, gradient_of
from guardbench.ball import content_noise, pixel_radius, project, require_norm, steepest
from guardbench.errors import GuardbenchError
from guardbench.threat import ThreatModel


@dataclass(frozen=True, kw_only=True)
class VMIFGSM:
    """MIM on `grad + v`, where `v` is the mean gradient of neighbours less that of the iterate before.

    Wang & He, "Enhancing the transferability of adversarial attacks through variance tuning", CVPR 2021
    (arXiv:2103.15571), algorithm 1, with steps of `eps / steps`. Made to transfer; against the model
    itself each step costs `neighbours + 1` gradients. An image counts as broken at the first iterate
    that is misclassified (see `search`). Unlike the paper's, neighbours are clipped to [0, 1]: a model may
    refuse what is no image.

    Attributes:
        threat: the ball; l-inf or l2.
        steps: gradient steps.
        decay: of the momentum, mu in the paper.
        neighbours: N in the paper.
        beta: neighbours are uniform within `beta` times `ball.pixel_radius` of the iterate, in every
            pixel: the paper's `beta * eps` in l-inf.
        leave: False goes on after the first misclassified iterate, for images that are to fool another
            model than the one that they are made on.
    """

    threat: ThreatModel
    steps: int = 10
    decay: float = 1.0
    neighbours: int = 20
    beta: float = 1.5
    leave: bool = True

    def __post_init__(self) -> None:
        require_norm("VMI-FGSM", self.threat, ("linf", "l2"))
        if min(self.steps, self.neighbours) < 1 or self.beta <= 0 or self.decay < 0:
            raise GuardbenchError(
                f"steps, neighbours and beta must be positive, decay not negative: {self}"
            )

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, *, seed: int) -> Tensor:
        """Adversarial images [N, C, H, W] for images `x` in [0, 1] and labels `y` [N]."""
        eps = float(self.threat.eps)
        reach = self.beta * pixel_radius(self.threat, x.shape[1:].numel())
        fitting = Fitting()

        def start(x: Tensor, y: Tensor, job: Tensor) -> Rows:
            return {**at_rest(x, y, job), "variance": torch.zeros_like(x)}

        def update(rows: Rows, gradient: Tensor) -> Rows:
            x, point = rows["x"], rows["point"]
            momentum = gathered(rows["momentum"], gradient + rows["variance"], self.decay)
            ahead = point + eps / self.steps * steepest(momentum, self.threat.norm)
            variance = rows["variance"]
            if (rows["age"] < self.steps - 1).any():  # nothing reads it after the last step
                around = torch.zeros_like(gradient)
                for number in range(self.neighbours):
                    noise = content_noise(x, seed, "neighbours", rows["age"], number)
                    near = (point + reach * noise).clamp(0, 1)
                    (found,) = fitting(partial(_gradient, model), near, rows["y"])
                    around += found
                variance = around / self.neighbours - gradient
            point = project(ahead, x, self.threat)
            return {"point": point, "momentum": momentum, "variance": variance}

        return search(model, x, y, update, steps=self.steps, start=start, leave=self.leave)


def _gradient(model: nn.Module, point: Tensor, labels: Tensor) -> tuple[Tensor]:
    point = point.requires_grad_()
    with torch.enable_grad():
        loss = F.cross_entropy(model(point), labels, reduction="sum")
        return (gradient_of(loss, point),)
