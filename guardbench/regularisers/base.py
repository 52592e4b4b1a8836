"""What a regulariser gets and gives, and the one that adds nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from guardbench.errors import GuardbenchError
from guardbench.protocol import parse_fraction, unknown
from guardbench.registry import REGULARISERS, resolve
from guardbench.threat import ThreatModel

Words = Mapping[str, str | float | int]
"""A recipe's `[regulariser]` table: `kind` and the parameters of that kind."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Real images on which a network is trained, and how its loss on them is taken.

    Attributes:
        model: in training mode; maps images in [0, 1] to logits.
        images: float32 [N, C, H, W] in [0, 1].
        labels: int64 [N].
        generator: of random choices, on the CPU, so that a resumed run repeats them.
        criterion: mean loss of logits [N, K] and labels [N].
        autocast: the precision of forward passes.
        part: where the batch of all processes is larger, how many images it has and which of them
            are these. Losses are then this part's share of the whole batch's mean, so that losses and
            gradients add up to it.
        total: the sum of a tensor over all processes.
        scale: factor of losses, and so of gradients, for float16: what a regulariser adds must be
            scaled once, like the loss.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    generator: torch.Generator = field(default_factory=torch.Generator)
    criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    part: tuple[int, slice] | None = None
    total: Callable[[Tensor], Tensor] = field(default=lambda value: value)
    scale: float = 1.0

    @property
    def count(self) -> int:
        """Images in the batch of all processes."""
        return len(self.images) if self.part is None else self.part[0]

    def shared(self, mean: Tensor) -> Tensor:
        """A mean over these images, as their share of the mean over the batch of all processes; scaled."""
        share = 1.0 if self.part is None else len(self.images) / self.part[0]
        factor = share * self.scale
        return mean if factor == 1 else mean * factor

    def drawn(self, draw: Callable[..., Tensor], *shape: int) -> Tensor:
        """Random numbers [N, *shape]: `draw` (`torch.rand`, `torch.randn`) for the whole batch, and of it
        those of these images, so that the split over processes changes none."""
        numbers = draw(self.count, *shape, generator=self.generator)
        return numbers if self.part is None else numbers[self.part[1]]

    def logits(self, images: Tensor) -> Tensor:
        """Logits [N, K] of other images in the place of this batch's, float32 at least."""
        with self.autocast():
            logits: Tensor = self.model(images)
        return logits if logits.dtype == torch.float64 else logits.float()

    def loss(self, images: Tensor) -> Tensor:
        """Mean loss of other images in the place of this batch's, under its labels; a scalar; scaled."""
        return self.loss_of(self.logits(images))

    def loss_of(self, logits: Tensor) -> Tensor:
        """Mean loss of logits [N, K] under this batch's labels; see `part` and `scale`."""
        return self.shared(self.criterion(logits, self.labels))


class Regulariser(Protocol):
    """Replaces the gradient of the plain loss by that of a loss that makes the network robust."""

    @property
    def cost(self) -> float:
        """Forward+backward passes that a step costs, in those of a plain step; for forecasts."""

    def backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Leaves the gradient of the regularised loss in the `.grad` of the model's parameters.

        `.grad` must hold nothing before.

        Returns:
            The loss and the weighted penalty, detached scalars, scaled as the gradients are; their sum,
            over all processes, is what is minimised.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Plain:
    """No regulariser: the loss alone."""

    @property
    def cost(self) -> float:
        """See `Regulariser.cost`."""
        return 1.0

    def backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """See `Regulariser.backward`; the penalty is 0."""
        loss = batch.loss(batch.images)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach(), torch.zeros_like(loss)


def build_regulariser(words: Words, threat: ThreatModel) -> Regulariser:
    """The regulariser that a recipe's `[regulariser]` table names.

    Args:
        words: `kind`, and the parameters of that kind; a number may be a fraction such as
            `"0.45/255"`.
        threat: the protocol's, for those that attack while they train.

    Raises:
        GuardbenchError: unknown kind, or a parameter is missing, unknown, no number or out of range.
    """
    kind = str(words.get("kind", "none"))
    wanted = resolve(REGULARISERS, "regulariser", kind)
    types = {part.name: part.type for part in fields(wanted)}
    own = [name for name in types if name != "threat"]
    for name in words:
        if name != "kind" and name not in own:
            raise unknown(f"parameter of regulariser {kind}", name, own)
    needed = [part.name for part in fields(wanted) if part.default is MISSING]
    missing = [name for name in needed if name in own and name not in words]
    if missing:
        raise GuardbenchError(
            f"regulariser {kind} needs {', '.join(map(repr, missing))}: say it in the recipe, or with "
            f"--set regulariser.{missing[0]}=..."
        )
    try:
        numbers: dict[str, Any] = {
            name: _number(value, whole=types.get(name) == "int")
            for name, value in words.items()
            if name != "kind"
        }
        if "threat" in types:
            numbers["threat"] = threat
        return cast(Regulariser, wanted(**numbers))
    except ValueError as error:
        raise GuardbenchError(f"regulariser {kind}: {error}.") from error


def _number(value: str | float | int, *, whole: bool) -> float | int:
    number = parse_fraction(value) if isinstance(value, str) else value
    if whole and int(number) != number:
        raise ValueError(f"{value} is not a whole number")
    return int(number) if whole else float(number)


def key_words(words: Words, threat: ThreatModel) -> dict[str, str | float | int]:
    """What of a regulariser shapes a network: its table, and the threat model if it attacks."""
    wanted = resolve(REGULARISERS, "regulariser", str(words.get("kind", "none")))
    attacks = "threat" in {part.name for part in fields(wanted)}
    return {**words, **({"threat": str(threat)} if attacks else {})}


def require_positive(**numbers: float) -> None:
    """Raises a ValueError that names the first number that is not above 0."""
    for name, number in numbers.items():
        if not number > 0:
            raise ValueError(f"{name} must be above 0, not {number}")
