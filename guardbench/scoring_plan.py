"""Which attacks a classifier meets under a protocol: on which images, in which stage, by whose loops."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass, fields
from typing import Any

from guardbench.attacks.autoattack import AutoAttack
from guardbench.attacks.base import Attack
from guardbench.attacks.build import build_attack
from guardbench.attacks.jitter import Jitter
from guardbench.attacks.mim import MIM
from guardbench.attacks.pgd import PGD
from guardbench.attacks.searched import Precision
from guardbench.attacks.spsa import SPSA
from guardbench.checks import (
    CHECKS_VERSION,
    COMPARED,
    IMAGES,
    QUERIES,
    RESTARTS,
    TARGETED,
    UNBOUNDED,
    compared,
)
from guardbench.devices import bf16_gains
from guardbench.distillers.base import PlannedStage
from guardbench.errors import GuardbenchError
from guardbench.protocol import AttackSpec, Protocol
from guardbench.provenance import ENGINE_VERSION
from guardbench.records import Engine
from guardbench.runtime import Run
from guardbench.tier import measured

REVISED = {"spsa": 2, "vmifgsm": 2, "transfer": 2}
"""Kinds of attack whose verdicts alone have changed since `ENGINE_VERSION` was raised."""
ENGINES = ("autoattack", "square")
"""The kinds of attack that `--engine` chooses between."""


@dataclass(frozen=True)
class ScoringPlan:
    """The stages of one classifier: its clean score, its attacks in the protocol's order.

    Attributes:
        seed: of the attacks' random choices.
        position: which slice of the test images it gets, where attacks get one each.
        engine: whose AutoAttack and Square run.
        sample: images of the dev tier, None for the official one.
        search: the precision that attacks search in, `fp32` or `bf16`, where the classifier allows it.
        checks: the stage that looks for signs of misleading robustness.
        targeted: the stage that attacks what black-box columns alone broke, for the `black-box` check; None
            where the protocol has no columns that it compares.
    """

    seed: int
    position: int
    engine: Engine
    sample: int | None
    search: Precision
    clean: PlannedStage
    checks: PlannedStage
    attacks: tuple[PlannedStage, ...]
    targeted: PlannedStage | None

    @property
    def stages(self) -> list[PlannedStage]:
        """In the order in which they run."""
        last = [] if self.targeted is None else [self.targeted]
        return [self.clean, self.checks, *self.attacks, *last]


def plan_scoring(
    run: Run,
    protocol: Protocol,
    *,
    seed: int,
    position: int,
    subject: str,
    test_digest: str | None,
    engine: Engine,
    sample: int | None = None,
) -> ScoringPlan:
    """Plans the attacks on one classifier; needs no images.

    Args:
        subject: digest of what makes the classifier, so that its stages hang on it.
        test_digest: of the decoded validation images; None while they have not been decoded.
        sample: images of the dev tier (`tier.sample_size`), None for the official one.
    """
    protocol = measured(protocol, sample)
    # Nothing of the dev tier, whose images are others, is taken for official or the other way round.
    tier = {} if sample is None else {"tier": "dev", "sample": sample}
    half = sample is not None and bf16_gains(run.device.type, protocol.resolution)
    search: Precision = "bf16" if half else "fp32"
    on = {**tier, "student": subject, "test": test_digest, "list": protocol.test.sha256,
          "protocol": protocol.id}  # fmt: skip
    words: dict[str, Any] = {"stage": "clean", **on, "images": protocol.test.count}
    clean = PlannedStage(
        run.stage(f"clean {seed}", "attacks", words),
        f"{protocol.test.count} images",
        protocol.test.count / 3,
        fp32=True,
    )
    compare = sorted(COMPARED.keys() - compared(protocol))
    words = {"stage": "checks", "version": CHECKS_VERSION, **on, "images": protocol.test.count,
             "compare": compare, "threat": protocol.threat.model_dump(), "seed": seed}  # fmt: skip
    checks = PlannedStage(
        run.stage(f"checks {seed}", "attacks", words),
        f"{IMAGES} images",
        IMAGES
        * ((UNBOUNDED.steps + 20 * RESTARTS / 3) * 2 / 3 + QUERIES / 6 * ("black-box" in compare)),
        fp32=True,
    )
    attacks = []
    for spec in protocol.attacks:
        attack = built(protocol, spec, engine)  # refuses a wrong one early
        first, count = protocol.slice_of(spec, position)
        words = {
            "stage": "attack",
            **on,
            "threat": protocol.threat.model_dump(),
            "attack": spec.model_dump(mode="json"),
            "first": first,
            "images": count,
            "seed": seed,
        }
        if sample is not None:
            words["search"] = search
        theirs = run_by(attack) == "reference"
        version = importlib.metadata.version("pyautoattack") if theirs else ENGINE_VERSION
        words["engine"] = f"{'pyautoattack' if theirs else 'guardbench'} {version}"
        if spec.kind in REVISED:
            words["revision"] = REVISED[spec.kind]
        before = taken_over(protocol, spec, engine)
        if before:
            words["after"] = [other.model_dump(mode="json") for other in before]
        folder = run.stage(f"{spec.name} {seed}", "attacks", words)
        passes = _passes(attack) - sum(_passes(built(protocol, each, engine)) for each in before)
        attacks.append(PlannedStage(folder, f"{count} images", count * passes, fp32=True))
    targeted = None
    if "black-box" in compared(protocol):
        passes = _passes(built(protocol, TARGETED, engine))
        words = {"stage": "checks black-box", "version": CHECKS_VERSION, **on, "seed": seed,
                 "columns": [stage.folder.key for stage in attacks], "search": search}  # fmt: skip
        targeted = PlannedStage(
            run.stage(f"checks black-box {seed}", "attacks", words),
            "a few images",
            protocol.test.count / 100 * passes,
            fp32=True,
        )
    columns = tuple(attacks)
    return ScoringPlan(seed, position, engine, sample, search, clean, checks, columns, targeted)


def built(protocol: Protocol, spec: AttackSpec, engine: Engine) -> Attack:
    """The attack of a column.

    Raises:
        GuardbenchError: its parameters are wrong, or its steps cannot reach the ball's edge or are wider.
    """
    if "engine" in spec.params:
        raise GuardbenchError(
            f"protocol {protocol.id}: attack {spec.name}: engine is no parameter of a protocol, "
            "since both engines measure the same; say --engine."
        )
    params = dict(spec.params)
    if spec.kind in ENGINES:
        params["engine"] = engine
    where = f"protocol {protocol.id}: attack {spec.name}"
    try:
        attack = build_attack(spec.kind, protocol.threat.model, params)
    except GuardbenchError as error:
        raise GuardbenchError(f"{where}: {error}") from error
    words, count, stride = _steps(attack)
    if count * stride < 1:
        raise GuardbenchError(
            f"{where}: {words} end inside the ball of {protocol.threat.model}, and an attack so short says "
            "little; raise its step or its steps."
        )
    if stride > 2:
        raise GuardbenchError(
            f"{where}: each of {words} is longer than the ball of {protocol.threat.model} is wide; lower its "
            'step (2 levels of 255 are written as "2/255").'
        )
    return attack


def _steps(attack: Attack) -> tuple[str, int, float]:
    """The steps of an attack in words, how many they are, and how many radii long each is at most.

    One of 1 radius where the steps are the attack's own to choose, or are not held to a ball.
    """
    if isinstance(attack, PGD | MIM):
        stride = float(attack.step / attack.threat.eps)
        return f"{attack.steps} steps of {attack.step}", attack.steps, stride
    if isinstance(attack, Jitter):
        return f"{attack.steps} steps of {attack.step} radii", attack.steps, attack.step
    if isinstance(attack, SPSA):  # a step of Adam is about lr long
        return f"{attack.steps} steps of {attack.lr} radii", attack.steps, attack.lr
    return "", 1, 1.0


def run_by(attack: Attack) -> Engine | None:
    """Whose loops run an attack that both engines have; None for the others."""
    found: Engine | None = getattr(attack, "run_by", None)
    return found


def engines_used(protocol: Protocol, engine: Engine) -> dict[str, Engine]:
    """Whose loops run each attack of a protocol that both engines have."""
    ran = {spec.name: run_by(built(protocol, spec, engine)) for spec in protocol.attacks}
    return {name: by for name, by in ran.items() if by is not None}


def _passes(attack: Attack) -> float:
    """Rough forward+backward passes a test image, for the expected time alone.

    A pass without gradients in the weights is about two thirds of one with them, a forward one
    third; about half of the images leave early because they are wrong or broken.
    """
    has: dict[str, Any] = {field.name: getattr(attack, field.name) for field in fields(attack)}  # type: ignore[arg-type]
    if "weights" in has:  # a surrogate's neighbours, by their default
        has["neighbours"] = 20
    searches = has.get("targets", 1) if has.get("loss", "dlr-targeted") == "dlr-targeted" else 1
    steps = has.get("steps", 1) * searches * has.get("restarts", 1)
    if "queries" in has:
        forward, backward = has["queries"], 0
    elif "samples" in has:
        forward, backward = 2 * has["samples"] * steps, 0
    elif "version" in has:  # APGD-CE 100, APGD-T 9 x 100, FAB-T 9 x 100 passes; Square's 5,000
        forward, backward = 1900 + 5000, 1900
    else:
        passes = steps * (has.get("neighbours", 0) + 1)
        forward, backward = passes, passes
    return float(forward + backward) / 3 / 2


def taken_over(protocol: Protocol, spec: AttackSpec, engine: Engine) -> tuple[AttackSpec, ...]:
    """The columns whose runs AutoAttack need not repeat; none under pyautoattack, untouched.

    AutoAttack counts an image as broken when any of its parts breaks it. Where an earlier column is
    one of these very attacks (APGD-CE, APGD-T, FAB-T, Square with 5,000 queries) on the same images,
    its verdicts are taken over, and its survivors alone meet the other parts. AutoAttack's seconds are
    then those of the others.
    """
    whole = built(protocol, spec, engine)
    if not isinstance(whole, AutoAttack) or whole.run_by == "reference":
        return ()
    return tuple(
        other
        for other in protocol.attacks[: protocol.attacks.index(spec)]
        if other.images_per_seed == spec.images_per_seed
        and built(protocol, other, engine) in whole.parts()
    )
