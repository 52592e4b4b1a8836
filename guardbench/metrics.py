"""From per-image outcomes to published numbers: means, intervals, worst case, and others' scores.

Accuracies are percentages in [0, 100] unless a docstring says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist, fmean, stdev
from typing import Literal

from guardbench.fields import Strict
from guardbench.records import AnyRecord, Outcome, SeedRun

CONFIDENCE = 0.95

Basis = Literal["seeds and images", "images"]


@dataclass(frozen=True)
class Estimate:
    """The accuracy of students trained alike, with a 95% interval.

    The mean is over seeds, each counting the same. Two things make it uncertain, and the interval
    reaches as far as the larger of both on each side:

    - another seed gives another student: Student's t interval over the seeds;
    - other images give another share: Wilson's interval for that mean over the `images` distinct
      images. Seeds measured on the same images count these once, since they are not independent;
      seeds measured on disjoint slices count them all.

    Without the second, three seeds that happen to agree on 100 images would claim certainty. With
    a single seed only the second is left, and `basis` says so.

    Attributes:
        share: the mean as an exact fraction in [0, 1]; rankings compare this one.
        low, high: ends of the interval in percent, clipped to [0, 100], with the mean inside.
        basis: what the interval rests on; `images` says nothing about other seeds.
        per_seed: each seed's accuracy in percent.
        images: distinct test images measured by any seed.
        images_per_seed: images measured by each seed.
        bounded, max_distance: as in `Outcome`, the largest over seeds.
    """

    share: Fraction
    low: float
    high: float
    basis: Basis
    per_seed: tuple[float, ...]
    images: int
    images_per_seed: tuple[int, ...]
    bounded: bool
    max_distance: float

    @property
    def mean(self) -> float:
        """The mean over seeds, in percent."""
        return float(100 * self.share)


def estimate(outcomes: Sequence[Outcome]) -> Estimate:
    """Mean and 95% interval of one measurement over seeds.

    Args:
        outcomes: one a seed, at least one.

    Raises:
        ValueError: there is none.
    """
    if not outcomes:
        raise ValueError("an estimate needs at least one seed")
    shares = [Fraction(outcome.correct, outcome.total) for outcome in outcomes]
    share = sum(shares, Fraction(0)) / len(shares)
    mean = float(100 * share)
    per_seed = tuple(float(100 * s) for s in shares)
    images = _distinct(outcomes)
    low, high = wilson(float(share), images)
    basis: Basis = "images"
    if len(outcomes) > 1:
        t_low, t_high = student_t(per_seed)
        low, high, basis = min(low, t_low), max(high, t_high), "seeds and images"
    return Estimate(
        share=share,
        low=min(low, mean),
        high=max(high, mean),
        basis=basis,
        per_seed=per_seed,
        images=images,
        images_per_seed=tuple(outcome.total for outcome in outcomes),
        bounded=all(outcome.bounded for outcome in outcomes),
        max_distance=max(outcome.max_distance for outcome in outcomes),
    )


def _distinct(outcomes: Sequence[Outcome]) -> int:
    count = reached = 0
    for first, end in sorted((outcome.first, outcome.end) for outcome in outcomes):
        count += max(0, end - max(first, reached))
        reached = max(reached, end)
    return count


def wilson(share: float, total: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's score interval in percent (Wilson 1927, JASA 22) for `share` of `total` images.

    Args:
        share: the part that is right, in [0, 1].
        total: number of independent images, at least 1.
        confidence: in (0, 1).

    Raises:
        ValueError: an argument is out of range.
    """
    if not 0 <= share <= 1 or total < 1:
        raise ValueError(f"share {share} of {total} images")
    z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = math.sqrt(z2 * (share * (1 - share) / total + z2 / (4 * total**2))) / (1 + z2 / total)
    return _clip(100 * (centre - half)), _clip(100 * (centre + half))


def student_t(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Student's t interval for the mean of `values`, clipped to [0, 100].

    An accuracy cannot lie outside, though the t distribution, which knows nothing of that, can.

    Args:
        values: one percentage a seed, at least two.
        confidence: in (0, 1).

    Raises:
        ValueError: fewer than two values.
    """
    if len(values) < 2:
        raise ValueError("a t interval needs at least two values")
    mean = fmean(values)
    half = t_quantile(len(values) - 1, confidence) * stdev(values) / math.sqrt(len(values))
    return _clip(mean - half), _clip(mean + half)


def t_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """The t with P(|T| <= t) = `confidence` for an integer number of degrees of freedom.

    Bisection on the finite series for P in theta = atan(t / sqrt(degrees)) (Abramowitz and Stegun
    1964, 26.7.3 and 26.7.4): exact to rounding, and the same whatever SciPy is installed.

    Raises:
        ValueError: an argument is out of range.
    """
    if degrees < 1 or not 0 < confidence < 1:
        raise ValueError(f"t quantile of {degrees} degrees of freedom at {confidence}")
    low, high = 0.0, math.pi / 2
    for _ in range(80):
        middle = (low + high) / 2
        if _central_probability(middle, degrees) < confidence:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def _central_probability(theta: float, degrees: int) -> float:
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = degrees % 2
    term = cosine if odd else 1.0
    series = 0.0
    # Terms cos^k with k odd below `degrees` when that is odd, even otherwise.
    for k in range(odd, degrees - 1, 2):
        series += term
        term *= cosine**2 * (k + 1) / (k + 2)
    return 2 / math.pi * (theta + sine * series) if odd else sine * series


def _clip(percent: float) -> float:
    return min(100.0, max(0.0, percent))


@dataclass(frozen=True)
class WorstCase:
    """The strongest adversary of the protocol: it has all bounded attacks and picks one an image.

    Attributes:
        outcomes: one a seed; an image is right when it survives every attack in `attacks`.
        attacks: the bounded attacks, sorted.
        excluded: attacks that leave the threat model and therefore do not count here, sorted.
    """

    outcomes: tuple[Outcome, ...]
    attacks: tuple[str, ...]
    excluded: tuple[str, ...]

    @property
    def estimate(self) -> Estimate:
        """Mean and interval over seeds."""
        return estimate(self.outcomes)


def worst_case(seeds: Sequence[SeedRun]) -> WorstCase | None:
    """The worst case over attacks, over the images that all bounded attacks of a seed measured.

    On those images it is never above any of the attacks; it may be above the accuracy that an
    attack shows over more of them.

    Args:
        seeds: runs with the same attacks, at least one.

    Returns:
        None when no attack is bounded, or a seed has no image that all of them measured.
    """
    attacks = tuple(sorted(n for n, outcome in seeds[0].attacks.items() if outcome.bounded))
    excluded = tuple(sorted(n for n, outcome in seeds[0].attacks.items() if not outcome.bounded))
    outcomes = []
    for run in seeds:
        measured = [run.attacks[name] for name in attacks]
        first = max((outcome.first for outcome in measured), default=0)
        end = min((outcome.end for outcome in measured), default=0)
        if first >= end:
            return None
        flags = [
            outcome.flags()[first - outcome.first : end - outcome.first] for outcome in measured
        ]
        survived = [all(image) for image in zip(*flags, strict=True)]
        distance = max(outcome.max_distance for outcome in measured)
        outcomes.append(Outcome.from_flags(survived, first=first, max_distance=distance))
    return WorstCase(tuple(outcomes), attacks, excluded)


class Measurement(Strict):
    """An estimate as published: percent to four decimals, distances to six."""

    mean: float
    low: float
    high: float
    interval: Basis
    per_seed: tuple[float, ...]
    images: int
    images_per_seed: tuple[int, ...]
    bounded: bool
    max_distance: float

    @classmethod
    def of(cls, found: Estimate) -> Measurement:
        """Rounds `found`."""
        return cls(
            mean=round(found.mean, 4),
            low=round(found.low, 4),
            high=round(found.high, 4),
            interval=found.basis,
            per_seed=tuple(round(value, 4) for value in found.per_seed),
            images=found.images,
            images_per_seed=found.images_per_seed,
            bounded=found.bounded,
            max_distance=round(found.max_distance, 6),
        )


class WorstMeasurement(Measurement):
    """The worst case as published, with the attacks that count and those that do not."""

    attacks: tuple[str, ...]
    excluded: tuple[str, ...]

    @classmethod
    def of_worst(cls, worst: WorstCase) -> WorstMeasurement:
        """Rounds the estimate of `worst`."""
        words = Measurement.of(worst.estimate).model_dump()
        return cls(**words, attacks=worst.attacks, excluded=worst.excluded)


def robustness_ratio(clean: float, robust: Sequence[float]) -> float:
    """BEARD's RR in percent: `100 * (1 - (clean - mean) / (clean - min))` (arXiv:2411.09265).

    0 when all attacks are equally strong or none does anything.

    Args:
        clean: clean accuracy in percent.
        robust: accuracy in percent under each attack, at least one.
    """
    drop = clean - min(robust)
    return 100 * (1 - (clean - fmean(robust)) / drop) if drop else 0.0


def attack_efficiency(clean_seconds: float, attack_seconds: Sequence[float]) -> float:
    """BEARD's AE in percent: `100 * (mean - clean) / (max - clean)` of times (arXiv:2411.09265).

    0 when the slowest attack takes no longer than the clean pass.

    Args:
        clean_seconds: time to classify the clean images.
        attack_seconds: time of each attack on the same images, at least one.
    """
    extra = max(attack_seconds) - clean_seconds
    return 100 * (fmean(attack_seconds) - clean_seconds) / extra if extra > 0 else 0.0


def crei(ratio: float, efficiency: float, alpha: float = 0.5) -> float:
    """BEARD's CREI in percent: `alpha * RR + (1 - alpha) * AE` (arXiv:2411.09265)."""
    return alpha * ratio + (1 - alpha) * efficiency


@dataclass(frozen=True)
class Beard:
    """BEARD's three numbers of one record, in percent.

    Attributes:
        ratio, efficiency, crei: see `robustness_ratio`, `attack_efficiency`, `crei`.
        attacks: over which they were taken.
    """

    ratio: float
    efficiency: float
    crei: float
    attacks: tuple[str, ...]


def beard(record: AnyRecord) -> Beard | None:
    """BEARD's numbers over a record's bounded attacks, at least two; None where they cannot be had.

    Accuracies are means over seeds, on the images that all of the attacks measured. An attack's time is
    its stages' seconds by image, since attacks may see different numbers of images, and those of the
    columns that it took over (`StageCost.after`).
    """
    seconds = {stage.stage: stage.seconds for stage in record.cost}
    after = {stage.stage: stage.after for stage in record.cost}
    seeds = record.seeds
    names = tuple(name for name in record.attack_names if seeds[0].attacks[name].bounded)
    stages = {f"{name} {run.seed}" for name in ("clean", *names) for run in seeds}
    if len(names) < 2 or not stages <= seconds.keys():
        return None
    shares: dict[str, list[float]] = {name: [] for name in ("clean", *names)}
    for run in seeds:
        outcomes = {"clean": run.clean, **{name: run.attacks[name] for name in names}}
        first = max(outcome.first for outcome in outcomes.values())
        end = min(outcome.end for outcome in outcomes.values())
        if end <= first:
            return None
        for name, outcome in outcomes.items():
            flags = outcome.flags()[first - outcome.first : end - outcome.first]
            shares[name].append(100 * sum(flags) / len(flags))

    def time(name: str) -> float:
        found = [run.clean if name == "clean" else run.attacks[name] for run in seeds]
        spent = sum(seconds[f"{name} {run.seed}"] for run in seeds)
        return spent / sum(outcome.total for outcome in found)

    own = {name: time(name) for name in names}
    times = {
        name: own[name] + sum(own.get(other, 0) for other in after[f"{name} {seeds[0].seed}"])
        for name in names
    }
    means = {name: fmean(values) for name, values in shares.items()}
    ratio = robustness_ratio(means["clean"], [means[name] for name in names])
    efficiency = attack_efficiency(time("clean"), list(times.values()))
    return Beard(ratio, efficiency, crei(ratio, efficiency), names)
