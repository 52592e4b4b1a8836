"""Curvature of the loss in the input: GUARD's regulariser, the Hessian's largest eigenvalue, the bound.

*The regulariser* (Xue et al., AAAI 2025, section 4, after CURE). With l the loss,
z_i = grad l(x_i) / ||grad l(x_i)|| and h a length in input space, GUARD flattens the loss
around the training images so that one step along z changes little. Two forms exist:

- as in the paper (its regularised objective; CURE, Moosavi-Dezfooli et al. 2019, equation 7):
  `l(x) + weight * mean_i || grad l(x_i + h z_i) - grad l(x_i) ||^2`, a second-order quantity;
- as in the authors' released code: `l(x) + weight * | l(x + h z) - l(x) |` on batch means.

`h` is given as a root mean square change a pixel in [0, 1] units, so that it means the same at every
resolution: the length of the step is `h * sqrt(C * H * W)`. The paper's h = 3 in ImageNet-normalised
pixels at 224 px is about 0.45/255 a pixel.

*The measurements*: `top_eigenvalues` of the Hessian of each image's own loss in that image, and `Bound`,
the paper's upper bound of the adversarial loss that rests on them. Of a network whose logits are
piecewise linear in the image (ReLU, max- and average-pooling, batch norm in eval mode), the Hessian of
the cross-entropy is that of the softmax alone, `J^T (diag(p) - p p^T) J` with J the logits' Jacobian:
never negative, of rank below the number of classes, and blind to the kinks between linear pieces.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from guardbench.ball import content_noise, length, steepest
from guardbench.models import running_statistics_kept
from guardbench.regularisers.base import Batch, require_positive
from guardbench.threat import Norm, ThreatModel

Losses = Callable[[Tensor], Tensor]
"""Each image's own loss [N] of images [N, C, H, W]; an image's loss must not depend on the others."""
TOLERANCE = 1e-3
ITERATIONS = 100
DUAL: dict[Norm, Norm] = {"linf": "l1", "l2": "l2", "l1": "linf"}


@dataclass(frozen=True, kw_only=True)
class FirstOrderCurvature:
    """The form of the released code, `weight * | l(x + h z) - l(x) |`, with z held constant.

    The penalty is an absolute difference of two losses, so its gradient in the weights is a signed
    sum of two gradients: with s the sign of `l(x + h z) - l(x)`, the whole gradient is
    `(1 - weight s) grad l(x) + weight s grad l(x + h z)`. One backward at x gives its first part and
    the direction z together; a step costs two plain ones.

    The second pass uses its own batch's BN statistics and does not move the running ones: taken in
    eval mode from the first step, a network can learn to be constant in eval mode alone.

    Attributes:
        weight: factor of the penalty (beta in the released code).
        h: root mean square change a pixel of the step, in [0, 1] units.
    """

    weight: float
    h: float

    def __post_init__(self) -> None:
        require_positive(weight=self.weight, h=self.h)

    @property
    def cost(self) -> float:
        """See `Regulariser.cost`."""
        return 2.0

    def backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """See `Regulariser.backward`."""
        images = batch.images.detach().requires_grad_()
        loss = batch.loss(images)
        loss.backward()  # type: ignore[no-untyped-call]
        assert images.grad is not None
        with running_statistics_kept(batch.model):
            moved = batch.loss(images.detach() + step_along(images.grad, self.h))
        rise = batch.total(moved.detach() - loss.detach())
        signed = self.weight * torch.sign(rise)
        for parameter in batch.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(1 - signed)
        (signed * moved).backward()  # type: ignore[no-untyped-call]
        return loss.detach(), signed * (moved.detach() - loss.detach())


@dataclass(frozen=True, kw_only=True)
class DoubleBackwardCurvature:
    """The form of the paper, `weight * mean_i || grad l(x_i + h z_i) - grad l(x_i) ||^2`.

    `l` here is one image's own loss, so the batch-mean loss is scaled by N before it is
    differentiated. z is held constant. Needs a second backward through the gradients. The paper's weight
    of 100 is, as its h = 3 suggests, for gradients in ImageNet-normalised pixels; squares of these
    are about 20 times as large, so that 5 weighs the same here.

    Attributes:
        weight: factor of the penalty (lambda in the paper).
        h: root mean square change a pixel of the step, in [0, 1] units.
    """

    weight: float
    h: float

    def __post_init__(self) -> None:
        require_positive(weight=self.weight, h=self.h)

    @property
    def cost(self) -> float:
        """See `Regulariser.cost`."""
        return 6.4  # measured on two cores, see benchmarks/distilling.py

    def backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """See `Regulariser.backward`."""
        count = batch.count
        images = batch.images.detach().requires_grad_()
        loss = batch.loss(images)
        (here,) = torch.autograd.grad(loss * count, images, create_graph=True)
        there_images = (images.detach() + step_along(here.detach(), self.h)).requires_grad_()
        with running_statistics_kept(batch.model):
            moved = batch.loss(there_images)
        (there,) = torch.autograd.grad(moved * count, there_images, create_graph=True)
        apart = ((there - here) / batch.scale).flatten(1).square().sum(1)
        penalty = self.weight * batch.shared(apart.mean())
        (loss + penalty).backward()  # type: ignore[no-untyped-call]
        return loss.detach(), penalty.detach()


def step_along(gradient: Tensor, h: float) -> Tensor:
    """`h * sqrt(C * H * W) * z`: each image's gradient [N, C, H, W] scaled to the step's length.

    An image whose gradient is zero stays where it is; one whose gradient is too small for its square goes
    as far as any other.
    """
    return h * math.sqrt(gradient[0].numel()) * steepest(gradient, "l2")


@dataclass(frozen=True)
class TopEigenvalues:
    """The largest eigenvalue of every image's Hessian, and how well it is known.

    Attributes:
        values: [N], in loss a squared [0, 1] pixel unit; the largest *algebraic* one, so that a
            more negative one of greater magnitude is never taken for it.
        residuals: [N], `||H v - lambda v||` of the unit vector v that was found: some eigenvalue of H
            lies within it of `values`, and no value found exceeds the true largest.
        iterations: int64 [N], Hessian-vector products that the search took.
        converged: bool [N], the residual is within the tolerance.
    """

    values: Tensor
    residuals: Tensor
    iterations: Tensor
    converged: Tensor


def top_eigenvalues(
    losses: Losses,
    x: Tensor,
    *,
    tolerance: float = TOLERANCE,
    iterations: int = ITERATIONS,
    seed: int = 0,
) -> TopEigenvalues:
    """Largest eigenvalue of the Hessian of each image's loss, by power iteration without that matrix.

    A plain power iteration finds the eigenvalue of largest magnitude, whatever its sign, and slows
    down where the two ends of the spectrum are alike. Here the next vector is the one with the
    largest `v^T H v` in the span of v, H v and the last step (Knyazev, SIAM J. Sci. Comput. 2001,
    locally optimal conjugate gradients): never worse than a power step with any shift, and one
    Hessian-vector product each as well. All images are searched side by side.

    Args:
        losses: differentiable twice; the network in eval mode.
        x: images [N, C, H, W]; float64 gives eigenvalues to more digits.
        tolerance: of the residual, as a share of the eigenvalue's magnitude.
        iterations: at most so many Hessian-vector products an image, and one more to check the result.
        seed: of the random vectors to begin with, which depend on the image alone.
    """
    product = _hessian_products(losses, x)
    v = _unit(content_noise(x, seed, "eigenvector", normal=True).flatten(1))
    hv = product(v)
    last, h_last = torch.zeros_like(v), torch.zeros_like(v)
    # Products of noise, which a residual cannot fall below.
    noise = 32 * torch.finfo(x.dtype).eps
    scale = torch.linalg.vector_norm(hv, dim=1)
    spent = torch.ones(len(x), dtype=torch.int64, device=x.device)
    while True:
        value = (v * hv).sum(1)
        residual = torch.linalg.vector_norm(hv - value[:, None] * v, dim=1)
        done = residual <= torch.maximum(tolerance * value.abs(), noise * scale)
        done |= spent >= iterations
        if bool(done.all()):
            break
        uphill = _unit(_without(hv - value[:, None] * v, v))
        h_uphill = product(uphill)
        scale = torch.maximum(scale, torch.linalg.vector_norm(h_uphill, dim=1))
        moved = _best_in_span(v, hv, uphill, h_uphill, last, h_last)
        # An image that is done stays, so that its value does not depend on those beside it.
        v, hv, last, h_last = (
            torch.where(done[:, None], old, new)
            for old, new in zip((v, hv, last, h_last), moved, strict=True)
        )
        spent += (~done).long()
    # H v was carried along as a sum; what is reported is of a product of its own.
    hv = product(v)
    value = (v * hv).sum(1)
    residual = torch.linalg.vector_norm(hv - value[:, None] * v, dim=1)
    allowed = torch.maximum(tolerance * value.abs(), 4 * noise * scale)
    return TopEigenvalues(value, residual, spent, residual <= allowed)


def _hessian_products(losses: Losses, x: Tensor) -> Callable[[Tensor], Tensor]:
    """Vectors [N, D], one an image, to their products with that image's Hessian.

    The Hessian of the summed loss has a block an image and zeros elsewhere, so that one backward
    through the gradient serves all images.
    """
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(losses(leaf).sum(), leaf, create_graph=True)

    def product(vectors: Tensor) -> Tensor:
        if not gradient.requires_grad:  # a linear loss
            return torch.zeros_like(vectors)
        (found,) = torch.autograd.grad(
            gradient, leaf, vectors.view_as(leaf), retain_graph=True, materialize_grads=True
        )
        return found.detach().flatten(1)

    return product


def _best_in_span(
    v: Tensor, hv: Tensor, uphill: Tensor, h_uphill: Tensor, last: Tensor, h_last: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The unit vector of largest `v^T H v` in the span of three, the step to it, and H times both.

    Args:
        v, uphill: orthonormal, or `uphill` zero; [N, D].
        last: the step before, or zero.
        hv, h_uphill, h_last: H times each.
    """
    before = torch.linalg.vector_norm(last, dim=1, keepdim=True)
    for other, h_other in ((v, hv), (uphill, h_uphill)):
        share = (last * other).sum(1, keepdim=True)
        last, h_last = last - share * other, h_last - share * h_other
    size = torch.linalg.vector_norm(last, dim=1, keepdim=True)
    # A step that lies in the span of the other two would add rounding errors alone.
    fresh = size > math.sqrt(torch.finfo(v.dtype).eps) * before
    last, h_last = (torch.where(fresh, part / size, 0.0) for part in (last, h_last))
    basis, images = torch.stack([v, uphill, last], 1), torch.stack([hv, h_uphill, h_last], 1)
    # Three by three each: on the CPU in float64, which not every device has.
    gram = (basis @ images.transpose(1, 2)).cpu().double()
    gram = (gram + gram.transpose(1, 2)) / 2
    absent = torch.linalg.vector_norm(basis, dim=2).cpu() == 0
    below = -1 - 4 * gram.abs().amax((1, 2))
    gram += torch.diag_embed(torch.where(absent, below[:, None], 0.0))
    best = torch.linalg.eigh(gram).eigenvectors[:, :, -1:].to(v)
    step = torch.cat([torch.zeros_like(best[:, :1]), best[:, 1:]], 1)
    size = torch.linalg.vector_norm((best * basis).sum(1), dim=1, keepdim=True)
    return (
        (best * basis).sum(1) / size,
        (best * images).sum(1) / size,
        (step * basis).sum(1),
        (step * images).sum(1),
    )


def _unit(vectors: Tensor) -> Tensor:
    """Vectors [N, D] of length 1; a zero one stays zero."""
    size = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return torch.where(size > 0, vectors / size, 0.0)


def _without(vectors: Tensor, unit: Tensor) -> Tensor:
    """Vectors [N, D] less their parts along unit vectors."""
    return vectors - (vectors * unit).sum(1, keepdim=True) * unit


@dataclass(frozen=True)
class Bound:
    """The terms of the paper's bound of the adversarial loss, each a mean over images.

    `adv_loss_rho(x') <= E[l(x)] + rho^2/2 * E[lambda_1(x)] + L * sigma` (Xue et al., AAAI 2025, main
    result), for a loss that is convex and quadratic within rho of each image. It has no first-order
    term, so it is a bound of nothing where the gradient at x is not small; `second_order` adds it.

    Attributes:
        clean: `E[l(x)]`.
        first_order: the mean of the most that the gradient alone can raise the loss, `eps ||grad||` in
            the dual norm of the threat (l1 for l-inf). Not in the paper's bound.
        curvature: `rho^2/2 * E[lambda_1(x)]`, where a negative eigenvalue, which the convexity that is
            assumed rules out, counts as 0: an attacker may stand still.
        shift: `L * sigma`; 0 where the images bounded are those measured.
    """

    clean: float
    first_order: float
    curvature: float
    shift: float = 0.0

    @property
    def paper(self) -> float:
        """The paper's right side."""
        return self.clean + self.curvature + self.shift

    @property
    def second_order(self) -> float:
        """With the first-order term: bounds a quadratic loss whatever its gradient."""
        return self.paper + self.first_order


def l2_radius(threat: ThreatModel, pixels: int) -> float:
    """rho: the radius of the smallest l2 ball that holds the threat's, of `pixels` values an image."""
    return float(threat.eps) * (math.sqrt(pixels) if threat.norm == "linf" else 1.0)


def curvature_gains(eigenvalues: Tensor, rho: float) -> Tensor:
    """`rho^2/2 * max(lambda_1, 0)`: the most that curvature alone can raise the loss in an l2 ball, [N]."""
    return rho**2 / 2 * eigenvalues.clamp_min(0)


def first_order_gains(gradients: Tensor, threat: ThreatModel) -> Tensor:
    """The most by which a linear loss with these gradients [N, C, H, W] grows in the threat's ball, [N]."""
    return float(threat.eps) * length(gradients, DUAL[threat.norm])
