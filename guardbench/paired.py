"""Paired outcomes of two sets of students: McNemar's test, and intervals of the difference.

Sources: McNemar 1947, "Note on the sampling error of the difference between correlated proportions
or percentages", Psychometrika 12; Tango 1998, "Equivalence test and confidence interval for the
difference in proportions for the paired-sample design", Statistics in Medicine 17; Efron and
Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13 (percentile interval); Owen 2007,
"The pigeonhole bootstrap", Annals of Applied Statistics 1 (two crossed factors); Holm 1979, "A
simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

import numpy as np
from numpy.typing import NDArray

from guardbench.metrics import CONFIDENCE, Basis, t_quantile
from guardbench.records import Outcome

RESAMPLES = 10_000
BOOTSTRAP_SEED = 20_070_101

_BATCH = 1000  # resamples drawn at once, so that memory does not grow with their number
_ABSENT = 2  # in a table of differences: this seed did not measure this image


@dataclass(frozen=True)
class Pairs:
    """Outcomes of one measurement in both records, on the images that both measured.

    Attributes:
        seeds: numbers of the S seeds with at least one such image.
        a, b: bool [N, S], right or not, over the N images that any of these seeds has in both.
        measured: bool [N, S], whether that seed measured that image; `a`, `b` are False elsewhere.
    """

    seeds: tuple[int, ...]
    a: NDArray[np.bool_]
    b: NDArray[np.bool_]
    measured: NDArray[np.bool_]

    @property
    def difference(self) -> NDArray[np.int8]:
        """Int8 [N, S] in {-1, 0, 1}: 1 where only A is right; 0 too where nothing was measured."""
        return self.a.astype(np.int8) - self.b.astype(np.int8)

    @property
    def by_image(self) -> tuple[int, int]:
        """How many images more seeds of A have right than of B, and the other way round."""
        net = self.difference.sum(axis=1, dtype=np.int64)
        return int((net > 0).sum()), int((net < 0).sum())

    @property
    def net(self) -> tuple[float, float]:
        """How many images A has right beyond B, and the other way round, each by its share of the seeds.

        Over the number of images, their difference is that of the accuracies' means over seeds.
        """
        shares = (self.difference / self.measured.sum(axis=0)).mean(axis=1) * len(self.measured)
        return float(shares.clip(min=0).sum()), float((-shares).clip(min=0).sum())


def mcnemar(only_a: int, only_b: int) -> float:
    """McNemar's exact two-sided p: the binomial test of `only_a` against `only_b` at one half.

    Outcomes on which both agree say nothing about the difference, and do not enter. The pairs have
    to be independent given the two networks: one pair an image.

    Args:
        only_a, only_b: discordant pairs, at least 0.

    Returns:
        `min(1, 2 * P(X <= min(only_a, only_b)))` with X binomial; 1.0 without a discordant pair.

    Raises:
        ValueError: a count is negative.
    """
    if min(only_a, only_b) < 0:
        raise ValueError(f"counts of {only_a} and {only_b} pairs")
    total, k = only_a + only_b, min(only_a, only_b)
    if 2 * k >= total - 1:  # the lower half of the distribution, or more
        return 1.0
    logarithm = math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1)
    term = math.exp(logarithm - total * math.log(2))
    tail = 0.0
    # Terms shrink on the way down from the middle; below one part in 1e17 they change nothing.
    while k >= 0 and term > 1e-17 * tail:
        tail += term
        term *= k / (total - k + 1)
        k -= 1
    return min(1.0, 2 * tail)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: rejecting those below 0.05 keeps the chance of
    any false rejection at 5%, however the tests depend on each other."""
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def pair(seeds: Sequence[int], a: Sequence[Outcome], b: Sequence[Outcome]) -> Pairs | None:
    """Outcomes of both on the images that both measured under the same seed; None without any.

    Args:
        seeds: their numbers, one for each of `a` and of `b`.
    """
    both = [
        (seed, ours, theirs, max(ours.first, theirs.first), min(ours.end, theirs.end))
        for seed, ours, theirs in zip(seeds, a, b, strict=True)
    ]
    both = [entry for entry in both if entry[3] < entry[4]]
    if not both:
        return None
    start, end = min(entry[3] for entry in both), max(entry[4] for entry in both)
    tables = np.zeros((3, end - start, len(both)), dtype=np.bool_)
    for column, (_, ours, theirs, first, behind) in enumerate(both):
        rows = slice(first - start, behind - start)
        tables[0, rows, column] = ours.flags()[first - ours.first : behind - ours.first]
        tables[1, rows, column] = theirs.flags()[first - theirs.first : behind - theirs.first]
        tables[2, rows, column] = True
    kept = tables[:, tables[2].any(axis=1)]
    return Pairs(tuple(entry[0] for entry in both), kept[0], kept[1], kept[2])


def interval(pairs: Pairs, *, resamples: int = RESAMPLES) -> tuple[float, float, Basis]:
    """The 95% interval of A's accuracy minus B's, in percentage points, and what it rests on.

    It reaches, on each side, as far as the larger of

    - the two-level bootstrap (`bootstrap`), over seeds and images;
    - Tango's score interval (`score_interval`) over the distinct images;
    - Student's t over the seeds' differences, with two seeds or more.

    The second is there because a bootstrap knows no outcomes but those that were seen: where no
    image differs, or every one does, it claims certainty. The third is there because a bootstrap
    over three seeds cannot reach beyond these three. In simulations (3 seeds, 300 images, 400
    repeats) the first alone covers the truth in 85 of 100 cases where students of one kind differ
    by 8 points (standard deviation), all together in 95 or so. Where students hardly differ, any
    covers it in 97 to 99: the interval is on the careful side. With one seed, only images are
    resampled.

    Raises:
        ValueError: fewer than 80 resamples, with which 2.5% are not two.
    """
    low, high = bootstrap(pairs, resamples=resamples)
    score = score_interval(*pairs.net, len(pairs.measured))
    low, high = min(low, score[0]), max(high, score[1])
    per_seed = pairs.difference.sum(axis=0, dtype=np.int64) / pairs.measured.sum(axis=0)
    values = [100 * float(value) for value in per_seed]
    if len(values) < 2:
        return low, high, "images"
    mean = fmean(values)
    half = t_quantile(len(values) - 1, CONFIDENCE) * stdev(values) / math.sqrt(len(values))
    low, high = max(-100.0, min(low, mean - half)), min(100.0, max(high, mean + half))
    return low, high, "seeds and images"


def score_interval(only_a: float, only_b: float, images: int) -> tuple[float, float]:
    """Tango's score interval (95%) of `(only_a - only_b) / images`, in points (Tango 1998, section 3).

    It holds every difference that the score test of paired shares does not reject: without a
    discordant image those within z^2 / (images + z^2). Where an image counts by its share of the
    seeds it is on the careful side, since its variance takes every image for wholly discordant.

    Args:
        only_a, only_b: discordant images, at least 0; together at most `images`.
    """
    return -_upper_score(only_b, only_a, images), _upper_score(only_a, only_b, images)


def _upper_score(only_a: float, only_b: float, images: int) -> float:
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    low, high = (only_a - only_b) / images, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        # The likeliest share of `only_b` if the difference were `middle`: the root of a quadratic.
        linear = (2 * images - only_a + only_b) * middle - only_a - only_b
        square = linear**2 + 8 * images * only_b * middle * (1 - middle)
        share = (math.sqrt(max(0.0, square)) - linear) / (4 * images)
        variance = max(0.0, images * (2 * share + middle * (1 - middle)))
        if images * middle - (only_a - only_b) > z * math.sqrt(variance):
            high = middle
        else:
            low = middle
    return 100 * high


def bootstrap(pairs: Pairs, *, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Percentile interval (95%) of A's accuracy minus B's, in points: seeds and images resampled.

    Each resample draws S of the S seeds, and of the images as many as there are, both with
    replacement; an image brings its outcomes under all seeds with it, so that what seeds share
    through their images stays shared (Owen 2007). Images are drawn within those that the same
    seeds measured, since a protocol fixes the slices. Images with the same outcomes are drawn
    together, as one multinomial count: the same distribution, at a cost that does not grow with
    the images. The random stream is fixed, and swapping A and B mirrors the interval exactly.

    Raises:
        ValueError: fewer than 80 resamples, with which 2.5% are not two.
    """
    if resamples < 80:
        raise ValueError(f"{resamples} resamples are too few for a 95% interval")
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    strata, per_seed = _strata(pairs), pairs.measured.sum(axis=0)
    seeds = len(pairs.seeds)
    means = np.empty(resamples)
    for start in range(0, resamples, _BATCH):
        size = min(_BATCH, resamples - start)
        sums = np.zeros((size, seeds))
        for patterns, counts in strata:
            sums += rng.multinomial(counts.sum(), counts / counts.sum(), size=size) @ patterns
        weights = rng.multinomial(seeds, [1 / seeds] * seeds, size=size) / seeds
        means[start : start + size] = (weights * sums / per_seed).sum(axis=1)
    means.sort()
    outside = int(resamples * (1 - CONFIDENCE) / 2 + 1e-9)
    return 100 * float(means[outside - 1]), 100 * float(means[resamples - outside])


def _strata(pairs: Pairs) -> list[tuple[NDArray[np.float64], NDArray[np.int64]]]:
    """For each set of images measured by the same seeds: distinct rows of outcomes, and counts."""
    table = np.where(pairs.measured, pairs.difference, np.int8(_ABSENT))
    _, index, counts = np.unique(table, axis=0, return_index=True, return_counts=True)
    # By first appearance, not by value: then the order is the same with A and B swapped.
    order = np.argsort(index)
    index, counts = index[order], counts[order]
    kinds: dict[bytes, list[int]] = {}
    for i, row in enumerate(index):
        kinds.setdefault(pairs.measured[row].tobytes(), []).append(i)
    rows = pairs.difference.astype(np.float64)
    return [(rows[index[kind]], counts[kind].astype(np.int64)) for kind in kinds.values()]
