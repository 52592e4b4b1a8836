"""Squeeze: a teacher is trained on the real images (SRe2L, section 3.1).

The regulariser of the recipe acts here: with curvature, the teacher is GUARD's.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field

from guardbench.data.augment import apply_crops, draw_crops, draw_flips
from guardbench.data.dataset import RealDataset
from guardbench.distillers.base import PlannedStage, Task
from guardbench.models import Classifier, build_model, load_weights, save_weights
from guardbench.protocol import CropScale
from guardbench.records import Name, Strict
from guardbench.regularisers.base import Batch, build_regulariser, key_words
from guardbench.runtime import StageFolder, check_finite

TEACHER = "teacher.safetensors"


class Squeeze(Strict):
    """The `squeeze` table: how the teacher is trained. SGD with momentum 0.9, cosine to 0."""

    arch: Name
    epochs: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    lr: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    warmup_epochs: float = Field(default=0, ge=0)
    crop_scale: CropScale = (0.08, 1.0)
    flip: bool = True


def squeeze_folder(task: Task, params: Squeeze) -> StageFolder:
    """Where the teacher lies; keyed by what shapes it alone, so that every IPC shares it."""
    words = {
        "stage": "squeeze",
        **task.words(),
        "regulariser": key_words(task.recipe.regulariser, task.threat),
        "squeeze": params.model_dump(mode="json"),
    }
    return task.run.stage("squeeze", "teachers", words)


def plan_squeeze(task: Task, params: Squeeze) -> PlannedStage:
    """The stage that trains the teacher; refuses a wrong regulariser early."""
    cost = build_regulariser(task.recipe.regulariser, task.threat).cost
    steps = _steps_per_epoch(task.train_images, params.batch_size)
    return PlannedStage(
        squeeze_folder(task, params),
        f"{params.epochs} epochs",
        params.epochs * steps * params.batch_size * cost,
    )


def fresh_teacher(task: Task, params: Squeeze) -> Classifier:
    """The teacher before its training."""
    return build_model(
        params.arch,
        channels=task.channels,
        classes=len(task.classes),
        resolution=task.resolution,
        seed=task.run.generator("squeeze", "init").initial_seed(),
    )


def squeeze(task: Task, params: Squeeze, train: RealDataset) -> Classifier:
    """Trains the teacher, or loads it when an earlier run has.

    Args:
        params: the recipe's `squeeze` table.

    Returns:
        The teacher in eval mode, without gradients for its weights.
    """
    run, folder = task.run, squeeze_folder(task, params)
    model = fresh_teacher(task, params)
    with folder.claimed() as stored:
        if stored is None:
            _train_teacher(task, train, model.to(run.device), params, folder)
            save_weights(model, folder.path / TEACHER)
            folder.finish(run.device, (TEACHER,))
    load_weights(model, folder.path / TEACHER)
    return model.to(run.device).eval().requires_grad_(False)


def _train_teacher(
    task: Task, train: RealDataset, model: Classifier, params: Squeeze, folder: StageFolder
) -> None:
    run = task.run
    regulariser = build_regulariser(task.recipe.regulariser, task.threat)
    optimizer = torch.optim.SGD(
        model.parameters(), params.lr, momentum=0.9, weight_decay=params.weight_decay
    )
    steps = _steps_per_epoch(len(train), params.batch_size)
    state = folder.begin(run.device)
    first, begun = 0, 0
    if state is not None:
        # A checkpoint of before there were any between steps stands at the beginning of its epoch.
        first, begun = int(state["epoch"]), int(state.get("step", 0))
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    total = params.epochs * steps
    with run.progress.stage("squeeze", total, "steps", first * steps + begun) as bar:
        for epoch in range(first, params.epochs):
            generator = run.generator("squeeze", "epoch", epoch)
            order = torch.randperm(len(train), generator=generator)
            if state is not None and begun:
                generator.set_state(state["generator"])
            model.train()
            for step in range(begun, steps):
                _set_lr(optimizer, params, (epoch * steps + step) / steps)
                picked = order[step * params.batch_size : (step + 1) * params.batch_size]
                boxes = draw_crops(len(picked), task.resolution, params.crop_scale, generator)
                flips = draw_flips(len(picked), generator) & params.flip
                images = apply_crops(train.batch(picked, run.device), boxes, flips, task.resolution)
                labels = train.labels[picked].to(run.device)
                batch = Batch(
                    model=model,
                    images=images,
                    labels=labels,
                    generator=generator,
                    autocast=run.accelerator.autocast,
                )
                optimizer.zero_grad(set_to_none=True)
                loss, penalty = regulariser.backward(batch)
                value = check_finite(
                    loss + penalty,
                    f"squeeze, epoch {epoch + 1}, step {step + 1}",
                    "lower squeeze.lr or the regulariser's weight in the method's recipe",
                )
                optimizer.step()
                bar.advance(
                    1, f"epoch {epoch + 1}/{params.epochs} loss {value:.3f} penalty {penalty:.3f}"
                )
                if folder.due() and epoch * steps + step + 1 < total:
                    folder.checkpoint(
                        {
                            "epoch": epoch + (step + 1) // steps,
                            "step": (step + 1) % steps,
                            "generator": generator.get_state(),
                            "model": model.state_dict(),
                            "optimizer": optimizer.state_dict(),
                        }
                    )
            begun = 0


def _set_lr(optimizer: torch.optim.Optimizer, params: Squeeze, epoch: float) -> None:
    """Linear warm-up, then a cosine to 0; `epoch` is fractional."""
    if epoch < params.warmup_epochs:
        share = (epoch + 0.01) / params.warmup_epochs
    else:
        left = params.epochs - params.warmup_epochs
        share = 0.5 * (1 + math.cos(math.pi * (epoch - params.warmup_epochs) / left))
    for group in optimizer.param_groups:
        group["lr"] = params.lr * min(1.0, share)


def _steps_per_epoch(images: int, batch_size: int) -> int:
    return max(1, images // batch_size)
