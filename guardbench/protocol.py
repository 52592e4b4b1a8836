"""What is measured: dataset, resolution, students, threat model, attacks, test images.

Two numbers are comparable only when the digests of their protocols are the same. A protocol is one
TOML file; a published one never changes, a new version supersedes it.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    field_validator,
    model_validator,
)

from guardbench import canonical
from guardbench.errors import GuardbenchError
from guardbench.fields import Name, Strict
from guardbench.records import RESERVED
from guardbench.threat import Norm, ThreatModel
from guardbench.toml_files import checked, read_toml


def _share(scale: tuple[float, float]) -> tuple[float, float]:
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"must be [smallest, largest] share of the area in (0, 1], not {scale}")
    return scale


CropScale = Annotated[tuple[float, float], AfterValidator(_share)]


class Threat(Strict):
    """The `[threat]` table: a norm and a radius in [0, 1] pixel units, as a fraction."""

    norm: Norm
    eps: str = Field(pattern=r"^\d+(\.\d+)?(/\d+)?$")

    @field_validator("eps", mode="before")
    @classmethod
    def _quoted(cls, eps: object) -> object:
        if isinstance(eps, int | float):
            raise ValueError(f'write it as a fraction in quotes, such as "8/255", not {eps}')
        return eps

    @field_validator("eps")
    @classmethod
    def _positive(cls, eps: str) -> str:
        if parse_fraction(eps) <= 0:
            raise ValueError(f"must be a positive fraction such as 1/255, not {eps}")
        return eps

    @model_validator(mode="after")
    def _in_pixels(self) -> Threat:
        if self.norm == "linf" and parse_fraction(self.eps) > 1:
            meant = "" if "/" in self.eps else f"; did you mean {self.eps}/255?"
            raise ValueError(
                f"eps: {self.eps} is more than the whole range of a pixel, [0, 1]{meant}"
            )
        return self

    @property
    def model(self) -> ThreatModel:
        """The threat model with an exact radius."""
        return ThreatModel(self.norm, parse_fraction(self.eps))


LARGEST_RATE = 1e30
"""Of learning rates and weight decays; not far beyond, they are no float32 any more."""


class Student(Strict):
    """The `[student]` table: who is trained on the distilled set, and how (SRe2L, section 3.3).

    Attributes:
        arch: name of an architecture of `guardbench.models`.
        seeds: one student is trained and attacked for each.
        epochs: passes over the distilled set, each with fresh views.
        batch_size: images a step; the whole set when it is smaller.
        lr, weight_decay: of the optimizer.
        optimizer: `adamw`, or `sgd` with `momentum`.
        schedule: of the learning rate: `cosine` to 0, or `half`: a tenth from half time on.
        temperature: of the KL divergence to soft targets.
        crop_scale: smallest and largest share of the area that a view keeps.
        flip: views are mirrored with probability 1/2 (off where mirroring changes the class).
        cutmix: alpha of CutMix's Beta distribution; 0 turns it off.
        label_top_k: how many of a teacher's logits on a view a student is given, the others sharing
            what probability is left equally (FKD, Shen & Xing, ECCV 2022); all when absent.
    """

    arch: Name
    seeds: tuple[Annotated[int, Field(ge=0, lt=1 << 63)], ...] = Field(
        min_length=1, max_length=1024
    )
    epochs: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    lr: float = Field(gt=0, le=LARGEST_RATE)
    weight_decay: float = Field(ge=0, le=LARGEST_RATE)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: float = Field(default=0.9, ge=0, lt=1)
    schedule: Literal["cosine", "half"] = "cosine"
    temperature: float = Field(gt=0)
    crop_scale: CropScale
    flip: bool
    cutmix: float = Field(ge=0)
    label_top_k: int | None = Field(default=None, gt=0)

    def words(self) -> dict[str, Any]:
        """What shapes a student, for digests; a field younger than a protocol counts only if set."""
        words = self.model_dump(mode="json")
        for name in ("optimizer", "momentum", "schedule", "label_top_k"):
            if words[name] == type(self).model_fields[name].default:
                del words[name]
        return words

    def lr_at(self, epoch: int) -> float:
        """The learning rate of an epoch, counted from 0."""
        if self.schedule == "half":
            return self.lr * (0.1 if epoch >= self.epochs // 2 else 1)
        return self.lr * 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))


class TestImages(Strict):
    """The `[test]` table: which validation images are measured.

    The list is ordered by SHA-256 of `<protocol id>/<image id>`, so every prefix is a fair sample
    that no folder order can bend. `sha256` is the digest of the chosen ids in that order.
    """

    __test__ = False  # not a test class, whatever its name tells pytest

    count: int = Field(gt=0)
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")


class AttackSpec(Strict):
    """One `[[attacks]]` table: a column of the board.

    Attributes:
        name: the column.
        kind: the attack's name in the registry.
        images_per_seed: measure seed k on its own slice of this many images, disjoint between
            seeds; all the protocol's images when absent.
        params: the attack's hyperparameters.
    """

    name: Name
    kind: Name
    images_per_seed: int | None = Field(default=None, gt=0)
    params: dict[str, str | int | float | bool] = Field(default_factory=dict)

    @property
    def is_standard(self) -> bool:
        """Whether it is AutoAttack standard, whole."""
        version, square = self.params.get("version", "standard"), self.params.get("square", True)
        return self.kind == "autoattack" and version == "standard" and square is True


class Protocol(Strict):
    """A protocol file."""

    id: Name
    title: str = Field(max_length=200)
    source: str = Field(max_length=400)
    superseded_by: Name | None = None
    dataset: Name
    resolution: int = Field(gt=0, le=1024)
    ipc: tuple[Annotated[int, Field(gt=0)], ...] = Field(min_length=1, max_length=1024)
    rank_by: Name | Literal["worst_case"]
    threat: Threat
    student: Student
    test: TestImages
    attacks: tuple[AttackSpec, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> Protocol:
        names = [attack.name for attack in self.attacks]
        if len(set(names)) < len(names):
            raise ValueError("attacks: two attacks have the same name")
        for name in RESERVED:
            if any(attack.name == name for attack in self.attacks):
                raise ValueError(
                    f"attacks: {name!r} is a column of its own; name that attack otherwise"
                )
        if self.rank_by != "worst_case" and self.rank_by not in names:
            raise ValueError(f"rank_by: no attack is called {self.rank_by!r}")
        if len(set(self.student.seeds)) < len(self.student.seeds):
            raise ValueError("student.seeds: a seed stands twice")
        if len(set(self.ipc)) < len(self.ipc):
            raise ValueError("ipc: a number stands twice")
        for attack in self.attacks:
            needed = (attack.images_per_seed or 0) * len(self.student.seeds)
            if needed > self.test.count:
                raise ValueError(
                    f"attacks.{attack.name}.images_per_seed: disjoint slices need {needed} test "
                    f"images, test.count is {self.test.count}"
                )
        return self

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what is measured; the title and what supersedes it do not count."""
        words = self.model_dump(mode="json", exclude={"title", "source", "superseded_by"})
        words["student"] = self.student.words()
        for attack in words["attacks"]:
            if "sha256" in attack["params"]:  # which says what the file holds, wherever it lies
                attack["params"].pop("weights", None)
        return canonical.digest(words)

    def check_ipc(self, ipc: int) -> None:
        """Raises a GuardbenchError that lists the standard settings when `ipc` is not one."""
        if ipc not in self.ipc:
            raise GuardbenchError(
                f"--ipc {ipc}: protocol {self.id} measures {_listed(self.ipc)} images per class."
            )

    def test_indices(self, ids: Sequence[str]) -> list[int]:
        """Positions in `ids` of the test images, in the protocol's order.

        Args:
            ids: the ids of all validation images.

        Raises:
            GuardbenchError: there are too few, or their list is not the one that the protocol names.
        """
        count = self.test.count
        if len(ids) < count:
            raise GuardbenchError(
                f"{self.dataset}: {len(ids)} validation images found, protocol {self.id} "
                f"measures {count}; get the complete validation set."
            )
        order = sorted(
            range(len(ids)),
            key=lambda i: hashlib.sha256(f"{self.id}/{ids[i]}".encode()).digest(),
        )[:count]
        found = list_digest(ids[i] for i in order)
        if self.test.sha256 is not None and found != self.test.sha256:
            raise GuardbenchError(
                f"{self.dataset}: the validation images are not those of protocol {self.id} "
                f"(list digest {found[:12]}, expected {self.test.sha256[:12]}); "
                "get the official split, with its file names; a protocol of your own has a list of its own: "
                f'write sha256 = "{found}" in its [test].'
            )
        return order

    def slice_of(self, attack: AttackSpec, position: int) -> tuple[int, int]:
        """First test image and number of images that `attack` measures for the seed at `position`."""
        if attack.images_per_seed is None:
            return 0, self.test.count
        return position * attack.images_per_seed, attack.images_per_seed


def list_digest(ids: Iterable[str]) -> str:
    """SHA-256 of image ids, one a line."""
    return hashlib.sha256("".join(f"{i}\n" for i in ids).encode()).hexdigest()


def parse_fraction(text: str) -> Fraction:
    """The exact value of `1/255`, `0.25/255`, `0.5` or `3`, of at most 40 characters.

    Raises:
        ValueError: `text` is no such number, or divides by zero.
    """
    # An exponent could ask for a number that takes the machine's memory to write down.
    number = r"\s*(\d+(?:\.\d*)?|\.\d+)\s*"
    found = re.fullmatch(f"{number}(?:/{number})?", text, re.ASCII) if len(text) <= 40 else None
    if found is None or (found[2] is not None and Fraction(found[2]) == 0):
        raise ValueError(f"{text[:60]!r} is not a fraction such as 1/255 or 0.25/255")
    return Fraction(found[1]) / Fraction(found[2] or 1)


def unknown(what: str, name: str, known: Iterable[str]) -> GuardbenchError:
    """The error for a name that is not in a list, with the nearest one."""
    known = sorted(known)
    plain = {each.lower(): each for each in known}
    near = difflib.get_close_matches(name.lower(), plain, n=1)
    hint = f" Did you mean {plain[near[0]]}?" if near else ""
    return GuardbenchError(f"unknown {what} {name!r}.{hint} Known: {', '.join(known)}.")


def _folder() -> Path:
    return Path(str(resources.files("guardbench") / "protocols"))


def protocol_ids() -> list[str]:
    """The ids of the protocols that come with guardbench, sorted."""
    return sorted(path.stem for path in _folder().glob("*.toml"))


def load_protocol(name: str) -> Protocol:
    """The protocol with that id, or the one in that `.toml` file.

    Raises:
        GuardbenchError: there is none (with the nearest id), or a field of the file is wrong.
    """
    if name.endswith(".toml"):
        path = Path(name)
    elif name in protocol_ids():
        path = _folder() / f"{name}.toml"
    else:
        raise unknown("protocol", name, protocol_ids())
    protocol = checked(Protocol, read_toml(path, what="protocol"), where=str(path))
    if path.stem != protocol.id:
        raise GuardbenchError(
            f"{path}: id: {protocol.id!r} is not the file's name: write id = {path.stem!r}, or rename the "
            f"file to {protocol.id}.toml."
        )
    return protocol


def _listed(values: Sequence[int]) -> str:
    return ", ".join(str(v) for v in values)
