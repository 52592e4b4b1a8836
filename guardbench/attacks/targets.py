"""The classes that targeted attacks aim at."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from guardbench.attacks.stream import rows_at_once
from guardbench.errors import GuardbenchError


def ranked_targets(model: nn.Module, x: Tensor, y: Tensor, most: int) -> Tensor:
    """The wrong classes that the model finds most likely on the clean image, likeliest first.

    Args:
        x: images [N, C, H, W] in [0, 1].
        y: labels [N].
        most: classes wanted; K - 1 where there are fewer.

    Returns:
        int64 [N, min(most, K - 1)].

    Raises:
        GuardbenchError: fewer than 4 classes, which the DLR loss needs.
    """
    with torch.no_grad():
        logits = torch.cat([model(some) for some in torch.split(x, rows_at_once(x))])
    require_classes(logits)
    others = logits.scatter(1, y[:, None], -torch.inf)
    return others.topk(min(most, logits.shape[1] - 1), 1).indices


def require_classes(logits: Tensor) -> None:
    """Refuses logits [N, K] of fewer than 4 classes."""
    if (classes := logits.shape[1]) < 4:
        raise GuardbenchError(
            f"AutoAttack standard needs at least 4 classes for its DLR loss, not {classes}; use pgd"
            " and square instead"
        )
