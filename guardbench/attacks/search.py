"""The loop that the iterative attacks share: follow a gradient, let broken images leave."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from guardbench.attacks.stream import Fitting, Teller, gradient_of

State = tuple[Tensor, ...]
"""Per-image tensors [n, ...]: first what the gradient moves, then what the attack remembers."""


class Update(Protocol):
    """One step of an attack: the next state of the images still searched."""

    def __call__(self, state: State, gradient: Tensor, x: Tensor, step: int) -> State:
        """Gives the next state.

        Args:
            state: as the last update left it; `state[0]` is where the gradient was taken.
            gradient: of the summed objective in `state[0]`, same shape.
            x: clean images of the same rows.
            step: 0 for the first update.
        """


def cross_entropy(logits: Tensor, adv: Tensor, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG001
    """Cross-entropy summed over images, so that one image's gradient ignores the batch."""
    return F.cross_entropy(logits, y, reduction="sum")


def _same(variable: Tensor) -> Tensor:
    return variable


def search(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    start: State,
    *,
    steps: int,
    update: Update,
    objective: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = cross_entropy,
    image: Callable[[Tensor], Tensor] = _same,
    leave: bool = True,
) -> tuple[Tensor, Tensor]:
    """Takes `steps` updates from `start`; every image leaves at its first misclassified iterate.

    The verdict is thus the worst over the whole path, start and last iterate included: never
    better for the model than reading the last iterate alone, and the batch shrinks with every
    broken image. The forward pass that gives the gradient also gives the verdict.

    Args:
        model: maps images to logits [n, K].
        x: clean images [N, C, H, W].
        y: labels [N].
        start: the first state, rows as in `x`.
        steps: updates of an image that is never broken; each costs one forward and backward
            pass, the last iterate one forward pass more.
        update: makes the next state.
        objective: the scalar to differentiate, from logits, iterate, clean images and labels.
        image: makes images from `state[0]`.
        leave: False for images that are to fool another model: all take all steps.

    Returns:
        Images [N, C, H, W] where each search ended, and whether that image is misclassified [N].

    Raises:
        GuardbenchError: no gradient reaches the image.
    """
    found, fooled = x.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
    live = torch.arange(len(x), device=x.device)
    state, teller, fitting = start, Teller(), Fitting()
    for step in range(steps + 1 if len(x) else 0):
        if step < steps:
            part = partial(_differentiate, model, objective, image)
            adv, logits, gradient = fitting(part, x, y, state[0])
        else:
            with torch.no_grad():
                adv = image(state[0])
                (logits,) = fitting(lambda part: (model(part),), adv)
        broken = logits.argmax(1) != y
        if step == steps:
            found[live], fooled[live] = adv, broken
            break
        if leave and broken.any():
            found[live[broken]], fooled[live[broken]] = adv[broken], True
            kept = ~broken
            if not kept.any():
                break
            live, x, y, gradient = live[kept], x[kept], y[kept], gradient[kept]
            state = tuple(part[kept] for part in state)
        with torch.no_grad():
            state = update(state, gradient, x, step)
        if teller.due():
            teller.tell((step + 1) / (steps + 1), len(live))
    return found, fooled


def _differentiate(
    model: nn.Module,
    objective: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    image: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    variable: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Iterate, logits, and gradient of the objective in `variable`, from one forward pass."""
    variable = variable.detach().requires_grad_()
    with torch.enable_grad():
        adv = image(variable)
        logits: Tensor = model(adv)
        value = objective(logits, adv, x, y)
    gradient = gradient_of(value, variable)
    return adv.detach(), logits.detach(), gradient
