"""Records: what a method or a classifier scored under one protocol, image by image, and its cost.

A record holds counts and one bit an image, never a rounded percentage, so that every number on a
board can be derived again. It is checked on the way in and on the way out: a record that
contradicts itself, or that is right under an attack where it is wrong without, does not exist.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from guardbench import canonical
from guardbench.fields import Bytes, Line, Name, Sha256, Strict, only_const, printable

SCHEMA_VERSION: Literal[5] = 5
RESERVED = ("clean", "worst_case")

LabelKind = Literal["hard", "soft", "teacher"]
Engine = Literal["guardbench", "reference"]
"""Whose loops run AutoAttack and Square: this package's, or pyautoattack's untouched."""
ENGINE = "guardbench-engine"
"""The name under which a record's versions hold that of this package's attacks; older records have none."""
Reference = Literal["random", "hard", "plain", "random-plain"]
"""What a student is compared with (DD-Ranking, arXiv:2505.13300): one trained on a random subset of the
same size in the same way, on the same images with hard labels, without augmentation, and on the random
subset without augmentation."""
Tier = Literal["official", "dev"]
"""Whether a number may stand on a board, or is of work in progress (`guardbench.tier`)."""


class Outcome(Strict):
    """One seed, one measurement (clean or one attack), image by image.

    Attributes:
        first: offset of its images in the protocol's test list.
        total: images measured, from 1 on; they are `first .. first + total - 1` of the list.
        correct: how many are still classified rightly.
        bits: hex, most significant bit first; bit i says that image `first + i` is still right;
            padded with zeros to whole bytes.
        bounded: the perturbation is held inside the protocol's threat model (CW in l2 is not).
        max_distance: the largest perturbation used, in the threat's norm (l2 when not bounded),
            in [0, 1] pixel units; 0.0 for clean.
    """

    first: int = Field(ge=0, le=10_000_000)
    total: int = Field(ge=1, le=10_000_000)
    correct: int = Field(ge=0)
    bits: str = Field(pattern=r"^[0-9a-f]+$")
    bounded: bool = True
    max_distance: float = Field(default=0.0, ge=0.0)

    @classmethod
    def from_flags(
        cls,
        flags: Sequence[bool],
        *,
        first: int = 0,
        bounded: bool = True,
        max_distance: float = 0.0,
    ) -> Outcome:
        """The outcome in which image `first + i` is right when `flags[i]` is true."""
        text = "".join("1" if flag else "0" for flag in flags)
        padded = text + "0" * (-len(text) % 8)
        return cls(
            first=first,
            total=len(text),
            correct=text.count("1"),
            bits=f"{int(padded or '0', 2):0{len(padded) // 4}x}",
            bounded=bounded,
            max_distance=max_distance,
        )

    def flags(self) -> list[bool]:
        """Whether each of the `total` images is still right, in the order of the test list."""
        text = f"{int(self.bits, 16):0{4 * len(self.bits)}b}"
        return [bit == "1" for bit in text[: self.total]]

    @property
    def end(self) -> int:
        """The offset behind the last image."""
        return self.first + self.total

    @model_validator(mode="after")
    def _consistent(self) -> Outcome:
        if self.correct > self.total:
            raise ValueError(f"correct: {self.correct} of only {self.total} images")
        digits = 2 * ((self.total + 7) // 8)
        if len(self.bits) != digits:
            raise ValueError(
                f"bits: {len(self.bits)} hex digits, {self.total} images need {digits}"
            )
        value = int(self.bits, 16)
        if value & ((1 << (4 * digits - self.total)) - 1):
            raise ValueError("bits: the padding behind the last image is not zero")
        if value.bit_count() != self.correct:
            raise ValueError(f"correct: {self.correct}, but {value.bit_count()} bits are set")
        return self


class Check(Strict):
    """One sign of misleading robustness, measured.

    Attributes:
        value: what was found, a share of the images.
        limit: beyond which it is flagged.
        images: how many were looked at.
    """

    value: float = Field(ge=-1.0, le=1.0)
    limit: float = Field(ge=0.0, le=1.0)
    images: int = Field(ge=1, le=10_000_000)

    @property
    def flagged(self) -> bool:
        """Whether the value is beyond its limit."""
        return self.value > self.limit


class SeedRun(Strict):
    """One classifier: its seed, and what it got right, clean and under each attack.

    Attributes:
        seed: of a student's training and of the attacks on it.
        clean: without an attack.
        attacks: the attack's name in the protocol -> outcome, on images that `clean` covers.
        checks: the check's name -> what it found (`guardbench.checks`); empty where none was made.
        references: students of the same seed to compare it with, clean, on the images of `clean`;
            empty where none was trained.
    """

    seed: int = Field(ge=0, lt=1 << 63)
    clean: Outcome
    attacks: dict[str, Outcome] = Field(min_length=1, max_length=64)
    checks: dict[str, Check] = Field(default_factory=dict, max_length=64)
    references: dict[Reference, Outcome] = Field(default_factory=dict)

    @field_validator("attacks", "checks")
    @classmethod
    def _names(cls, words: dict[str, Any]) -> dict[str, Any]:
        for name in words:
            _check_name(name, r"[a-z0-9][a-z0-9._+-]{0,63}", "lower-case letters, digits")
            if name in RESERVED:
                raise ValueError(f"{name}: this name is reserved")
        return words

    @model_validator(mode="after")
    def _attacks_within_clean(self) -> SeedRun:
        clean = self.clean
        if clean.max_distance != 0:
            raise ValueError("clean.max_distance: must be 0, nothing was perturbed")
        for way, other in self.references.items():
            if (other.first, other.total, other.max_distance) != (clean.first, clean.total, 0):
                raise ValueError(f"references.{way}: must be clean, on the images of clean")
        right = clean.flags()
        for name, outcome in self.attacks.items():
            if outcome.first < clean.first or outcome.end > clean.end:
                raise ValueError(
                    f"attacks.{name}: images {outcome.first} to {outcome.end - 1} are not all "
                    f"among the clean ones, {clean.first} to {clean.end - 1}"
                )
            under = right[outcome.first - clean.first : outcome.end - clean.first]
            for i, (robust, plain) in enumerate(zip(outcome.flags(), under, strict=True)):
                if robust and not plain:
                    raise ValueError(
                        f"attacks.{name}: robust exceeds clean: image {outcome.first + i} is right "
                        "under the attack and wrong without it; an attack keeps the clean image "
                        "when that is wrong already"
                    )
        return self


class StageCost(Strict):
    """What one stage took.

    Attributes:
        stage: `squeeze`, `recover`, `relabel`, `student 1`, `pgd-100 1`, ...
        seconds: wall-clock time.
        peak_memory_bytes: the largest memory in use on `device` during the stage.
        device: such as `cpu (2 threads)`, `NVIDIA H100`, or `NVIDIA H100, beside other processes`, whose
            seconds are upper bounds.
        shared: the artifact was made by an earlier run, whose seconds these are.
        after: the columns whose verdicts the attack took over, so that their stages' seconds are part of
            what it took.
    """

    stage: Line
    seconds: float = Field(ge=0.0)
    peak_memory_bytes: Bytes
    device: Line
    shared: bool = False
    after: tuple[Name, ...] = Field(default=(), max_length=64)


class Artifact(Strict):
    """The distilled dataset that was measured.

    Attributes:
        sha256: digest of the artifact.
        label_kind: the track: `hard`, `soft`, or `teacher` (labels made on the fly by a network).
        image_bytes: size of the images.
        label_bytes: size of everything else the student is given: labels, soft labels, teacher.
        images: how many, over all classes.
    """

    sha256: Sha256
    label_kind: LabelKind
    image_bytes: Bytes
    label_bytes: Bytes
    images: int = Field(ge=1)


class Method(Strict):
    """Who made the artifact.

    Attributes:
        name: the folder under `baselines/` or `submissions/`.
        title: as people write it.
        distiller: name in the registry of distillers.
        regulariser: name of the regulariser, `none` without one.
        recipe_sha256: digest of the settings in force.
        official: the settings are the committed recipe's, none overridden.
    """

    name: Name
    title: Line
    distiller: Name
    regulariser: Name
    recipe_sha256: Sha256
    official: bool


class TestSet(Strict):
    """The images measured.

    Attributes:
        data_sha256: digest of the decoded images.
        list_sha256: digest of the protocol's list of image ids.
        total: length of that list.
    """

    __test__ = False  # not a test class, whatever its name tells pytest

    data_sha256: Sha256
    list_sha256: Sha256
    total: int = Field(ge=1, le=10_000_000)


class Provenance(Strict):
    """Where the numbers come from.

    Attributes:
        guardbench: its version.
        commit: of the checkout when the process began that made the stages, each once where there are
            several; None outside a checkout.
        versions: package -> version.
        python: its version.
        platform: operating system and processor.
        device: where it ran.
        precision: stage -> effective precision, such as `{"squeeze": "bf16", "attacks": "fp32"}`. Of a dev
            record, `search` is what attacks searched in; `attacks` is what judged their images.
        threads: CPU threads used.
        engines: attack -> whose loops ran it, for attacks that both this package and pyautoattack
            (`reference`) have.
    """

    guardbench: Line
    commit: Line | None
    versions: dict[str, Line] = Field(max_length=256)
    python: Line
    platform: Line
    device: Line
    precision: dict[str, Line] = Field(max_length=256)
    threads: int = Field(ge=1)
    engines: dict[str, Engine] = Field(max_length=64)

    @field_validator("versions", "precision", "engines")
    @classmethod
    def _names(cls, words: dict[str, Any]) -> dict[str, Any]:
        for name in words:
            _check_name(name, r"[A-Za-z0-9][A-Za-z0-9._+ -]{0,63}", "letters, digits, spaces")
        return words


class Classifier(Strict):
    """The classifier that was measured, where no distilled dataset is asked about.

    Attributes:
        name: what its owner calls it.
        arch: the architecture, or the function that made it.
        weights_sha256: of the file; where a function made the model, of its parameters and buffers;
            None for a model of several files.
        weights: how the file was read: prefixes and wrappers taken off.
        normalisation: between pixels in [0, 1] and the network.
        parameters: how many.
    """

    name: Name
    arch: Line
    weights_sha256: Sha256 | None
    weights: Line
    normalisation: Line
    parameters: int = Field(ge=0)


class _Measured(Strict):
    """What every record holds: which protocol, on which images, with what outcome.

    Attributes:
        schema_version: of this file format.
        tier: `dev` is unofficial, and on a subset of the protocol's images.
        protocol: id of the protocol; `protocol_sha256` says which content of it.
        dataset, resolution: of the images, in pixels a side.
        test: which images.
        seeds: one classifier each, at least one, in the protocol's order.
        cost: one entry a stage, in the order they ran.
        provenance: versions and hardware.
        flags: warnings that stand beside the row, such as signs of gradient masking.
    """

    schema_version: Literal[5] = Field(default=SCHEMA_VERSION, json_schema_extra=only_const)
    tier: Tier
    protocol: Name
    protocol_sha256: Sha256
    dataset: Name
    resolution: int = Field(ge=1, le=1024)
    test: TestSet
    seeds: tuple[SeedRun, ...] = Field(min_length=1, max_length=1024)
    cost: tuple[StageCost, ...] = Field(max_length=65536)
    provenance: Provenance
    flags: tuple[Line, ...] = Field(default=(), max_length=64)

    @model_validator(mode="after")
    def _consistent(self) -> _Measured:
        numbers = [run.seed for run in self.seeds]
        if len(set(numbers)) < len(numbers):
            raise ValueError("seeds: a seed stands twice")
        expected = {name: outcome.bounded for name, outcome in self.seeds[0].attacks.items()}
        for run in self.seeds:
            if run.attacks.keys() != expected.keys():
                raise ValueError(
                    f"seeds: seed {run.seed} and seed {numbers[0]} were not attacked by the same "
                    f"attacks ({', '.join(sorted(run.attacks.keys() ^ expected.keys()))})"
                )
            if {name: outcome.bounded for name, outcome in run.attacks.items()} != expected:
                raise ValueError("seeds: an attack is bounded for one seed and not for another")
            if run.references.keys() != self.seeds[0].references.keys():
                raise ValueError("seeds: one has references that another lacks")
            if run.clean.end > self.test.total:
                raise ValueError(
                    f"seeds: seed {run.seed} measures image {run.clean.end - 1} of a list of "
                    f"{self.test.total}"
                )
        if len(set(self.flags)) < len(self.flags):
            raise ValueError("flags: a flag stands twice")
        return self

    @cached_property
    def result_sha256(self) -> str:
        """Digest of the result: a resumed run has that of an unbroken one, in any schema version.

        It leaves out cost, provenance, checks and the version of the file format.
        """
        words = self.model_dump(mode="json", exclude={"cost", "provenance", "schema_version"})
        for run in words["seeds"]:
            del run["checks"]
            if not run["references"]:  # of version 4; a result keeps its digest
                del run["references"]
        if not words.get("overrides"):  # of version 3; a result keeps its digest
            words.pop("overrides", None)
        if self.tier == "official":  # which all were before there were tiers
            del words["tier"]
        return canonical.digest(words)

    @property
    def attack_names(self) -> tuple[str, ...]:
        """The attacks measured, in alphabetical order."""
        return tuple(sorted(self.seeds[0].attacks))


class ResultRecord(_Measured):
    """One method under one protocol at one number of images per class: all that a board row needs.

    Attributes:
        ipc: images per class of the distilled dataset.
        method, artifact: who, and what.
        overrides: what differs from the committed recipe on the whole training set: what `--set` changed,
            such as `squeeze.epochs=5`, and `train=120 of 9469 images`.
    """

    ipc: int = Field(ge=1, le=1_000_000)
    method: Method
    artifact: Artifact
    overrides: tuple[Line, ...] = Field(max_length=64)

    @model_validator(mode="after")
    def _says_what_was_set(self) -> ResultRecord:
        if self.overrides and self.method.official:
            raise ValueError("overrides: settings were changed, and method.official is true")
        return self


class ClassifierRecord(_Measured):
    """One classifier under one protocol, whatever it was trained on; never on a board."""

    seeds: tuple[SeedRun, ...] = Field(min_length=1, max_length=1)
    classifier: Classifier


AnyRecord = ResultRecord | ClassifierRecord


def _check_name(name: str, pattern: str, letters: str) -> None:
    if not re.fullmatch(pattern, name):
        raise ValueError(f"{printable(name, 64)}: a name is made of {letters} and `._+-`")
