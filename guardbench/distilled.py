"""The artifact at which every method and every submission meet: `DistilledDataset`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from guardbench import canonical
from guardbench.data.catalog import CATALOG, class_names
from guardbench.errors import GuardbenchError, brief
from guardbench.fields import Name, Strict
from guardbench.figures import new_figure, save_png
from guardbench.json_files import first_problem
from guardbench.models import Classifier, build_model, load_weights, save_weights
from guardbench.processes import Processes
from guardbench.records import LabelKind
from guardbench.store import read_text, write_bytes, write_text

MANIFEST = "manifest.json"
IMAGES = "images.safetensors"
TEACHER = "teacher.safetensors"
PREVIEW = "preview.png"


class Manifest(Strict):
    """What a distilled set is, and the digest of each of its files.

    Attributes:
        ipc: images per class; 0 for a whole training set, whose classes differ in size.
        classes: names in label order.
        label_kind: `hard`, `soft`, or `teacher` when views are labelled by a network.
        teacher_arch: its architecture, when `label_kind` is `teacher`.
        label_bytes: stored bytes of what labels the images.
        provenance: how it was made: method, seed, precision, digests.
        files: SHA-256 of every other file of the folder.
    """

    schema_version: int = 1
    dataset: Name
    resolution: int = Field(gt=0, le=1024)
    channels: int = Field(ge=1, le=4)
    ipc: int = Field(ge=0)
    method: Name
    classes: tuple[str, ...]
    label_kind: LabelKind
    teacher_arch: Name | None = None
    label_bytes: int = Field(ge=0)
    provenance: dict[str, str | int]
    files: dict[str, str]

    @property
    def sha256(self) -> str:
        """Digest of the artifact: of its manifest, and through it of every file."""
        return canonical.digest(self.model_dump(mode="json"))


@dataclass(frozen=True)
class DistilledDataset:
    """A distilled dataset.

    Attributes:
        images: float32 [N, C, H, W] in [0, 1], not normalised.
        hard: int64 [N], the class that each image stands for; always there.
        soft: float32 [N, K] rows that sum to 1, or None.
        teacher: the network that labels views of the images, or None.
        manifest: what it is and how it was made.
    """

    images: Tensor
    hard: Tensor
    soft: Tensor | None
    teacher: Classifier | None
    manifest: Manifest

    @property
    def digest(self) -> str:
        """Of the files that it lies in."""
        return canonical.digest(self.manifest.files)

    @property
    def image_bytes(self) -> int:
        """Bytes of the images at 8 bits a value, the currency in which storage is compared."""
        return self.images.numel()


def save_distilled(
    folder: Path,
    *,
    images: Tensor,
    hard: Tensor,
    teacher: Classifier | None,
    soft: Tensor | None = None,
    teacher_arch: str | None = None,
    dataset: str,
    ipc: int,
    method: str,
    classes: tuple[str, ...],
    provenance: dict[str, str | int],
) -> DistilledDataset:
    """Checks and writes a distilled dataset; the manifest comes last, so a folder with one is whole.

    Raises:
        GuardbenchError: values outside [0, 1] or not finite, or another count of images per class
            than `ipc`. Nothing is clipped in silence.
    """
    kind: LabelKind = "teacher" if teacher is not None else "soft" if soft is not None else "hard"
    check_images(images, hard, ipc=ipc, classes=len(classes), where=str(folder))
    tensors = {"images": images.contiguous(), "labels": hard}
    if soft is not None:
        tensors["soft"] = soft
    write_bytes(folder / IMAGES, save(tensors))
    files = {IMAGES: canonical.file_digest(folder / IMAGES)}
    label_bytes = hard.numel() if soft is None else soft.numel() * soft.element_size()
    if teacher is not None:
        save_weights(teacher, folder / TEACHER)
        files[TEACHER] = canonical.file_digest(folder / TEACHER)
        label_bytes = (folder / TEACHER).stat().st_size
    manifest = Manifest(
        dataset=dataset,
        resolution=images.shape[-1],
        channels=images.shape[1],
        ipc=ipc,
        method=method,
        classes=classes,
        label_kind=kind,
        teacher_arch=teacher_arch,
        label_bytes=label_bytes,
        provenance=provenance,
        files=files,
    )
    save_preview(folder / PREVIEW, images, hard, readable_classes(dataset, classes))
    write_text(folder / MANIFEST, canonical.dumps(manifest.model_dump(mode="json")))
    return DistilledDataset(images, hard, soft, teacher, manifest)


def load_distilled(folder: Path) -> DistilledDataset:
    """Reads what `save_distilled` wrote, after checking every digest.

    Raises:
        GuardbenchError: a file is missing, changed or malformed; the message names it.
    """
    path = folder / MANIFEST
    try:
        manifest = Manifest.model_validate_json(
            read_text(path, what="manifest", limit=4 << 20), strict=True
        )
    except ValidationError as error:
        raise GuardbenchError(f"{path}: {first_problem(error)}.") from error
    needed = {IMAGES, TEACHER} if manifest.label_kind == "teacher" else {IMAGES}
    if needed - manifest.files.keys():
        raise GuardbenchError(
            f"{path}: files: lacks {' and '.join(sorted(needed - manifest.files.keys()))}."
        )
    for name in sorted(manifest.files):
        file = folder / Path(name).name
        if not file.is_file() or canonical.file_digest(file) != manifest.files[name]:
            raise GuardbenchError(f"{file}: missing or changed since its manifest was written.")
    try:
        tensors = load_file(folder / IMAGES)
        images, hard, soft = tensors["images"], tensors["labels"], tensors.get("soft")
    except (KeyError, OSError, SafetensorError) as error:
        raise GuardbenchError(
            f"{folder / IMAGES}: not a distilled set ({brief(error)})."
        ) from error
    check_images(
        images, hard, ipc=manifest.ipc, classes=len(manifest.classes), where=str(folder / IMAGES)
    )
    _check_as_declared(images, soft, manifest, where=str(folder / IMAGES))
    teacher = None
    if manifest.label_kind == "teacher":
        teacher = _fresh_teacher(manifest)
        load_weights(teacher, folder / TEACHER)
    return DistilledDataset(images, hard, soft, teacher, manifest)


def told_by_main(processes: Processes, work: Callable[[], DistilledDataset]) -> DistilledDataset:
    """What `work`, which reads or writes a folder, gives the first process, for all of them."""
    if processes.count == 1:
        return work()
    found: list[DistilledDataset] = []

    def described() -> tuple[Manifest, bool]:
        found.append(work())
        return found[0].manifest, found[0].soft is not None

    manifest, has_soft = processes.from_main(described)
    whole = found[0] if found else None

    def sent(name: str) -> Tensor:
        return processes.tensor_from_main(lambda: cast(Tensor, getattr(whole, name)))

    teacher = None if whole is None else whole.teacher
    if manifest.label_kind == "teacher":
        teacher = _fresh_teacher(manifest) if teacher is None else teacher
        for value in teacher.state_dict().values():
            told = processes.tensor_from_main(lambda value=value: value)  # type: ignore[misc]
            value.copy_(told)
    return DistilledDataset(
        sent("images"), sent("hard"), sent("soft") if has_soft else None, teacher, manifest
    )


def _fresh_teacher(manifest: Manifest) -> Classifier:
    """A network of the teacher's architecture, in eval mode, without gradients for its weights."""
    teacher = build_model(
        manifest.teacher_arch or "",
        channels=manifest.channels,
        classes=len(manifest.classes),
        resolution=manifest.resolution,
        seed=0,
    )
    return teacher.eval().requires_grad_(False)


def check_images(images: Tensor, hard: Tensor, *, ipc: int, classes: int, where: str) -> None:
    """Raises a GuardbenchError that names what is wrong with a distilled set's tensors.

    Args:
        ipc: how many images every class must have; 0 for as many as there are, one at least.
    """
    shaped = images.ndim == 4 and images.dtype == torch.float32 and images.numel() > 0
    if not shaped or hard.shape != images.shape[:1]:
        raise GuardbenchError(f"{where}: images must be float32 [N, C, H, W], one label each.")
    if hard.dtype != torch.int64 or not 0 <= int(hard.min()) <= int(hard.max()) < classes:
        raise GuardbenchError(f"{where}: labels must be int64, from 0 to {classes - 1}.")
    if not bool(torch.isfinite(images).all()):
        raise GuardbenchError(f"{where}: images hold values that are not finite.")
    low, high = images.min().item(), images.max().item()
    if low < 0 or high > 1:
        raise GuardbenchError(
            f"{where}: images must lie in [0, 1], found [{low:.4g}, {high:.4g}]; undo the normalisation."
        )
    counts = torch.bincount(hard, minlength=classes)
    if ipc == 0 and len(counts) == classes and bool((counts > 0).all()):
        return
    if len(counts) != classes or bool((counts != ipc).any()):
        worst = int((counts != ipc).int().argmax())
        raise GuardbenchError(
            f"{where}: class {worst} has {int(counts[worst])} images where IPC is {ipc}."
        )


def _check_as_declared(
    images: Tensor, soft: Tensor | None, manifest: Manifest, *, where: str
) -> None:
    """Raises a GuardbenchError where tensors differ from what their manifest says of them."""
    declared = (manifest.channels, manifest.resolution, manifest.resolution)
    if images.shape[1:] != declared:
        raise GuardbenchError(
            f"{where}: images are {list(images.shape[1:])} where the manifest says {list(declared)}."
        )
    if manifest.label_kind != "teacher" and (soft is not None) != (manifest.label_kind == "soft"):
        raise GuardbenchError(
            f"{where}: soft labels are {'missing' if soft is None else 'there'} where the manifest "
            f"says {manifest.label_kind} labels."
        )
    if soft is not None and (
        soft.dtype != torch.float32
        or soft.shape != (len(images), len(manifest.classes))
        or not bool(torch.isfinite(soft).all())
    ):
        raise GuardbenchError(f"{where}: soft labels must be finite float32 [N, K].")


def readable_classes(dataset: str, classes: tuple[str, ...]) -> tuple[str, ...]:
    """Names for people, in label order: the catalogue's where it has them, else `classes`."""
    return (class_names(dataset) if dataset in CATALOG else ()) or classes


def save_preview(
    path: Path, images: Tensor, hard: Tensor, classes: tuple[str, ...], most: int = 10
) -> None:
    """Draws a PNG grid: one row a class (at most 20), at most `most` images a row.

    Below it stands what is left out.
    """
    ipc = int((hard == 0).sum())
    columns, rows = min(most, ipc), min(len(classes), 20)
    shown = ((rows, len(classes), "classes"), (columns, ipc, "images a class"))
    note = ", ".join(f"{some} of {count} {what}" for some, count, what in shown if some < count)
    margin = 0.2 + 0.085 * max(len(name) for name in classes[:rows])  # inches for the names
    width = columns + margin
    height = rows + (0.3 if note else 0)
    figure = new_figure(figsize=(width, height), dpi=max(64, min(224, images.shape[-1])))
    grid = figure.subplots(
        rows, columns, squeeze=False, gridspec_kw={"wspace": 0.03, "hspace": 0.03}
    )
    figure.subplots_adjust(left=margin / width, right=0.995)
    figure.subplots_adjust(top=0.995, bottom=0.005 + (height - rows) / height)
    figure.text(margin / width, 0.09 / height, note, fontsize=9)
    for row in range(rows):
        for column, index in enumerate(torch.nonzero(hard == row).flatten()[:columns].tolist()):
            axes = grid[row][column]
            picture = images[index].permute(1, 2, 0).numpy()
            axes.imshow(
                picture.squeeze(-1) if picture.shape[-1] == 1 else picture,
                cmap="gray",
                vmin=0,
                vmax=1,
                interpolation="nearest",
            )
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_visible(False)
            if column == 0:
                axes.set_ylabel(classes[row], rotation=0, ha="right", va="center", fontsize=9)
    save_png(path, figure)
