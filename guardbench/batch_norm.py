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

    Every process must make the same forward and backward passes. Unlike torch.nn.SyncBatchNorm this
    runs on CPUs too, and can be differentiated twice, as the double-backward form of curvature asks.
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
    with torch.no_grad():  # torch's own pass over the rows, without a copy of them
        own = [part.double() for part in torch.batch_norm_update_stats(wide, None, None, 0.0)]
        square = own[1] + own[0].square()
        found = _over_all(own[0], square, x.numel() // x.shape[1])
        mean, variance, count = (part.to(wide.dtype) for part in found)
    _move_running(layer, mean, variance * count / (count - 1))
    moved: Tensor = _Normalise.apply(
        wide, layer.weight, layer.bias, mean, variance, count, layer.eps
    )
    return moved.to(x.dtype)


class _Normalise(torch.autograd.Function):
    """BN by given statistics of all processes' rows; the gradient knows what they owe to x.

    With xhat the normalised rows, d the gradient at the output, sums over all M values of a channel:
    dx = weight / std * (d - sum(d) / M - xhat * sum(d * xhat) / M) (Ioffe and Szegedy, ICML 2015,
    section 3). torch's kernel for fixed statistics gives the first term and this process's sums in one
    pass. Where the gradient itself is to be differentiated, it is that of `_plainly`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        variance: Tensor,
        count: Tensor,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, mean, variance, count)
        ctx.eps = eps
        return torch.nn.functional.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, variance, count = ctx.saved_tensors
        (grad,) = grads
        no_more = (None, None, None, None)
        if torch.is_grad_enabled():  # a graph of this very pass is asked for
            inputs, needed = (x, weight, bias), ctx.needs_input_grad[:3]
            asked = [value for value, wanted in zip(inputs, needed, strict=True) if wanted]
            moved = _plainly(x, weight, bias, ctx.eps)
            found = iter(torch.autograd.grad(moved, asked, grad, create_graph=True))
            return (*(next(found) if wanted else None for wanted in needed), *no_more)
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        if ctx.needs_input_grad[0]:
            sums = _sum(torch.stack([dweight, dbias]))
            inverse = (variance + ctx.eps).rsqrt()
            scale = weight * inverse / count
            slope = scale * inverse * sums[0]
            rows = _rows(dx)
            rows.addcmul_(_rows(x), slope, value=-1).add_(slope * mean - scale * sums[1])
            dx = _images(rows, x)
        return (dx, dweight, dbias, *no_more)


def _plainly(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The same in operations that can be differentiated any number of times."""
    rows = _rows(x)
    # Plain means are several times faster than var_mean.
    own = rows.mean(0).double(), rows.square().mean(0).double()
    mean, variance = (part.to(x.dtype) for part in _over_all(*own, len(rows))[:2])
    scale = (variance + eps).rsqrt() * weight
    return _images(rows * scale + (bias - mean * scale), x)


def _over_all(mean: Tensor, square: Tensor, values: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance [C] of all processes' values, and how many they are, float64.

    Args:
        mean, square: of this process's `values` and of their squares, float64 [C].
    """
    sums = _Sum.apply(torch.cat([mean, square, mean.new_ones(1)]) * values)
    count = sums[-1].detach()  # a tensor: to read it would make a GPU wait at each layer
    mean, square = (sums[:-1] / count).chunk(2)
    return mean, (square - mean.square()).clamp_min(0), count


def _rows(x: Tensor) -> Tensor:
    """x [n, C, H, W] as rows of channels [n H W, C], as they lie in memory where channels are last.

    What is done to such rows takes a sixth of the time of a broadcast over [C, 1, 1].
    """
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _images(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_rows`."""
    n, c, h, w = like.shape
    return rows.view(n, h, w, c).permute(0, 3, 1, 2)


class _Sum(torch.autograd.Function):
    """`_sum`; what it gives is in the loss of each process, so gradients are summed as well."""

    @staticmethod
    def forward(_: Any, value: Tensor) -> Tensor:
        return _sum(value)

    @staticmethod
    def backward(_: Any, *grads: Tensor) -> Tensor:
        summed: Tensor = _Sum.apply(grads[0])
        return summed


def _sum(value: Tensor) -> Tensor:
    """The sum over all processes: each adds up what all have sent, half the time of a reduction."""
    processes = torch.distributed.get_world_size()
    parts = value.new_empty(processes * value.numel())
    torch.distributed.all_gather_into_tensor(parts, value.flatten())
    return parts.view(processes, *value.shape).sum(0)


def _move_running(layer: nn.BatchNorm2d, mean: Tensor, unbiased: Tensor) -> None:
    if not layer.track_running_stats:
        return
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
    if layer.momentum and layer.running_mean is not None and layer.running_var is not None:
        layer.running_mean.lerp_(mean, layer.momentum)
        layer.running_var.lerp_(unbiased, layer.momentum)
