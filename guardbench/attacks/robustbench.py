"""RobustBench: its protocol on any model, its model zoo here, its corruptions; no other module imports it.

Croce et al., "RobustBench: a standardized adversarial robustness benchmark", NeurIPS Datasets and
Benchmarks 2021 (arXiv:2010.09670).
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, nn

from guardbench.attacks.base import score_clean
from guardbench.attacks.reference import FormerAutoAttack, former_state
from guardbench.data.catalog import dataset_info
from guardbench.errors import GuardbenchError, brief
from guardbench.locks import locked
from guardbench.protocol import unknown
from guardbench.records import ClassifierRecord, Engine, Outcome
from guardbench.threat import ThreatModel

NORMS = {"linf": "Linf", "l2": "L2"}
DATASETS = ("cifar10", "cifar100", "imagenet")
SEVERITIES = 5


def robustbench() -> ModuleType:
    """The package robustbench, imported.

    As it stands on the index, 1.1.1 imports `autoattack`, which is not there (`pyautoattack` is, with
    another signature), and `pkg_resources`, which newer setuptools lacks. While it is imported, stand-ins
    of these two answer where the originals are absent.

    Raises:
        GuardbenchError: it is not installed, or still cannot be imported.
    """
    with _stand_ins(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module("robustbench")
        except ImportError as error:
            raise GuardbenchError(
                f"robustbench cannot be imported ({brief(error)}): pip install 'robustbench>=1.1.1'."
            ) from error


@contextmanager
def _stand_ins() -> Iterator[None]:
    auto, state, resources = (
        ModuleType(name) for name in ("autoattack", "autoattack.state", "pkg_resources")
    )
    auto.AutoAttack = FormerAutoAttack  # type: ignore[attr-defined]
    state.EvaluationState = former_state()  # type: ignore[attr-defined]

    def resource_filename(package: str, name: str) -> str:
        return str(Path(str(sys.modules[package].__file__)).parent / name)

    resources.resource_filename = resource_filename  # type: ignore[attr-defined]
    added = {
        module.__name__: module
        for module in (auto, state, resources)
        if find_spec(module.__name__.partition(".")[0]) is None
    }
    sys.modules.update(added)
    try:
        yield
    finally:
        for name in added:
            sys.modules.pop(name, None)


def zoo_model(name: str, dataset: str, norm: str, folder: Path) -> tuple[nn.Module, Path]:
    """A model of RobustBench's zoo, with its weights: those in `folder`, else downloaded there.

    Args:
        name: as the zoo has it, such as `Wong2020Fast`.
        dataset: `cifar10`, `cifar100` or `imagenet`.
        norm: `linf` or `l2`.
        folder: weights lie in `<dataset>/<Linf|L2>/<name>.pt` below it, as robustbench keeps them;
            those of a model that it takes from timm lie in torch's own cache.

    Returns:
        The model in eval mode, and where its weights lie: no file for a model of several files or timm's.

    Raises:
        GuardbenchError: the zoo has no such model, or its weights cannot be had or read.
    """
    package = robustbench()
    models = _zoo(dataset, norm)
    if not models:
        known = [f"{d} in {n}" for d in DATASETS for n in NORMS if _zoo(d, n)]
        raise GuardbenchError(
            f"--arch robustbench:{name}: RobustBench has models for {', '.join(known)}, not for {dataset} "
            f"in {norm}."
        )
    threat = package.model_zoo.enums.ThreatModel(NORMS[norm])
    if name not in models:
        raise unknown("model of RobustBench", name, list(models))
    path = folder / dataset / NORMS[norm] / f"{name}.pt"
    try:
        # One process downloads what the others then find.
        with locked(path.with_suffix(".lock"), _say), contextlib.redirect_stdout(sys.stderr):
            found: nn.Module = package.load_model(
                name, model_dir=folder, dataset=dataset, threat_model=threat
            )
    # Broad on purpose: a download and a stranger's file fail in many ways, and all mean the same here.
    except Exception as error:
        raise GuardbenchError(
            f"--arch robustbench:{name}: its weights could not be had ({type(error).__name__}: "
            f"{brief(error)}); put the file of RobustBench's zoo at {path}, or delete a broken one there."
        ) from error
    return found, path


def _zoo(dataset: str, norm: str) -> dict[str, Any]:
    """Every model of the zoo by name, with how it is made; none where the zoo has no such part."""
    if dataset not in DATASETS or norm not in NORMS:
        return {}
    package = robustbench()
    parts = package.utils.all_models[package.model_zoo.enums.BenchmarkDataset(dataset)]
    return dict(parts.get(package.model_zoo.enums.ThreatModel(NORMS[norm]), {}))


def unlike_table(name: str, dataset: str, norm: str) -> str | None:
    """Why a zoo model's numbers here are not those of RobustBench's table, in a line; None where they are.

    On ImageNet it prepares images by model (`robustbench.data.get_preprocessing`: most are resized to 256
    before the crop, some bicubically, one is 288 px), where the images here are the protocol's.
    """
    if dataset != "imagenet":
        return None
    theirs = _zoo(dataset, norm)[name].get("preprocessing", "timm's preprocessing")
    return f"images resized and cropped by the protocol, where RobustBench's table has {theirs}"


def _say(holder: str) -> None:
    print(f"RobustBench's weights are being read by {holder}; waiting", file=sys.stderr)


def require_robustbench(norm: str) -> ModuleType:
    """The package, where it measures this norm; see `robustbench`."""
    if norm not in NORMS:
        raise GuardbenchError(f"RobustBench measures linf and l2, not {norm}.")
    return robustbench()


def benchmark(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    batch_size: int = 128,
) -> tuple[float, float]:
    """`robustbench.eval.benchmark` of a model on given images: clean and AutoAttack accuracy, 0 to 1.

    Args:
        model: in eval mode; [N, C, H, W] in [0, 1] to logits.
        x, y: the images and labels, in place of those that robustbench would load.
        threat: l-inf or l2.

    Raises:
        GuardbenchError: another norm, images outside [0, 1], or a model that answers NaN, which robustbench
            would count as right under label 0.
    """
    evaluation = require_robustbench(threat.norm).eval
    score_clean(model, x, y, batch_size=batch_size)
    original = evaluation.load_clean_dataset
    # The data set chooses the loader and the preprocessing alone, and both are given.
    evaluation.load_clean_dataset = lambda *_: (x, y)
    try:
        clean, robust = evaluation.benchmark(
            model,
            n_examples=len(x),
            dataset="cifar10",
            threat_model=NORMS[threat.norm],
            eps=float(threat.eps),
            device=next(model.parameters(), x).device,
            batch_size=batch_size,
            preprocessing=lambda image: image,
        )
    finally:
        evaluation.load_clean_dataset = original
    return float(clean), float(robust)


def corruptions(
    model: nn.Module,
    folder: Path,
    *,
    resolution: int,
    classes: int,
    count: int = 10_000,
    told: Callable[[str], None] = lambda _: None,
) -> dict[str, tuple[float, ...]]:
    """RobustBench's corruption protocol on a folder laid out as CIFAR-10-C.

    Args:
        model: in eval mode.
        resolution, classes: side of the images that the model is for, and how many classes it knows.
        folder: holds `labels.npy` [5 N] and `<corruption>.npy`, uint8 [5 N, H, W, 3], N images of
            severity 1, then N of severity 2, ... (Hendrycks & Dietterich, ICLR 2019, arXiv:1903.12261).
        count: the first images of each file and severity; all N where there are fewer.
        told: hears each corruption's name once it is measured.

    Returns:
        Corruption -> accuracy, 0 to 1, at severities 1 to 5. RobustBench's number is the mean of all.

    Raises:
        GuardbenchError: a file is missing or is not what it must be.
    """
    labels = _array(folder / "labels.npy", 1)
    if len(labels) and int(labels.max()) + 1 != classes:
        raise GuardbenchError(
            f"{folder / 'labels.npy'}: labels to {int(labels.max())}; the protocol's dataset has {classes} "
            "classes."
        )
    found = {}
    for name in robustbench().data.CORRUPTIONS:
        images = _array(folder / f"{name}.npy", 4)
        wanted = (len(labels), resolution, resolution, 3)
        if images.shape != wanted or not len(images) or len(images) % SEVERITIES:
            raise GuardbenchError(
                f"{folder / f'{name}.npy'}: {list(images.shape)}, expected {list(wanted)}, a fifth of them "
                "for each severity."
            )
        each = len(images) // SEVERITIES
        accuracies = []
        for first in range(0, len(images), each):
            rows = slice(first, first + min(count, each))
            x = torch.from_numpy(np.array(images[rows])).permute(0, 3, 1, 2).float() / 255
            y = torch.from_numpy(np.array(labels[rows])).long()
            accuracies.append(float(score_clean(model, x, y).float().mean()))
        found[name] = tuple(accuracies)
        told(name)
    return found


def _array(path: Path, axes: int) -> Any:
    """A memory-mapped array out of a stranger's file; no pickle."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise GuardbenchError(
            f"{path}: cannot be read ({brief(error)}); a folder of the corruption protocol is laid out as "
            "CIFAR-10-C of zenodo.org/records/2535967."
        ) from error
    if not isinstance(found, np.ndarray) or found.ndim != axes or found.dtype.kind not in "ui":
        raise GuardbenchError(f"{path}: must be an array of bytes with {axes} axes.")
    return found


_UNKNOWN = {"name": "", "authors": "", "link": "", "venue": "", "reported": ""}
"""Fields that RobustBench's readers ask for, and only the authors know."""

_ENGINES: dict[Engine, str] = {"guardbench": "guardbench's loops", "reference": "pyautoattack"}


def model_info(record: ClassifierRecord, attack: str, eps: str, **more: object) -> dict[str, Any]:
    """A record as RobustBench's model-info JSON.

    Args:
        attack: the record's column with AutoAttack standard.
        eps: in the protocol's own words, such as `8/255`.
        more: fields that only the authors know: `name` (of the paper), `authors`, `link`, `venue`,
            `additional_data`, `reported`; None where they do not say.

    Returns:
        What RobustBench's readers ask for, `""` (`additional_data`: None) where it is not known; accuracies
        in percent with two decimals, as text, on the images that AutoAttack saw. `footnote` says how many,
        where the test set has more, whose loops ran AutoAttack, and the checks that doubt the number.
    """
    (seed,) = record.seeds
    if attack not in seed.attacks:
        raise GuardbenchError(f"{record.classifier.name}: the record has no column {attack}.")
    robust = seed.attacks[attack]
    start = robust.first - seed.clean.first
    clean = Outcome.from_flags(seed.clean.flags()[start : start + robust.total])
    whole = dataset_info(record.dataset).val_count
    notes = [] if robust.total == whole else [f"On {robust.total} of {whole} test images."]
    by = record.provenance.engines.get(attack)
    notes += [f"AutoAttack by {_ENGINES[by]}."] if by else []
    if record.flags:
        notes.append(f"Flagged: {'; '.join(record.flags)}.")
    info = robustbench().utils.ModelInfo(
        dataset=record.dataset,
        architecture=record.classifier.arch,
        number_forward_passes=1,
        eps=eps,
        clean_acc=f"{100 * clean.correct / clean.total:.2f}",
        autoattack_acc=f"{100 * robust.correct / robust.total:.2f}",
        footnote=" ".join(notes) or None,
        **{**_UNKNOWN, **{key: value for key, value in more.items() if value is not None}},
    )
    # Readers look into `additional_data` without asking whether it is there.
    return {k: v for k, v in vars(info).items() if v is not None or k == "additional_data"}
