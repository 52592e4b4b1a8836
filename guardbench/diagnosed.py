"""What `guardbench diagnose` finds: its file and its figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from guardbench import canonical
from guardbench.figures import new_figure, save_png
from guardbench.records import Classifier, Line, Name, Sha256, Strict, only_const
from guardbench.store import write_text
from guardbench.threat import Norm

Numbers = tuple[float, ...]


class PerImage(Strict):
    """One value an image, in the protocol's order.

    Attributes:
        label: the class.
        correct: whether the clean image is classified rightly.
        loss, adversarial_loss: cross-entropy (nats) of the image and of PGD's.
        gradient_l1, gradient_l2: norms of the loss's gradient, a [0, 1] pixel unit.
        first_order: see `curvature.first_order_gains`.
        eigenvalue, residual, products, converged: see `curvature.TopEigenvalues`.
    """

    label: tuple[int, ...]
    correct: tuple[bool, ...]
    loss: Numbers
    adversarial_loss: Numbers
    gradient_l1: Numbers
    gradient_l2: Numbers
    first_order: Numbers
    eigenvalue: Numbers
    residual: Numbers
    products: tuple[int, ...]
    converged: tuple[bool, ...]


class Terms(Strict):
    """See `curvature.Bound`: its terms, and the measured loss that they are to bound.

    Attributes:
        adversarial: mean loss under PGD, which is at most the true adversarial loss.
        paper, second_order: the bound without and with the first-order term.
        share_paper, share_second_order: of the images, those whose own loss under PGD lies under their
            own bound; None where the bound is that of another set of images.
    """

    clean: float
    first_order: float
    curvature: float
    shift: float
    paper: float
    second_order: float
    adversarial: float
    share_paper: float | None = None
    share_second_order: float | None = None

    @property
    def under_paper(self) -> bool:
        """Whether the measured loss lies under the paper's bound."""
        return self.adversarial <= self.paper

    @property
    def under_second_order(self) -> bool:
        """Whether it lies under the bound that has the first-order term too."""
        return self.adversarial <= self.second_order


class ClassShift(Strict):
    """One class of a distilled set beside the real one, in the space of features.

    Attributes:
        name: of the class.
        distilled, real: how many images stand for each.
        sigma: l2 distance between the mean features of both.
        spread: mean l2 distance of the real images' features from their mean; the scale of `sigma`.
    """

    name: Line
    distilled: int
    real: int
    sigma: float
    spread: float


class Shift(Strict):
    """How far a distilled set lies from the real images, as a classifier sees both.

    Attributes:
        distilled_sha256: digest of the set.
        method: which made it.
        features: F, inputs of the last linear layer.
        sigma: mean over classes.
        lipschitz: the estimate of L, see `lipschitz_of_pairs`.
        classes: in label order.
        terms: the paper's inequality as it stands: the loss of the attacked *distilled* images beside
            the real images' terms and `L * sigma`.
    """

    distilled_sha256: Sha256
    method: Name
    features: int
    sigma: float
    lipschitz: float
    classes: tuple[ClassShift, ...]
    terms: Terms


class Diagnosed(Strict):
    """One classifier."""

    classifier: Classifier
    terms: Terms
    shift: Shift | None
    images: PerImage


class Diagnosis(Strict):
    """What `guardbench diagnose` finds.

    Attributes:
        norm, eps: the threat.
        rho: radius of the smallest l2 ball that holds the threat's.
        attack: the PGD that gives the measured loss.
        tolerance, iterations: see `curvature.top_eigenvalues`.
        total: images.
        models: at least one, all on the same images.
    """

    schema_version: Literal[1] = Field(default=1, json_schema_extra=only_const)
    protocol: Name
    protocol_sha256: Sha256
    norm: Norm
    eps: str
    rho: float
    attack: Line
    tolerance: float
    iterations: int
    total: int = Field(ge=1)
    guardbench: Line
    device: Line
    models: tuple[Diagnosed, ...] = Field(min_length=1)


def save_diagnosis(path: Path, found: Diagnosis) -> None:
    """Writes a diagnosis as canonical JSON."""
    write_text(path, canonical.dumps(found.model_dump(mode="json")))


PARTS = {
    "clean": "clean loss",
    "curvature": "curvature: rho^2/2 lambda_1",
    "shift": "shift: L sigma",
    "first_order": "first order: eps ||grad||",
}
"""The bound's terms in the order in which they are piled up, and what the legend calls them."""


def draw_diagnosis(path: Path, found: Diagnosis) -> None:
    """Draws a PNG: how eigenvalues and gradients are spread over the images, and the bound's terms."""
    figure = new_figure(figsize=(11, 7), dpi=130, layout="constrained")
    spread, bars = figure.subfigures(2, 1, height_ratios=(1, 1.15))
    left, right = spread.subplots(1, 2, sharey=True)
    models = found.models
    _histogram(left, models, "eigenvalue")
    left.set_xlabel("largest eigenvalue of the loss's Hessian in the image, lambda_1")
    left.set_ylabel("images, %")
    _histogram(right, models, "gradient_l2")
    right.set_xlabel("l2 norm of the loss's gradient in the image")
    left.legend(frameon=False, loc="upper left")
    _draw_terms(bars.subplots(), models)
    eps = f"{found.norm} {found.eps} (rho = {found.rho:.3g})"
    figure.suptitle(f"{found.protocol}, {found.total} images, {eps}, {found.attack}", fontsize=10)
    save_png(path, figure)


def _histogram(axes: Any, models: Sequence[Diagnosed], column: str) -> None:
    """One outline a classifier over logarithmic bins; what lies below six decades falls into the first."""
    values = [list(getattr(model.images, column)) for model in models]
    top = max(max(some) for some in values)
    high = math.ceil(math.log10(top)) if top > 0 else 0
    low = high - 6
    bins = [10 ** (low + place / 4) for place in range(4 * (high - low) + 1)]
    for model, some in zip(models, values, strict=True):
        kept = [min(max(value, bins[0]), bins[-1]) for value in some]
        (_, _, (outline,)) = axes.hist(
            kept, bins, weights=[100 / len(kept)] * len(kept), histtype="step", linewidth=1.6,
            label=model.classifier.name,
        )  # fmt: skip
        mean = math.fsum(some) / len(some)
        if mean > bins[0]:
            axes.axvline(mean, color=outline.get_edgecolor(), linestyle=":", linewidth=1.4)
    axes.set_xscale("log")
    axes.grid(alpha=0.3)
    axes.set_title("dotted: mean", fontsize=8, loc="right")


def _draw_terms(axes: Any, models: Sequence[Diagnosed]) -> None:
    """The bound's terms piled up, beside the loss measured; a group of bars a classifier."""
    groups: list[tuple[str, Terms]] = []
    for model in models:
        groups.append((model.classifier.name, model.terms))
        if model.shift is not None:
            groups.append((f"{model.classifier.name}: distilled", model.shift.terms))
    used = [part for part in PARTS if any(getattr(terms, part) for _, terms in groups)]
    colours = dict(zip(PARTS, ("tab:gray", "tab:orange", "tab:purple", "tab:blue"), strict=True))
    for row, (_, terms) in enumerate(groups):
        base = 0.0
        for part in used:
            size = getattr(terms, part)
            axes.barh(row - 0.2, size, 0.36, left=base, color=colours[part])
            base += size
        axes.barh(row + 0.2, terms.adversarial, 0.36, color="tab:red")
        axes.text(base, row - 0.2, f" {base:.3g}", va="center", fontsize=8)
        axes.text(
            terms.adversarial, row + 0.2, f" {terms.adversarial:.3g}", va="center", fontsize=8
        )
        axes.plot([terms.paper] * 2, [row - 0.38, row - 0.02], color="black", linewidth=2)
    for part in used:
        axes.barh(0, 0, color=colours[part], label=PARTS[part])
    axes.plot([], [], color="black", linewidth=2, label="the paper's bound ends here")
    axes.barh(0, 0, color="tab:red", label="measured under PGD")
    axes.set_yticks(range(len(groups)), [name for name, _ in groups])
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.set_xlabel("loss (cross-entropy in nats), mean over images")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
