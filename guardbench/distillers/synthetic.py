"""The synthetic images that a matching distiller optimises, and the real ones that it draws.

The images live in the normalised pixels that the networks see, where the published learning rates
hold, and are projected onto the valid range after every step. The original never does; its images
leave [0, 1], and a set that is cut only at the end is another set than the one that was optimised.
Here what is matched, what is saved and what a student sees are the same images.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor, nn

from guardbench.data.dataset import RealDataset
from guardbench.distilled import MANIFEST, DistilledDataset, save_distilled, told_by_main
from guardbench.distillers.base import Task
from guardbench.distillers.dsa import View
from guardbench.errors import GuardbenchError
from guardbench.fields import Name, Strict
from guardbench.models import Classifier, batch_norms, build_model
from guardbench.protocol import LARGEST_RATE
from guardbench.stages import StageFolder


class Matching(Strict):
    """What the `match` tables of all matching distillers share.

    Attributes:
        arch: the network; one whose answer to an image depends on no other image.
        iterations: each with a freshly initialised network.
        init: the images start from Gaussian `noise`, or from `real` images of their class.
        image_lr, image_momentum: of SGD on the images, in normalised pixels.
        real_batch: real images a class and step; a class with fewer gives all it has.
        views: the augmentations that DSA and DM draw from; DC sees images as they are.
    """

    arch: Name
    iterations: int = Field(gt=0)
    init: Literal["noise", "real"] = "noise"
    image_lr: float = Field(gt=0, le=LARGEST_RATE)
    image_momentum: float = Field(default=0.5, ge=0, lt=1)
    real_batch: int = Field(default=256, gt=0)
    views: tuple[View, ...] = Field(default=get_args(View), min_length=1)


def fresh_network(task: Task, params: Matching, iteration: int) -> Classifier:
    """The network of an iteration, in training mode.

    Raises:
        GuardbenchError: it has batch norm, with which one class's gradient would depend on another.
    """
    model = build_model(
        params.arch,
        channels=task.channels,
        classes=len(task.classes),
        resolution=task.resolution,
        seed=task.run.generator("match", "network", iteration).initial_seed(),
    )
    if batch_norms(model):
        raise GuardbenchError(
            f"method {task.method.name}: matching sees one class at a time and {params.arch} has "
            "batch norm; set match.arch to one with instance norm, such as convnet-d3."
        )
    model.backbone = InPieces(model.backbone)
    return model.to(task.run.device).train()


PIECE = 16 * 32 * 32
"""Pixels (images times R * R) of a batch that a CPU sends through a network together."""


class InPieces(nn.Module):
    """A network whose answer to an image depends on no other, given a large batch piece by piece.

    On a CPU the maps of a whole real batch fit no cache and are mapped afresh by the system at every
    step; in pieces a forward and backward of 128 or 256 images at 32 px was 1.2 times as fast (median
    of 17 pairs on shared cores, 1.08 to 1.57; under the heaviest load the benchmark saw 0.93). Who
    takes the loss of the batch sees nothing of it, so every regulariser stays as it is; the gradients
    differ by rounding.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """What the network answers to [N, C, R, R]."""
        size = len(images) if images.is_cuda else max(1, PIECE // images[0, 0].numel())
        if len(images) <= size:
            answer: Tensor = self.network(images)
            return answer
        return torch.cat([self.network(piece) for piece in torch.split(images, size)])


class RealClasses:
    """The real images by class, drawn without replacement."""

    def __init__(self, task: Task, train: RealDataset) -> None:
        self._train, self._device = train, task.run.device
        self._rows = [(train.labels == k).nonzero().flatten() for k in range(train.num_classes)]

    def draw(self, label: int, count: int, generator: torch.Generator) -> Tensor:
        """`count` images of a class, or all if there are fewer: float32 [n, C, R, R] in [0, 1]."""
        rows = self._rows[label]
        order = torch.randperm(len(rows), generator=generator)
        return self._train.batch(rows[order[:count]], self._device)


class SyntheticSet:
    """The images of all classes and their optimiser.

    Attributes:
        images: normalised, float32 [K, ipc, C, R, R], a leaf with gradient; class k in row k.
        labels: int64 [K, ipc].
    """

    def __init__(self, task: Task, params: Matching, real: RealClasses) -> None:
        run = task.run
        model = fresh_network(task, params, 0)  # its normalisation alone is used
        self._mean, self._std = model.mean, model.std
        shape = (task.ipc, task.channels, task.resolution, task.resolution)
        rows = []
        for label in range(len(task.classes)):
            generator = run.generator("match", "init", label)
            if params.init == "noise":
                rows.append(torch.randn(shape, generator=generator).to(run.device))
            else:
                drawn = real.draw(label, task.ipc, generator)
                rows.append((drawn - self._mean) / self._std)
        self.images = torch.stack(rows).requires_grad_()
        classes = torch.arange(len(task.classes), device=run.device)
        self.labels = classes[:, None].expand(-1, task.ipc)
        self._optimizer = torch.optim.SGD(
            [self.images], params.image_lr, momentum=params.image_momentum
        )
        self._project()

    def step(self, loss: Tensor) -> None:
        """One step down the gradient of `loss`, and back into the valid range."""
        (self.images.grad,) = torch.autograd.grad(loss, self.images)
        self._optimizer.step()
        self._project()

    @torch.no_grad()
    def _project(self) -> None:
        low, high = (0 - self._mean) / self._std, (1 - self._mean) / self._std
        self.images.copy_(torch.maximum(torch.minimum(self.images, high), low))

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"images": self.images.detach(), "optimizer": self._optimizer.state_dict()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state`."""
        self.images.data.copy_(state["images"])
        self._optimizer.load_state_dict(state["optimizer"])

    def save(self, task: Task, folder: StageFolder) -> DistilledDataset:
        """Writes the artifact with hard labels, class after class, and finishes the stage."""
        with torch.no_grad():
            # The images are in range; leaving normalised pixels may round a value past its end.
            pixels = (self.images * self._std + self._mean).clamp(0, 1)
        distilled = told_by_main(
            task.run.processes,
            partial(
                save_distilled,
                folder.path / "distilled",
                images=pixels.flatten(0, 1).cpu(),
                hard=self.labels.flatten().cpu(),
                teacher=None,
                dataset=task.dataset,
                ipc=task.ipc,
                method=task.method.name,
                classes=task.classes,
                provenance={
                    "stage": folder.key,
                    "seed": task.run.seed,
                    "precision": task.run.precision,
                },
            ),
        )
        folder.finish(task.run.device, (f"distilled/{MANIFEST}",))
        return distilled


def matching_folder(task: Task, words: Mapping[str, Any]) -> StageFolder:
    """The stage that makes the images; `words` are the hyperparameters that shape them."""
    return task.run.stage(
        "match",
        "distilled",
        {
            "stage": "match",
            **task.words(),
            "method": task.method.name,
            "distiller": task.method.distiller,
            "ipc": task.ipc,
            **words,
        },
    )


def real_images_a_step(task: Task, params: Matching) -> float:
    """Real images of all classes that a step sees, for forecasts: classes taken as equal in size."""
    classes = len(task.classes)
    return classes * min(params.real_batch, task.train_images / classes)
