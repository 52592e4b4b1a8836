"""AutoAttack and Square through pyautoattack, which no other module imports."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from guardbench.attacks.base import frozen
from guardbench.errors import GuardbenchError
from guardbench.threat import ThreatModel

NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
MIN_CLASSES = {"standard": 4, "plus": 4, "rand": 3}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AutoAttack:
    """The ensemble of APGD-CE, APGD-T, FAB-T and Square, each on the survivors of the last.

    Croce & Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
    parameter-free attacks", ICML 2020 (arXiv:2003.01690), with the official hyperparameters of
    pyautoattack: 100 iterations, 9 targets (5 for APGD-T in l1) or K - 1 where there are
    fewer, 5,000 queries. Images that survive come back unchanged.

    The package draws random numbers for a whole batch at once, so verdicts on images near the
    boundary can depend on which images share the batch.

    Attributes:
        threat: the ball; l-inf, l2 or l1.
        version: `standard`; `plus` adds restarts and untargeted parts; `rand` is for models
            whose answers are random.
        square: False leaves Square out, for a caller that has run it on these images already
            and takes both verdicts together; the ensemble's verdict does not depend on order.
    """

    threat: ThreatModel
    version: Literal["standard", "plus", "rand"] = "standard"
    square: bool = True

    def __post_init__(self) -> None:
        if self.version not in MIN_CLASSES:
            known = ", ".join(MIN_CLASSES)
            raise GuardbenchError(f"version must be one of {known}, not {self.version!r}")

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, *, seed: int) -> Tensor:
        """Adversarial images [N, C, H, W] for images `x` in [0, 1] and labels `y` [N].

        Raises:
            GuardbenchError: under 4 classes (3 for `rand`), or images whose height Square
                cannot tile in l2 or l1.
        """
        if not len(x):
            return x.clone()
        needed = MIN_CLASSES[self.version]
        with torch.no_grad():
            classes = model(x[:1]).shape[1]
        if classes < needed:
            raise GuardbenchError(
                f"AutoAttack {self.version} needs at least {needed} classes for its DLR loss, not"
                f" {classes}; use pgd and square instead"
            )
        if self.square and self.version != "rand":
            _require_tiles(self.threat, x)

        def adjust(engine: Any) -> None:
            for part in (engine.apgd_targeted, engine.fab):
                part.n_target_classes = min(part.n_target_classes, classes - 1)
            if not self.square and "square" in engine.attacks_to_run:
                engine.attacks_to_run.remove("square")

        return _run(model, x, y, self.threat, seed, {"version": self.version}, adjust)


@dataclass(frozen=True, kw_only=True)
class Square:
    """Random search over squares, by the model's answers alone.

    Andriushchenko et al., "Square Attack", ECCV 2020 (arXiv:1912.00049), as pyautoattack has it
    inside AutoAttack: margin loss, p = 0.8, one restart, a schedule not rescaled to the
    queries. An image leaves when it is broken; images that survive come back unchanged. All
    images of a batch share their squares, so a verdict can depend on the batch.

    Attributes:
        threat: the ball; l-inf, l2 or l1.
        queries: forward passes an image, at most.
    """

    threat: ThreatModel
    queries: int = 5000

    def __post_init__(self) -> None:
        if self.queries < 1:
            raise GuardbenchError(f"queries must be positive: {self}")

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, *, seed: int) -> Tensor:
        """Adversarial images [N, C, H, W] for images `x` in [0, 1] and labels `y` [N].

        Raises:
            GuardbenchError: images whose height Square cannot tile in l2 or l1.
        """
        if not len(x):
            return x.clone()
        _require_tiles(self.threat, x)

        def adjust(engine: Any) -> None:
            engine.square.n_queries = self.queries

        settings: dict[str, object] = {"version": "custom", "attacks": ["square"]}
        return _run(model, x, y, self.threat, seed, settings, adjust)


def _run(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    seed: int,
    settings: dict[str, object],
    adjust: Callable[[Any], None],
) -> Tensor:
    """pyautoattack's own evaluation of these images, in one batch, leaving nothing else moved."""
    with frozen(model), _isolated(x.device):
        from pyautoattack import AutoAttack as Engine  # type: ignore[import-untyped]

        engine = Engine(
            model,
            eps=float(threat.eps),
            norm=NORMS[threat.norm],
            seed=seed,
            device=x.device,
            **settings,
        )
        engine.verbose = False
        adjust(engine)
        adv, _ = engine.run_standard_evaluation(x.contiguous(), y, batch_size=len(x))
    found: Tensor = adv.detach()
    return found


@contextmanager
def _isolated(device: torch.device) -> Iterator[None]:
    """Keeps what pyautoattack does to the process inside: random state, tracer, log, counters.

    It seeds torch's global generators, switches off `sys.settrace` (a debugger, coverage) and
    writes its warnings about the model to a logger that prints by default. The warnings reach
    this module's logger instead, at level INFO. Its check for models that call autograd counts
    in a global that is never reset, so one such model would mark all later ones.
    """
    from pyautoattack import checks

    def forward(record: logging.LogRecord) -> bool:
        logger.info("pyautoattack: %s", record.getMessage())
        return False

    # Seeding touches every CUDA device, but only once CUDA is in use at all.
    in_use = device.type == "cuda" or torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if in_use else ()
    source, tracer = logging.getLogger("auto-attack"), sys.gettrace()
    checks.funcs.update(dict.fromkeys(checks.funcs, 0))
    source.addFilter(forward)
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        source.removeFilter(forward)
        sys.settrace(tracer)


def _require_tiles(threat: ThreatModel, x: Tensor) -> None:
    """Refuses sizes at which Square's first tiling (l2, l1) would not fit, which crashes it.

    It lays squares of `s = height // 5` from `(height - 5 s) // 2` on, `height // s` of them:
    the last may stick out by less than a square only if `s` is 1.
    """
    if threat.norm == "linf":
        return
    height, width = x.shape[2:]
    side = height // 5
    if side > 1:
        start = (height - 5 * side) // 2
        end = start + side * (height // side)
    if side == 0 or (side > 1 and end > min(height, width)):
        raise GuardbenchError(
            f"Square in {threat.norm} (of pyautoattack) cannot tile {height} x {width} images;"
            " another resolution or linf works"
        )
