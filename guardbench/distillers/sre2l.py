"""SRe2L (Yin et al., NeurIPS 2023), CDA (Yin & Shen, 2023) and, with curvature in the squeeze, GUARD.

Squeeze: see `guardbench.distillers.squeeze`. Recover: noise is optimised until the teacher sees
the wanted class in it and its BN layers see the statistics of real data. Relabel belongs to the
training of students (`guardbench.training`), since the views that are labelled are the student's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from guardbench.data.augment import apply_crops, draw_crops, draw_flips
from guardbench.data.dataset import RealDataset
from guardbench.distilled import (
    MANIFEST,
    DistilledDataset,
    load_distilled,
    save_distilled,
    told_by_main,
)
from guardbench.distillers.base import PlannedStage, Task, read_params
from guardbench.distillers.squeeze import (
    Squeeze,
    fresh_teacher,
    plan_squeeze,
    squeeze,
    squeeze_folder,
)
from guardbench.errors import GuardbenchError, brief
from guardbench.fields import Strict
from guardbench.imported import state_digest
from guardbench.models import Classifier, batch_norms
from guardbench.protocol import LARGEST_RATE, CropScale
from guardbench.records import LabelKind
from guardbench.runtime import check_finite
from guardbench.sealed import read_tensors, write_tensors
from guardbench.stages import StageFolder

CLASSES_A_GROUP = 100  # of the original's recover batches
_MOMENTS = ("exp_avg", "exp_avg_sq")  # what Adam keeps of every image


class Recover(Strict):
    """The `recover` table (SRe2L, equations 5 to 8).

    Attributes:
        iterations: steps of Adam (betas 0.5 and 0.9), cosine to 0.
        lr: Adam's, in normalised pixels.
        r_bn: weight of the BN term.
        first_bn: extra weight of the first BN layer.
        jitter: largest random roll in pixels.
        crop_scale, flip: of the random view that the teacher sees at each step.
        group: which images share batch statistics in the BN term: `classes`, one image of every
            class (at most 100 classes), as in the original; or `all`, every image at once.
        images_a_batch: groups are optimised together up to so many images; changes speed alone.
        curriculum: `cosine`: the smallest share of the area goes from 1 at the first step down to
            `crop_scale`'s on a cosine (CDA, Yin & Shen 2023, section 3.2); `none`: it stands still.
    """

    iterations: int = Field(gt=0)
    lr: float = Field(gt=0, le=LARGEST_RATE)
    r_bn: float = Field(ge=0)
    first_bn: float = Field(default=10.0, ge=0)
    jitter: int = Field(ge=0)
    crop_scale: CropScale = (0.08, 1.0)
    flip: bool = True
    group: Literal["classes", "all"] = "classes"
    images_a_batch: int = Field(default=100, gt=0)
    curriculum: Literal["none", "cosine"] = "none"

    def scale_at(self, share: float) -> tuple[float, float]:
        """The crop scale when `share` (0 to 1) of the steps are done."""
        low, high = self.crop_scale
        if self.curriculum == "none":
            return low, high
        return high + (low - high) * 0.5 * (1 - math.cos(math.pi * share)), high


class Params(Strict):
    """A recipe's `params` for this family."""

    squeeze: Squeeze
    recover: Recover


class SRe2L:
    """The distiller; see the module."""

    params = Params

    def plan(self, task: Task) -> list[PlannedStage]:
        """See `Distiller.plan`."""
        params = read_params(task, Params)
        recover = params.recover
        if not batch_norms(fresh_teacher(task, params.squeeze)):
            raise GuardbenchError(
                f"method {task.method.name}: recover reads BN statistics and {params.squeeze.arch} has "
                "none; set squeeze.arch to one that has, such as resnet18 or convnet-d3-bn."
            )
        images = task.ipc * len(task.classes)
        return [
            plan_squeeze(task, params.squeeze),
            PlannedStage(
                _recover_folder(task),
                f"{recover.iterations} steps x {images} images",
                recover.iterations * images,
                arch=params.squeeze.arch,
            ),
        ]

    def label_kind(self, task: Task) -> LabelKind:  # noqa: ARG002 - the interface gives it
        """See `Distiller.label_kind`: the squeezed teacher labels every view."""
        return "teacher"

    def image_count(self, task: Task) -> int:
        """See `Distiller.image_count`."""
        return task.ipc * len(task.classes)

    def distill(self, task: Task, train: RealDataset) -> DistilledDataset:
        """See `Distiller.distill`."""
        return recover(task, squeeze(task, read_params(task, Params).squeeze, train))


def recover(task: Task, teacher: Classifier) -> DistilledDataset:
    """Optimises noise into the distilled images, or loads them when an earlier run has made them.

    Args:
        teacher: in eval mode.
    """
    folder = _recover_folder(task)
    with folder.claimed() as stored:
        if stored is None:
            distilled = _recover(task, teacher, folder)
    if task.run.processes.main:
        for part in folder.path.glob("recovered-*.safetensors"):
            part.unlink(missing_ok=True)
    if stored is None:
        return distilled
    return told_by_main(task.run.processes, lambda: load_distilled(folder.path / "distilled"))


def _recover(task: Task, teacher: Classifier, folder: StageFolder) -> DistilledDataset:
    params, run = read_params(task, Params).recover, task.run
    groups = _groups(len(task.classes), task.ipc, params)
    made_from = run.processes.from_main(lambda: state_digest(teacher))
    state = folder.begin(run.device, made_from)
    # Chunks that are done lie in files of their own: neither memory nor a checkpoint holds all images.
    part = partial(_part, folder.path, made_from)
    ready = run.processes.from_main(lambda: _ready(part, groups, folder.say))
    most = params.images_a_batch * run.processes.count
    chunks = [chunk for some in _left(groups, ready) for chunk in _chunks(some, most)]
    if state is not None and state.get("groups") != [
        g.number for chunk in chunks[:1] for g in chunk
    ]:
        state = None  # of a chunk that is done, or of another number of processes
    total = params.iterations * (len(ready) + len(chunks))
    started = params.iterations * len(ready) + (int(state["step"]) if state else 0)
    with run.progress.stage("recover", total, "steps", started) as bar:
        for number, chunk in enumerate(chunks, start=len(ready)):
            recovery = _Recovery(task, teacher, params, chunk, number)
            if state is not None:
                recovery.resume(state)
                state = None
            images = {"images": recovery.optimise(folder, bar.advance)}
            first = chunk[0].number
            run.processes.from_main(partial(write_tensors, part(first), images))
            ready[first] = len(chunk)
    labels = torch.tensor([label for group in groups for label in group.labels])
    order = torch.argsort(labels, stable=True)  # class after class, as people look for them
    distilled = told_by_main(
        run.processes,
        lambda: save_distilled(
            folder.path / "distilled",
            images=_gathered([part(first) for first in sorted(ready)], order),
            hard=labels[order],
            teacher=teacher,
            teacher_arch=read_params(task, Params).squeeze.arch,
            dataset=task.dataset,
            ipc=task.ipc,
            method=task.method.name,
            classes=task.classes,
            provenance={"stage": folder.key, "seed": run.seed, "precision": run.precision},
        ),
    )
    folder.finish(run.device, (f"distilled/{MANIFEST}",))
    return distilled


def _part(folder: Path, teacher: str, first: int) -> Path:
    """The file of the images of a chunk, by the teacher's digest and the number of its first group."""
    return folder / f"recovered-{teacher[:12]}-{first:05d}.safetensors"


def _ready(
    part: Callable[[int], Path], groups: list[_Group], say: Callable[[str], None]
) -> dict[int, int]:
    """The chunks that are done: number of the first group -> groups in its file; of any size each."""
    ready: dict[int, int] = {}
    number = 0
    while number < len(groups):
        path, held = part(number), 0
        if path.is_file():
            try:
                held = len(read_tensors(path)["images"]) // len(groups[number].labels)
            except ValueError as error:
                say(f"{path}: unreadable ({error}); its images are recovered anew")
        if held:
            ready[number] = held
        number += max(held, 1)
    return ready


def _left(groups: list[_Group], ready: Mapping[int, int]) -> list[list[_Group]]:
    """The groups that are not in `ready`, neighbours together."""
    done = {first + place for first, held in ready.items() for place in range(held)}
    runs: list[list[_Group]] = []
    for group in groups:
        if group.number in done:
            continue
        if runs and runs[-1][-1].number + 1 == group.number:
            runs[-1].append(group)
        else:
            runs.append([group])
    return runs


def _gathered(parts: list[Path], order: Tensor) -> Tensor:
    """The images of all parts, [N, C, H, W], where image i is the `order[i]`th of those in the parts."""
    place = torch.argsort(order)
    images: Tensor | None = None
    first = 0
    for part in parts:
        try:
            found = read_tensors(part)["images"]
        except (ValueError, OSError) as error:
            raise GuardbenchError(
                f"{part}: {brief(error)}; run again to make its images anew."
            ) from error
        if images is None:
            images = found.new_empty((len(order), *found.shape[1:]))
        images[place[first : first + len(found)]] = found
        first += len(found)
    assert images is not None, "a recipe has at least one group"
    return images


class _Group:
    """Images that share batch statistics: their labels, and the number that names their randomness."""

    def __init__(self, number: int, labels: list[int]) -> None:
        self.number, self.labels = number, labels


def _groups(classes: int, ipc: int, params: Recover) -> list[_Group]:
    everything = [list(range(s, min(s + CLASSES_A_GROUP, classes)))
                  for s in range(0, classes, CLASSES_A_GROUP)] * ipc  # fmt: skip
    if params.group == "all":
        return [_Group(0, [label for labels in everything for label in labels])]
    return [_Group(number, labels) for number, labels in enumerate(everything)]


def _chunks(groups: list[_Group], most: int) -> list[list[_Group]]:
    """Groups of equal size, as many together as `most` images allow."""
    chunks: list[list[_Group]] = []
    for group in groups:
        size = len(group.labels)
        last = chunks[-1] if chunks else []
        if last and len(last[0].labels) == size and size * (len(last) + 1) <= most:
            last.append(group)
        else:
            chunks.append([group])
    return chunks


class _Recovery:
    """One chunk: equal-sized groups, optimised at once, each with its own views and BN term.

    The processes of a run share the groups. One that is left without keeps step with the others.
    """

    def __init__(
        self, task: Task, teacher: Classifier, params: Recover, chunk: list[_Group], number: int
    ) -> None:
        self.task, self.teacher, self.params = task, teacher, params
        self.number, self.groups = number, [group.number for group in chunk]
        self.size = len(chunk[0].labels)
        mine = task.run.processes.share(len(chunk))
        self.chunk = chunk[mine]
        self.rows = slice(mine.start * self.size, mine.stop * self.size)
        device = task.run.device
        self.labels = torch.tensor(
            [k for g in self.chunk for k in g.labels], device=device, dtype=torch.int64
        )
        shape = (self.size, task.channels, task.resolution, task.resolution)
        noise = [torch.empty(0, *shape[1:])] + [
            torch.randn(shape, generator=task.run.generator("recover", "noise", g.number))
            for g in self.chunk
        ]
        self.low = (0 - teacher.mean) / teacher.std
        self.high = (1 - teacher.mean) / teacher.std
        self.images = torch.cat(noise).to(device).requires_grad_()
        self.optimizer = torch.optim.Adam([self.images], params.lr, betas=(0.5, 0.9))
        self.first = 0

    def resume(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `optimise` kept; the images' rows are those of all processes."""
        self.first = int(state["step"])
        self.images.data.copy_(state["images"][self.rows])
        moments = {"step": torch.tensor(float(self.first))}
        for name in _MOMENTS:
            moments[name] = state[name][self.rows].to(self.images.device)
        if len(self.images):
            self.optimizer.state[self.images] = moments

    def optimise(self, folder: StageFolder, advance: Callable[[int, str], None]) -> Tensor:
        """Runs the steps that are left; returns images [n, C, H, W] in [0, 1] on the CPU."""
        collect = self.task.run.processes.collect
        for step in range(self.first, self.params.iterations):
            share = 0.5 * (1 + math.cos(math.pi * step / self.params.iterations))
            self.optimizer.param_groups[0]["lr"] = self.params.lr * share
            loss = self._step(step) if self.chunk else 0.0
            advance(1, f"loss {loss:.3f}")
            self.task.run.log("recover", self.number * self.params.iterations + step + 1, loss=loss)
            if folder.due() and step + 1 < self.params.iterations:
                parts = collect(self._kept())
                kept = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
                folder.checkpoint({"step": step + 1, "groups": self.groups, **kept})
        with torch.no_grad():
            pixels = self.images * self.teacher.std + self.teacher.mean
        return torch.cat(collect(pixels.clamp(0, 1).cpu()))

    def _kept(self) -> dict[str, Tensor]:
        """This process's images and their moments in Adam."""
        moments = self.optimizer.state.get(self.images, {})
        nothing = torch.zeros_like(self.images)
        kept = {name: moments.get(name, nothing).detach().cpu() for name in _MOMENTS}
        return {"images": self.images.detach().cpu(), **kept}

    def _step(self, step: int) -> float:
        run, params = self.task.run, self.params
        scale = params.scale_at(step / params.iterations)
        boxes, flips, rolls = [], [], []
        for group in self.chunk:  # one view a group, as in the original's batches
            generator = run.generator("recover", "view", group.number, step)
            side = self.task.resolution
            boxes.append(draw_crops(1, side, scale, generator))
            flips.append(draw_flips(1, generator) & params.flip)
            span = (-params.jitter, params.jitter + 1)
            rolls.append(torch.randint(*span, (2,), generator=generator).tolist())
        views = apply_crops(
            self.images,
            torch.cat(boxes).repeat_interleave(self.size, 0),
            torch.cat(flips).repeat_interleave(self.size, 0),
            self.task.resolution,
        )
        views = torch.cat(
            [
                torch.roll(part, (down, right), (2, 3))
                for part, (down, right) in zip(torch.split(views, self.size), rolls, strict=True)
            ]
        )
        self.optimizer.zero_grad(set_to_none=True)
        groups = len(self.chunk)
        with bn_discrepancy(self.teacher, groups, params.first_bn) as terms:
            with run.unscaled():
                logits = self.teacher.backbone(views.contiguous(memory_format=torch.channels_last))
            # A sum over groups of what the original minimises for each, so groups stay independent.
            loss = F.cross_entropy(logits.float(), self.labels) * groups
            loss = loss + params.r_bn * torch.stack(terms).sum()
        (self.images.grad,) = torch.autograd.grad(loss, self.images)
        value = check_finite(
            loss / groups,
            f"recover, batch {self.number + 1}, step {step + 1}",
            "lower recover.lr or recover.r_bn, as by --set recover.lr=0.05",
        )
        self.optimizer.step()
        with torch.no_grad():
            self.images.copy_(torch.maximum(torch.minimum(self.images, self.high), self.low))
        return value


@contextmanager
def bn_discrepancy(model: nn.Module, groups: int, first: float) -> Iterator[list[Tensor]]:
    """Inside, a forward fills the list with one BN term a layer (SRe2L, equation 8).

    The term of a layer is the sum over groups of
    `|| mean_g - running_mean ||_2 + || var_g - running_var ||_2`, with the (biased) statistics of a
    group's inputs to that layer; the first layer counts `first` times.

    Args:
        groups: the batch is that many consecutive groups of equal size.
    """
    terms: list[Tensor] = []

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, nn.BatchNorm2d)
        assert layer.running_mean is not None
        assert layer.running_var is not None
        # Channels last, so this is a view; two plain sums are four times faster than var_mean.
        x = inputs[0].permute(0, 2, 3, 1).reshape(groups, -1, layer.num_features).float()
        mean = x.mean(1)
        var = x.square().mean(1) - mean.square()
        term = (mean - layer.running_mean).norm(dim=1) + (var - layer.running_var).norm(dim=1)
        terms.append(term.sum() * (first if not terms else 1.0))

    handles = [layer.register_forward_pre_hook(hook) for layer in batch_norms(model)]
    try:
        yield terms
    finally:
        for handle in handles:
            handle.remove()


def _recover_folder(task: Task) -> StageFolder:
    params = read_params(task, Params)
    recover = params.recover.model_dump(mode="json")
    if params.recover.curriculum == "none":
        del recover["curriculum"]  # artifacts made before there was one keep their keys
    words = {
        "stage": "recover",
        "teacher": squeeze_folder(task, params.squeeze).key,
        "ipc": task.ipc,
        "method": task.method.name,
        "recover": recover,
    }
    return task.run.stage("recover", "distilled", words)
