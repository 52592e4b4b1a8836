"""DM: distribution matching (Zhao & Bilen, WACV 2023).

The synthetic images move so that, in the features of freshly initialised networks that are never
trained, the mean of a class is that of its real images (equation 6), both seen in the same DSA view.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from guardbench.data.dataset import RealDataset
from guardbench.distilled import DistilledDataset, load_distilled, told_by_main
from guardbench.distillers.base import PlannedStage, Task, read_params
from guardbench.distillers.dsa import apply_view, draw_view
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
from guardbench.records import LabelKind
from guardbench.runtime import check_finite
from guardbench.stages import StageFolder


class Params(Strict):
    """A recipe's `params` for this family."""

    match: Matching


class DM:
    """The distiller; see the module."""

    params = Params

    def plan(self, task: Task) -> list[PlannedStage]:
        """See `Distiller.plan`."""
        params = read_params(task, Params).match
        kind = task.recipe.regulariser["kind"]
        if kind != "none":
            raise GuardbenchError(
                f"method {task.method.name}: dm trains no network on real images, so the regulariser "
                f"{kind} has nothing to act on; leave it out, or take the distiller dc or dsa."
            )
        fresh_network(task, params, 0)  # refuses a network that does not fit
        # A forward pass, all that real images need, is about a third of a forward and a backward.
        step = real_images_a_step(task, params) / 3 + len(task.classes) * task.ipc
        passes = params.iterations * step
        steps = f"{params.iterations} steps"
        return [PlannedStage(_folder(task), steps, passes, split=False, arch=params.arch)]

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
                return self._distill(task, train, folder)
        return told_by_main(task.run.processes, partial(load_distilled, folder.path / "distilled"))

    def _distill(self, task: Task, train: RealDataset, folder: StageFolder) -> DistilledDataset:
        run, params = task.run, read_params(task, Params).match
        real = RealClasses(task, train)
        synthetic = SyntheticSet(task, params, real)
        state = folder.begin(run.device)
        first = 0
        if state is not None:
            first = int(state["step"])
            synthetic.load(state["synthetic"])
        with run.progress.stage("match", params.iterations, "steps", first) as bar:
            for step in range(first, params.iterations):
                loss = _distance(task, params, real, synthetic, step)
                value = check_finite(
                    loss / len(task.classes),
                    f"match, step {step + 1}",
                    "lower match.image_lr, as by --set match.image_lr=0.5",
                )
                synthetic.step(loss)
                bar.advance(1, f"loss {value:.3f}")
                run.log("match", step + 1, loss=value)
                if folder.due() and step + 1 < params.iterations:
                    folder.checkpoint({"step": step + 1, "synthetic": synthetic.state()})
        return synthetic.save(task, folder)


def _folder(task: Task) -> StageFolder:
    return matching_folder(task, {"match": read_params(task, Params).match.model_dump(mode="json")})


def _distance(
    task: Task, params: Matching, real: RealClasses, synthetic: SyntheticSet, step: int
) -> Tensor:
    """The distance of all classes under the network and the views of a step."""
    run = task.run
    network = fresh_network(task, params, step)
    embed = embedding(network)
    wanted, views = [], []
    for label, images in enumerate(synthetic.images):
        generator = run.generator("match", "real", step, label)
        view = draw_view(1, generator, params.views)
        batch = network.normalise(real.draw(label, params.real_batch, generator))
        with torch.no_grad(), run.unscaled():
            wanted.append(embed(apply_view(batch, view)).float().mean(0))
        views.append(apply_view(images, view))
    seen = torch.cat(views).contiguous(memory_format=torch.channels_last)
    with run.unscaled():
        features = embed(seen).float()
    return feature_distance(features.view(*synthetic.labels.shape, -1), torch.stack(wanted))


def embedding(model: Classifier) -> nn.Module:
    """The backbone without its last linear layer, in place: normalised images to features [N, D]."""
    linear = [name for name, part in model.backbone.named_modules() if isinstance(part, nn.Linear)]
    model.backbone.set_submodule(linear[-1], nn.Identity())
    return model.backbone.requires_grad_(False)


def feature_distance(features: Tensor, wanted: Tensor) -> Tensor:
    """Squared distance of each class's mean feature to the wanted one, summed over classes.

    DM, equation 6.

    Args:
        features: of synthetic images, [K, n, D].
        wanted: mean features of real images, [K, D].
    """
    return (features.mean(1) - wanted).square().sum()
