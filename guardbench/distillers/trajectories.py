"""MTT (Cazenavette et al., CVPR 2022) and TESLA (Cui et al., ICML 2023); on adversarial experts, MAT.

A student starts where an expert was after t epochs on real images, takes N steps on the distilled
images, and should arrive where the expert was M epochs later (MTT, equation 2):

    L = || theta_N - theta*_{t+M} ||^2 / || theta*_t - theta*_{t+M} ||^2,
    theta_{i+1} = theta_i - lr g_i,   g_i = grad_theta l(theta_i; X_i),   theta_0 = theta*_t.

L is minimised in the images and in the student's learning rate. `match_unrolled` takes the whole
gradient, through all N steps, and so keeps N graphs; `match_stepwise` takes TESLA's, one step at a
time. Where the experts come from is `guardbench.distillers.experts`; MAT is MTT on experts that were
trained adversarially and smoothed.

Images are optimised in normalised pixels and projected onto the range of [0, 1] images after every
step, which the authors of MTT did not do: an artifact here is in [0, 1], and what would be cut off at
the end is better known while the images are made.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field, PositiveInt, ValidationError
from torch import Tensor
from torch.nn import functional as F

from guardbench import canonical
from guardbench.data.dataset import RealDataset
from guardbench.distilled import (
    MANIFEST,
    DistilledDataset,
    load_distilled,
    save_distilled,
    told_by_main,
)
from guardbench.distillers.base import PlannedStage, Task, read_params
from guardbench.distillers.experts import (
    Experts,
    FlatNetwork,
    Trajectory,
    View,
    apply_view,
    build_expert,
    draw_view,
    expert_folder,
    plan_experts,
    train_experts,
)
from guardbench.distillers.synthetic import RealClasses, matching_folder
from guardbench.distillers.trajectory_loss import (
    Matcher,
    StepLoss,
    match_stepwise,
    match_unrolled,
)
from guardbench.errors import GuardbenchError
from guardbench.fields import Strict
from guardbench.protocol import LARGEST_RATE, CropScale
from guardbench.records import LabelKind
from guardbench.runtime import check_finite
from guardbench.stages import StageFolder


class Choices(Strict):
    """What the papers choose anew for each IPC; None: nothing is said here.

    Attributes:
        steps: N, of the student.
        expert_epochs: M, that those steps should be worth.
        max_start_epoch: largest t.
        batch_size: distilled images a step of the student; all of them when nothing is said.
        image_lr: of SGD on the images, in normalised pixels.
        student_lr: the student's learning rate at first.
        lr_lr: of SGD on the student's learning rate.
    """

    steps: int | None = Field(default=None, gt=0)
    expert_epochs: int | None = Field(default=None, gt=0)
    max_start_epoch: int | None = Field(default=None, ge=0)
    batch_size: int | None = Field(default=None, gt=0)
    image_lr: float | None = Field(default=None, gt=0, le=LARGEST_RATE)
    student_lr: float | None = Field(default=None, gt=0, le=LARGEST_RATE)
    lr_lr: float | None = Field(default=None, ge=0, le=LARGEST_RATE)


class Match(Choices):
    """The `match` table. What it says beside `by_ipc` holds at every IPC, so that `--set` does too.

    Attributes:
        iterations: of the images, each on one expert from one epoch.
        momentum: of SGD on the images and on the student's learning rate.
        init: `real`, the images start as random ones of their class; or `noise`, standard normal in
            normalised pixels.
        labels: `hard`; or `expert`, soft labels that are the first expert's answers, after its last
            epoch, to the real images from which the distilled ones start (TESLA, section 4.2).
        crop_scale, flip: of the random view that a student's step sees; by default none.
        by_ipc: the choices for each IPC.
    """

    iterations: int = Field(gt=0)
    momentum: float = Field(default=0.5, ge=0, lt=1)
    init: Literal["real", "noise"] = "real"
    labels: Literal["hard", "expert"] = "hard"
    crop_scale: CropScale = (1.0, 1.0)
    flip: bool = False
    by_ipc: dict[PositiveInt, Choices]


class Schedule(Strict):
    """The choices in force, see `Choices`."""

    steps: int
    expert_epochs: int
    max_start_epoch: int
    batch_size: int | None = None
    image_lr: float
    student_lr: float
    lr_lr: float


class Params(Strict):
    """A recipe's `params` for this family."""

    experts: Experts
    match: Match


class _Trajectories:
    """What both distillers share; they differ in how the gradient is taken.

    Attributes:
        matcher: takes the gradient.
        passes: what one image in one student's step costs, in forward+backward passes.
    """

    params = Params
    matcher: Matcher
    passes: float

    def plan(self, task: Task) -> list[PlannedStage]:
        """See `Distiller.plan`; refuses an IPC that has no schedule."""
        params = read_params(task, Params)
        schedule = find_schedule(task, params)
        images = self.image_count(task)
        images = min(images, schedule.batch_size or images)
        count = params.match.iterations
        match = PlannedStage(
            _match_folder(task, params),
            f"{count} steps of {schedule.steps} x {images} images",
            count * schedule.steps * images * self.passes,
            # Differences of weights that hardly differ are matched: always in float32.
            fp32=True,
            split=False,
            arch=params.experts.arch,
        )
        return [*plan_experts(task, params.experts), match]

    def label_kind(self, task: Task) -> LabelKind:
        """See `Distiller.label_kind`: as the recipe's `match.labels` says."""
        return "soft" if read_params(task, Params).match.labels == "expert" else "hard"

    def image_count(self, task: Task) -> int:
        """See `Distiller.image_count`."""
        return task.ipc * len(task.classes)

    def distill(self, task: Task, train: RealDataset) -> DistilledDataset:
        """See `Distiller.distill`."""
        params = read_params(task, Params)
        folder = _match_folder(task, params)
        load = partial(load_distilled, folder.path / "distilled")
        experts = train_experts(task, params.experts, train)
        with folder.claimed() as stored:
            if stored is None:
                return _Matching(task, params, type(self).matcher, experts, train).run(folder)
        return told_by_main(task.run.processes, load)


class MTT(_Trajectories):
    """Matching Training Trajectories."""

    passes = 3.0  # measured 2.6 to 3.5 on a processor
    matcher = staticmethod(match_unrolled)


class TESLA(_Trajectories):
    """TrajEctory matching with Soft Label Assignment."""

    passes = 4.0  # measured 2.7 to 4.6 on a processor
    matcher = staticmethod(match_stepwise)


def find_schedule(task: Task, params: Params) -> Schedule:
    """The choices in force at the task's IPC.

    Raises:
        GuardbenchError: some are not made, or they go beyond the experts' last epoch, or soft labels
            are wanted of noise; one line with the way out.
    """
    where = f"baselines/{task.method.name}/method.toml: recipe {task.dataset}@{task.resolution}: params.match"
    match = params.match
    chosen = match.by_ipc.get(task.ipc, Choices()).model_dump(exclude_none=True)
    everywhere = match.model_dump(include=set(Choices.model_fields), exclude_none=True)
    try:
        schedule = Schedule.model_validate({**chosen, **everywhere})
    except ValidationError as error:
        missing = ", ".join(str(problem["loc"][0]) for problem in error.errors())
        known = ", ".join(str(ipc) for ipc in sorted(match.by_ipc)) or "none"
        raise GuardbenchError(
            f"{where}.by_ipc says nothing of {missing} for IPC {task.ipc}; it has IPC {known}."
        ) from error
    last = schedule.max_start_epoch + schedule.expert_epochs
    if last > params.experts.epochs:
        raise GuardbenchError(
            f"{where}: at IPC {task.ipc} epoch {last} of the experts is matched (max_start_epoch + "
            f"expert_epochs) and they end at {params.experts.epochs}; raise experts.epochs."
        )
    if match.labels == "expert" and match.init == "noise":
        raise GuardbenchError(
            f"{where}.labels: an expert labels real images; set match.init to real."
        )
    return schedule


def _match_folder(task: Task, params: Params) -> StageFolder:
    experts = params.experts
    folders = [expert_folder(task, experts, number) for number in range(experts.count)]
    words = {
        # Of the choices only those in force shape the result.
        "match": params.match.model_dump(mode="json", exclude={"by_ipc", *Choices.model_fields}),
        "schedule": find_schedule(task, params).model_dump(mode="json"),
        "experts": canonical.digest([folder.key for folder in folders]),
    }
    return matching_folder(task, words)


class _Matching:
    """The distilled images, the student's learning rate, and the experts whose paths they follow."""

    def __init__(
        self,
        task: Task,
        params: Params,
        matcher: Matcher,
        experts: list[Trajectory],
        train: RealDataset,
    ) -> None:
        self.task, self.params, self.matcher, self.experts = task, params.match, matcher, experts
        self.schedule = find_schedule(task, params)
        device = task.run.device
        model = build_expert(task, params.experts.arch, seed=0).to(device)
        self.mean, self.std = model.mean, model.std
        self.low, self.high = (0 - self.mean) / self.std, (1 - self.mean) / self.std
        self.net = FlatNetwork(model.backbone.requires_grad_(False))
        self.labels = torch.arange(len(task.classes)).repeat_interleave(task.ipc)
        self.images = self._first_images(RealClasses(task, train))
        self.soft = self._first_labels(params.experts.epochs).to(device)
        self.lr = torch.tensor(self.schedule.student_lr, device=device, requires_grad=True)
        self.optimizer = torch.optim.SGD(
            [
                {"params": [self.images], "lr": self.schedule.image_lr},
                {"params": [self.lr], "lr": self.schedule.lr_lr},
            ],
            lr=self.schedule.image_lr,
            momentum=self.params.momentum,
        )

    def _first_images(self, real: RealClasses) -> Tensor:
        """Where the images start, normalised [N, C, H, W], class after class."""
        task, run = self.task, self.task.run
        shape = (task.ipc, task.channels, task.resolution, task.resolution)
        rows = []
        for label in range(len(task.classes)):
            generator = run.generator("match", "init", label)
            if self.params.init == "noise":
                rows.append(torch.randn(shape, generator=generator).to(run.device))
            else:
                drawn = real.draw(label, task.ipc, generator)
                rows.append((drawn - self.mean) / self.std)
        return self._projected(torch.cat(rows)).requires_grad_()

    def _first_labels(self, last: int) -> Tensor:
        """What the images are taken for, [N, K], rows that sum to 1."""
        if self.params.labels == "hard":
            return F.one_hot(self.labels, len(self.task.classes)).float()
        weights = self.experts[0].at(last).to(self.images.device)
        with torch.no_grad():
            parts = [self.net(weights, part) for part in torch.split(self.images, 256)]
        return torch.softmax(torch.cat(parts), dim=1)

    def _projected(self, images: Tensor) -> Tensor:
        return torch.maximum(torch.minimum(images, self.high), self.low)

    def run(self, folder: StageFolder) -> DistilledDataset:
        """Runs the iterations that are left and writes the artifact."""
        task, count = self.task, self.params.iterations
        first = 0
        experts = canonical.digest([expert.sha256 for expert in self.experts])
        state = folder.begin(task.run.device, experts)
        if state is not None:
            first = int(state["iteration"])
            with torch.no_grad():
                self.images.copy_(state["images"])
                self.lr.copy_(state["lr"])
            self.optimizer.load_state_dict(state["optimizer"])
        with task.run.progress.stage("match", count, "steps", first) as bar:
            for iteration in range(first, count):
                loss = self._iterate(iteration)
                bar.advance(1, f"loss {loss:.4f} student lr {self.lr.item():.4g}")
                task.run.log("match", iteration + 1, loss=loss, student_lr=self.lr.item())
                if folder.due() and iteration + 1 < count:
                    folder.checkpoint(
                        {
                            "iteration": iteration + 1,
                            "images": self.images.detach(),
                            "lr": self.lr.detach(),
                            "optimizer": self.optimizer.state_dict(),
                        }
                    )
        return self._save(folder)

    def _iterate(self, iteration: int) -> float:
        """One expert, one start: moves the images and the student's learning rate by one step."""
        schedule, device = self.schedule, self.task.run.device
        generator = self.task.run.generator("match", "iteration", iteration)
        which = int(torch.randint(len(self.experts), (), generator=generator))
        epoch = int(torch.randint(schedule.max_start_epoch + 1, (), generator=generator))
        found = self.matcher(
            self._student(generator),
            schedule.steps,
            self.images,
            self.lr,
            self.experts[which].at(epoch).to(device),
            self.experts[which].at(epoch + schedule.expert_epochs).to(device),
        )
        value = check_finite(
            found.loss,
            f"match, step {iteration + 1}",
            "lower match.image_lr, match.student_lr or match.lr_lr, as by --set match.image_lr=10",
        )
        self.images.grad, self.lr.grad = found.in_images, found.in_lr
        self.optimizer.step()
        with torch.no_grad():
            self.images.copy_(self._projected(self.images))
        if not self.lr.item() > 0:
            raise GuardbenchError(
                f"match, step {iteration + 1}: the student's learning rate fell to "
                f"{self.lr.item():.3g}; lower match.lr_lr, as by --set match.lr_lr=1e-6."
            )
        return value

    def _student(self, generator: torch.Generator) -> StepLoss:
        """The loss of each of the student's steps: which images it sees, and under which view."""
        task, device = self.task, self.task.run.device
        size = min(len(self.labels), self.schedule.batch_size or len(self.labels))
        queue: list[Tensor] = []
        seen: list[tuple[Tensor, View | None]] = []
        for _ in range(self.schedule.steps):
            if not queue:  # every image once before any is seen again
                order = torch.randperm(len(self.labels), generator=generator)
                queue = list(torch.split(order, size))
            rows = queue.pop(0)
            scale, flip = self.params.crop_scale, self.params.flip
            view = draw_view(len(rows), task.resolution, scale, flip, generator)
            seen.append((rows.to(device), view))

        def loss_at(weights: Tensor, images: Tensor, step: int) -> Tensor:
            rows, view = seen[step]
            logits = self.net(weights, apply_view(images[rows], view))
            return F.cross_entropy(logits, self.soft[rows])

        return loss_at

    def _save(self, folder: StageFolder) -> DistilledDataset:
        task, run = self.task, self.task.run
        with torch.no_grad():
            pixels = (self.images * self.std + self.mean).clamp(0, 1).cpu().contiguous()
        provenance: dict[str, Any] = {
            "stage": folder.key,
            "seed": run.seed,
            "precision": run.precision,
            "student_lr": repr(self.lr.item()),
        }
        distilled = told_by_main(
            run.processes,
            partial(
                save_distilled,
                folder.path / "distilled",
                images=pixels,
                hard=self.labels,
                teacher=None,
                soft=self.soft.cpu() if self.params.labels == "expert" else None,
                dataset=task.dataset,
                ipc=task.ipc,
                method=task.method.name,
                classes=task.classes,
                provenance=provenance,
            ),
        )
        folder.finish(run.device, (f"distilled/{MANIFEST}",))
        return distilled
