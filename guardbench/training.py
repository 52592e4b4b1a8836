"""Students: trained on a distilled dataset as the protocol says, whoever made the dataset.

With a teacher (SRe2L's relabel, section 3.3, after FKD) the student matches the teacher's logits on
exactly the view that it sees. The labels are made once, stored as float16 an epoch, and shared by all
students of the protocol. Hard and soft labels are mixed as CutMix mixes the pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import functional as F

from guardbench.distilled import DistilledDataset
from guardbench.distillers.base import PlannedStage
from guardbench.models import Classifier, build_model, load_weights, save_weights
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
    with stage.folder.claimed() as stored:
        if stored is None:
            _relabel(run, distilled, student, stage.folder)


def _relabel(run: Run, distilled: DistilledDataset, student: Student, folder: StageFolder) -> None:
    teacher = distilled.teacher
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
    write_bytes(folder.path / LABELS, save({"logits": stored}))
    folder.finish(run.device, (LABELS,))


def train_student(
    run: Run,
    distilled: DistilledDataset,
    student: Student,
    seed: int,
    stage: PlannedStage,
    labels: PlannedStage | None,
) -> Classifier:
    """Trains the student of one seed, or loads it when an earlier run has.

    Args:
        seed: of the student's initial weights, and of its views where no teacher labels them.
        stage: from `plan_student`.
        labels: the finished relabel stage, when the set has a teacher.

    Returns:
        The student in eval mode, without gradients for its weights, in float32.
    """
    folder = stage.folder
    model = build_model(
        student.arch,
        channels=distilled.manifest.channels,
        classes=len(distilled.manifest.classes),
        resolution=distilled.manifest.resolution,
        seed=run.generator("student", "init", seed).initial_seed(),
    )
    with folder.claimed() as stored:
        if stored is None:
            logits = None
            if labels is not None:
                logits = load_file(labels.folder.path / LABELS)["logits"]
            _train(run, distilled, student, seed, folder, model.to(run.device), logits)
            save_weights(model, folder.path / STUDENT)
            folder.finish(run.device, (STUDENT,))
    load_weights(model, folder.path / STUDENT)
    return model.to(run.device).eval().requires_grad_(False)


def _train(
    run: Run,
    distilled: DistilledDataset,
    student: Student,
    seed: int,
    folder: StageFolder,
    model: Classifier,
    logits: Tensor | None,
) -> None:
    optimizer = _optimizer(model, student)
    images = distilled.images.to(run.device)
    loss_of = _loss(distilled, student, run.device)
    state = folder.begin(run.device)
    first = 0
    if state is not None:
        first = int(state["epoch"])
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    with run.progress.stage(folder.name, student.epochs, "epochs", first) as bar:
        for epoch in range(first, student.epochs):
            optimizer.param_groups[0]["lr"] = student.lr_at(epoch)
            model.train()
            value, begun = 0.0, 0
            views = _views(run, student, distilled, epoch, None if logits is not None else seed)
            for view in views:
                count = len(view.indices)
                rows = None if logits is None else logits[epoch, begun : begun + count]
                begun += count
                optimizer.zero_grad(set_to_none=True)
                with run.accelerator.autocast():
                    out = model(view.render(images))
                loss = loss_of(out.float(), view, rows)
                loss.backward()  # type: ignore[no-untyped-call]
                value = check_finite(
                    loss, f"{folder.name}, epoch {epoch + 1}", "lower student.lr in the protocol"
                )
                optimizer.step()
            bar.advance(1, f"loss {value:.4f}")
            if folder.due() and epoch + 1 < student.epochs:
                folder.checkpoint(
                    {
                        "epoch": epoch + 1,
                        "model": model.state_dict(),
                        "optimizer": optimizer.state_dict(),
                    }
                )


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
