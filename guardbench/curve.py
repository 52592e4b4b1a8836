"""Security curves: robust accuracy over the radius, without starting anew at each one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from guardbench.attacks.base import Images, plan_batches, run_batch, score_clean
from guardbench.attacks.searched import searchable
from guardbench.attacks.stream import telling, within
from guardbench.attacks.warm import WarmPGD
from guardbench.classifiers import fingerprint
from guardbench.curve_files import MOST, Curve, Point
from guardbench.errors import GuardbenchError
from guardbench.figures import new_figure, save_png
from guardbench.imported import Imported
from guardbench.metrics import wilson
from guardbench.protocol import parse_fraction
from guardbench.provenance import ENGINE_VERSION
from guardbench.runtime import Run
from guardbench.scoring import attack_batch
from guardbench.stages import StageFolder
from guardbench.threat import Norm, ThreatModel

SHARES = ("1/4", "1/2", "3/4", "1", "3/2", "2", "3", "4", "6", "8", "16", "32")
"""Radii of a curve, unless told, in radii of the protocol; in l-inf none over 1, where every image is any
other, and 1 last."""
STEPS = 40
FARTHEST = 1000
"""The largest radius that a curve may have."""


def rising_radii(text: str | None, threat: ThreatModel) -> tuple[Fraction, ...]:
    """The radii that `text` lists, such as `0.5/255,1/255`; by default `SHARES` of the protocol's,
    and 1 in l-inf.

    Raises:
        GuardbenchError: they are not positive and rising.
    """
    if text is None:
        wanted = [Fraction(share) * threat.eps for share in SHARES]
        if threat.norm == "linf":
            wanted = [*(eps for eps in wanted if eps < 1), Fraction(1)]
        return tuple(wanted)
    try:
        radii = tuple(parse_fraction(part) for part in text.split(","))
    except ValueError as error:
        raise GuardbenchError(f"--radii: {error}.") from error
    if radii[0] <= 0 or any(a >= b for a, b in pairwise(radii)):
        raise GuardbenchError(f"--radii {text}: must be positive and rise.")
    if threat.norm == "linf" and radii[-1] > 1:
        raise GuardbenchError(
            f"--radii {text}: in l-inf none is over 1, where every image is any other; did you mean "
            f"{radii[-1]}/255?"
        )
    if len(radii) > MOST or radii[-1] > FARTHEST or max(eps.denominator for eps in radii) > 10**15:
        raise GuardbenchError(
            f"--radii: at most {MOST}, none over {FARTHEST}, as fractions of at most 15 digits."
        )
    return radii


def security_curve(
    model: nn.Module,
    x: Images,
    y: Tensor,
    norm: Norm,
    radii: Sequence[Fraction],
    *,
    searched: nn.Module | None = None,
    steps: int = STEPS,
    batch_size: int = 256,
    told: Callable[[int], None] = lambda _: None,
    skipped: Callable[[int], None] = lambda _: None,
    state: Mapping[str, Any] | None = None,
    keep: Callable[[dict[str, Any]], None] = lambda _: None,
) -> Tensor:
    """At which radius each image is broken.

    At each radius PGD attacks the images that no smaller one has broken, from where it stood at the last
    one; an image broken once is broken at every larger radius, whose ball holds the smaller. Biggio &
    Roli, Pattern Recognition 2018 (arXiv:1712.03141), section 4.4, ask for such curves. An image that
    survives all costs `steps * len(radii)` gradients.

    Args:
        model: in eval mode; the verdicts are its own (`run_batch`). Where two scorings of an image differ,
            as of a model that answers at random, it counts as broken when one is wrong.
        x, y: images [N, C, H, W] in [0, 1] and labels [N].
        radii: rising.
        searched: see `run_batch`.
        batch_size: images at a time; no more are decoded at once.
        told: hears how many images a finished batch had.
        skipped: hears how many images are wrong when clean, or were finished by an earlier run.
        state: from which an earlier run is to go on, as `keep` heard it.
        keep: hears after each radius what a later run needs to go on from there.

    Returns:
        int64 [N]: 0 for wrong when clean, k for broken at `radii[k - 1]`, `len(radii) + 1` for none.
    """
    if state is None:
        clean = score_clean(model, x, y, batch_size=batch_size)
        state = {"found": torch.where(clean, len(radii) + 1, 0), "batch": 0, "radius": 0}
    found: Tensor = state["found"].clone()
    begun, behind = int(state["batch"]), int(state["radius"])
    batches = plan_batches(found > 0, batch_size)
    skipped(int((found == 0).sum()) + sum(map(len, batches[:begun])))
    for number, index in enumerate(batches[begun:], start=begun):
        attack = WarmPGD(ThreatModel(norm, radii[0]), x[index], steps)
        if behind:
            attack.ended = state["ended"]
        left = index[found[index] > len(radii)]
        for place, eps in enumerate(radii[behind:], start=behind + 1):
            if not len(left):
                break
            attack.threat = ThreatModel(norm, eps)
            with within((place - 1) / len(radii), place / len(radii)):
                outcome = run_batch(
                    attack, model, x, y, left, seed=0, searched=searched, steady=False
                )
            found[left[outcome.broken]] = place
            left = left[~outcome.broken]
            keep({"found": found, "batch": number, "radius": place, "ended": attack.ended})
        behind = 0
        told(len(index))
    return found


def stored_curve(
    run: Run,
    imported: Imported,
    x: Images,
    y: Tensor,
    norm: Norm,
    radii: Sequence[Fraction],
    *,
    test_digest: str,
    images_digest: str,
) -> tuple[Tensor, str]:
    """`security_curve` as a stage of a run: a finished one is read, a killed one goes on.

    Args:
        imported: the classifier, on the run's device.
        x, y, norm, radii: see `security_curve`.
        test_digest: of the decoded split that the images are from.
        images_digest: of their ids, in order.

    Returns:
        What `security_curve` gives, and the device that it was measured on.
    """
    size = attack_batch(x.shape[-1])
    words = {
        "stage": "curve", "version": ENGINE_VERSION, "test": test_digest, "list": images_digest,
        "classifier": fingerprint(imported, x[:8], y[:8], run.device),
        "norm": norm, "radii": [str(eps) for eps in radii], "steps": STEPS, "batch": size,
    }  # fmt: skip
    folder = run.stage("curve", "curves", words)
    with folder.claimed() as stored:
        if stored is None:
            stored = _measured(run, folder, imported, x, y, norm, radii)
    return torch.tensor(stored["found"]), str(stored["cost"]["device"])


def _measured(
    run: Run,
    folder: StageFolder,
    imported: Imported,
    x: Images,
    y: Tensor,
    norm: Norm,
    radii: Sequence[Fraction],
) -> dict[str, Any]:
    size = attack_batch(x.shape[-1])
    state = folder.begin(run.device)

    def keep(state: dict[str, Any]) -> None:
        if folder.due():
            folder.checkpoint(state)

    with run.progress.stage("curve", len(x), "images") as bar:

        def tell(share: float, alive: int) -> None:
            bar.within(share * min(size, len(x) - bar.done), f"{alive} of a batch not yet broken")

        with telling(tell):
            found = security_curve(
                imported.model, x, y, norm, radii,
                searched=searchable(imported.model, x[:8].to(run.device)),
                batch_size=size, told=bar.advance, skipped=bar.skip, state=state, keep=keep,
            )  # fmt: skip
    return folder.finish(run.device, found=found.tolist())


def points_of(found: Tensor, radii: Sequence[Fraction]) -> tuple[Point, ...]:
    """The curve's points out of what `security_curve` gives."""
    counts = [int((found > place).sum()) for place in range(len(radii) + 1)]
    return tuple(
        Point(eps=str(eps), correct=count)
        for eps, count in zip([Fraction(0), *radii], counts, strict=True)
    )


def above_chance(points: Sequence[Point], total: int, classes: int, norm: Norm) -> tuple[str, ...]:
    """The flag of a curve that does not fall: at its last radius clearly more than 1 in `classes` is right.

    An attack without a bound that does not break every image was misled (Athalye et al., ICML 2018,
    arXiv:1802.00420, section 3.1), and counts that never rise would draw that as a line. Clearly: the 95%
    Wilson interval lies above chance. Only an l-inf radius of one half or more is judged, at which every
    image can be made plain grey: a curve that ends earlier says nothing.

    Returns:
        One line, or none.
    """
    last, chance = points[-1], 100 / classes
    grey = norm == "linf" and Fraction(last.eps) >= Fraction(1, 2)
    if not grey or wilson(last.correct / total, total)[0] <= chance:
        return ()
    return (
        f"above-chance: {100 * last.correct / total:.1f}% right at the largest radius, "
        f"{in_255ths(Fraction(last.eps))}/255 (chance {chance:.1f}%): the gradients mislead PGD",
    )


def require_alike(curves: Sequence[tuple[Path, Curve]], words: dict[str, object]) -> None:
    """Refuses curves that do not belong into one figure with a curve of these fields.

    Args:
        words: `protocol_sha256`, `norm`, `steps` and `total` of the other.
    """
    for path, curve in curves:
        for field, wanted in words.items():
            if (found := getattr(curve, field)) != wanted:
                raise GuardbenchError(
                    f"--beside {path}: its {field} is {found}, here it is {wanted}; draw them apart."
                )


def draw_curves(path: Path, curves: Sequence[Curve]) -> None:
    """Draws curves into a PNG, each with its 95% Wilson band, and says which are flagged.

    `require_alike` says which belong together.
    """
    first = curves[0]
    figure = new_figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    ticks: dict[float, str] = {}
    for curve in curves:
        radii = [float(Fraction(point.eps)) for point in curve.points]
        shares = [point.correct / curve.total for point in curve.points]
        bands = [wilson(share, curve.total) for share in shares]
        (line,) = axes.plot(
            radii, [100 * s for s in shares], marker="o", markersize=3.5,
            label=curve.classifier + (" (flagged: ends above chance)" if curve.flags else ""),
        )  # fmt: skip
        low, high = zip(*bands, strict=True)
        axes.fill_between(radii, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        told = in_255ths if first.norm == "linf" else lambda eps: f"{float(eps):g}"
        ticks |= {float(Fraction(p.eps)): told(Fraction(p.eps)) for p in curve.points}
    # Linear up to the smallest radius, so that clean accuracy has a place; logarithmic beyond.
    axes.set_xscale("symlog", linthresh=min(value for value in ticks if value), linscale=0.5)
    axes.set_xticks([*ticks], [*ticks.values()])
    axes.minorticks_off()
    unit = " x 255" if first.norm == "linf" else ""
    axes.set_xlabel(f"radius in {first.norm}{unit}")
    axes.set_ylabel(f"accuracy under PGD-{first.steps}, %")
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    axes.set_title(f"{first.protocol}, {first.total} images", fontsize=10)
    axes.legend(frameon=False)
    save_png(path, figure)


def in_255ths(eps: Fraction) -> str:
    """A radius times 255, as a reader of pixels knows it."""
    value = float(255 * eps)
    return f"{value:g}" if value < 1000 else f"{value:.0f}"
