"""What an attacker may do to an image."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

Norm = Literal["linf", "l2", "l1"]

FLOAT32_ULP = 2.0**-23
"""Spacing of float32 numbers just above 1: what a pixel in [0, 1] cannot resolve."""


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


def tolerance(threat: ThreatModel, pixels: int) -> float:
    """By how much float32 arithmetic alone can put an image of `pixels` values outside the ball.

    Two float32 steps a pixel; where lengths are sums (l2, l1), also 1e-5 of the radius, for
    the sums that an attack took in float32.
    """
    step = 2 * FLOAT32_ULP
    if threat.norm == "linf":
        return step
    return 1e-5 * float(threat.eps) + step * (pixels**0.5 if threat.norm == "l2" else pixels)
