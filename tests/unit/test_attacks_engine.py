"""The own engine: exact on linear models, equal to the papers' algorithms, deaf to the batch."""

from __future__ import annotations

import io
import math
from copy import deepcopy
from fractions import Fraction

import pyautoattack
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_projections import projection_linf
from pyautoattack.fab_pt import FABAttack_PT
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from guardbench.attacks import apgd, fab
from guardbench.attacks import stream as streams
from guardbench.attacks.apgd import APGD
from guardbench.attacks.autoattack import AutoAttack
from guardbench.attacks.base import Attack, run_verified, score_clean
from guardbench.attacks.cw import CW
from guardbench.attacks.deepfool import DeepFool
from guardbench.attacks.fab import FAB, project_to_hyperplane
from guardbench.attacks.fgsm import FGSM
from guardbench.attacks.jitter import Jitter
from guardbench.attacks.mim import MIM
from guardbench.attacks.pgd import PGD
from guardbench.attacks.spsa import SPSA
from guardbench.attacks.square import Square, square_side
from guardbench.attacks.stream import remembering_what_fits, rows_at_once, stream
from guardbench.attacks.targets import ranked_targets
from guardbench.attacks.vmifgsm import VMIFGSM
from guardbench.ball import content_generator, length, random_start
from guardbench.errors import GuardbenchError
from guardbench.runtime import seeded
from guardbench.scoring import images_at_a_time
from guardbench.threat import ThreatModel, tolerance

LINF = ThreatModel("linf", Fraction(1, 20))
NEAR = ThreatModel("linf", Fraction(1, 50))


pytestmark = pytest.mark.usefixtures("one_thread")


# Linear models: the exact answer is known.


def linear(classes: int, pixels: int = 36, scale: float = 1.0) -> nn.Module:
    torch.manual_seed(classes)
    layer = nn.Linear(pixels, classes)
    with torch.no_grad():
        layer.weight.mul_(scale)
        layer.bias.copy_(-0.5 * layer.weight.sum(1))  # grey is undecided, so labels vary
    return nn.Sequential(nn.Flatten(), layer).eval()


def exact_distance(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """l-inf distance to the nearest other class inside [0, 1], by bisection in float64, [N].

    At radius t every pixel moves by t, or as far as [0, 1] lets it, towards the other class.
    """
    weight, bias = model[1].weight.double(), model[1].bias.double()
    flat = x.double().flatten(1)
    logits = flat @ weight.T + bias
    normal = weight[None] - weight[y][:, None]
    room = torch.where(normal > 0, 1 - flat[:, None], flat[:, None])
    gap = logits - logits.gather(1, y[:, None])
    low, high = torch.zeros_like(gap), torch.ones_like(gap)
    for _ in range(60):
        middle = (low + high) / 2
        crossed = gap + (normal.abs() * torch.minimum(room, middle[..., None])).sum(2) > 0
        low, high = torch.where(crossed, low, middle), torch.where(crossed, middle, high)
    return high.scatter(1, y[:, None], torch.inf).amin(1).detach()


def exact_case(classes: int, spread: float, scale: float = 1.0, shape=(1, 6, 6)):
    """Images none of which is near the radius, and who survives it exactly."""
    model = linear(classes, shape[0] * shape[1] * shape[2], scale)
    noise = torch.rand(60, *shape, generator=torch.Generator().manual_seed(1))
    x = (0.5 + spread * (noise - 0.5)).clamp(0, 1)
    with torch.no_grad():
        y = model(x).argmax(1)
    distance = exact_distance(model, x, y)
    eps = Fraction(float(distance.median())).limit_denominator(10**5)
    clear = (distance / float(eps) - 1).abs() > 0.01
    x, y, distance = x[clear][:30], y[clear][:30], distance[clear][:30]
    assert 8 < (distance > float(eps)).sum() < 22
    return model, x, y, ThreatModel("linf", eps), distance / float(eps)


CASES = [(4, 0.4, (1, 6, 6)), (12, 0.4, (3, 4, 5)), (10, 3.0, (1, 7, 4)), (5, 2.0, (3, 4, 4))]


@pytest.mark.parametrize(("classes", "spread", "shape"), CASES)
def test_exact_on_linear_models_also_at_the_borders_of_the_range(classes, spread, shape):
    model, x, y, threat, ratio = exact_case(classes, spread, 100.0, shape)
    if spread > 1:  # a quarter of the pixels and more has no room on one side
        assert ((x == 0) | (x == 1)).float().mean() > 0.25
    parts = AutoAttack(threat=threat, square=False).parts()
    for attack in [*parts, AutoAttack(threat=threat, square=False)]:
        robust = run_verified(attack, model, x, y, seed=0).robust
        assert torch.equal(robust, ratio > 1), attack


@pytest.mark.parametrize(("classes", "spread", "shape"), CASES[1:3])
def test_square_comes_close_from_above(classes, spread, shape):
    model, x, y, threat, ratio = exact_case(classes, spread, shape=shape)
    robust = run_verified(Square(threat=threat, queries=1500), model, x, y, seed=0).robust
    assert (robust >= (ratio > 1)).all()
    assert not robust[ratio < 0.8].any()


# The projection of FAB.


def project_one(point: Tensor, normal: Tensor, rise: float) -> Tensor:
    found = project_to_hyperplane(point[None], normal[None], torch.tensor([rise]))
    return found[0]


@given(
    seed=st.integers(0, 2**32),
    size=st.integers(1, 300),
    scale=st.sampled_from([1e-12, 1e-3, 1.0, 1e4]),
    share=st.floats(-1.3, 1.3),
    kind=st.sampled_from(["plain", "borders", "sparse", "uneven", "zero"]),
)
@settings(max_examples=300, deadline=None)
def test_the_projection_is_the_shortest_move_inside_the_box(seed, size, scale, share, kind):
    generator = torch.Generator().manual_seed(seed)
    point = torch.rand(size, generator=generator)
    normal = scale * torch.randn(size, generator=generator)
    if kind == "borders":
        point = (3 * point - 1).clamp(0, 1)
    if kind == "sparse":
        normal[torch.rand(size, generator=generator) < 0.7] = 0
    if kind == "uneven":
        normal *= torch.exp(6 * torch.randn(size, generator=generator))
    if kind == "zero":
        normal.zero_()
    # `share` of what the box allows, in the direction of its sign.
    room = torch.where(normal * share > 0, 1 - point, point).double() * (normal != 0)
    weight = normal.double().abs()
    most = float((weight * room).sum())
    rise = float(torch.tensor(share * most))
    move = project_one(point, normal, rise).double()

    assert move.isfinite().all()
    moved = point.double() + move
    assert float(moved.min()) >= -1e-7
    assert float(moved.max()) <= 1 + 1e-7
    assert (move[normal == 0] == 0).all()
    assert (move.abs() <= room + 1e-7).all()
    found = float((normal.double() * move).sum())
    assert found * rise >= 0
    if abs(share) > 1 and most > 0:  # out of reach: the corner
        assert move.abs().allclose(room, atol=1e-6)
        return
    noise = 1e-6 * float((weight * point.clamp_min(1e-3)).sum())
    assert abs(found - rise) <= 3e-6 * abs(rise) + noise
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if float((weight * room.clamp_max(middle)).sum()) < abs(rise):
            low = middle
        else:
            high = middle
    assert float(move.abs().max()) <= high * (1 + 1e-5) + 1e-6


@pytest.mark.parametrize("size", [1, 2, 17, 192, 3072])
def test_the_projection_agrees_with_pyautoattack(size):
    generator = torch.Generator().manual_seed(size)
    points = torch.rand(40, size, generator=generator)
    points[::4] = (3 * points[::4] - 1).clamp(0, 1)
    normals = torch.randn(40, size, generator=generator)
    rise = 0.4 * size**0.5 * torch.randn(40, generator=generator)
    rise[::5] *= size**0.5  # some out of reach
    level = (normals * points).sum(1) + rise
    expected = projection_linf(points, normals, level)
    assert project_to_hyperplane(points, normals, rise).allclose(expected, atol=2e-5)


def test_where_there_is_nothing_to_climb_nothing_moves():
    points, flat = torch.rand(3, 8), torch.zeros(3, 8)
    assert (project_to_hyperplane(points, flat, torch.tensor([1.0, -1.0, 0.0])) == 0).all()
    assert (project_to_hyperplane(points, torch.randn(3, 8), torch.zeros(3)) == 0).all()


# The loop.


class Script:
    """A search whose job j of image i ends after `ends[i][j]` steps, with a hit where `hits`."""

    def __init__(self, ends: list[list[int]], hits: list[list[bool]]) -> None:
        self.ends, self.hits = torch.tensor(ends), torch.tensor(hits)
        self.begun: list[tuple[int, int]] = []
        self.steps: list[list[tuple[int, int]]] = []
        self.longest = int(self.ends.max())

    def begin(self, x, y, image, job):
        assert torch.equal(x[:, 0, 0, 0].long(), image)
        assert torch.equal(y, image + 100)
        self.begun += zip(image.tolist(), job.tolist(), strict=True)
        adv = x + 1000.0 * (1 + job[:, None, None, None])
        return {"adv": adv, "job": job, "at": torch.zeros_like(job)}

    def advance(self, model, rows):  # noqa: ARG002
        image, job = rows["image"], rows["job"]
        self.steps.append([*zip(image.tolist(), job.tolist(), strict=True)])
        rows["at"] = rows["at"] + 1
        last = rows["at"] == self.ends[image, job]
        hit = last & self.hits[image, job]
        return hit, last & ~hit


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_every_job_runs_once_until_its_image_is_broken(data):
    count, jobs = data.draw(st.integers(0, 12)), data.draw(st.integers(1, 4))
    capacity = data.draw(st.integers(1, 20))
    shape = {"min_size": jobs, "max_size": jobs}
    ends = [data.draw(st.lists(st.integers(1, 6), **shape)) for _ in range(count)]
    hits = [
        data.draw(st.lists(st.sampled_from([False, False, False, True]), **shape)) for _ in ends
    ]
    script = Script(ends or [[1]], hits or [[False]])
    x = torch.arange(count, dtype=torch.float32)[:, None, None, None].expand(count, 1, 2, 2)
    y = torch.arange(count) + 100
    found = stream(script, nn.Identity(), x, y, jobs=jobs, capacity=capacity)

    assert all(0 < len(step) <= capacity for step in script.steps)
    assert all(len(step) == len(set(step)) for step in script.steps)
    assert len(script.begun) == len(set(script.begun))
    for image in range(count):
        mine = [[pair[1] for pair in step if pair[0] == image] for step in script.steps]
        ran = [sum(job in step for step in mine) for job in range(jobs)]
        done = [ran[job] == ends[image][job] for job in range(jobs)]
        assert all(ran[job] <= ends[image][job] for job in range(jobs))
        broke = [job for job in range(jobs) if done[job] and hits[image][job]]
        assert bool(broke) == any(hits[image])
        if not broke:
            assert all(done)
            assert (found[image] == x[image]).all()
            continue
        # One whole image of one job that hit; after that step no job of the image moves.
        assert found[image].unique().tolist() == [image + 1000.0 * (1 + broke[0])]
        last = max(number for number, step in enumerate(mine) if step)
        assert all(job in mine[last] for job in broke)
    if count:
        order = [job * count + image for image, job in script.begun]
        assert order == sorted(order)


def test_it_tells_how_far_it_is(monkeypatch):
    monkeypatch.setattr(streams, "TELL_EVERY_S", -1.0)
    heard: list[tuple[float, int]] = []
    script = Script([[4, 4]] * 6, [[True, False]] * 2 + [[False, False]] * 4)
    x = torch.arange(6.0)[:, None, None, None]
    with streams.telling(lambda *words: heard.append(words)):
        with streams.within(0.5, 1.0):
            stream(script, nn.Identity(), x, torch.arange(6) + 100, jobs=2, capacity=6)
        model, x, y = precise_case(4)
        count = len(heard)
        never = ThreatModel("linf", Fraction(1, 10**6))
        PGD(threat=never, steps=3).perturb(model, x, y, seed=0)
    assert [alive for _, alive in heard[:count]] == [6] * 3 + [4] * (count - 3)
    # Six first jobs of four steps; then the second jobs of the four images that are left.
    shares = [share for share, _ in heard[:count]]
    assert shares[:3] == pytest.approx([0.5 + 0.5 * 6 * k / 48 for k in (1, 2, 3)])
    assert shares[3] == pytest.approx(0.5 + 0.5 * (24 + 8) / 48)  # the dropped jobs count as done
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert heard[count:] == [(0.25, 4), (0.5, 4), (0.75, 4), (1.0, 4)]
    quiet = len(heard)
    PGD(threat=never, steps=3).perturb(model, x, y, seed=0)
    assert len(heard) == quiet


class Small(nn.Module):
    """A model on a device that holds three rows."""

    def __init__(self, model: nn.Module, most: int) -> None:
        super().__init__()
        self.model, self.most = model, most
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is")
        return self.model(x)


@pytest.mark.parametrize(
    "attack",
    [APGD(threat=NEAR, steps=6), Square(threat=LINF, queries=20), PGD(threat=NEAR, steps=6),
     Jitter(threat=NEAR, steps=6), CW(c=0.1, steps=6), MIM(threat=NEAR), FGSM(threat=NEAR),
     VMIFGSM(threat=NEAR, steps=3, neighbours=2), DeepFool(threat=NEAR, steps=6),
     SPSA(threat=NEAR, steps=2, samples=8), FAB(threat=NEAR, steps=6),
     APGD(threat=NEAR, steps=6, loss="dlr-targeted")],
    ids=repr,
)  # fmt: skip
def test_where_memory_runs_out_fewer_rows_give_the_same_verdicts(attack):
    model, x, y = precise_case(20)
    wanted = model(attack.perturb(model, x, y, seed=0)).argmax(1) != y
    small = Small(model, 3).eval()
    found = model(attack.perturb(small, x, y, seed=0)).argmax(1) != y
    assert torch.equal(found, wanted)
    too_many = [size for size in small.sizes if size > 3]
    assert too_many.count(max(too_many)) <= 3, "tried once a loop, and then never again"


def test_what_fewer_rows_do_not_mend_is_an_error():
    model, x, y = precise_case(4)
    attack = PGD(threat=NEAR, steps=2)
    for run in (lambda net: attack.perturb(net, x, y, seed=0), lambda net: score_clean(net, x, y)):
        with pytest.raises(GuardbenchError, match="one image alone does not fit"):
            run(Small(model, 0).eval())
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            run(Small(nn.Linear(2, 2), 20).eval())


def test_a_full_batch_waits_until_an_eighth_is_free_and_ends_with_jobs_side_by_side():
    script = Script([[1 + i % 5, 3] for i in range(64)], [[False, False]] * 64)
    x = torch.arange(64.0)[:, None, None, None]
    stream(script, nn.Identity(), x, torch.arange(64) + 100, jobs=2, capacity=16)
    sizes = [len(step) for step in script.steps]
    assert min(sizes[:-6]) >= 14
    with pytest.raises(GuardbenchError, match="capacity must be positive"):
        stream(script, nn.Identity(), x, torch.arange(64), capacity=0)


def test_rows_at_once():
    sides = [torch.zeros(1, 3, side, side) for side in (8, 32, 64, 224)]
    assert [rows_at_once(x) for x in sides] == [512, 32, 128, 10]
    attack = PGD(threat=NEAR)
    # Enough to fill a batch several times, and no more than 500 images give.
    assert [images_at_a_time(attack, x) for x in sides] == [512, 512, 512, 160]


# Small networks: nothing depends on the batch.


class Precise(nn.Module):
    """A network of two layers computed in float64, so that a batch moves no float32 digit."""

    def __init__(self, classes: int = 6, pixels: int = 36) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        first = torch.randn(24, pixels, generator=generator).double() / pixels**0.5
        second = 3 * torch.randn(classes, 24, generator=generator).double()
        self.register_buffer("first", first)
        self.register_buffer("second", second)

    def forward(self, x: Tensor) -> Tensor:
        inside = torch.tanh(4 * (x.double().flatten(1) - 0.5) @ self.first.T)
        return inside @ self.second.T


ATTACKS: list[Attack] = [
    APGD(threat=NEAR, steps=20),
    APGD(threat=ThreatModel("l2", Fraction(1, 12)), steps=20),
    APGD(threat=NEAR, loss="dlr-targeted", steps=12, targets=3),
    APGD(threat=NEAR, loss="dlr", steps=20),
    FAB(threat=NEAR, steps=12, targets=3),
    DeepFool(threat=NEAR, steps=10),
    DeepFool(threat=ThreatModel("l2", Fraction(1, 12)), steps=10),
    SPSA(threat=NEAR, steps=4, samples=16),
    Square(threat=LINF, queries=60),
]
# These give back where the search ended, also of images that it did not break.
FOLLOWING: list[Attack] = [
    FGSM(threat=NEAR),
    PGD(threat=NEAR, steps=12, step=Fraction(1, 200)),
    PGD(threat=NEAR, steps=8, step=Fraction(1, 200), restarts=3),
    MIM(threat=NEAR, steps=8, step=Fraction(1, 200)),
    CW(c=0.1, steps=6, lr=0.006),
    Jitter(threat=NEAR, steps=8),
    VMIFGSM(threat=NEAR, steps=4, neighbours=3),
    VMIFGSM(threat=NEAR, steps=4, neighbours=3, leave=False),
]


def precise_case(count: int = 24):
    model = Precise().eval()
    x = torch.rand(count, 1, 6, 6, generator=torch.Generator().manual_seed(5))
    x[::6] = (3 * x[::6] - 1).clamp(0, 1)
    with torch.no_grad():
        return model, x, model(x).argmax(1)


class Counting(nn.Module):
    """Counts the images that a model is asked about."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.asked = model, 0

    def forward(self, x: Tensor) -> Tensor:
        self.asked += len(x)
        return self.model(x)


@pytest.mark.parametrize("attack", [*ATTACKS, *FOLLOWING, AutoAttack(threat=NEAR)], ids=repr)
def test_an_attack_killed_in_its_midst_goes_on_there_and_ends_the_same(attack, monkeypatch):
    count = 6 if isinstance(attack, AutoAttack) else 24
    # The queue is refilled again and again.
    monkeypatch.setattr(streams, "rows_at_once", lambda _: count // 3)
    model, x, y = precise_case(count)
    written: list[bytes] = []
    checks = iter(range(10**9))
    period = 30 if isinstance(attack, AutoAttack) else 1

    def run(states=(), due=lambda: False, model=model):
        def write(states):
            buffer = io.BytesIO()
            torch.save(states, buffer)
            written.append(buffer.getvalue())

        with streams.journaling(streams.Journal(due, write, states)):
            return attack.perturb(model, x, y, seed=3)

    counted = Counting(model)
    whole = attack.perturb(counted, x, y, seed=3)
    assert torch.equal(run(due=lambda: next(checks) % period == 0), whole), (
        "keeping changes nothing"
    )
    assert len(written) > 3
    asked = []
    for place in sorted({0, len(written) // 3, 2 * len(written) // 3, len(written) - 1}):
        states = torch.load(io.BytesIO(written[place]), weights_only=True)
        again = Counting(model)
        assert torch.equal(run(states, model=again), whole), place
        asked.append(again.asked)
    assert asked == sorted(asked, reverse=True)
    assert asked[-1] < 0.5 * counted.asked, "what was done is not done again"


class Noisy(nn.Module):
    """Answers at random, from torch's own generator."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        answer = self.model(x)
        return answer + 0.1 * torch.randn_like(answer)


@pytest.mark.parametrize(
    "attack",
    [APGD(threat=NEAR, loss="dlr-targeted", steps=6), FAB(threat=NEAR, steps=6),
     Square(threat=NEAR, queries=40), AutoAttack(threat=NEAR, square=False)],
    ids=repr,
)  # fmt: skip
def test_a_model_that_answers_at_random_is_attacked_with_the_draws_that_came_next(attack):
    model, x, y = precise_case(6)
    model, written = Noisy(model).eval(), []

    def run(states=()):
        journal = streams.Journal(lambda: True, lambda now: written.append(deepcopy(now)), states)
        with streams.journaling(journal), seeded(5):
            return attack.perturb(model, x, y, seed=3)

    whole, states = run(), written[:]
    for place in (0, len(states) // 2, len(states) - 1):
        assert torch.equal(run(states[place]), whole), place


def test_the_journal_of_other_images_is_not_followed():
    model, x, y = precise_case()
    attack, states = Square(threat=LINF, queries=30), []
    with streams.journaling(streams.Journal(lambda: True, lambda now: states.append([*now]))):
        attack.perturb(model, x, y, seed=3)
    other = x.flip(0)
    with streams.journaling(streams.Journal(lambda: False, lambda _: None, states[-1])):
        found = attack.perturb(model, other, y.flip(0), seed=3)
    assert torch.equal(found, attack.perturb(model, other, y.flip(0), seed=3))


@pytest.mark.parametrize("attack", [*ATTACKS, *FOLLOWING], ids=repr)
def test_verdicts_depend_on_no_other_image(attack, monkeypatch):
    model, x, y = precise_case()
    y[::5] = (y[::5] + 1) % 6  # some are wrong already
    whole = attack.perturb(model, x, y, seed=3)
    broken = model(whole).argmax(1) != y
    assert 7 < broken.sum() < 20
    several = getattr(attack, "loss", None) == "dlr-targeted" or isinstance(attack, FAB)
    several |= getattr(attack, "restarts", 1) > 1
    capacities = (None, 1, 7, 500)
    orders = (torch.arange(24).flip(0), torch.arange(24)[::3], torch.tensor([7]))
    for capacity in capacities:
        if capacity is not None:
            monkeypatch.setattr(streams, "rows_at_once", lambda _, rows=capacity: rows)
        for order in orders:
            part = attack.perturb(model, x[order], y[order], seed=3)
            assert torch.equal(model(part).argmax(1) != y[order], broken[order])
            # Which of several jobs breaks an image first may depend on what runs beside it.
            if not several:
                # CW's tanh rounds by the place in the batch.
                torch.testing.assert_close(
                    part, whole[order], rtol=0, atol=1e-6 * (attack.threat is None)
                )


def test_targets_follow_the_clean_logits(monkeypatch):
    model, x, y = precise_case()
    ranked = ranked_targets(model, x, y, 9)
    assert ranked.shape == (24, 5)
    expected = model(x).argsort(1, descending=True)[:, 1:]  # all are right
    assert torch.equal(ranked, expected)
    assert torch.equal(ranked_targets(model, x, y, 2), expected[:, :2])
    wrong = expected[:, 2]
    assert not (ranked_targets(model, x, wrong, 9) == wrong[:, None]).any()
    sizes: list[int] = []
    model.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    monkeypatch.setattr("guardbench.attacks.targets.rows_at_once", lambda _: 10)
    assert torch.equal(ranked_targets(model, x, y, 9), ranked)
    assert sizes == [10, 10, 4]


@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
@given(seed=st.integers(0, 2**32), eps=st.sampled_from(["1/255", "8/255", "1/3", "2"]))
@settings(max_examples=8, deadline=None)
def test_never_leaves_the_ball_or_the_range(attack, seed, eps):
    threat = ThreatModel(attack.threat.norm, Fraction(eps))
    settings_of = {k: getattr(attack, k) for k in vars(attack) if k != "threat"}
    attack = type(attack)(threat=threat, **settings_of)
    model, x, y = precise_case(6)
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(x.shape, generator=generator).mul(1.4).sub(0.2).clamp(0, 1)
    before, random = x.clone(), torch.get_rng_state()
    adv = attack.perturb(model, x, y, seed=seed)
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), random)
    assert float(adv.min()) >= 0
    assert float(adv.max()) <= 1
    distance = length(adv.double() - x.double(), threat.norm)
    assert (distance <= float(threat.eps) + tolerance(threat, 36)).all()
    unbroken = model(adv).argmax(1) == y
    assert torch.equal(adv[unbroken], x[unbroken])


@pytest.mark.parametrize("attack", [*ATTACKS, AutoAttack(threat=LINF, square=False)], ids=repr)
def test_few_images_and_flat_models(attack):
    model, x, y = precise_case(2)
    for count in (0, 1):
        assert attack.perturb(model, x[:count], y[:count], seed=0).shape == (count, 1, 6, 6)

    class Flat(nn.Module):  # all logits tie, and every gradient is zero
        def forward(self, x: Tensor) -> Tensor:
            return 0 * x.flatten(1)[:, :6]

    if not isinstance(attack, AutoAttack):
        flat = Flat().eval()
        first = attack.perturb(flat, x, torch.zeros(2, dtype=torch.int64), seed=0)
        assert torch.equal(first, x)  # ties go to class 0


def test_what_cannot_work_is_one_clear_line():
    x = torch.rand(4, 1, 6, 6)
    model = linear(3)
    y = model(x).argmax(1)
    needs = "needs at least 4 classes for its DLR loss, not 3"
    everything = ThreatModel("linf", Fraction(1))  # where the first part breaks every image
    with pytest.raises(GuardbenchError, match=needs):
        AutoAttack(threat=everything).perturb(model, x, y, seed=0)
    assert FAB(threat=LINF).perturb(model, x, y, seed=0).shape == x.shape, "no DLR loss in it"
    with pytest.raises(GuardbenchError, match=needs):
        APGD(threat=LINF, loss="dlr-targeted").perturb(model, x, y, seed=0)
    assert APGD(threat=LINF).perturb(model, x, y, seed=0).shape == x.shape

    class Detached(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.detach().flatten(1)[:, :5]

    y = Detached()(x).argmax(1)
    for attack in (APGD(threat=LINF), FAB(threat=LINF)):
        with pytest.raises(GuardbenchError, match="no gradient reaches the images"):
            attack.perturb(Detached().eval(), x, y, seed=0)
    for make in (
        lambda: APGD(threat=LINF, steps=0),
        lambda: FAB(threat=LINF, targets=0),
        lambda: Square(threat=LINF, queries=0),
    ):
        with pytest.raises(GuardbenchError, match="must be positive"):
            make()
    with pytest.raises(GuardbenchError, match="needs at least 3 classes for its DLR loss, not 2"):
        APGD(threat=LINF, loss="dlr").perturb(linear(2), x, y % 2, seed=0)


# APGD step by step.


def test_every_search_has_its_own_random_start():
    model, x, y = precise_case(3)
    attack = APGD(threat=LINF, loss="dlr-targeted", targets=2)
    search = apgd._Search(attack, ranked_targets(model, x, y, 2), 4)
    image, job = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 0])
    rows = search.begin(x[image], y[image], image, job)
    starts = [random_start(x, LINF, 4, number) for number in (0, 1)]
    assert torch.equal(rows["adv"], torch.stack(starts)[job, image])
    assert not torch.equal(starts[0], starts[1])
    assert torch.equal(rows["target"], search.targets[image, job])


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (100, [22, 41, 57, 70, 80, 87, 93, 99]),  # the paper's, after 0
        (20, [4, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]),
        (1, [1]),
    ],
)
def test_checkpoints(steps, expected):
    table = apgd._windows(steps)
    assert table.nonzero().squeeze(1).tolist() == expected
    assert table[table > 0].tolist() == torch.tensor([0, *expected]).diff().tolist()


def sizes_along(losses: list[float], monkeypatch) -> tuple[list[float], list[bool]]:
    """Step sizes after every iterate, over the first, and where the search went back to its best."""
    monkeypatch.setattr(
        apgd._Search,
        "_loss",
        lambda _, logits, rows: torch.tensor(losses)[rows["step"]] + 0 * logits.sum(1),
    )
    model, x, y = precise_case(1)
    search = apgd._Search(APGD(threat=LINF, steps=len(losses) - 1), None, 0)
    rows = search.begin(x, y, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    # Every iterate is another point, and so tells which is the best.
    sizes, returned = [], []
    best, highest = rows["adv"], -torch.inf
    for loss in losses:
        rows["adv"] = rows["x"] + 1e-3 * (1 + rows["step"])
        if loss > highest:
            best, highest = rows["adv"], loss
        at = rows["adv"]
        search.advance(model, rows)
        sizes.append(round(float(rows["size"]) / (2 * float(LINF.eps)), 6))
        assert torch.equal(rows["best"], best)
        assert torch.equal(rows["old"], best) or torch.equal(rows["old"], at)
        returned.append(torch.equal(rows["old"], best) and not torch.equal(best, at))
    return sizes, returned


def walk(rises: list[bool], start: float = 0.0, up: float = 1.0, down: float = -0.5) -> list[float]:
    found = [start]
    for rise in rises:
        found.append(found[-1] + (up if rise else down))
    return found


@pytest.mark.parametrize(("falls", "halved"), [(5, False), (6, True), (22, True)])
def test_the_step_is_halved_when_few_steps_rise(falls, halved, monkeypatch):
    # Of the first 22 steps three quarters are 16.5. The last step falls, so the end is not the best.
    rises = [True] * (22 - falls) + [False] * falls
    losses = walk(rises + [True] * 78)
    sizes, returned = sizes_along(losses, monkeypatch)
    assert sizes[:22] == [1.0] * 22
    assert sizes[22] == (0.5 if halved else 1.0)
    assert returned[22] == halved
    assert not any(returned[:22])


def test_the_step_is_halved_when_the_best_is_old_and_the_step_was_not_halved(monkeypatch):
    # Window 1 rises throughout. Window 2 (19 steps) and 3 (16) fall far once and then rise without
    # a new best: condition 2 halves at 41, but not at 57, right after a halving; at 70 again.
    dive = [False] + [True] * 18
    losses = walk([True] * 22) + walk(dive, 22.0, 0.1, -50.0)[1:]
    for window in (16, 13, 10, 7, 6, 6, 1):
        losses += walk([True] * window, losses[-1], 0.1)[1:]
    assert max(losses) == 22
    sizes, returned = sizes_along(losses, monkeypatch)
    halvings = [step for step in range(1, 101) if sizes[step] < sizes[step - 1]]
    assert halvings == [41, 70, 87, 99]
    assert [step for step, back in enumerate(returned) if back] == halvings


def test_the_share_that_must_rise_is_as_in_the_authors_code(monkeypatch):
    # The third window has 16 steps: 12 rises are three quarters exactly, and halve.
    for count, halved in ((12, True), (13, False)):
        rises = [True] * 41 + [False] * (16 - count) + [True] * (count + 43)
        sizes, _ = sizes_along(walk(rises), monkeypatch)
        assert (sizes[57] < sizes[41]) == halved


# Square by query.


@pytest.mark.parametrize(("high", "wide"), [(4, 4), (8, 8), (28, 28), (32, 32), (64, 64), (5, 40)])
def test_square_sides_are_those_of_pyautoattack(high, wide):
    theirs = pyautoattack.square.SquareAttack(
        None, p_init=0.8, n_queries=10000, resc_schedule=False, eps=0.1
    )
    queries = torch.arange(10000)
    sides = square_side(queries, high, wide).tolist()
    expected = [
        min(max(round((theirs.p_selection(int(q)) * high * wide) ** 0.5), 1), high, wide)
        for q in queries
    ]
    assert sides == expected


class Recording(nn.Module):
    """Remembers what it is asked; answers class 0 always, by a margin that `score` sets."""

    def __init__(self, score) -> None:
        super().__init__()
        self.score, self.asked = score, []

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append(x.clone())
        margin = self.score(x.flatten(1))
        return torch.stack([1 + margin, torch.zeros_like(margin)], 1)


def test_square_asks_no_more_than_it_may_and_only_inside_the_ball():
    x = torch.rand(1, 1, 6, 5, generator=torch.Generator().manual_seed(0))
    eps, queries = float(LINF.eps), 1200
    # Nothing is ever accepted: every proposal differs from the stripes by one square.
    model = Recording(lambda flat: 0 * flat[:, 0]).eval()
    y = torch.zeros(1, dtype=torch.int64)
    found = Square(threat=LINF, queries=queries).perturb(model, x, y, seed=0)
    assert torch.equal(found, x)
    asked = torch.cat(model.asked)
    start, proposals = asked[0], asked[1:]
    plus, minus = (x + eps).clamp(0, 1), (x - eps).clamp(0, 1)
    assert ((asked == plus) | (asked == minus)).all()
    signs = (start > x[0]).float()
    assert torch.equal(signs, signs[:, :1].expand_as(signs))  # vertical stripes
    changed = proposals != start
    assert changed.flatten(1).any(1).all()  # what changes nothing is not sent
    assert 500 < len(asked) < queries - 200  # a square of one pixel changes nothing half the time
    late = changed[-300:].flatten(1).sum(1)
    assert (late == 1).all()  # nothing was kept: one pixel away from the stripes still
    # A square at every place of the image is drawn, the last row and column included.
    assert changed.any(0).any(0).all()
    everything = Recording(lambda flat: flat.sum(1).cos() + 1).eval()  # some are accepted
    Square(threat=LINF, queries=40).perturb(everything, x, y, seed=0)
    assert len(everything.asked) <= 41, "a pass judges one query at least"


def one_query_at_a_time(model, x, y, eps, queries):
    """Square on one image [1, C, H, W], as its paper has it, with the engine's own random numbers."""
    generator = content_generator(x[0], 0, "square")
    _, channels, high, wide = x.shape
    signs = torch.where(torch.rand(channels, 1, wide, generator=generator) < 0.5, -1.0, 1.0)
    draws = torch.rand(queries, 2 + channels, generator=generator)
    best, margin = x, math.inf
    for query in range(-1, queries):
        proposal = best.clone() if query >= 0 else (x + eps * signs.to(x)).clamp(0, 1)
        if query >= 0:
            side = int(square_side(torch.tensor(query), high, wide))
            top, left = (
                int(draws[query, i].to(x) * (edge - side + 1))
                for i, edge in enumerate((high, wide))
            )
            place = (0, slice(None), slice(top, top + side), slice(left, left + side))
            end = eps * torch.where(draws[query, 2:] < 0.5, -1.0, 1.0).to(x)
            proposal[place] = (x[place] + end[:, None, None]).clamp(0, 1)
        logits = model(proposal)[0]
        others = torch.cat([logits[: int(y)], logits[int(y) + 1 :]])
        found = float(logits[int(y)] - others.max())
        if found < 0:
            return proposal
        if found < margin:
            best, margin = proposal, found
    return x


@pytest.mark.parametrize("count", [1, 3, 40])
def test_square_that_looks_ahead_is_square_that_asks_one_query_at_a_time(count):
    torch.manual_seed(count)
    layers = nn.Flatten(), nn.Linear(72, 16), nn.Tanh(), nn.Linear(16, 4)
    model = nn.Sequential(*layers).double().eval().requires_grad_(False)
    x = torch.rand(count, 2, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        y = model(x).argmax(1)
    threat = ThreatModel("linf", Fraction(6, 100))
    asked = []
    handle = model.register_forward_hook(lambda _, given, __: asked.append(len(given[0])))
    found = Square(threat=threat, queries=300).perturb(model, x, y, seed=0)
    handle.remove()
    with torch.no_grad():
        wanted = [
            one_query_at_a_time(model, x[i : i + 1], y[i], float(threat.eps), 300)
            for i in range(count)
        ]
    assert torch.equal(found, torch.cat(wanted))
    assert count < 40 or 5 < int((found != x).flatten(1).any(1).sum()) < 40
    assert len(asked) < 150, "many queries a pass"


def test_square_looks_ahead_only_where_a_pass_has_room(monkeypatch):
    """Of a batch that is full, and of rows that keep most proposals, a pass holds one query."""
    from guardbench.attacks import square

    search = square._Search(Square(threat=LINF), 0)
    monkeypatch.setattr(square, "rows_at_once", lambda _x: 64)

    def width(count, kept):
        return search._width({"x": torch.zeros(count, 1, 4, 4), "kept": torch.full((count,), kept)})

    assert [width(count, 0.01) for count in (64, 33, 32, 8, 1)] == [1, 1, 2, 8, 64]
    assert width(8, 1.0) == 1
    assert width(1, 0.2) < width(1, 0.05) < width(1, 0.0) == 64
    search.fitting.most = 16  # memory ran out at 32
    assert width(8, 0.01) == 2
    assert width(64, 0.01) == 1


def test_square_keeps_what_lowers_the_margin_and_stops_at_the_first_hit():
    x = torch.full((1, 1, 8, 8), 0.5)
    y = torch.zeros(1, dtype=torch.int64)
    model = Recording(lambda flat: flat.mean(1)).eval()
    Square(threat=LINF, queries=500).perturb(model, x, y, seed=0)
    level = [float(asked.mean()) for batch in model.asked for asked in batch]
    assert min(level) == pytest.approx(0.45, abs=1e-3)
    best = model.asked[0][0]
    for batch in model.asked[1:]:  # every proposal is one square away from the best so far
        for asked in batch:
            rows, columns = (asked != best)[0].nonzero().unbind(1)
            assert (asked[0, rows, columns].unique().numel()) == 1
        best = next((asked for asked in batch if asked.mean() < best.mean()), best)
    model = Recording(lambda flat: 40 * (flat.mean(1) - 0.48)).eval()
    found = Square(threat=LINF, queries=500).perturb(model, x, y, seed=0)
    (last,) = (asked for asked in model.asked[-1] if torch.equal(asked, found[0]))
    assert torch.equal(last, found[0])
    assert (model(found).argmax(1) != y).all()
    assert all((model(asked).argmax(1) == y).all() for asked in [*model.asked[:-2]])


@pytest.mark.parametrize(
    "row", [[torch.nan, 0.0], [torch.inf, 0.0], [1.0, -torch.inf], [1.0]], ids=str
)
def test_square_ends_on_answers_without_a_margin(row):
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor(row).repeat(len(x), 1)

    x, y = torch.rand(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64)
    assert torch.equal(Square(threat=LINF, queries=5).perturb(Broken().eval(), x, y, seed=0), x)


# Beside pyautoattack, on a trained network.


@pytest.fixture(scope="module")
def digits():
    """A network of a few thousand weights, and 60 digits that it gets right."""
    torch.set_num_threads(1)
    data = load_digits()
    x = torch.tensor(data.images / 16, dtype=torch.float32)[:, None]
    y = torch.tensor(data.target)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(144, 10),
    )  # fmt: skip
    for step in range(300):  # plain descent: torch.optim alone takes seconds to import
        rows = torch.randint(1500, (64,))
        loss = F.cross_entropy(model(x[rows]), y[rows])
        gradients = torch.autograd.grad(loss, [*model.parameters()])
        with torch.no_grad():
            for weight, gradient in zip(model.parameters(), gradients, strict=True):
                weight -= 0.2 * (1 - step / 300) * gradient
    model.eval().requires_grad_(False)
    x, y = x[1500:], y[1500:]
    right = model(x).argmax(1) == y
    assert right.float().mean() > 0.85
    return model, x[right][:60], y[right][:60]


DIGITS = ThreatModel("linf", Fraction(1, 9))


def watch(monkeypatch, module, seen: list[dict[str, Tensor]]) -> None:
    """Keeps the rows of a search as they were when each was over."""
    advance = module._Search.advance

    def listen(self, model, rows):
        before = dict(rows)
        hit, over = advance(self, model, rows)
        seen.append({k: v.clone() for k, v in {**rows, "adv": before["adv"]}.items()})
        seen[-1]["over"] = over & ~hit
        return hit, over

    monkeypatch.setattr(module._Search, "advance", listen)


@pytest.mark.parametrize("loss", ["ce", "dlr", "dlr-targeted"])
def test_apgd_walks_as_pyautoattack_from_the_same_start(loss, digits, monkeypatch):
    model, x, y = digits
    eps = Fraction(1, 40)  # at which few are broken, so that most walk all 100 steps
    attack = APGD(threat=ThreatModel("linf", eps), loss=loss, targets=1)
    seen: list[dict[str, Tensor]] = []
    watch(monkeypatch, apgd, seen)
    attack.perturb(model, x, y, seed=1)
    last = {k: v[seen[-1]["over"]] for k, v in seen[-1].items()}
    assert len(last["image"]) > 40
    options = {"norm": "Linf", "eps": float(eps), "device": "cpu"}
    if loss != "dlr-targeted":
        theirs = APGDAttack(model, loss=loss, **options)
    else:
        theirs = APGDAttack_targeted(model, **options)
        theirs.y_target = last["target"]
    theirs.init_hyperparam(x)
    start = random_start(last["x"], attack.threat, 1, 0)
    best, _, highest, _ = theirs.attack_single_run(last["x"], last["y"], x_init=start)
    same = (best - last["best"]).flatten(1).abs().amax(1) < 1e-4
    assert same.float().mean() > 0.9
    assert last["best_loss"].allclose(highest, rtol=0.02, atol=1e-3)
    # Where they differ, the authors' first window compares one loss with an unset 0.
    assert last["best_loss"][same].allclose(highest[same], rtol=1e-3, atol=1e-6)


def test_fab_walks_as_pyautoattack(digits, monkeypatch):
    model, x, y = digits
    x, y = x[:30], y[:30]
    seen: list[dict[str, Tensor]] = []
    watch(monkeypatch, fab, seen)
    FAB(threat=ThreatModel("linf", Fraction(1, 10**6)), targets=1).perturb(model, x, y, seed=0)
    assert len(seen) == 101  # nothing comes that near, so all 30 walk to the end
    nearest = torch.full((101, 30), torch.inf)
    for step, rows in enumerate(seen[1:], start=1):
        assert rows["image"].tolist() == list(range(30))
        wrong = model(rows["adv"]).argmax(1) != y
        far = torch.where(wrong, length(rows["adv"] - x, "linf"), torch.inf)
        nearest[step] = nearest[step - 1].minimum(far)
    theirs = FABAttack_PT(model, norm="Linf", targeted=True, device="cpu")
    theirs.target_class = 2
    found = theirs.attack_single_run(x, y, is_targeted=True)
    assert (model(found).argmax(1) != y).all()
    assert nearest[100].allclose(length(found - x, "linf"), rtol=0.02)
    for steps in (1, 2, 3, 5, 8):  # while overshoot, backward step and bias still show
        theirs.n_iter = steps
        found = theirs.attack_single_run(x, y, is_targeted=True)
        assert torch.equal(model(found).argmax(1) != y, nearest[steps].isfinite())
        crossed = nearest[steps].isfinite()
        assert crossed.sum() >= (5 if steps == 1 else 20)
        expected = length(found - x, "linf")[crossed]
        assert nearest[steps][crossed].allclose(expected, rtol=1e-4), steps


@pytest.mark.parametrize(("norm", "eps"), [("l2", "1/2"), ("l1", "3/2")])
def test_norms_that_this_engine_lacks_are_pyautoattacks(norm, eps, digits):
    model, x, y = digits
    threat = ThreatModel(norm, Fraction(eps))
    attacks = [FAB(threat=threat, steps=30), APGD(threat=threat, loss="dlr-targeted", targets=3)]
    ran = [attack.run_by for attack in attacks]
    assert ran == ["reference", "guardbench" if norm == "l2" else "reference"]
    robust = [run_verified(attack, model, x, y, seed=0).robust for attack in attacks]
    assert all(10 < part.sum() < 55 for part in robust), [int(part.sum()) for part in robust]
    asked: list[int] = []
    watched = nn.Sequential(model)
    watched.register_forward_hook(lambda _, args, __: asked.append(len(args[0])))
    watched.eval()
    spent = []
    for steps in (4, 40):
        asked.clear()
        APGD(threat=threat, steps=steps).perturb(watched, x[:5], y[:5], seed=0)
        spent.append(sum(asked))
    assert spent[1] > 2 * spent[0], "steps count in l1 too"
    assert (robust[0] != robust[1]).sum() <= 6, "two attacks that both come near the exact answer"


def test_as_strong_as_pyautoattack_part_by_part(digits):
    model, x, y = digits
    ours: list[Attack] = [*AutoAttack(threat=DIGITS, square=False).parts()]
    names = ["apgd-ce", "apgd-t", "fab-t"]
    ours.append(Square(threat=DIGITS, queries=300))
    counts: dict[str, tuple[int, int]] = {}
    for name, attack in zip([*names, "square"], ours, strict=True):
        theirs = pyautoattack.AutoAttack(
            model, norm="Linf", eps=float(DIGITS.eps), seed=0, version="custom", attacks=[name]
        )
        theirs.apgd.n_restarts, theirs.square.n_queries, theirs.verbose = 1, 300, False
        adv, _ = theirs.run_standard_evaluation(x, y, batch_size=60)
        expected = int((model(adv).argmax(1) == y).sum())
        counts[name] = int(run_verified(attack, model, x, y, seed=0).robust.sum()), expected
    print(counts)
    assert all(18 <= theirs <= 42 for _, theirs in counts.values()), counts
    assert all(own - theirs <= 2 for own, theirs in counts.values()), counts
    assert all(theirs - own <= 2 for n, (own, theirs) in counts.items() if n != "square"), counts


def test_what_fits_is_remembered_from_one_stream_to_the_next():
    model, x, y = precise_case(20)
    attack = APGD(threat=NEAR, steps=4)
    sizes = []
    for _ in range(2):
        small = Small(model, 3).eval()
        with remembering_what_fits():
            for part in torch.arange(20).split(10):
                attack.perturb(small, x[part], y[part], seed=0)
        sizes.append([size for size in small.sizes if size > 3])
    assert sizes[0] == sizes[1], "of another model nothing is known"
    once = Small(model, 3).eval()
    attack.perturb(once, x[:10], y[:10], seed=0)
    assert sizes[0] == [size for size in once.sizes if size > 3], "the second stream tried none"
