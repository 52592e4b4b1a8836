"""Students: trained on a distilled dataset as the protocol says, whoever made the dataset.

With a teacher (SRe2L's relabel, section 3.3, after FKD) the student matches the teacher's logits on
exactly the view that it sees. The labels are made once, stored as float16 an epoch, and shared by all
students of the protocol. Hard and soft labels are mixed as CutMix mixes the pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import functional as F

from guardbench.distilled import DistilledDataset
from guardbench.distillers.base import PlannedStage
from guardbench.models import Classifier, build_model, load_trained, save_weights
from guardbench.protocol import Student
from guardbench.runtime import Run, StageFolder, check_finite
from guardbench.store import write_bytes
from guardbench.views import View, epoch_views

LABELS = "labels.safetensors"
STUDENT = "student.safetensors"


def plan_relabel(
    run: Run, artifact: str, student: Student, images: int, name: str = "relabel"
) -> PlannedStage:
    """The stage that labels every view of every epoch; `artifact` is the key of what made the set."""
    words = {
        "stage": "relabel",
        "artifact": artifact,
        "views": student.model_dump(mode="json", include=_SHAPES_VIEWS),
        "seed": run.seed,
        "precision": run.precision,
    }
    folder = run.stage(name, "labels", words)
    # A forward pass is about a third of a forward and a backward.
    return PlannedStage(folder, f"{student.epochs} epochs", student.epochs * images / 3)


def plan_student(
    run: Run, artifact: str, student: Student, images: int, seed: int, name: str | None = None
) -> PlannedStage:
    """The stage that trains the student of one seed; called `student <seed>` unless told."""
    shaping = student.words()
    del shaping["seeds"]
    words = {
        "stage": "student",
        "artifact": artifact,
        "student": shaping,
        "student_seed": seed,
        "seed": run.seed,
        "precision": run.precision,
    }
    folder = run.stage(name or f"student {seed}", "students", words)
    return PlannedStage(folder, f"{student.epochs} epochs", student.epochs * images)


_SHAPES_VIEWS = {"epochs", "batch_size", "crop_scale", "flip", "cutmix"}


def relabel(run: Run, distilled: DistilledDataset, student: Student, stage: PlannedStage) -> None:
    """Stores the teacher's logits on every view as float16 [epochs, N, K], in the views' order."""
    folder, teacher = stage.folder, distilled.teacher
    if folder.finished() is not None:
        return
    assert teacher is not None, "only a teacher labels views"
    teacher.to(run.device).eval()
    images = distilled.images.to(run.device)
    state = folder.begin(run.device)
    stored = torch.zeros(
        student.epochs, len(images), len(distilled.manifest.classes), dtype=torch.float16
    )
    first = 0
    if state is not None:
        first = int(state["epoch"])
        stored[:first] = state["labels"]
    with run.progress.stage(folder.name, student.epochs, "epochs", first) as bar:
        for epoch in range(first, student.epochs):
            rows = []
            for view in _views(run, student, distilled, epoch):
                with torch.no_grad(), run.accelerator.autocast():
                    rows.append(teacher(view.render(images)).half().cpu())
            stored[epoch] = torch.cat(rows)
            bar.advance()
            if folder.due() and epoch + 1 < student.epochs:
                folder.checkpoint({"epoch": epoch + 1, "labels": stored[: epoch + 1].clone()})
    run.processes.from_main(lambda: write_bytes(folder.path / LABELS, save({"logits": stored})))
    folder.finish(run.device, (LABELS,))


def train_students(
    run: Run,
    distilled: DistilledDataset,
    student: Student,
    stages: Mapping[int, PlannedStage],
    labels: PlannedStage | None,
) -> list[Classifier]:
    """Trains the students of some seeds, or loads those that an earlier run has trained.

    Args:
        stages: seed -> its stage, from `plan_student`; at most one for each process of the run, which
            train one each, side by side. The seed is of the student's initial weights, and of its
            views where no teacher labels them.
        labels: the finished relabel stage, when the set has a teacher.

    Returns:
        The students in eval mode, without gradients for their weights, in float32, in the order of
        `stages`.
    """
    models = {seed: _fresh(run, distilled, student, seed) for seed in stages}
    left = {seed: stage for seed, stage in stages.items() if stage.folder.finished() is None}
    if left:
        logits = None
        if labels is not None:
            logits = run.processes.from_main(
                lambda: load_file(labels.folder.path / LABELS)["logits"]
            )
        folders = [stage.folder for stage in left.values()]
        states = [folder.begin(run.device) for folder in folders]
        mine = dict(enumerate(left)).get(run.processes.rank)
        own = None
        if mine is not None:
            model = models[mine].to(run.device)
            own = _Training(run, distilled, student, mine, left[mine].folder.name, model, logits)
            own.resume(states[run.processes.rank])
        _train_side_by_side(run, student, folders, own)
        trained = run.processes.collect(None if own is None else own.weights())
        for (seed, stage), weights in zip(left.items(), trained, strict=False):
            models[seed].load_state_dict(weights or {})
            run.processes.from_main(
                partial(save_weights, models[seed], stage.folder.path / STUDENT)
            )
            stage.folder.finish(run.device, (STUDENT,))
    return [
        load_trained(run, models[seed], stage.folder.path / STUDENT)
        for seed, stage in stages.items()
    ]


def _fresh(run: Run, distilled: DistilledDataset, student: Student, seed: int) -> Classifier:
    return build_model(
        student.arch,
        channels=distilled.manifest.channels,
        classes=len(distilled.manifest.classes),
        resolution=distilled.manifest.resolution,
        seed=run.generator("student", "init", seed).initial_seed(),
    )


def _train_side_by_side(
    run: Run, student: Student, folders: Sequence[StageFolder], own: _Training | None
) -> None:
    """Runs all epochs of the students of `folders`, of which this process trains its `own`, if any."""
    name = ", ".join(folder.name for folder in folders)
    begun = run.processes.collect(student.epochs if own is None else own.epoch)
    with run.progress.stage(name, student.epochs, "epochs", min(begun)) as bar:
        for epoch in range(min(begun), student.epochs):
            if own is not None and own.epoch == epoch:
                own.run_epoch()
            if own is not None:
                run.log(epoch + 1, **{f"{folders[0].name.replace(' ', '_')}_loss": own.loss})
            bar.advance(1, "" if own is None else f"loss {own.loss:.4f}")
            if folders[0].due() and epoch + 1 < student.epochs:
                states = run.processes.collect(None if own is None else own.state())
                for folder, state in zip(folders, states, strict=False):
                    folder.checkpoint(state or {})


class _Training:
    """One student on its way."""

    def __init__(
        self,
        run: Run,
        distilled: DistilledDataset,
        student: Student,
        seed: int,
        name: str,
        model: Classifier,
        logits: Tensor | None,
    ) -> None:
        self.run, self.distilled, self.student = run, distilled, student
        self.name, self.model, self.logits = name, model, logits
        self.own_views = None if logits is not None else seed
        self.optimizer = _optimizer(model, student)
        self.images = distilled.images.to(run.device)
        self.loss_of = _loss(distilled, student, run.device)
        self.epoch, self.loss = 0, 0.0

    def resume(self, state: dict[str, Any] | None) -> None:
        """Goes on from what `state` gave to an earlier run."""
        if state is not None:
            self.epoch = int(state["epoch"])
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def weights(self) -> dict[str, Tensor]:
        """Of the student."""
        return self.model.state_dict()

    def run_epoch(self) -> None:
        """One epoch, in the views' order."""
        run, epoch = self.run, self.epoch
        self.optimizer.param_groups[0]["lr"] = self.student.lr_at(epoch)
        self.model.train()
        begun = 0
        for view in _views(run, self.student, self.distilled, epoch, self.own_views):
            count = len(view.indices)
            rows = None if self.logits is None else self.logits[epoch, begun : begun + count]
            begun += count
            self.optimizer.zero_grad(set_to_none=True)
            with run.accelerator.autocast():
                out = self.model(view.render(self.images))
            loss = self.loss_of(out.float(), view, rows)
            loss.backward()  # type: ignore[no-untyped-call]
            self.loss = check_finite(
                loss, f"{self.name}, epoch {epoch + 1}", "lower student.lr in the protocol"
            )
            self.optimizer.step()
        self.epoch += 1


def _optimizer(model: Classifier, student: Student) -> torch.optim.Optimizer:
    decay = student.weight_decay
    if student.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), student.lr, weight_decay=decay)
    return torch.optim.SGD(
        model.parameters(), student.lr, momentum=student.momentum, weight_decay=decay
    )


def _views(
    run: Run, student: Student, distilled: DistilledDataset, epoch: int, seed: int | None = None
) -> list[View]:
    """Views of an epoch: the shared ones that a teacher has labelled, or a student's own."""
    name = run.generator("views", "shared" if seed is None else seed).initial_seed()
    return list(
        epoch_views(
            student,
            images=len(distilled.images),
            resolution=distilled.manifest.resolution,
            seed=name,
            epoch=epoch,
        )
    )


def _loss(
    distilled: DistilledDataset, student: Student, device: torch.device
) -> Callable[[Tensor, View, Tensor | None], Tensor]:
    """The student's loss of logits [b, K] on a view, given the teacher's logits on it, if any."""
    heat = student.temperature
    soft = distilled.soft
    if soft is None:
        soft = F.one_hot(distilled.hard, len(distilled.manifest.classes)).float()
    soft = soft.to(device)

    def loss(out: Tensor, view: View, rows: Tensor | None) -> Tensor:
        if rows is not None:
            wanted = F.log_softmax(rows.to(device).float() / heat, dim=1)
            found = F.log_softmax(out / heat, dim=1)
            return F.kl_div(found, wanted, reduction="batchmean", log_target=True)
        target = soft[view.indices.to(device)]
        if view.mix is not None:
            partners, box = view.mix
            target = box.lam * target + (1 - box.lam) * target[partners.to(device)]
        return F.cross_entropy(out, target)

    return loss
