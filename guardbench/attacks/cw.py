"""CW: the smallest l2 perturbation, without a bound on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from guardbench.attacks.search import search
from guardbench.attacks.stream import Rows
from guardbench.ball import per_image
from guardbench.errors import GuardbenchError

BETAS, TINY = (0.9, 0.999), 1e-8
"""Adam's defaults (Kingma & Ba, ICLR 2015), as in the attack's usual implementations."""


@dataclass(frozen=True, kw_only=True)
class CW:
    """Minimises `|x' - x|_2^2 + c * f(x')` over `w`, `x' = (tanh(w) + 1) / 2`, with Adam.

    Carlini & Wagner, "Towards evaluating the robustness of neural networks", S&P 2017
    (arXiv:1608.04644), section V (f6, `f = max(z_y - max_{i != y} z_i, -kappa)`, and the change
    of variables), in the form with one constant `c`, without the search over it, that the tables of
    GUARD use.

    Only the verdict is wanted here, so an image leaves at its first misclassified iterate (see
    `search`), which gives the verdict of the whole run; its distance is that of this first
    adversarial image, not of the smallest one that more steps would find. Until then f is
    positive, so `kappa` changes no verdict. The iterate after the last step is judged too.

    Attributes:
        threat: always None: the perturbation is unbounded, so the verdict depends on the
            number of steps, and the worst case over attacks leaves it out.
        c: weight of misclassification against distance.
        steps: steps of Adam.
        lr: Adam's learning rate, in tanh space.
        kappa: confidence wanted, as a difference of logits.
    """

    threat: None = None
    c: float = 1e-4
    steps: int = 50
    lr: float = 0.01
    kappa: float = 0.0

    def __post_init__(self) -> None:
        if self.threat is not None:
            raise GuardbenchError("CW is unbounded: it takes no threat model")
        if self.steps < 1 or self.lr <= 0 or self.c <= 0 or self.kappa < 0:
            raise GuardbenchError(f"steps, lr and c must be positive, kappa not negative: {self}")

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, *, seed: int) -> Tensor:  # noqa: ARG002
        """Adversarial images [N, C, H, W] for images `x` in [0, 1] and labels `y` [N]."""
        return search(
            model,
            x,
            y,
            self._adam,
            steps=self.steps,
            start=_tanh_space,
            objective=self._objective,
            image=lambda w: (torch.tanh(w) + 1) / 2,
        )

    def _objective(self, logits: Tensor, rows: Rows) -> Tensor:
        label = rows["y"][:, None]
        own = logits.gather(1, label).squeeze(1)
        other = logits.scatter(1, label, -torch.inf).amax(1)
        size = (rows["adv"] - rows["x"]).square().sum()
        return size + self.c * (own - other).clamp_min(-self.kappa).sum()

    def _adam(self, rows: Rows, gradient: Tensor) -> Rows:
        w, taken = rows["point"], per_image(rows["age"] + 1, gradient).to(gradient)
        first = BETAS[0] * rows["first"] + (1 - BETAS[0]) * gradient
        second = BETAS[1] * rows["second"] + (1 - BETAS[1]) * gradient.square()
        mean = first / (1 - BETAS[0] ** taken)
        spread = (second / (1 - BETAS[1] ** taken)).sqrt()
        return {"point": w - self.lr * mean / (spread + TINY), "first": first, "second": second}


def _tanh_space(x: Tensor, y: Tensor, job: Tensor) -> Rows:  # noqa: ARG001
    # Pixels at 0 and 1 would be at infinity; this moves them by 5e-7.
    w = torch.atanh((2 * x - 1) * (1 - 1e-6))
    return {"point": w, "first": torch.zeros_like(x), "second": torch.zeros_like(x)}
