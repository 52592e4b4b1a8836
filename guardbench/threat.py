"""What an attacker may do to an image."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

Norm = Literal["linf", "l2", "l1"]


@dataclass(frozen=True)
class ThreatModel:
    """All images within `eps` of the clean image in `norm`, inside [0, 1].

    Attributes:
        norm: `linf`, `l2` or `l1`, over all pixels and channels of one image.
        eps: the radius in [0, 1] pixel units, an exact fraction such as 1/255.
    """

    norm: Norm
    eps: Fraction

    def __post_init__(self) -> None:
        if self.norm not in get_args(Norm):
            raise ValueError(f"norm must be one of {', '.join(get_args(Norm))}, not {self.norm!r}")
        if self.eps <= 0:
            raise ValueError(f"eps must be positive, not {self.eps}")

    def __str__(self) -> str:
        return f"{self.norm} {self.eps}"
