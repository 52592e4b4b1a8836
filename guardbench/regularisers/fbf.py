"""FBF: adversarial training at the price of one step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from guardbench.ball import require_norm
from guardbench.regularisers.adversarial import AdversarialTraining
from guardbench.regularisers.base import Batch, require_positive
from guardbench.threat import ThreatModel


@dataclass(frozen=True, kw_only=True)
class Fast:
    """FBF: one step from a random start, longer than the radius and projected back.

    Wong et al., "Fast is better than free", ICLR 2020 (arXiv:2001.03994), algorithm 3.

    Attributes:
        threat: the protocol's; l-inf or l2.
        step: the step's length as a share of the radius.
    """

    threat: ThreatModel
    step: float = 1.25

    def __post_init__(self) -> None:
        require_norm("FBF", self.threat, ("linf", "l2"))
        require_positive(step=self.step)

    @property
    def cost(self) -> float:
        """See `Regulariser.cost`."""
        return 1 + 2 / 3

    def backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """See `Regulariser.backward`; the loss is that at the attacked images, the penalty 0."""
        return AdversarialTraining(threat=self.threat, steps=1, step=self.step).backward(batch)
