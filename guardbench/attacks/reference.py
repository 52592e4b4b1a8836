"""The reference engine: pyautoattack's own evaluation, untouched; no other module imports it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from guardbench.attacks.base import frozen
from guardbench.attacks.stream import Fitting
from guardbench.errors import GuardbenchError
from guardbench.threat import ThreatModel

NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
MIN_CLASSES = {"standard": 4, "plus": 4, "rand": 3}

logger = logging.getLogger(__name__)


def reference_autoattack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    seed: int,
    *,
    version: str,
    square: bool,
) -> Tensor:
    """pyautoattack's ensemble; images that survive come back unchanged.

    The package draws random numbers for a whole batch at once, so verdicts on images near the
    boundary can depend on which images share the batch.

    Args:
        version: `standard`, `plus` or `rand`.
        square: False leaves Square out.

    Raises:
        GuardbenchError: under 4 classes (3 for `rand`), or images whose height Square cannot tile
            in l2 or l1.
    """
    needed = MIN_CLASSES[version]
    with torch.no_grad():
        classes = model(x[:1]).shape[1]
    if classes < needed:
        raise GuardbenchError(
            f"AutoAttack {version} needs at least {needed} classes for its DLR loss, not"
            f" {classes}; use pgd and square instead"
        )
    if square and version != "rand":
        _require_tiles(NORMS[threat.norm], x)

    def adjust(engine: Any) -> None:
        for part in (engine.apgd_targeted, engine.fab):
            part.n_target_classes = min(part.n_target_classes, classes - 1)
        if not square and "square" in engine.attacks_to_run:
            engine.attacks_to_run.remove("square")

    return _run(model, x, y, threat, seed, {"version": version}, adjust)


def reference_square(
    model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, seed: int, *, queries: int
) -> Tensor:
    """pyautoattack's Square, as it is inside AutoAttack, with another number of queries.

    All images of a batch share their squares, so a verdict can depend on the batch.

    Raises:
        GuardbenchError: images whose height Square cannot tile in l2 or l1.
    """
    _require_tiles(NORMS[threat.norm], x)

    def adjust(engine: Any) -> None:
        engine.square.n_queries = queries

    settings: dict[str, object] = {"version": "custom", "attacks": ["square"]}
    return _run(model, x, y, threat, seed, settings, adjust)


def reference_part(
    part: str,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    seed: int,
    *,
    steps: int,
    targets: int,
) -> Tensor:
    """One of pyautoattack's attacks, otherwise as inside AutoAttack standard; survivors come back as
    they were.

    Args:
        part: `apgd-ce`, `apgd-dlr`, `apgd-t` or `fab-t`.
        steps: iterations a search.
        targets: of the targeted parts; K - 1 where there are fewer.
    """
    with torch.no_grad():
        classes = model(x[:1]).shape[1]

    def adjust(engine: Any) -> None:
        engine.attacks_to_run = [part]
        for each in (engine.apgd, engine.apgd_targeted, engine.fab):
            each.n_iter = steps
            each.n_iter_orig = steps  # what APGD reads in l1
        for each in (engine.apgd_targeted, engine.fab):
            each.n_target_classes = min(targets, classes - 1)

    return _run(model, x, y, threat, seed, {"version": "standard"}, adjust)


class FormerAutoAttack:
    """pyautoattack under the signature of the package `autoattack`, which robustbench calls.

    Its random numbers come from seed 0, where that package's came from the clock.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        norm: str,
        eps: float,
        version: str,
        device: torch.device,
        log_path: object = None,  # noqa: ARG002
    ) -> None:
        from pyautoattack import AutoAttack as Engine  # type: ignore[import-untyped]

        self.device, self.norm = device, norm
        self.engine = Engine(model, norm=norm, eps=eps, version=version, device=device, seed=0)

    def run_standard_evaluation(
        self, x: Tensor, y: Tensor, *, bs: int, state_path: Path | None = None
    ) -> Tensor:
        """Adversarial images [N, C, H, W]; survivors come back unchanged.

        Raises:
            GuardbenchError: images whose height Square cannot tile in l2.
        """
        _require_tiles(self.norm, x)
        with _isolated(self.device):
            found: Tensor = self.engine.run_standard_evaluation(
                x, y, batch_size=bs, state_path=state_path
            )[0]
        return found


def former_state() -> type:
    """The class that `autoattack.state` calls EvaluationState."""
    from pyautoattack.state import EvaluationState  # type: ignore[import-untyped]

    return EvaluationState  # type: ignore[no-any-return]


def _run(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    seed: int,
    settings: dict[str, object],
    adjust: Callable[[Any], None],
) -> Tensor:
    """pyautoattack's own evaluation of these images, in one batch, leaving nothing else moved.

    Where memory runs out it begins again with half of the images, and then the other half.
    """
    from pyautoattack import AutoAttack as Engine

    def evaluate(images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        engine = Engine(
            model,
            eps=float(threat.eps),
            norm=NORMS[threat.norm],
            seed=seed,
            device=images.device,
            **settings,
        )
        engine.verbose = False
        adjust(engine)
        adv, _ = engine.run_standard_evaluation(images.contiguous(), labels, batch_size=len(images))
        return (adv.detach(),)

    with frozen(model), _isolated(x.device):
        (found,) = Fitting()(evaluate, x, y)
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


def _require_tiles(norm: str, x: Tensor) -> None:
    """Refuses sizes at which Square's first tiling (l2, l1) would not fit, which crashes it.

    It lays squares of `s = height // 5` from `(height - 5 s) // 2` on, `height // s` of them:
    the last may stick out by less than a square only if `s` is 1.
    """
    if norm == "Linf":
        return
    height, width = x.shape[2:]
    side = height // 5
    if side > 1:
        start = (height - 5 * side) // 2
        end = start + side * (height // side)
    if side == 0 or (side > 1 and end > min(height, width)):
        raise GuardbenchError(
            f"Square in {norm.lower()} (of pyautoattack) cannot tile {height} x {width} images;"
            " another resolution or linf works"
        )
