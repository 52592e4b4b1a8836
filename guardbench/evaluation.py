"""Students x attacks: how accurate is a model trained on this distilled dataset?

Nothing here knows who made the dataset.
"""

from __future__ import annotations

from dataclasses import dataclass

from guardbench.data.dataset import RealDataset
from guardbench.distilled import DistilledDataset
from guardbench.distillers.base import PlannedStage
from guardbench.protocol import Protocol, list_digest
from guardbench.records import Artifact, Engine, LabelKind, SeedRun, TestSet
from guardbench.references import ReferencePlan, measure_references, plan_references
from guardbench.runtime import Run
from guardbench.scoring import Costs, score
from guardbench.scoring_plan import ScoringPlan, plan_scoring
from guardbench.tier import stratified
from guardbench.training import plan_relabel, plan_student, relabel, train_students


@dataclass(frozen=True)
class SeedPlan:
    """The stages of one student: its training, then its scoring."""

    student: PlannedStage
    scoring: ScoringPlan


@dataclass(frozen=True)
class EvaluationPlan:
    """All stages that answer the question for one distilled dataset under one protocol.

    Attributes:
        labels: the teacher's; None where the labels need none.
        seeds: one student each.
        sample: images of the dev tier, None for the official one.
        references: the students that it is compared with; empty where none are wanted.
    """

    labels: PlannedStage | None
    seeds: tuple[SeedPlan, ...]
    sample: int | None = None
    references: tuple[ReferencePlan, ...] = ()

    @property
    def stages(self) -> list[PlannedStage]:
        """In the order in which they run."""
        found = [] if self.labels is None else [self.labels]
        for plan in self.seeds:
            found += [plan.student, *plan.scoring.stages]
        return found + [stage for plan in self.references for stage in plan.stages]


def plan_evaluation(
    run: Run,
    protocol: Protocol,
    *,
    artifact: str,
    images: int,
    kind: LabelKind,
    train_digest: str | None,
    test_digest: str | None,
    engine: Engine = "guardbench",
    sample: int | None = None,
    references: bool = False,
) -> EvaluationPlan:
    """Plans the evaluation of a distilled dataset; needs no images.

    Args:
        artifact: key of what makes the dataset, so that all stages hang on it.
        images: how many the distilled dataset has.
        kind: of its labels.
        train_digest, test_digest: of the decoded training and validation images; None while they have
            not been decoded.
        engine: whose AutoAttack and Square run.
        sample: images of the dev tier (`tier.sample_size`), None for the official one.
        references: whether to train the students that DD-Ranking's scores need.
    """
    student = protocol.student
    labels = plan_relabel(run, artifact, student, images) if kind == "teacher" else None
    seeds = []
    for position, seed in enumerate(student.seeds):
        training = plan_student(run, artifact, student, images, seed)
        scoring = plan_scoring(
            run,
            protocol,
            seed=seed,
            position=position,
            subject=training.folder.key,
            test_digest=test_digest,
            engine=engine,
            sample=sample,
        )
        seeds.append(SeedPlan(training, scoring))
    compared: tuple[ReferencePlan, ...] = ()
    if references:
        compared = plan_references(
            run, protocol, artifact=artifact, images=images, kind=kind, train_digest=train_digest
        )
    return EvaluationPlan(labels, tuple(seeds), sample, compared)


def evaluate(
    run: Run,
    protocol: Protocol,
    plan: EvaluationPlan,
    distilled: DistilledDataset,
    train: RealDataset,
    test: RealDataset,
) -> tuple[tuple[SeedRun, ...], Costs]:
    """Trains the protocol's students on a distilled dataset and attacks them.

    Args:
        plan: of `plan_evaluation`; finished stages are read, not run.
        train: the dataset's training split, for the references alone.
        test: the dataset's validation split; only the protocol's images are measured.

    Returns:
        One SeedRun a student, and what the stages cost.

    Raises:
        GuardbenchError: the test images are not the protocol's, or an attack broke its own rules.
    """
    order = measured_indices(protocol, test, plan.sample)
    x, y = test.select(order), test.labels[order]
    costs = Costs()
    made_from = distilled.digest
    if plan.labels is not None:
        with costs.of(plan.labels):
            relabel(run, distilled, protocol.student, plan.labels, made_from)
    runs = []
    for seeds in run.processes.rounds(plan.seeds):
        stages = {seed.scoring.seed: seed.student for seed in seeds}
        with costs.of(*stages.values()):
            models = train_students(
                run, distilled, protocol.student, stages, plan.labels, made_from
            )
        for seed, model in zip(seeds, models, strict=True):
            weights = seed.student.folder.result()
            runs.append(score(run, protocol, seed.scoring, model, x, y, costs, weights))
    beside = measure_references(run, plan.references, distilled, train, x, y, costs)
    for place, references in enumerate(beside):
        runs[place] = SeedRun.model_validate({**dict(runs[place]), "references": references})
    return tuple(runs), costs


def measured_artifact(distilled: DistilledDataset) -> Artifact:
    """The record's description of a distilled dataset."""
    return Artifact(
        sha256=distilled.manifest.sha256,
        label_kind=distilled.manifest.label_kind,
        image_bytes=distilled.image_bytes,
        label_bytes=distilled.manifest.label_bytes,
        images=len(distilled.images),
    )


def measured_indices(protocol: Protocol, test: RealDataset, sample: int | None) -> list[int]:
    """The places in `test` of the images that a tier measures, in the protocol's order.

    Args:
        test: the dataset's validation split.
        sample: images of the dev tier, None for the official one.

    Raises:
        GuardbenchError: the images are not the protocol's, or a class has too few for the sample.
    """
    order = protocol.test_indices(test.ids)
    if sample is None:
        return order
    labels = test.labels[order].tolist()
    return [order[place] for place in stratified(labels, sample, test.num_classes)]


def measured_test(protocol: Protocol, test: RealDataset, sample: int | None) -> TestSet:
    """The record's description of the images measured."""
    order = measured_indices(protocol, test, sample)
    return TestSet(
        data_sha256=test.digest,
        list_sha256=list_digest(test.ids[i] for i in order),
        total=len(order),
    )
