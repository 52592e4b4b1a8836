"""The search that the iterative attacks share: follow a gradient from a start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from guardbench.attacks.stream import Rows, gradient_of, stream

Start = Callable[[Tensor, Tensor, Tensor], Rows]
"""What an attack remembers of an image at first, from clean images [n, C, H, W], labels [n] and the
number of the search of its image [n]; `point` is what the gradient moves."""

Update = Callable[[Rows, Tensor], Rows]
"""What changes in a step: gets the rows still searched, `age` the steps that each has taken, and the
gradient of the summed objective in `point`; gives `point` and whatever else is new."""


def cross_entropy(logits: Tensor, rows: Rows) -> Tensor:
    """Cross-entropy summed over images, so that one image's gradient ignores the batch."""
    return F.cross_entropy(logits, rows["y"], reduction="sum")


def clean_start(x: Tensor, y: Tensor, job: Tensor) -> Rows:  # noqa: ARG001
    """A start at the clean image."""
    return {"point": x}


_STEADY: ContextVar[bool] = ContextVar("steady", default=True)


@contextmanager
def answering_at_random(really: bool = True) -> Iterator[None]:
    """Inside, searches judge their last iterate alone: the model answers one image in several ways.

    An earlier one that it got wrong once, at a small perturbation, is a lucky draw, and a search that
    ended there would make the model look robust. APGD, FAB and Square have searches of their own, which
    end at the first image that they get wrong as AutoAttack's do; for random models there is its `rand`.

    Args:
        really: False changes nothing.
    """
    token = _STEADY.set(not really)
    try:
        yield
    finally:
        _STEADY.reset(token)


def _same(point: Tensor) -> Tensor:
    return point


def search(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    update: Update,
    *,
    steps: int,
    start: Start = clean_start,
    objective: Callable[[Tensor, Rows], Tensor] = cross_entropy,
    image: Callable[[Tensor], Tensor] = _same,
    jobs: int = 1,
    leave: bool = True,
) -> Tensor:
    """Takes `steps` updates from `start`; every image leaves at its first misclassified iterate.

    The verdict is thus the worst over the whole path, start and last iterate included: never
    better for the model than reading the last iterate alone, if it answers one image in one way (see
    `answering_at_random`). The forward pass that gives the
    gradient also gives the verdict, and `stream` puts another image in the place of a broken one.

    Args:
        model: maps images to logits [n, K].
        x: clean images [N, C, H, W].
        y: labels [N].
        update: makes a step.
        steps: updates of an image that is never broken; each costs one forward and backward
            pass, the last iterate one forward pass more.
        start: where it begins.
        objective: the scalar to differentiate, from logits and rows, whose `adv` is the iterate.
        image: makes images from `point`.
        jobs: searches an image, of which the first that breaks it ends the others.
        leave: False for images that are to fool another model: all take all steps.

    Returns:
        Images [N, C, H, W] where each search ended.

    Raises:
        GuardbenchError: no gradient reaches the image.
    """
    found = _Search(start, update, steps, objective, image, leave, _STEADY.get())
    return stream(found, model, x, y, jobs=jobs, ends=True)


@dataclass(frozen=True)
class _Search:
    """See `stream.Search`, and `search` for the attributes."""

    start: Start
    update: Update
    steps: int
    objective: Callable[[Tensor, Rows], Tensor]
    image: Callable[[Tensor], Tensor]
    leave: bool
    steady: bool

    @property
    def longest(self) -> int:
        return self.steps + 1

    def begin(self, x: Tensor, y: Tensor, image: Tensor, job: Tensor) -> Rows:  # noqa: ARG002
        return {"x": x, "y": y, "adv": x, **self.start(x, y, job)}

    def advance(self, model: nn.Module, rows: Rows) -> tuple[Tensor, Tensor]:
        over = rows["age"] == self.steps
        if over.all():
            with torch.no_grad():
                rows["adv"] = self.image(rows["point"])
                wrong = model(rows["adv"]).argmax(1) != rows["y"]
            return wrong if self.leave else over, over
        point = rows["point"].detach().requires_grad_()
        with torch.enable_grad():
            adv = self.image(point)
            logits: Tensor = model(adv)
            value = self.objective(logits, rows | {"adv": adv})
        gradient, rows["adv"] = gradient_of(value, point), adv.detach()
        wrong = logits.detach().argmax(1) != rows["y"]
        hit = (wrong if self.steady else wrong & over) if self.leave else over
        on = ~(hit | over)
        with torch.no_grad():
            if on.all():
                rows |= self.update(rows, gradient)
            elif on.any():
                part = {name: value[on] for name, value in rows.items()}
                for name, value in self.update(part, gradient[on]).items():
                    rows[name] = rows[name].index_put((on,), value)
        return hit, over
