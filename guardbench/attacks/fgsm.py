"""FGSM: one step along the gradient, as long as the radius."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from guardbench.attacks.search import search
from guardbench.attacks.stream import Rows
from guardbench.ball import project, require_norm, steepest
from guardbench.threat import ThreatModel


@dataclass(frozen=True, kw_only=True)
class FGSM:
    """`x' = clip(x + eps * sign(grad CE))`; in l2 the step is `eps * grad / |grad|`.

    Goodfellow et al., "Explaining and harnessing adversarial examples", ICLR 2015
    (arXiv:1412.6572), section 4. An image that is already misclassified comes back unchanged.

    Attributes:
        threat: the ball; l-inf or l2.
    """

    threat: ThreatModel

    def __post_init__(self) -> None:
        require_norm("FGSM", self.threat, ("linf", "l2"))

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, *, seed: int) -> Tensor:  # noqa: ARG002
        """Adversarial images [N, C, H, W] for images `x` in [0, 1] and labels `y` [N]."""

        def update(rows: Rows, gradient: Tensor) -> Rows:
            ahead = rows["point"] + float(self.threat.eps) * steepest(gradient, self.threat.norm)
            return {"point": project(ahead, rows["x"], self.threat)}

        return search(model, x, y, update, steps=1)
