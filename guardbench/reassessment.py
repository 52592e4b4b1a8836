"""Later, stronger evaluations of a record: its row falls, and its history says from where and why.

The record of `<area>/<name>/results/<rest>/<stem>.json` is never changed. What somebody breaks later
lies beside it in `<area>/<name>/assessments/<rest>/<stem>.<word>.json`: an attack of the same students,
on the same images, inside the same threat model. Boards take the worse verdict of both, image by
image, so that an assessment can only lower a row. One that lowers nothing is read and checked like
any other, and is on no board: it shows that an attack was tried.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from guardbench import canonical, json_files
from guardbench.board import Past, Source
from guardbench.errors import GuardbenchError
from guardbench.fields import Line, Sha256, Strict, only_const, printable
from guardbench.metrics import Measurement, estimate
from guardbench.migrations import Migration, migrate
from guardbench.records import ClassifierRecord, Outcome, ResultRecord, SeedRun
from guardbench.store import read_text, write_text
from guardbench.threat import ThreatModel, tolerance

ASSESSMENT_VERSION: Literal[1] = 1
ASSESSMENT_MIGRATIONS: tuple[Migration, ...] = ()
FOLDER = "assessments"
FILE_LIMIT = 16 << 20
CHANNELS = 3  # at most, of any dataset
SAME_STUDENT = 0.005
"""Share of clean verdicts that may differ between two machines' evaluations of one student."""


class AssessedSeed(Strict):
    """What one student got right under the later attack, on images that its clean outcome covers."""

    seed: int = Field(ge=0, lt=1 << 63)
    outcome: Outcome


class Assessment(Strict):
    """A later evaluation of the students of one record.

    Attributes:
        result_sha256: of the record (`ResultRecord.result_sha256`): a record made again is another.
        attack: what attacked, with its settings, in words.
        made_by: who ran it.
        date: when, as YYYY-MM-DD; histories are in its order.
        source: where it can be checked: an https URL, or plain text.
        seeds: the students that were attacked, at least one.
    """

    schema_version: Literal[1] = Field(default=ASSESSMENT_VERSION, json_schema_extra=only_const)
    result_sha256: Sha256
    attack: Line
    made_by: Line
    date: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$")
    source: Line
    seeds: tuple[AssessedSeed, ...] = Field(min_length=1, max_length=1024)

    @field_validator("date")
    @classmethod
    def _day(cls, date: str) -> str:
        datetime.date.fromisoformat(date)
        return date

    @model_validator(mode="after")
    def _consistent(self) -> Assessment:
        numbers = [found.seed for found in self.seeds]
        if len(set(numbers)) < len(numbers):
            raise ValueError("seeds: a seed stands twice")
        for found in self.seeds:
            if not found.outcome.bounded:
                raise ValueError(
                    f"seeds: the attack on seed {found.seed} is not held inside the threat model"
                )
        return self


@dataclass(frozen=True)
class AssessmentFile:
    """An assessment and where it stands: `path` from the root with `/`, `sha256` of the file."""

    path: str
    sha256: str
    assessment: Assessment

    @property
    def source(self) -> Source:
        """For a board."""
        return Source(path=self.path, sha256=self.sha256)

    @property
    def order(self) -> tuple[str, str]:
        """Of histories."""
        return self.assessment.date, self.path


def assessment_path(record: Path, word: str) -> Path:
    """Where an assessment of the record file `record` lies, `word` telling it from others.

    Raises:
        GuardbenchError: `record` does not lie in a `results` folder, or `word` is no file name.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", word):
        raise GuardbenchError(
            f"--word {printable(word, 64)}: at most 64 lower-case letters, digits, `-` and `_`."
        )
    parts = list(record.parts)
    if "results" not in parts[:-1]:
        raise GuardbenchError(
            f"{printable(str(record))}: not in a results/ folder; only published records, under "
            "baselines/ or submissions/, are assessed."
        )
    at = len(parts) - 1 - parts[::-1].index("results")
    return Path(*parts[:at], FOLDER, *parts[at + 1 : -1], f"{record.stem}.{word}.json")


def assessed_path(assessment: str) -> str | None:
    """The path of the record that the assessment at the path `assessment` is of; both from the root.

    Returns:
        None where the path is not that of an assessment.
    """
    match = re.fullmatch(r"([^/]+/[^/]+)/assessments/(.+)\.[a-z0-9][a-z0-9_-]*\.json", assessment)
    return None if match is None else f"{match[1]}/results/{match[2]}.json"


def load_assessment(path: Path) -> Assessment:
    """Reads and checks an assessment by itself, of any schema version there has been.

    Raises:
        GuardbenchError: it cannot be read, is over 16 MiB, is no assessment, is newer than this
            guardbench, or a field is wrong: one line naming the file, the field and the way out.
    """

    def make(words: dict[str, Any]) -> Assessment:
        return json_files.strictly(Assessment, migrate(words, ASSESSMENT_MIGRATIONS))

    return json_files.parse(
        read_text(path, what="assessment", limit=FILE_LIMIT),
        make,
        where=str(path),
        what="assessment",
        remedy="Make it with `guardbench leaderboard assess`, or remove it.",
    )


def save_assessment(path: Path, assessment: Assessment) -> None:
    """Writes it as canonical JSON, whole or not at all."""
    write_text(path, canonical.dumps(assessment.model_dump(mode="json")))


def refusal(assessment: Assessment, record: ResultRecord, threat: ThreatModel) -> str | None:
    """Why `assessment` cannot lower `record`, with the way out; None when it can.

    Args:
        threat: of the protocol that the record was measured under.
    """
    if assessment.result_sha256 != record.result_sha256:
        return (
            f"result_sha256: of the result {assessment.result_sha256[:12]}, the record beside it holds "
            f"{record.result_sha256[:12]}; attack the students of that record, or remove this file."
        )
    limit = float(threat.eps) + tolerance(threat, CHANNELS * record.resolution**2)
    runs = {run.seed: run for run in record.seeds}
    for number, found in enumerate(assessment.seeds):
        outcome = found.outcome
        if found.seed not in runs:
            listed = ", ".join(map(str, sorted(runs)))
            return f"seeds.{number}.seed: {found.seed}, the record has {listed}; name one of these."
        if outcome.max_distance > limit:
            return (
                f"seeds.{number}.outcome.max_distance: {outcome.max_distance:.6g} is outside the threat "
                f"model, {threat}; attack inside it."
            )
        clean = runs[found.seed].clean
        if outcome.first < clean.first or outcome.end > clean.end:
            return (
                f"seeds.{number}.outcome: images {outcome.first} to {outcome.end - 1}, the record "
                f"measures {clean.first} to {clean.end - 1}; leave the others out."
            )
        plain = clean.flags()[outcome.first - clean.first :]
        for i, (robust, right) in enumerate(zip(outcome.flags(), plain, strict=False)):
            if robust and not right:
                return (
                    f"seeds.{number}.outcome.bits: image {outcome.first + i} is right under the attack "
                    "and wrong without it in the record, so other students were attacked; attack the "
                    "record's own."
                )
    return None


Outcomes = tuple[Outcome, ...]


def lower(
    seeds: Sequence[SeedRun],
    ranked: Outcomes,
    worst: Outcomes | None,
    files: Sequence[AssessmentFile],
) -> tuple[Outcomes, Outcomes | None, tuple[Past, ...]]:
    """What a row is ranked by, and its worst case, after assessments that `refusal` lets pass.

    Args:
        seeds: of the record.
        ranked, worst: one outcome a seed; only images that they measured can fall.
        files: in any order.

    Returns:
        Both as they are now, and what `ranked` was before each assessment that lowered either.
    """
    history = []
    for file in sorted(files, key=lambda file: file.order):
        found = {each.seed: each.outcome for each in file.assessment.seeds}
        new_ranked, fallen = _fallen(seeds, ranked, found)
        new_worst, fallen_worst = worst, 0
        if worst is not None:
            new_worst, fallen_worst = _fallen(seeds, worst, found)
        if fallen or fallen_worst:
            history.append(
                Past(
                    ranked=Measurement.of(estimate(ranked)),
                    reason=_reason(file.assessment, fallen or fallen_worst),
                    source=file.source,
                )
            )
        ranked, worst = new_ranked, new_worst
    return ranked, worst, tuple(history)


def _fallen(
    seeds: Sequence[SeedRun], own: Outcomes, found: dict[int, Outcome]
) -> tuple[Outcomes, int]:
    new = tuple(
        _worse(outcome, found[run.seed]) if run.seed in found else outcome
        for run, outcome in zip(seeds, own, strict=True)
    )
    return new, sum(a.correct - b.correct for a, b in zip(own, new, strict=True))


def _worse(own: Outcome, found: Outcome) -> Outcome:
    """`own` without the images that `found` broke; those that it did not measure stay."""
    flags, theirs = own.flags(), found.flags()
    for image in range(max(own.first, found.first), min(own.end, found.end)):
        flags[image - own.first] &= theirs[image - found.first]
    if sum(flags) == own.correct:
        return own
    # The distances of an unbounded attack are in another norm.
    distance = max(own.max_distance, found.max_distance) if own.bounded else own.max_distance
    return Outcome.from_flags(flags, first=own.first, bounded=own.bounded, max_distance=distance)


def _reason(assessment: Assessment, fallen: int) -> str:
    images = "1 image" if fallen == 1 else f"{fallen} images"
    return (
        f"{assessment.date}: {assessment.made_by} broke {images} that stood, with {assessment.attack} "
        f"({assessment.source})"
    )


def assess(
    record: ResultRecord,
    measured: Sequence[ClassifierRecord],
    *,
    attack: str,
    made_by: str,
    date: str,
    source: str,
) -> Assessment:
    """An assessment from what `guardbench evaluate` measured of a record's students.

    Which student a classifier is, its clean verdicts tell: they must be those of exactly one, but for the few
    images that another machine's rounding decides.

    Args:
        measured: under the record's own protocol, by another seed, engine or version of guardbench;
            one a student.
        attack: the column to take.
        made_by, date, source: as in `Assessment`.

    Raises:
        GuardbenchError: they are not of this record's students or images, or have no such column.
    """
    found: dict[int, Outcome] = {}
    for theirs in measured:
        seed = _student(record, theirs)
        if seed in found:
            raise GuardbenchError(
                f"{theirs.classifier.name}: student {seed} is given twice; drop one."
            )
        attacks = theirs.seeds[0].attacks
        if attack not in attacks or not attacks[attack].bounded:
            held = sorted(each for each, outcome in attacks.items() if outcome.bounded)
            raise GuardbenchError(
                f"--attack {printable(attack, 64)}: {theirs.classifier.name} has the bounded attacks "
                f"{', '.join(held)}."
            )
        run = next(run for run in record.seeds if run.seed == seed)
        found[seed] = _as_recorded(theirs.classifier.name, run, attack, attacks[attack])
    made = measured[0].provenance
    engine = f", engine {made.engines[attack]}" if attack in made.engines else ""
    try:
        return Assessment(
            result_sha256=record.result_sha256,
            attack=f"{attack} of protocol {record.protocol}, guardbench {made.guardbench}{engine}",
            made_by=made_by,
            date=date,
            source=source,
            seeds=tuple(AssessedSeed(seed=seed, outcome=found[seed]) for seed in sorted(found)),
        )
    except ValidationError as error:
        raise GuardbenchError(f"the assessment: {json_files.first_problem(error)}.") from error


def _student(record: ResultRecord, theirs: ClassifierRecord) -> int:
    """The seed of the record's student that was measured: the one whose clean verdicts are nearest."""
    name = theirs.classifier.name
    if theirs.tier != record.tier:
        raise GuardbenchError(
            f"{name}: measured in the {theirs.tier} tier, and the record in the {record.tier} one: evaluate "
            "it without --tier."
        )
    if theirs.protocol_sha256 != record.protocol_sha256 or theirs.test != record.test:
        raise GuardbenchError(
            f"{name}: measured under {theirs.protocol} ({theirs.protocol_sha256[:12]}), on images "
            f"{theirs.test.data_sha256[:12]}; the record under {record.protocol} "
            f"({record.protocol_sha256[:12]}), on {record.test.data_sha256[:12]}: evaluate the "
            "student under the record's protocol, on the same images."
        )
    differing = {run.seed: _differing(run.clean, theirs.seeds[0].clean) for run in record.seeds}
    fewest = min(differing.values())
    alike = [seed for seed, count in differing.items() if count == fewest]
    if fewest > SAME_STUDENT * record.test.total or len(alike) != 1:
        raise GuardbenchError(
            f"{name}: {len(alike)} students of the record are nearest to it, {fewest} of "
            f"{record.test.total} clean verdicts away, which does not tell one of them; evaluate the weights "
            "that the record is of."
        )
    return alike[0]


def _differing(one: Outcome, other: Outcome) -> int:
    """How many images the verdicts on the same ones differ in."""
    return sum(a != b for a, b in zip(one.flags(), other.flags(), strict=True))


def _as_recorded(name: str, run: SeedRun, attack: str, found: Outcome) -> Outcome:
    """What was measured of a student, with every image wrong that is so in the record without attack.

    Raises:
        GuardbenchError: it is not on the images that the student's own column is on.
    """
    own, clean = run.attacks[attack], run.clean.flags()
    if (own.first, own.total) != (found.first, found.total):
        raise GuardbenchError(
            f"{name}: {attack} was measured on images {found.first} to {found.end - 1}, and student "
            f"{run.seed} rests on {own.first} to {own.end - 1}; evaluate it with --student "
            f"{own.first // own.total}."
        )
    at = found.first - run.clean.first
    flags = [robust and right for robust, right in zip(found.flags(), clean[at:], strict=False)]
    return Outcome.from_flags(
        flags, first=found.first, bounded=found.bounded, max_distance=found.max_distance
    )
