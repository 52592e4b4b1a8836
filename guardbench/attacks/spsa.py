"""SPSA: gradients estimated from the model's answers alone, followed by Adam."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from guardbench.attacks.base import margin_of
from guardbench.attacks.stream import Fitting, Rows, rows_at_once, stream
from guardbench.ball import content_noise, pixel_radius, project, require_norm
from guardbench.errors import GuardbenchError
from guardbench.threat import ThreatModel

BETAS, TINY = (0.9, 0.999), 1e-8
"""Adam's defaults (Kingma & Ba, ICLR 2015)."""


@dataclass(frozen=True, kw_only=True)
class SPSA:
    """Uesato et al., ICML 2018 (arXiv:1802.05666), section 4: the margin loss, without gradients.

    Each step asks the model `2 * samples` times: `g = mean((f(x + delta v) - f(x - delta v)) / (2 delta) v)`
    over random signs `v`, with `f` the margin of the label; Adam descends it and the iterate is
    projected onto the ball. Costs `2 * samples * steps` answers an image that survives. Unlike the
    paper's, probes are clipped to [0, 1]: a model may refuse what is no image.

    Attributes:
        threat: the ball; l-inf or l2.
        steps: steps of Adam.
        samples: random directions a step.
        delta: length of a probe in every pixel, in units of `ball.pixel_radius`.
        lr: Adam's learning rate, in the same units. The paper has 0.01 for both at l-inf 8/255, which is
            0.32 of them.
    """

    threat: ThreatModel
    steps: int = 100
    samples: int = 128
    delta: float = 0.32
    lr: float = 0.32

    def __post_init__(self) -> None:
        require_norm("SPSA", self.threat, ("linf", "l2"))
        if min(self.steps, self.samples) < 1 or self.delta <= 0 or self.lr <= 0:
            raise GuardbenchError(f"steps, samples, delta and lr must be positive: {self}")

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, *, seed: int) -> Tensor:
        """Adversarial images [N, C, H, W] for images `x` in [0, 1] and labels `y` [N]."""
        if not len(x):
            return x.clone()
        return stream(_Search(self, seed, x), model, x, y)


class _Search:
    """See `Search`. A row's `step` counts the iterates judged so far."""

    def __init__(self, attack: SPSA, seed: int, x: Tensor) -> None:
        self.attack, self.seed, self.fitting = attack, seed, Fitting(rows_at_once(x))
        self.radius = pixel_radius(attack.threat, x.shape[1:].numel())

    @property
    def longest(self) -> int:
        return self.attack.steps + 1

    def begin(self, x: Tensor, y: Tensor, image: Tensor, job: Tensor) -> Rows:  # noqa: ARG002
        step = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        nothing = torch.zeros_like(x)
        return {"x": x, "y": y, "adv": x, "mean": nothing, "square": nothing, "step": step}

    def advance(self, model: nn.Module, rows: Rows) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            hit = model(rows["adv"]).argmax(1) != rows["y"]
            over = rows["step"] == self.attack.steps
            places = (~(hit | over)).nonzero().squeeze(1).tolist()
            after = {key: rows[key].clone() for key in ("adv", "mean", "square")}
            for place in places:
                one = {key: value[place : place + 1] for key, value in rows.items()}
                for key, value in self._stepped(model, one).items():
                    after[key][place] = value[0]
        rows.update(after)
        rows["step"] = rows["step"] + 1
        return hit, over

    def _stepped(self, model: nn.Module, one: Rows) -> Rows:
        """One step of Adam of one image."""
        attack, step = self.attack, int(one["step"])
        shape = (attack.samples, *one["adv"].shape[1:])
        noise = content_noise(one["x"], self.seed, "probes", step, shape=shape)[0]
        signs = torch.where(noise < 0, -1.0, 1.0).to(noise)
        delta, lr = attack.delta * self.radius, attack.lr * self.radius
        probes = (one["adv"] + delta * torch.cat([signs, -signs])).clamp(0, 1)
        labels = one["y"].expand(len(probes))
        (margins,) = self.fitting(
            lambda some, truth: (margin_of(model(some), truth).to(some),), probes, labels
        )
        rise = (margins[: attack.samples] - margins[attack.samples :]) / (2 * delta)
        slope = (rise.view(-1, 1, 1, 1) * signs).mean(0, keepdim=True)
        mean = BETAS[0] * one["mean"] + (1 - BETAS[0]) * slope
        square = BETAS[1] * one["square"] + (1 - BETAS[1]) * slope.square()
        unbiased = mean / (1 - BETAS[0] ** (step + 1))
        spread = (square / (1 - BETAS[1] ** (step + 1))).sqrt()
        adv = project(one["adv"] - lr * unbiased / (spread + TINY), one["x"], attack.threat)
        return {"adv": adv, "mean": mean, "square": square}
