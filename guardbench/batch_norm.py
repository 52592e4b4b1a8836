"""Batch statistics over the batch of all processes, as one process with the whole batch would have them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from guardbench.models import batch_norms
from guardbench.processes import Processes


@contextmanager
def synchronised(model: nn.Module, processes: Processes) -> Iterator[None]:
    """Inside, BN layers of `model` in training mode normalise by the statistics of all processes' rows.

    Every process must make the same forward and backward passes. Written in operations that can be
    differentiated twice, which torch.nn.SyncBatchNorm, for GPUs alone, cannot: the double-backward
    form of curvature needs it.
    """
    layers = batch_norms(model) if processes.count > 1 else []
    for layer in layers:
        layer.forward = partial(_forward, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own is found again


def _forward(layer: nn.BatchNorm2d, x: Tensor) -> Tensor:
    if not layer.training:
        return nn.BatchNorm2d.forward(layer, x)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean, variance, count = _statistics(wide)
    _move_running(layer, mean.detach(), (variance.detach() * count / (count - 1)).to(mean.dtype))
    scale = (variance + layer.eps).rsqrt() * layer.weight
    shift = layer.bias - mean * scale
    n, c, h, w = x.shape
    # Rows of channels, as they lie in memory: a sixth of the time of a broadcast over [c, 1, 1].
    moved = wide.permute(0, 2, 3, 1).reshape(-1, c) * scale + shift
    return moved.view(n, h, w, c).permute(0, 3, 1, 2).to(x.dtype)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance [C] of x [n, C, H, W] over all processes, and of how many values."""
    rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    # Plain means are several times faster than var_mean; what is added up between processes is float64.
    means = torch.cat([rows.mean(0), rows.square().mean(0), rows.new_ones(1)])
    sums = means.double() * len(rows)
    sums = _Sum.apply(sums)
    count = sums[-1].detach()  # a tensor: to read it would make a GPU wait at each layer
    mean, square = (sums[:-1] / count).chunk(2)
    return mean.to(x.dtype), (square - mean.square()).clamp_min(0).to(x.dtype), count


class _Sum(torch.autograd.Function):
    """The sum over all processes; what it gives is in the loss of each, so gradients are summed as well."""

    @staticmethod
    def forward(_: Any, value: Tensor) -> Tensor:
        whole = value.clone()
        torch.distributed.all_reduce(whole)
        return whole

    @staticmethod
    def backward(_: Any, *grads: Tensor) -> Tensor:
        summed: Tensor = _Sum.apply(grads[0])
        return summed


def _move_running(layer: nn.BatchNorm2d, mean: Tensor, unbiased: Tensor) -> None:
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
    if layer.momentum and layer.running_mean is not None and layer.running_var is not None:
        layer.running_mean.lerp_(mean, layer.momentum)
        layer.running_var.lerp_(unbiased, layer.momentum)
