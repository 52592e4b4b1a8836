"""Students: trained on a distilled dataset as the protocol says, whoever made the dataset.

With a teacher (SRe2L's relabel, section 3.3, after FKD) the student matches the teacher's logits on
exactly the view that it sees. The labels are made once, stored an epoch at a time
(`guardbench.labels`), and shared by all students of the protocol. Hard and soft labels are mixed as CutMix
mixes the pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from guardbench.distilled import DistilledDataset
from guardbench.distillers.base import PlannedStage
from guardbench.labels import INDEX, LabelStore
from guardbench.models import Classifier, build_model, load_weights, save_weights
from guardbench.protocol import Student
from guardbench.report import byte_size
from guardbench.runtime import Run, StageFolder, check_finite
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


def relabel(run: Run, distilled: DistilledDataset, student: Student, stage: PlannedStage) -> None:
    """Stores the teacher's logits on every view of every epoch; goes on at the epochs that are not there.

    Raises:
        GuardbenchError: there is no room for them.
    """
    folder, teacher = stage.folder, distilled.teacher
    if folder.finished() is not None:
        return
    assert teacher is not None, "only a teacher labels views"
    teacher.to(run.device).eval()
    images = placed(distilled.images, run.device)
    folder.begin(run.device)
    folder.path.mkdir(parents=True, exist_ok=True)
    store = label_store(distilled, student, stage)
    there = store.finished(student.epochs)
    store.require_space((student.epochs - len(there)) * len(images))
    with run.progress.stage(folder.name, student.epochs, "epochs", len(there)) as bar:
        for epoch in range(student.epochs):
            if epoch in there:
                continue
            store.write(epoch, label_epoch(run, distilled, student, images, epoch))
            bar.advance()
            if folder.due() and epoch + 1 < student.epochs:
                folder.checkpoint({})  # the seconds so far; the labels are where they belong
        size = store.seal(student.epochs)
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
        with torch.no_grad(), run.accelerator.autocast():
            rows.append(teacher(view.render(images, run.device)).half().cpu())
    return torch.cat(rows)


def placed(images: Tensor, device: torch.device) -> Tensor:
    """The images on `device`, or where they are when they would take over a quarter of its free memory.

    `View.render` takes them from either; fifty of each of ImageNet's classes are 30 GB.
    """
    if device.type == "cuda" and images.nbytes > torch.cuda.mem_get_info(device)[0] // 4:
        return images
    return images.to(device)


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
    if folder.finished() is None:
        store = None if labels is None else label_store(distilled, student, labels)
        _train(run, distilled, student, seed, folder, model.to(run.device), store)
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
    store: LabelStore | None,
) -> None:
    optimizer = _optimizer(model, student)
    images = placed(distilled.images, run.device)
    digests = None if store is None else store.digests()
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
            views = _views(run, student, distilled, epoch, None if store is not None else seed)
            logits = None if store is None or digests is None else store.read(epoch, digests[epoch])
            for view in views:
                count = len(view.indices)
                rows = None if logits is None else logits[begun : begun + count]
                begun += count
                optimizer.zero_grad(set_to_none=True)
                with run.accelerator.autocast():
                    out = model(view.render(images, run.device))
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
