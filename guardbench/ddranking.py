"""DD-Ranking's scores (arXiv:2505.13300): what a distilled set is worth beside a random subset.

Accuracies are clean and in [0, 1]. A record holds what they need where its students were trained
with references (`guardbench.references`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import fmean

from guardbench.fields import Strict
from guardbench.records import Reference, ResultRecord


class Scores(Strict):
    """The scores of one record; None for one that is not known.

    Attributes:
        ior: improvement over the random subset of the same size trained the same way, in [-1, 1].
        hlr: hard-label recovery, in [-1, 1]; needs the whole training set's accuracy.
        lrs, ars: label-robust and augmentation-robust score, in [0, 1].
    """

    ior: float | None
    hlr: float | None
    lrs: float | None
    ars: float | None


def scores(record: ResultRecord, whole: float | None) -> Scores | None:
    """The scores of a record, means over its students; None where it holds no references.

    Args:
        whole: accuracy in [0, 1] of students trained on the whole training set with hard labels,
            under the same protocol; None where nobody has measured it.
    """
    clean = fmean(run.clean.correct / run.clean.total for run in record.seeds)
    random, plain, plain_random = (
        _mean(record, way) for way in ("random", "plain", "random-plain")
    )
    hard = clean if record.artifact.label_kind == "hard" else _mean(record, "hard")
    if not record.seeds[0].references:
        return None
    ior = None if random is None else improvement_over_random(clean, random)
    hlr = None if whole is None or hard is None else hard_label_recovery(whole, hard)
    ars = None
    if ior is not None and plain is not None and plain_random is not None:
        ars = augmentation_robust_score(ior, plain - plain_random)
    found = {
        "ior": ior,
        "hlr": hlr,
        "lrs": None if hlr is None or ior is None else label_robust_score(ior, hlr),
        "ars": ars,
    }
    return Scores(
        **{name: None if value is None else round(value, 6) for name, value in found.items()}
    )


def whole_set(records: Iterable[ResultRecord]) -> float | None:
    """Accuracy in [0, 1] of students of a whole training set with hard labels, if a record has it.

    Args:
        records: of one protocol; the first official one of the method `full` counts.
    """
    for record in records:
        method = record.method
        if method.distiller == "full" and method.official and record.artifact.label_kind == "hard":
            return fmean(run.clean.correct / run.clean.total for run in record.seeds)
    return None


CALLED: dict[Reference, str] = {
    "random": "a random subset trained the same way",
    "hard": "with hard labels",
    "plain": "without augmentation",
    "random-plain": "the random subset without augmentation",
}
"""Reference -> what its students were trained on, in words."""


def in_words(record: ResultRecord) -> str | None:
    """The references and the scores of a record in a sentence; None where it holds none."""
    found = scores(record, None)
    if found is None:
        return None
    means = {name: _mean(record, way) for way, name in CALLED.items()}
    beside = ", ".join(
        f"{name} {100 * mean:.1f}" for name, mean in means.items() if mean is not None
    )
    if found.ior is None:
        return f"Beside it, clean: {beside}."
    ars = "" if found.ars is None else f", ARS {found.ars:.3f}"
    return (
        f"Beside it, clean: {beside}. DD-Ranking (arXiv:2505.13300): IOR {100 * found.ior:+.1f} "
        f"points{ars}; LRS stands on the board where the whole training set is measured."
    )


def _mean(record: ResultRecord, way: Reference) -> float | None:
    """Mean accuracy of the reference students of a way; None where there are none."""
    found = [run.references[way] for run in record.seeds if way in run.references]
    return fmean(outcome.correct / outcome.total for outcome in found) if found else None


def hard_label_recovery(real_hard: float, distilled_hard: float) -> float:
    """DD-Ranking's HLR (arXiv:2505.13300): what distilling lost when labels are hard.

    Args:
        real_hard: accuracy in [0, 1] of a student trained on the whole real set, hard labels.
        distilled_hard: the same on the distilled set.

    Returns:
        The gap, in [-1, 1]; smaller is better.
    """
    return real_hard - distilled_hard


def improvement_over_random(distilled: float, random: float) -> float:
    """DD-Ranking's IOR (arXiv:2505.13300), in [-1, 1]; larger is better.

    Args:
        distilled: accuracy in [0, 1] of a student trained on the distilled set in its own way.
        random: the same way of training on a random subset of the same size.
    """
    return distilled - random


def label_robust_score(ior: float, hlr: float, weight: float = 0.5) -> float:
    """DD-Ranking's LRS (arXiv:2505.13300): `weight * IOR - (1 - weight) * HLR`, in [0, 1]."""
    return _exponential_scale(weight * ior - (1 - weight) * hlr)


def augmentation_robust_score(augmented: float, plain: float, weight: float = 0.5) -> float:
    """DD-Ranking's ARS (arXiv:2505.13300), scaled to [0, 1].

    Args:
        augmented: accuracy in [0, 1] above that of the random subset, both with augmentation.
        plain: the same without augmentation.
        weight: of the first, in [0, 1].
    """
    return _exponential_scale(weight * augmented + (1 - weight) * plain)


def _exponential_scale(value: float) -> float:
    """Maps -1 to 0 and 1 to 1, steeper on the right."""
    return (math.exp(value) - math.exp(-1)) / (math.e - math.exp(-1))
