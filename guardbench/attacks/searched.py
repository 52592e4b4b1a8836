"""What attacks search in place of a network: a faster copy. The verdicts are never its own.

`torch.compile` is not among its means: on a CPU (2 threads of an AMD EPYC, torch 2.15, a 64 px ResNet-18 in
batches of 128) it gave 0.92 of the forward and 0.81 of the gradient images a second of the folded network,
after 38 s. What it would gain on a GPU is not known; `benchmarks/autoattack.py --shares` measures it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from copy import deepcopy
from typing import Literal

import torch
from torch import Tensor, nn

from guardbench.attacks.base import rounding
from guardbench.models import DenseConv2d, folded

logger = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16"]
NEAR = 0.1
"""Largest difference between the copy's logits and the network's, as a share of the largest logit.
Rounding in bf16 moves logits by a few percent; attacks on a copy further off would miss too much."""

SLACK = 0.01
"""See `run_batch`: how far rounding alone moves the copy's logits from one batch size to another."""


def search_model(
    model: nn.Module, images: Tensor, precision: Precision
) -> tuple[nn.Module, Precision]:
    """What attacks search in place of `model`, and its precision: float32 where bf16 is of no use.

    Args:
        model, images: see `searchable`.
        precision: wanted; official searches are `fp32`.
    """
    fast = searchable(model, images)
    half = in_bf16(fast, images) if precision == "bf16" else None
    return (fast, "fp32") if half is None else (half, "bf16")


def searchable(model: nn.Module, images: Tensor) -> nn.Module:
    """A faster form of `model` for attacks to search, or `model` itself where there is none.

    Args:
        model: anybody's, in eval mode.
        images: a few real ones [n, C, H, W], on which the two are compared.
    """
    with torch.no_grad():
        wanted = model(images)
        try:
            found = (fast := folded(model, images))(images)
        # Broad on purpose: folding knows our networks, and whatever it meets in others, they stay whole.
        except Exception as error:  # noqa: BLE001
            logger.info("not folded: %s", error)
            return model
    noise = rounding(wanted).max()
    same = found.shape == wanted.shape and bool(torch.isclose(found, wanted, 0, float(noise)).all())
    return fast if same else model


class _Float32(nn.Module):
    """A layer that autocast leaves alone."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            answer: Tensor = self.layer(x.float())
        return answer


class _Autocast(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16):
            answer: Tensor = self.model(images).float()
        return answer


def in_bf16(model: nn.Module, images: Tensor) -> nn.Module | None:
    """A frozen copy of `model` whose inner layers are bf16, or None where that is of no use.

    The first layer stays float32: bf16 has 8 bits, so that rounding pixels k/255 + eps to it erases
    steps of 1/255. So does the last one: attacks compare logits that differ by little.

    Args:
        model: in eval mode, float32.
        images: a few real ones [n, C, H, W] in [0, 1], on which the two are compared.

    Returns:
        A model from float32 images to float32 logits; None for one of fewer than three layers, one that
        autocast cannot run, or whose copy answers something else.
    """
    with torch.no_grad():
        wanted = model(images)
        try:
            copy = deepcopy(model)
            layers = _layers_in_order(copy, images[:1])
            if len(layers) < 3:
                return None
            for name in layers[1:-1]:
                copy.get_submodule(name).to(torch.bfloat16)
            for name in (layers[0], layers[-1]):
                copy.set_submodule(name, _Float32(copy.get_submodule(name)))
            half = _Autocast(copy).eval().requires_grad_(False)
            off = (half(images) - wanted).abs().max()
        # Broad on purpose: a stranger's model may do anything in another precision; it stays float32.
        except Exception as error:  # noqa: BLE001
            logger.info("not in bf16: %s", error)
            return None
    return half if bool(off <= NEAR * wanted.abs().max()) else None


def _layers_in_order(model: nn.Module, image: Tensor) -> list[str]:
    """Names of the convolutions and linear layers, in the order in which an image meets them."""
    met: dict[str, None] = {}

    def note(name: str) -> Callable[[nn.Module, object], None]:
        return lambda *_: met.update({name: None})

    hooks = [
        module.register_forward_pre_hook(note(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear | DenseConv2d)
    ]
    model(image)
    for hook in hooks:
        hook.remove()
    return [*met]
