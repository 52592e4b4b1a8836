"""Each check has a model that is built to be caught by it, and an honest one that is not."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F

from guardbench.attacks.base import run_batch, run_verified
from guardbench.attacks.build import build_attack
from guardbench.attacks.fab import FAB
from guardbench.attacks.pgd import PGD
from guardbench.attacks.search import answering_at_random
from guardbench.checks import (
    COMPARED,
    IMAGES,
    MEANING,
    UNSTEADY,
    _first_look,
    alone,
    compared,
    flags,
    inspect,
    judge,
)
from guardbench.errors import GuardbenchError
from guardbench.processes import Processes
from guardbench.progress import Progress
from guardbench.protocol import AttackSpec, load_protocol
from guardbench.records import Check, Outcome, SeedRun
from guardbench.runtime import Run
from guardbench.scoring import Costs, score
from guardbench.scoring_plan import plan_scoring
from guardbench.threat import ThreatModel

THREAT = ThreatModel("linf", Fraction(16, 255))


@pytest.fixture(scope="module")
def honest() -> tuple[nn.Module, Tensor, Tensor]:
    """A linear classifier of digits, and images that it gets right."""
    digits = load_digits()
    pixels = digits.images.reshape(len(digits.images), -1) / 16
    fitted = LogisticRegression(C=0.05, max_iter=300).fit(pixels[:900], digits.target[:900])
    layer = nn.Linear(64, 10)
    layer.weight.data = torch.tensor(fitted.coef_, dtype=torch.float32)
    layer.bias.data = torch.tensor(fitted.intercept_, dtype=torch.float32)
    model = nn.Sequential(nn.Flatten(), layer).eval()
    x = torch.tensor(pixels[900:1100], dtype=torch.float32).view(-1, 1, 8, 8)
    y = torch.tensor(digits.target[900:1100], dtype=torch.int64)
    with torch.no_grad():
        right = model(x).argmax(1) == y
    return model, x[right], y[right]


class Wrapped(nn.Module):
    """The honest classifier with something done before it and after it."""

    def __init__(self, model, before=lambda x: x, after=lambda z: z) -> None:
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, images: Tensor) -> Tensor:
        return self.after(self.model(self.before(images)))


class Backwards(torch.autograd.Function):
    """The identity with the sign of its gradient turned: every attack climbs the wrong way."""

    @staticmethod
    def forward(_ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_ctx, *gradients: Tensor) -> Tensor:
        return -gradients[0]


CAUGHT = {
    "random-answers": lambda m: Wrapped(m, after=lambda z: z + 0.1 * torch.randn_like(z)),
    "batch-dependence": lambda m: Wrapped(m, after=lambda z: z - z.mean(0)),
    "probabilities": lambda m: Wrapped(m, after=lambda z: z.softmax(1)),
    "zero-gradients": lambda m: Wrapped(m, before=lambda x: (8 * x).round() / 8),
    "unbounded": lambda m: Wrapped(m, before=Backwards.apply),
}


@pytest.mark.parametrize("name", CAUGHT)
def test_a_model_built_to_be_caught_is_caught(honest, name) -> None:
    model, x, y = honest
    found = inspect(CAUGHT[name](model).eval(), x, y, THREAT, seed=0)
    assert found[name].flagged
    assert found[name].value > 0.9
    assert found[name].images == IMAGES


class Shattered(torch.autograd.Function):
    """The identity with random signs for its gradient's."""

    @staticmethod
    def forward(_ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_ctx, *gradients: Tensor) -> Tensor:
        return gradients[0].abs() * torch.empty_like(gradients[0]).uniform_(-1, 1).sign()


@pytest.mark.parametrize(
    "threat", [THREAT, ThreatModel("l2", Fraction(1, 2)), ThreatModel("l1", Fraction(2))], ids=str
)
def test_gradients_that_lead_nowhere_leave_images_standing_without_a_bound(honest, threat) -> None:
    """A start at random in the whole cube would break nine of ten by itself, which is chance."""
    model, x, y = honest
    torch.manual_seed(0)
    found = inspect(Wrapped(model, before=Shattered.apply).eval(), x, y, threat, seed=0)
    assert found["unbounded"].flagged
    assert found["unbounded"].value > 0.6
    assert not found["random-answers"].flagged


@pytest.mark.parametrize("last", [-1e4, -1e9, -math.inf])
@pytest.mark.parametrize("name", ["random-answers", "batch-dependence", None])
def test_a_masked_class_hides_no_unsteady_answers(honest, name: str | None, last: float) -> None:
    model, x, y = honest
    made = CAUGHT[name](model) if name else model
    masked = Wrapped(made, after=lambda z: torch.cat([z, z.new_full((len(z), 1), last)], 1))
    found = inspect(masked.eval(), x, y, THREAT, seed=0)
    wanted = inspect(made.eval(), x, y, THREAT, seed=0)
    assert [found[one] for one in UNSTEADY] == [wanted[one] for one in UNSTEADY]
    assert name is None or found[name].value > 0.9


def test_an_offset_of_all_logits_hides_no_unsteady_answers(honest) -> None:
    model, x, y = honest
    shifted = Wrapped(CAUGHT["random-answers"](model), after=lambda z: z + 1e4)
    assert inspect(shifted.eval(), x, y, THREAT, seed=0)["random-answers"].value > 0.9
    steady = Wrapped(model, after=lambda z: z + 1e4)
    assert not inspect(steady.eval(), x, y, THREAT, seed=0)["random-answers"].flagged


def test_saturated_logits_and_detached_inputs_leave_no_gradient(honest) -> None:
    model, x, y = honest
    loud = Wrapped(model, after=lambda z: 1e3 * z).eval()
    assert inspect(loud, x, y, THREAT, seed=0)["zero-gradients"].value > 0.5
    # sqrt has no slope at 0, so every gradient is NaN while every answer is finite.
    broken = Wrapped(model, before=lambda x: x + (x - x.detach()).abs().sqrt()).eval()
    assert inspect(broken, x, y, THREAT, seed=0)["zero-gradients"].value == 1
    cut = Wrapped(model, before=lambda x: x.detach()).eval()
    found = inspect(cut, x, y, THREAT, seed=0)
    assert found["zero-gradients"].value == 1
    assert "unbounded" not in found


def test_a_label_whose_probability_rounds_to_one_is_told(honest) -> None:
    """From a margin of 16.6 on nothing lowers the label's logit, while other classes have a gradient."""
    model, x, y = honest
    with torch.no_grad():
        top = model(x).topk(2, 1).values
        margin = top[:, 0] - top[:, 1]
        loud = 40 / float(margin.median())
    some = ((loud * margin > 20) & (loud * margin < 60)).nonzero().squeeze(1)
    assert len(some) > 30
    scaled = Wrapped(model, after=lambda z: loud * z).eval()
    point = x[some].requires_grad_()
    F.cross_entropy(scaled(point), y[some], reduction="sum").backward()
    assert point.grad.flatten(1).any(1).all()
    found = inspect(scaled, x[some], y[some], THREAT, seed=0)
    assert (found["saturated"].value, found["saturated"].flagged) == (1.0, True)
    assert not found["zero-gradients"].flagged
    calm = (loud / 4 * margin < 15).nonzero().squeeze(1)
    quiet = Wrapped(model, after=lambda z: loud / 4 * z).eval()
    assert inspect(quiet, x[calm], y[calm], THREAT, seed=0)["saturated"].value == 0


def test_averaged_probabilities_are_probabilities(honest) -> None:
    """Of saturated networks their average exceeds 1, by its rounding."""
    model, x, y = honest

    def averaged(z: Tensor) -> Tensor:
        return sum(0.1 * ((1e3 + draw) * z).softmax(1) for draw in range(10))

    mixed = Wrapped(model, after=averaged).eval()
    with torch.no_grad():
        assert float(mixed(x).max()) > 1
    check = inspect(mixed, x, y, THREAT, seed=0)["probabilities"]
    assert (check.value, check.flagged) == (1.0, True)
    higher = Wrapped(model, after=lambda z: 1.0005 * (1e3 * z).softmax(1)).eval()
    assert inspect(higher, x, y, THREAT, seed=0)["probabilities"].value < 0.5


class OneOfTwo(nn.Module):
    """Two networks of which a coin picks one, a pass."""

    def __init__(self, model: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.model, self.other = model, other

    def forward(self, images: Tensor) -> Tensor:
        return (self.model if float(torch.rand(())) < 0.5 else self.other)(images)


def test_a_coin_a_pass_is_told_whatever_it_shows(honest) -> None:
    model, x, y = honest
    other = Wrapped(model, after=lambda z: 1.1 * z).eval()
    for seed in range(20):
        torch.manual_seed(seed)
        looked = _first_look(OneOfTwo(model, other).eval(), x[:IMAGES], y[:IMAGES])
        assert looked["random-answers"].float().mean() > 0.5


class OffTheGrid(nn.Module):
    """Steady on images of whole sixteenths, as all clean ones are; elsewhere a coin picks a network."""

    def __init__(self, model: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.model, self.coin = model, OneOfTwo(model, other)

    def forward(self, images: Tensor) -> Tensor:
        clean = ((16 * images) % 1 == 0).flatten(1).all(1)
        return torch.where(clean[:, None], self.model(images), self.coin(images))


@pytest.mark.parametrize(("kind", "tries"), [(OneOfTwo, 1), (OffTheGrid, 2)])
def test_a_model_that_answers_at_random_is_scored_and_flagged(
    honest, tmp_path, kind, tries
) -> None:
    """Where the checks could not see it, the same command goes on when it is given again."""
    model, x, y = honest
    turned = Wrapped(model, before=lambda x: x.flip(3)).eval()
    with torch.no_grad():
        both = turned(x).argmax(1) == y
    x, y = x[both][:40], y[both][:40]
    coin = kind(model, turned).eval()
    for _ in range(tries - 1):
        with pytest.raises(GuardbenchError, match=r"in two scorings .* Run the same command again"):
            scored(coin, x, y, tmp_path)
    found = scored(coin, x, y, tmp_path)
    raised = [
        line.split(":")[0] for line in flags((found,)) if line.startswith(("random", "unsteady"))
    ]
    assert raised == (["random-answers"] if tries == 1 else ["unsteady"])
    assert scored(coin, x, y, tmp_path) == found


class Rough(nn.Module):
    """Wrong only in a narrow well of the first pixel, while the slope leads to the other side."""

    def __init__(self, clean: Tensor) -> None:
        super().__init__()
        self.clean = clean

    def forward(self, images: Tensor) -> Tensor:
        t = (images[:, 0, 0, 0] - self.clean) / float(THREAT.eps)
        margin = 1 + 0.3 * t - 3 * torch.exp(-(((t - 0.6) / 0.15) ** 2))
        # At the ball's edge and beyond it is honest, so only the restarts tell.
        margin = torch.where(t.abs() > 1.01, -torch.ones_like(margin) - t, margin)
        return torch.stack([margin, *[torch.zeros_like(margin)] * 3], 1)


def test_a_surface_too_rough_for_one_start_is_caught(honest) -> None:
    del honest
    x, y = torch.full((64, 1, 8, 8), 0.5), torch.zeros(64, dtype=torch.int64)
    x += 1e-4 * torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
    x[:, 0, 0, 0] = 0.5
    found = inspect(Rough(torch.tensor(0.5)).eval(), x, y, THREAT, seed=0)
    assert found["restarts"].flagged
    assert found["restarts"].value > 0.3
    assert not found["zero-gradients"].flagged


@pytest.mark.parametrize(
    ("threat", "checks"),
    [(THREAT, 7), (ThreatModel("l2", Fraction(1, 2)), 7), (ThreatModel("l1", Fraction(2)), 6)],
    ids=str,
)
def test_an_honest_model_raises_nothing(honest, threat, checks) -> None:
    model, x, y = honest
    found = inspect(model, x, y, threat, seed=0)
    assert list(found) == list(MEANING)[:checks]
    assert not [name for name, check in found.items() if check.flagged]
    assert inspect(model, x[:0], y[:0], threat, seed=0) == {}
    assert len(inspect(model, x[:1], y[:1], threat, seed=0)) == checks


class Small(nn.Module):
    """A model on a device that holds ten images, or fewer with a gradient."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > (5 if images.requires_grad else 10):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is")
        return self.model(images)


@pytest.mark.parametrize("name", [None, "batch-dependence", "zero-gradients"])
def test_where_memory_runs_out_the_checks_find_the_same(honest, name) -> None:
    model, x, y = honest
    model = CAUGHT[name](model) if name else model
    found = inspect(Small(model).eval(), x, y, THREAT, seed=0)
    wanted = inspect(model.eval(), x, y, THREAT, seed=0)
    assert found.keys() == wanted.keys()
    flagged = [[name for name, check in some.items() if check.flagged] for some in (found, wanted)]
    assert flagged[0] == flagged[1]
    if name:
        assert name in flagged[0]
        return
    assert found == wanted


class OnTheGrid(torch.autograd.Function):
    """The identity with a true gradient at images of whole sixteenths alone, and a turned one elsewhere.

    FGSM, whose only gradient is the clean image's, breaks what attacks that start beside it miss.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(((16 * x) % 1 == 0).flatten(1).all(1).view(-1, 1, 1, 1))
        return x.clone()

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> Tensor:
        (true,) = ctx.saved_tensors
        return torch.where(true, gradients[0], -gradients[0])


@pytest.mark.parametrize(
    ("name", "before", "columns"),
    [
        ("black-box", Backwards.apply, ("pgd", "fgsm", "square")),
        ("single-step", OnTheGrid.apply, ("pgd", "fgsm")),
        (None, lambda x: x, ("pgd", "fgsm", "square")),
    ],
)
def test_attacks_that_should_be_milder_and_are_not_catch_a_model_built_so(
    honest, name: str | None, before, columns: tuple[str, ...]
) -> None:
    model, x, y = honest
    model, protocol = Wrapped(model, before=before).eval(), load_protocol("digits")
    short = {"pgd": {"steps": 10, "step": "4/255"}, "square": {"queries": 300}}
    outcomes = {}
    for spec in protocol.attacks:
        if spec.kind in columns:
            attack = build_attack(spec.kind, THREAT, short.get(spec.kind, {}))
            robust = run_verified(attack, model, x[:60], y[:60], seed=0).robust
            outcomes[spec.name] = Outcome.from_flags(robust.tolist())
    run = SeedRun(seed=0, clean=Outcome.from_flags([True] * 60), attacks=outcomes)
    raised = [check for check, found in judge(run, protocol).items() if found.flagged]
    assert raised == ([] if name is None else [name])


class Aside(nn.Module):
    """Linear and honest, but cross-entropy climbs the nearest class, which no image in the ball reaches.

    The other class is a step the other way: half of Square's stripes are there, and a targeted attack.
    """

    def forward(self, images: Tensor) -> Tensor:
        way = (images[:, 0, :, 0].mean(1) - 0.5) / float(THREAT.eps)
        none = torch.zeros_like(way)
        return torch.stack([none, 0.9 * way - 1, -15.5 * way - 14, none - 40], 1)


def greys(count: int) -> tuple[Tensor, Tensor]:
    """Images that are nearly alike, and the label 0."""
    noise = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return 0.5 + 1e-4 * noise, torch.zeros(count, dtype=torch.int64)


def test_an_honest_model_that_needs_a_targeted_attack_is_not_accused() -> None:
    x, y = greys(IMAGES)
    found = inspect(Aside().eval(), x, y, THREAT, seed=0, compare=COMPARED.keys())
    assert {*found} >= COMPARED.keys()
    assert not [name for name, check in found.items() if check.flagged]


def scored(model: nn.Module, x: Tensor, y: Tensor, folder, square: int = 60) -> SeedRun:
    """What `evaluate` stores of a model: PGD, FGSM and Square on all images, and the checks."""
    base = load_protocol("digits")
    params = {"pgd": {"steps": 20, "step": "4/255"}, "fgsm": {}, "square": {"queries": square}}
    columns = tuple(
        spec.model_copy(update={"params": params[spec.kind], "images_per_seed": None})
        for spec in base.attacks
        if spec.kind in params
    )
    test = base.test.model_copy(update={"count": len(x), "sha256": None})
    protocol = base.model_copy(update={"attacks": columns, "test": test})
    run = Run(accelerator=Accelerator(cpu=True), workspace=folder, seed=0, progress=Progress())
    plan = plan_scoring(
        run, protocol, seed=0, position=0, subject="s", test_digest="d", engine="guardbench"
    )
    return score(run, protocol, plan, model, x, y, Costs())


def test_a_trained_network_raises_nothing(tmp_path) -> None:
    digits = load_digits()
    x = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)
    y = torch.tensor(digits.target, dtype=torch.int64)
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.Flatten()
    model = nn.Sequential(*layers, nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        some = torch.randint(1200, (100,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[some]), y[some]).backward()
        optimizer.step()
    found = scored(model.eval(), x[1200:1500], y[1200:1500], tmp_path)
    assert found.clean.correct > 240
    assert {*found.checks} == {*MEANING} - {"unsteady"}, (
        "which is there only where an attack found it"
    )
    assert flags((found,)) == ()


@pytest.mark.parametrize("way", [(True, "black-box"), (False, None)], ids=str)
def test_what_square_alone_breaks_is_attacked_by_targets_before_it_is_held_against_a_model(
    honest, tmp_path, monkeypatch, way
) -> None:
    """Once: what is finished is read."""
    masked, name = way
    x, y = greys(100)
    model = Aside().eval()
    if masked:
        model, x, y = honest
        # What a step leads to is as far as before, but no gradient says where.
        model = Wrapped(model, before=lambda x: (8 * x).round() / 8 + 0 * x).eval()
        with torch.no_grad():
            right = model(x).argmax(1) == y
        x, y = x[right][:100], y[right][:100]
    met, real = [], FAB.perturb

    def counted(self, model, x, y, *, seed):
        met.append(len(x))
        return real(self, model, x, y, seed=seed)

    monkeypatch.setattr(FAB, "perturb", counted)
    found = scored(model, x, y, tmp_path)
    columns = [found.attacks[column].flags() for column in ("pgd100", "square")]
    by_square = sum(pgd and not square for pgd, square in zip(*columns, strict=True))
    assert by_square > 10
    assert met[0] == by_square
    assert [check for check in COMPARED if found.checks[check].flagged] == ([name] if name else [])
    assert found.checks["black-box"].value == pytest.approx(0.01 * by_square * masked, abs=0.03)
    met.clear()
    assert scored(model, x, y, tmp_path) == found
    assert not met


def test_a_lead_of_few_among_very_many_images_means_nothing() -> None:
    """Ten of ten are no chance, and 0.1 points."""
    protocol = load_protocol("digits")
    outcomes = {
        "pgd100": Outcome.from_flags([True] * 10_000),
        "square": Outcome.from_flags([False] * 10 + [True] * 9_990),
    }
    run = SeedRun(seed=0, clean=outcomes["pgd100"], attacks=outcomes)
    assert not judge(run, protocol)["black-box"].flagged
    outcomes["square"] = Outcome.from_flags([False] * 30 + [True] * 9_970)
    assert judge(run.model_copy(update={"attacks": outcomes}), protocol)["black-box"].flagged


def test_only_what_withstands_a_targeted_attack_is_held_against_a_model() -> None:
    protocol = load_protocol("digits")
    run = seed_run(pgd100=range(0, 100), square=range(80, 100))
    found = alone(run, protocol)
    assert [image for image, flag in enumerate(found.flags()) if flag] == [*range(50, 80)]
    some = Outcome.from_flags([image in range(50, 60) for image in range(100)])
    assert judge(run, protocol, some)["black-box"].value == pytest.approx(10 / 50)
    none = Outcome.from_flags([False] * 100)
    assert judge(run, protocol, none)["black-box"].value == 0


def seed_run(**robust: range) -> SeedRun:
    """A hundred images, all right when clean, and which of them survive an attack.

    Square measures the last fifty alone.
    """
    outcomes = {}
    for name, survivors in robust.items():
        first = 50 if name == "square" else 0
        flags = [image in survivors for image in range(first, 100)]
        outcomes[name] = Outcome.from_flags(flags, first=first)
    return SeedRun(seed=0, clean=Outcome.from_flags([True] * 100), attacks=outcomes)


def test_kinds_of_attack_are_compared_on_the_images_they_share() -> None:
    protocol = load_protocol("digits")
    honest = seed_run(
        pgd100=range(0, 60), fgsm=range(0, 70), mim=range(0, 62), square=range(50, 64)
    )
    found = judge(honest, protocol)
    assert found["single-step"].value == pytest.approx(-0.1)
    # Of the fifty that Square measures it leaves 14, the white-box attacks 10.
    assert found["black-box"].value == pytest.approx(-4 / 50)
    assert found["black-box"].images == 50
    assert not [name for name, check in found.items() if check.flagged]
    masked = seed_run(pgd100=range(0, 90), fgsm=range(0, 60), mim=range(0, 95))
    found = judge(masked, protocol)
    assert found["single-step"].value == pytest.approx(0.3)
    assert found["single-step"].flagged
    assert "black-box" not in found
    blind = seed_run(pgd100=range(0, 100), fgsm=range(0, 100), square=range(80, 100))
    check = judge(blind, protocol)["black-box"]
    assert (check.value, check.images, check.flagged) == (0.6, 50, True)
    assert judge(seed_run(cw=range(0, 100)), protocol) == {}


def test_columns_that_share_no_images_leave_the_comparison_to_the_checks() -> None:
    """At the second seed, slices of 20 and of 50 lie apart; at the first they overlap by chance."""
    base = load_protocol("digits")
    sizes = {"pgd": 20, "square": 50}
    columns = tuple(
        spec.model_copy(update={"images_per_seed": sizes[spec.kind]})
        for spec in base.attacks
        if spec.kind in sizes
    )
    protocol = base.model_copy(update={"attacks": columns})
    assert compared(protocol) == set()
    for first, other in ((0, 0), (20, 50)):
        outcomes = {
            "pgd100": Outcome.from_flags([True] * 20, first=first),
            "square": Outcome.from_flags([False] * 50, first=other),
        }
        clean = Outcome.from_flags([True] * 100)
        assert judge(SeedRun(seed=0, clean=clean, attacks=outcomes), protocol) == {}
    whole = columns[0].model_copy(update={"images_per_seed": None})
    alike = base.model_copy(update={"attacks": (whole, *columns[1:])})
    assert compared(alike) == {"black-box"}


@pytest.mark.parametrize("kinds", [("fgsm",), ("deepfool",), ("fgsm", "deepfool")])
def test_many_queries_may_beat_one_step(kinds) -> None:
    """Beside one step alone, PGD with restarts is what the checks compare Square with."""
    base = load_protocol("digits")
    columns = [AttackSpec(name=kind, kind=kind, params={}) for kind in kinds]
    square = [spec for spec in base.attacks if spec.kind == "square"]
    protocol = base.model_copy(update={"attacks": (*columns, *square)})
    run = seed_run(square=range(80, 100), **{kind: range(100) for kind in kinds})
    assert "black-box" not in judge(run, protocol)
    assert "black-box" not in compared(protocol)


def test_a_transfer_attack_that_beats_white_box_ones_is_flagged_too() -> None:
    protocol = load_protocol("digits")
    surrogate = AttackSpec(name="moved", kind="transfer", params={})
    wider = protocol.model_copy(update={"attacks": (*protocol.attacks, surrogate)})
    check = judge(seed_run(pgd100=range(0, 90), moved=range(0, 40)), wider)["black-box"]
    assert (check.value, check.images, check.flagged) == (0.5, 100, True)


@pytest.mark.parametrize(("lead", "flagged"), [(6, False), (7, True)])
def test_a_few_images_that_square_alone_breaks_mean_nothing(lead, flagged) -> None:
    """Six of six by a fair coin: 1.6%. Seven of seven: 0.8%."""
    run = seed_run(pgd100=range(0, 100), square=range(50 + lead, 100))
    assert judge(run, load_protocol("digits"))["black-box"].flagged is flagged


def test_a_flag_names_its_worst_seed_in_one_line() -> None:
    base = seed_run(pgd100=range(0, 100))

    def run(seed: int, value: float) -> SeedRun:
        check = Check(value=value, limit=0.02, images=64)
        return base.model_copy(update={"seed": seed, "checks": {"zero-gradients": check}})

    (line,) = flags((run(0, 0.5), run(1, 0.01), run(2, 0.75)))
    assert line == (
        "zero-gradients: no gradient of the loss reaches the image (75.0% of 64 images, 2 of 3 seeds)"
    )
    assert flags((run(0, 0.01), base)) == ()


@pytest.mark.parametrize("noise", [1.0, 2.0])
def test_a_random_model_is_not_spared_by_searches_that_end_at_a_lucky_draw(honest, noise) -> None:
    """Read at its last iterate, as a plain loop reads it, and by the same two scorings."""
    model, x, y = honest
    noisy = Wrapped(model, after=lambda z: z + noise * torch.randn_like(z)).eval()
    threat, steps = ThreatModel("linf", Fraction(1, 5)), 20
    eps, step = float(threat.eps), float(threat.eps) / 8
    attack = PGD(threat=threat, steps=steps, step=threat.eps / 8, random_start=False)
    torch.manual_seed(0)
    with answering_at_random():
        ours = ~run_batch(
            attack, noisy, x, y, torch.arange(len(x)), seed=0, searched=noisy, steady=False
        ).broken
    adv = x.clone()
    for _ in range(steps):
        adv.requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(noisy(adv), y), adv)
        adv = (x + (adv.detach() + step * slope.sign() - x).clamp(-eps, eps)).clamp(0, 1)
    with torch.no_grad():
        plain = (noisy(adv).argmax(1) == y) & (noisy(adv).argmax(1) == y)
    assert float(ours.float().mean()) <= float(plain.float().mean()) + 0.05


@pytest.mark.parametrize(
    ("name", "before"),
    [("black-box", Backwards.apply), ("single-step", OnTheGrid.apply), (None, None)],
)
def test_what_a_protocol_has_no_columns_for_is_compared_by_the_checks(honest, name, before) -> None:
    """A protocol of AutoAttack alone is warned of the same models."""
    model, x, y = honest
    alone = load_protocol("digits")
    alone = alone.model_copy(
        update={"attacks": tuple(a for a in alone.attacks if a.kind == "autoattack")}
    )
    assert compared(alone) == set()
    assert compared(load_protocol("digits")) == COMPARED.keys()
    model = Wrapped(model, before=before).eval() if before else model
    found = inspect(model, x, y, THREAT, seed=0, compare=COMPARED.keys() - compared(alone))
    assert {*found} >= {"black-box", "single-step"}
    raised = {check for check in COMPARED if found[check].flagged}
    assert name in raised if name else not raised


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("images", [3, 21, 64])
def test_processes_that_share_the_images_find_what_one_finds(
    honest, count: int, images: int
) -> None:
    """Threads stand for processes; with more of them than images, some have none."""
    model, x, y = honest
    x, y = x[:images], y[:images]
    wanted = inspect(model, x, y, THREAT, seed=0, compare=COMPARED.keys())
    meeting, parts = threading.Barrier(count), [None] * count

    def process(rank: int) -> dict[str, Check]:
        def collect(found: object) -> list[object]:
            parts[rank] = found
            meeting.wait()
            everything = [*parts]
            meeting.wait()
            return everything

        own = Processes(SimpleNamespace(process_index=rank, num_processes=count))
        own.collect = collect
        mine = own.share(len(x))
        return inspect(
            model, x[mine], y[mine], THREAT, seed=0, compare=COMPARED.keys(), gather=own.gathered
        )

    with ThreadPoolExecutor(count) as pool:
        found = [*pool.map(process, range(count))]
    assert found == [wanted] * count
    assert {*wanted} >= {"unbounded", "restarts", "black-box", "single-step"}
