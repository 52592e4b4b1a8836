"""What a row's page says, taken from its record: numbers, checks, costs, the command to repeat it."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from fractions import Fraction
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from guardbench.board import Area
from guardbench.curve_files import Curve
from guardbench.ddranking import CALLED
from guardbench.meaning import MEANING
from guardbench.metrics import Measurement, estimate, wilson, worst_case
from guardbench.protocol import protocol_ids
from guardbench.records import Check, Outcome, ResultRecord
from guardbench.report import stage_groups
from guardbench.site.read import Entry, Shown


@dataclass(frozen=True)
class Seed:
    """One student under one measurement: percent, Wilson's interval in percent, and the counts."""

    seed: int
    percent: float
    low: float
    high: float
    correct: int
    total: int


@dataclass(frozen=True)
class Line:
    """One measurement over all students.

    Attributes:
        name: `clean`, the attack, or `worst case`.
        what: the attack with its parameters, empty where they are not known.
        found: mean and interval.
        seeds: each student.
    """

    name: str
    what: str
    found: Measurement
    seeds: tuple[Seed, ...]


@dataclass(frozen=True)
class Stage:
    """Stages of one name together: seconds in all, the most memory, and how many were reused."""

    name: str
    count: int
    seconds: float
    memory: int
    devices: str
    reused: int


def lines(shown: Shown, entry: Entry) -> tuple[Line, ...]:
    """Clean, each attack in the protocol's order, and the worst case."""
    runs = entry.record.seeds
    numbers = [run.seed for run in runs]
    found = [_line("clean", "", numbers, [run.clean for run in runs])]
    for name in shown.board.protocol.attacks:
        outcomes = [run.attacks[name] for run in runs]
        found.append(_line(name, attack_words(shown, name), numbers, outcomes))
    worst = worst_case(runs)
    if worst is not None:
        found.append(_line("worst case", ", ".join(worst.attacks), numbers, worst.outcomes))
    return tuple(found)


def _line(
    name: str, what: str, numbers: list[int], outcomes: list[Outcome] | tuple[Outcome, ...]
) -> Line:
    seeds = []
    for number, outcome in zip(numbers, outcomes, strict=True):
        share = outcome.correct / outcome.total
        low, high = wilson(share, outcome.total)
        seeds.append(Seed(number, 100 * share, low, high, outcome.correct, outcome.total))
    return Line(name, what, Measurement.of(estimate(outcomes)), tuple(seeds))


def attack_words(shown: Shown, name: str) -> str:
    """Kind and parameters of an attack, such as `pgd, steps 100`; empty where they are not known."""
    for spec in shown.protocol.attacks if shown.protocol else ():
        if spec.name == name:
            return ", ".join([spec.kind, *(f"{key} {value}" for key, value in spec.params.items())])
    return ""


_DOTTED = re.compile(r"\w+\.")


def stages(record: ResultRecord) -> tuple[Stage, ...]:
    """What it took, the students of one stage together, in the order in which they ran."""
    found = []
    for name, some in stage_groups(record):
        found.append(
            Stage(
                name=name,
                count=len(some),
                seconds=sum(stage.seconds for stage in some),
                memory=max(stage.peak_memory_bytes for stage in some),
                devices=", ".join(sorted({stage.device for stage in some})),
                reused=sum(stage.shared for stage in some),
            )
        )
    return tuple(found)


def checks(record: ResultRecord) -> dict[str, tuple[str, tuple[Check | None, ...]]]:
    """Check -> what it looks for, and what it found for each seed (None where it was not made)."""
    made = {name for run in record.seeds for name in run.checks}
    known = [name for name in MEANING if name in made]
    return {
        name: (MEANING.get(name, ""), tuple(run.checks.get(name) for run in record.seeds))
        for name in [*known, *sorted(made - set(known))]
    }


def references(record: ResultRecord) -> tuple[Line, ...]:
    """The students beside it that DD-Ranking's scores compare with, clean; empty where there are none."""
    runs = record.seeds
    numbers = [run.seed for run in runs]
    return tuple(
        _line(what, "", numbers, [run.references[way] for run in runs])
        for way, what in CALLED.items()
        if way in runs[0].references
    )


def command(record: ResultRecord, *, area: Area, path: str) -> str:
    """What to type to measure a row again, quoted for a shell.

    Said is whatever differs from a default, and what the default of depends on the device. A method's
    seed stands in the name of its record.

    Args:
        area: of the row.
        path: of the record.
    """
    own = record.protocol not in protocol_ids()  # a copy of it lies in the workspace
    protocol = ["--protocol", f"protocols/{record.protocol}.toml" if own else record.protocol]
    compared = bool(record.seeds[0].references)
    if area == "submissions":
        words = ["submission", "score", f"submissions/{record.method.name}", *protocol]
        words += [] if compared else ["--no-references"]
    else:
        words = ["run", "--method", record.method.name, *protocol, "--ipc", str(record.ipc)]
        seed = re.search(r"-seed(\d+)(-reference)?$", PurePosixPath(path).stem)
        words += ["--seed", seed[1]] if seed else []
        words += ["--references"] if compared else []
        # What has no dotted name was no choice: a part of the training images, which the page lists.
        words += [w for text in record.overrides if _DOTTED.match(text) for w in ("--set", text)]
    made = record.provenance
    precision = made.precision.get("distillation") or made.precision.get("students")
    precision = (precision or "").partition(",")[0]  # `fp16, images fp32`
    words += ["--precision", precision] if precision in ("fp32", "bf16", "fp16") else []
    words += ["--engine", "reference"] if "reference" in made.engines.values() else []
    return shlex.join(["guardbench", *words])


def tied(entry: Entry, shown: Shown) -> bool:
    """Whether another row of its track has its rank."""
    if entry.row.rank is None:
        return False
    return sum(other.row.rank == entry.row.rank for other in shown.of(entry.track)) > 1


def distinct(entry: Entry, shown: Shown) -> str:
    """What tells a row from others of the same method on its board; empty where it is alone."""
    name = entry.row.method.name
    if sum(other.row.method.name == name for other in shown.entries) == 1:
        return ""
    return PurePosixPath(entry.row.record.path).stem


def https(text: str) -> str | None:
    """`text` where it is an https address that a page may link to, else None: it is then shown as text.

    An address with a user name, a port that is no number, or anything but printable ASCII is none:
    each can make a reader take it for another.
    """
    if not re.fullmatch(r"https://[!-~]{1,2000}", text) or re.search(r"[\"'<>\\^`{|}]", text):
        return None
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        return None
    plain = parts.hostname and "@" not in parts.netloc and (port is None or port > 0)
    return text if plain else None


@dataclass(frozen=True)
class CurvePoint:
    """One radius of a curve: in words and as a number (times 255 in l-inf), percent, Wilson's interval."""

    radius_words: str
    radius: float
    percent: float
    low: float
    high: float
    correct: int


def curve_points(curve: Curve) -> tuple[CurvePoint, ...]:
    """A curve's points as they are shown."""
    found = []
    for point in curve.points:
        radius = float(Fraction(point.eps) * (255 if curve.norm == "linf" else 1))
        share = point.correct / curve.total
        low, high = wilson(share, curve.total)
        found.append(CurvePoint(f"{radius:.4g}", radius, 100 * share, low, high, point.correct))
    return tuple(found)
