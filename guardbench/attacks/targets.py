"""The classes that targeted attacks aim at."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from guardbench.attacks.stream import Fitting, rows_at_once
from guardbench.errors import GuardbenchError


def ranked_targets(model: nn.Module, x: Tensor, y: Tensor, most: int, *, least: int = 2) -> Tensor:
    """The wrong classes that the model finds most likely on the clean image, likeliest first.

    Args:
        x: images [N, C, H, W] in [0, 1].
        y: labels [N].
        most: classes wanted; K - 1 where there are fewer.
        least: classes K that the attack needs.

    Returns:
        int64 [N, min(most, K - 1)].

    Raises:
        GuardbenchError: fewer classes than `least`.
    """
    with torch.no_grad():
        (logits,) = Fitting(rows_at_once(x))(lambda some: (model(some),), x)
    require_classes(logits, least)
    others = logits.scatter(1, y[:, None], -torch.inf)
    return others.topk(min(most, logits.shape[1] - 1), 1).indices


def require_classes(logits: Tensor, least: int = 4) -> None:
    """Refuses logits [N, K] of fewer classes than an attack needs; the DLR loss needs 3, targeted 4."""
    if (classes := logits.shape[1]) < least:
        why = " for its DLR loss" if least > 2 else ""
        raise GuardbenchError(
            f"the attack needs at least {least} classes{why}, not {classes}; use pgd and square instead"
        )
