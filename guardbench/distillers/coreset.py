"""Coresets: real images, chosen. What a distilled set must beat, and the whole set as the upper reference.

Herding and k-center choose in the space of a squeezed teacher's features, class by class. The same
teacher may label the views of the chosen images, so that a coreset stands beside SRe2L on equal terms.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from guardbench.data.dataset import RealDataset
from guardbench.distilled import (
    MANIFEST,
    DistilledDataset,
    load_distilled,
    save_distilled,
    told_by_main,
)
from guardbench.distillers.base import PlannedStage, Task, read_params
from guardbench.distillers.squeeze import Squeeze, plan_squeeze, squeeze, squeeze_folder
from guardbench.errors import GuardbenchError
from guardbench.fields import Strict
from guardbench.models import Classifier, features
from guardbench.records import LabelKind
from guardbench.stages import StageFolder

MOST_BYTES = 8 << 30
"""Of a set held in memory as float32."""


class Select(Strict):
    """The `select` table.

    Attributes:
        labels: `hard`, the dataset's own; or `teacher`, the squeezed teacher labels every view.
        batch_size: images at once through the teacher; changes speed alone.
    """

    labels: Literal["hard", "teacher"] = "hard"
    batch_size: int = Field(default=256, gt=0)


class Params(Strict):
    """A recipe's `params` for this family; `squeeze` is needed only where a teacher is."""

    squeeze: Squeeze | None = None
    select: Select = Select()


class _Coreset:
    """What the coresets share: an optional teacher, then one selection."""

    params = Params
    name: str
    by_features: bool

    def plan(self, task: Task) -> list[PlannedStage]:
        """See `Distiller.plan`."""
        teacher, kind = self._squeeze(task), task.recipe.regulariser["kind"]
        if teacher is None and kind != "none":
            raise GuardbenchError(
                f"method {task.method.name}: trains no network on real images, so the regulariser {kind} has "
                "nothing to act on; leave it out, or take --set select.labels=teacher."
            )
        stages = [] if teacher is None else [plan_squeeze(task, teacher)]
        images = task.train_images if self.by_features else self.image_count(task)
        passes = images / 3 if self.by_features else 0.01 * images
        return [
            *stages,
            PlannedStage(
                self._folder(task),
                f"{self.name} of {task.train_images} images",
                passes,
                split=False,
                arch=None if teacher is None else teacher.arch,
            ),
        ]

    def label_kind(self, task: Task) -> LabelKind:
        """See `Distiller.label_kind`."""
        return read_params(task, Params).select.labels

    def image_count(self, task: Task) -> int:
        """See `Distiller.image_count`."""
        return task.ipc * len(task.classes)

    def distill(self, task: Task, train: RealDataset) -> DistilledDataset:
        """See `Distiller.distill`."""
        wanted = self._squeeze(task)
        teacher = None if wanted is None else squeeze(task, wanted, train)
        folder = self._folder(task)
        with folder.claimed() as stored:
            if stored is None:
                return self._distill(task, train, teacher, folder)
        return told_by_main(task.run.processes, partial(load_distilled, folder.path / "distilled"))

    def _distill(
        self, task: Task, train: RealDataset, teacher: Classifier | None, folder: StageFolder
    ) -> DistilledDataset:
        params, wanted, run = read_params(task, Params), self._squeeze(task), task.run
        folder.begin(run.device)
        chosen = self.choose(task, train, teacher)
        labels_views = teacher if params.select.labels == "teacher" else None
        distilled = told_by_main(
            run.processes,
            partial(
                save_distilled,
                folder.path / "distilled",
                images=train.batch(chosen),
                hard=train.labels[chosen],
                teacher=labels_views,
                teacher_arch=wanted.arch
                if wanted is not None and labels_views is not None
                else None,
                dataset=task.dataset,
                ipc=self.ipc(task),
                method=task.method.name,
                classes=task.classes,
                provenance={"stage": folder.key, "seed": run.seed, "precision": run.precision},
            ),
        )
        folder.finish(run.device, (f"distilled/{MANIFEST}",))
        return distilled

    def choose(self, task: Task, train: RealDataset, teacher: Classifier | None) -> Tensor:
        """Positions int64 [N] of the chosen images, class after class, best first."""
        found = []
        for label in range(len(task.classes)):
            rows = torch.nonzero(train.labels == label).flatten()
            if len(rows) < task.ipc:
                raise GuardbenchError(
                    f"--ipc {task.ipc}: class {train.class_names[label]} of {task.dataset} has only "
                    f"{len(rows)} training images."
                )
            with task.run.progress.stage(f"{self.name} {label + 1}", len(rows), "images") as bar:
                found.append(rows[self.order(task, train, teacher, label, rows)])
                bar.advance(len(rows))
        return torch.cat(found)

    def order(
        self, task: Task, train: RealDataset, teacher: Classifier | None, label: int, rows: Tensor
    ) -> Tensor:
        """Which `task.ipc` of one class's images are chosen, as positions in `rows` [n], best first."""
        raise NotImplementedError

    def ipc(self, task: Task) -> int:
        """What the manifest says."""
        return task.ipc

    def _squeeze(self, task: Task) -> Squeeze | None:
        params = read_params(task, Params)
        if not self.by_features and params.select.labels == "hard":
            return None
        if params.squeeze is None:
            raise GuardbenchError(
                f"baselines/{task.method.name}/method.toml: recipe {task.dataset}@{task.resolution}: "
                "params.squeeze: missing, and a teacher is needed; say how it is trained."
            )
        return params.squeeze

    def _folder(self, task: Task) -> StageFolder:
        teacher, select = self._squeeze(task), read_params(task, Params).select
        words = {
            "stage": self.name,
            **task.words(),
            "teacher": None if teacher is None else squeeze_folder(task, teacher).key,
            "labels": select.labels,
            "ipc": self.ipc(task),
            "method": task.method.name,
        }
        return task.run.stage(self.name, "distilled", words)


class Random(_Coreset):
    """A random subset of each class; that of a smaller IPC is its beginning."""

    name = "random"
    by_features = False

    def order(
        self, task: Task, train: RealDataset, teacher: Classifier | None, label: int, rows: Tensor
    ) -> Tensor:
        """See `_Coreset.order`."""
        del train, teacher
        generator = task.run.generator("random", label)
        return torch.randperm(len(rows), generator=generator)[: task.ipc]


class _ByFeatures(_Coreset):
    by_features = True

    def order(
        self, task: Task, train: RealDataset, teacher: Classifier | None, label: int, rows: Tensor
    ) -> Tensor:
        """See `_Coreset.order`."""
        del label
        assert teacher is not None, "planned with one"
        size = read_params(task, Params).select.batch_size
        seen = [
            features(teacher, train.batch(part, task.run.device)).cpu()
            for part in torch.split(rows, size)
        ]
        # float64, so that near ties fall alike on every device that computed the features
        return self.pick(torch.cat(seen).double(), task.ipc)

    def pick(self, points: Tensor, count: int) -> Tensor:
        """Positions int64 [count] of the chosen rows of `points` [n, D], best first."""
        raise NotImplementedError


class Herding(_ByFeatures):
    """The images whose mean feature follows the class's mean most closely (Welling, ICML 2009).

    As in iCaRL (Rebuffi et al., CVPR 2017, algorithm 4), without repetition.
    """

    name = "herding"

    def pick(self, points: Tensor, count: int) -> Tensor:
        """See `_ByFeatures.pick`."""
        mean, total = points.mean(0), torch.zeros_like(points[0])
        taken = torch.zeros(len(points), dtype=torch.bool)
        chosen = []
        for step in range(1, count + 1):
            gaps = (mean - (total + points) / step).norm(dim=1)
            best = int(gaps.masked_fill(taken, torch.inf).argmin())
            taken[best] = True
            total += points[best]
            chosen.append(best)
        return torch.tensor(chosen, dtype=torch.int64)


class KCenter(_ByFeatures):
    """The image nearest the class's mean, then always the one farthest from those chosen.

    Greedy k-center (Sener & Savarese, ICLR 2018, algorithm 1; Gonzalez, 1985): its radius is at most
    twice the smallest possible.
    """

    name = "k-center"

    def pick(self, points: Tensor, count: int) -> Tensor:
        """See `_ByFeatures.pick`."""
        chosen = [int((points - points.mean(0)).norm(dim=1).argmin())]
        gaps = (points - points[chosen[0]]).norm(dim=1)
        for _ in range(count - 1):
            gaps[chosen] = -1  # a copy of a chosen image is taken before that image again
            farthest = int(gaps.argmax())
            chosen.append(farthest)
            gaps = torch.minimum(gaps, (points - points[farthest]).norm(dim=1))
        return torch.tensor(chosen, dtype=torch.int64)


class Full(_Coreset):
    """The whole training set: what no distilled set is expected to reach. Alike at every IPC."""

    name = "full"
    by_features = False

    def image_count(self, task: Task) -> int:
        """See `Distiller.image_count`."""
        return task.train_images

    def plan(self, task: Task) -> list[PlannedStage]:
        """See `Distiller.plan`."""
        needed = task.train_images * task.channels * task.resolution**2 * 4
        if needed > MOST_BYTES:
            raise GuardbenchError(
                f"full: {task.train_images} images at {task.resolution} px take {needed / 2**30:.0f} "
                f"GiB of memory, the most is {MOST_BYTES >> 30}; choose a smaller resolution."
            )
        return super().plan(task)

    def choose(self, task: Task, train: RealDataset, teacher: Classifier | None) -> Tensor:
        """See `_Coreset.choose`."""
        del task, teacher
        return torch.argsort(train.labels, stable=True)

    def ipc(self, task: Task) -> int:
        """See `_Coreset.ipc`: as many as there are."""
        del task
        return 0
