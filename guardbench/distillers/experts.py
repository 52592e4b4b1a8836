"""Experts: networks trained on real images, whose weights after every epoch are a trajectory.

Cazenavette et al., CVPR 2022 (MTT), section 3.1: plain SGD at a constant rate. Each expert is a stage
of its own, keyed by what shapes it alone, so every IPC and every method that follows experts of the
same setting finds them on disk. The regulariser of the recipe acts here: experts that are trained
adversarially, with their weights smoothed, are those of MAT (Lai et al., arXiv:2503.12069).

On disk an expert takes 4 bytes times its weights times one more than its epochs: 65 MB for 50 epochs of
`convnet-d3` on CIFAR-10. In memory only the epochs that are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.func import functional_call

from guardbench.data.augment import apply_crops, draw_crops, draw_flips
from guardbench.data.dataset import RealDataset
from guardbench.distillers.base import PlannedStage, Task, to_lower
from guardbench.errors import GuardbenchError, brief, not_now
from guardbench.fields import Name, Strict
from guardbench.models import Classifier, batch_norms, build_model
from guardbench.protocol import LARGEST_RATE, CropScale
from guardbench.regularisers.base import Batch, build_regulariser, key_words
from guardbench.runtime import take_step
from guardbench.stages import StageFolder
from guardbench.store import write_bytes

TRAJECTORY = "trajectory.safetensors"


class Experts(Strict):
    """The `experts` table: how many there are and how each is trained.

    Attributes:
        arch: one whose state is its weights alone, so without BatchNorm.
        count: how many; raising it keeps those that there are.
        epochs, batch_size, lr, momentum, weight_decay: of SGD at a constant rate.
        crop_scale, flip: of the random view of each image; by default the image as it is.
        ema: the weights kept are a moving average over steps, `a <- ema * a + (1 - ema) * weights`;
            0 keeps the weights themselves. MAT's smoothing of adversarial trajectories.
    """

    arch: Name
    count: int = Field(gt=0)
    epochs: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    lr: float = Field(gt=0, le=LARGEST_RATE)
    momentum: float = Field(default=0, ge=0, lt=1)
    weight_decay: float = Field(default=0, ge=0, le=LARGEST_RATE)
    crop_scale: CropScale = (1.0, 1.0)
    flip: bool = False
    ema: float = Field(default=0, ge=0, lt=1)


@dataclass(frozen=True)
class Trajectory:
    """One finished expert.

    Attributes:
        path: the file that holds its weights, one tensor an epoch.
        sha256: of that file.
    """

    path: Path
    sha256: str

    def at(self, epoch: int) -> Tensor:
        """Its weights after `epoch` epochs (0: as initialised), float32 [P] in `FlatNetwork`'s order."""
        try:
            with safe_open(self.path, framework="pt") as file:
                weights: Tensor = file.get_tensor(str(epoch))
        except (FileNotFoundError, SafetensorError) as error:
            raise GuardbenchError(
                f"{self.path}: no weights of epoch {epoch} ({brief(error)}); delete the folder and "
                "run again to rebuild it."
            ) from error
        except OSError as error:
            raise not_now(self.path, error) from error
        return weights


class FlatNetwork:
    """A network as a function of all its weights in one vector [P].

    Args:
        net: without BatchNorm; its own weights are only the order and the shapes.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.names = [name for name, _ in net.named_parameters()]
        self.shapes = [part.shape for part in net.parameters()]
        self.sizes = [part.numel() for part in net.parameters()]

    def weights(self) -> Tensor:
        """A copy of the network's own weights, [P]."""
        return torch.cat([part.detach().reshape(-1) for part in self.net.parameters()])

    def __call__(self, weights: Tensor, images: Tensor) -> Tensor:
        """Logits [N, K] of normalised images [N, C, H, W] at `weights` [P], differentiable in both."""
        parts = torch.split(weights, self.sizes)
        named = {
            name: part.view(shape)
            for name, part, shape in zip(self.names, parts, self.shapes, strict=True)
        }
        logits: Tensor = functional_call(self.net, named, (images,))
        return logits


def build_expert(task: Task, arch: str, seed: int) -> Classifier:
    """A freshly initialised expert or student; refuses an architecture with BatchNorm."""
    model = build_model(
        arch,
        channels=task.channels,
        classes=len(task.classes),
        resolution=task.resolution,
        seed=seed,
    )
    if batch_norms(model):
        raise GuardbenchError(
            f"method {task.method.name}: a trajectory is of weights alone and {arch} has BN "
            "statistics too; set experts.arch to one without, such as convnet-d3."
        )
    return model


def expert_folder(task: Task, params: Experts, number: int) -> StageFolder:
    """Where expert `number` lies; neither IPC, method nor the count of experts shapes it."""
    words = {
        "stage": "expert",
        "number": number,
        **task.words(),
        "regulariser": key_words(task.recipe.regulariser, task.threat),
        "experts": params.model_dump(mode="json", exclude={"count"}),
    }
    return task.run.stage(f"expert {number}", "experts", words)


def plan_experts(task: Task, params: Experts) -> list[PlannedStage]:
    """One stage an expert; refuses a wrong architecture or regulariser early."""
    build_expert(task, params.arch, seed=0)
    cost = build_regulariser(task.recipe.regulariser, task.threat).cost
    return [
        PlannedStage(
            expert_folder(task, params, number),
            f"{params.epochs} epochs",
            params.epochs * task.train_images * cost,
            split=False,
            arch=params.arch,
        )
        for number in range(params.count)
    ]


def train_experts(task: Task, params: Experts, train: RealDataset) -> list[Trajectory]:
    """The trajectories of all experts; trains those that no earlier run has finished."""
    found = []
    for number in range(params.count):
        folder = expert_folder(task, params, number)
        with folder.claimed() as stored:
            if stored is None:
                weights = _Training(task, params, train, number).run(folder)
                state = {str(epoch): row for epoch, row in enumerate(weights)}
                task.run.processes.from_main(
                    partial(write_bytes, folder.path / TRAJECTORY, save(state))
                )
                stored = folder.finish(task.run.device, (TRAJECTORY,))
        found.append(Trajectory(folder.path / TRAJECTORY, stored["files"][TRAJECTORY]))
    return found


class _Training:
    """One expert in training: the network, its optimizer and the moving average of its weights."""

    def __init__(self, task: Task, params: Experts, train: RealDataset, number: int) -> None:
        self.task, self.params, self.train, self.number = task, params, train, number
        run = task.run
        seed = run.generator("expert", number, "init").initial_seed()
        self.model = build_expert(task, params.arch, seed).to(run.device).train()
        self.flat = FlatNetwork(self.model.backbone)
        self.average = self.flat.weights()
        self.regulariser = build_regulariser(task.recipe.regulariser, task.threat)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            params.lr,
            momentum=params.momentum,
            weight_decay=params.weight_decay,
        )
        self.scaler = run.scaler()

    def run(self, folder: StageFolder) -> list[Tensor]:
        """The weights [P] before the first epoch and after each, on the CPU."""
        run, epochs = self.task.run, self.params.epochs
        kept, step = [self.flat.weights().cpu()], 0
        state = folder.begin(run.device)
        if state is not None:
            kept = list(state["kept"])
            # A checkpoint of before there were any between steps stands at the beginning of its epoch.
            step = int(state.get("step", 0))
            self.average = state["average"].to(run.device)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state.get("scaler", {}))
        first = len(kept) - 1
        with run.progress.stage(folder.name, epochs, "epochs", first) as bar:
            for epoch in range(first, epochs):
                generator = run.generator("expert", self.number, "epoch", epoch)
                order = torch.randperm(len(self.train), generator=generator)
                batches = torch.split(order, self.params.batch_size)
                if state is not None and step:
                    generator.set_state(state["generator"])
                for place in range(step, len(batches)):
                    loss = self._step(epoch, place, batches[place], generator)
                    if place + 1 < len(batches) and folder.due():
                        folder.checkpoint(self._state(kept, place + 1, generator))
                step = 0
                weights = self.average.clone() if self.params.ema else self.flat.weights()
                kept.append(weights.cpu())
                bar.advance(1, f"loss {loss:.3f}")
                run.log(folder.name, epoch + 1, loss=loss)
                if epoch + 1 < epochs and folder.due():
                    folder.checkpoint(self._state(kept, 0, generator))
        return kept

    def _state(self, kept: list[Tensor], step: int, generator: torch.Generator) -> dict[str, Any]:
        """For a checkpoint before `step` of the epoch that follows those in `kept`."""
        return {
            "kept": kept,
            "step": step,
            "generator": generator.get_state(),
            "average": self.average,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def _step(self, epoch: int, step: int, picked: Tensor, generator: torch.Generator) -> float:
        """Moves the network along its gradients on the images `picked`; returns their loss."""
        task, params, run = self.task, self.params, self.task.run
        view = draw_view(len(picked), task.resolution, params.crop_scale, params.flip, generator)
        batch = Batch(
            model=self.model,
            images=apply_view(self.train.batch(picked, run.device), view),
            labels=self.train.labels[picked].to(run.device),
            generator=generator,
            autocast=run.autocast,
            scale=self.scaler.get_scale(),
        )
        self.optimizer.zero_grad(set_to_none=True)
        loss, penalty = self.regulariser.backward(batch)
        value = take_step(
            self.scaler,
            self.optimizer,
            (loss + penalty) / batch.scale,
            f"expert {self.number}, epoch {epoch + 1}, step {step + 1}",
            to_lower(task, "experts.lr"),
        )
        if params.ema:
            self.average.lerp_(self.flat.weights(), 1 - params.ema)
        return value


View = tuple[Tensor, Tensor]
"""Boxes [n, 4] and mirrorings [n] of a batch, see `guardbench.data.augment`."""


def draw_view(
    n: int, resolution: int, scale: tuple[float, float], flip: bool, generator: torch.Generator
) -> View | None:
    """The random view of `n` images, or None when they are to be seen as they are."""
    if scale == (1.0, 1.0) and not flip:
        return None
    boxes = draw_crops(n, resolution, scale, generator)
    return boxes, draw_flips(n, generator) & flip


def apply_view(images: Tensor, view: View | None) -> Tensor:
    """The images [n, C, R, R] under a view, differentiable in them."""
    return images if view is None else apply_crops(images, *view, images.shape[-1])
