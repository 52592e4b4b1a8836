"""What `guardbench diagnose` finds: its file and its figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from guardbench import canonical
from guardbench.fields import Line, Name, Sha256, Strict, only_const
from guardbench.figures import new_figure, save_png
from guardbench.records import Classifier
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
    "clean": r"clean loss $E[\ell]$",
    "curvature": r"curvature $\frac{\rho^2}{2} E[\lambda_1]$",
    "shift": r"shift $L\sigma$",
    "first_order": r"first order $\epsilon E\|\nabla\ell\|$, not in the paper's bound",
}
"""The bound's terms in the order in which they are piled up, and what the legend calls them."""
COLOURS = dict(zip(PARTS, ("0.6", "gold", "tab:purple", "tab:cyan"), strict=True))
BINS, DECADES = 6, 6
"""A histogram's bins a factor of ten, and how far it reaches below the largest value; what is smaller falls
into its first bin."""


def draw_diagnosis(path: Path, found: Diagnosis) -> None:
    """Draws a PNG: how eigenvalues and gradients are spread over the images, and the bound's terms."""
    models = found.models
    rows = len(_groups(models))
    lower = 1.4 + 0.75 * rows
    figure = new_figure(figsize=(10, 3.6 + lower), dpi=140, layout="constrained")
    spread, bars = figure.subfigures(2, 1, height_ratios=(3.6, lower))
    left, right = spread.subplots(1, 2, sharey=True)
    _histogram(left, models, "eigenvalue")
    left.set_xlabel(r"$\lambda_1$, largest eigenvalue of the input Hessian (dotted: mean)")
    left.set_ylabel("images, %")
    _histogram(right, models, "gradient_l2")
    right.set_xlabel(r"$\|\nabla\ell\|_2$, gradient in the image (dotted: mean)")
    left.legend(frameon=False, loc="upper left", fontsize=9)
    _draw_terms(bars.subplots(), models)
    spread.suptitle(
        f"{found.protocol}, {found.total} images, {found.norm} {found.eps} "
        rf"($\rho$ = {found.rho:.3g}), {found.attack}",
        fontsize=10,
    )
    save_png(path, figure)


def _histogram(axes: Any, models: Sequence[Diagnosed], column: str) -> None:
    """One outline a classifier, over logarithmic bins that all share."""
    values = [list(getattr(model.images, column)) for model in models]
    positive = [value for some in values for value in some if value > 0] or [1.0]
    high = math.ceil(BINS * math.log10(max(positive))) + 1
    low = max(math.floor(BINS * math.log10(min(positive))), high - BINS * DECADES) - 1
    bins = [10 ** (place / BINS) for place in range(low, high + 1)]
    for model, some in zip(models, values, strict=True):
        kept = [max(value, bins[0]) for value in some]
        (_, _, (outline,)) = axes.hist(
            kept, bins, weights=[100 / len(kept)] * len(kept), histtype="step", linewidth=1.6,
            label=model.classifier.name,
        )  # fmt: skip
        mean = math.fsum(some) / len(some)
        if mean > bins[0]:
            axes.axvline(mean, color=outline.get_edgecolor(), linestyle=":", linewidth=1.6)
    axes.set_xscale("log")
    axes.set_xlim(bins[0], bins[-1])
    axes.grid(alpha=0.3)


def _groups(models: Sequence[Diagnosed]) -> list[tuple[str, Terms]]:
    """What the lower plot has a pair of bars for."""
    found = []
    for model in models:
        found.append((f"{model.classifier.name}\nreal images", model.terms))
        if model.shift is not None:
            found.append((f"{model.classifier.name}\ndistilled images", model.shift.terms))
    return found


def _draw_terms(axes: Any, models: Sequence[Diagnosed]) -> None:
    """The bound's terms piled up, above the loss that was measured."""
    groups = _groups(models)
    used = [part for part in PARTS if any(getattr(terms, part) for _, terms in groups)]
    for row, (_, terms) in enumerate(groups):
        base = 0.0
        for part in used:
            size = getattr(terms, part)
            axes.barh(row - 0.2, size, 0.36, left=base, color=COLOURS[part])
            base += size
        axes.plot([terms.paper] * 2, [row - 0.38, row - 0.02], color="black", linewidth=2.5)
        axes.barh(row + 0.2, terms.adversarial, 0.36, color="tab:red")
        said = f" paper {terms.paper:#.3g}, with first order {base:#.3g}"
        axes.text(base, row - 0.2, said, va="center", fontsize=8)
        axes.text(
            terms.adversarial, row + 0.2, f" {terms.adversarial:#.3g}", va="center", fontsize=8
        )
    for part in used:
        axes.barh(0, 0, color=COLOURS[part], label=PARTS[part])
    axes.plot([], [], color="black", linewidth=2.5, label="where the paper's bound ends")
    axes.barh(0, 0, color="tab:red", label="measured under PGD")
    axes.set_yticks(range(len(groups)), [name for name, _ in groups])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.35 * max(max(terms.second_order, terms.adversarial) for _, terms in groups))
    axes.set_xlabel("cross-entropy in nats, mean over images")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(
        frameon=False,
        fontsize=8,
        ncols=3,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0.3,
    )
