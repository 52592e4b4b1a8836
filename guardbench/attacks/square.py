"""Square: random search over squares, by the model's answers alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from guardbench.attacks.base import margin_of
from guardbench.attacks.reference import reference_square
from guardbench.attacks.stream import Fitting, Rows, rows_at_once, stream
from guardbench.ball import content_generator, per_image
from guardbench.errors import GuardbenchError
from guardbench.records import Engine
from guardbench.threat import ThreatModel

P_INIT = 0.8
HALVED_AT = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Share of the image that a square covers at first, and the queries after which it is halved."""
OF_LATE = 1 / 16
"""Weight of the latest query in the share that was kept."""


@dataclass(frozen=True, kw_only=True)
class Square:
    """Square Attack (Andriushchenko et al., ECCV 2020, arXiv:1912.00049, algorithms 1 and 2).

    In l-inf it starts at vertical stripes of plus and minus the radius; each query moves one random
    square of every channel to one end of the ball and keeps it if the margin loss falls. As in
    AutoAttack: p = 0.8, one restart, a schedule not rescaled to the number of queries. A proposal
    that changes no pixel is counted and not sent to the model, since its answer is known. A square may
    touch the lower and the right border, where pyautoattack's stops one pixel short of them.

    While few images are left, a batch holds the next proposals of each, as if those before them were
    refused, as nearly all are late in a search. Those behind the first that is kept are forgotten and
    made anew from it, so the search is the one that asks one at a time (unless the model's answers are
    random for a whole pass).

    Attributes:
        threat: the ball; l-inf, or l2 and l1 through the reference engine.
        queries: proposals an image, at most; those that are forgotten do not count.
        engine: `reference` runs pyautoattack's in l-inf too.
    """

    threat: ThreatModel
    queries: int = 5000
    engine: Engine = "guardbench"

    def __post_init__(self) -> None:
        if self.queries < 1:
            raise GuardbenchError(f"queries must be positive: {self}")

    @property
    def run_by(self) -> Engine:
        """Whose loops run: this package has l-inf."""
        return self.engine if self.threat.norm == "linf" else "reference"

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, *, seed: int) -> Tensor:
        """Adversarial images [N, C, H, W] for images `x` in [0, 1] and labels `y` [N].

        Raises:
            GuardbenchError: images whose height Square cannot tile in l2 or l1.
        """
        if not len(x):
            return x.clone()
        if self.run_by == "reference":
            return reference_square(model, x, y, self.threat, seed, queries=self.queries)
        return stream(_Search(self, seed), model, x, y)


class _Search:
    """See `Search`. `adv` is the best image so far, `draws` the random numbers of all queries, `step`
    the number of the next one, -1 before the stripes have been judged, and `kept` the share of proposals
    that were kept, of late."""

    def __init__(self, attack: Square, seed: int) -> None:
        self.attack, self.seed = attack, seed
        self.fitting = Fitting()

    @property
    def longest(self) -> int:
        return self.attack.queries + 1

    def begin(self, x: Tensor, y: Tensor, image: Tensor, job: Tensor) -> Rows:  # noqa: ARG002
        stripes, draws = [], []
        for clean in x:
            generator = content_generator(clean, self.seed, "square")
            shape = (x.shape[1], 1, x.shape[3])
            stripes.append(_signs(torch.rand(shape, generator=generator)))
            draws.append(torch.rand(self.attack.queries, 2 + x.shape[1], generator=generator))
        start = x + float(self.attack.threat.eps) * torch.stack(stripes).to(x)
        return {
            "x": x,
            "y": y,
            "adv": start.clamp_(0, 1),
            "margin": x.new_full((len(x),), torch.inf),
            "draws": torch.stack(draws).to(x),
            "step": torch.full((len(x),), -1, device=x.device),
            "kept": torch.ones(len(x), device=x.device),
        }

    def advance(self, model: nn.Module, rows: Rows) -> tuple[Tensor, Tensor]:
        count, width = len(rows["x"]), self._width(rows)
        row = torch.arange(count, device=rows["x"].device).repeat_interleave(width)
        ahead = torch.arange(width, device=row.device).repeat(count)

        def judge(row: Tensor, ahead: Tensor) -> tuple[Tensor, ...]:
            query, adv = rows["step"][row] + ahead, rows["adv"][row]
            first = query - ahead < 0
            proposal = torch.where(per_image(first, adv), adv, self._propose(rows, row, query))
            changed = (proposal != adv).flatten(1).any(1) & (query < self.attack.queries)
            changed = torch.where(first, ahead == 0, changed)
            wrong = torch.zeros_like(changed)
            margin = rows["margin"].new_full((len(row),), torch.inf)
            if changed.any():
                with torch.no_grad():
                    logits = model(proposal[changed])
                labels = rows["y"][row[changed]]
                wrong[changed] = logits.argmax(1) != labels
                # Of a model that answers in another dtype.
                margin[changed] = margin_of(logits, labels).to(margin.dtype)
            return proposal, wrong, margin

        proposal, wrong, margin = self.fitting(judge, row, ahead)
        better = ((margin < rows["margin"][row]) | wrong).view(count, width)
        kept = better.any(1)
        best = torch.arange(count, device=row.device) * width + better.int().argmax(1)
        # Out of place: the rows may share memory with others before their first change.
        rows["adv"] = torch.where(per_image(kept, rows["x"]), proposal[best], rows["adv"])
        rows["margin"] = torch.where(kept, margin[best], rows["margin"])
        refused = torch.where(rows["step"] < 0, 1, width)
        moved = torch.where(kept, ahead[best] + 1, refused)
        moved = moved.minimum(self.attack.queries - rows["step"])
        rows["step"], rows["age"] = rows["step"] + moved, rows["age"] + moved - 1
        rows["kept"] = rows["kept"] * (1 - OF_LATE) ** moved + OF_LATE * kept
        return kept & wrong[best], rows["step"] == self.attack.queries

    def _width(self, rows: Rows) -> int:
        """How many queries of each row to judge at once: the most progress for the time of a pass.

        That is a quarter of a full batch's, and what its rows add (a ResNet-18 at 64 px on two CPU cores).
        """
        count, full = len(rows["x"]), rows_at_once(rows["x"])
        room = min(full, self.fitting.most or full) // count
        refused = 1 - float(rows["kept"].mean())
        best, most = 1, 0.0
        width = 1
        while width <= room:
            progress = sum(refused**ahead for ahead in range(width)) / (full / 4 + count * width)
            best, most = (width, progress) if progress > most else (best, most)
            width *= 2
        return best

    def _propose(self, rows: Rows, row: Tensor, query: Tensor) -> Tensor:
        """The proposals [n, C, H, W] that the rows `row` make at the queries `query`, int64 [n]."""
        x, eps = rows["x"][row], float(self.attack.threat.eps)
        channels, high, wide = x.shape[1:]
        query = query.clamp(0, self.attack.queries - 1)
        draw, side = rows["draws"][row, query], square_side(query, high, wide)
        top = (draw[:, 0] * (high - side + 1)).long()
        left = (draw[:, 1] * (wide - side + 1)).long()
        down = torch.arange(high, device=x.device)
        right = torch.arange(wide, device=x.device)
        tall = (down >= top[:, None]) & (down < (top + side)[:, None])
        broad = (right >= left[:, None]) & (right < (left + side)[:, None])
        inside = tall[:, None, :, None] & broad[:, None, None, :]
        end = eps * _signs(draw[:, 2:]).to(x).view(-1, channels, 1, 1)
        return torch.where(inside, (x + end).clamp_(0, 1), rows["adv"][row])


def square_side(query: Tensor, high: int, wide: int) -> Tensor:
    """Side of the square in pixels at each query (int64 [n], from 0), at least 1."""
    halvings = torch.zeros_like(query)
    for at in HALVED_AT:
        halvings += query > at
    area = P_INIT / 2.0**halvings * high * wide
    return area.sqrt().round().long().clamp(1, min(high, wide))


def _signs(uniform: Tensor) -> Tensor:
    return torch.where(uniform < 0.5, -1.0, 1.0)
