"""`guardbench submission score`: a stranger's distilled set, measured exactly as `guardbench run` does."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NoReturn

from guardbench.checks import flags
from guardbench.data.catalog import dataset_info
from guardbench.data.dataset import RealDataset, load_split
from guardbench.data.locate import locate
from guardbench.data.peek import class_order
from guardbench.devices import make_accelerator
from guardbench.distilled import (
    MANIFEST,
    PREVIEW,
    DistilledDataset,
    load_distilled,
    save_distilled,
    told_by_main,
)
from guardbench.errors import GuardbenchError
from guardbench.evaluation import (
    EvaluationPlan,
    evaluate,
    measured_artifact,
    measured_test,
    plan_evaluation,
)
from guardbench.filing import (
    Place,
    checkout_for,
    engine_mark,
    file_record,
    own_protocol,
    require_the_boards_images,
)
from guardbench.metrics import Measurement, estimate
from guardbench.pipeline import Finished, choose_protocol, networks, require_complete
from guardbench.progress import Progress
from guardbench.protocol import Protocol
from guardbench.provenance import provenance
from guardbench.records import Engine, Method, ResultRecord, SeedRun, Tier
from guardbench.runtime import Run
from guardbench.scoring import Costs
from guardbench.scoring_plan import engines_used
from guardbench.stages import StageFolder
from guardbench.store import check_workspace, explained
from guardbench.submissions.check import Report, check, measurable, read_form, recipe_of
from guardbench.submissions.fetch import fetch_data
from guardbench.submissions.form import FORM, Submission, protocols_for
from guardbench.submissions.problems import Problems
from guardbench.submissions.read import Content
from guardbench.tier import SMOKE_IMAGES, sample_size, smoke


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a user asks for; the fields are the options of `guardbench submission score`."""

    folder: Path
    protocol: str | None
    device: str
    precision: str
    data_dir: Path | None
    cache_dir: Path | None
    output: Path
    publish: bool
    engine: Engine
    tier: Tier
    images: int | None
    references: bool
    smoke: bool


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """A submission that has passed its check, and what scoring it will do.

    Attributes:
        report: of the check.
        artifact: the stage that holds the distilled set.
        real: its dataset's training and validation split.
        place: where the record goes.
    """

    settings: Settings
    form: Submission
    content: Content
    report: Report
    protocol: Protocol
    run: Run
    artifact: StageFolder
    evaluating: EvaluationPlan
    real: tuple[RealDataset, RealDataset]
    place: Place


def check_submission(
    folder: Path,
    *,
    data_dir: Path | None,
    cache_dir: Path | None,
    progress: Progress,
    copies: bool = True,
    download: bool = False,
    own_protocol: bool = False,
) -> tuple[Report, tuple[RealDataset, RealDataset] | None]:
    """Checks a submission against the real data where they are at hand.

    Args:
        data_dir, cache_dir: see `data.dataset.load_split`.
        copies: whether to look for copies of real images; False needs no real data.
        download: whether to get real data that are not at hand.
        own_protocol: see `check.check`.

    Returns:
        What was found, and the real training and validation split where they were needed and there.

    Raises:
        GuardbenchError: there is no such folder, or `data_dir` does not hold the dataset.
    """
    if folder.is_symlink():
        raise GuardbenchError(f"{folder}: is a link; name the folder itself.")
    if not folder.is_dir():
        raise GuardbenchError(
            f"{folder}: there is no such folder; `guardbench submission new` makes one."
        )
    form = read_form(folder, Problems())
    fetched = real = unreachable = None
    if form is not None and measurable(form, Problems(), own_protocol=own_protocol):
        try:
            fetched = fetch_data(form, cache_dir, progress)
        except GuardbenchError as error:
            unreachable = str(error)
        if copies:
            real = _real(form, data_dir, cache_dir, progress, download)
    report = check(folder, fetched=fetched, real=real, progress=progress, own_protocol=own_protocol)
    if unreachable is not None:
        report.problems.add(FORM, "data", unreachable)
    return report, real


def _real(
    form: Submission,
    data_dir: Path | None,
    cache_dir: Path | None,
    progress: Progress,
    download: bool,
) -> tuple[RealDataset, RealDataset] | None:
    """Both splits at the submission's resolution; None where they are not at hand."""
    named = data_dir is not None or bool(os.environ.get("GUARDBENCH_DATA"))
    try:
        located = locate(form.dataset, data_dir, cache_dir=cache_dir)
    except GuardbenchError:
        if named or download:
            raise
        return None
    if located.kind == "download" and not download:
        return None

    def load(split: str) -> RealDataset:
        return load_split(
            form.dataset,
            split,
            resolution=form.resolution,
            data_dir=data_dir,
            cache_dir=cache_dir,
            progress=progress,
            per_class=form.ipc if split == "train" else 1,
        )

    return load("train"), load("val")


def plan_score(settings: Settings, progress: Progress) -> Scoring:
    """Checks a submission and plans its scoring.

    Raises:
        GuardbenchError: it does not pass its check, its data are not here, or a setting is wrong.
    """
    if settings.publish and (settings.tier == "dev" or settings.smoke):
        raise GuardbenchError("--publish: a dev record is unofficial; publish without --tier dev.")
    report, real = check_submission(
        settings.folder,
        data_dir=settings.data_dir,
        cache_dir=settings.cache_dir,
        progress=progress,
        download=True,
        own_protocol=own_protocol(settings.protocol) is not None,
    )
    form, content = report.form, report.content
    if report.problems or form is None or content is None or real is None:
        _refuse(settings, report)
    protocol = _protocol(settings, form)
    if settings.smoke:
        protocol, settings = smoke(protocol), replace(settings, tier="dev", images=SMOKE_IMAGES)
    checkout = checkout_for(protocol) if settings.publish else None
    if checkout is not None:
        for split in real:
            require_complete(split)
    if checkout is not None and not _same(checkout / "submissions" / form.name, settings.folder):
        raise GuardbenchError(
            f"--publish: put the submission into {checkout / 'submissions' / form.name} first."
        )
    accelerator = make_accelerator(settings.device, settings.precision, protocol.resolution)
    run = Run(accelerator=accelerator, workspace=settings.output, seed=0, progress=progress)
    run.processes.from_main(lambda: check_workspace(settings.output))
    # What students see of it: a mended title or address trains nobody anew.
    words = {
        "stage": "submission",
        "files": content.files,
        "form": form.model_dump(
            mode="json", include={"name", "dataset", "resolution", "ipc", "labels", "teacher"}
        ),
    }
    artifact = run.stage("submission", "distilled", words)
    run.require_alike(  # before any stage is asked for, which all processes do together
        submission=artifact.key,
        protocol=protocol.digest,
        engine=settings.engine,
        tier=settings.tier,
        images=settings.images,
        references=settings.references,
    )
    sample = sample_size(
        protocol, dataset_info(form.dataset).num_classes, settings.tier, settings.images
    )
    return Scoring(
        settings=settings,
        form=form,
        content=content,
        report=report,
        protocol=protocol,
        run=run,
        artifact=artifact,
        evaluating=plan_evaluation(
            run,
            protocol,
            artifact=artifact.key,
            images=len(content.images),
            kind=form.labels,
            train_digest=real[0].digest,
            test_digest=real[1].digest,
            engine=settings.engine,
            sample=sample,
            references=settings.references,
        ),
        real=real,
        place=Place(
            workspace=settings.output,
            area="submissions",
            name=form.name,
            mark=f"-seed0{engine_mark(settings.engine)}",
            own_protocol=own_protocol(settings.protocol),
            checkout=checkout,
        ),
    )


def execute_score(scoring: Scoring) -> Finished:
    """Trains the protocol's students on a submission, attacks them, writes the record and the boards."""
    settings, protocol, run = scoring.settings, scoring.protocol, scoring.run
    form, (train, test) = scoring.form, scoring.real
    warnings: list[str] = []
    with explained(settings.output):
        # What cannot be measured or published is refused before the long part.
        tested = measured_test(protocol, test, scoring.evaluating.sample)
        if scoring.place.checkout is not None:
            require_the_boards_images(scoring.place.checkout, protocol, tested)
        run.require_alike(train_images=train.digest, validation_images=test.digest)
        distilled = _distilled(scoring)
        prepared = Costs()
        prepared.add(scoring.artifact)
        seeds, evaluating = evaluate(run, protocol, scoring.evaluating, distilled, train, test)
        record = ResultRecord(
            tier=settings.tier,
            protocol=protocol.id,
            protocol_sha256=protocol.digest,
            dataset=protocol.dataset,
            resolution=protocol.resolution,
            ipc=form.ipc,
            method=Method(
                name=form.name,
                title=form.title,
                distiller="submission",
                regulariser="none",
                recipe_sha256=recipe_of(form, scoring.content),
                official=True,
            ),
            overrides=(),
            artifact=measured_artifact(distilled),
            test=measured_test(protocol, test, scoring.evaluating.sample),
            seeds=seeds,
            cost=(*prepared.found, *evaluating.found),
            provenance=provenance(
                run,
                engines_used(protocol, settings.engine),
                [*prepared.commits, *evaluating.commits],
                evaluating.searched,
            ),
            flags=(*flags(seeds), *_own_flags(scoring, seeds)),
        )
        folder = scoring.artifact.path / "distilled"
        paths = {
            "artifact": folder / MANIFEST,
            "images": folder / PREVIEW,
            **networks([], scoring.evaluating),
            **scoring.run.processes.from_main(
                lambda: file_record(record, scoring.place, warnings.append)
            ),
        }
    return Finished(record, paths, tuple(warnings))


def _distilled(scoring: Scoring) -> DistilledDataset:
    """The submission as every method's artifact is."""
    folder, form, content = scoring.artifact, scoring.form, scoring.content
    with folder.claimed() as stored:
        if stored is None:
            info = dataset_info(form.dataset)
            located = locate(
                form.dataset, scoring.settings.data_dir, cache_dir=scoring.settings.cache_dir
            )
            folder.begin(scoring.run.device)
            distilled = told_by_main(
                scoring.run.processes,
                partial(
                    save_distilled,
                    folder.path / "distilled",
                    images=content.images,
                    hard=content.labels,
                    soft=content.soft,
                    teacher=scoring.report.teacher,
                    teacher_arch=form.teacher.arch if form.teacher is not None else None,
                    dataset=form.dataset,
                    ipc=form.ipc,
                    method=form.name,
                    classes=class_order(info, located),
                    provenance={"stage": folder.key},
                ),
            )
            folder.finish(scoring.run.device, (f"distilled/{MANIFEST}",))
        else:
            distilled = told_by_main(
                scoring.run.processes, partial(load_distilled, folder.path / "distilled")
            )
    assert distilled.manifest.label_kind == form.labels, "the check has passed"
    return distilled


def _own_flags(scoring: Scoring, seeds: Sequence[SeedRun]) -> tuple[str, ...]:
    """What a reader of the row should know of how the set was made, and of what its authors claim."""
    extra = ("made with data beyond the training images",) if scoring.form.extra_data else ()
    copied = scoring.report.copied
    coreset = (f"{copied} of its images are training images",) if copied else ()
    claim, found = (
        scoring.form.claimed_clean,
        Measurement.of(estimate([run.clean for run in seeds])),
    )
    missed = (
        (f"its authors claim {claim:.1f}% clean; measured {found.mean:.1f} (to {found.high:.1f})",)
        if claim is not None and claim > found.high
        else ()
    )
    return (*extra, *coreset, *missed)


def _refuse(settings: Settings, report: Report) -> NoReturn:
    first, count = report.problems.listed[0], report.problems.count
    more = (
        f" ({count - 1} more: `guardbench submission check {settings.folder}`)" if count > 1 else ""
    )
    raise GuardbenchError(f"{settings.folder}: {first}{more}")


def _protocol(settings: Settings, form: Submission) -> Protocol:
    """The protocol named, or the one that measures the submission's setting."""
    fitting = protocols_for(form)
    if settings.protocol is None:
        if len(fitting) > 1 and not settings.smoke:
            named = ", ".join(protocol.id for protocol in fitting)
            raise GuardbenchError(
                f"several protocols measure this; name one with --protocol: {named}."
            )
        return fitting[0]
    protocol = choose_protocol(None, settings.protocol)
    measured = f"{protocol.dataset} at {protocol.resolution} px"
    if measured != (distilled := f"{form.dataset} at {form.resolution} px"):
        raise GuardbenchError(
            f"--protocol {protocol.id} measures {measured}, the submission is of {distilled}."
        )
    protocol.check_ipc(form.ipc)
    return protocol


def _same(one: Path, other: Path) -> bool:
    return one.exists() and one.resolve() == other.resolve()
