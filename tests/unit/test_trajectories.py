"""MTT and TESLA: the loss and its gradients against plain float64 references, experts, resume, bad input."""

import dataclasses
import shutil
import weakref
from fractions import Fraction

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from guardbench.data.dataset import load_split
from guardbench.distilled import load_distilled
from guardbench.distillers import experts as experts_module
from guardbench.distillers.base import Task
from guardbench.distillers.experts import (
    Experts,
    FlatNetwork,
    expert_folder,
    train_experts,
)
from guardbench.distillers.trajectories import MTT, TESLA
from guardbench.distillers.trajectory_loss import match_stepwise, match_unrolled
from guardbench.errors import GuardbenchError
from guardbench.methods import load_method
from guardbench.models import build_model
from guardbench.progress import Progress
from guardbench.runtime import Run
from guardbench.stages import StageFolder
from guardbench.threat import ThreatModel

pytestmark = pytest.mark.usefixtures("one_thread")

MATCH = {
    "iterations": 4,
    "steps": 2,
    "expert_epochs": 1,
    "max_start_epoch": 1,
    "image_lr": 1.0,
    "student_lr": 0.05,
    "lr_lr": 1e-5,
}


def make_task(
    tmp_path, *, method: str = "mtt", ipc: int = 1, seed: int = 0, experts: dict | None = None,
    regulariser: dict | None = None, **match: object,
) -> Task:  # fmt: skip
    chosen = load_method(method)
    recipe = chosen.recipe("digits", 8)
    params = {stage: dict(words) for stage, words in recipe.params.items()}
    small = {"arch": "convnet-d2-small", "count": 2, "epochs": 2, "batch_size": 256, "lr": 0.05}
    params["experts"] = small | (experts or {})
    params["match"] = {"by_ipc": {}} | MATCH | match
    train = load_digits()
    return Task(
        run=Run(
            accelerator=Accelerator(cpu=True), workspace=tmp_path, seed=seed, progress=Progress()
        ),
        method=chosen,
        recipe=recipe.model_copy(
            update={"params": params, "regulariser": regulariser or {"kind": "none"}}
        ),
        dataset="digits",
        resolution=8,
        channels=1,
        classes=train.classes,
        train_images=len(train),
        train_digest=train.digest,
        ipc=ipc,
        threat=ThreatModel("linf", Fraction(16, 255)),
    )


def load_digits():
    return load_split(
        "digits", "train", resolution=8, data_dir=None, cache_dir=None, progress=Progress()
    )


def weights_of(task: Task, number: int) -> dict[str, Tensor]:
    folder = expert_folder(task, Experts(**task.recipe.params["experts"]), number)
    return load_file(folder.path / "trajectory.safetensors")


class Problem:
    """A one-hidden-layer network of 4 inputs and 3 classes in float64, another batch every step.

    The reference is written without autograd for the student's gradient: tanh network, mean
    cross-entropy, its gradient by hand. Autograd then only differentiates the unrolled result.
    """

    hidden = 5

    def __init__(self, steps: int) -> None:
        generator = torch.Generator().manual_seed(steps)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.steps = steps
        self.images, self.labels = draw(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
        self.rows = [torch.randperm(6, generator=generator)[:4] for _ in range(steps)]
        self.start = 0.5 * draw(4 * self.hidden + self.hidden * 3)
        self.target = self.start + 0.3 * draw(len(self.start))
        self.lr = torch.tensor(0.4, dtype=torch.float64)

    def loss_at(self, weights: Tensor, images: Tensor, step: int) -> Tensor:
        first, second = self.split(weights)
        rows = self.rows[step]
        return F.cross_entropy(torch.tanh(images[rows] @ first) @ second, self.labels[rows])

    def split(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        cut = 4 * self.hidden
        return weights[:cut].view(4, self.hidden), weights[cut:].view(self.hidden, 3)

    def slope(self, weights: Tensor, images: Tensor, step: int) -> Tensor:
        """By hand: softmax minus label, back through the two layers."""
        first, second = self.split(weights)
        x, y = images[self.rows[step]], self.labels[self.rows[step]]
        h = torch.tanh(x @ first)
        scores = torch.exp(h @ second)
        error = (scores / scores.sum(1, keepdim=True) - torch.eye(3).double()[y]) / len(x)
        inner = (error @ second.T) * (1 - h**2)
        return torch.cat([(x.T @ inner).flatten(), (h.T @ error).flatten()])

    def reference(self, images: Tensor, lr: Tensor, *, known: bool = False) -> Tensor:
        """The matching loss; with `known`, each step's gradient is taken at weights held constant."""
        weights = self.start
        for step in range(self.steps):
            at = weights.detach() if known else weights
            weights = weights - lr * self.slope(at, images, step)
        return ((weights - self.target) ** 2).sum() / ((self.start - self.target) ** 2).sum()

    def gradients(self, *, known: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        images, lr = self.images.clone().requires_grad_(), self.lr.clone().requires_grad_()
        loss = self.reference(images, lr, known=known)
        return (loss.detach(), *torch.autograd.grad(loss, (images, lr)))

    def run(self, matcher) -> tuple[Tensor, Tensor, Tensor]:
        found = matcher(
            self.loss_at, self.steps, self.images, self.lr, self.start, self.target
        )  # fmt: skip
        return found.loss, found.in_images, found.in_lr


@pytest.mark.parametrize("steps", [1, 4])
def test_mtts_loss_and_gradients_against_a_plain_reference(steps: int) -> None:
    problem = Problem(steps)
    for found, wanted in zip(problem.run(match_unrolled), problem.gradients(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)


def test_mtts_gradients_against_finite_differences() -> None:
    problem, width = Problem(3), 1e-6
    _, in_images, in_lr = problem.run(match_unrolled)

    def slope(images: Tensor, lr: Tensor) -> float:
        ahead = problem.reference(problem.images + images, problem.lr + lr)
        behind = problem.reference(problem.images - images, problem.lr - lr)
        return (ahead - behind).item() / (2 * width)

    nothing = torch.zeros_like(problem.images)
    for index in ((0, 0), (2, 3), (5, 1)):
        moved = nothing.clone()
        moved[index] = width
        assert in_images[index].item() == pytest.approx(slope(moved, torch.tensor(0.0)), rel=1e-6)
    assert in_lr.item() == pytest.approx(slope(nothing, torch.tensor(width)), rel=1e-6)


@pytest.mark.parametrize("steps", [1, 4])
def test_teslas_gradient_is_mtts_with_the_weights_of_each_step_taken_as_known(steps: int) -> None:
    problem = Problem(steps)
    wanted = problem.gradients(known=True)
    for found, expected in zip(problem.run(match_stepwise), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


def test_what_tesla_drops_is_nothing_in_one_step_and_something_in_four() -> None:
    gaps = []
    for steps in (1, 4):
        whole, known = Problem(steps).run(match_unrolled), Problem(steps).run(match_stepwise)
        torch.testing.assert_close(whole[0], known[0], rtol=1e-10, atol=0)
        gaps.append(((whole[1] - known[1]).norm() / whole[1].norm()).item())
    assert gaps[0] < 1e-10
    assert gaps[1] > 0.01


def peak_saved(matcher, steps: int) -> int:
    """The most bytes of graphs alive at once, counted as autograd saves and frees them."""
    alive, peak = 0, 0

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal alive, peak
            self.tensor, size = tensor, tensor.numel() * tensor.element_size()
            alive += size
            peak = max(peak, alive)
            weakref.finalize(self, forget, size)

    def forget(size: int) -> None:
        nonlocal alive
        alive -= size

    problem = Problem(steps)
    with saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        problem.run(matcher)
    assert alive == 0
    return peak


def test_teslas_memory_does_not_grow_with_the_students_steps_and_mtts_does() -> None:
    assert peak_saved(match_stepwise, 12) == peak_saved(match_stepwise, 2)
    assert peak_saved(match_unrolled, 12) > 5 * peak_saved(match_unrolled, 2)


def test_a_flat_network_answers_as_the_network_does() -> None:
    net = build_model("convnet-d2-small", channels=1, classes=10, resolution=8, seed=1).backbone
    flat, images = FlatNetwork(net), torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(flat(flat.weights(), images), net(images))
    moved = flat.weights() + 0.01 * torch.randn(len(flat.weights()))
    nn.utils.vector_to_parameters(moved, net.to(memory_format=torch.contiguous_format).parameters())
    torch.testing.assert_close(flat(moved, images), net(images))


def test_an_experts_weights_are_those_of_sgd_step_by_step(tmp_path) -> None:
    task = make_task(tmp_path, experts={"count": 1, "batch_size": 500})
    (expert,) = train_experts(task, Experts(**task.recipe.params["experts"]), load_digits())
    seed = task.run.generator("expert", 0, "init").initial_seed()
    model = build_model("convnet-d2-small", channels=1, classes=10, resolution=8, seed=seed)
    flat, train = FlatNetwork(model.backbone), load_digits()
    assert torch.equal(expert.at(0), flat.weights())
    order = torch.randperm(len(train), generator=task.run.generator("expert", 0, "epoch", 0))
    weights = flat.weights()
    for picked in torch.split(order, 500):
        point = weights.clone().requires_grad_()
        logits = flat(point, model.normalise(train.batch(picked)))
        (slope,) = torch.autograd.grad(F.cross_entropy(logits, train.labels[picked]), point)
        weights = weights - 0.05 * slope
    torch.testing.assert_close(expert.at(1), weights, rtol=0, atol=1e-6)


def test_experts_are_shared_by_ipcs_and_methods_and_each_setting_has_its_own(tmp_path) -> None:
    def keys(distiller=MTT, **words: object) -> list[str]:
        stages = distiller().plan(make_task(tmp_path, **words))
        return [s.folder.key for s in stages if s.folder.name.startswith("expert")]

    base = keys()
    assert len(set(base)) == 2
    assert keys(ipc=10) == base
    assert keys(TESLA, method="tesla", labels="expert") == base
    assert keys(experts={"count": 3})[:2] == base
    for other in (
        keys(seed=1),
        keys(experts={"lr": 0.06}),
        keys(experts={"ema": 0.5}),
        keys(regulariser={"kind": "pgd"}),
    ):
        assert not set(other) & set(base)


def test_tesla_trains_no_expert_that_mtt_has_trained(tmp_path, monkeypatch) -> None:
    MTT().distill(make_task(tmp_path), load_digits())
    monkeypatch.setattr(experts_module, "_Training", None)
    TESLA().distill(make_task(tmp_path, method="tesla", ipc=2, labels="expert"), load_digits())
    with pytest.raises(TypeError):  # another setting does need training
        TESLA().distill(make_task(tmp_path, seed=1), load_digits())


def test_a_regulariser_and_smoothing_shape_the_experts(tmp_path) -> None:
    epochs = {}
    for name, words in {
        "plain": {},
        "pgd": {"regulariser": {"kind": "pgd", "steps": 1, "step": 1.0}},
        "ema": {"experts": {"ema": 0.9}},
    }.items():
        task = make_task(tmp_path, experts={"count": 1} | words.pop("experts", {}), **words)
        train_experts(task, Experts(**task.recipe.params["experts"]), load_digits())
        epochs[name] = weights_of(task, 0)
    assert all(torch.equal(epochs["plain"]["0"], found["0"]) for found in epochs.values())
    assert not torch.equal(epochs["plain"]["1"], epochs["pgd"]["1"])
    # The average trails behind: after a few steps it is closer to where all began.
    moved = {name: (found["1"] - found["0"]).norm() for name, found in epochs.items()}
    assert 0 < moved["ema"] < 0.5 * moved["plain"]


class Killed(Exception):  # noqa: N818
    """A kill, right after a checkpoint."""


def kill_after(monkeypatch, name: str, checkpoints: int) -> None:
    """The stage called `name` checkpoints whenever it may, and dies after that many."""
    written, original = [], StageFolder.checkpoint

    def checkpoint(folder: StageFolder, state) -> None:
        original(folder, state)
        written.append(folder)
        if folder.name == name and sum(f.name == name for f in written) == checkpoints:
            raise Killed

    monkeypatch.setattr(StageFolder, "due", lambda _: True)
    monkeypatch.setattr(StageFolder, "checkpoint", checkpoint)


@pytest.mark.parametrize(("stage", "checkpoints"), [("expert 1", 1), ("match", 2)])
@pytest.mark.parametrize("distiller", [MTT, TESLA])
def test_a_killed_run_ends_as_an_unbroken_one(
    tmp_path, monkeypatch, distiller, stage: str, checkpoints: int
) -> None:
    words = {"experts": {"ema": 0.5, "momentum": 0.9}, "labels": "expert", "batch_size": 6}
    train = load_digits()
    whole = distiller().distill(make_task(tmp_path / "a", **words), train)
    broken = make_task(tmp_path / "b", **words)
    with monkeypatch.context() as patch:
        kill_after(patch, stage, checkpoints)
        with pytest.raises(Killed):
            distiller().distill(broken, train)
    first = expert_folder(broken, Experts(**broken.recipe.params["experts"]), 0)
    assert first.finished() is not None
    assert len(list((tmp_path / "b").rglob("checkpoint.pt"))) == 1
    again = distiller().distill(broken, train)
    assert again.manifest == whole.manifest
    assert torch.equal(again.images, whole.images)


def test_a_match_whose_experts_were_made_anew_begins_anew(tmp_path, monkeypatch) -> None:
    def other_experts(task: Task) -> None:
        for number in range(2):
            folder = expert_folder(task, Experts(**task.recipe.params["experts"]), number)
            path = folder.path / experts_module.TRAJECTORY
            save_file({name: row * 1.1 for name, row in load_file(path).items()}, path)
            (folder.path / "stage.json").unlink()
            folder.begin(torch.device("cpu"))
            folder.finish(torch.device("cpu"), (experts_module.TRAJECTORY,))

    train, (whole, broken) = load_digits(), (make_task(tmp_path / name) for name in "ab")
    with monkeypatch.context() as patch:
        kill_after(patch, "match", 2)
        with pytest.raises(Killed):
            MTT().distill(broken, train)
    train_experts(whole, Experts(**whole.recipe.params["experts"]), train)
    other_experts(whole)
    other_experts(broken)
    expected, found = (MTT().distill(task, train) for task in (whole, broken))
    assert torch.equal(found.images, expected.images)


def test_experts_that_were_deleted_are_made_again_though_the_set_is_there(tmp_path) -> None:
    task = make_task(tmp_path)
    made = MTT().distill(task, load_digits())
    shutil.rmtree(tmp_path / "experts")
    assert MTT().distill(task, load_digits()).manifest == made.manifest
    # A run asks every stage of its plan for its cost.
    assert all(stage.folder.finished() is not None for stage in MTT().plan(task))


def test_equal_seeds_give_equal_digests_and_others_do_not(tmp_path) -> None:
    first, second, other = (
        MTT().distill(make_task(tmp_path / str(k), seed=seed), load_digits())
        for k, seed in enumerate((0, 0, 1))
    )
    assert first.manifest.sha256 == second.manifest.sha256
    assert not torch.equal(first.images, other.images)


def test_the_artifact_holds_soft_labels_and_the_learnt_rate(tmp_path) -> None:
    task = make_task(tmp_path, ipc=2, labels="expert", image_lr=1e-9, lr_lr=1e-4)
    made = TESLA().distill(task, load_digits())
    again = load_distilled(TESLA().plan(task)[-1].folder.path / "distilled")
    assert TESLA().label_kind(task) == again.manifest.label_kind == "soft"
    assert again.soft is not None
    assert made.soft is not None
    assert torch.equal(again.soft, made.soft)
    # The images have not moved, so the first expert's last answer to them is what labels them.
    expert = weights_of(task, 0)["2"]
    model = build_model("convnet-d2-small", channels=1, classes=10, resolution=8, seed=0)
    logits = FlatNetwork(model.backbone)(expert, model.normalise(made.images))
    torch.testing.assert_close(again.soft, torch.softmax(logits, 1), rtol=0, atol=1e-5)
    assert float(str(again.manifest.provenance["student_lr"])) not in (0.05, 0.0)
    hard = make_task(tmp_path, ipc=2)
    assert (
        MTT().label_kind(hard) == MTT().distill(hard, load_digits()).manifest.label_kind == "hard"
    )


def test_the_images_fall_in_loss_and_stay_in_range(tmp_path) -> None:
    """One fixed stretch of one expert, so that losses of different steps can be compared."""
    losses: list[float] = []
    widest: list[float] = []

    class Seen(MTT):
        @staticmethod
        def matcher(*words):
            found = match_unrolled(*words)
            losses.append(found.loss.item())
            widest.append(words[2].abs().max().item())  # normalised images: -1 to 1
            return found

    task = make_task(
        tmp_path, experts={"count": 1}, max_start_epoch=0, iterations=15, image_lr=30.0, steps=5
    )
    made = Seen().distill(task, load_digits())
    assert losses[-1] < 0.95 * losses[0]
    assert max(widest) <= 1
    assert 0 <= made.images.min() <= made.images.max() <= 1


def test_noise_and_views_are_choices(tmp_path) -> None:
    found = [
        MTT().distill(make_task(tmp_path, **words), load_digits()).images
        for words in ({}, {"init": "noise"}, {"crop_scale": [0.5, 1.0]})
    ]
    for k, images in enumerate(found):
        assert torch.isfinite(images).all()
        assert all((images - other).abs().max() > 1e-3 for other in found[k + 1 :])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"match": {"steps": None}}, r"digits@8.*nothing of steps for IPC 1; it has IPC 10"),
        ({"match": {"image_lr": -1}}, r"digits@8.*params\.match\.image_lr: must be greater than"),
        ({"match": {"stepz": 1}}, r"digits@8.*params\.match\.stepz"),
        (
            {"match": {"iterations": True}},
            r"params\.match\.iterations: must be a whole number, not true",
        ),
        ({"match": {"init": 3}}, r"params\.match\.init: must be 'real' or 'noise', not 3"),
        ({"match": {"max_start_epoch": 2}}, r"epoch 3 of the experts .* end at 2"),
        ({"match": {"labels": "expert", "init": "noise"}}, r"set match\.init to real"),
        ({"experts": {"arch": "convnet-d3-bn-small"}}, r"BN statistics.*set experts\.arch"),
        ({"regulariser": {"kind": "curvature", "weight": 1.0}}, r"regulariser curvature.*'h'"),
    ],
)
def test_a_wrong_recipe_is_one_line_in_the_plan(tmp_path, words, message: str) -> None:
    match = {"by_ipc": {"10": {"steps": 3}}} | words.pop("match", {})
    with pytest.raises(GuardbenchError, match=message) as caught:
        MTT().plan(make_task(tmp_path, **match, **words))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"experts": {"lr": 1e30}}, r"expert 0, epoch 1, step \d.*lower experts\.lr"),
        ({"student_lr": 1e30}, r"match, step 1:.*lower match\.image_lr, match\.student_lr"),
        ({"student_lr": 2.0, "lr_lr": 1e6}, r"match, step 1:.*rate fell to -.*lower match\.lr_lr"),
    ],
)
def test_what_diverges_stops_at_once_and_leaves_nothing_finished(tmp_path, words, message) -> None:
    task = make_task(tmp_path, **words)
    with pytest.raises(GuardbenchError, match=message):
        MTT().distill(task, load_digits())
    assert MTT().plan(task)[-1].folder.finished() is None


def test_a_buffer_of_another_length_or_with_changed_bytes_is_one_line(tmp_path) -> None:
    task = make_task(tmp_path)
    params = Experts(**task.recipe.params["experts"])
    expert = train_experts(task, params, load_digits())[0]
    with pytest.raises(GuardbenchError, match="no weights of epoch 7"):
        expert.at(7)
    data = bytearray(expert.path.read_bytes())
    data[-1] ^= 1
    expert.path.write_bytes(bytes(data))
    with pytest.raises(GuardbenchError, match="changed since it was written"):
        train_experts(task, params, load_digits())


def test_the_plan_counts_what_will_be_done(tmp_path) -> None:
    task = make_task(tmp_path, ipc=2, batch_size=6, regulariser={"kind": "pgd", "steps": 3})
    *experts, match = MTT().plan(task)
    assert [stage.passes for stage in experts] == [2 * len(load_digits()) * 3.0] * 2
    assert match.passes == 4 * 2 * 6 * 3
    assert match.fp32
    stepwise = TESLA().plan(dataclasses.replace(task, method=load_method("tesla")))[-1]
    assert stepwise.passes == 4 * 2 * 6 * 4
    assert stepwise.folder.key != match.folder.key


@pytest.mark.parametrize("checkpoints", [2, 7])
def test_an_expert_killed_in_the_midst_of_an_epoch_ends_with_the_same_trajectory(
    tmp_path, monkeypatch, checkpoints: int
) -> None:
    """So one that is stopped more often than an epoch takes still gets to its end."""
    words = {
        "experts": {
            "count": 1,
            "ema": 0.5,
            "momentum": 0.9,
            "crop_scale": [0.5, 1.0],
            "flip": True,
        },
        "regulariser": {"kind": "pgd", "steps": 1, "step": 1.0},
    }
    train, (whole, broken) = load_digits(), (make_task(tmp_path / name, **words) for name in "ab")
    params = Experts(**whole.recipe.params["experts"])
    steps = -(-len(train) // params.batch_size)
    assert 2 < steps < 7 < 2 * steps, "in the first epoch, and in the second"
    made, step = [], experts_module._Training._step
    monkeypatch.setattr(
        experts_module._Training, "_step", lambda *them: made.append(them[1:3]) or step(*them)
    )
    with monkeypatch.context() as patch:
        kill_after(patch, "expert 0", checkpoints)
        with pytest.raises(Killed):
            train_experts(broken, params, train)
    train_experts(broken, params, train)
    assert made == [(epoch, place) for epoch in range(2) for place in range(steps)], "none twice"
    train_experts(whole, params, train)
    for name, weights in weights_of(whole, 0).items():
        assert torch.equal(weights, weights_of(broken, 0)[name]), name
