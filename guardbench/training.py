"""Students: trained on a distilled dataset as the protocol says, whoever made the dataset.

With a teacher (SRe2L's relabel, section 3.3, after FKD) the student matches the teacher's logits on
exactly the view that it sees. The labels are made once, stored an epoch at a time
(`guardbench.labels`), and shared by all students of the protocol. Hard and soft labels are mixed as CutMix
mixes the pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from guardbench import canonical
from guardbench.distilled import DistilledDataset
from guardbench.distillers.base import PlannedStage
from guardbench.labels import INDEX, LabelStore
from guardbench.models import Classifier, build_model, load_trained, save_weights
from guardbench.protocol import Student
from guardbench.report import byte_size
from guardbench.runtime import Run, check_finite
from guardbench.stages import StageFolder
from guardbench.views import View, epoch_views

STUDENT = "student.safetensors"


def plan_relabel(
    run: Run, artifact: str, student: Student, images: int, name: str = "relabel"
) -> PlannedStage:
    """The stage that labels every view of every epoch; `artifact` is the key of what made the set."""
    words = {
        "stage": "relabel",
        "artifact": artifact,
        "views": student.model_dump(mode="json", include=_SHAPES_VIEWS),
        "store": "a file an epoch",
        "seed": run.seed,
        "precision": run.precision,
    }
    if student.label_top_k is not None:
        words |= {"top_k": student.label_top_k, "temperature": student.temperature}
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


def label_store(distilled: DistilledDataset, student: Student, stage: PlannedStage) -> LabelStore:
    """Where a relabel stage keeps its labels."""
    classes = len(distilled.manifest.classes)
    return LabelStore(stage.folder.path, classes, student.label_top_k, student.temperature)


def relabel(
    run: Run,
    distilled: DistilledDataset,
    student: Student,
    stage: PlannedStage,
    made_from: str | None = None,
) -> None:
    """Stores the teacher's logits on every view of every epoch; goes on at the epochs that are not there.

    Args:
        made_from: digest of the set's files, see `StageFolder.claimed`.

    Raises:
        GuardbenchError: there is no room for them.
    """
    with stage.folder.claimed(made_from) as stored:
        if stored is None:
            _relabel(run, distilled, student, stage)


def _relabel(run: Run, distilled: DistilledDataset, student: Student, stage: PlannedStage) -> None:
    folder, teacher = stage.folder, distilled.teacher
    assert teacher is not None, "only a teacher labels views"
    teacher.to(run.device).eval()
    images = placed(distilled.images, run.device)
    store, processes = label_store(distilled, student, stage), run.processes
    if folder.begin(run.device) is None:
        # A checkpoint says from which set labels are: none is there before it, nor after it is lost.
        processes.from_main(store.clear)
        folder.checkpoint({})
    left = processes.from_main(lambda: store.left(student.epochs, len(images)))
    begun = student.epochs - len(left)
    with run.progress.stage(folder.name, student.epochs, "epochs", begun) as bar:
        for epochs in processes.rounds(left):
            mine = epochs[processes.rank : processes.rank + 1]
            rows = [label_epoch(run, distilled, student, images, epoch) for epoch in mine]
            found = [row for part in processes.collect(rows) for row in part]
            if processes.main:
                for epoch, logits in zip(epochs, found, strict=True):
                    store.write(epoch, logits)
            bar.advance(len(epochs))
            if folder.due() and epochs[-1] != left[-1]:
                folder.checkpoint({})  # the seconds so far; the labels are where they belong
        size = processes.from_main(lambda: store.seal(student.epochs))
        bar.advance(0, f"{byte_size(size)} of labels")
    folder.finish(run.device, (INDEX,), label_bytes=size)


def label_epoch(
    run: Run, distilled: DistilledDataset, student: Student, images: Tensor, epoch: int
) -> Tensor:
    """The teacher's logits, float16 [N, K] on the CPU, on the views of one epoch in their order.

    Args:
        images: the set's, `placed`.
    """
    teacher = distilled.teacher
    assert teacher is not None, "only a teacher labels views"
    rows = []
    for view in _views(run, student, distilled, epoch):
        with torch.no_grad(), run.autocast():
            rows.append(teacher(view.render(images, run.device)).half().cpu())
    return torch.cat(rows)


def placed(images: Tensor, device: torch.device) -> Tensor:
    """The images on `device`, or where they are when they would take over a quarter of its free memory.

    `View.render` takes them from either; fifty of each of ImageNet's classes are 30 GB.
    """
    if device.type == "cuda" and images.nbytes > torch.cuda.mem_get_info(device)[0] // 4:
        return images
    return images.to(device)


def train_students(
    run: Run,
    distilled: DistilledDataset,
    student: Student,
    stages: Mapping[int, PlannedStage],
    labels: PlannedStage | None,
    made_from: str | None = None,
) -> list[Classifier]:
    """Trains the students of some seeds, or loads those that an earlier run has trained.

    Args:
        stages: seed -> its stage, from `plan_student`; at most one for each process of the run, which
            train one each, side by side. The seed is of the student's initial weights, and of its
            views where no teacher labels them.
        labels: the finished relabel stage, when the set has a teacher.
        made_from: digest of the set's files, see `StageFolder.claimed`.

    Returns:
        The students in eval mode, without gradients for their weights, in float32, in the order of
        `stages`.
    """
    models = {seed: _fresh(run, distilled, student, seed) for seed in stages}
    with ExitStack() as claims:
        # In one order whatever that of the seeds, or two runs could wait for each other.
        found = {
            seed: claims.enter_context(stage.folder.claimed(made_from))
            for seed, stage in sorted(stages.items(), key=lambda item: item[1].folder.path)
        }
        left = {seed: stage.folder for seed, stage in stages.items() if found[seed] is None}
        if left:
            store = None if labels is None else label_store(distilled, student, labels)
            _train(run, distilled, student, {seed: models[seed] for seed in left}, left, store)
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


def _train(
    run: Run,
    distilled: DistilledDataset,
    student: Student,
    models: Mapping[int, Classifier],
    folders: Mapping[int, StageFolder],
    store: LabelStore | None,
) -> None:
    """Trains the students of the seeds of `folders`, one on each process, and keeps their weights."""
    states = [folder.begin(run.device) for folder in folders.values()]
    epochs = None if store is None else run.processes.from_main(store.digests)
    labels = None if epochs is None else canonical.digest(epochs)
    mine = dict(enumerate(folders)).get(run.processes.rank)
    own = None
    if mine is not None:
        model = models[mine].to(run.device)
        own = _Training(run, distilled, student, mine, folders[mine], model, labels)
        own.resume(states[run.processes.rank])
    _train_side_by_side(run, student, [*folders.values()], own, store, epochs or [])
    trained = run.processes.collect(None if own is None else own.weights())
    for (seed, folder), weights in zip(folders.items(), trained, strict=False):
        models[seed].load_state_dict(weights or {})
        run.processes.from_main(partial(save_weights, models[seed], folder.path / STUDENT))
        folder.finish(run.device, (STUDENT,), shared=False)


def _train_side_by_side(
    run: Run,
    student: Student,
    folders: Sequence[StageFolder],
    own: _Training | None,
    store: LabelStore | None,
    digests: Sequence[str],
) -> None:
    """Runs all epochs of the students of `folders`, of which this process trains its `own`, if any.

    Args:
        digests: of the epochs of `store`.
    """
    name = ", ".join(folder.name for folder in folders)
    begun = run.processes.collect(student.epochs if own is None else own.epoch)
    with run.progress.stage(name, student.epochs, "epochs", min(begun)) as bar:
        for epoch in range(min(begun), student.epochs):
            logits = None
            if store is not None:
                logits = run.processes.from_main(partial(store.read, epoch, digests[epoch]))
            if own is not None and own.epoch == epoch:
                own.run_epoch(logits)
            if run.tracked:
                losses = run.processes.collect(math.nan if own is None else own.loss)
                for folder, loss in zip(folders, losses, strict=False):
                    run.log(folder.name, epoch + 1, loss=loss)
            bar.advance(1, "" if own is None else f"loss {own.loss:.4f}")
            if folders[0].due() and epoch + 1 < student.epochs:
                states = run.processes.collect(None if own is None else own.state())
                for folder, state in zip(folders, states, strict=False):
                    folder.checkpoint(state or {}, last=folder is folders[-1])


class _Training:
    """One student on its way.

    Args:
        labels: digest of the teacher's, None where none labels.
    """

    def __init__(
        self,
        run: Run,
        distilled: DistilledDataset,
        student: Student,
        seed: int,
        folder: StageFolder,
        model: Classifier,
        labels: str | None,
    ) -> None:
        self.run, self.distilled, self.student = run, distilled, student
        self.seed, self.folder, self.model, self.labels = seed, folder, model, labels
        self.optimizer, self.scaler = _optimizer(model, student), run.scaler()
        self.images = placed(distilled.images, run.device)
        self.loss_of = _loss(distilled, student, run.device)
        self.epoch, self.loss = 0, 0.0

    def resume(self, state: dict[str, Any] | None) -> None:
        """Goes on from what `state` gave to an earlier run, if its labels were the same."""
        if state is not None and state.get("labels", self.labels) != self.labels:
            self.folder.say(f"{self.folder.name}: its labels are others now, so it begins anew")
        elif state is not None:
            self.epoch = int(state["epoch"])
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state.get("scaler", {}))

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "epoch": self.epoch,
            "labels": self.labels,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def weights(self) -> dict[str, Tensor]:
        """Of the student."""
        return self.model.state_dict()

    def run_epoch(self, logits: Tensor | None) -> None:
        """One epoch, in the views' order, with a teacher's logits [N, K] on the views, if one labels."""
        run, epoch = self.run, self.epoch
        self.optimizer.param_groups[0]["lr"] = self.student.lr_at(epoch)
        self.model.train()
        begun = 0
        own_views = self.seed if logits is None else None
        for view in _views(run, self.student, self.distilled, epoch, own_views):
            count = len(view.indices)
            rows = None if logits is None else logits[begun : begun + count]
            begun += count
            self.optimizer.zero_grad(set_to_none=True)
            with run.autocast():
                out = self.model(view.render(self.images, run.device))
            loss = self.loss_of(out.float(), view, rows)
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            self.loss = check_finite(
                loss, f"{self.folder.name}, epoch {epoch + 1}", "lower student.lr in the protocol"
            )
            self.scaler.step(self.optimizer)
            self.scaler.update()
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
