"""Signs that a robust accuracy should not be believed: gradients that mislead, answers that are random.

After Athalye et al., "Obfuscated gradients give a false sense of security", ICML 2018
(arXiv:1802.00420, section 3.1), Carlini et al., "On evaluating adversarial robustness" (arXiv:1902.06705),
and the warnings of AutoAttack's authors. A check measures one number on a few images that the
classifier gets right, and flags it beyond a limit; a flag is a reason to look, not a verdict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from guardbench.attacks.base import Attack, frozen, rounding
from guardbench.attacks.fab import FAB
from guardbench.attacks.fgsm import FGSM
from guardbench.attacks.pgd import PGD
from guardbench.attacks.square import Square
from guardbench.attacks.stream import Fitting, gradient_of
from guardbench.errors import GuardbenchError
from guardbench.meaning import MEANING
from guardbench.protocol import AttackSpec, Protocol
from guardbench.records import Check, Outcome, SeedRun
from guardbench.threat import ThreatModel

CHECKS_VERSION = 5
"""Part of the key of what checks find: raised when their numbers may change."""
IMAGES = 64
UNSTEADY = ("random-answers", "batch-dependence")
"""Checks after whose flag two scorings of an adversarial image may disagree; it then counts as broken."""
CHANCE = 0.01
"""How rarely chance alone may raise a flag where two kinds of attack are compared."""
REPEATS, FEW = 5, 8
"""How often the same images are asked, as in pyautoattack, and how many at a time: a model may draw once a
pass, and one draw of a coin would be the same in five passes too often."""
RESTARTS = 10
SINGLE_STEP, BLACK_BOX = ("fgsm",), ("square", "spsa", "transfer")
MULTI_STEP = ("pgd", "mim", "apgd", "vmifgsm", "jitter")
WHITE_BOX = (*MULTI_STEP, "fab")
"""Of the attacks that see gradients, those that many queries should not beat."""


FIRST = ("random-answers", "batch-dependence", "probabilities", "zero-gradients", "saturated")
"""The checks that attack nothing."""
COMPARED = {"black-box": (BLACK_BOX, WHITE_BOX), "single-step": (SINGLE_STEP, MULTI_STEP)}
"""By the check's name, the kinds of attack that should break less, and those that should break more."""
LEAST_LEAD = 0.002
"""A lead of fewer images means little, whatever chance says: pyautoattack's 0.2 points."""
TARGETED = AttackSpec(name="fab-t", kind="fab")
"""What images meet that black-box attacks alone have broken: an honest model may need a targeted attack,
so only those that withstand this one too are held against it. Of AutoAttack's two it is the one that
starts at the image itself: a random start for each target is a black-box attack of its own."""
QUERIES = 500
"""Of Square, where a protocol has no black-box column."""
UNBOUNDED = PGD(
    threat=ThreatModel("linf", Fraction(1)), steps=100, step=Fraction(1, 50), random_start=False
)
"""What every image should fall to, in any norm's protocol: every pixel can reach 0 and 1. It starts at
the image itself, since a random start in so large a ball breaks most images without any gradient."""


Looked = dict[str, Tensor]
"""What was found of each image, by name: bool [n], and `classes` int64 [n]."""


def inspect(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    seed: int,
    compare: Collection[str] = (),
    gather: Callable[[Looked], Looked] = lambda found: found,
) -> dict[str, Check]:
    """The checks that ask the model.

    Args:
        model: in eval mode, float32, its answers finite.
        x, y: images [n, C, H, W] in [0, 1] that it gets right, on its device; at most 64 are used.
        threat: the ball of the protocol; in l1, for which there is no PGD here, nothing is compared.
        seed: of the random starts.
        compare: names in `COMPARED` for which the protocol has no columns, so that PGD-20 with ten
            restarts is compared here: with Square (500 queries; in l-inf), with FAB-T on what Square alone
            breaks, and with FGSM.
        gather: puts together what several processes have found, each of its own images; all of them call
            it alike.

    Returns:
        Check by name, shares of the images used. Empty when the model gets no image right.
    """
    x, y = x[:IMAGES], y[:IMAGES]
    with frozen(model):
        looked = gather(_first_look(model, x, y))
        if not len(looked["classes"]):
            return {}
        found = {
            "random-answers": _check(looked["random-answers"], 0.0),
            "batch-dependence": _check(looked["batch-dependence"], 0.0),
            "probabilities": _check(looked["probabilities"], 0.5),
            "zero-gradients": _check(looked["zero-gradients"], 0.02),
            "saturated": _check(looked["saturated"], 0.1),
        }
        if found["zero-gradients"].value == 1:
            return found  # an attack along gradients would say the same again
        chance = 1 / int(looked["classes"][0])
        looked = gather(_attacked(model, x, y, threat, seed, compare))
    found["unbounded"] = _check(looked["unbounded"], chance)
    if "restarts" in looked:
        found["restarts"] = _check(looked["restarts"] & ~looked["once"], 0.1)
    if "single-step" in looked:
        found["single-step"] = _lead(looked["single-step"], looked["restarts"])
    if "black-box" in looked:
        found["black-box"] = _lead(looked["black-box"], looked["restarts"] | looked["targeted"])
    return found


def _first_look(model: nn.Module, x: Tensor, y: Tensor) -> Looked:
    """The checks that attack nothing."""
    if not len(x):
        none = torch.zeros(0, dtype=torch.bool)
        return {**dict.fromkeys(FIRST, none), "classes": none.long()}
    fitting = Fitting()

    def ask(images: Tensor) -> tuple[Tensor, ...]:
        return (model(images),)

    with torch.no_grad():
        (logits,) = fitting(ask, x)
        size = min(fitting.most or len(x), len(x))  # less where memory ran out
        few = Fitting(min(FEW, (size + 1) // 2))
        first, *others = (few(ask, x)[0] for _ in range(REPEATS))
    return {
        "random-answers": torch.stack([_differ(first, again) for again in others]).any(0),
        "batch-dependence": _differ(logits, first),
        "probabilities": _probabilities(logits),
        "zero-gradients": _zero_gradients(model, x, y, fitting),
        # Where the loss is exactly 0, so is the part of its gradient that lowers the label's logit.
        "saturated": F.cross_entropy(logits, y, reduction="none") == 0,
        "classes": torch.full((len(x),), logits.shape[1]),
    }


def _attacked(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    seed: int,
    compare: Collection[str],
) -> Looked:
    """What the checks' attacks break, but for `unbounded`, which is what survives."""

    def fooled(attack: Attack) -> Tensor:
        return _fooled(model, attack, x, y, seed)

    found = {"unbounded": ~fooled(UNBOUNDED)}
    if threat.norm == "l1":
        return found
    found["once"], found["restarts"] = _by_pgd(model, x, y, threat, seed)
    if "single-step" in compare:
        found["single-step"] = fooled(FGSM(threat=threat))
    if "black-box" in compare and threat.norm == "linf":
        found["black-box"] = fooled(Square(threat=threat, queries=QUERIES))
        rest = (found["black-box"] & ~found["restarts"]).nonzero().squeeze(1)
        found["targeted"] = torch.zeros_like(found["black-box"])
        if len(rest):
            found["targeted"][rest] = _fooled(model, FAB(threat=threat), x[rest], y[rest], seed)
    return found


def compared(protocol: Protocol) -> set[str]:
    """The checks in `COMPARED` for which the protocol has columns of both kinds; `judge` makes them.

    All these columns meet the same images of a seed, or some all and the others the same slice.
    """
    found = set()
    for name, pair in COMPARED.items():
        sides = [[spec for spec in protocol.attacks if spec.kind in some] for some in pair]
        slices = {spec.images_per_seed for side in sides for spec in side} - {None}
        if all(sides) and len(slices) <= 1:
            found.add(name)
    return found


def alone(seed: SeedRun, protocol: Protocol) -> Outcome:
    """Which images the black-box columns broke and no white-box one did; True for these.

    For a protocol that has columns of both kinds (`compared`).
    """
    first, pairs = _survivors(seed, protocol, "black-box")
    ahead, behind = first - seed.clean.first, seed.clean.end - first - len(pairs)
    found = [pair == (False, True) for pair in pairs]
    return Outcome.from_flags([False] * ahead + found + [False] * behind, first=seed.clean.first)


def judge(seed: SeedRun, protocol: Protocol, standing: Outcome | None = None) -> dict[str, Check]:
    """The checks that compare what attacks of the protocol found, on the images they share.

    The value is by how much robust accuracy under the stronger kind exceeds that under the weaker
    one, as a share of the images; the stronger kind should not be the milder. A few images mean
    nothing: Square breaks some that PGD misses on honest models too. So the limit is the largest
    difference that a fair coin for each image on which the two differ gives in all but 1% of cases,
    and at least `LEAST_LEAD`.

    Args:
        standing: which of the images of `alone` withstand `TARGETED`; the others count as broken by
            white-box attacks too. None: all of them do.
    """
    found, wanted = {}, compared(protocol)
    for name in COMPARED:
        if name in wanted and all(_sides(seed, protocol, name)):
            first, pairs = _survivors(seed, protocol, name)
            milder = [first + place for place, pair in enumerate(pairs) if pair == (False, True)]
            if name == "black-box" and standing is not None:
                still = standing.flags()
                milder = [image for image in milder if still[image - standing.first]]
            found[name] = _compared(len(milder), pairs.count((True, False)), len(pairs))
    return found


def flags(runs: tuple[SeedRun, ...]) -> tuple[str, ...]:
    """One line a check that is flagged for any seed, with its worst value."""
    lines = []
    for name, meaning in MEANING.items():
        raised = [
            run.checks[name] for run in runs if name in run.checks and run.checks[name].flagged
        ]
        if raised:
            worst = max(raised, key=lambda check: check.value)
            of = f"{len(raised)} of {len(runs)} seeds" if len(runs) > 1 else "one seed"
            lines.append(
                f"{name}: {meaning} ({100 * worst.value:.1f}% of {worst.images} images, {of})"
            )
    return tuple(lines)


def _check(which: Tensor, limit: float) -> Check:
    return Check(value=float(which.float().mean()), limit=limit, images=len(which))


def _differ(first: Tensor, second: Tensor) -> Tensor:
    """Images whose two answers differ by more than float noise, bool [n]."""
    noise = torch.maximum(rounding(first), rounding(second))
    # A masked class is -inf twice.
    apart = torch.where(first == second, 0.0, (first - second).abs()).amax(1)
    return (apart > 0) & ~(apart <= noise)


def _probabilities(logits: Tensor) -> Tensor:
    # As pyautoattack has it: an average of saturated softmaxes may exceed 1 by its rounding.
    inside = ((logits >= -1e-5) & (logits <= 1 + 1e-5)).all(1)
    return inside & ((logits.sum(1) - 1).abs() < 1e-3)


def _zero_gradients(model: nn.Module, x: Tensor, y: Tensor, fitting: Fitting) -> Tensor:
    def differentiate(images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        point = images.detach().clone().requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(model(point), labels, reduction="sum")
        return (gradient_of(loss, point),)

    try:
        (gradient,) = fitting(differentiate, x, y)
    except GuardbenchError:  # none reaches any image
        return torch.ones(len(x), dtype=torch.bool)
    # From a NaN, whose sign is 0, no attack takes a step either.
    return (gradient.flatten(1) == 0).all(1) | ~gradient.flatten(1).isfinite().all(1)


def _fooled(model: nn.Module, attack: Attack, x: Tensor, y: Tensor, seed: int) -> Tensor:
    if not len(x):
        return torch.zeros(0, dtype=torch.bool)
    found = attack.perturb(model, x, y, seed=seed)
    with torch.no_grad():
        (logits,) = Fitting()(lambda some: (model(some),), found)
    wrong: Tensor = logits.argmax(1) != y
    return wrong


def _by_pgd(
    model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, seed: int
) -> tuple[Tensor, Tensor]:
    """Images that PGD-20 breaks from its first random start, and from any of ten, bool [n] each."""

    def pgd(restarts: int) -> PGD:
        return PGD(threat=threat, steps=20, step=threat.eps / 8, restarts=restarts)

    once = _fooled(model, pgd(1), x, y, seed)
    often = once.clone()
    rest = (~once).nonzero().squeeze(1)
    if len(rest):
        often[rest] = _fooled(model, pgd(RESTARTS), x[rest], y[rest], seed)
    return once, often


def _lead(weaker: Tensor, stronger: Tensor) -> Check:
    """By how much more the weaker kind breaks, from the images that each breaks, bool [n]."""
    return _compared(int((weaker & ~stronger).sum()), int((stronger & ~weaker).sum()), len(weaker))


def _sides(seed: SeedRun, protocol: Protocol, name: str) -> list[list[Outcome]]:
    """What the attacks of the weaker and of the stronger kind found."""
    kinds = {spec.name: spec.kind for spec in protocol.attacks}
    return [
        [found for attack, found in seed.attacks.items() if kinds[attack] in side]
        for side in COMPARED[name]
    ]


def _survivors(seed: SeedRun, protocol: Protocol, name: str) -> tuple[int, list[tuple[bool, ...]]]:
    """The first image that all attacks of both kinds share, and of it and those behind it whether they
    survive the weaker kind, and the stronger."""
    sides = _sides(seed, protocol, name)
    outcomes = [outcome for side in sides for outcome in side]
    first, end = max(o.first for o in outcomes), min(o.end for o in outcomes)

    def survive(side: list[Outcome]) -> list[bool]:
        flags = [one.flags()[first - one.first :][: end - first] for one in side]
        return [all(image) for image in zip(*flags, strict=True)]

    return first, list(zip(*map(survive, sides), strict=True))


def _compared(milder: int, harsher: int, images: int) -> Check:
    """A check from how many images the stronger kind spared and the weaker broke, and the reverse."""
    limit = max(LEAST_LEAD, _by_chance(milder + harsher) / images)
    return Check(value=(milder - harsher) / images, limit=limit, images=images)


def _by_chance(differing: int) -> int:
    """The largest lead in so many tosses of a fair coin that is no rarer than `CHANCE`."""
    tail, every = 0.0, math.lgamma(differing + 1) - differing * math.log(2)
    for heads in range(differing, -1, -1):
        tail += math.exp(every - math.lgamma(heads + 1) - math.lgamma(differing - heads + 1))
        if tail >= CHANCE:
            return max(0, 2 * heads - differing)
    return 0
