"""Where in people's files the images and labels are: SRe2L, DC, DSA, DM, MTT, TESLA, plain arrays."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from guardbench.data.catalog import DatasetInfo
from guardbench.errors import GuardbenchError
from guardbench.fields import printable
from guardbench.submissions.class_folders import at_most, listed, read_class_folders
from guardbench.submissions.files import plain_file
from guardbench.submissions.pixels import check_tensor
from guardbench.tensor_files import load_npy, load_npz, load_safetensors, load_torch

Kind = Literal["folders", "dc", "mtt", "arrays"]

IMAGE_NAMES = (
    "images",
    "image",
    "imgs",
    "img",
    "image_syn",
    "images_train",
    "x",
    "x_train",
    "data",
)
LABEL_NAMES = (
    "labels", "label", "label_syn", "labels_train", "targets", "target", "y", "y_train",
)  # fmt: skip
SOFT_NAMES = ("soft", "soft_labels", "soft_label", "probs", "probabilities", "logits")
_MTT = re.compile(r"images_(zca_)?(best|\d+)\.pt")
_PAIRS = (("images", "labels"), ("image", "label"), ("x", "y"), ("X", "y"))


@dataclass(frozen=True)
class Source:
    """What a file or a folder holds, before anything is changed.

    Attributes:
        kind: who writes such files.
        where: the file of the images, or the folder.
        images: any numbers, usually [N, C, H, W].
        labels: any numbers, [N] or [N, K], or None.
        soft: soft labels beside labels, or None.
        unwhitened: images that MTT saved with their whitening undone.
        said: what was found, one line each.
    """

    kind: Kind
    where: str
    images: Tensor
    labels: Tensor | None = None
    soft: Tensor | None = None
    unwhitened: bool = False
    said: tuple[str, ...] = ()


def read_source(source: Path, *, experiment: int | None, info: DatasetInfo | None) -> Source:
    """Reads whatever lies at `source`.

    Args:
        source: a file, or a folder of class folders, of MTT's files or of one other file.
        experiment: which of a `res_*.pt`, counted from 0; the last if None.
        info: the dataset, where it is known.

    Raises:
        GuardbenchError: nothing known is there, several candidates are, or it cannot be read.
    """
    if not source.exists():
        raise GuardbenchError(f"{_shown(source)}: no such file or folder.")
    if source.is_dir():
        name = _file_of(source)
        if name is None:
            _no_experiment(experiment, source)
            images, labels, said = read_class_folders(source, info)
            return Source("folders", _shown(source), images, labels, said=said)
        source = plain_file(source, name)
    if source.suffix in (".pt", ".pth"):
        return _torch(source, experiment)
    _no_experiment(experiment, source)
    if source.suffix == ".npy":
        return _npy(source)
    if source.suffix == ".npz":
        return _named(load_npz(source), source)
    if source.suffix == ".safetensors":
        return _named(load_safetensors(source), source)
    raise GuardbenchError(
        f"{_shown(source)}: no file of a kind that is read: .pt, .pth, .npz, .npy, .safetensors, or a folder."
    )


def _no_experiment(experiment: int | None, source: Path) -> None:
    if experiment is not None:
        raise GuardbenchError(f"--experiment {experiment}: only res_*.pt have them, not {source}.")


def _file_of(folder: Path) -> str | None:
    """The one file that a folder is about, None where it holds class folders."""
    entries = [entry for entry in listed(folder) if not entry.name.startswith(".")]
    folders = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    files = sorted({entry.name for entry in entries} - set(folders))
    if "images_best.pt" in files:
        return "images_best.pt"
    mtt = [name for name in files if _MTT.fullmatch(name)]
    res = [name for name in files if name.startswith("res_") and name.endswith(".pt")]
    arrays = [name for name in files if name.endswith((".npz", ".safetensors"))]
    arrays += [name for name in files if name.endswith(".npy") and _beside(folder / name)]
    for found in (mtt, res, [] if folders else arrays):
        if len(found) > 1:
            raise GuardbenchError(
                f"{folder}: {at_most(found)}: which of them? Name the file itself."
            )
        if found:
            return found[0]
    return None


def _npy(path: Path) -> Source:
    beside = _beside(path)
    labels = None if beside is None else load_npy(beside)
    name = "no labels" if beside is None else printable(beside.name)
    said = f"layout: {printable(path.name)} and {name}"
    return Source("arrays", _shown(path), load_npy(path), labels, said=(said,))


def _beside(images: Path) -> Path | None:
    """The .npy file of labels that belongs to one of images by its name."""
    for old, new in _PAIRS:
        stem = images.stem
        if stem == old or stem.startswith(f"{old}_") or (len(old) > 2 and old in stem):
            name = f"{stem.replace(old, new, 1)}.npy"
            if (images.parent / name).exists():
                return plain_file(images.parent, name)
    return None


def _torch(path: Path, experiment: int | None) -> Source:
    found = load_torch(path)
    if isinstance(found, Mapping) and isinstance(found.get("data"), (list, tuple)):
        return _dc(path, found["data"], experiment)
    _no_experiment(experiment, path)
    if isinstance(found, Tensor):
        return _mtt(path, found)
    if isinstance(found, (list, tuple)) and len(found) == 2:
        images, labels = (_tensor(one, f"{_shown(path)}: item {k}") for k, one in enumerate(found))
        return Source("arrays", _shown(path), images, labels, said=("layout: [images, labels]",))
    if isinstance(found, Mapping):
        named = {str(key): value for key, value in found.items() if isinstance(value, Tensor)}
        return _named(named, path)
    raise GuardbenchError(
        f"{_shown(path)}: holds neither a tensor, nor `data` as DC writes it, nor images and labels; save "
        "{'images': ..., 'labels': ...}."
    )


def _dc(path: Path, data: Any, experiment: int | None) -> Source:
    if not data:
        raise GuardbenchError(f"{_shown(path)}: data: is empty; run DC to its end.")
    chosen = len(data) - 1 if experiment is None else experiment
    if not 0 <= chosen < len(data):
        raise GuardbenchError(
            f"--experiment {experiment}: {_shown(path)} holds {len(data)}; choose 0 to {len(data) - 1}."
        )
    pair = data[chosen]
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        raise GuardbenchError(
            f"{_shown(path)}: data[{chosen}]: is not [images, labels]; save it so."
        )
    said = f"layout: DC's, experiment {chosen}"
    if len(data) > 1:
        said += f" of 0 to {len(data) - 1}"
        said += " (the last; --experiment names another)" if experiment is None else ""
    images, labels = (
        _tensor(one, f"{_shown(path)}: data[{chosen}][{k}]") for k, one in enumerate(pair)
    )
    return Source("dc", _shown(path), images, labels, said=(said,))


def _mtt(path: Path, images: Tensor) -> Source:
    named = _MTT.fullmatch(path.name)
    if named is None:
        return Source("arrays", _shown(path), images, said=("layout: one tensor, no labels",))
    name, plain = f"labels_{named[2]}.pt", bool(named[1])
    if not os.path.lexists(path.parent / name):
        said = (f"layout: MTT's, without {name}",)
        return Source("mtt", _shown(path), images, unwhitened=plain, said=said)
    labels = _tensor(load_torch(plain_file(path.parent, name)), _shown(path.parent / name))
    said = (f"layout: MTT's, {printable(path.name)} and {name}",)
    return Source("mtt", _shown(path), images, labels, unwhitened=plain, said=said)


def _tensor(value: Any, where: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise GuardbenchError(f"{where}: is {type(value).__name__}, not a tensor; save one.")
    return check_tensor(value, where)


def _named(arrays: Mapping[str, Tensor], path: Path) -> Source:
    """Images and labels among arrays by their names, else by their shapes."""
    arrays = {
        key: check_tensor(one, f"{_shown(path)}: {printable(key, 80)}")
        for key, one in arrays.items()
    }
    shapes = at_most([f"{key} {list(one.shape)}" for key, one in arrays.items()], 6)
    images = _called(arrays, IMAGE_NAMES, (3, 4)) or _only(arrays, 4) or _only(arrays, 3)
    if images is None:
        raise GuardbenchError(
            f"{_shown(path)}: which array holds the images is not clear "
            f"({shapes or 'there is none'}); call it `images`."
        )
    rest = {key: one for key, one in arrays.items() if key != images}
    labels = _called(rest, LABEL_NAMES, (1, 2))
    soft = _called({k: one for k, one in rest.items() if k != labels}, SOFT_NAMES, (2,))
    if labels is None and soft is None:
        fit = {key: one for key, one in rest.items() if one.shape[:1] == arrays[images].shape[:1]}
        labels = _only(fit, 1) or _only(fit, 2)
    used = [key for key in (images, labels, soft) if key is not None]
    said = [f"layout: {at_most(used)} of {printable(path.name)}"]
    if passed := sorted(arrays.keys() - set(used)):
        said.append(f"passed over: {at_most(passed)}")
    return Source(
        "arrays",
        _shown(path),
        arrays[images],
        arrays[labels] if labels else None,
        arrays[soft] if soft else None,
        said=tuple(said),
    )


def _called(
    arrays: Mapping[str, Tensor], names: tuple[str, ...], axes: tuple[int, ...]
) -> str | None:
    """The array with the first of the names that is there, whatever its case."""
    known = {key.lower(): key for key, one in arrays.items() if one.ndim in axes}
    return next((known[name] for name in names if name in known), None)


def _only(arrays: Mapping[str, Tensor], axes: int) -> str | None:
    """The one array with so many axes, None where there is none or there are several."""
    found = [key for key, one in arrays.items() if one.ndim == axes]
    return found[0] if len(found) == 1 else None


def _shown(path: Path) -> str:
    """A path as an error may show it: what a folder holds is named by whoever sent it."""
    return printable(str(path), 1000)
