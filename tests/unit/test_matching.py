"""DC, DSA and DM: losses against plain float64 references, views that are shared, runs that resume."""

import dataclasses
from fractions import Fraction

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F

from guardbench.data.dataset import load_split
from guardbench.devices import make_accelerator
from guardbench.distillers import distribution, dsa, matching, synthetic
from guardbench.distillers.base import Task
from guardbench.distillers.distribution import embedding, feature_distance
from guardbench.distillers.dsa import (
    KINDS,
    SiameseView,
    _dense_sample,
    apply_view,
    draw_view,
    seen_in,
)
from guardbench.distillers.matching import (
    class_gradients,
    gradient_distance,
    gradients_at_once,
    gradients_one_by_one,
    matched_weights,
    real_gradient,
)
from guardbench.distillers.synthetic import InPieces, RealClasses, SyntheticSet
from guardbench.errors import GuardbenchError
from guardbench.methods import load_method
from guardbench.models import ConvNet, build_model
from guardbench.progress import Progress
from guardbench.registry import DISTILLERS, REGULARISERS, resolve
from guardbench.regularisers.base import Batch, build_regulariser
from guardbench.runtime import Run
from guardbench.threat import ThreatModel

pytestmark = pytest.mark.usefixtures("one_thread")

THREAT = ThreatModel("linf", Fraction(16, 255))
REGULARISER_WORDS = {
    "none": {},
    "curvature": {"weight": 1.0, "h": "4/255"},
    "curvature-double": {"weight": 0.1, "h": "4/255"},
    "gradient-norm": {"weight": 0.1},
    "pgd": {},
    "pgd-released": {},
    "trades": {},
    "fbf": {},
}


@pytest.fixture(scope="module")
def digits():
    return load_split(
        "digits", "train", resolution=8, data_dir=None, cache_dir=None, progress=Progress()
    )


def make_task(folder, train, method="dc", *, ipc=1, seed=0, regulariser=None, **match) -> Task:
    file = load_method(method)
    recipe = file.recipe("digits", 8)
    words = {"iterations": 2, "real_batch": 8, **match}
    update = {"params": {"match": {**recipe.params["match"], **words}}}
    if regulariser is not None:
        update["regulariser"] = regulariser
    return Task(
        run=Run(
            accelerator=Accelerator(cpu=True), workspace=folder, seed=seed, progress=Progress()
        ),
        method=file,
        recipe=recipe.model_copy(update=update),
        dataset="digits",
        resolution=8,
        channels=1,
        classes=train.classes,
        train_images=len(train),
        train_digest=train.digest,
        ipc=ipc,
        threat=THREAT,
    )


def distil(task, train):
    return resolve(DISTILLERS, "distiller", task.method.distiller)().distill(task, train)


def plan_and_distil(task, train):
    resolve(DISTILLERS, "distiller", task.method.distiller)().plan(task)
    return distil(task, train)


def small_net() -> nn.Module:
    torch.manual_seed(0)
    net = ConvNet(2, 3, 8, depth=3, width=4, norm="instance").double()
    for weight in net.parameters():  # no affine weight is left at 1 or 0, where a slip would hide
        weight.data += 0.1 * torch.randn_like(weight)
    return net


def small_set():
    torch.manual_seed(1)
    images = torch.randn(3, 2, 2, 8, 8, dtype=torch.float64)
    return images, torch.arange(3)[:, None].expand(-1, 2)


# ------------------------------------------------------------------ gradient matching


def plain_distance(net, images, labels, wanted) -> float:
    """Equation 10 with loops: a gradient a class, a cosine a row."""
    total = 0.0
    for k in range(len(images)):
        net.zero_grad()
        F.cross_entropy(net(images[k]), labels[k]).backward()
        weights = [p for p in net.parameters() if p.ndim > 1]
        for weight, real in zip(weights, wanted, strict=True):
            for row in range(len(weight)):
                a, b = weight.grad[row].reshape(-1), real[k][row].reshape(-1)
                total += 1 - float(a @ b / (a.norm() * b.norm() + 1e-6))
    net.zero_grad()
    return total


def some_gradients(net) -> list[torch.Tensor]:
    torch.manual_seed(2)
    weights = matched_weights(net).values()
    return [torch.randn(3, *weight.shape, dtype=torch.float64) for weight in weights]


@pytest.mark.parametrize("gradients", [gradients_at_once, gradients_one_by_one])
def test_the_distance_and_its_slope_against_a_plain_reference(gradients) -> None:
    net, (images, labels) = small_net(), small_set()
    wanted = some_gradients(net)
    leaf = images.clone().requires_grad_()
    loss = gradient_distance(gradients(net, leaf, labels), wanted)
    assert loss.item() == pytest.approx(plain_distance(net, images, labels, wanted), rel=1e-9)
    (slope,) = torch.autograd.grad(loss, leaf)
    for seed in range(4):
        torch.manual_seed(seed)
        way, h = torch.randn_like(images), 1e-6
        up, down = (plain_distance(net, images + s * h * way, labels, wanted) for s in (1, -1))
        found = float((slope * way).sum())
        assert found == pytest.approx((up - down) / (2 * h), rel=1e-4, abs=1e-6)


def test_all_classes_at_once_are_one_after_another() -> None:
    net, (images, labels) = small_net(), small_set()
    at_once, single = (
        gradients(net, images.clone().requires_grad_(), labels)
        for gradients in (gradients_at_once, gradients_one_by_one)
    )
    assert [g.shape for g in at_once] == [(3, *w.shape) for w in matched_weights(net).values()]
    for a, b in zip(at_once, single, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_size_of_a_class_decides_how_its_gradients_are_taken(monkeypatch) -> None:
    called = []
    for name in ("gradients_at_once", "gradients_one_by_one"):
        monkeypatch.setattr(matching, name, lambda *_, name=name: called.append(name))
    for n in (matching.SMALL_CLASS // 64, matching.SMALL_CLASS // 64 + 1):
        class_gradients(nn.Identity(), torch.zeros(2, n, 1, 8, 8), torch.zeros(2, n))
    assert called == ["gradients_at_once", "gradients_one_by_one"]


def test_a_row_without_gradient_has_distance_one_and_no_slope() -> None:
    found = torch.zeros(1, 2, 3, requires_grad=True)
    loss = gradient_distance([found], [torch.ones(1, 2, 3)])
    assert loss.item() == 2
    (slope,) = torch.autograd.grad(loss, found)
    assert bool(torch.isfinite(slope).all())


@pytest.mark.parametrize("kind", sorted(REGULARISERS))
@pytest.mark.parametrize("view", [None, "rotate", "crop"])
def test_every_regulariser_gives_a_real_gradient_in_every_view(kind, view) -> None:
    model = build_model("convnet-d2-small", channels=1, classes=3, resolution=8, seed=0).train()
    torch.manual_seed(3)
    images = torch.rand(4, 1, 8, 8)

    def gradient(kind):
        seen = model
        if view is not None:
            seen = seen_in(model, SiameseView(view, torch.tensor([[0.9, 0.2, 0.4]])))
        generator = torch.Generator().manual_seed(0)
        labels = torch.tensor([0, 1, 1, 2])
        batch = Batch(model=seen, images=images, labels=labels, generator=generator)
        regulariser = build_regulariser({"kind": kind, **REGULARISER_WORDS[kind]}, THREAT)
        return real_gradient(regulariser, batch, model.backbone)

    found, plain = gradient(kind), gradient("none")
    assert all(weight.grad is None for weight in model.parameters())
    assert [g.shape for g in found] == [w.shape for w in matched_weights(model.backbone).values()]
    moved = max(float((a - b).abs().max()) for a, b in zip(found, plain, strict=True))
    assert moved == 0 if kind == "none" else moved > 1e-6


def test_the_plain_real_gradient_is_that_of_the_cross_entropy() -> None:
    model = build_model("convnet-d2-small", channels=1, classes=3, resolution=8, seed=0).train()
    images, labels = torch.rand(4, 1, 8, 8), torch.ones(4, dtype=torch.int64)
    batch = Batch(model=model, images=images, labels=labels)
    found = real_gradient(build_regulariser({"kind": "none"}, THREAT), batch, model.backbone)
    F.cross_entropy(model(images), labels).backward()
    wanted = [p.grad for p in model.backbone.parameters() if p.ndim > 1]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_network_in_pieces_is_the_network(monkeypatch) -> None:
    net, (images, labels) = small_net(), small_set()
    images, labels = images.flatten(0, 1), labels.flatten()
    monkeypatch.setattr(synthetic, "PIECE", 4 * 64)
    sizes: list[int] = []
    net.register_forward_pre_hook(lambda _m, args: sizes.append(len(args[0])))
    found = []
    for network in (net, InPieces(net)):
        leaf = images.clone().requires_grad_()
        loss = F.cross_entropy(network(leaf), labels)
        found.append([loss, *torch.autograd.grad(loss, [leaf, *net.parameters()])])
    assert sizes == [6, 4, 2]
    for whole, pieces in zip(*found, strict=True):
        torch.testing.assert_close(pieces, whole, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------ siamese augmentation


@pytest.mark.parametrize("kind", KINDS)
def test_a_shared_view_is_the_same_for_every_image_of_every_batch(kind) -> None:
    torch.manual_seed(4)
    real = torch.randn(5, 3, 8, 8)
    for seed in range(3):
        drawn = torch.rand(1, 3, generator=torch.Generator().manual_seed(seed))
        shared, own = SiameseView(kind, drawn), SiameseView(kind, drawn.expand(5, -1))
        together = apply_view(real, shared)
        torch.testing.assert_close(apply_view(real, own), together, rtol=0, atol=1e-6)
        alone = torch.cat([apply_view(image[None], shared) for image in real])
        torch.testing.assert_close(alone, together, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_every_view_changes_images_and_its_gradient_is_its_own(kind) -> None:
    """Every view is affine in the images, so one finite step tells the whole gradient."""
    torch.manual_seed(5)
    images, way, weights = (torch.randn(2, 3, 8, 8) for _ in range(3))
    view = SiameseView(kind, torch.tensor([[0.1, 0.8, 0.3]]))
    leaf = images.clone().requires_grad_()
    seen = apply_view(leaf, view)
    assert (seen - images).abs().max() > 0.1
    torch.testing.assert_close(apply_view(images, view), seen.detach(), rtol=0, atol=1e-5)
    (slope,) = torch.autograd.grad((seen * weights).sum(), leaf)
    rise = ((apply_view(images + way, view) - apply_view(images, view)) * weights).sum()
    assert float((slope * way).sum()) == pytest.approx(float(rise), rel=1e-4, abs=1e-3)
    assert slope.abs().max() > 0


@pytest.mark.parametrize(
    ("kind", "drawn"),
    [
        ("color", [0.5, 0.5, 0.5]),
        ("crop", [0.5, 0.5, 0]),
        ("flip", [0.5, 0, 0]),
        ("scale", [(1 - 1 / 1.2) / (1.2 - 1 / 1.2)] * 2 + [0]),
        ("rotate", [0.5, 0, 0]),
    ],
)
def test_the_middle_of_a_range_leaves_images_as_they_are(kind, drawn) -> None:
    images = torch.randn(2, 3, 8, 8)
    seen = apply_view(images, SiameseView(kind, torch.tensor([drawn])))
    torch.testing.assert_close(seen, images, rtol=0, atol=1e-5)


def test_views_against_what_they_say() -> None:
    images = torch.arange(64.0).view(1, 1, 8, 8) + 1
    flipped = apply_view(images, SiameseView("flip", torch.zeros(1, 3)))
    assert torch.equal(flipped, images.flip(3))
    shifted = apply_view(images, SiameseView("crop", torch.zeros(1, 3)))
    assert torch.equal(shifted[..., 1:, 1:], images[..., :-1, :-1])
    assert shifted[..., 0, :].abs().max() == shifted[..., :, 0].abs().max() == 0
    holed = apply_view(images, SiameseView("cutout", torch.tensor([[0.5, 0.0, 0.0]])))
    assert torch.equal(holed == 0, F.pad(torch.ones(1, 1, 4, 2), (0, 6, 2, 2)).bool())
    assert torch.equal(holed[holed > 0], images[holed > 0])
    brighter = apply_view(images, SiameseView("color", torch.tensor([[0.75, 0.5, 0.5]])))
    torch.testing.assert_close(brighter, images + 0.25)
    contrast = apply_view(images, SiameseView("color", torch.tensor([[0.5, 0.5, 0.0]])))
    assert float(contrast.std() / images.std()) == pytest.approx(0.5, rel=1e-5)
    grey = apply_view(torch.rand(1, 3, 4, 4), SiameseView("color", torch.tensor([[0.5, 0.0, 0.5]])))
    torch.testing.assert_close(grey, grey.mean(1, keepdim=True).expand_as(grey))
    larger = apply_view(images, SiameseView("scale", torch.zeros(1, 3)))
    assert larger.max() - larger.min() < 63 / 1.1


def test_rotation_turns_about_the_centre_as_one_matrix_and_by_sampling() -> None:
    torch.manual_seed(6)
    images = torch.randn(2, 3, 9, 9)
    view = SiameseView("rotate", torch.tensor([[0.95, 0, 0]]))
    sampled, dense = apply_view(images, view), apply_view(images.clone().requires_grad_(), view)
    torch.testing.assert_close(dense.detach(), sampled, rtol=0, atol=1e-5)
    torch.testing.assert_close(sampled[..., 4, 4], images[..., 4, 4], rtol=0, atol=1e-5)
    steps = torch.arange(9.0) - 4
    quarter = _dense_sample(
        images, steps[None, None, :].expand(1, 9, 9), -steps[None, :, None].expand(1, 9, 9)
    )
    torch.testing.assert_close(quarter, images.rot90(1, (2, 3)), rtol=0, atol=1e-5)


def test_every_kind_is_drawn_and_equal_generators_draw_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    assert {draw_view(1, generator, ("crop", "scale")).kind for _ in range(30)} == {"crop", "scale"}
    views = [draw_view(1, generator) for _ in range(60)]
    assert {view.kind for view in views} == set(KINDS)
    a, b = (draw_view(4, torch.Generator().manual_seed(9)) for _ in range(2))
    assert a.kind == b.kind
    assert torch.equal(a.drawn, b.drawn)
    assert len(a.drawn.unique()) == 12


def test_a_network_in_a_view_answers_as_on_images_in_that_view() -> None:
    model = build_model("convnet-d2-small", channels=3, classes=5, resolution=8, seed=0).train()
    images = torch.rand(4, 3, 8, 8)
    view = SiameseView("crop", torch.tensor([[0.0, 0.9, 0.0]]))
    seen = seen_in(model, view)
    wanted = model.backbone(apply_view(model.normalise(images), view))
    torch.testing.assert_close(seen(images), wanted)
    assert {id(p) for p in seen.parameters()} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize(("method", "home"), [("dsa", matching), ("dm", distribution)])
def test_real_and_synthetic_images_of_a_class_meet_the_same_view(
    tmp_path, digits, monkeypatch, method, home
) -> None:
    met: dict[int, list[SiameseView]] = {8: [], 1: []}  # by the size of the batch

    def noted(images, view):
        met[len(images)].append(view)
        return apply_view(images, view)

    for module in (dsa, home):
        monkeypatch.setattr(module, "apply_view", noted)
    distil(make_task(tmp_path, digits, method, iterations=1), digits)
    assert len(met[8]) == 10
    for real, made in zip(met[8], met[1], strict=True):
        assert real.kind == made.kind
        assert torch.equal(real.drawn, made.drawn)
        assert len(real.drawn) == 1
    assert len({float(view.drawn[0, 0]) for view in met[8]}) == 10, "each class has its own"


# ------------------------------------------------------------------ distribution matching


def test_dms_loss_against_a_plain_reference() -> None:
    model = build_model("convnet-d2-small", channels=1, classes=3, resolution=8, seed=0).double()
    torch.manual_seed(7)
    images = torch.randn(3, 2, 1, 8, 8, dtype=torch.float64)
    wanted = torch.randn(3, 128, dtype=torch.float64)
    plain = 0.0
    for k in range(3):
        mean = sum(model.backbone.features(image[None])[0].flatten() for image in images[k]) / 2
        plain += sum((mean[j] - wanted[k, j]).item() ** 2 for j in range(128))
    embed = embedding(model)
    leaf = images.clone().requires_grad_()
    loss = feature_distance(embed(leaf.flatten(0, 1)).view(3, 2, -1), wanted)
    assert loss.item() == pytest.approx(plain, rel=1e-9)
    (slope,) = torch.autograd.grad(loss, leaf)
    assert slope.abs().max() > 0


# ------------------------------------------------------------------ whole runs


def fresh(task, number: int):
    seed = task.run.generator("match", "network", number).initial_seed()
    arch = task.recipe.params["match"]["arch"]
    return build_model(arch, channels=1, classes=10, resolution=8, seed=seed)


def noise_in_range(task) -> list[torch.Tensor]:
    """The images of each class from which a run with `init = noise` starts: grey ones, in [-1, 1]."""
    generators = [task.run.generator("match", "init", label) for label in range(10)]
    return [torch.randn(task.ipc, 1, 8, 8, generator=one).clamp(-1, 1) for one in generators]


def real_of(train, label: int, count: int, generator) -> torch.Tensor:
    rows = (train.labels == label).nonzero().flatten()
    return train.batch(rows[torch.randperm(len(rows), generator=generator)[:count]])


def moved(images, slopes, velocity) -> list[torch.Tensor]:
    """A step of SGD with momentum 0.5 and learning rate 0.3, back into the range."""
    for before, slope in zip(velocity, slopes, strict=True):
        before.mul_(0.5).add_(slope)
    return [(x - 0.3 * v).clamp(-1, 1) for x, v in zip(images, velocity, strict=True)]


def test_dcs_images_are_those_of_plain_loops(tmp_path, digits) -> None:
    """An iteration of two steps, and one epoch of the network on the synthetic set between them."""
    words = {"init": "noise", "iterations": 1, "loops": {"2": [2, 1]}, "image_lr": 0.3}
    task = make_task(tmp_path, digits, ipc=2, network_lr=0.05, network_batch=8, **words)
    model, images = fresh(task, 0), noise_in_range(task)
    velocity = [torch.zeros_like(x) for x in images]
    weights = [weight for weight in model.parameters() if weight.ndim > 1]
    for step in range(2):
        slopes = []
        for label in range(10):
            real = real_of(digits, label, 8, task.run.generator("match", "real", step, label))
            leaf = images[label].clone().requires_grad_()
            of_real = F.cross_entropy(model(real), torch.full((8,), label))
            of_ours = F.cross_entropy(model.backbone(leaf), torch.full((2,), label))
            wanted = torch.autograd.grad(of_real, weights)
            found = torch.autograd.grad(of_ours, weights, create_graph=True)
            apart = torch.zeros(())
            for ours, theirs in zip(found, wanted, strict=True):
                a, b = ours.flatten(1), theirs.flatten(1)
                lengths = a.norm(dim=1) * b.norm(dim=1)
                apart = apart + (1 - (a * b).sum(1) / (lengths + 1e-6)).sum()
            slopes += torch.autograd.grad(apart, leaf)
        images = moved(images, slopes, velocity)
        if step == 0:
            everything, labels = torch.cat(images), torch.arange(10).repeat_interleave(2)
            order = torch.randperm(20, generator=task.run.generator("match", "train", 0))
            for picked in (order[:8], order[8:16], order[16:]):
                loss = F.cross_entropy(model.backbone(everything[picked]), labels[picked])
                falls = torch.autograd.grad(loss, list(model.parameters()))
                with torch.no_grad():
                    for weight, slope in zip(model.parameters(), falls, strict=True):
                        weight -= 0.05 * slope
    made = distil(task, digits)
    torch.testing.assert_close(made.images, torch.cat(images) * 0.5 + 0.5, rtol=0, atol=1e-4)
    assert made.hard.tolist() == [label for label in range(10) for _ in range(2)]


def test_dms_images_are_those_of_plain_loops(tmp_path, digits) -> None:
    """Two iterations, each with a network and with views of its own."""
    words = {"init": "noise", "iterations": 2, "image_lr": 0.3, "views": ["crop", "cutout"]}
    task = make_task(tmp_path, digits, "dm", ipc=2, **words)
    images = noise_in_range(task)
    velocity = [torch.zeros_like(x) for x in images]
    for step in range(2):
        model, slopes = fresh(task, step), []
        for label in range(10):
            generator = task.run.generator("match", "real", step, label)
            view = draw_view(1, generator, ("crop", "cutout"))
            real = real_of(digits, label, 8, generator) * 2 - 1
            leaf = images[label].clone().requires_grad_()
            ours, theirs = (
                model.backbone.features(apply_view(x, view)).flatten(1).mean(0)
                for x in (leaf, real)
            )
            slopes += torch.autograd.grad(((ours - theirs) ** 2).sum(), leaf)
        images = moved(images, slopes, velocity)
    made = distil(task, digits)
    torch.testing.assert_close(made.images, torch.cat(images) * 0.5 + 0.5, rtol=0, atol=1e-4)
    assert made.hard.tolist() == [label for label in range(10) for _ in range(2)]


class KilledError(Exception):
    pass


@pytest.mark.parametrize(("method", "ipc"), [("dc", 1), ("dsa", 2), ("dm", 1)])
def test_a_run_that_was_killed_ends_as_an_unbroken_one(
    tmp_path, digits, monkeypatch, method, ipc
) -> None:
    words = {"iterations": 3} | ({"loops": {"1": [1, 1], "2": [3, 2]}} if method != "dm" else {})
    whole = distil(make_task(tmp_path / "a", digits, method, ipc=ipc, **words), digits)
    monkeypatch.setattr("guardbench.stages.CHECKPOINT_EVERY_S", -1.0)
    step, count = SyntheticSet.step, 0

    def failing(self, loss):
        nonlocal count
        count += 1
        if count == (6 if ipc == 2 else 2):  # inside an iteration where there are several steps
            raise KilledError
        step(self, loss)

    monkeypatch.setattr(SyntheticSet, "step", failing)
    with pytest.raises(KilledError):
        distil(make_task(tmp_path / "b", digits, method, ipc=ipc, **words), digits)
    before = count
    resumed = distil(make_task(tmp_path / "b", digits, method, ipc=ipc, **words), digits)
    steps = 9 if ipc == 2 else 3
    assert count - before == steps - (before - 1), "it went on from the last finished step"
    assert torch.equal(resumed.images, whole.images)
    # The key of the stage holds the seed and the words, not the folder: manifests are equal too.
    assert resumed.manifest == whole.manifest


@pytest.mark.parametrize("method", ["dc", "dsa", "dm"])
def test_seeds_decide_the_images_and_a_finished_stage_is_loaded(tmp_path, digits, method) -> None:
    one, two, other = (
        distil(make_task(tmp_path / str(k), digits, method, seed=seed), digits)
        for k, seed in enumerate((0, 0, 1))
    )
    assert torch.equal(one.images, two.images)
    assert one.manifest.sha256 == two.manifest.sha256
    assert not torch.equal(one.images, other.images)
    assert one.manifest.label_kind == "hard"
    assert one.teacher is None
    assert one.hard.tolist() == list(range(10))
    again = distil(make_task(tmp_path / "0", digits, method), digits)
    assert torch.equal(again.images, one.images)


def test_the_regulariser_changes_the_images(tmp_path, digits) -> None:
    plain, guard = (
        distil(make_task(tmp_path, digits, method, iterations=3), digits)
        for method in ("dc", "dc-guard")
    )
    assert (plain.images - guard.images).abs().max() > 1e-4


def test_both_gradients_that_are_compared_are_float32s(tmp_path, digits) -> None:
    """In a run in bf16 too: one side's rounding would be a part of the distance."""
    found, distances = [], []
    for precision in ("bf16", "fp32"):
        task = make_task(tmp_path / precision, digits)
        accelerator = make_accelerator("cpu", precision, 8)
        task = dataclasses.replace(task, run=dataclasses.replace(task.run, accelerator=accelerator))
        assert task.run.precision == precision
        steps = matching._GradientMatching(task, digits, siamese=False)
        network = matching.fresh_network(task, steps.params, 0)
        found.append(steps._real_gradients(network, None, 0))
        distances.append(steps._match(network, 0))
    assert distances[0] == distances[1]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_images_move_toward_the_real_gradient(tmp_path, digits, monkeypatch) -> None:
    """The distance falls under networks that the images have never met."""
    seen: list[float] = []
    step = SyntheticSet.step
    monkeypatch.setattr(
        SyntheticSet, "step", lambda self, loss: (seen.append(loss.item()), step(self, loss))
    )
    distil(make_task(tmp_path, digits, iterations=16, real_batch=32), digits)
    assert sum(seen[-4:]) < 0.9 * sum(seen[:4])


def test_images_are_in_range_after_every_step(tmp_path, digits) -> None:
    task = make_task(tmp_path, digits, image_lr=50.0)
    params = matching.read_params(task, matching.Params).match
    made = SyntheticSet(task, params, RealClasses(task, digits))
    assert made.images.min() >= -1  # (0 - mean) / std of grey images
    for _ in range(2):
        made.step(made.images.sum())
        assert made.images.min() == -1
    assert made.images.max() <= 1


def test_real_images_to_begin_with_are_of_their_class(tmp_path, digits) -> None:
    task = make_task(tmp_path, digits, ipc=3, init="real", loops={"3": [1, 1]})
    params = matching.read_params(task, matching.Params).match
    pixels = SyntheticSet(task, params, RealClasses(task, digits)).images.detach() * 0.5 + 0.5
    everything = digits.batch(range(len(digits)))
    for label, rows in enumerate(pixels):
        own = everything[digits.labels == label].flatten(1)
        found = torch.cdist(rows.flatten(1), own).argmin(1)
        torch.testing.assert_close(own[found], rows.flatten(1), rtol=0, atol=1e-6)
        assert len(set(found.tolist())) == 3


def test_a_class_with_fewer_images_than_the_batch_gives_all_it_has(tmp_path, digits) -> None:
    real = RealClasses(make_task(tmp_path, digits), digits)
    drawn = real.draw(3, 10_000, torch.Generator().manual_seed(0))
    own = digits.batch((digits.labels == 3).nonzero().flatten())
    assert len(drawn) == len(own)
    pixels = (sorted(images.flatten(1).tolist()) for images in (drawn, own))
    assert next(pixels) == next(pixels)
    half = real.draw(3, 20, torch.Generator().manual_seed(0))
    assert len(half.flatten(1).unique(dim=0)) == len(half) == 20


def test_what_shapes_the_images_is_in_the_key_and_nothing_else(tmp_path, digits) -> None:
    def key(method="dc", **words):
        task = make_task(tmp_path, digits, method, **words)
        return resolve(DISTILLERS, "distiller", task.method.distiller)().plan(task)[0].folder.key

    loops = {"1": [1, 1], "10": [7, 7]}
    keys = [
        key(),
        key(ipc=10),
        key(seed=1),
        key("dc-guard"),
        key("dsa"),
        key("dm"),
        key(image_lr=0.2),
        key(network_lr=0.2),
        key(ipc=10, loops=loops),
        key(regulariser={"kind": "curvature", "weight": 2.0, "h": "4/255"}),
    ]
    assert len(set(keys)) == len(keys)
    assert key(loops=loops) == key(), "another IPC's loops change nothing"


def test_the_forecast_counts_every_pass(tmp_path, digits) -> None:
    def passes(**words):
        task = make_task(tmp_path, digits, iterations=5, real_batch=16, **words)
        return resolve(DISTILLERS, "distiller", "dc")().plan(task)[0].passes

    assert passes() == pytest.approx(5 * (160 + 30))
    loops = {"2": [3, 4]}
    assert passes(ipc=2, loops=loops) == pytest.approx(5 * (3 * (160 + 60) + 2 * 4 * 20))
    words = {"kind": "curvature", "weight": 1.0, "h": 0.01}
    assert passes(regulariser=words) == pytest.approx(5 * (320 + 30))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"network_lr": 1e30, "ipc": 2, "loops": {"2": [3, 1]}}, "lower match.network_lr"),
        ({"loops": {"10": [1, 1]}}, r"digits@8.*loops has none for IPC 1; it has 10"),
        ({"loops": {"1": [0, 1]}}, r"method.toml.*digits@8.*match.loops.1"),
        ({"image_lr": -1}, r"method.toml.*digits@8.*match.image_lr"),
        ({"steps": 3}, r"method.toml.*digits@8.*match.steps"),
        ({"arch": "convnet-d3-bn-small"}, "batch norm; set match.arch"),
        ({"method": "dm", "arch": "convnet-d3-bn-small"}, "batch norm; set match.arch"),
        ({"method": "dm", "regulariser": {"kind": "trades"}}, "regulariser trades has nothing"),
        ({"regulariser": {"kind": "curvature", "weight": 1.0}}, r"regulariser curvature.*'h'"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, digits, words, told) -> None:
    task = make_task(tmp_path, digits, **words)
    with pytest.raises(GuardbenchError, match=told) as caught:
        plan_and_distil(task, digits)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("stage.json"))
