"""Curvature, measured: against exact Hessians, quadratics known in closed form, constructed features."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from guardbench.curvature import (
    top_eigenvalues,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def smooth_net() -> nn.Module:
    """A network whose loss is convex around some images and concave around others."""
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 3 * 3, 8), nn.Tanh(),
        nn.Linear(8, 3),
    )  # fmt: skip
    for weight in net.parameters():
        weight.data *= 3
    return net.double().eval()


def exact_spectra(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """All eigenvalues [N, D] of each image's Hessian, ascending, by automatic differentiation."""
    rows = []
    for image, label in zip(x, y, strict=True):

        def loss(flat: Tensor, image: Tensor = image, label: Tensor = label) -> Tensor:
            return F.cross_entropy(net(flat.view(1, *image.shape)), label[None])

        hessian = torch.autograd.functional.hessian(loss, image.flatten())
        rows.append(torch.linalg.eigvalsh(hessian))
    return torch.stack(rows)


def test_eigenvalues_are_those_of_the_exact_hessian() -> None:
    net = smooth_net()
    torch.manual_seed(4)
    x, y = torch.rand(24, 1, 5, 5, dtype=torch.float64), torch.randint(3, (24,))
    spectra = exact_spectra(net, x, y)
    most_negative = spectra[:, 0].abs() > 1.5 * spectra[:, -1].abs()
    assert most_negative.sum() > 3, "the case that a plain power iteration gets wrong must occur"
    assert (~most_negative).sum() > 3

    def losses(images: Tensor) -> Tensor:
        return F.cross_entropy(net(images), y, reduction="none")

    found = top_eigenvalues(losses, x, tolerance=1e-8)
    assert bool(found.converged.all())
    torch.testing.assert_close(found.values, spectra[:, -1], rtol=1e-10, atol=1e-12)
    assert bool((found.residuals <= 1e-7 * found.values.abs().clamp_min(1)).all())

    rough = top_eigenvalues(losses, x, iterations=2)
    assert not bool(rough.converged.all())
    assert bool((rough.values <= spectra[:, -1] + 1e-12).all()), "from below, as promised"
    nearest = (spectra - rough.values[:, None]).abs().amin(1)
    assert bool((nearest <= rough.residuals + 1e-12).all()), (
        "some eigenvalue is within the residual"
    )
    assert torch.equal(rough.iterations, torch.full((24,), 2))


def quadratic(spectrum: Tensor, slope: Tensor, count: int = 5):
    """Losses `1/2 d^T H d + slope^T d`, d = x - 1/2, whose Hessian has that spectrum in a random basis."""
    torch.manual_seed(5)
    basis, _ = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), dtype=torch.float64))
    hessian = basis @ torch.diag(spectrum) @ basis.T

    def losses(images: Tensor) -> Tensor:
        moved = (images - 0.5).flatten(1)
        return ((moved @ hessian) * moved).sum(1) / 2 + moved @ slope

    side = int(len(spectrum) ** 0.5)
    return losses, torch.rand(count, 1, side, side, dtype=torch.float64)


@pytest.mark.parametrize(
    ("ends", "largest"),
    [((-9.0, 2.0), 2.0), ((-2.0, 2.0), 2.0), ((-4.0, -1.0), -1.0), ((-1.0, 0.0), 0.0)],
)
def test_of_a_quadratic_the_largest_is_found_whatever_the_smallest(ends, largest) -> None:
    spectrum = torch.cat([torch.tensor([ends[0]]), torch.linspace(*ends, 15)]).double()
    losses, x = quadratic(spectrum, torch.zeros(16, dtype=torch.float64))
    found = top_eigenvalues(losses, x, tolerance=1e-7)
    torch.testing.assert_close(
        found.values, torch.full_like(found.values, largest), atol=1e-9, rtol=0
    )
    assert bool(found.converged.all())


def test_losses_without_curvature_have_eigenvalue_zero() -> None:
    x = torch.rand(3, 1, 2, 2)
    for losses in (
        lambda images: images.flatten(1).sum(1),
        lambda images: 0 * images.square().sum((1, 2, 3)),
    ):
        found = top_eigenvalues(losses, x)
        assert torch.equal(found.values, torch.zeros(3))
        assert bool(found.converged.all())


def test_an_image_s_value_does_not_depend_on_those_beside_it() -> None:
    net = smooth_net()
    torch.manual_seed(6)
    x, y = torch.rand(9, 1, 5, 5, dtype=torch.float64), torch.randint(3, (9,))

    def measured(rows: slice) -> Tensor:
        return top_eigenvalues(
            lambda images: F.cross_entropy(net(images), y[rows], reduction="none"), x[rows]
        ).values

    together = measured(slice(None))
    apart = torch.cat([measured(slice(i, i + 1)) for i in range(9)])
    torch.testing.assert_close(together, apart, rtol=1e-12, atol=1e-14)
