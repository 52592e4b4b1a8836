"""Curvature, measured: against exact Hessians, quadratics known in closed form, constructed features."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from statistics import fmean

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

from guardbench.attacks.pgd import PGD
from guardbench.classifiers import Source
from guardbench.cli import app
from guardbench.cli.diagnose import named_apart, spread_over
from guardbench.curvature import (
    Bound,
    TopEigenvalues,
    curvature_gains,
    first_order_gains,
    l2_radius,
    top_eigenvalues,
)
from guardbench.data.dataset import load_split
from guardbench.diagnosed import Diagnosis
from guardbench.diagnosis import (
    Measure,
    diagnose,
    load_real,
    measure,
    open_distilled,
    pgd_losses,
    pgd_of,
    terms_of,
)
from guardbench.distilled import save_distilled
from guardbench.errors import GuardbenchError
from guardbench.imported import describe
from guardbench.models import build_model, save_weights
from guardbench.progress import Progress
from guardbench.protocol import load_protocol
from guardbench.shift import class_shifts, features_of, lipschitz_of_pairs
from guardbench.threat import ThreatModel

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

        hessian = torch.autograd.functional.hessian(loss, image.flatten(), vectorize=True)
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

    def measured(rows: slice) -> TopEigenvalues:
        return top_eigenvalues(
            lambda images: F.cross_entropy(net(images), y[rows], reduction="none"), x[rows]
        )

    together = measured(slice(None))
    apart = [measured(slice(i, i + 1)) for i in range(9)]
    torch.testing.assert_close(
        together.values, torch.cat([one.values for one in apart]), rtol=1e-12, atol=1e-14
    )
    assert together.iterations.tolist() == [int(one.iterations) for one in apart]
    assert together.iterations.unique().numel() > 2


def test_the_bound_of_a_convex_quadratic_is_reached_where_the_gradient_is_zero() -> None:
    """`1/2 d^T H d` at d = 0: standing at the far end of the first eigenvector, the loss is the bound."""
    spectrum = torch.linspace(0.5, 4, 16).double()
    threat = ThreatModel("l2", Fraction(3, 10))
    rho = l2_radius(threat, 16)
    losses, _ = quadratic(spectrum, torch.zeros(16, dtype=torch.float64))
    x = torch.full((1, 1, 4, 4), 0.5, dtype=torch.float64)
    (gain,) = curvature_gains(top_eigenvalues(losses, x, tolerance=1e-8).values, rho).tolist()
    bound = Bound(clean=float(losses(x)), first_order=0.0, curvature=gain)
    hessian = torch.autograd.functional.hessian(
        lambda d: losses(d.view(1, 1, 4, 4)).sum(), x.flatten()
    )
    worst = torch.linalg.eigh(hessian).eigenvectors[:, -1].view_as(x)
    assert float(losses(x + rho * worst)) == pytest.approx(bound.paper, rel=1e-9)
    assert bound.paper == pytest.approx(0.3**2 / 2 * 4, rel=1e-9)
    torch.manual_seed(0)
    others = torch.randn(500, 1, 4, 4, dtype=torch.float64)
    others *= rho / others.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    assert float(losses(x + others).max()) < bound.paper


def test_with_a_gradient_only_the_bound_that_has_the_first_order_holds() -> None:
    """A gradient along the first eigenvector: the loss equals the second-order bound."""
    threat = ThreatModel("l2", Fraction(1, 5))
    slope = torch.zeros(4, dtype=torch.float64)
    slope[2] = 0.7

    def losses(images: Tensor) -> Tensor:
        moved = (images - 0.5).flatten(1)
        return (moved.square() * torch.tensor([0.1, 0.2, 3.0, 0.4])).sum(1) / 2 + moved @ slope

    x = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(losses(leaf).sum(), leaf)
    bound = Bound(
        clean=float(losses(x)),
        first_order=float(first_order_gains(gradient, threat)),
        curvature=float(curvature_gains(top_eigenvalues(losses, x, tolerance=1e-9).values, 0.2)),
        shift=0.25,
    )
    far = x.clone()
    far[0, 0, 1, 0] += 0.2
    adversarial = float(losses(far)) + bound.shift
    assert adversarial == pytest.approx(bound.second_order, rel=1e-6)
    assert adversarial > bound.paper + 0.1


def test_radii_and_dual_norms() -> None:
    gradient = torch.tensor([[[[3.0, -4.0]]]])
    for norm, rho, gain in (("linf", 0.5 * 2**0.5, 3.5), ("l2", 0.5, 2.5), ("l1", 0.5, 2.0)):
        threat = ThreatModel(norm, Fraction(1, 2))
        assert l2_radius(threat, 2) == pytest.approx(rho)
        assert float(first_order_gains(gradient, threat)) == pytest.approx(gain)
    assert curvature_gains(torch.tensor([-5.0, 2.0]), 3.0).tolist() == [0.0, 9.0]


def logistic() -> tuple[nn.Module, Tensor, Tensor]:
    """A linear network of two classes, in float32, whose every term is known in closed form."""
    torch.manual_seed(1)
    layer = nn.Linear(8, 2)
    model = nn.Sequential(nn.Flatten(), layer).eval()
    return model, 0.3 + 0.4 * torch.rand(40, 2, 2, 2), torch.randint(2, (40,))


def test_every_term_of_a_logistic_regression_is_the_one_on_paper() -> None:
    """With w the difference of the rows and p the wrong class's probability: `||grad||_q = p ||w||_q`,
    `lambda_1 = p (1 - p) ||w||_2^2`, and l-inf moves the margin by `eps ||w||_1`."""
    model, x, y = logistic()
    threat = ThreatModel("linf", Fraction(8, 255))
    how = Measure(
        threat=threat, attack=PGD(threat=threat, steps=20, step=Fraction(2, 255)),
        tolerance=1e-4, iterations=50,
    )  # fmt: skip
    heard: list[int] = []
    found = measure(model, x, y, how, told=heard.append)
    assert sum(heard) == 40
    layer = model[1]
    w = (layer.weight[0] - layer.weight[1]).detach().double()
    logits = model(x).detach().double()
    margin = (logits[:, 0] - logits[:, 1]) * (1 - 2 * y)
    p = torch.sigmoid(-margin)
    eps = 8 / 255
    wanted = {
        "loss": F.softplus(-margin),
        "adversarial_loss": F.softplus(eps * w.abs().sum() - margin),
        "gradient_l1": p * w.abs().sum(),
        "gradient_l2": p * w.norm(),
        "first_order": eps * p * w.abs().sum(),
        "eigenvalue": p * (1 - p) * w.square().sum(),
    }
    for column, values in wanted.items():
        measured = torch.tensor(getattr(found, column), dtype=torch.float64)
        torch.testing.assert_close(measured, values, rtol=1e-4, atol=1e-6)
    assert all(found.converged)
    assert found.correct == tuple((margin > 0).tolist())

    terms = terms_of(found, how, pixels=8)
    rho = eps * 8**0.5
    assert terms.clean == pytest.approx(float(wanted["loss"].mean()), rel=1e-4)
    assert terms.curvature == pytest.approx(
        rho**2 / 2 * float(wanted["eigenvalue"].mean()), rel=1e-4
    )
    assert terms.adversarial == pytest.approx(float(wanted["adversarial_loss"].mean()), rel=1e-4)
    assert terms.paper == pytest.approx(terms.clean + terms.curvature)
    assert not terms.under_paper, "a linear network's gradient does the harm, which the paper drops"
    assert terms.share_paper == 0
    assert terms.under_second_order
    assert terms.share_second_order == 1


def test_of_a_confident_network_the_curvature_is_no_rounding_error() -> None:
    """At logits this far apart float32 knows neither `1 - p` nor `p (1 - p)` to a single digit."""
    model, x, _ = logistic()
    model[1].weight.data *= 4
    model[1].bias.data = torch.tensor([9.0, -9.0])
    y = torch.zeros(len(x), dtype=torch.int64)
    threat = ThreatModel("linf", Fraction(1, 255))
    how = Measure(threat=threat, attack=PGD(threat=threat, steps=2), tolerance=1e-3, iterations=50)
    found = measure(model.eval(), x, y, how)
    logits = model(x).detach().double()
    p = torch.sigmoid(logits[:, 1] - logits[:, 0])
    assert float(p.max()) < 1e-6
    w = (model[1].weight[0] - model[1].weight[1]).detach().double()
    wanted = p * (1 - p) * w.square().sum()
    torch.testing.assert_close(torch.tensor(found.eigenvalue).double(), wanted, rtol=1e-4, atol=0)
    assert all(found.converged)
    slopes = torch.tensor(found.gradient_l2).double()
    torch.testing.assert_close(slopes, p * w.norm(), rtol=1e-4, atol=0)


def test_all_steps_are_taken_after_an_image_is_broken() -> None:
    model, x, y = logistic()
    y = model(x).argmax(1)
    threat = ThreatModel("linf", Fraction(64, 255))
    attack = PGD(threat=threat, steps=30, step=Fraction(8, 255))
    last = pgd_losses(model, attack, x, y)
    left = F.cross_entropy(model(attack.perturb(model, x, y, seed=0)), y, reduction="none").detach()
    assert bool((last >= left - 1e-6).all())
    assert float(last.mean()) > 1.2 * float(left.mean())


def test_a_protocol_s_own_pgd_is_taken() -> None:
    attack = pgd_of(load_protocol("digits"))
    assert (attack.steps, attack.step) == (100, Fraction(4, 255))
    none = load_protocol("digits")
    without = none.model_copy(update={"attacks": tuple(a for a in none.attacks if a.kind != "pgd")})
    assert pgd_of(without).steps == 40
    with pytest.raises(GuardbenchError, match="not in l1"):
        pgd_of(none.model_copy(update={"threat": none.threat.model_copy(update={"norm": "l1"})}))


def test_features_are_what_the_last_layer_takes() -> None:
    model = build_model("convnet-d3-bn-small", channels=1, classes=10, resolution=8, seed=0).eval()
    x = torch.rand(5, 1, 8, 8)
    found = features_of(model, x)
    assert found.shape == (5, 32)
    head = model.backbone.classifier
    with torch.no_grad():
        torch.testing.assert_close(head(found), model(x))
    assert not head._forward_hooks


class Scaled(nn.Module):
    """A linear layer whose output is not the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images.flatten(1)).square()


@pytest.mark.parametrize(
    "model", [nn.Sequential(nn.Conv2d(1, 3, 2), nn.Flatten()), Scaled()], ids=["conv", "scaled"]
)
def test_a_network_without_a_last_linear_layer_has_no_features(model) -> None:
    with pytest.raises(GuardbenchError, match="does not end in a linear layer"):
        features_of(model.eval(), torch.rand(2, 1, 2, 2))


def test_sigma_and_spread_of_constructed_features() -> None:
    real = torch.tensor([[0.0, 0.0], [2.0, 0.0], [5.0, 1.0], [5.0, 1.0]])
    labels = torch.tensor([0, 0, 1, 1])
    distilled = torch.tensor([[5.0, 1.0], [1.0, 3.0], [1.0, 5.0]])
    first, second = class_shifts(distilled, torch.tensor([1, 0, 0]), real, labels, ("a", "b"))
    assert (first.name, first.distilled, first.real) == ("a", 2, 2)
    assert first.sigma == pytest.approx(4.0), "from (1, 0) to (1, 4)"
    assert first.spread == pytest.approx(1.0)
    assert (second.name, second.sigma, second.spread) == ("b", 0.0, 0.0)


def test_the_steepest_secant_is_within_classes_and_leaves_out_what_coincides() -> None:
    features = torch.tensor([[0.0], [1.0], [3.0], [3.0], [3.001]])
    losses = torch.tensor([0.0, 2.0, 9.0, 5.0, 0.0])
    labels = torch.tensor([0, 0, 0, 0, 1])
    assert lipschitz_of_pairs(features, losses, labels) == pytest.approx(3.5)
    assert lipschitz_of_pairs(features[:1], losses[:1], labels[:1]) == 0.0


def digits_weights(path: Path, seed: int, *, scale: float = 1.0) -> Path:
    model = build_model("convnet-d3-bn-small", channels=1, classes=10, resolution=8, seed=seed)
    model.backbone.classifier.weight.data *= scale
    path.parent.mkdir(parents=True, exist_ok=True)
    save_weights(model, path)
    return path


def digits_set(folder: Path, *, resolution: int = 8, dataset: str = "digits", classes=None) -> Path:
    train = load_split(
        "digits", "train", resolution=8, data_dir=None, cache_dir=None, progress=Progress()
    )
    save_distilled(
        folder, images=torch.rand(10, 1, resolution, resolution), hard=torch.arange(10), teacher=None,
        dataset=dataset, ipc=1, method="random", classes=classes or train.classes, provenance={},
    )  # fmt: skip
    return folder


WORDS = ["diagnose", "--protocol", "digits", "--arch", "convnet-d3-bn-small", "--images", "12"]


def test_the_verb_prints_what_it_writes(tmp_path: Path) -> None:
    one = digits_weights(tmp_path / "a" / "student.safetensors", 0)
    two = digits_weights(tmp_path / "b" / "student.safetensors", 1, scale=30.0)
    result = CliRunner().invoke(
        app,
        [*WORDS, "--weights", str(one), "--beside", str(two), "--beside", f"same={one}",
         "--distilled", str(digits_set(tmp_path / "set")), "--output", str(tmp_path / "out")],
        env={"COLUMNS": "140"},
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    text = (tmp_path / "out" / "diagnosis.json").read_text()
    found = Diagnosis.model_validate(json.loads(text))
    assert [model.classifier.name for model in found.models] == ["a-student", "b-student", "same"]
    assert found.total == 12
    assert found.rho == pytest.approx(16 / 255 * 8)
    assert found.models[0].images == found.models[2].images
    for model in found.models:
        assert model.terms.clean == pytest.approx(fmean(model.images.loss))
        assert model.terms.adversarial == pytest.approx(fmean(model.images.adversarial_loss))
        assert model.terms.first_order == pytest.approx(16 / 255 * fmean(model.images.gradient_l1))
        assert model.terms.curvature == pytest.approx(
            found.rho**2 / 2 * fmean(model.images.eigenvalue), rel=1e-6
        )
        assert min(model.images.eigenvalue) > -1e-6, "a ReLU network's Hessian is never negative"
        shift = model.shift
        assert shift is not None
        assert shift.terms.shift == pytest.approx(shift.lipschitz * shift.sigma)
        assert shift.terms.paper == pytest.approx(model.terms.paper + shift.terms.shift)
        assert [one.distilled for one in shift.classes] == [1] * 10

    def printed(start: str) -> list[str]:
        (line,) = [line for line in result.output.splitlines() if line.startswith(start)]
        return line.removeprefix(start).split()

    terms = [model.terms for model in found.models]
    assert printed("E[l], clean loss") == [f"{one.clean:.4g}" for one in terms]
    assert printed("+ rho^2/2 E[lambda_1]") == [f"{one.curvature:.4g}" for one in terms]
    assert printed("measured under PGD") == [f"{one.adversarial:.4g}" for one in terms]
    assert printed("lambda_1: mean") == [f"{fmean(m.images.eigenvalue):.4g}" for m in found.models]
    assert printed("L sigma") == [f"{m.shift.terms.shift:.4g}" for m in found.models if m.shift]
    with Image.open(tmp_path / "out" / "diagnosis.png") as picture:
        assert picture.size[0] > 1000


def test_of_the_training_images_themselves_sigma_is_zero_in_every_class(tmp_path: Path) -> None:
    """And under each other's labels it is the distance between two classes."""
    protocol = load_protocol("digits")
    real = load_real(protocol, 12, train=True, data_dir=None, cache_dir=None, progress=Progress())
    train = real.train
    assert train is not None
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    x, y = train.batch(order), train.labels[order]
    save_distilled(
        tmp_path, images=x, hard=y, teacher=None, dataset="digits", ipc=0, method="full",
        classes=train.classes, provenance={},
    )  # fmt: skip
    distilled = open_distilled(tmp_path, protocol, train)
    model = build_model("convnet-d3-bn-small", channels=1, classes=10, resolution=8, seed=2).eval()
    imported = describe(model, name="fresh", arch="-", sha="0" * 64, weights="-", said="-")
    threat = protocol.threat.model
    how = Measure(threat=threat, attack=PGD(threat=threat, steps=1), tolerance=1e-3, iterations=1)
    means = torch.stack([features_of(model, x[y == k]).mean(0) for k in range(10)])
    for turned in (0, 1):
        of = replace(distilled, hard=(y + turned) % 10)
        shift = diagnose(imported, real, of, how, Progress()).shift
        assert shift is not None
        assert [one.real for one in shift.classes] == y.bincount().tolist()
        wanted = (means.roll(turned, 0) - means).norm(dim=1).tolist()
        sigmas = [one.sigma for one in shift.classes]
        assert sigmas == pytest.approx(wanted, rel=1e-3, abs=1e-6)
        assert shift.sigma == pytest.approx(fmean(wanted), rel=1e-3, abs=1e-6)
        assert turned == 0 or min(one.sigma / one.spread for one in shift.classes) > 0.1


def test_iterations_that_do_not_suffice_are_counted(tmp_path: Path) -> None:
    one = digits_weights(tmp_path / "student.safetensors", 0)
    words = [*WORDS, "--weights", str(one), "--iterations", "1", "--output", str(tmp_path)]
    result = CliRunner().invoke(app, words, env={"COLUMNS": "140"})
    assert result.exit_code == 0, result.output
    assert "12 of 12" in result.output
    text = (tmp_path / "diagnosis.json").read_text()
    assert not any(Diagnosis.model_validate(json.loads(text)).models[0].images.converged)


def refused(*words: object) -> str:
    result = CliRunner().invoke(app, [*WORDS, *map(str, words)])
    assert isinstance(result.exception, GuardbenchError), result.output
    return str(result.exception)


def test_bad_input_is_told_before_anything_is_measured(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("guardbench.diagnosis.measure", None)
    monkeypatch.chdir(tmp_path)
    weights = digits_weights(tmp_path / "student.safetensors", 0)
    mine = ("--weights", weights)
    assert "do not fit --arch convnet-d3" in refused(*mine, "--arch", "convnet-d3")
    assert "no such file" in refused(*mine, "--beside", "other.safetensors")
    other = digits_set(tmp_path / "other", resolution=16)
    assert "distilled from digits at 16 px" in refused(*mine, "--distilled", other)
    other = digits_set(tmp_path / "cifar", dataset="cifar10")
    assert "distilled from cifar10 at 8 px" in refused(*mine, "--distilled", other)
    turned = tuple(reversed("0123456789"))
    other = digits_set(tmp_path / "turned", classes=turned)
    assert "its classes are not those of digits" in refused(*mine, "--distilled", other)
    assert "manifest" in refused(*mine, "--distilled", tmp_path / "nothing")
    (tmp_path / "conv.py").write_text(
        "import torch\n"
        "def network():\n"
        "    return torch.nn.Sequential(torch.nn.Conv2d(1, 10, 8), torch.nn.Flatten())\n"
    )
    words = ["diagnose", "--protocol", "digits", "--python", "conv:network", "--images", "4",
             "--distilled", str(digits_set(tmp_path / "set"))]  # fmt: skip
    result = CliRunner().invoke(app, words)
    assert "does not end in a linear layer" in str(result.exception)
    assert not (tmp_path / "diagnosis").exists()


def test_names_and_sets_belong_to_one_classifier_each(tmp_path: Path) -> None:
    def source(name: str | None = None) -> Source:
        return Source(
            weights=tmp_path / "guard.pth",
            arch="resnet18",
            python=None,
            normalisation=None,
            name=name,
        )

    (tmp_path / "odd=name.pth").touch()
    found = named_apart(
        source(), ["x/other.pth", "third=x/guard.pth", str(tmp_path / "odd=name.pth")]
    )
    # Two files are called guard; the one that has no name of its own gets its folder's.
    assert [one.name for one in found] == [f"{tmp_path.name}-guard", None, "third", None]
    assert found[2].weights == Path("x/guard.pth")
    with pytest.raises(GuardbenchError, match="two classifiers are called other"):
        named_apart(source("other"), ["x/other.pth"])
    python = Source(weights=None, arch=None, python="a:b", normalisation=None)
    with pytest.raises(GuardbenchError, match="needs --weights"):
        named_apart(python, ["x/other.pth"])
    assert spread_over([], 2) == [None, None]
    assert spread_over([tmp_path], 2) == [tmp_path, tmp_path]
    with pytest.raises(GuardbenchError, match="2 folders for 3 classifiers"):
        spread_over([tmp_path, tmp_path], 3)
