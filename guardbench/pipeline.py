"""`guardbench run`: from real images to a record and a board, planned before anything is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import cast

from guardbench.checks import flags
from guardbench.data.catalog import dataset_info
from guardbench.data.dataset import RealDataset, load_split
from guardbench.data.locate import Located, locate
from guardbench.data.peek import class_order, peek
from guardbench.devices import make_accelerator
from guardbench.distilled import MANIFEST, PREVIEW
from guardbench.distillers.base import Distiller, PlannedStage, Task, tables
from guardbench.distillers.squeeze import TEACHER
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
    require_committed,
    require_the_boards_images,
)
from guardbench.methods import MethodFile, Recipe, load_method, overridden, set_mark
from guardbench.processes import Processes
from guardbench.progress import Progress
from guardbench.protocol import Protocol, load_protocol, protocol_ids
from guardbench.provenance import provenance
from guardbench.record_files import load_record
from guardbench.records import Engine, Method, ResultRecord, Tier
from guardbench.registry import DISTILLERS, REGULARISERS, resolve
from guardbench.runtime import Run
from guardbench.scoring import Costs
from guardbench.scoring_plan import engines_used
from guardbench.store import check_workspace, explained
from guardbench.tier import sample_size
from guardbench.training import STUDENT


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a user asks for; the fields are the options of `guardbench run`."""

    method: str
    dataset: str | None
    protocol: str | None
    ipc: int
    seed: int
    device: str
    precision: str
    data_dir: Path | None
    cache_dir: Path | None
    output: Path
    publish: bool
    engine: Engine
    tier: Tier
    images: int | None
    references: bool = False
    overrides: tuple[str, ...] = ()
    log_with: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that a run will do, and what of it is done.

    Attributes:
        decoded: whether the images lie in the cache; if not, what is done is not known yet.
        distilling, evaluating: the stages.
        checkout: where `--publish` writes, None without it.
    """

    settings: Settings
    protocol: Protocol
    method: MethodFile
    located: Located
    decoded: bool
    task: Task
    distiller: Distiller
    distilling: list[PlannedStage]
    evaluating: EvaluationPlan
    checkout: Path | None

    @property
    def stages(self) -> list[PlannedStage]:
        """All stages in the order in which they run."""
        return [*self.distilling, *self.evaluating.stages]

    @property
    def changed(self) -> tuple[str, ...]:
        """By what the run differs from the committed recipe on the whole training set; for `overrides`."""
        found, whole = self.task.train_images, dataset_info(self.protocol.dataset).train_count
        part = (f"train={found} of {whole} images",) if found != whole else ()
        return (*self.settings.overrides, *part)

    @property
    def place(self) -> Place:
        """Where the record goes."""
        return Place(
            workspace=self.settings.output,
            area="baselines",
            name=self.method.name,
            mark=f"{set_mark(self.changed)}-seed{self.settings.seed}{engine_mark(self.settings.engine)}",
            own_protocol=own_protocol(self.settings.protocol),
            checkout=self.checkout,
        )


@dataclass(frozen=True)
class Finished:
    """What a run leaves: the record, the paths that it prints, and what it could not rank.

    `warnings` names older records of the workspace that fit no protocol any more.
    """

    record: ResultRecord
    paths: dict[str, Path]
    warnings: tuple[str, ...]


def choose_protocol(dataset: str | None, protocol: str | None) -> Protocol:
    """The protocol of that name, or the one called as the dataset.

    Raises:
        GuardbenchError: neither is given, they contradict, or there is none.
    """
    if protocol is None:
        if dataset is None:
            raise GuardbenchError("say what to run on: --dataset digits, or --protocol ID.")
        info = dataset_info(dataset)
        if info.name not in protocol_ids():
            raise GuardbenchError(
                f"no protocol measures {dataset} yet: known are {', '.join(protocol_ids())}; "
                "write one (README, 'Add a protocol') and name it with --protocol FILE.toml."
            )
        return load_protocol(info.name)
    chosen = load_protocol(protocol)
    if chosen.id in protocol_ids() and load_protocol(chosen.id).digest != chosen.digest:
        raise GuardbenchError(
            f"{protocol}: id: {chosen.id!r} is a published protocol, which never changes; "
            "give yours another id and file name."
        )
    if dataset is not None and dataset_info(dataset).name != chosen.dataset:
        raise GuardbenchError(
            f"--dataset {dataset}: protocol {chosen.id} measures {chosen.dataset}; drop one of the two."
        )
    return chosen


def make_plan(settings: Settings, progress: Progress) -> Plan:
    """Checks everything that can be checked and plans the run; decodes nothing and writes nothing.

    Raises:
        GuardbenchError: unknown names, a device or precision that is not there, missing data, an
            output folder that cannot be written.
    """
    asked = protocol, method, distiller, recipe = _asked(settings)
    located = locate(protocol.dataset, settings.data_dir, cache_dir=settings.cache_dir)
    accelerator = make_accelerator(
        settings.device,
        settings.precision,
        protocol.resolution,
        settings.log_with,
        settings.output / "trackers",
    )
    checkout = checkout_for(protocol) if settings.publish else None
    Processes(accelerator).from_main(lambda: check_workspace(settings.output))
    info = dataset_info(protocol.dataset)
    decoded = partial(
        peek, info, located, resolution=protocol.resolution, cache_dir=settings.cache_dir
    )
    train, test = decoded("train"), decoded("val")
    train_digest = None if train is None else train.digest
    test_digest = None if test is None else test.digest
    train_images = info.train_count if train is None else len(train.ids)
    classes = class_order(info, located)
    if train_images < settings.ipc * len(classes):
        raise GuardbenchError(
            f"--ipc {settings.ipc}: {info.name} has only {train_images} training images."
        )
    run = Run(
        accelerator=accelerator, workspace=settings.output, seed=settings.seed, progress=progress
    )
    run.require_alike(  # before any stage is asked for, which all processes do together
        protocol=protocol.digest,
        recipe=recipe.digest,
        IPC=settings.ipc,
        engine=settings.engine,
        tier=settings.tier,
        images=settings.images,
        references=settings.references,
        trackers=", ".join(settings.log_with),
    )
    task, distilling, evaluating = _planned(
        settings, *asked, run, classes, train_images, train_digest, test_digest
    )
    return Plan(
        settings=settings,
        protocol=protocol,
        method=method,
        located=located,
        decoded=train is not None and test is not None,
        task=task,
        distiller=distiller,
        distilling=distilling,
        evaluating=evaluating,
        checkout=checkout,
    )


def official_stages(settings: Settings, progress: Progress) -> list[PlannedStage]:
    """The stages that a run has where all official images are, on the CPU: the same on every machine.

    Raises:
        GuardbenchError: no machine could run it.
    """
    asked = _asked(settings)
    info, resolution = dataset_info(asked[0].dataset), asked[0].resolution
    run = Run(
        accelerator=make_accelerator("cpu", "fp32", resolution), workspace=settings.output,
        seed=settings.seed, progress=progress,
    )  # fmt: skip
    classes = tuple(f"class {k}" for k in range(info.num_classes))
    _, distilling, evaluating = _planned(settings, *asked, run, classes, info.train_count)
    return [*distilling, *evaluating.stages]


def _asked(settings: Settings) -> tuple[Protocol, MethodFile, Distiller, Recipe]:
    """What the settings name, before any machine is looked at."""
    if settings.publish and settings.tier == "dev":
        raise GuardbenchError("--publish: a dev record is unofficial; publish without --tier dev.")
    protocol = choose_protocol(settings.dataset, settings.protocol)
    protocol.check_ipc(settings.ipc)
    method = load_method(settings.method)
    distiller = cast(Distiller, resolve(DISTILLERS, "distiller", method.distiller)())
    recipe = method.recipe(protocol.dataset, protocol.resolution)
    recipe = overridden(recipe, settings.overrides, partial(_fields, distiller))
    return protocol, method, distiller, recipe


def _planned(
    settings: Settings,
    protocol: Protocol,
    method: MethodFile,
    distiller: Distiller,
    recipe: Recipe,
    run: Run,
    classes: tuple[str, ...],
    train_images: int,
    train_digest: str | None = None,
    test_digest: str | None = None,
) -> tuple[Task, list[PlannedStage], EvaluationPlan]:
    """The task, the stages that distil, and those that evaluate."""
    info = dataset_info(protocol.dataset)
    task = Task(
        run=run, method=method, recipe=recipe, dataset=protocol.dataset, resolution=protocol.resolution,
        channels=info.channels, classes=classes, train_images=train_images, train_digest=train_digest,
        ipc=settings.ipc, threat=protocol.threat.model,
    )  # fmt: skip
    distilling = distiller.plan(task)
    evaluating = plan_evaluation(
        run,
        protocol,
        artifact=distilling[-1].folder.key,
        images=distiller.image_count(task),
        kind=distiller.label_kind(task),
        train_digest=train_digest,
        test_digest=test_digest,
        engine=settings.engine,
        sample=sample_size(protocol, info.num_classes, settings.tier, settings.images),
        references=settings.references,
    )
    return task, distilling, evaluating


def execute(plan: Plan) -> Finished:
    """Runs what is not done yet, writes the record and rebuilds the boards."""
    settings, protocol, run = plan.settings, plan.protocol, plan.task.run
    warnings: list[str] = []
    with explained(settings.output):
        run.processes.from_main(lambda: _keep_references(plan))
        with run.processes.local_first():
            train, test = prepare(plan)
        # The stages' keys hold the images' digests, known only now; where one process had to decode, all
        # plan again, since planning speaks to the others.
        if not all(run.processes.collect(plan.decoded)):
            plan = make_plan(settings, run.progress)
            run = plan.task.run
        run.require_alike(train_images=train.digest, validation_images=test.digest)
        with run.tracked_as(*_tracked(plan)):
            distilled = plan.distiller.distill(plan.task, train)
            seeds, evaluating = evaluate(run, protocol, plan.evaluating, distilled, train, test)
        distilling = Costs()
        distilling.add(*(stage.folder for stage in plan.distilling))
        record = ResultRecord(
            tier=settings.tier,
            protocol=protocol.id,
            protocol_sha256=protocol.digest,
            dataset=protocol.dataset,
            resolution=protocol.resolution,
            ipc=settings.ipc,
            method=planned_method(plan),
            overrides=plan.changed,
            artifact=measured_artifact(distilled),
            test=measured_test(protocol, test, plan.evaluating.sample),
            seeds=seeds,
            cost=(*distilling.found, *evaluating.found),
            provenance=provenance(
                run,
                engines_used(protocol, settings.engine),
                [*distilling.commits, *evaluating.commits],
                evaluating.searched,
            ),
            flags=flags(seeds),
        )
        folder = plan.distilling[-1].folder.path / "distilled"
        paths = {
            "artifact": folder / MANIFEST,
            "images": folder / PREVIEW,
            **networks(plan.distilling, plan.evaluating),
            **run.processes.from_main(lambda: file_record(record, plan.place, warnings.append)),
        }
    return Finished(record, paths, tuple(warnings))


def _tracked(plan: Plan) -> tuple[str, dict[str, object]]:
    """What trackers call a run, and its settings."""
    recipe = plan.task.recipe
    tables = {"regulariser": recipe.regulariser, **recipe.params}
    settings = {
        f"{table}.{key}": value for table, found in tables.items() for key, value in found.items()
    }
    head = {"method": plan.method.name, "protocol": plan.protocol.id, "ipc": plan.settings.ipc}
    name = f"{plan.method.name}-{plan.protocol.id}-ipc{plan.settings.ipc}{plan.place.mark}"
    return name, {**head, "seed": plan.settings.seed, **settings}


def _keep_references(plan: Plan) -> None:
    """Refuses to replace a published record by one without the references that it has."""
    path = plan.place.published_path(plan.protocol.id, plan.settings.ipc)
    if path is None or plan.settings.references or not path.is_file():
        return
    if any(run.references for run in load_record(path).seeds):
        raise GuardbenchError(
            f"--publish: {path} holds the references of IOR, LRS and ARS; add --references, or remove it."
        )


def prepare(plan: Plan) -> tuple[RealDataset, RealDataset]:
    """The training and test images, downloaded and decoded where they are not yet.

    Raises:
        GuardbenchError: they are not what the protocol measures, or too few: refused before the long part.
    """
    train, test = (_load(plan, split) for split in ("train", "val"))
    tested = measured_test(plan.protocol, test, plan.evaluating.sample)
    if not train.complete:
        plan.task.run.progress.say(
            f"{len(train)} of {dataset_info(train.name).train_count} training images of {train.name} are "
            "here: the record will say so, and has no rank"
        )
    if plan.checkout is not None:
        for split in (train, test):
            require_complete(split)
        require_the_boards_images(plan.checkout, plan.protocol, tested)
        for folder in (stage.folder for stage in plan.stages):
            require_committed(folder.path, (folder.finished() or {}).get("commits", ()))
    elif not test.complete and plan.protocol.test.sha256 is None:
        plan.task.run.progress.say(
            f"{len(test)} of {dataset_info(test.name).val_count} validation images of {test.name} are here: "
            "the test images are drawn from these, and differ from those of other records"
        )
    return train, test


def require_complete(split: RealDataset) -> None:
    """Refuses to publish what was made or measured with a part of the official split.

    Raises:
        GuardbenchError: images are missing.
    """
    if not split.complete:
        what = "training" if split.split == "train" else "validation"
        official = dataset_info(split.name).count("train" if split.split == "train" else "val")
        raise GuardbenchError(
            f"--publish: {len(split)} {what} images of {split.name} are here and the official split has "
            f"{official}; publish with all of them."
        )


def networks(distilling: Sequence[PlannedStage], evaluating: EvaluationPlan) -> dict[str, Path]:
    """Where the weights lie that `evaluate` and `diagnose` take."""
    paths = [stage.folder.path / TEACHER for stage in distilling]
    teachers = [path for path in paths if path.is_file()]
    students = {
        f"student {seed.scoring.seed}": seed.student.folder.path / STUDENT
        for seed in evaluating.seeds
    }
    return {**({"teacher": teachers[0]} if teachers else {}), **students}


def _fields(distiller: Distiller, kind: str) -> dict[str, list[str]]:
    """What `--set` may name, where the regulariser is of that kind."""
    found = {name: list(table.model_fields) for name, table in tables(distiller.params).items()}
    regulariser = resolve(REGULARISERS, "regulariser", kind)
    numbers = [part.name for part in fields(regulariser) if part.name != "threat"]
    return {**found, "regulariser": ["kind", *numbers]}


def _load(plan: Plan, split: str) -> RealDataset:
    settings = plan.settings
    return load_split(
        plan.protocol.dataset,
        split,
        resolution=plan.protocol.resolution,
        data_dir=settings.data_dir,
        cache_dir=settings.cache_dir,
        progress=plan.task.run.progress,
        per_class=settings.ipc if split == "train" else 1,
    )


def planned_method(plan: Plan) -> Method:
    """What the record will say of the method."""
    recipe = plan.task.recipe
    return Method(
        name=plan.method.name,
        title=plan.method.title,
        distiller=plan.method.distiller,
        regulariser=str(recipe.regulariser["kind"]),
        recipe_sha256=recipe.digest,
        official=not plan.changed,
    )
