"""Regularisers against finite differences, against their formulas, and against known worst images."""

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from guardbench.models import batch_norms, build_model
from guardbench.registry import REGULARISERS
from guardbench.regularisers.adversarial import AdversarialTraining, ascend, uniform_start
from guardbench.regularisers.base import Batch, build_regulariser, key_words
from guardbench.regularisers.fbf import Fast
from guardbench.regularisers.gradnorm import GradientNorm
from guardbench.regularisers.released import ReleasedAdversarial
from guardbench.regularisers.trades import Trades, divergence
from guardbench.threat import ThreatModel

LINF = ThreatModel("linf", Fraction(1, 20))
L2 = ThreatModel("l2", Fraction(1, 4))
WORDS: dict[str, dict[str, str | float | int]] = {
    "none": {},
    "curvature": {"weight": 0.5, "h": 0.1},
    "curvature-double": {"weight": 0.5, "h": 0.1},
    "gradient-norm": {"weight": 0.5},
    "pgd": {"steps": 3},
    "pgd-released": {"radius": 0.5, "steps": 3},
    "trades": {"steps": 3},
    "fbf": {},
}


def linear(classes: int = 3, pixels: int = 16) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, classes)).double()


def smooth() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Softplus(), nn.Linear(8, 3)).double()


def a_batch(model: nn.Module, seed: int = 0, **more: object) -> Batch:
    torch.manual_seed(7)
    images = torch.rand(6, 1, 4, 4, dtype=torch.float64) * 0.6 + 0.2
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    return Batch(model=model, images=images, labels=labels, generator=generator, **more)


def by_differences(model: nn.Module, value: Callable[[], float]) -> list[float]:
    """Derivative of `value` in the first entry of each parameter."""
    found = []
    for parameter in model.parameters():
        entry = parameter.data.view(-1)
        step = 1e-6
        entry[0] += step
        above = value()
        entry[0] -= 2 * step
        below = value()
        entry[0] += step
        found.append((above - below) / (2 * step))
    return found


def first_gradients(model: nn.Module) -> list[float]:
    return [p.grad.view(-1)[0].item() for p in model.parameters()]  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", sorted(REGULARISERS))
def test_every_kind_leaves_a_gradient_and_tells_its_cost(kind: str) -> None:
    model = build_model("convnet-d3-bn-small", channels=1, classes=3, resolution=8, seed=0).train()
    batch = Batch(model=model, images=torch.rand(6, 1, 8, 8), labels=torch.arange(6) % 3)
    regulariser = build_regulariser({"kind": kind, **WORDS[kind]}, LINF)
    loss, penalty = regulariser.backward(batch)
    assert math.isfinite(loss + penalty)
    assert not loss.requires_grad
    assert all(p.grad is not None for p in model.parameters())
    assert regulariser.cost >= 1


def test_gradient_norm_value_and_gradient() -> None:
    model = smooth()

    def value() -> float:
        batch = a_batch(model)
        leaf = batch.images.clone().requires_grad_()
        each = F.cross_entropy(model(leaf), batch.labels, reduction="sum")
        (slope,) = torch.autograd.grad(each, leaf)
        return (each / 6 + 0.5 * slope.flatten(1).norm(dim=1).mean()).item()

    loss, penalty = GradientNorm(weight=0.5).backward(a_batch(model))
    assert (loss + penalty).item() == pytest.approx(value(), rel=1e-10)
    assert first_gradients(model) == pytest.approx(by_differences(model, value), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize(("kind", "weight"), [("curvature", 0.5), ("curvature-double", 500.0)])
def test_curvature_value_and_gradient_with_its_direction_held(kind: str, weight: float) -> None:
    model, images = smooth(), a_batch(smooth()).images

    def losses(x: Tensor) -> Tensor:
        return F.cross_entropy(model(x), a_batch(model).labels, reduction="none")

    def slopes(x: Tensor) -> Tensor:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(losses(leaf).sum(), leaf)[0]

    z = slopes(images)
    z = z / z.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    moved = images + 0.1 * math.sqrt(16) * z

    def value() -> float:
        plain = losses(images).mean()
        if kind == "curvature":
            penalty = (losses(moved).mean() - plain).abs()
        else:
            penalty = (slopes(moved) - slopes(images)).flatten(1).square().sum(1).mean()
        return (plain + weight * penalty).item()

    words = {"kind": kind, "weight": weight, "h": 0.1}
    loss, penalty = build_regulariser(words, LINF).backward(a_batch(model))
    assert penalty.item() > 0.01 * loss.item()
    assert (loss + penalty).item() == pytest.approx(value(), rel=1e-10)
    assert first_gradients(model) == pytest.approx(by_differences(model, value), rel=1e-5, abs=1e-9)


def test_a_flat_image_gives_the_gradient_norm_no_nan() -> None:
    model = linear()
    nn.init.zeros_(model[1].weight)
    GradientNorm(weight=1.0).backward(a_batch(model))
    assert torch.isfinite(model[1].weight.grad).all()


def worst_of_linear(model: nn.Module, batch: Batch, eps: float) -> Tensor:
    """Two classes: the l-inf worst image moves every pixel by eps against the right class."""
    weight = model[1].weight.detach()
    wrong = 1 - batch.labels
    away = (weight[wrong] - weight[batch.labels]).sign().view_as(batch.images)
    return batch.images + eps * away


@pytest.mark.parametrize("make", [AdversarialTraining, Fast])
def test_adversarial_training_finds_the_worst_image_of_a_linear_model(make: type) -> None:
    model = linear(classes=2)
    batch = a_batch(model)
    batch = Batch(model=model, images=batch.images, labels=batch.labels % 2)
    worst = worst_of_linear(model, batch, 0.05)
    if make is Fast:  # a step of two radii reaches the corner from every start
        batch.generator.manual_seed(0)
        start = uniform_start(batch, LINF)
        adv = ascend(batch, start, batch.loss, threat=LINF, steps=1, step=2.0)
        torch.testing.assert_close(adv, worst)
        batch.generator.manual_seed(0)
        loss, _ = make(threat=LINF, step=2.0).backward(batch)
    else:
        loss, _ = make(threat=LINF, steps=8).backward(batch)
    torch.testing.assert_close(loss, batch.loss(worst).detach())
    wanted = torch.autograd.grad(batch.loss(worst), list(model.parameters()))
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("threat", [LINF, L2], ids=str)
def test_the_attack_stays_in_the_ball_and_in_the_range(threat: ThreatModel) -> None:
    model = smooth()
    batch = a_batch(model)
    batch = Batch(model=model, images=batch.images.round(), labels=batch.labels)
    start = uniform_start(batch, threat)
    adv = ascend(batch, start, batch.loss, threat=threat, steps=5, step=0.7)
    for images in (start, adv):
        delta = (images - batch.images).flatten(1)
        size = delta.abs().amax(1) if threat.norm == "linf" else delta.norm(dim=1)
        assert (size <= float(threat.eps) + 1e-9).all()
        assert images.min() >= 0
        assert images.max() <= 1
    assert batch.loss(adv) > batch.loss(batch.images)


def test_the_random_start_fills_the_ball() -> None:
    images = torch.full((4000, 1, 1, 2), 0.5, dtype=torch.float64)
    batch = Batch(model=linear(), images=images, labels=torch.zeros(4000))
    flat = (uniform_start(batch, LINF) - images).flatten()
    assert flat.abs().max() <= 0.05
    assert flat.std().item() == pytest.approx(0.05 / math.sqrt(3), rel=0.03)
    radii = (uniform_start(batch, L2) - images).flatten(1).norm(dim=1)
    assert (radii < 0.25 / math.sqrt(2)).double().mean().item() == pytest.approx(0.5, abs=0.03)


def test_trades_value_and_gradient_at_the_image_that_it_found() -> None:
    model = smooth()
    regulariser = Trades(threat=LINF, beta=2.0, steps=4)
    batch = a_batch(model)
    wanted = F.log_softmax(model(batch.images), dim=1).detach()
    noise = 0.001 * torch.randn(batch.images.shape, generator=batch.generator)
    adv = ascend(
        batch,
        batch.images + noise,
        lambda x: divergence(wanted, F.log_softmax(model(x), dim=1)),
        threat=LINF,
        steps=4,
        step=0.25,
    )

    def value() -> float:
        p, q = (F.softmax(model(x), dim=1) for x in (batch.images, adv))
        kl = (p * (p / q).log()).sum(1).mean()
        return (F.cross_entropy(model(batch.images), batch.labels) + 2.0 * kl).item()

    loss, penalty = regulariser.backward(a_batch(model))
    assert penalty.item() > 0
    assert (loss + penalty).item() == pytest.approx(value(), rel=1e-6)
    assert first_gradients(model) == pytest.approx(by_differences(model, value), rel=1e-4, abs=1e-8)


def test_trades_image_moves_the_answer_more_than_noise_does() -> None:
    model = smooth()
    batch = a_batch(model)
    _, found = Trades(threat=LINF, steps=10).backward(batch)
    answer = F.log_softmax(model(batch.images), dim=1)
    noisy = uniform_start(batch, LINF)
    assert found > 6.0 * divergence(answer, F.log_softmax(model(noisy), dim=1))


@pytest.mark.parametrize("kind", ["pgd", "pgd-released", "fbf", "trades"])
def test_the_attack_itself_leaves_running_statistics_alone(kind: str) -> None:
    model = build_model("convnet-d3-bn-small", channels=1, classes=4, resolution=8, seed=1).train()
    images, labels = torch.rand(8, 1, 8, 8), torch.arange(8) % 4
    build_regulariser({"kind": kind}, LINF).backward(
        Batch(model=model, images=images, labels=labels)
    )
    forwards = 2 if kind == "trades" else 1  # TRADES minimises a loss of two
    assert all(int(norm.num_batches_tracked) == forwards for norm in batch_norms(model))


def test_the_released_setting_loses_what_lies_below_the_mean() -> None:
    """Seen by the backbone: nothing under 0 or over 1 in normalised units."""
    model = build_model("convnet-d3-bn-small", channels=3, classes=4, resolution=8, seed=1).train()
    seen: list[Tensor] = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    batch = Batch(model=model, images=torch.rand(8, 3, 8, 8), labels=torch.arange(8) % 4)
    ReleasedAdversarial(steps=2).backward(batch)
    assert all(x.min() >= 0 and x.max() <= 1 for x in seen)
    assert model.normalise(batch.images).min() < -1


def test_the_released_attack_climbs_within_its_radius() -> None:
    model = build_model("convnet-d3-bn-small", channels=3, classes=4, resolution=8, seed=1).train()
    seen: list[Tensor] = []
    # Images that the cut to [0, 1] leaves whole.
    inside = torch.rand(16, 3, 8, 8) * 0.4 + 0.3
    images = inside * model.std + model.mean
    labels = torch.arange(16) % 4
    with torch.no_grad():
        clean = nn.functional.cross_entropy(model(images), labels)
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    attack = ReleasedAdversarial(radius=0.1, steps=5)
    loss, _ = attack.backward(Batch(model=model, images=images, labels=labels))
    moved = seen[-1] - model.normalise(images)
    assert float(moved.abs().max()) == pytest.approx(0.1, abs=1e-6)
    assert (moved.abs() > 0.099).float().mean() > 0.2, (
        "of a random start a hundredth lies at the edge"
    )
    assert loss > 1.1 * clean
    # The gradient that it leaves is that of the loss at the last image, nothing of the way there.
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    nn.functional.cross_entropy(model.backbone(seen[-1]), labels).backward()
    for one, other in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(one, other.grad)


def test_equal_generators_repeat_a_step() -> None:
    def gradient(seed: int) -> Tensor:
        model = smooth()
        AdversarialTraining(threat=LINF, steps=1, step=0.1).backward(a_batch(model, seed))
        return model[1].weight.grad

    assert torch.equal(gradient(3), gradient(3))
    assert not torch.equal(gradient(3), gradient(4))


def test_only_what_attacks_hangs_on_the_threat_model() -> None:
    for kind in REGULARISERS:
        words = {"kind": kind, **WORDS[kind]}
        moved = key_words(words, LINF) != key_words(words, L2)
        assert moved == (kind in ("pgd", "trades", "fbf")), kind
