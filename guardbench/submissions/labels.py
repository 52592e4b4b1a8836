"""Labels as people store them: numbers, one-hot rows, probabilities, logits, or only an order."""

from __future__ import annotations

import torch
from torch import Tensor

from guardbench.errors import GuardbenchError
from guardbench.submissions.pixels import check_tensor

MOST_CLASSES = 100_000
_ROUNDING = 1e-3  # of a row's sum: half precision


def read_labels(
    labels: Tensor | None,
    soft: Tensor | None,
    where: str,
    *,
    count: int,
    ipc: int | None,
    classes: int | None,
) -> tuple[Tensor, Tensor | None, list[str]]:
    """Labels int64 [N], soft labels float32 [N, K] whose rows sum to 1 or None, and what was found.

    Args:
        labels: of any numbers, [N], [N, 1] or [N, K]; None where the file has none.
        soft: [N, K] beside them, or None.
        where: names the file in an error.
        count: N, of the images.
        ipc: images per class, as the user says.
        classes: K, None if not known.

    Raises:
        GuardbenchError: none and nothing to go by; another number than images; no numbers of classes;
            rows that are neither probabilities nor logits; or not the same number of every class.
    """
    said: list[str] = []
    hard: Tensor | None = None
    if labels is not None:
        labels = _of_images(labels, f"{where}: labels", count)
        if labels.ndim == 2 and labels.shape[1] > 1:
            hard = _one_hot(labels)
            if hard is not None:
                said.append("labels: one-hot rows, read as hard labels")
            elif soft is not None:
                raise GuardbenchError(
                    f"{where}: labels: shape {list(labels.shape)}, and soft labels beside it; keep one."
                )
            soft = labels if hard is None else soft
        else:
            hard, how = _numbers(labels.reshape(-1), where)
            said.append(f"labels: {how}")
    if soft is not None:
        soft, how = _probabilities(_of_images(soft, f"{where}: soft labels", count), where, classes)
        said.append(f"soft labels: {how}")
    if hard is None:
        hard, how = _from_order(soft, where, count, ipc, classes)
        said.append(how)
    said.append(_check_counts(hard, where, ipc, classes if soft is None else soft.shape[1]))
    return hard, soft, said


def _of_images(labels: Tensor, where: str, count: int) -> Tensor:
    labels = check_tensor(labels, where)
    if labels.ndim not in (1, 2) or len(labels) != count:
        raise GuardbenchError(
            f"{where}: shape {list(labels.shape)} for {count} images; one label, or one row, an image."
        )
    if labels.ndim == 2 and labels.shape[1] > MOST_CLASSES:
        raise GuardbenchError(f"{where}: rows of {labels.shape[1]}; the most is {MOST_CLASSES}.")
    if labels.is_floating_point() and not bool(torch.isfinite(labels).all()):
        raise GuardbenchError(f"{where}: hold NaN or infinity; remove what caused them.")
    return labels


def _one_hot(rows: Tensor) -> Tensor | None:
    ones = rows == 1
    if bool(((rows == 0) | ones).all()) and bool((ones.sum(1) == 1).all()):
        return ones.to(torch.uint8).argmax(1)
    return None


def _numbers(labels: Tensor, where: str) -> tuple[Tensor, str]:
    whole = labels.to(torch.int64)
    if labels.is_floating_point() and not bool((whole == labels).all()):
        raise GuardbenchError(
            f"{where}: labels: not whole numbers; one class number an image, or rows [N, K]."
        )
    if bool((whole < 0).any()) or bool((whole >= MOST_CLASSES).any()):
        raise GuardbenchError(
            f"{where}: labels: from {int(whole.min())} to {int(whole.max())}; they are numbers of "
            "classes, from 0."
        )
    kind = "floats that are whole numbers" if labels.is_floating_point() else "whole numbers"
    return whole, f"{kind}, {int(whole.min())} to {int(whole.max())}"


def _probabilities(rows: Tensor, where: str, classes: int | None) -> tuple[Tensor, str]:
    if rows.ndim != 2 or (classes is not None and rows.shape[1] != classes):
        raise GuardbenchError(
            f"{where}: soft labels: shape {list(rows.shape)}; a row of {classes or 'K'} an image, one "
            "number a class."
        )
    if not rows.is_floating_point():
        raise GuardbenchError(
            f"{where}: labels: rows of whole numbers that are not one-hot; one number an image, or "
            "probabilities."
        )
    rows = rows.to(torch.float64)
    off = (rows.sum(1) - 1).abs().max().item()
    if rows.min() >= 0 and off <= _ROUNDING:
        rows = rows / rows.sum(1, keepdim=True)
        return rows.to(torch.float32), f"probabilities (rows sum to 1 within {off:.1g})"
    if rows.min() >= 0 and rows.max() <= 1:
        raise GuardbenchError(
            f"{where}: soft labels: within [0, 1], yet their rows sum to 1 only within {off:.3g}: "
            "neither probabilities nor logits; divide each row by its sum."
        )
    spread = f"[{rows.min().item():.4g}, {rows.max().item():.4g}]"
    return rows.softmax(1).to(torch.float32), (
        f"taken for logits, with values in {spread}; softmax at temperature 1"
    )


def _from_order(
    soft: Tensor | None, where: str, count: int, ipc: int | None, classes: int | None
) -> tuple[Tensor, str]:
    """The classes of images without hard labels: the soft ones' largest, else by their order."""
    largest = soft.argmax(1) if soft is not None else None
    if largest is not None and soft is not None:
        counts = torch.bincount(largest, minlength=soft.shape[1])
        if bool((counts == counts[0]).all()):
            return largest, "labels: of each image the class of its largest soft label"
        classes = soft.shape[1]
    why = "there are none" if soft is None else "the largest soft labels favour some classes"
    if ipc is None or classes is None:
        raise GuardbenchError(
            f"{where}: labels: {why}; add them, or say --ipc (and the dataset) if the images lie class "
            "by class."
        )
    if count != ipc * classes:
        raise GuardbenchError(
            f"{where}: labels: {why}, and {count} images are not --ipc {ipc} of each of {classes} "
            "classes; add the labels."
        )
    order = torch.arange(classes).repeat_interleave(ipc)
    said = f"labels: assumed that images lie class by class, {ipc} of each of {classes}"
    if largest is not None:
        differ = int((largest != order).sum())
        said += f"; the largest soft label is of another class for {differ} of {count}"
    return order, said


def _check_counts(hard: Tensor, where: str, ipc: int | None, classes: int | None) -> str:
    """How many images each class has, in words."""
    most = int(hard.max()) + 1
    if classes is not None and most > classes:
        raise GuardbenchError(
            f"{where}: labels: up to {most - 1}, where there are {classes} classes (0 to {classes - 1});"
            " number them in the dataset's order."
        )
    counts = torch.bincount(hard, minlength=classes or most)
    wanted = ipc if ipc is not None else int(counts.max())
    wrong = torch.nonzero(counts != wanted).flatten().tolist()
    if wrong:
        raise GuardbenchError(
            f"{where}: labels: class {wrong[0]} has {int(counts[wrong[0]])} images where "
            + (f"--ipc is {ipc}" if ipc is not None else f"another has {wanted}")
            + f" ({len(wrong)} such classes); every class needs the same number."
        )
    return f"IPC: {wanted} images of each of {len(counts)} classes"
