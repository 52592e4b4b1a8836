"""What a distilled set is compared with: the students that DD-Ranking's scores need (arXiv:2505.13300).

A distilled set is worth what it adds to a random subset of the same size, and a way of training is no
merit of the images. So students are also trained, with the protocol's seeds, on a random subset in the
same way (`random`), on the distilled images with hard labels (`hard`), and on both without augmentation
(`plain`, `random-plain`). They are measured clean, on the protocol's test images.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor

from guardbench import canonical
from guardbench.attacks.base import Images
from guardbench.data.dataset import RealDataset
from guardbench.distilled import DistilledDataset
from guardbench.distillers.base import PlannedStage
from guardbench.protocol import Protocol, Student
from guardbench.records import LabelKind, Outcome, Reference
from guardbench.runtime import Run
from guardbench.scoring import Costs, clean_verdicts
from guardbench.training import plan_relabel, plan_student, relabel, train_students


@dataclass(frozen=True)
class ReferencePlan:
    """The stages of one way of training.

    Attributes:
        way: which.
        student: the protocol's, without augmentation where the way says so.
        labels: the teacher's on this way's views; None where none are needed.
        seeds: one student each, in the protocol's order.
    """

    way: Reference
    student: Student
    labels: PlannedStage | None
    seeds: tuple[PlannedStage, ...]

    @property
    def stages(self) -> list[PlannedStage]:
        """In the order in which they run."""
        return [*([] if self.labels is None else [self.labels]), *self.seeds]


def plan_references(
    run: Run,
    protocol: Protocol,
    *,
    artifact: str,
    images: int,
    kind: LabelKind,
    train_digest: str | None,
) -> tuple[ReferencePlan, ...]:
    """Plans the students that a distilled set is compared with; needs no images.

    Args:
        artifact: key of what makes the dataset.
        images: how many it has.
        kind: of its labels. Hard ones need no `hard` reference, since that is the student itself. Soft
            ones belong to their images, so that no random subset can be trained in their way.
        train_digest: of the decoded training images; None while they have not been decoded.

    Returns:
        Without the ways that would be others' copies, as those without augmentation are under a protocol
        that has none.
    """
    plain = _without_augmentation(protocol.student)
    # The random subset of a hard-labelled set is that of every other one of its size.
    like = artifact if kind == "teacher" else "hard"
    subset = canonical.digest(["random", train_digest, images, like])
    subjects = {"random": subset, "random-plain": subset, "plain": artifact}
    plans = []
    for way in get_args(Reference):
        if (way == "hard" and kind == "hard") or ("random" in way and kind == "soft"):
            continue
        if "plain" in way and plain == protocol.student:
            continue
        student = plain if "plain" in way else protocol.student
        subject = subjects.get(way) or canonical.digest([artifact, way])
        labels = None
        if kind == "teacher" and way != "hard":
            labels = plan_relabel(run, subject, student, images, f"reference {way} labels")
        seeds = tuple(
            plan_student(run, subject, student, images, seed, f"reference {way} {seed}")
            for seed in student.seeds
        )
        plans.append(ReferencePlan(way, student, labels, seeds))
    return tuple(plans)


def measure_references(
    run: Run,
    plans: tuple[ReferencePlan, ...],
    distilled: DistilledDataset,
    train: RealDataset,
    x: Images,
    y: Tensor,
    costs: Costs,
) -> list[dict[Reference, Outcome]]:
    """Trains the reference students and measures them clean.

    Args:
        plans: of `plan_references`; finished stages are read, not run.
        train: the dataset's training split, for the random subset.
        x, y: the protocol's test images [N, C, R, R] and labels [N].

    Returns:
        Their outcomes by way, one dictionary a seed, in the protocol's order.
    """
    found: list[dict[Reference, Outcome]] = []
    for plan in plans:
        images = _images_of(plan.way, run, distilled, train)
        # A random subset with hard labels is shared by all sets of its size.
        shared = plan.way.startswith("random") and distilled.teacher is None
        made_from = None if shared else distilled.digest
        if plan.labels is not None:
            with costs.of(plan.labels):
                relabel(run, images, plan.student, plan.labels, made_from)
        found = found or [{} for _ in plan.seeds]
        pairs = list(enumerate(zip(plan.student.seeds, plan.seeds, strict=True)))
        for some in run.processes.rounds(pairs):
            stages = {seed: stage for _, (seed, stage) in some}
            with costs.of(*stages.values()):
                models = train_students(run, images, plan.student, stages, plan.labels, made_from)
            for (place, _), model in zip(some, models, strict=True):
                right = clean_verdicts(run, model, x, y)
                found[place][plan.way] = Outcome.from_flags(right.tolist())
    return found


def _without_augmentation(student: Student) -> Student:
    return student.model_copy(update={"crop_scale": (1.0, 1.0), "flip": False, "cutmix": 0.0})


def _images_of(
    way: Reference, run: Run, distilled: DistilledDataset, train: RealDataset
) -> DistilledDataset:
    """The set that the students of a way learn from.

    A random subset takes the place of the images and keeps the teacher.
    """
    if way.startswith("random"):
        chosen = random_subset(run, train, distilled.hard)
        return replace(distilled, images=train.batch(chosen), hard=train.labels[chosen], soft=None)
    return replace(distilled, soft=None, teacher=None) if way == "hard" else distilled


def random_subset(run: Run, train: RealDataset, like: Tensor) -> Tensor:
    """Positions in `train` of a random subset with as many images of each class as labels in `like`."""
    counts = torch.bincount(like, minlength=train.num_classes).tolist()
    chosen = []
    for label, count in enumerate(counts):
        rows = torch.nonzero(train.labels == label).flatten()
        generator = run.generator("random", label)
        chosen.append(rows[torch.randperm(len(rows), generator=generator)[:count]])
    return torch.cat(chosen)
