"""Two records, outcome by outcome: which is higher, by how much, and whether that stands.

Outcomes are paired by seed number and image. What the same image does to both is then no noise: on
one set of images, paired intervals are narrower than two intervals side by side.

What is tested, and what is not: the students and the images are samples; the two distilled sets are
not. One distilled set a side says nothing about another run of either distillation, whose numbers
may lie further apart than the interval here.

The tests and intervals, and their sources, are in `guardbench.paired`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from guardbench.errors import GuardbenchError
from guardbench.fields import Line, Name, Sha256, Strict, only_const, printable
from guardbench.metrics import CONFIDENCE, Basis, worst_case
from guardbench.paired import RESAMPLES, Pairs, holm, interval, mcnemar, pair
from guardbench.records import ENGINE, AnyRecord, Outcome, ResultRecord, SeedRun

COMPARISON_VERSION: Literal[1] = 1

Verdict = Literal["A higher", "B higher", "does not stand"]


class Counts(Strict):
    """Discordant outcomes, and McNemar's exact p for them.

    Attributes:
        only_a, only_b: how many only A, or only B, has right.
        p: two-sided, in [0, 1], for those two counts alone, six digits.
    """

    only_a: int = Field(ge=0)
    only_b: int = Field(ge=0)
    p: float = Field(ge=0.0, le=1.0)

    @classmethod
    def of(cls, only_a: int, only_b: int) -> Counts:
        """Counts with their p."""
        return cls(only_a=only_a, only_b=only_b, p=_digits(mcnemar(only_a, only_b)))


class SeedCounts(Counts):
    """One pair of students: those that both records have under the number `seed`."""

    seed: int
    images: int = Field(ge=1)


class Row(Strict):
    """One measurement in both records, percentages to four decimals.

    Attributes:
        measurement: `clean`, an attack's name, or `worst_case` (see `guardbench.metrics`).
        bounded: the attack is held inside the threat model in both records.
        images: distinct images that both measured; images_per_seed: those of each seed.
        a, b: accuracies on the paired images, in [0, 100]: the mean over seeds.
        difference: `a - b`, in percentage points; low, high: its 95% interval, in [-100, 100]; both 0
            where the records hold one result.
        interval: what the interval rests on; `images` says nothing about other seeds.
        by_image: images that more students of A have right than of B, and the other way round.
            Each image counts once, so that this p holds when seeds share their images; with one
            seed, or disjoint slices, it is McNemar's own test.
        p_holm: p of `by_image` after Holm's correction over the rows.
        by_seed: McNemar's test on the images of each seed; it is about that pair of networks.
        pooled: the counts of all seeds together. Descriptive only: see `compare`.
        verdict: see `compare`.
    """

    measurement: str
    bounded: bool
    images: int
    images_per_seed: tuple[int, ...]
    a: float
    b: float
    difference: float
    low: float
    high: float
    interval: Basis
    by_image: Counts
    p_holm: float
    by_seed: tuple[SeedCounts, ...]
    pooled: Counts
    verdict: Verdict


class Side(Strict):
    """One of the two records.

    Attributes:
        name: of the method, or of the classifier.
        title: as people write it.
        made_from: what distinguishes it from others of that name.
        measured_sha256: of the distilled set or of the weights; None where it is not known.
        result_sha256: of what was found.
    """

    name: Name
    title: Line
    made_from: Line
    measured_sha256: Sha256 | None
    result_sha256: Sha256


class Comparison(Strict):
    """Two records under one protocol, row by row; `notes` are what a reader has to know besides."""

    schema_version: Literal[1] = Field(default=COMPARISON_VERSION, json_schema_extra=only_const)
    protocol: Name
    protocol_sha256: Sha256
    a: Side
    b: Side
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


def compare(a: AnyRecord, b: AnyRecord, *, resamples: int = RESAMPLES) -> Comparison:
    """Compares two records, measurement by measurement, on the seeds and images that both have.

    The accuracy of a row is the mean over seeds, as everywhere here. Where all seeds measure the
    same images, that is the mean over images of the share of seeds that have the image right, and
    the paired difference of an image lies in [-1, 1].

    A difference stands when two things agree, since either alone can mislead:

    - its 95% interval (`interval`) excludes 0: other students and other images, for this row alone;
    - McNemar's p over images, by Holm's correction over all rows, is below 0.05, and the higher
      side is the same: that some row of many stands by chance of the images is held to 5%.

    Seeds are never pooled for a test. The students of several seeds get the same images right or
    wrong, for the same reasons, so 3 x 300 outcomes are no 900 independent ones: a pooled p is too
    small (it claims more than was seen) wherever images recur over seeds.

    Args:
        a, b: under one protocol and on the same test images.
        resamples: of the bootstrap.

    Raises:
        GuardbenchError: the records are of different protocols or test images, or share no image.
    """
    _refuse_unlike(a, b)
    numbers = sorted({run.seed for run in a.seeds} & {run.seed for run in b.seeds})
    measured = _measurements(a, b, numbers)
    found = {name: pair(numbers, ours, theirs) for name, (ours, theirs) in measured.items()}
    if "clean" not in found or found["clean"] is None:
        raise GuardbenchError(
            "A and B share no image: no seed number measured the same part of the test list in "
            f"both ({_extent(a)} in A, {_extent(b)} in B); run both with the protocol's own seeds."
        )
    pairs = {name: pairs for name, pairs in found.items() if pairs is not None}
    by_image = {name: each.by_image for name, each in pairs.items()}
    p_holm = holm([mcnemar(*counts) for counts in by_image.values()])
    same = a.result_sha256 == b.result_sha256
    rows = [
        _row(name, each, by_image[name], p, _is_bounded(a, b, name), resamples, same)
        for (name, each), p in zip(pairs.items(), p_holm, strict=True)
    ]
    return Comparison(
        protocol=a.protocol,
        protocol_sha256=a.protocol_sha256,
        a=_side(a),
        b=_side(b),
        rows=tuple(rows),
        notes=tuple(_notes(a, b, numbers, set(pairs))),
    )


def _row(
    name: str,
    pairs: Pairs,
    by_image: tuple[int, int],
    p_holm: float,
    bounded: bool,
    resamples: int,
    same: bool,
) -> Row:
    images = pairs.measured.sum(axis=0)
    low, high, basis = interval(pairs, resamples=resamples)
    if same:  # one result, which does not differ from itself
        low, high = 0.0, 0.0
    a, b = (100 * float((right.sum(axis=0) / images).mean()) for right in (pairs.a, pairs.b))
    only_a, only_b = (pairs.difference == 1).sum(axis=0), (pairs.difference == -1).sum(axis=0)
    verdict: Verdict = "does not stand"
    if p_holm < 1 - CONFIDENCE:
        if low > 0 and by_image[0] > by_image[1]:
            verdict = "A higher"
        elif high < 0 and by_image[0] < by_image[1]:
            verdict = "B higher"
    by_seed = [
        SeedCounts(**Counts.of(int(x), int(y)).model_dump(), seed=seed, images=int(count))
        for seed, count, x, y in zip(pairs.seeds, images, only_a, only_b, strict=True)
    ]
    return Row(
        measurement=name,
        bounded=bounded,
        images=len(pairs.measured),
        images_per_seed=tuple(int(count) for count in images),
        a=round(a, 4),
        b=round(b, 4),
        difference=round(a - b, 4) + 0.0,  # no -0.0
        low=round(low, 4) + 0.0,
        high=round(high, 4) + 0.0,
        interval=basis,
        by_image=Counts.of(*by_image),
        p_holm=_digits(p_holm),
        by_seed=tuple(by_seed),
        pooled=Counts.of(int(only_a.sum()), int(only_b.sum())),
        verdict=verdict,
    )


def _measurements(
    a: AnyRecord, b: AnyRecord, numbers: Sequence[int]
) -> dict[str, tuple[list[Outcome], list[Outcome]]]:
    """Clean, every attack that both have, and the worst case over the bounded ones of these."""
    ours, theirs = _runs(a, numbers), _runs(b, numbers)
    if not numbers:
        return {}
    found = {"clean": ([run.clean for run in ours], [run.clean for run in theirs])}
    shared = sorted(set(a.attack_names) & set(b.attack_names))
    for name in shared:
        found[name] = ([r.attacks[name] for r in ours], [r.attacks[name] for r in theirs])
    # An attack that only one record has would make that record's worst case the worse one.
    bounded = [name for name in shared if _is_bounded(a, b, name)]
    worst = [worst_case([_only(run, bounded) for run in runs]) for runs in (ours, theirs)]
    if worst[0] is not None and worst[1] is not None:
        found["worst_case"] = list(worst[0].outcomes), list(worst[1].outcomes)
    return found


def _runs(record: AnyRecord, numbers: Sequence[int]) -> list[SeedRun]:
    by_number = {run.seed: run for run in record.seeds}
    return [by_number[number] for number in numbers]


def _only(run: SeedRun, attacks: Sequence[str]) -> SeedRun:
    return run.model_copy(update={"attacks": {name: run.attacks[name] for name in attacks}})


def _is_bounded(a: AnyRecord, b: AnyRecord, name: str) -> bool:
    if name not in a.attack_names:
        return True  # clean, and the worst case
    return all(record.seeds[0].attacks[name].bounded for record in (a, b))


def _refuse_unlike(a: AnyRecord, b: AnyRecord) -> None:
    if a.tier != b.tier:
        raise GuardbenchError(
            f"A is of tier {a.tier} and B of tier {b.tier}, which measures other images; run one of them "
            "again in the other's tier."
        )
    if a.protocol_sha256 != b.protocol_sha256:
        raise GuardbenchError(
            f"A is under protocol {a.protocol} ({a.protocol_sha256[:12]}) and B under {b.protocol} "
            f"({b.protocol_sha256[:12]}); numbers compare only under one protocol: run one of the "
            "methods again under the other's."
        )
    for what, ours, theirs, way in (
        (
            "list of test images",
            a.test.list_sha256,
            b.test.list_sha256,
            "run one of them again with the other's --images"
            if a.tier == "dev"
            else "run one of them again with this version of guardbench",
        ),
        (
            "pixels of the test images",
            a.test.data_sha256,
            b.test.data_sha256,
            "run one of them again on the other's copy of the data (--data-dir)",
        ),
    ):
        if ours != theirs:
            raise GuardbenchError(
                f"A and B differ in the {what}: digest {ours[:12]} in A, {theirs[:12]} in B; {way}."
            )


def _extent(record: AnyRecord) -> str:
    return ", ".join(
        f"seed {run.seed}: {run.clean.first} to {run.clean.end - 1}" for run in record.seeds[:4]
    ) + (", ..." if len(record.seeds) > 4 else "")


def _notes(a: AnyRecord, b: AnyRecord, numbers: Sequence[int], rows: set[str]) -> list[str]:
    """What the rows do not say: other tracks, other sizes, what was left out, and flags."""
    lines = []
    if isinstance(a, ResultRecord) and isinstance(b, ResultRecord):
        lines += _notes_on_sets(a, b)
    if a.tier == "dev":
        lines.append("Both are of the dev tier, on a subset of the protocol's images: unofficial.")
    if a.provenance.engines != b.provenance.engines:
        lines.append("A and B were attacked by different engines (`guardbench show` says which).")
    ours, theirs = a.provenance, b.provenance
    for what, one, other in (
        ("engine", ours.versions.get(ENGINE, "unknown"), theirs.versions.get(ENGINE, "unknown")),
        ("torch", ours.versions.get("torch"), theirs.versions.get("torch")),
        ("students trained in", ours.precision.get("students"), theirs.precision.get("students")),
    ):
        if None not in (one, other) and one != other:
            lines.append(f"{what}: {one} in A, {other} in B; what differs may owe to that.")
    for letter, record in (("A", a), ("B", b)):
        alone = [str(run.seed) for run in record.seeds if run.seed not in numbers]
        if alone:
            lines.append(f"Left out: seeds that only {letter} has, {', '.join(alone)}.")
    left = sorted((set(a.attack_names) | set(b.attack_names)) - rows)
    if left:
        lines.append(f"Left out: no image in common, or not in both records: {', '.join(left)}.")
    if "worst_case" not in rows:
        lines.append("No worst case: no image was measured by every bounded attack in both.")
    lines += [f"Flag of {x}: {flag}" for x, r in (("A", a), ("B", b)) for flag in r.flags]
    return lines


def _notes_on_sets(a: ResultRecord, b: ResultRecord) -> list[str]:
    lines = []
    kinds = a.artifact.label_kind, b.artifact.label_kind
    if kinds[0] != kinds[1]:
        lines.append(f"A is given {kinds[0]} labels, B {kinds[1]} ones: no board ranks these.")
    if a.ipc != b.ipc:
        lines.append(f"A has {a.ipc} images per class, B {b.ipc}: no board ranks these.")
    if a.artifact.sha256 == b.artifact.sha256:
        lines.append("A and B are students of the same distilled set.")
    return lines


def _side(record: AnyRecord) -> Side:
    if isinstance(record, ResultRecord):
        artifact = record.artifact
        return Side(
            name=record.method.name,
            title=record.method.title,
            made_from=f"{record.ipc} images per class, {artifact.label_kind} labels, "
            f"set {artifact.sha256[:12]}",
            measured_sha256=artifact.sha256,
            result_sha256=record.result_sha256,
        )
    found = record.classifier
    weights = (
        "unnamed weights"
        if found.weights_sha256 is None
        else f"weights {found.weights_sha256[:12]}"
    )
    return Side(
        name=found.name,
        title=found.name,
        made_from=printable(f"{found.arch}, {weights}", 190)[:200],
        measured_sha256=found.weights_sha256,
        result_sha256=record.result_sha256,
    )


def _digits(p: float) -> float:
    return float(f"{p:.6g}")
