"""One board: a pure function of records and their protocol, the same to the byte everywhere."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Protocol, get_args

from guardbench.board import (
    Area,
    Board,
    BoardHead,
    Cost,
    Past,
    Row,
    RowProvenance,
    Source,
    Tracks,
    ranks,
)
from guardbench.ddranking import scores
from guardbench.errors import GuardbenchError
from guardbench.fields import printable
from guardbench.metrics import (
    Estimate,
    Measurement,
    WorstCase,
    WorstMeasurement,
    estimate,
    worst_case,
)
from guardbench.reassessment import AssessmentFile, lower, refusal
from guardbench.records import LabelKind, ResultRecord, TestSet
from guardbench.threat import ThreatModel

# First word of the stages that evaluate; so do stages that begin with an attack's name. The others
# (squeeze, recover, relabel, ...) distil.
EVALUATION_STAGES = frozenset({"student", "clean", "checks", "reference"})


class BoardProtocol(Protocol):
    """What a board needs to know of a protocol; `guardbench.protocol.Protocol` is one.

    Of `attacks` it reads `name`, of `threat` `norm` and `eps`, of `student` `seeds`, of `test`
    `count` and `sha256`; `slice_of` gives the first image and the number of images that an attack
    measures for the seed at a position.
    """

    @property
    def id(self) -> str: ...  # noqa: D102
    @property
    def title(self) -> str: ...  # noqa: D102
    @property
    def superseded_by(self) -> str | None: ...  # noqa: D102
    @property
    def dataset(self) -> str: ...  # noqa: D102
    @property
    def resolution(self) -> int: ...  # noqa: D102
    @property
    def ipc(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def rank_by(self) -> str: ...  # noqa: D102
    @property
    def attacks(self) -> Sequence[Any]: ...  # noqa: D102
    @property
    def threat(self) -> Any: ...  # noqa: D102
    @property
    def student(self) -> Any: ...  # noqa: D102
    @property
    def test(self) -> Any: ...  # noqa: D102
    @property
    def digest(self) -> str: ...  # noqa: D102
    def slice_of(self, attack: Any, position: int) -> tuple[int, int]: ...  # noqa: D102


@dataclass(frozen=True)
class RecordFile:
    """A record, where it stands, and what stands beside it.

    Attributes:
        path: from the root, with `/`.
        sha256: of the file.
        links: `paper` and `code`, where known.
        assessments: later evaluations of it.
    """

    path: str
    sha256: str
    record: ResultRecord
    links: Mapping[str, str] = field(default_factory=dict)
    assessments: tuple[AssessmentFile, ...] = ()

    @property
    def area(self) -> Area:
        """Whose it is: by its folder in a checkout, by what made it in a workspace."""
        theirs = self.path.startswith("submissions/")
        return (
            "submissions" if theirs or self.record.method.distiller == "submission" else "baselines"
        )


OTHER_PIXELS = (
    "other pixels of the test images than most rows have (another copy of the data, or decoder)"
)
"""The flag of a row on a board; where no pixels are those of most rows, the first path's stand for them."""


@dataclass(frozen=True)
class _Entry:
    """A record with everything computed that ranks it; `usual`: on the pixels that most rows have."""

    file: RecordFile
    clean: Estimate
    attacks: dict[str, Estimate]
    worst: WorstCase | None
    ranked: Estimate
    usual: bool
    history: tuple[Past, ...]

    @property
    def order(self) -> tuple[bool, Fraction, Fraction, str, str]:
        method = self.file.record.method
        values = -self.ranked.share, -self.clean.share
        return not method.official, *values, method.name, self.file.path


def build_leaderboard(
    records: Iterable[RecordFile], protocol: BoardProtocol, ipc: int, whole: float | None = None
) -> dict[str, Any]:
    """The board of `protocol` at `ipc` images per class, as the JSON words of a `Board`.

    Within a track, rows stand by the value of `protocol.rank_by`, then by clean accuracy, both
    before rounding, then by name, then by path; their ranks tie by interval (`board.ranks`). Rows of
    changed recipes (`method.official` false) stand behind the others and have no rank.
    Several records of one method are all listed, since choosing one would be choosing a result.
    Only a copy, the same result in another file, is left out for the path that sorts first; what was
    assessed of the copy counts.

    Args:
        records: in any order.
        protocol: the one that all of them were measured under.
        ipc: images per class.
        whole: accuracy in [0, 1] of students of the whole training set (`ddranking.whole_set`).

    Raises:
        GuardbenchError: a record was measured otherwise, or has no worst case to be ranked by, or an
            assessment does not fit its record; the line names the file and the way out.
    """
    unique: dict[str, RecordFile] = {}
    for file in sorted(records, key=lambda file: file.path):
        reason = mismatch(file.record, protocol, ipc)
        if reason:
            raise GuardbenchError(f"{printable(file.path)}: {reason}")
        _check_assessments(file, protocol)
        kept = unique.setdefault(file.record.result_sha256, file)
        if kept is not file:
            both = kept.assessments + file.assessments
            unique[file.record.result_sha256] = replace(kept, assessments=both)
    pixels = [file.record.test.data_sha256 for file in unique.values()]
    usual = commonest(pixels)
    entries = sorted(
        (
            _entry(file, protocol.rank_by, usual=file.record.test.data_sha256 == usual)
            for file in unique.values()
        ),
        key=lambda entry: entry.order,
    )
    tracks = {
        kind: _ranked([e for e in entries if e.file.record.artifact.label_kind == kind], whole)
        for kind in get_args(LabelKind)
    }
    head = BoardHead(
        id=protocol.id,
        title=protocol.title,
        sha256=protocol.digest,
        superseded_by=protocol.superseded_by,
        dataset=protocol.dataset,
        resolution=protocol.resolution,
        threat=threat_text(protocol),
        rank_by=protocol.rank_by,
        attacks=tuple(attack.name for attack in protocol.attacks),
    )
    return Board(protocol=head, ipc=ipc, tracks=Tracks(**tracks)).model_dump(mode="json")


def commonest(values: Sequence[str]) -> str | None:
    """What stands most often, the first of equals; None of nothing."""
    return max(values, key=values.count, default=None)


def _check_assessments(file: RecordFile, protocol: BoardProtocol) -> None:
    for found in file.assessments:
        reason = refusal(found.assessment, file.record, threat_model(protocol))
        if reason:
            raise GuardbenchError(f"{printable(found.path)}: {reason}")


def mismatch(record: ResultRecord, protocol: BoardProtocol, ipc: int) -> str | None:
    """Why `record` cannot stand on that board, with the way out; None when it can."""
    again = f"run it again with `guardbench run --protocol {protocol.id}`."
    if record.tier != "official":
        return f"tier: {record.tier}, a board takes official records alone; {again}"
    if record.protocol != protocol.id or record.protocol_sha256 != protocol.digest:
        return (
            f"protocol: measured under {record.protocol}, digest {record.protocol_sha256[:12]}, "
            f"the board is for {protocol.id}, digest {protocol.digest[:12]}; {again} "
            "(A published protocol never changes: a new version takes a new id.)"
        )
    found: dict[str, tuple[object, object]] = {
        "dataset": (record.dataset, protocol.dataset),
        "resolution": (record.resolution, protocol.resolution),
        "ipc": (record.ipc, ipc),
        "attacks": (record.attack_names, tuple(sorted(a.name for a in protocol.attacks))),
        "seeds": (tuple(run.seed for run in record.seeds), protocol.student.seeds),
        "test.total": (record.test.total, protocol.test.count),
        "test.list_sha256": (record.test.list_sha256, protocol.test.sha256),
    }
    if protocol.test.sha256 is None:
        del found["test.list_sha256"]
    for what, (is_, should) in found.items():
        if is_ != should:
            return f"{what}: {_words(is_)}, protocol {protocol.id} says {_words(should)}; {again}"
    for position, run in enumerate(record.seeds):
        slices = {a.name: protocol.slice_of(a, position) for a in protocol.attacks}
        slices["clean"] = (0, protocol.test.count)
        for name, (first, total) in slices.items():
            outcome = run.clean if name == "clean" else run.attacks[name]
            if (outcome.first, outcome.total) != (first, total):
                return (
                    f"seeds: {name} of seed {run.seed} measures {outcome.total} images from "
                    f"{outcome.first}, protocol {protocol.id} says {total} from {first}; {again}"
                )
    if ipc not in protocol.ipc:
        return f"ipc: protocol {protocol.id} measures {_words(protocol.ipc)}, not {ipc}; {again}"
    if protocol.rank_by == "worst_case" and worst_case(record.seeds) is None:
        return "seeds: no image was measured by every bounded attack, so there is no worst case."
    return None


def other_images(test: TestSet, file: RecordFile) -> str | None:
    """Why what was measured on `test` cannot stand on a board beside `file`; None when it can.

    A protocol may name how many test images it takes and not which: those depend on the names that a copy
    of the dataset gives its images.
    """
    ours, theirs = test.list_sha256, file.record.test.list_sha256
    if ours == theirs:
        return None
    return (
        f"test.list_sha256: other test images ({ours[:12]}) than {printable(file.path)} has "
        f"({theirs[:12]}), so they do not compare; run one of them again on the other's copy of the data."
    )


def threat_text(protocol: BoardProtocol) -> str:
    """The threat model in words, such as `linf 1/255`."""
    return f"{protocol.threat.norm} {protocol.threat.eps}"


def threat_model(protocol: BoardProtocol) -> ThreatModel:
    """The threat model with an exact radius."""
    from guardbench.protocol import parse_fraction

    return ThreatModel(protocol.threat.norm, parse_fraction(str(protocol.threat.eps)))


def _words(value: object) -> str:
    return ", ".join(str(v) for v in value) if isinstance(value, tuple) else str(value)


def _entry(file: RecordFile, rank_by: str, *, usual: bool) -> _Entry:
    seeds = file.record.seeds
    attacks = {
        name: estimate([run.attacks[name] for run in seeds]) for name in file.record.attack_names
    }
    worst = worst_case(seeds)
    if worst is not None and rank_by == "worst_case":
        own = worst.outcomes
    else:
        own = tuple(run.attacks[rank_by] for run in seeds)
    lowest = None if worst is None else worst.outcomes
    ranked, lowest, history = lower(seeds, own, lowest, file.assessments)
    return _Entry(
        file=file,
        clean=estimate([run.clean for run in seeds]),
        attacks=attacks,
        worst=None if worst is None or lowest is None else replace(worst, outcomes=lowest),
        ranked=estimate(ranked),
        usual=usual,
        history=history,
    )


def _ranked(entries: Sequence[_Entry], whole: float | None) -> tuple[Row, ...]:
    """Rows of one track; `entries` stand in order, best first."""
    found = [Measurement.of(entry.ranked) for entry in entries]
    places = ranks(
        [
            (entry.file.record.method.official, value.low, value.high)
            for entry, value in zip(entries, found, strict=True)
        ]
    )
    return tuple(_row(entry, rank, whole) for entry, rank in zip(entries, places, strict=True))


def _row(entry: _Entry, rank: int | None, whole: float | None) -> Row:
    record = entry.file.record
    return Row(
        rank=rank,
        area=entry.file.area,
        method=record.method,
        links=dict(entry.file.links),
        ranked=Measurement.of(entry.ranked),
        clean=Measurement.of(entry.clean),
        attacks={name: Measurement.of(found) for name, found in entry.attacks.items()},
        worst_case=entry.worst and WorstMeasurement.of_worst(entry.worst),
        scores=scores(record, whole),
        cost=_cost(record),
        storage=record.artifact,
        flags=record.flags + (() if entry.usual else (OTHER_PIXELS,)),
        history=entry.history,
        record=Source(path=entry.file.path, sha256=entry.file.sha256),
        provenance=RowProvenance(
            guardbench=record.provenance.guardbench,
            torch=record.provenance.versions.get("torch"),
            commit=record.provenance.commit,
            device=record.provenance.device,
            precision=record.provenance.precision,
            test_data_sha256=record.test.data_sha256,
        ),
    )


def _cost(record: ResultRecord) -> Cost:
    evaluating = EVALUATION_STAGES | set(record.attack_names)
    seconds = {True: 0.0, False: 0.0}
    for stage in record.cost:
        seconds[re.split(r"[\s:/]", stage.stage)[0] in evaluating] += stage.seconds
    devices = sorted({stage.device for stage in record.cost})
    return Cost(
        distill_seconds=round(seconds[False], 1),
        evaluate_seconds=round(seconds[True], 1),
        peak_memory_bytes=max((stage.peak_memory_bytes for stage in record.cost), default=0),
        device=" + ".join(devices) or record.provenance.device,
    )
