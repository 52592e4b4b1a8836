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
from guardbench.attacks.base import Images, score_clean
from guardbench.data.dataset import RealDataset
from guardbench.distilled import DistilledDataset
from guardbench.distillers.base import PlannedStage
from guardbench.protocol import Protocol, Student
from guardbench.records import LabelKind, Outcome, Reference
from guardbench.runtime import Run
from guardbench.scoring import Costs
from guardbench.training import plan_relabel, plan_student, relabel, train_student


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
    run: Run, protocol: Protocol, *, artifact: str, images: int, kind: LabelKind
) -> tuple[ReferencePlan, ...]:
    """Plans the students that a distilled set is compared with; needs no images.

    Args:
        artifact: key of what makes the dataset.
        images: how many it has.
        kind: of its labels; hard ones need no `hard` reference, since that is the student itself.
    """
    plans = []
    for way in get_args(Reference):
        if way == "hard" and kind == "hard":
            continue
        student = _without_augmentation(protocol.student) if "plain" in way else protocol.student
        changed = "random" if way.startswith("random") else way if way == "hard" else None
        subject = canonical.digest([artifact, changed]) if changed else artifact
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
        if plan.labels is not None:
            with costs.of(plan.labels):
                relabel(run, images, plan.student, plan.labels)
        found = found or [{} for _ in plan.seeds]
        for place, stage in enumerate(plan.seeds):
            with costs.of(stage):
                seed = plan.student.seeds[place]
                model = train_student(run, images, plan.student, seed, stage, plan.labels)
                right = score_clean(model, x, y)
            found[place][plan.way] = Outcome.from_flags(right.tolist())
    return found


def _without_augmentation(student: Student) -> Student:
    return student.model_copy(update={"crop_scale": (1.0, 1.0), "flip": False, "cutmix": 0.0})


def _images_of(
    way: Reference, run: Run, distilled: DistilledDataset, train: RealDataset
) -> DistilledDataset:
    """The set that the students of a way learn from.

    A random subset takes the place of the images and keeps the teacher. Soft labels belong to images,
    so that a random subset without a teacher has hard ones.
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
