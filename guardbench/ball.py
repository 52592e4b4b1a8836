"""Geometry of the threat models: lengths, projections, steepest directions, random points."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from guardbench.canonical import derive_seed
from guardbench.errors import GuardbenchError
from guardbench.threat import Norm, ThreatModel


def require_norm(name: str, threat: ThreatModel, norms: Collection[Norm]) -> None:
    """Refuses a threat model whose norm the attack called `name` does not have."""
    if threat.norm not in norms:
        raise GuardbenchError(f"{name} attacks in {' and '.join(norms)}, not in {threat.norm}")


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """`values` [N] shaped [N, 1, 1, 1] so that it broadcasts over the images `like`."""
    return values.view(-1, *[1] * (like.ndim - 1))


def length(delta: Tensor, norm: Norm) -> Tensor:
    """The norm of every image of `delta` [N, ...] over all its pixels, in its dtype, [N]."""
    order = {"linf": torch.inf, "l2": 2.0, "l1": 1.0}[norm]
    size: Tensor = torch.linalg.vector_norm(delta.flatten(1), ord=order, dim=1)
    return size


def project(adv: Tensor, x: Tensor, threat: ThreatModel) -> Tensor:
    """The nearest images to `adv` inside the ball around `x` (l-inf or l2), clipped to [0, 1].

    Clipping after the l2 projection only moves a pixel towards `x`, so the image stays inside.
    """
    eps = float(threat.eps)
    if threat.norm == "linf":
        return torch.clamp(adv, x - eps, x + eps).clamp_(0, 1)
    delta = adv - x
    shrink = (eps / length(delta, "l2").clamp_min(1e-12)).clamp_max(1)
    return (x + delta * per_image(shrink, x)).clamp_(0, 1)


def pixel_radius(threat: ThreatModel, pixels: int) -> float:
    """How far every one of an image's `pixels` values may move where all move alike (l-inf or l2)."""
    return float(threat.eps) / (pixels**0.5 if threat.norm == "l2" else 1)


def steepest(gradient: Tensor, norm: Norm) -> Tensor:
    """The step of length 1 along which a linear function grows most: sign (l-inf) or g / |g| (l2).

    A zero gradient gives a zero step. A gradient is scaled by its largest entry before it is
    squared, since those of confident models are too small for the square to fit in float32.
    """
    if norm == "linf":
        return gradient.sign()
    gradient = (
        gradient.nan_to_num()
    )  # as l-inf has it: no step from a NaN, the longest from an infinity
    largest = length(gradient, "linf")
    scaled = gradient / per_image(torch.where(largest > 0, largest, 1), gradient)
    return scaled / per_image(length(scaled, "l2").clamp_min(1e-12), gradient)


def random_start(x: Tensor, threat: ThreatModel, seed: int, restart: int | Tensor = 0) -> Tensor:
    """A uniformly random point of the ball (l-inf or l2) around every image, clipped to [0, 1].

    The noise of an image is a function of `seed`, `restart` and the image's own bytes, and is
    drawn on the CPU: it does not depend on the device, on the batch or on the place in it. `restart`
    is one number, or one an image [N].
    """
    numbers = _an_image(restart, len(x))
    noise = [
        _noise(image, threat, seed, number)
        for image, number in zip(x.detach().cpu(), numbers, strict=True)
    ]
    return project(x + torch.stack(noise).to(x.device, x.dtype), x, threat)


def content_generator(image: Tensor, seed: int, *names: str | int) -> torch.Generator:
    """Random numbers, on the CPU, that are a function of `seed`, `names` and the image's own bytes.

    They depend neither on the device nor on the images that share a batch with this one.
    """
    key = hashlib.sha256(image.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
    return torch.Generator().manual_seed(derive_seed(seed, *names, key))


def content_noise(
    x: Tensor,
    seed: int,
    *names: str | int | Tensor,
    shape: Sequence[int] | None = None,
    normal: bool = False,
) -> Tensor:
    """Random numbers for every image by `content_generator`, [N, *shape], on the device of `x`.

    Args:
        x: clean images [N, C, H, W].
        names: the same for all images, or one an image, int64 [N].
        shape: of one image's numbers; that of the image unless told.
        normal: standard normal in place of uniform in -1 to 1.
    """
    wanted = x.shape[1:] if shape is None else shape
    drawn = []
    for image, *own in zip(x, *(_an_image(name, len(x)) for name in names), strict=True):
        generator = content_generator(image, seed, *own)
        one = torch.empty(*wanted)
        drawn.append(
            one.normal_(generator=generator) if normal else one.uniform_(-1, 1, generator=generator)
        )
    return torch.stack(drawn).to(x)


def _an_image(value: str | int | Tensor, count: int) -> list[Any]:
    return value.tolist() if isinstance(value, Tensor) else [value] * count


def _noise(image: Tensor, threat: ThreatModel, seed: int, restart: int) -> Tensor:
    generator = content_generator(image, seed, "start", restart)
    eps = float(threat.eps)
    if threat.norm == "linf":
        return torch.empty(image.shape).uniform_(-eps, eps, generator=generator)
    direction = torch.randn(image.shape, generator=generator)
    radius = eps * torch.rand((), generator=generator) ** (1 / image.numel())
    scaled: Tensor = direction * (radius / torch.linalg.vector_norm(direction))
    return scaled
