"""What an attack is, and the harness that makes the final call on what it claims."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from guardbench.attacks.stream import Fitting, rows_at_once, telling
from guardbench.ball import length
from guardbench.errors import GuardbenchError
from guardbench.threat import FLOAT32_ULP, ThreatModel, tolerance

LOGIT_NOISE = 1e-4
"""Two scorings of one image may disagree only if its margin is below this share of its logits' spread."""


class Images(Protocol):
    """Images [N, C, H, W], float32 in [0, 1]: a tensor, or what decodes them when they are asked for."""

    @property
    def shape(self) -> Sequence[int]:
        """N, C, H, W."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> Tensor:
        """The images at a slice or at int64 indices."""


class Attack(Protocol):
    """Looks for images inside a threat model that a classifier gets wrong.

    An attack draws every random number from `seed` and leaves the global generators alone. It
    is not trusted: `run_verified` checks and recounts what it returns.
    """

    @property
    def threat(self) -> ThreatModel | None:
        """The ball around the clean image; None if only [0, 1] bounds the image."""

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, *, seed: int) -> Tensor:
        """Adversarial images, as good as the attack finds them.

        Args:
            model: in eval mode; maps float32 images [N, C, H, W] in [0, 1] to logits [N, K]
                and owns its normalisation.
            x: clean images, float32 [N, C, H, W] in [0, 1].
            y: labels, int64 [N].
            seed: of every random choice.

        Returns:
            float32 [N, C, H, W] on the device of `x`.
        """


@dataclass(frozen=True)
class AttackOutcome:
    """Verdicts and distances of N images, on the CPU.

    Attributes:
        clean: bool [N], right on the clean image.
        robust: bool [N], right on the clean and on the adversarial image.
        distance: float64 [N], length of the perturbation in the threat's norm (l2 if
            unbounded), found harmful or not; 0 where the clean image was kept as already wrong.
    """

    clean: Tensor
    robust: Tensor
    distance: Tensor


@dataclass(frozen=True)
class BatchOutcome:
    """Verdicts on the images `index` of a data set; all on the CPU.

    Attributes:
        index: int64 [n].
        broken: bool [n], misclassified by at least one of the two scorings.
        distance: float64 [n], as in `AttackOutcome`.
    """

    index: Tensor
    broken: Tensor
    distance: Tensor


class UnsteadyError(GuardbenchError):
    """Two scorings of one adversarial image differ."""


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Holds `model` still: no gradient reaches its weights while the context is open.

    Raises:
        GuardbenchError: a part of the model is in train mode.
    """
    require_eval(model)
    thawed = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in thawed:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in thawed:
            weight.requires_grad_(True)


def require_eval(model: nn.Module) -> None:
    """Refuses a model of which any part is in train mode, and names that part."""
    for name, module in model.named_modules():
        if module.training:
            part = f"{name} ({type(module).__name__})" if name else type(module).__name__
            raise GuardbenchError(f"{part} is in train mode; call model.eval() before an attack")


def score_clean(model: nn.Module, x: Images, y: Tensor, *, batch_size: int = 256) -> Tensor:
    """Which clean images the model gets right: bool [N], on the CPU.

    Args:
        model: in eval mode; batches are moved to the device of its weights.
        x: float32 [N, C, H, W] in [0, 1].
        y: int64 [N].
        batch_size: images a forward pass.

    Raises:
        GuardbenchError: images outside [0, 1] or of another type, labels that do not fit, a
            model in train mode or one that answers NaN.
    """
    if len(x.shape) != 4 or x[:1].dtype != torch.float32:
        kind = f"{x[:1].dtype} {list(x.shape)}"
        raise GuardbenchError(f"images must be float32 [N, C, H, W] in [0, 1], not {kind}")
    if y.shape != x.shape[:1] or y.dtype != torch.int64:
        kind = f"{y.dtype} {list(y.shape)}"
        raise GuardbenchError(f"labels must be int64 [{len(x)}], one an image, not {kind}")
    if batch_size < 1:
        raise GuardbenchError(f"the batch size must be positive, not {batch_size}")
    require_eval(model)
    right = torch.zeros(len(x), dtype=torch.bool)
    for first in range(0, len(x), batch_size):
        rows = slice(first, first + batch_size)
        images, labels = _on_device_of(model, x[rows], y[rows])
        _require_unit_range(images)
        right[rows] = (_logits(model, images, labels, batch_size).argmax(1) == labels).cpu()
    return right


def plan_batches(clean: Tensor, batch_size: int) -> list[Tensor]:
    """The indices of the images that are right in `clean` [N], in order, in full batches."""
    index = clean.nonzero().squeeze(1)
    return [index[first : first + batch_size] for first in range(0, len(index), batch_size)]


def run_batch(
    attack: Attack,
    model: nn.Module,
    x: Images,
    y: Tensor,
    index: Tensor,
    *,
    seed: int,
    searched: nn.Module | None = None,
    slack: float = 0.0,
    steady: bool = True,
    rescore_batch_size: int | None = None,
) -> BatchOutcome:
    """Attacks the images `index` of `x` and judges the result; one step of `run_verified`.

    A caller that stores every outcome can stop between batches and go on later. The verdicts
    are the same in any order of batches.

    Args:
        attack: what to run.
        model: in eval mode; the batch is moved to the device of its weights.
        x: float32 [N, C, H, W] in [0, 1], all images of the data set.
        y: int64 [N].
        index: int64 [n], rows of `x` that the model gets right; see `plan_batches`.
        seed: handed to the attack as it is.
        searched: what the attack sees instead of `model`: the same function in a faster form, such
            as `models.folded`. The verdicts are always those of `model`, which is searched itself where
            an image is adversarial for the faster form alone.
        slack: by how much two answers of `searched` to one image may differ, as a share of its logits'
            spread: an image so near to being adversarial for it may have ended its search.
        steady: two scorings of one image must agree; False, for a model that is known to answer at
            random or by the batch, counts an image as broken when one of them is wrong.
        rescore_batch_size: of the second scoring; default about half of the first one's, which is the
            batch or `rows_at_once`, and from the other end, so that no image meets the same batch size
            twice. One image is scored beside a copy of itself, and a size of the first one's or more
            becomes one more than that.

    Raises:
        GuardbenchError: the attack returned something that is not an image inside the ball, or
            the model's two answers to one image differ by more than float noise.
    """
    if rescore_batch_size is not None and rescore_batch_size < 1:
        raise GuardbenchError(f"the batch size must be positive, not {rescore_batch_size}")
    images, labels = _on_device_of(model, x[index], y[index])
    _require_unit_range(images)
    seen = model if searched is None else searched

    def attacked(net: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = attack.perturb(net, images[rows].clone(), labels[rows].clone(), seed=seed)
        require_eval(model)
        adv, distance = _inside(attack, found, images[rows], index[rows.cpu()])
        again = rescore_batch_size
        under = f" at an image that {attack} made"
        wrong = _broken(model, adv, labels[rows], index[rows.cpu()], again, steady, under)
        return adv, distance, wrong

    with frozen(model), frozen(seen):
        adv, distance, broken = attacked(seen, torch.arange(len(images), device=images.device))
        if searched is not None:
            logits = _logits(searched, adv, labels, rows_at_once(adv))
            near = margin_of(logits, labels) < rounding(logits, slack)
            claimed = (logits.argmax(1) != labels) | near
            # Its search ended at an image that rounding alone makes adversarial, and only there.
            rows = (claimed & ~broken).nonzero().squeeze(1)
            if len(rows):
                with telling(lambda *_: None):
                    _, distance[rows.to(distance.device)], broken[rows] = attacked(model, rows)
    return BatchOutcome(index=index.cpu(), broken=broken.cpu(), distance=distance.cpu())


def run_verified(
    attack: Attack,
    model: nn.Module,
    x: Images,
    y: Tensor,
    *,
    seed: int,
    batch_size: int = 256,
    on_batch: Callable[[int], None] | None = None,
    rescore_batch_size: int | None = None,
    clean: Tensor | None = None,
) -> AttackOutcome:
    """Robustness of `model` to `attack`, counted by the harness and not by the attack.

    Images that are already wrong leave first, so robust implies clean and every batch is full.
    What the attack returns is checked (finite, shape, [0, 1], the ball in float64 up to float32
    rounding, see `threat.tolerance`), clipped to [0, 1] and scored anew, twice, at two batch
    sizes. Where the two scorings disagree and the margin is within float noise (`LOGIT_NOISE`),
    the image counts as broken; beyond that it is an error.

    Args:
        attack: what to run.
        model: in eval mode, maps images to logits; batches are moved to the device of its
            weights, whose gradients are off meanwhile.
        x: float32 [N, C, H, W] in [0, 1].
        y: int64 [N].
        seed: of every random choice of the attack.
        batch_size: images attacked at once.
        on_batch: told how many more images are decided: first those wrong when clean, then
            every batch; the numbers add up to N.
        rescore_batch_size: see `run_batch`.
        clean: what `score_clean` gave for these images, when it is known already.

    Raises:
        GuardbenchError: bad images, labels or model (`score_clean`), or a result of the attack
            that does not stand (`run_batch`).
    """
    if clean is None:
        clean = score_clean(model, x, y, batch_size=batch_size)
    elif clean.shape != y.shape or clean.dtype != torch.bool:
        raise GuardbenchError(f"clean verdicts must be bool [{len(y)}]")
    clean = clean.cpu()
    robust, distance = clean.clone(), torch.zeros(len(x), dtype=torch.float64)
    if on_batch is not None:
        on_batch(int((~clean).sum()))
    for index in plan_batches(clean, batch_size):
        outcome = run_batch(
            attack, model, x, y, index, seed=seed, rescore_batch_size=rescore_batch_size
        )
        robust[index], distance[index] = ~outcome.broken, outcome.distance
        if on_batch is not None:
            on_batch(len(index))
    return AttackOutcome(clean=clean, robust=robust, distance=distance)


def _on_device_of(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    weight = next(chain(model.parameters(), model.buffers()), None)
    device = x.device if weight is None else weight.device
    return x.to(device), y.to(device)


def _require_unit_range(x: Tensor) -> None:
    low, high = (float(value) for value in x.aminmax()) if x.numel() else (0.0, 0.0)
    if not (low >= 0 and high <= 1):
        raise GuardbenchError(
            f"images must be in [0, 1], found {low:g} to {high:g}; normalisation belongs inside"
            " the model"
        )


def _logits(model: nn.Module, x: Tensor, y: Tensor, most: int, under: str = "") -> Tensor:
    """Logits [n, K] without gradient, `most` images a pass; refused if they are NaN or do not fit.

    Args:
        under: which attack made the images, for that error.
    """
    with torch.no_grad():
        (logits,) = Fitting(most)(lambda some: (model(some),), x)
    if logits.ndim != 2 or len(logits) != len(x):
        shape = list(logits.shape)
        raise GuardbenchError(f"the model must answer logits [{len(x)}, K], not {shape}")
    if logits.isnan().any():
        raise GuardbenchError(f"the model answers NaN{under}; its accuracy means nothing")
    if len(y) and not (int(y.min()) >= 0 and int(y.max()) < logits.shape[1]):
        found = f"{int(y.min())} to {int(y.max())}"
        raise GuardbenchError(f"labels must be 0 to {logits.shape[1] - 1}, found {found}")
    return logits


def _inside(attack: Attack, found: Tensor, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """What the attack returned, clipped to [0, 1], and its distances; an error names the image."""
    if not isinstance(found, Tensor) or found.shape != x.shape or found.dtype != x.dtype:
        kind = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found)
        raise GuardbenchError(f"{attack}: returned {kind} for images {x.dtype} {list(x.shape)}")
    found = found.detach().to(x.device)
    if not (finite := found.flatten(1).isfinite().all(1)).all():
        raise GuardbenchError(
            f"{attack}: image {_first(~finite, index)} is not finite, as where the model's gradient is NaN"
        )
    outside = torch.maximum(-found, found - 1).flatten(1).amax(1)
    if (wrong := outside > 2 * FLOAT32_ULP).any():
        excess = float(outside[wrong][0])
        raise GuardbenchError(
            f"{attack}: image {_first(wrong, index)} leaves [0, 1] by {excess:.3g}"
        )
    adv = found.clamp(0, 1)
    threat = attack.threat
    norm = "l2" if threat is None else threat.norm
    pairs = zip(torch.split(adv, 256), torch.split(x, 256), strict=True)
    distance = torch.cat([length(_exact(one) - _exact(other), norm) for one, other in pairs])
    if threat is not None:
        allowed = float(threat.eps) + tolerance(threat, x[0].numel())
        if (wrong := distance > allowed).any():
            far = float(distance[wrong][0])
            raise GuardbenchError(
                f"{attack}: image {_first(wrong, index)} is at {threat.norm} distance {far:.6g},"
                f" outside eps {threat.eps} = {float(threat.eps):.6g}"
            )
    return adv, distance


def _exact(images: Tensor) -> Tensor:
    """`images` in float64, which Apple's GPUs lack: theirs come to the CPU."""
    return (images.cpu() if images.device.type == "mps" else images).double()


def _first(wrong: Tensor, index: Tensor) -> int:
    return int(index[wrong.nonzero()[0, 0].to(index.device)])


def _broken(
    model: nn.Module,
    adv: Tensor,
    y: Tensor,
    index: Tensor,
    rescore_batch_size: int | None,
    steady: bool,
    under: str,
) -> Tensor:
    """Whether one of two scorings at different batch sizes misclassifies each image, bool [n]."""
    size = min(len(adv), rows_at_once(adv))
    logits = _logits(model, adv, y, size, under)
    other = rescore_batch_size or (size + 1) // 2
    if rescore_batch_size is None and other == len(adv) % size:
        other += 1  # else the images left over would meet it twice
    if other < size:
        again = _logits(model, adv.flip(0), y.flip(0), other, under).flip(0)
    else:
        more, labels = torch.cat([adv, adv[:1]]), torch.cat([y, y[:1]])
        again = _logits(model, more, labels, size + 1, under)[:-1]
    first, second = logits.argmax(1) != y, again.argmax(1) != y
    noise = torch.maximum(rounding(logits), rounding(again))
    margin = torch.maximum(margin_of(logits, y).abs(), margin_of(again, y).abs())
    if steady and (wrong := (first != second) & ~(margin <= noise)).any():
        row = wrong.nonzero()[0, 0]
        before, after = (float(margin_of(scores, y)[row]) for scores in (logits, again))
        raise UnsteadyError(
            f"image {_first(wrong, index)}: the model's margin is {before:+.4g} and {after:+.4g} in"
            " two scorings of the same adversarial image at different batch sizes; its answers"
            " are random or depend on the batch"
        )
    return first | second


def rounding(logits: Tensor, share: float = LOGIT_NOISE) -> Tensor:
    """By how much rounding alone may move logits [n, K]: `share` of their spread, and their own digits, [n].

    The spread is that of the classes which are in play: a masked class, at -1e9 or -inf, would make
    every answer look alike, and so would an offset of all. Of two or three classes the gap may be the
    margin that is judged, so there it is the largest logit.
    """
    if logits.shape[1] < 4:
        return share * logits.abs().amax(1)
    first, fourth = logits.topk(4, dim=1).values[:, ::3].unbind(1)
    spread = torch.minimum(first - logits.amin(1), 10 * (first - fourth))
    return share * spread + 8 * torch.finfo(logits.dtype).eps * first.abs()


def margin_of(logits: Tensor, y: Tensor) -> Tensor:
    """Logit of the label minus the best other logit, [n]."""
    own = logits.gather(1, y[:, None]).squeeze(1)
    return own - logits.scatter(1, y[:, None], -torch.inf).amax(1)
