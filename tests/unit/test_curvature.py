"""The regulariser against analytic answers and against automatic differentiation of its formula."""

import math
from fractions import Fraction

import pytest
import torch
from torch import nn

from guardbench.curvature import DoubleBackwardCurvature, FirstOrderCurvature, step_along
from guardbench.errors import GuardbenchError
from guardbench.models import batch_norms, build_model
from guardbench.regularisers.base import Batch, Plain, build_regulariser
from guardbench.threat import ThreatModel


def small_net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Softplus(), nn.Flatten(), nn.Linear(4 * 4 * 4, 3)
    ).double()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(4)
    return torch.rand(5, 1, 6, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0])


LINF = ThreatModel("linf", Fraction(1, 255))


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("weight", [0.3, 1.0, 2.5])
def test_first_order_gradient_is_that_of_the_formula(weight: float) -> None:
    model, (x, y) = small_net(), batch()

    def loss_at(images: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(model(images), y)

    loss, penalty = FirstOrderCurvature(weight=weight, h=0.1).backward(
        Batch(model=model, images=x, labels=y)
    )
    found = gradients(model)

    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss_at(leaf), leaf)
    z = g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    moved = x + 0.1 * math.sqrt(36) * z
    reference = loss_at(x) + weight * (loss_at(moved) - loss_at(x)).abs()
    wanted = torch.autograd.grad(reference, list(model.parameters()))
    assert (loss + penalty).item() == pytest.approx(reference.item(), rel=1e-12)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_first_order_gradient_where_the_loss_falls_along_z() -> None:
    """A long step can lower the loss; then the sign of the penalty's gradient turns."""
    model, (x, y) = small_net(), batch()

    def loss_at(images: torch.Tensor) -> torch.Tensor:
        return torch.sin(8 * model(images)).mean()

    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss_at(leaf), leaf)
    lengths = [0.05 * k for k in range(1, 60)]
    h = next(k for k in lengths if loss_at(x + step_along(g, k)) < loss_at(x))
    rise = loss_at(x + step_along(g, h)) - loss_at(x)
    batch_ = Batch(
        model=model, images=x, labels=y, criterion=lambda out, _: torch.sin(8 * out).mean()
    )
    loss, penalty = FirstOrderCurvature(weight=0.7, h=h).backward(batch_)
    found = gradients(model)
    wanted = torch.autograd.grad(loss_at(x) + 0.7 * rise.abs(), list(model.parameters()))
    assert penalty.item() == pytest.approx(-0.7 * rise.item(), rel=1e-12)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert math.isfinite(loss.item())


def test_a_first_order_step_costs_two_plain_ones() -> None:
    """What the module promises: the direction comes with the gradient of the plain loss."""
    model = build_model("convnet-d3-bn-small", channels=1, classes=4, resolution=8, seed=1).train()
    forwards, backwards = [], []

    def note(_module: nn.Module, _images: object, logits: torch.Tensor) -> None:
        forwards.append(logits)
        if logits.requires_grad:
            logits.register_hook(backwards.append)

    model.backbone.register_forward_hook(note)
    x, y = torch.rand(8, 1, 8, 8), torch.arange(8) % 4
    FirstOrderCurvature(weight=0.7, h=0.1).backward(Batch(model=model, images=x, labels=y))
    assert (len(forwards), len(backwards)) == (2, 2)


class Quadratic(nn.Module):
    """l(x) = x' A x / 2 an image, whose Hessian is A everywhere."""

    def __init__(self, a: torch.Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(a)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        v = x.flatten(1)
        return 0.5 * ((v @ self.a) * v).sum(1)


def test_double_backward_penalty_of_a_quadratic_is_known() -> None:
    torch.manual_seed(0)
    half = torch.randn(4, 4, dtype=torch.float64)
    a = half + half.T
    model = Quadratic(a)
    x = torch.rand(6, 1, 2, 2, dtype=torch.float64)
    h, weight = 0.3, 5.0
    _, penalty = DoubleBackwardCurvature(weight=weight, h=h).backward(
        Batch(model=model, images=x, labels=torch.zeros(6), criterion=lambda out, _: out.mean())
    )
    z = x.flatten(1) @ a
    z = z / z.norm(dim=1, keepdim=True)
    # grad l(x + s z) - grad l(x) = s A z with s = h sqrt(C H W) = 2 h
    wanted = weight * ((2 * h * z @ a) ** 2).sum(1).mean()
    assert penalty.item() == pytest.approx(wanted.item(), rel=1e-10)


def test_double_backward_gradient_against_finite_differences() -> None:
    model, (x, y) = small_net(), batch()
    regulariser = DoubleBackwardCurvature(weight=3.0, h=0.2)

    def loss_at(images: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(model(images), y)

    leaf = x.clone().requires_grad_()
    (z,) = torch.autograd.grad(loss_at(leaf) * len(x), leaf)
    regulariser.backward(Batch(model=model, images=x, labels=y))
    weights = model[3].weight
    found = weights.grad[1, 7].item()

    def value(delta: float) -> float:
        """The objective with z held where it was, as the regulariser does."""
        with torch.no_grad():
            weights[1, 7] += delta
        here, there = x.clone().requires_grad_(), (x + step_along(z, 0.2)).requires_grad_()
        (g0,) = torch.autograd.grad(loss_at(here) * len(x), here)
        (g1,) = torch.autograd.grad(loss_at(there) * len(x), there)
        total = loss_at(x) + 3.0 * (g1 - g0).flatten(1).square().sum(1).mean()
        with torch.no_grad():
            weights[1, 7] -= delta
        return total.item()

    assert found == pytest.approx((value(1e-5) - value(-1e-5)) / 2e-5, rel=1e-5)


def test_length_of_the_step_is_the_same_a_pixel_at_every_resolution() -> None:
    for side in (4, 16, 64):
        torch.manual_seed(side)
        step = step_along(torch.randn(3, 3, side, side, dtype=torch.float64), 0.01)
        rms = step.square().mean((1, 2, 3)).sqrt()
        torch.testing.assert_close(rms, torch.full((3,), 0.01, dtype=torch.float64))


def test_an_image_without_gradient_stays_where_it_is() -> None:
    assert step_along(torch.zeros(2, 1, 3, 3), 0.5).abs().max() == 0


@pytest.mark.parametrize("size", [1e-10, 1e-22, 1e-27, 1e-35, 1e30])
def test_the_step_has_its_length_whatever_the_gradients(size: float) -> None:
    """Of a confident network they are so small that their squares are 0 in float32."""
    torch.manual_seed(0)
    shape = torch.randn(4, 3, 8, 8)
    step = step_along(size * shape, 0.002)
    assert step.square().mean((1, 2, 3)).sqrt().allclose(torch.tensor(0.002), rtol=1e-4)
    assert step.allclose(step_along(shape, 0.002), rtol=1e-3, atol=1e-8)
    shape[0, 0, 0, 0] = torch.inf
    assert step_along(shape, 0.002).isfinite().all()


@pytest.mark.parametrize("kind", [FirstOrderCurvature, DoubleBackwardCurvature])
def test_second_pass_leaves_running_statistics_alone(kind: type) -> None:
    x, y = torch.rand(8, 1, 8, 8), torch.arange(8) % 4

    def after(regulariser: object) -> list[torch.Tensor]:
        model = build_model("convnet-d3-bn-small", channels=1, classes=4, resolution=8, seed=1)
        model.train()
        regulariser.backward(Batch(model=model, images=x, labels=y))  # type: ignore[attr-defined]
        norms = batch_norms(model)
        assert all(int(n.num_batches_tracked) == 1 for n in norms)
        assert all(n.momentum == 0.1 for n in norms)
        return [s for n in norms for s in (n.running_mean, n.running_var)]

    for a, b in zip(after(Plain()), after(kind(weight=1.0, h=0.1)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"kind": "curvatur", "weight": 1, "h": 1}, "Did you mean curvature"),
        ({"kind": "curvature", "weight": 1}, "h"),
        ({"kind": "curvature", "weight": "much", "h": 1}, "much"),
        ({"kind": "curvature", "weight": 1, "h": 1, "x": 2}, "x"),
        ({"kind": "curvature", "weight": 1, "h": "1/0"}, "regulariser curvature"),
        ({"kind": "curvature", "weight": 0, "h": 1}, "weight must be above 0"),
        ({"kind": "curvature", "weight": "1e-3", "h": 1}, "'1e-3' is not a fraction"),
        ({"kind": "pgd", "steps": 2.5}, "2.5 is not a whole number"),
        ({"kind": "trades", "beta": -1}, "beta must be above 0"),
    ],
)
def test_a_wrong_table_is_told_in_one_line(words: dict, said: str) -> None:
    with pytest.raises(GuardbenchError, match=said) as caught:
        build_regulariser(words, LINF)
    assert "\n" not in str(caught.value)


def test_a_fraction_is_read_exactly() -> None:
    regulariser = build_regulariser({"kind": "curvature", "weight": 1, "h": "0.51/255"}, LINF)
    assert regulariser == FirstOrderCurvature(weight=1.0, h=0.002)


@pytest.mark.parametrize("weight", [5e-5, 2.3e-5, 1e-12, 100])
def test_a_number_is_taken_as_it_is_however_small(weight: float) -> None:
    """Python writes those below 1e-4 with an exponent, which no fraction has."""
    assert build_regulariser({"kind": "curvature", "weight": weight, "h": 1}, LINF).weight == weight
