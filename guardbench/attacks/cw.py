"""CW: the smallest l2 perturbation, without a bound on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from guardbench.attacks.search import State, search
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
        # Pixels at 0 and 1 would be at infinity; this moves them by 5e-7.
        start = torch.atanh((2 * x - 1) * (1 - 1e-6))
        state = (start, torch.zeros_like(x), torch.zeros_like(x))
        return search(
            model,
            x,
            y,
            state,
            steps=self.steps,
            update=self._adam,
            objective=self._objective,
            image=lambda w: (torch.tanh(w) + 1) / 2,
        )[0]

    def _objective(self, logits: Tensor, adv: Tensor, x: Tensor, y: Tensor) -> Tensor:
        own = logits.gather(1, y[:, None]).squeeze(1)
        other = logits.scatter(1, y[:, None], -torch.inf).amax(1)
        return (adv - x).square().sum() + self.c * (own - other).clamp_min(-self.kappa).sum()

    def _adam(self, state: State, gradient: Tensor, x: Tensor, step: int) -> State:  # noqa: ARG002
        w, first, second = state
        first = BETAS[0] * first + (1 - BETAS[0]) * gradient
        second = BETAS[1] * second + (1 - BETAS[1]) * gradient.square()
        mean = first / (1 - BETAS[0] ** (step + 1))
        spread = (second / (1 - BETAS[1] ** (step + 1))).sqrt()
        return w - self.lr * mean / (spread + TINY), first, second
