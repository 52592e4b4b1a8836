"""Normalisations by name or by number: between pixels in [0, 1] and what a network or a file holds."""

from __future__ import annotations

import torch
from torch import Tensor

from guardbench.errors import GuardbenchError
from guardbench.models import IMAGENET_MEAN, IMAGENET_STD
from guardbench.protocol import unknown

Values = tuple[float, ...]

NORMALISATIONS: dict[str, tuple[Values, Values]] = {
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    # Each image's deviation, averaged; DC, DSA, DM and MTT divide by it, some for CIFAR-100 too.
    "cifar10-dc": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "mnist": ((0.1307,), (0.3081,)),
    "fashion-mnist": ((0.2861,), (0.3530,)),
    "half": ((0.5,), (0.5,)),
    "bytes": ((0.0,), (1 / 255,)),
    "none": ((0.0,), (1.0,)),
}
"""Mean and standard deviation a channel, of pixels in [0, 1]; one number stands for all channels.

`half` is [-1, 1], `bytes` 0 to 255.
"""


def read_normalisation(text: str, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, float32 [C, 1, 1] each, of a name or of `MEAN,.../STD,...`.

    Raises:
        GuardbenchError: an unknown name, no such numbers, or too few or too many for `channels`.
    """
    if text in NORMALISATIONS:
        mean, std = NORMALISATIONS[text]
    elif "/" in text:
        try:
            mean, std = (tuple(float(v) for v in part.split(",")) for part in text.split("/"))
        except ValueError:
            raise GuardbenchError(
                f"--normalisation {text}: write numbers as MEAN,MEAN,MEAN/STD,STD,STD."
            ) from None
    else:
        raise unknown("normalisation", text, [*NORMALISATIONS, "MEAN,.../STD,..."])
    for values in (mean, std):
        if len(values) not in (1, channels):
            raise GuardbenchError(
                f"--normalisation {text}: {len(values)} numbers for images of {channels} channels."
            )
    if not all(0 < value < float("inf") for value in std) or not all(abs(v) < 256 for v in mean):
        raise GuardbenchError(
            f"--normalisation {text}: numbers out of range; pixels are in [0, 1]."
        )
    spread = [
        torch.tensor(values).expand(channels).clone().view(-1, 1, 1) for values in (mean, std)
    ]
    return spread[0], spread[1]


def numbers_text(values: Tensor) -> str:
    """The values with four significant digits each, with commas between."""
    return ",".join(f"{value:.4g}" for value in values.flatten().tolist())
