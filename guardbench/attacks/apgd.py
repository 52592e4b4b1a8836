"""APGD: projected gradient ascent that sets its own step, on cross-entropy or a DLR loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from guardbench.attacks.base import margin_of
from guardbench.attacks.reference import reference_part
from guardbench.attacks.stream import Rows, gradient_of, stream
from guardbench.attacks.targets import ranked_targets, require_classes
from guardbench.ball import per_image, project, random_start, steepest
from guardbench.errors import GuardbenchError
from guardbench.records import Engine
from guardbench.threat import ThreatModel

RHO, MOMENTUM = 0.75, 0.75
"""Share of rising steps under which the step is halved, and alpha of the paper's equation 1."""


@dataclass(frozen=True, kw_only=True)
class APGD:
    """Auto-PGD (Croce & Hein, ICML 2020, arXiv:2003.01690, section 3 and algorithm 1).

    Starts at a random point of the ball (of its surface in pyautoattack) with a step of twice the
    radius. At checkpoints (equation 2) the step is halved, and the search goes back to its best
    point, when at most three quarters of the steps since the last checkpoint raised the loss (the
    authors' code; the paper has "fewer than"), or when neither step nor best loss have changed
    (section 3.1, conditions 1 and 2).

    Attributes:
        threat: the ball; l-inf or l2, or l1 through the reference engine.
        loss: `ce`, `dlr` (section 4.1, equation 6), or `dlr-targeted` (section 4.2, equation 7), one
            search a target.
        steps: iterations a search.
        targets: the most likely wrong classes, each its own search (`dlr-targeted` alone).
    """

    threat: ThreatModel
    loss: Literal["ce", "dlr", "dlr-targeted"] = "ce"
    steps: int = 100
    targets: int = 9

    def __post_init__(self) -> None:
        if min(self.steps, self.targets) < 1:
            raise GuardbenchError(f"steps and targets must be positive: {self}")
        if self.threat.norm == "l1" and self.steps < 3:
            raise GuardbenchError(f"in l1 the schedule needs 3 steps: {self}")

    @property
    def run_by(self) -> Engine:
        """Whose loops run: this package has l-inf and l2."""
        return "reference" if self.threat.norm == "l1" else "guardbench"

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, *, seed: int) -> Tensor:
        """Adversarial images [N, C, H, W] for images `x` in [0, 1] and labels `y` [N].

        Raises:
            GuardbenchError: a DLR loss on a model of too few classes (4 targeted, else 3), or a model
                that lets no gradient through.
        """
        if not len(x):
            return x.clone()
        with torch.no_grad():
            require_classes(model(x[:1]), {"ce": 2, "dlr": 3, "dlr-targeted": 4}[self.loss])
        if self.run_by == "reference":
            part = {"ce": "apgd-ce", "dlr": "apgd-dlr", "dlr-targeted": "apgd-t"}[self.loss]
            return reference_part(
                part, model, x, y, self.threat, seed, steps=self.steps, targets=self.targets
            )
        ranked = None
        if self.loss == "dlr-targeted":
            ranked = ranked_targets(model, x, y, self.targets, least=4)
        jobs = 1 if ranked is None else ranked.shape[1]
        search = _Search(self, ranked, seed)
        return stream(search, model, x, y, jobs=jobs)


class _Search:
    """See `Search`. A row's `step` counts the iterates judged so far."""

    def __init__(self, attack: APGD, targets: Tensor | None, seed: int) -> None:
        self.attack, self.targets, self.seed = attack, targets, seed
        self.windows = _windows(attack.steps)

    @property
    def longest(self) -> int:
        return self.attack.steps + 1

    def begin(self, x: Tensor, y: Tensor, image: Tensor, job: Tensor) -> Rows:
        starts, count = random_start(x, self.attack.threat, self.seed, job), len(x)
        rows = {
            "x": x,
            "y": y,
            "adv": starts,
            "old": starts,
            "best": starts,
            "best_gradient": torch.zeros_like(x),
            "best_loss": x.new_full((count,), -torch.inf),
            "last_loss": x.new_full((count,), torch.inf),
            "checked_loss": x.new_full((count,), -torch.inf),
            "size": x.new_full((count,), 2 * float(self.attack.threat.eps)),
            "rises": x.new_zeros(count),
            "reduced": torch.ones(count, dtype=torch.bool, device=x.device),
            "step": torch.zeros(count, dtype=torch.int64, device=x.device),
        }
        if self.targets is not None:
            rows["target"] = self.targets[image, job]
        return rows

    def advance(self, model: nn.Module, rows: Rows) -> tuple[Tensor, Tensor]:
        adv = rows["adv"].detach().requires_grad_()
        with torch.enable_grad():
            logits = model(adv)
            loss = self._loss(logits, rows)
        gradient, loss = gradient_of(loss, adv), loss.detach()
        hit = logits.detach().argmax(1) != rows["y"]
        over = rows["step"] == self.attack.steps
        with torch.no_grad():
            self._remember(rows, loss, gradient)
            point, gradient = self._check(rows, rows["adv"], gradient)
            after = self._move(rows, point, gradient)
        # Rows that leave keep `adv` as the image that was judged.
        stays = per_image(~(hit | over), after)
        rows["adv"], rows["old"] = torch.where(stays, after, rows["adv"]), point
        rows["step"] = rows["step"] + 1
        return hit, over

    def _loss(self, logits: Tensor, rows: Rows) -> Tensor:
        if self.attack.loss == "ce":
            return F.cross_entropy(logits, rows["y"], reduction="none")
        if self.attack.loss == "dlr":
            top = logits.topk(3, 1).values
            return -margin_of(logits, rows["y"]) / (top[:, 0] - top[:, 2] + 1e-12)
        own = logits.gather(1, rows["y"][:, None]).squeeze(1)
        wanted = logits.gather(1, rows["target"][:, None]).squeeze(1)
        top = logits.topk(4, 1).values
        return (wanted - own) / (top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + 1e-12)

    def _remember(self, rows: Rows, loss: Tensor, gradient: Tensor) -> None:
        better = loss > rows["best_loss"]
        wide = per_image(better, gradient)
        rows["best"] = torch.where(wide, rows["adv"], rows["best"])
        rows["best_gradient"] = torch.where(wide, gradient, rows["best_gradient"])
        rows["best_loss"] = torch.where(better, loss, rows["best_loss"])
        rows["rises"] = rows["rises"] + (loss > rows["last_loss"])
        rows["last_loss"] = loss

    def _check(self, rows: Rows, point: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Where the next step starts and along which gradient, after the checkpoint's conditions."""
        window = self.windows.to(point.device)[rows["step"]]
        due = window > 0
        if not due.any():
            return point, gradient
        stuck = ~rows["reduced"] & (rows["checked_loss"] >= rows["best_loss"])
        halve = due & ((rows["rises"] <= RHO * window) | stuck)
        rows["size"] = torch.where(halve, rows["size"] / 2, rows["size"])
        rows["reduced"] = torch.where(due, halve, rows["reduced"])
        rows["checked_loss"] = torch.where(due, rows["best_loss"], rows["checked_loss"])
        rows["rises"] = torch.where(due, 0, rows["rises"])
        wide = per_image(halve, point)
        return (
            torch.where(wide, rows["best"], point),
            torch.where(wide, rows["best_gradient"], gradient),
        )

    def _move(self, rows: Rows, point: Tensor, gradient: Tensor) -> Tensor:
        x, threat = rows["x"], self.attack.threat
        reach = point + per_image(rows["size"], x) * steepest(gradient, threat.norm)
        ahead = project(reach, x, threat)
        share = per_image(torch.where(rows["step"] == 0, 1.0, MOMENTUM), x)
        moved = point + share * (ahead - point) + (1 - share) * (point - rows["old"])
        return project(moved, x, threat)


def _windows(steps: int) -> Tensor:
    """By iterate: at a checkpoint the steps since the last one, elsewhere 0; float [steps + 1].

    The first window is 22% of the steps, each later one 3% shorter, none under 6% (equation 2).
    """
    table = torch.zeros(steps + 1)
    window, least, less = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    at = window
    while at <= steps:
        table[at] = window
        window = max(window - less, least)
        at += window
    return table
