"""Which classifier: the options that verbs share, and the model that they name, ready to be attacked."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from guardbench import canonical
from guardbench.attacks.robustbench import unlike_table, zoo_model
from guardbench.attacks.stream import Fitting
from guardbench.data.catalog import dataset_info
from guardbench.data.files import cache_root
from guardbench.devices import official_arithmetic
from guardbench.errors import GuardbenchError, brief
from guardbench.imported import Imported, describe, from_file, from_python, state_digest
from guardbench.protocol import Protocol
from guardbench.runtime import seeded

PROBED = 64
"""Images of the batch that a classifier is asked about first."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Which classifier: the options that verbs share. See `from_file`, `from_python`, `from_zoo`."""

    weights: Path | None
    arch: str | None
    python: str | None
    normalisation: str | None
    name: str | None = None

    @property
    def zoo(self) -> str | None:
        """The model of RobustBench's zoo that the architecture names."""
        kind, _, name = (self.arch or "").partition(":")
        return name if kind == "robustbench" else None

    def require_one(self) -> None:
        """Refuses none, two, or options that do not belong together."""
        if [self.weights, self.python, self.zoo].count(None) != 2:
            raise GuardbenchError(
                "say which classifier: --weights FILE with --arch NAME, or --python, or --arch "
                "robustbench:MODEL alone."
            )
        if self.python is not None and (self.arch or self.normalisation):
            raise GuardbenchError(
                "--python: the function's model has its own --arch and --normalisation."
            )
        if self.zoo is not None and self.normalisation:
            raise GuardbenchError(f"--arch {self.arch}: the model has its own --normalisation.")
        if self.weights is not None and self.arch is None:
            raise GuardbenchError(f"--weights {self.weights}: say its --arch, such as resnet18.")


def open_classifier(
    source: Source, protocol: Protocol, device: torch.device, cache_dir: Path | None
) -> Imported:
    """The classifier on `device`, asked a little, so that one that cannot take the images is told early.

    Args:
        cache_dir: see `files.cache_root`; models of RobustBench's zoo are kept below it.

    Raises:
        GuardbenchError: it cannot be had, or does not answer the protocol's images with logits.
    """
    source.require_one()
    info = dataset_info(protocol.dataset)
    if source.weights is not None:
        assert source.arch is not None
        imported = from_file(
            source.weights,
            source.arch,
            channels=info.channels,
            classes=info.num_classes,
            resolution=protocol.resolution,
            normalisation=source.normalisation,
            name=_name(source.name or source.weights.stem),
        )
    elif source.zoo is not None:
        imported = from_zoo(
            source.zoo,
            dataset=protocol.dataset,
            norm=protocol.threat.norm,
            folder=cache_root(cache_dir) / "robustbench",
            name=_name(source.name or source.zoo),
        )
    else:
        assert source.python is not None
        imported = from_python(source.python, name=_name(source.name or source.python))
    imported.model.to(device)
    shape = (PROBED, info.channels, protocol.resolution, protocol.resolution)
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device)
    # One image, as when a single one is left, and a batch.
    for count in (1, PROBED):
        _probe(imported, noise[:count], info.num_classes)
    official_arithmetic()  # a stranger's module may have chosen another as it was imported
    return imported


def _probe(imported: Imported, images: Tensor, classes: int) -> None:
    def ask(some: Tensor) -> tuple[Tensor]:
        given = some.clone()
        with torch.no_grad():
            shapes.append((len(some), list(imported.model(given).shape)))
        written.append(not torch.equal(given, some))
        if len(some) == 1:
            point = some.clone().requires_grad_()
            answers = imported.model(point)
            written.append(not torch.equal(point, some))
            if answers.requires_grad:  # those that have no gradient are flagged by the checks
                torch.autograd.grad(answers.sum(), point, allow_unused=True)
        return (some,)

    shapes: list[tuple[int, list[int]]] = []
    written: list[bool] = []
    try:
        Fitting()(ask, images)
    # Broad on purpose: this is a stranger's model, and any error of it is theirs to hear of.
    except Exception as error:
        raise GuardbenchError(
            f"{imported.described.arch}: cannot answer images {list(images.shape)} of this protocol: "
            f"{type(error).__name__}: {brief(error)}."
        ) from error
    if any(written):
        # An attack's own images would be moved, as by a defence that rounds them, and look robust.
        raise GuardbenchError(
            f"{imported.described.arch}: writes into the images that it is given; begin its forward with a "
            "copy (x = x.clone())."
        )
    for count, shape in shapes:
        if shape != [count, classes]:
            raise GuardbenchError(
                f"{imported.described.arch}: must answer logits {[count, classes]} for {count} "
                f"images of {classes} classes, not {shape}."
            )


def fingerprint(imported: Imported, x: Tensor, y: Tensor, device: torch.device) -> str:
    """What the stages hang on: everything by which one model can be told from another.

    Weights, and for a few images beside the test images (which are multiples of 1/255, where a
    quantising defence answers as its network does) the answers and their gradient. For a function,
    the text of its module too; what that module imports is not looked at.

    Args:
        imported: the classifier, on `device`.
        x, y: the first test images [n, C, H, W] in [0, 1] and their labels [n].
    """
    model, described = imported.model, imported.described
    sha = hashlib.sha256(state_digest(model).encode())
    noise = torch.empty(x.shape).uniform_(-0.02, 0.02, generator=torch.Generator().manual_seed(0))
    point = (x + noise).clamp(0, 1).to(device).requires_grad_()
    with seeded(0):
        answers = model(point)
    sha.update(answers.detach().float().cpu().numpy().tobytes())
    if answers.requires_grad:
        loss = F.cross_entropy(answers.float(), y.to(device), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, point, allow_unused=True)
        if gradient is not None:
            sha.update(gradient.float().cpu().numpy().tobytes())
    words = described.model_dump(mode="json", exclude={"name"})
    return canonical.digest(
        {"classifier": words, "sha256": sha.hexdigest(), "source": imported.source}
    )


def _name(text: str) -> str:
    """`text` as a record's name: lower case, other letters as dashes."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "._+-") else "-" for c in text.lower())
    return kept.lstrip("._+-")[:64] or "classifier"


def from_zoo(model_name: str, *, dataset: str, norm: str, folder: Path, name: str) -> Imported:
    """Takes a model out of RobustBench's zoo; see `attacks.robustbench.zoo_model`."""
    model, path = zoo_model(model_name, dataset, norm, folder)
    return describe(
        model,
        name=name,
        arch=f"robustbench:{model_name}",
        sha=canonical.file_digest(path) if path.is_file() else None,
        weights=f"RobustBench's zoo, {dataset} {norm}",
        said="; ".join(filter(None, ["the model's own", unlike_table(model_name, dataset, norm)])),
    )
