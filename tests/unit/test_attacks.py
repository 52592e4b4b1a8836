"""The gradient attacks: exact answers on linear models, the ball, and freedom from the batch."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from guardbench.attacks.base import Attack, run_verified
from guardbench.attacks.build import ATTACKS as KINDS
from guardbench.attacks.build import build_attack
from guardbench.attacks.cw import CW
from guardbench.attacks.deepfool import DeepFool
from guardbench.attacks.fgsm import FGSM
from guardbench.attacks.jitter import Jitter
from guardbench.attacks.mim import MIM
from guardbench.attacks.pgd import PGD
from guardbench.attacks.spsa import SPSA
from guardbench.attacks.transfer import Transfer
from guardbench.attacks.vmifgsm import VMIFGSM
from guardbench.ball import (
    content_noise,
    length,
    project,
    random_start,
    steepest,
)
from guardbench.canonical import file_digest
from guardbench.errors import GuardbenchError
from guardbench.models import build_model, save_weights
from guardbench.threat import Norm, ThreatModel, tolerance

LINF = ThreatModel("linf", Fraction(8, 255))
L2 = ThreatModel("l2", Fraction(1, 4))


pytestmark = pytest.mark.usefixtures("one_thread")


def linear(classes: int, scale: float = 1.0, pixels: int = 36) -> nn.Module:
    torch.manual_seed(classes)
    layer = nn.Linear(pixels, classes)
    with torch.no_grad():
        layer.weight.mul_(scale)
        layer.bias.copy_(-0.5 * layer.weight.sum(1))  # grey is undecided, so labels vary
    return nn.Sequential(nn.Flatten(), layer).eval()


def small_network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    features = nn.Sequential(nn.Conv2d(1, 6, 3), nn.GELU(), nn.Flatten())
    layer = nn.Linear(6 * 16, 5)
    with torch.no_grad():
        layer.bias.copy_(-layer(features(torch.full((1, 1, 6, 6), 0.5)))[0])
    return nn.Sequential(features, layer).eval()


def images(count: int, model: nn.Module, low: float = 0.3, high: float = 0.7, seed: int = 1):
    """Images whose pixels no attack here can push to 0 or 1, with the model's own labels."""
    generator = torch.Generator().manual_seed(seed)
    x = low + (high - low) * torch.rand(count, 1, 6, 6, generator=generator)
    with torch.no_grad():
        return x, model(x).argmax(1)


def boundary(model: nn.Module, x: Tensor, y: Tensor, norm: Norm) -> Tensor:
    """Exact distance of every image to the nearest other class of a linear model, float64 [N]."""
    layer = model[1].double()
    logits = layer(x.double().flatten(1))
    gaps = logits.gather(1, y[:, None]) - logits
    between = layer.weight[y][:, None] - layer.weight[None]
    dual = between.abs().sum(2) if norm == "linf" else between.square().sum(2).sqrt()
    distance = torch.where(dual > 0, gaps / dual, torch.inf).amin(1)
    model[1].float()
    return distance


def middle_eps(distance: Tensor) -> Fraction:
    """A radius that half of the images survive and that none of them is close to."""
    ordered = distance.sort().values
    gaps = ordered.diff()[len(ordered) // 3 : -len(ordered) // 3]
    best = int(gaps.argmax()) + len(ordered) // 3
    eps = (ordered[best] + ordered[best + 1]) / 2
    assert ((distance / eps - 1).abs() > 2e-3).all()
    return Fraction(float(eps)).limit_denominator(10**6)


def exact_case(classes: int, norm: Norm, scale: float = 1.0):
    model = linear(classes, scale)
    x, y = images(60, model)
    distance = boundary(model, x, y, norm)
    eps = middle_eps(distance.detach())
    assert eps < Fraction(3, 10) or norm == "l2"  # no pixel meets 0 or 1
    return model, x, y, ThreatModel(norm, eps), distance > float(eps)


def run(attack: Attack, model: nn.Module, x: Tensor, y: Tensor, **options) -> Tensor:
    return run_verified(attack, model, x, y, seed=0, **options).robust


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_one_step_is_exact_for_two_linear_classes(norm):
    model, x, y, threat, robust = exact_case(2, norm)
    assert 0.3 < robust.float().mean() < 0.7
    assert torch.equal(run(FGSM(threat=threat), model, x, y), robust)


@pytest.mark.parametrize("classes", [2, 5, 10])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_iterative_attacks_reach_the_exact_answer_and_never_pass_it(norm, classes):
    # With steep logits the cross-entropy points at the nearest other class, so that its ascent
    # is exact; with flat ones it points between classes and may miss an image, never add one.
    for scale in (100.0, 1.0):
        model, x, y, threat, robust = exact_case(classes, norm, scale)
        options = {"threat": threat, "steps": 60, "step": threat.eps / 10}
        for attack in (PGD(**options), PGD(random_start=False, **options), MIM(**options)):
            found = run(attack, model, x, y)
            assert (found >= robust).all()
            if scale > 1 or classes == 2:
                assert torch.equal(found, robust)


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_attacks_of_the_second_row_reach_the_exact_answer_and_never_pass_it(norm, classes):
    model, x, y, threat, robust = exact_case(classes, norm, 20.0)
    # On a linear model DeepFool's first step ends on the nearest boundary, whatever its shape.
    assert torch.equal(run(DeepFool(threat=threat, overshoot=1e-3), model, x, y), robust)
    for attack in (
        VMIFGSM(threat=threat, steps=20, neighbours=2),
        Jitter(threat=threat, steps=60, step=0.1, noise=0.0),
        Jitter(threat=threat, steps=60, step=0.1),
        SPSA(threat=threat, steps=30, samples=32),
    ):
        found = run(attack, model, x, y)
        assert (found >= robust).all(), attack
        missed = (found & ~robust).sum()
        noisy = isinstance(attack, SPSA) or getattr(attack, "noise", 0) > 0
        if not noisy and classes == 2:
            assert missed == 0, attack
        elif classes > 2 or isinstance(attack, SPSA):  # of two classes, noise only goes astray
            assert missed <= 0.4 * (~robust).sum(), attack


def test_jitter_without_noise_is_ascent_of_its_own_loss():
    model = small_network()
    x, y = images(8, model)
    attack = Jitter(threat=LINF, steps=1, step=0.3, noise=0.0)
    start = random_start(x, LINF, 7).requires_grad_()
    logits = model(start)
    gap = (10 * logits / logits.abs().amax(1, keepdim=True)).softmax(1)
    loss = (gap - nn.functional.one_hot(y, 5)).norm(dim=1)  # the paper's norm, not its square
    (gradient,) = torch.autograd.grad(loss.sum(), start)
    kept = logits.argmax(1) == y
    moved = (start + 0.3 * 8 / 255 * gradient.sign()).clamp(x - 8 / 255, x + 8 / 255).clamp(0, 1)
    found = attack.perturb(model, x, y, seed=7)
    assert kept.any()
    assert found[kept].allclose(moved[kept], atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_vmifgsm_follows_the_paper_for_two_steps(norm):
    model = small_network()
    x, y = images(8, model)
    threat = ThreatModel(norm, Fraction(1, 1000))  # nothing is broken so near
    # In l2 the neighbours are as far from the iterate, over all pixels, as l-inf's in each.
    reach = 1.5e-3 if norm == "linf" else 1.5e-3 / 6
    found = VMIFGSM(threat=threat, steps=2, neighbours=3).perturb(model, x, y, seed=5)

    def gradient(at: Tensor) -> Tensor:
        at = at.detach().requires_grad_()
        loss = nn.functional.cross_entropy(model(at), y, reduction="sum")
        return torch.autograd.grad(loss, at)[0]

    def unit(values: Tensor) -> Tensor:
        return values / values.abs().sum((1, 2, 3), keepdim=True)

    def along(values: Tensor) -> Tensor:
        return (
            values.sign()
            if norm == "linf"
            else values / values.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        )

    first = gradient(x)
    around = [gradient(x + reach * content_noise(x, 5, "neighbours", 0, i)) for i in range(3)]
    variance = sum(around) / 3 - first
    momentum = unit(first)
    adv = x + 5e-4 * along(momentum)
    momentum = momentum + unit(gradient(adv) + variance)
    assert found.allclose(project(adv + 5e-4 * along(momentum), x, threat), atol=1e-7)


class Masked(nn.Module):
    """A linear model behind steps of 1/16, through which no gradient passes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model((16 * x).round() / 16 + 0 * x)


def test_transfer_breaks_a_model_that_hides_its_gradients(tmp_path):
    surrogate = build_model("convnet-d3", channels=1, classes=5, resolution=8, seed=1).eval()
    save_weights(surrogate, tmp_path / "s.safetensors")
    x = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    masked = Masked(surrogate).eval()
    with torch.no_grad():
        y = masked(x).argmax(1)
    threat = ThreatModel("linf", Fraction(1, 6))
    transfer = Transfer(
        threat=threat, weights=str(tmp_path / "s.safetensors"), arch="convnet-d3",
        sha256=file_digest(tmp_path / "s.safetensors"),
    )  # fmt: skip
    pgd = PGD(threat=threat, steps=10, step=Fraction(1, 60))
    moved, climbed = (run(attack, masked, x, y).sum() for attack in (transfer, pgd))
    assert moved < 15
    assert climbed > moved + 10
    # To the end: on the surrogate itself every image keeps moving once it is wrong.
    short, long = (
        VMIFGSM(threat=threat, leave=leave).perturb(surrogate, x, y, seed=0)
        for leave in (True, False)
    )
    loss = [nn.functional.cross_entropy(surrogate(adv), y) for adv in (short, long)]
    assert loss[1] > loss[0]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_deepfool_stands_still_where_no_gradient_leads_anywhere(norm):
    """Of a model that hides them, far from its boundary: no NaN, no image claimed."""

    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 1e3 * (2 * x.flatten(1)[:, :3]).round() + 0 * x.flatten(1)[:, :3]

    x = torch.zeros(4, 1, 2, 2)
    x[:, 0, 0, 1] = 1.0
    y = torch.ones(4, dtype=torch.int64)
    threat = ThreatModel(norm, Fraction(1, 5))
    assert torch.equal(DeepFool(threat=threat).perturb(Flat().eval(), x, y, seed=0), x)
    # A slope too small to be squared is a slope.
    model = linear(3, 1e-25)
    x, y = images(20, model)
    y = model[1](x.flatten(1)).argmax(1)
    assert (run(DeepFool(threat=ThreatModel(norm, Fraction(2))), model, x, y).sum()) < 5


def test_restarts_reach_only_survivors_and_break_no_fewer():
    model = small_network()
    x, y = images(40, model, 0.0, 1.0)
    counts = [
        run(PGD(threat=LINF, steps=3, step=Fraction(4, 255), restarts=n), model, x, y).sum()
        for n in (1, 4)
    ]
    assert counts[1] <= counts[0] < 40


def cw_reference(model: nn.Module, x: Tensor, y: Tensor, c: float, steps: int, lr: float):
    """Section V with torch's own Adam: nothing leaves, the smallest adversarial l2 is kept."""
    w = torch.atanh((2 * x - 1) * (1 - 1e-6)).requires_grad_()
    optimiser = torch.optim.Adam([w], lr=lr)
    best, first = torch.full((len(x),), torch.inf), torch.full((len(x),), torch.inf)
    for step in range(steps + 1):
        adv = (torch.tanh(w) + 1) / 2
        logits = model(adv)
        squared = (adv - x).square().flatten(1).sum(1)
        wrong = logits.argmax(1) != y
        found = squared.detach().sqrt()
        first = torch.where(wrong & first.isinf(), found, first)
        best = torch.where(wrong, torch.minimum(best, found), best)
        if step < steps:
            others = logits - 1e9 * nn.functional.one_hot(y, logits.shape[1])
            f = (logits.gather(1, y[:, None])[:, 0] - others.amax(1)).clamp_min(0)
            optimiser.zero_grad()
            (squared.sum() + c * f.sum()).backward()
            optimiser.step()
    return best, first


def test_cw_agrees_with_a_plain_loop_over_all_steps():
    model = small_network()
    x, y = images(60, model, 0.0, 1.0)
    x[:, :, 0] = 0.0  # border pixels are infinite in tanh space
    y = model(x).argmax(1)
    outcome = run_verified(CW(c=1.0, steps=20), model, x, y, seed=0)
    best, first = cw_reference(model, x, y, c=1.0, steps=20, lr=0.01)
    assert 5 < (~outcome.robust).sum() < 55
    assert torch.equal(outcome.robust, best.isinf())
    broken = ~outcome.robust
    assert outcome.distance[broken].float().allclose(first[broken], atol=1e-5)


ATTACKS: list[Attack] = [
    FGSM(threat=LINF),
    FGSM(threat=L2),
    PGD(threat=LINF, steps=5, step=Fraction(1, 50), restarts=2),
    PGD(threat=L2, steps=5, step=Fraction(1, 5)),
    MIM(threat=LINF, steps=5, step=Fraction(1, 50)),
    MIM(threat=L2, steps=5, step=Fraction(1, 5)),
    VMIFGSM(threat=LINF, steps=3, neighbours=2),
    VMIFGSM(threat=L2, steps=3, neighbours=2),
    Jitter(threat=LINF, steps=5, step=0.6),
    Jitter(threat=L2, steps=5, step=0.8),
    CW(c=0.02, steps=5),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
@given(seed=st.integers(0, 2**62), scale=st.sampled_from([1e-6, 1.0, 1e4]))
@settings(max_examples=12, deadline=None)
def test_never_leaves_the_ball_or_the_range(attack, seed, scale):
    model = linear(4, scale)
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(6, 1, 6, 6, generator=generator).mul(1.4).sub(0.2).clamp(0, 1)
    y = torch.randint(4, (6,), generator=generator)
    adv = attack.perturb(model, x.clone(), y, seed=seed)
    assert adv.shape == x.shape
    assert adv.dtype == x.dtype
    assert float(adv.min()) >= 0
    assert float(adv.max()) <= 1
    if attack.threat is not None:
        distance = length(adv.double() - x.double(), attack.threat.norm)
        assert (distance <= float(attack.threat.eps) + tolerance(attack.threat, 36)).all()


@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
def test_an_image_does_not_feel_its_batch(attack):
    model = small_network()
    x, y = images(30, model, 0.0, 1.0)
    y[::3] = (y[::3] + 1) % 5  # a third is wrong already
    whole = attack.perturb(model, x, y, seed=3)
    for order in (torch.arange(30).flip(0), torch.arange(30)[::2], torch.tensor([7])):
        part = attack.perturb(model, x[order], y[order], seed=3)
        assert part.allclose(whole[order], atol=1e-5)
    outcomes = [run_verified(attack, model, x, y, seed=3, batch_size=size) for size in (1, 7, 64)]
    for outcome in outcomes:
        assert torch.equal(outcome.robust, outcomes[0].robust)
        assert not outcome.robust[::3].any()
        assert outcome.distance.allclose(outcomes[0].distance, atol=1e-5)


@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
def test_leaves_the_world_as_it_was(attack):
    model = small_network()
    x, y = images(5, model)
    before, random, weights = x.clone(), torch.get_rng_state(), [*model.state_dict().values()]
    copies = [weight.clone() for weight in weights]
    attack.perturb(model, x, y, seed=0)
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(*pair) for pair in zip(weights, copies, strict=True))
    assert all(weight.grad is None for weight in model.parameters())


def test_random_start_fills_the_ball_and_follows_seed_and_restart():
    x = torch.full((200, 1, 4, 4), 0.5)
    x += torch.linspace(0, 1e-3, 200)[:, None, None, None]  # equal images share their noise
    for threat in (LINF, L2):
        eps = float(threat.eps)
        noise = random_start(x, threat, seed=1) - x
        distance = length(noise, threat.norm)
        assert eps * 0.97 < distance.max() <= eps * 1.0001
        assert abs(float(noise.mean())) < eps / 20
        # Of a uniform point of the 16-dimensional ball, both norms share this quantile.
        assert 0.35 < (distance < eps * 0.5 ** (1 / 16)).float().mean() < 0.65
        assert not random_start(x, threat, seed=2).allclose(x + noise)
        assert not random_start(x, threat, seed=1, restart=1).allclose(x + noise)


def test_steps_survive_gradients_too_small_to_square():
    tiny = torch.full((1, 1, 2, 2), 1e-30)
    assert steepest(tiny, "l2").allclose(torch.full((1, 1, 2, 2), 0.5))
    assert torch.equal(steepest(tiny * 0, "l2"), tiny * 0)
    broken = torch.tensor(
        [[[[3.0, torch.nan], [0.0, 4.0]]], [[[torch.inf, 1.0], [0.0, -torch.inf]]]]
    )
    for norm in ("linf", "l2"):
        step = steepest(broken, norm)
        assert step.isfinite().all()
        assert step[0, 0, 0, 1] == 0, "no step from a NaN"
        assert step[1, 0, 0, 0] > 0 > step[1, 0, 1, 1]


class Strict(nn.Module):
    """A model of somebody's that refuses what is no image."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.asked = model, 0

    def forward(self, x: Tensor) -> Tensor:
        low, high = (float(value) for value in x.detach().aminmax())
        assert low >= 0, low
        assert high <= 1, high
        self.asked += 1
        return self.model(x)


SHORT: dict[str, dict[str, object]] = {
    "apgd": {"steps": 10},
    "fab": {"steps": 10},
    "mim": {"steps": 5, "step": "1/50"},
    "pgd": {"steps": 5, "step": "1/50"},
    "spsa": {"steps": 3, "samples": 8},
    "square": {"queries": 50},
    "vmifgsm": {"steps": 3, "neighbours": 3},
}


@pytest.mark.parametrize("threat", [LINF, ThreatModel("l2", Fraction(2))], ids=str)
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_attack_asks_the_model_about_images_alone(kind, threat, tmp_path):
    params = {**SHORT.get(kind, {})}
    if kind == "transfer":
        surrogate = build_model("convnet-d3", channels=1, classes=5, resolution=8, seed=1)
        save_weights(surrogate, tmp_path / "s.safetensors")
        params = {"weights": str(tmp_path / "s.safetensors"), "arch": "convnet-d3",
                  "sha256": file_digest(tmp_path / "s.safetensors")}  # fmt: skip
    model = Strict(linear(5, pixels=64)).eval()
    x = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)).mul(1.4).sub(0.2)
    x = x.clamp(0, 1)
    with torch.no_grad():
        y = model(x).argmax(1)
    run(build_attack(kind, threat, params), model, x, y)
    assert model.asked > 2


class Detached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach().flatten(1)[:, :3]


def test_a_model_without_gradient_is_named():
    x = torch.rand(2, 1, 6, 6)
    with pytest.raises(GuardbenchError, match="no gradient reaches the images"):
        FGSM(threat=LINF).perturb(Detached().eval(), x, torch.zeros(2, dtype=torch.int64), seed=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FGSM(threat=ThreatModel("l1", Fraction(1))), "FGSM attacks in linf and l2"),
        (lambda: PGD(threat=ThreatModel("l1", Fraction(1))), "PGD attacks in linf and l2"),
        (lambda: MIM(threat=ThreatModel("l1", Fraction(1))), "MIM attacks in linf and l2"),
        (
            lambda: DeepFool(threat=ThreatModel("l1", Fraction(1))),
            "DeepFool attacks in linf and l2",
        ),
        (lambda: DeepFool(threat=LINF, overshoot=-1.0), "overshoot not negative"),
        (lambda: VMIFGSM(threat=LINF, neighbours=0), "must be positive"),
        (lambda: Jitter(threat=LINF, noise=-0.1), "noise not negative"),
        (lambda: SPSA(threat=LINF, delta=0.0), "must be positive"),
        (lambda: CW(threat=LINF), "unbounded"),
        (lambda: PGD(threat=LINF, steps=0), "must be positive"),
        (lambda: PGD(threat=LINF, step=Fraction(0)), "must be positive"),
        (lambda: PGD(threat=LINF, random_start=False, restarts=2), "repeat one search"),
        (lambda: MIM(threat=LINF, decay=-1.0), "decay not negative"),
        (lambda: CW(c=0.0), "must be positive"),
    ],
)
def test_settings_that_cannot_work_are_refused(make, message):
    with pytest.raises(GuardbenchError, match=message):
        make()


@pytest.mark.parametrize("c", [0.2, 0.5])
def test_cw_on_a_linear_model_breaks_what_the_formula_says(c):
    """`|d|^2 + c f` of two classes with weights' difference w has its minimum at `c |w| / 2` along w.

    So exactly the images nearer to the boundary than that are broken; Adam's momentum overshoots by less
    than half.
    """
    torch.manual_seed(0)
    layer = nn.Linear(36, 2)
    with torch.no_grad():
        difference = layer.weight[0] - layer.weight[1]
        layer.bias.copy_(-0.5 * layer.weight.sum(1))  # grey lies on the boundary
    exact = torch.linspace(0.02, 0.5, 80)
    x = 0.5 + exact[:, None] * difference / difference.norm()
    x = x.detach().view(80, 1, 6, 6)
    model = nn.Sequential(nn.Flatten(), layer).eval()
    outcome = run_verified(CW(c=c, steps=200), model, x, torch.zeros(80, dtype=torch.int64), seed=0)
    reach = c * float(difference.norm()) / 2
    assert not outcome.robust[exact < 0.98 * reach].any()
    assert outcome.robust[exact > 1.5 * reach].all()
    broken = ~outcome.robust
    assert 10 < broken.sum() < 60
    assert (outcome.distance[broken] > (1 - 1e-4) * exact[broken]).all()
