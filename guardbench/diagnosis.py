"""Why a classifier is robust or not: the terms of GUARD's bound, measured beside the adversarial loss.

GUARD (Xue et al., AAAI 2025) claims robustness through a flat loss: its bound of the adversarial loss has
the clean loss, the curvature, and the distance between distilled and real features. Here each is measured
on a trained network, and so is what the bound leaves out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from guardbench.attacks.base import Images, frozen
from guardbench.attacks.build import build_attack
from guardbench.attacks.pgd import PGD
from guardbench.attacks.stream import Fitting, gradient_of, rows_at_once
from guardbench.ball import length, random_start
from guardbench.curvature import (
    Bound,
    curvature_gains,
    first_order_gains,
    l2_radius,
    top_eigenvalues,
)
from guardbench.data.dataset import RealDataset, load_split
from guardbench.diagnosed import Diagnosed, Numbers, PerImage, Shift, Terms
from guardbench.distilled import DistilledDataset, load_distilled
from guardbench.errors import GuardbenchError
from guardbench.imported import Imported
from guardbench.progress import Progress
from guardbench.protocol import Protocol
from guardbench.regularisers.adversarial import ascend
from guardbench.regularisers.base import Batch
from guardbench.shift import class_shifts, features_of, lipschitz_of_pairs
from guardbench.threat import ThreatModel

REAL_IMAGES = 500
"""Training images a class whose features stand for the real ones, evenly spaced where there are more."""
DOUBLE = 2
"""How many times less of a batch is taken where the graph of the gradient is kept."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What is measured, and how exactly.

    Attributes:
        threat: the ball.
        attack: PGD with the protocol's settings.
        tolerance, iterations: see `curvature.top_eigenvalues`.
    """

    threat: ThreatModel
    attack: PGD
    tolerance: float
    iterations: int


def pgd_of(protocol: Protocol) -> PGD:
    """The protocol's first PGD column; PGD-40 with steps of a tenth of the radius where it has none.

    Raises:
        GuardbenchError: the threat's norm is one that PGD lacks.
    """
    threat = protocol.threat.model
    for spec in protocol.attacks:
        if spec.kind == "pgd":
            attack = build_attack(spec.kind, threat, spec.params)
            assert isinstance(attack, PGD)
            return attack
    return PGD(threat=threat, steps=40, step=threat.eps / 10)


def cross_entropies(logits: Tensor, y: Tensor) -> Tensor:
    """Each image's loss [N] of a float32 network's logits [N, K], taken in float64 where the device has it.

    Where the label's probability is close to 1, its derivatives are differences that float32 cannot
    hold: the first is `p - 1`, and the Hessian's noise would exceed the Hessian. The network's own
    part needs no such care.
    """
    wide = logits if logits.device.type == "mps" else logits.double()
    return F.cross_entropy(wide, y, reduction="none")


def pgd_losses(model: nn.Module, attack: PGD, x: Tensor, y: Tensor) -> Tensor:
    """Each image's cross-entropy after PGD's last step, or at the clean image where it is higher, [N].

    All images take all steps, where a count of broken images lets those that are broken leave: the
    loss at the first misclassified iterate says nothing about the largest one. Of several restarts
    the worst counts.

    Args:
        model: in eval mode, frozen, on the images' device.
        x, y: images [N, C, H, W] in [0, 1] and labels [N].
    """

    def summed(images: Tensor) -> Tensor:
        return cross_entropies(model(images), y).sum()

    batch = Batch(model=model, images=x, labels=y)
    with torch.no_grad():
        worst = cross_entropies(model(x), y)
    for restart in range(attack.restarts):
        start = random_start(x, attack.threat, 0, restart) if attack.random_start else x
        with torch.enable_grad():
            adv = ascend(
                batch, start, summed, threat=attack.threat, steps=attack.steps,
                step=float(attack.step / attack.threat.eps),
            )  # fmt: skip
        with torch.no_grad():
            worst = torch.maximum(worst, cross_entropies(model(adv), y))
    return worst


def measure(
    model: nn.Module,
    x: Images,
    y: Tensor,
    how: Measure,
    *,
    told: Callable[[int], None] = lambda _: None,
) -> PerImage:
    """Losses, gradients and eigenvalues of every image.

    Args:
        model: in eval mode, float32; batches go to the device of its weights.
        x, y: images [N, C, H, W] in [0, 1] and labels [N].
        told: hears how many images a finished batch had.

    Raises:
        GuardbenchError: no gradient reaches the images, or the losses are not finite.
    """
    correct, loss, attacked, l1, l2, first_order, eigenvalue, residual, products, converged = (
        _in_batches(model, x, y, lambda a, b: _measured(model, a, b, how), told)
    )
    return PerImage(
        label=tuple(y.tolist()),
        correct=tuple(correct.tolist()),
        loss=_numbers(loss),
        adversarial_loss=_numbers(attacked),
        gradient_l1=_numbers(l1),
        gradient_l2=_numbers(l2),
        first_order=_numbers(first_order),
        eigenvalue=_numbers(eigenvalue),
        residual=_numbers(residual),
        products=tuple(products.tolist()),
        converged=tuple(converged.tolist()),
    )


def _in_batches(
    model: nn.Module,
    x: Images,
    y: Tensor,
    function: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    told: Callable[[int], None] = lambda _: None,
) -> list[Tensor]:
    """Columns [N] of what `function` gives for images and labels, on the CPU; refused if not finite."""
    device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
    size = max(1, rows_at_once(x[:1].to(device)) // DOUBLE)
    fitting = Fitting(size)
    parts = []
    with frozen(model):
        for first in range(0, len(x), size):
            rows = slice(first, first + size)
            parts.append(fitting(function, x[rows].to(device), y[rows].to(device)))
            told(len(y[rows]))
    columns = [torch.cat(column).cpu() for column in zip(*parts, strict=True)]
    if not all(bool(column.isfinite().all()) for column in columns):
        raise GuardbenchError(
            "the classifier's losses or their derivatives are not finite; its curvature means nothing."
        )
    return columns


def _measured(model: nn.Module, x: Tensor, y: Tensor, how: Measure) -> tuple[Tensor, ...]:
    def losses(images: Tensor) -> Tensor:
        return cross_entropies(model(images), y)

    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(leaf)
        loss = cross_entropies(logits, y)
        gradient = gradient_of(loss, leaf)
    top = top_eigenvalues(losses, x, tolerance=how.tolerance, iterations=how.iterations)
    return (
        logits.argmax(1) == y,
        loss.detach(),
        pgd_losses(model, how.attack, x, y),
        length(gradient, "l1"),
        length(gradient, "l2"),
        first_order_gains(gradient, how.threat),
        top.values,
        top.residuals,
        top.iterations,
        top.converged,
    )


def terms_of(found: PerImage, how: Measure, pixels: int) -> Terms:
    """The bound's terms over the images measured, beside their loss under PGD.

    Args:
        pixels: C * H * W of an image.
    """
    clean, attacked, first, eigenvalues = (
        torch.tensor(column, dtype=torch.float64)
        for column in (found.loss, found.adversarial_loss, found.first_order, found.eigenvalue)
    )
    gains = curvature_gains(eigenvalues, l2_radius(how.threat, pixels))
    bound = Bound(
        clean=float(clean.mean()), first_order=float(first.mean()), curvature=float(gains.mean())
    )
    return _terms(
        bound,
        adversarial=float(attacked.mean()),
        share_paper=float((attacked <= clean + gains).double().mean()),
        share_second_order=float((attacked <= clean + gains + first).double().mean()),
    )


def _terms(bound: Bound, adversarial: float, **shares: float) -> Terms:
    return Terms(
        clean=bound.clean, first_order=bound.first_order, curvature=bound.curvature,
        shift=bound.shift, paper=bound.paper, second_order=bound.second_order,
        adversarial=adversarial, **shares,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Real:
    """The real images of one protocol.

    Attributes:
        x, y: those measured, and their classes.
        train: the training split, where features are compared; None where they are not.
    """

    x: Images
    y: Tensor
    train: RealDataset | None


def load_real(
    protocol: Protocol,
    images: int,
    *,
    train: bool,
    data_dir: Path | None,
    cache_dir: Path | None,
    progress: Progress,
) -> Real:
    """The first `images` of a protocol's test images, and the training split if `train`.

    Raises:
        GuardbenchError: see `data.dataset.load_split`.
    """
    both = {
        which: load_split(
            protocol.dataset, which, resolution=protocol.resolution, data_dir=data_dir,
            cache_dir=cache_dir, progress=progress, per_class=1,
        )
        for which in (("train", "val") if train else ("val",))
    }  # fmt: skip
    test = both["val"]
    order = protocol.test_indices(test.ids)[:images]
    return Real(x=test.select(order), y=test.labels[order], train=both.get("train"))


def diagnose(
    imported: Imported,
    real: Real,
    distilled: DistilledDataset | None,
    how: Measure,
    progress: Progress,
) -> Diagnosed:
    """Measures one classifier.

    Args:
        imported: in eval mode, on its device.
        distilled: to compare with `real.train`; see `open_distilled`.

    Raises:
        GuardbenchError: see `measure` and `shift.features_of`.
    """
    pixels = math.prod(real.x.shape[1:])
    if distilled is not None:  # refused before the long part
        features_of(imported.model, distilled.images[:2])
    with progress.stage(imported.described.name, len(real.x), "images") as bar:
        found = measure(imported.model, real.x, real.y, how, told=bar.advance)
    terms = terms_of(found, how, pixels)
    shift = None
    if distilled is not None:
        shift = _shift(imported.model, real, distilled, how, found, terms)
    return Diagnosed(classifier=imported.described, terms=terms, shift=shift, images=found)


def _shift(
    model: nn.Module,
    real: Real,
    distilled: DistilledDataset,
    how: Measure,
    found: PerImage,
    terms: Terms,
) -> Shift:
    assert real.train is not None
    rows = _evenly(real.train.labels, REAL_IMAGES)
    theirs = features_of(model, real.train.select(rows.tolist()))
    ours = features_of(model, distilled.images)
    classes = class_shifts(
        ours, distilled.hard, theirs, real.train.labels[rows], real.train.class_names
    )
    sigma = math.fsum(one.sigma for one in classes) / len(classes)
    steepest = lipschitz_of_pairs(
        features_of(model, real.x), torch.tensor(found.adversarial_loss), real.y
    )
    (attacked,) = _in_batches(
        model, distilled.images, distilled.hard, lambda a, b: (pgd_losses(model, how.attack, a, b),)
    )
    bound = Bound(
        clean=terms.clean, first_order=terms.first_order, curvature=terms.curvature,
        shift=steepest * sigma,
    )  # fmt: skip
    return Shift(
        distilled_sha256=distilled.manifest.sha256,
        method=distilled.manifest.method,
        features=ours.shape[1],
        sigma=sigma,
        lipschitz=steepest,
        classes=classes,
        terms=_terms(bound, adversarial=float(attacked.double().mean())),
    )


def _evenly(labels: Tensor, most: int) -> Tensor:
    """Positions of at most `most` images a class, evenly spaced over the class's, int64."""
    found = []
    for label in sorted(set(labels.tolist())):
        rows = (labels == label).nonzero().squeeze(1)
        count = min(most, len(rows))
        found.append(rows[torch.arange(count) * len(rows) // count])
    return torch.cat(found)


def open_distilled(folder: Path, protocol: Protocol, train: RealDataset) -> DistilledDataset:
    """A distilled set of a protocol's dataset, resolution and classes.

    Raises:
        GuardbenchError: it cannot be read, or is of another dataset, resolution or order of classes.
    """
    distilled = load_distilled(folder)
    has = distilled.manifest
    if (has.dataset, has.resolution) != (protocol.dataset, protocol.resolution):
        raise GuardbenchError(
            f"--distilled {folder}: distilled from {has.dataset} at {has.resolution} px; protocol "
            f"{protocol.id} measures {protocol.dataset} at {protocol.resolution} px."
        )
    if has.classes not in (train.classes, train.class_names):
        raise GuardbenchError(f"--distilled {folder}: its classes are not those of {train.name}.")
    return distilled


def _numbers(values: Tensor) -> Numbers:
    """Float32 values with the seven digits that they have, and no more in the file."""
    return tuple(float(f"{value:.7g}") for value in values.tolist())
