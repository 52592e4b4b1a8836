"""FAB-T: walks to the nearest point of a linearised decision boundary, again and again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from guardbench.attacks.reference import reference_part
from guardbench.attacks.stream import Rows, gradient_of, stream
from guardbench.attacks.targets import ranked_targets
from guardbench.ball import length, per_image
from guardbench.errors import GuardbenchError
from guardbench.records import Engine
from guardbench.threat import ThreatModel

ALPHA_MAX, ETA, BETA = 0.1, 1.05, 0.9
"""Largest pull towards the clean image, overshoot, and backward step (section 4 of the paper)."""


@dataclass(frozen=True, kw_only=True)
class FAB:
    """Targeted fast adaptive boundary attack (Croce & Hein, ICML 2020, arXiv:1907.02044).

    Algorithm 1 with one target a search: the boundary between the label and the target is linearised
    at the iterate; iterate and clean image are projected onto it inside [0, 1] (equation 3), mixed
    with a bias towards the clean image (equations 8 and 9), and a point that is misclassified is
    pulled back towards the clean image. The paper looks for the smallest perturbation; here an
    image leaves at the first one inside the radius, which is the same verdict.

    Attributes:
        threat: the ball; l-inf, or l2 and l1 through the reference engine.
        steps: iterations a search.
        targets: the most likely wrong classes, each its own search.
    """

    threat: ThreatModel
    steps: int = 100
    targets: int = 9

    def __post_init__(self) -> None:
        if min(self.steps, self.targets) < 1:
            raise GuardbenchError(f"steps and targets must be positive: {self}")

    @property
    def run_by(self) -> Engine:
        """Whose loops run: this package has l-inf."""
        return "guardbench" if self.threat.norm == "linf" else "reference"

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, *, seed: int) -> Tensor:
        """Adversarial images [N, C, H, W] for images `x` in [0, 1] and labels `y` [N].

        Raises:
            GuardbenchError: a model of fewer than 2 classes, or one that lets no gradient through.
        """
        if not len(x):
            return x.clone()
        if self.run_by == "reference":
            return reference_part(
                "fab-t", model, x, y, self.threat, seed, steps=self.steps, targets=self.targets
            )
        ranked = ranked_targets(model, x, y, self.targets)
        search = _Search(self, ranked)
        return stream(search, model, x, y, jobs=ranked.shape[1])


class _Search:
    """See `Search`. A row's `adv` is its iterate, judged at the beginning of the next `advance`."""

    def __init__(self, attack: FAB, targets: Tensor) -> None:
        self.attack, self.targets = attack, targets

    @property
    def longest(self) -> int:
        return self.attack.steps + 1

    def begin(self, x: Tensor, y: Tensor, image: Tensor, job: Tensor) -> Rows:
        step = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        target, crossed = self.targets[image, job], x.new_ones(len(x))
        return {"x": x, "y": y, "target": target, "adv": x, "step": step, "crossed": crossed}

    def advance(self, model: nn.Module, rows: Rows) -> tuple[Tensor, Tensor]:
        x, y, adv = rows["x"], rows["y"], rows["adv"]
        # One forward pass serves the check and the gradient of rows that have not crossed. Where
        # most have, it is cheaper to check without a graph. New rows hold 1, all others the same.
        shared = float(rows["crossed"].amin()) < SHARING_PAYS
        gap, gradient, wrong = _linearise(model, rows) if shared else (None, None, None)
        if wrong is None:
            with torch.no_grad():
                wrong = model(adv).argmax(1) != y
        # Not the clean image: if float noise alone makes it wrong here, it may be right elsewhere.
        wrong = wrong & (rows["step"] > 0)
        rows["crossed"] = wrong.float().mean().expand(len(x))
        hit = wrong & (length(adv - x, "linf") <= float(self.attack.threat.eps))
        over = rows["step"] == self.attack.steps
        back = wrong & ~hit & ~over
        stays = ~(hit | over)
        point = torch.where(per_image(back, x), x + BETA * (adv - x), adv)
        again = back if shared else stays
        if again.any():
            part = {k: v[again] for k, v in rows.items()} | {"adv": point[again]}
            gap_again, gradient_again, _ = _linearise(model, part)
            if gap is None or gradient is None:
                gap, gradient = x.new_zeros(len(x)), torch.zeros_like(x)
            gap[again], gradient[again] = gap_again, gradient_again
        if gap is not None and gradient is not None:
            after = _approach(x, point, gap, gradient)
            rows["adv"] = torch.where(per_image(stays, x), after, adv)
        rows["step"] = rows["step"] + 1
        return hit, over


SHARING_PAYS = 0.4
"""Share of rows across the boundary under which a shared forward pass costs less than a check of its
own: with a backward pass as dear as a forward one, 2 + 2 p against 3."""


def _linearise(model: nn.Module, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Logit of the target minus that of the label [n], its gradient, and who is misclassified."""
    point = rows["adv"].detach().requires_grad_()
    with torch.enable_grad():
        logits = model(point)
        picked = logits.gather(1, torch.stack([rows["target"], rows["y"]], 1))
        gap = (picked[:, 0] - picked[:, 1]).to(point.dtype)
    return gap.detach(), gradient_of(gap, point), logits.detach().argmax(1) != rows["y"]


def _approach(x: Tensor, point: Tensor, gap: Tensor, gradient: Tensor) -> Tensor:
    """The next iterate: projections of iterate and clean image, mixed and overshot (equation 9)."""
    normal = gradient.flatten(1)
    # The hyperplane is gap + normal (z - point) = 0.
    from_clean = gap + (normal * (x - point).flatten(1)).sum(1)
    moves = project_to_hyperplane(
        torch.cat([point, x]).flatten(1), torch.cat([normal, normal]), -torch.cat([gap, from_clean])
    )
    size = length(moves, "linf").clamp_min(1e-8)
    here, clean = moves.view(2, *x.shape)
    pull = (size[: len(x)] / (size[: len(x)] + size[len(x) :])).clamp_max(ALPHA_MAX)
    pull = per_image(pull, x)
    mixed: Tensor = (point + ETA * here) * (1 - pull) + (x + ETA * clean) * pull
    return mixed.clamp_(0, 1)


def project_to_hyperplane(points: Tensor, normals: Tensor, rise: Tensor) -> Tensor:
    """The smallest l-inf moves inside [0, 1] that raise `normal . point` by `rise`, [n, d].

    With every coordinate moved by at most t in its useful direction, the rise is a concave, increasing,
    piecewise linear function of t; Newton's method from below ends at its root after as many steps as
    slopes are met, where sorting all breakpoints costs more than a network's pass over the image.
    Where even the box's far corner does not suffice, the move ends there: the slope is 0 once every
    coordinate with a say has used its room.

    Args:
        points: in [0, 1], [n, d].
        normals: [n, d].
        rise: wanted, of either sign, [n].
    """
    toward = torch.sign(normals * rise.sign()[:, None])
    room = torch.where(toward > 0, 1 - points, points)
    weight, wanted = normals.abs(), rise.abs()
    step = wanted / weight.sum(1).clamp_min(torch.finfo(points.dtype).tiny)
    for _ in range(100):
        moved = torch.minimum(room, step[:, None])
        short = wanted - (weight * moved).sum(1)
        slope = (weight * (room > step[:, None])).sum(1)
        more = (short > 1e-6 * wanted) & (slope > 0)
        if not more.any():
            break
        step = torch.where(
            more, step + short / slope.clamp_min(torch.finfo(points.dtype).tiny), step
        )
    return toward * torch.minimum(room, step[:, None])
