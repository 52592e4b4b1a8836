"""DeepFool: steps to the nearest boundary of the linearised network until one is crossed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from guardbench.attacks.stream import Rows, gradient_of, stream
from guardbench.attacks.targets import ranked_targets
from guardbench.ball import per_image, project, require_norm, steepest
from guardbench.errors import GuardbenchError
from guardbench.threat import ThreatModel

FURTHER = 1e-4
"""Added to every step's length, as in the authors' code: where clipping takes the overshoot away, the
search would else end just before the boundary."""


@dataclass(frozen=True, kw_only=True)
class DeepFool:
    """Moosavi-Dezfooli et al., CVPR 2016 (arXiv:1511.04599), algorithm 2; l-inf as in section 3.4.

    It looks for a small perturbation and knows no radius: the first misclassified iterate ends the
    search, and one beyond the ball is projected onto it and judged there. Iterates are clipped to
    [0, 1], which the paper leaves out.

    Attributes:
        threat: the ball; l-inf or l2.
        steps: linearisations at most.
        overshoot: share by which the summed steps are lengthened to pass the boundary.
        targets: the most likely wrong classes, among which the nearest boundary is looked for.
    """

    threat: ThreatModel
    steps: int = 50
    overshoot: float = 0.02
    targets: int = 9

    def __post_init__(self) -> None:
        require_norm("DeepFool", self.threat, ("linf", "l2"))
        if min(self.steps, self.targets) < 1 or self.overshoot < 0:
            raise GuardbenchError(
                f"steps and targets must be positive, overshoot not negative: {self}"
            )

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, *, seed: int) -> Tensor:  # noqa: ARG002
        """Adversarial images [N, C, H, W] for images `x` in [0, 1] and labels `y` [N].

        Raises:
            GuardbenchError: a model of fewer than 2 classes, or one that lets no gradient through.
        """
        if not len(x):
            return x.clone()
        return stream(_Search(self, ranked_targets(model, x, y, self.targets)), model, x, y)


class _Search:
    """See `Search`. `total` is the sum of the steps, without the overshoot."""

    def __init__(self, attack: DeepFool, ranked: Tensor) -> None:
        self.attack, self.ranked = attack, ranked

    @property
    def longest(self) -> int:
        return self.attack.steps + 1

    def begin(self, x: Tensor, y: Tensor, image: Tensor, job: Tensor) -> Rows:  # noqa: ARG002
        step = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        targets = self.ranked[image]
        return {
            "x": x,
            "y": y,
            "targets": targets,
            "adv": x,
            "total": torch.zeros_like(x),
            "step": step,
        }

    def advance(self, model: nn.Module, rows: Rows) -> tuple[Tensor, Tensor]:
        x, norm = rows["x"], self.attack.threat.norm
        point = rows["adv"].detach().requires_grad_()
        with torch.enable_grad():
            logits = model(point)
            picked = logits.gather(1, rows["targets"]) - logits.gather(1, rows["y"][:, None])
            gaps = picked.to(point.dtype)
        wrong = logits.detach().argmax(1) != rows["y"]
        # Not the clean image: if float noise alone makes it wrong here, it may be right elsewhere.
        wrong = wrong & (rows["step"] > 0)
        rows["adv"] = torch.where(
            per_image(wrong, x), project(rows["adv"], x, self.attack.threat), rows["adv"]
        )
        near = wrong.clone()
        if wrong.any():
            with torch.no_grad():
                near[wrong] = model(rows["adv"][wrong]).argmax(1) != rows["y"][wrong]
        over = (wrong & ~near) | (rows["step"] == self.attack.steps)
        nearest, along = x.new_full((len(x),), torch.inf), torch.zeros_like(x)
        for gap in gaps.unbind(1):
            gradient = gradient_of(gap, point, keep=True)
            direction = steepest(gradient, norm)
            slope = (gradient * direction).flatten(1).sum(1)  # |g|_1 or |g|_2
            size = gap.detach().abs() / slope
            closer = (slope > 0) & (size < nearest)
            nearest = torch.where(closer, size, nearest)
            along = torch.where(per_image(closer, x), direction, along)
        flat = nearest.isinf()  # no gradient leads to any boundary
        over = over | flat
        step = torch.where(flat, 0, nearest + FURTHER)
        rows["total"] = rows["total"] + per_image(step, x) * along
        after = (x + (1 + self.attack.overshoot) * rows["total"]).clamp_(0, 1)
        rows["adv"] = torch.where(per_image(wrong | over, x), rows["adv"], after)
        rows["step"] = rows["step"] + 1
        return near, over
