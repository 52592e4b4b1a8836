"""Squeeze: a teacher is trained on the real images (SRe2L, section 3.1).

The regulariser of the recipe acts here: with curvature, the teacher is GUARD's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import nullcontext

import torch
from pydantic import Field
from torch import Tensor

from guardbench.batch_norm import synchronised
from guardbench.data.augment import apply_crops, draw_crops, draw_flips
from guardbench.data.dataset import RealDataset
from guardbench.distillers.base import PlannedStage, Task, to_lower
from guardbench.errors import GuardbenchError
from guardbench.fields import Name, Strict
from guardbench.models import Classifier, build_model, load_trained, save_weights
from guardbench.protocol import LARGEST_RATE, CropScale
from guardbench.regularisers.base import Batch, Regulariser, build_regulariser, key_words
from guardbench.runtime import take_step
from guardbench.stages import StageFolder

TEACHER = "teacher.safetensors"


class Squeeze(Strict):
    """The `squeeze` table: how the teacher is trained. SGD with momentum 0.9, cosine to 0.

    Attributes:
        batch_size: images a step, shared by all processes of a run.
        sync_bn: whether BN layers see the batch of all processes, as one process would have it, or each
            process's own part.
        accumulate: in how many parts a batch is taken, one after another, where the whole does not fit into
            memory. BN layers see a part at a time, and each has a penalty of its own.
    """

    arch: Name
    epochs: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    lr: float = Field(gt=0, le=LARGEST_RATE)
    weight_decay: float = Field(ge=0, le=LARGEST_RATE)
    warmup_epochs: float = Field(default=0, ge=0)
    crop_scale: CropScale = (0.08, 1.0)
    flip: bool = True
    sync_bn: bool = True
    accumulate: int = Field(default=1, gt=0)


def squeeze_folder(task: Task, params: Squeeze) -> StageFolder:
    """Where the teacher lies; keyed by what shapes it alone, so that every IPC shares it."""
    shaping = params.model_dump(mode="json")
    # Teachers trained before there was a choice keep their keys.
    for name in ("sync_bn", "accumulate"):
        if getattr(params, name) == Squeeze.model_fields[name].default:
            del shaping[name]
    if (
        not params.sync_bn and task.run.processes.count > 1
    ):  # each BN layer sees a part of the batch
        shaping["processes"] = task.run.processes.count
    words = {
        "stage": "squeeze",
        **task.words(),
        "regulariser": key_words(task.recipe.regulariser, task.threat),
        "squeeze": shaping,
    }
    return task.run.stage("squeeze", "teachers", words)


def plan_squeeze(task: Task, params: Squeeze) -> PlannedStage:
    """The stage that trains the teacher; refuses early a wrong regulariser, and too many processes."""
    processes = task.run.processes.count
    if min(params.batch_size, task.train_images) < processes * params.accumulate:
        raise GuardbenchError(
            f"squeeze.batch_size {params.batch_size}: is too small for {processes} processes and "
            f"accumulate {params.accumulate}; lower one of them."
        )
    cost = build_regulariser(task.recipe.regulariser, task.threat).cost
    steps = _steps_per_epoch(task.train_images, params.batch_size)
    return PlannedStage(
        squeeze_folder(task, params),
        f"{params.epochs} epochs",
        params.epochs * steps * params.batch_size * cost,
        arch=params.arch,
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
            run.processes.from_main(lambda: save_weights(model, folder.path / TEACHER))
            folder.finish(run.device, (TEACHER,))
    return load_trained(run, model, folder.path / TEACHER)


def _train_teacher(
    task: Task, train: RealDataset, model: Classifier, params: Squeeze, folder: StageFolder
) -> None:
    run = task.run
    regulariser = build_regulariser(task.recipe.regulariser, task.threat)
    optimizer = torch.optim.SGD(
        model.parameters(), params.lr, momentum=0.9, weight_decay=params.weight_decay
    )
    steps = _steps_per_epoch(len(train), params.batch_size)
    scaler = run.scaler()
    state = folder.begin(run.device)
    first, begun = 0, 0
    if state is not None:
        # A checkpoint of before there were any between steps stands at the beginning of its epoch.
        first, begun = int(state["epoch"]), int(state.get("step", 0))
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state.get("scaler", {}))
    total = params.epochs * steps
    together = synchronised(model, run.processes) if params.sync_bn else nullcontext()
    with run.progress.stage("squeeze", total, "steps", first * steps + begun) as bar, together:
        for epoch in range(first, params.epochs):
            generator = run.generator("squeeze", "epoch", epoch)
            order = torch.randperm(len(train), generator=generator)
            if state is not None and begun:
                generator.set_state(state["generator"])
            model.train()
            for step in range(begun, steps):
                _set_lr(optimizer, params, (epoch * steps + step) / steps)
                picked = order[step * params.batch_size : (step + 1) * params.batch_size]
                scale = scaler.get_scale()
                batches = _batches(task, train, model, params, picked, generator, scale)
                optimizer.zero_grad(set_to_none=True)
                loss, penalty = run.processes.total(_backward(regulariser, batches)) / scale
                run.processes.sum_gradients(model)
                value = take_step(
                    scaler,
                    optimizer,
                    loss + penalty,
                    f"squeeze, epoch {epoch + 1}, step {step + 1}",
                    to_lower(task, "squeeze.lr"),
                )
                bar.advance(
                    1, f"epoch {epoch + 1}/{params.epochs} loss {value:.3f} penalty {penalty:.3f}"
                )
                done = epoch * steps + step + 1
                run.log("squeeze", done, loss=value, penalty=float(penalty))
                if folder.due() and done < total:
                    folder.checkpoint(
                        {
                            "epoch": epoch + (step + 1) // steps,
                            "step": (step + 1) % steps,
                            "generator": generator.get_state(),
                            "model": model.state_dict(),
                            "optimizer": optimizer.state_dict(),
                            "scaler": scaler.state_dict(),
                        }
                    )
            begun = 0


def _batches(
    task: Task,
    train: RealDataset,
    model: Classifier,
    params: Squeeze,
    picked: Tensor,
    generator: torch.Generator,
    scale: float,
) -> Iterator[Batch]:
    """This process's images of a step, in as many parts as `accumulate` says.

    The views of all images are drawn, so that neither the split over processes nor that into parts
    changes them.
    """
    run, count = task.run, len(picked)
    boxes = draw_crops(count, task.resolution, params.crop_scale, generator)
    flips = draw_flips(count, generator) & params.flip
    whole = run.processes.count == params.accumulate == 1
    parts = params.accumulate
    # The same parts on any number of processes, whose BN layers see the whole of a part.
    for part in range(parts):
        first, last = part * count // parts, (part + 1) * count // parts
        mine = run.processes.share(last - first)
        rows = slice(first + mine.start, first + mine.stop)
        images = train.batch(picked[rows], run.device)
        yield Batch(
            model=model,
            images=apply_crops(images, boxes[rows], flips[rows], task.resolution),
            labels=train.labels[picked[rows]].to(run.device),
            generator=generator,
            autocast=run.autocast,
            part=None if whole else (count, rows),
            total=run.processes.total,
            scale=scale,
        )


def _backward(regulariser: Regulariser, batches: Iterable[Batch]) -> Tensor:
    """The sum of the losses and penalties [2] of the parts of a batch; so are the gradients it leaves."""
    values, held = [], None
    for batch in batches:
        parameters = [*batch.model.parameters()]
        values.append(torch.stack(regulariser.backward(batch)))
        if held is not None:
            for parameter, grad in zip(parameters, held, strict=True):
                if parameter.grad is not None and grad is not None:
                    parameter.grad += grad
        held = [parameter.grad for parameter in parameters]
        batch.model.zero_grad(set_to_none=True)
    assert held is not None
    for parameter, grad in zip(parameters, held, strict=True):
        parameter.grad = grad
    return torch.stack(values).sum(0)


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
