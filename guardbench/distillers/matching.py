"""Gradient matching: DC (Zhao et al., ICLR 2021) and DSA (Zhao & Bilen, ICML 2021).

At each step a network sees, class by class, real images and the synthetic ones; the synthetic images
move so that the gradient they leave in the weights points where the real one does (DC, equation 9 and
algorithm 1). Between steps the network trains on the synthetic set. DSA shows both batches of a class
in the same randomly drawn view, and trains the network on views as well.

A regulariser of the recipe acts on the real gradient, which is then that of the regularised loss: with
curvature this is DC+GUARD (Xue et al., AAAI 2025).
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from guardbench.data.dataset import RealDataset
from guardbench.distilled import DistilledDataset, load_distilled, told_by_main
from guardbench.distillers.base import PlannedStage, Task, read_params
from guardbench.distillers.dsa import SiameseView, apply_view, draw_view, seen_in
from guardbench.distillers.synthetic import (
    Matching,
    RealClasses,
    SyntheticSet,
    fresh_network,
    matching_folder,
    real_images_a_step,
)
from guardbench.errors import GuardbenchError
from guardbench.fields import Strict
from guardbench.models import Classifier
from guardbench.protocol import LARGEST_RATE
from guardbench.records import LabelKind
from guardbench.regularisers.base import Batch, Regulariser, build_regulariser, key_words
from guardbench.runtime import check_finite
from guardbench.stages import StageFolder

# Forward and backward, and the backward of both: measured 2.9 passes of a ConvNet on a CPU.
SYNTHETIC_PASSES = 3.0


class Match(Matching):
    """The `match` table of DC and DSA.

    Attributes:
        loops: by IPC, the outer steps an iteration takes, and the epochs for which the network
            trains on the synthetic set between two of them.
        network_lr, network_momentum, network_batch: of SGD on the network there.
    """

    loops: dict[str, tuple[PositiveInt, PositiveInt]]
    network_lr: float = Field(default=0.01, gt=0, le=LARGEST_RATE)
    network_momentum: float = Field(default=0.0, ge=0, lt=1)
    network_batch: int = Field(default=256, gt=0)


class Params(Strict):
    """A recipe's `params` for this family."""

    match: Match


class DC:
    """Gradient matching on the images as they are; see the module."""

    params = Params
    siamese = False

    def plan(self, task: Task) -> list[PlannedStage]:
        """See `Distiller.plan`."""
        params = read_params(task, Params).match
        outer, inner = _loops(task, params)
        fresh_network(task, params, 0)  # refuses a network that does not fit
        cost = build_regulariser(task.recipe.regulariser, task.threat).cost
        images = len(task.classes) * task.ipc
        step = real_images_a_step(task, params) * cost + SYNTHETIC_PASSES * images
        passes = params.iterations * (outer * step + (outer - 1) * inner * images)
        steps = f"{params.iterations * outer} steps"
        return [
            PlannedStage(_folder(task), steps, passes, split=False, fp32=True, arch=params.arch)
        ]

    def label_kind(self, task: Task) -> LabelKind:  # noqa: ARG002 - the interface gives it
        """See `Distiller.label_kind`: an image stands for its class."""
        return "hard"

    def image_count(self, task: Task) -> int:
        """See `Distiller.image_count`."""
        return task.ipc * len(task.classes)

    def distill(self, task: Task, train: RealDataset) -> DistilledDataset:
        """See `Distiller.distill`."""
        folder = _folder(task)
        with folder.claimed() as stored:
            if stored is None:
                return _GradientMatching(task, train, siamese=self.siamese).run(folder)
        return told_by_main(task.run.processes, partial(load_distilled, folder.path / "distilled"))


class DSA(DC):
    """Gradient matching in a view that both batches of a class share; see the module."""

    siamese = True


class _GradientMatching:
    """One stage: the images, the network of the current iteration, and how far they are."""

    def __init__(self, task: Task, train: RealDataset, *, siamese: bool) -> None:
        self.task, self.siamese = task, siamese
        self.params = read_params(task, Params).match
        self.outer, self.inner = _loops(task, self.params)
        self.regulariser = build_regulariser(task.recipe.regulariser, task.threat)
        self.real = RealClasses(task, train)
        self.synthetic = SyntheticSet(task, self.params, self.real)

    def run(self, folder: StageFolder) -> DistilledDataset:
        """Runs the steps that are left, and saves."""
        run, outer = self.task.run, self.outer
        state = folder.begin(run.device)
        first = 0 if state is None else int(state["step"])
        total = self.params.iterations * outer
        network: Classifier | None = None
        with run.progress.stage("match", total, "steps", first) as bar:
            for step in range(first, total):
                if network is None or step % outer == 0:
                    network = fresh_network(self.task, self.params, step // outer)
                    optimizer = torch.optim.SGD(
                        network.parameters(),
                        self.params.network_lr,
                        momentum=self.params.network_momentum,
                    )
                if state is not None:
                    self._load(state, network, optimizer)
                    state = None
                loss = self._match(network, step)
                if (step + 1) % outer:  # the last step's network would be thrown away
                    self._train(network, optimizer, step)
                bar.advance(1, f"iteration {step // outer + 1} loss {loss:.3f}")
                run.log("match", step + 1, loss=loss)
                if folder.due() and step + 1 < total:
                    folder.checkpoint(self._state(step + 1, network, optimizer))
        return self.synthetic.save(self.task, folder)

    def _state(
        self, step: int, network: Classifier, optimizer: torch.optim.Optimizer
    ) -> dict[str, Any]:
        state = {"step": step, "synthetic": self.synthetic.state()}
        if step % self.outer:
            state |= {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
        return state

    def _load(
        self, state: dict[str, Any], network: Classifier, optimizer: torch.optim.Optimizer
    ) -> None:
        self.synthetic.load(state["synthetic"])
        if "network" in state:
            network.load_state_dict(state["network"])
            optimizer.load_state_dict(state["optimizer"])

    def _match(self, network: Classifier, step: int) -> float:
        """One step of the images; returns the distance, a mean over classes."""
        run, classes = self.task.run, len(self.task.classes)
        views = None
        if self.siamese:
            views = [
                draw_view(1, run.generator("match", "view", step, k), self.params.views)
                for k in range(classes)
            ]
        wanted = self._real_gradients(network, views, step)
        images = self.synthetic.images
        if views is not None:
            pairs = zip(images, views, strict=True)
            images = torch.stack([apply_view(rows, view) for rows, view in pairs])
        found = class_gradients(network.backbone, images, self.synthetic.labels)
        loss = gradient_distance(found, wanted)
        value = check_finite(
            loss / classes,
            f"match, iteration {step // self.outer + 1}, step {step % self.outer + 1}",
            "lower match.network_lr or match.image_lr, as by --set match.image_lr=0.05",
        )
        self.synthetic.step(loss)
        return value

    def _real_gradients(
        self, network: Classifier, views: list[SiameseView] | None, step: int
    ) -> list[Tensor]:
        """The gradient of the regularised loss, a class at a time: [K, ...] for every weight.

        A class's real batch fills a machine by itself; nothing is won by taking all at once. In float32, as
        the synthetic images' gradients that are compared with it.
        """
        run, rows = self.task.run, []
        for label in range(len(self.task.classes)):
            generator = run.generator("match", "real", step, label)
            images = self.real.draw(label, self.params.real_batch, generator)
            batch = Batch(
                model=network if views is None else seen_in(network, views[label]),
                images=images,
                labels=torch.full((len(images),), label, device=run.device),
                generator=generator,
                autocast=contextlib.nullcontext,
            )
            rows.append(real_gradient(self.regulariser, batch, network.backbone))
        return [torch.stack(layer) for layer in zip(*rows, strict=True)]

    def _train(self, network: Classifier, optimizer: torch.optim.Optimizer, step: int) -> None:
        """The network's training on the synthetic set between two steps of the images."""
        run, params = self.task.run, self.params
        generator = run.generator("match", "train", step)
        images = self.synthetic.images.detach().flatten(0, 1)
        labels = self.synthetic.labels.flatten()
        for _ in range(self.inner):
            order = torch.randperm(len(images), generator=generator)
            for picked in torch.split(order.to(run.device), params.network_batch):
                batch = images[picked]
                if self.siamese:
                    batch = apply_view(batch, draw_view(len(picked), generator, self.params.views))
                optimizer.zero_grad(set_to_none=True)
                with run.unscaled():
                    logits = network.backbone(batch.contiguous(memory_format=torch.channels_last))
                loss = F.cross_entropy(logits.float(), labels[picked])
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        # A loss that was not finite once stays so: one look after the last epoch sees it.
        check_finite(
            loss,
            f"match, iteration {step // self.outer + 1}, training the network",
            "lower match.network_lr, as by --set match.network_lr=0.005",
        )


def matched_weights(backbone: nn.Module) -> dict[str, nn.Parameter]:
    """The weights whose gradients are matched, in order: those with a row for each output unit.

    Biases and the norms' scales and shifts have none and are left out, as in the authors' code.
    """
    return {name: weight for name, weight in backbone.named_parameters() if weight.ndim > 1}


def real_gradient(regulariser: Regulariser, batch: Batch, backbone: nn.Module) -> list[Tensor]:
    """The gradient of the regularised loss in every matched weight, detached; `.grad` is left empty."""
    batch.model.zero_grad(set_to_none=True)
    regulariser.backward(batch)
    gradients = []
    for weight in matched_weights(backbone).values():
        assert weight.grad is not None
        gradients.append(weight.grad)
    batch.model.zero_grad(set_to_none=True)
    return gradients


# Pixels of a class (images times R * R) up to which all classes at once are faster on a CPU: what is
# saved is the cost of calls; above it PyTorch's grouped convolutions lose more (benchmarks/matching.py).
SMALL_CLASS = 1024


def class_gradients(backbone: nn.Module, images: Tensor, labels: Tensor) -> list[Tensor]:
    """The gradient of every class's own mean cross-entropy in every matched weight.

    Args:
        backbone: without batch norm; maps normalised images to logits.
        images: normalised, [K, n, C, R, R]; the result is differentiable in them.
        labels: int64 [K, n].

    Returns:
        For every matched weight [K, *weight.shape].
    """
    pixels = images[0, :, 0].numel()
    if images.is_cuda or pixels <= SMALL_CLASS:
        return gradients_at_once(backbone, images, labels)
    return gradients_one_by_one(backbone, images, labels)


def gradients_at_once(backbone: nn.Module, images: Tensor, labels: Tensor) -> list[Tensor]:
    """`class_gradients` with the classes as a dimension of every operation."""
    weights = {name: weight.detach() for name, weight in matched_weights(backbone).items()}

    def loss(weights: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(backbone, weights, (images,)), labels)

    gradients = vmap(grad(loss), in_dims=(None, 0, 0))(weights, images, labels)
    return list(gradients.values())


def gradients_one_by_one(backbone: nn.Module, images: Tensor, labels: Tensor) -> list[Tensor]:
    """`class_gradients`, class after class."""
    weights = list(matched_weights(backbone).values())
    rows = [
        torch.autograd.grad(F.cross_entropy(backbone(x), y), weights, create_graph=True)
        for x, y in zip(images, labels, strict=True)
    ]
    return [torch.stack(layer) for layer in zip(*rows, strict=True)]


def gradient_distance(found: list[Tensor], wanted: list[Tensor]) -> Tensor:
    """One minus the cosine of the rows of two gradients, summed over rows, layers and classes.

    DC, equation 10; a row is what leads to one output unit.

    Args:
        found, wanted: for every layer [K, rows, ...].
    """
    total = found[0].new_zeros(())
    for ours, real in zip(found, wanted, strict=True):
        a, b = ours.flatten(2), real.flatten(2)
        lengths = torch.linalg.vector_norm(a, dim=2) * torch.linalg.vector_norm(b, dim=2)
        # The authors' constant, so that a row without gradient has the distance 1 and no slope.
        total = total + (1 - (a * b).sum(2) / (lengths + 1e-6)).sum()
    return total


def _loops(task: Task, params: Match) -> tuple[int, int]:
    """Outer steps and inner epochs for the IPC, or one clear line."""
    if str(task.ipc) not in params.loops:
        raise GuardbenchError(
            f"baselines/{task.method.name}/method.toml: recipe {task.dataset}@{task.resolution}: "
            f"params.match.loops has none for IPC {task.ipc}; it has {', '.join(params.loops) or 'none'}."
        )
    return params.loops[str(task.ipc)]


def _folder(task: Task) -> StageFolder:
    params = read_params(task, Params).match
    words = {
        # Of the loops only those of this IPC shape the result.
        "match": {**params.model_dump(mode="json"), "loops": list(_loops(task, params))},
        "regulariser": key_words(task.recipe.regulariser, task.threat),
    }
    return matching_folder(task, words)
