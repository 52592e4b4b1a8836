"""Squeeze and recover: the BN term against a plain reference, and all images at once against one by one."""

import dataclasses
import itertools
import math
from fractions import Fraction
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional as F
from torchvision.transforms.v2 import functional

from guardbench import stages
from guardbench.data.augment import draw_crops, draw_flips
from guardbench.data.dataset import load_split
from guardbench.distilled import load_distilled
from guardbench.distillers import sre2l
from guardbench.distillers.base import Task
from guardbench.distillers.squeeze import Squeeze, _backward, _batches, squeeze, squeeze_folder
from guardbench.distillers.sre2l import (
    Recover,
    SRe2L,
    _chunks,
    _groups,
    _left,
    _part,
    _ready,
    _recover_folder,
    bn_discrepancy,
    recover,
)
from guardbench.errors import GuardbenchError
from guardbench.methods import load_method
from guardbench.models import batch_norms, build_model
from guardbench.processes import Processes
from guardbench.progress import Progress
from guardbench.regularisers.base import Batch, build_regulariser
from guardbench.runtime import Run
from guardbench.sealed import write_tensors
from guardbench.stages import StageFolder
from guardbench.threat import ThreatModel


def make_task(tmp_path, *, ipc: int = 2, squeeze: dict | None = None, **recover: object) -> Task:
    method = load_method("guard")
    recipe = method.recipe("digits", 8)
    params = {stage: dict(words) for stage, words in recipe.params.items()}
    params["squeeze"] |= {"epochs": 2, **(squeeze or {})}
    params["recover"] |= {"iterations": 6, **recover}
    train = load_digits()
    return Task(
        run=Run(accelerator=Accelerator(cpu=True), workspace=tmp_path, seed=0, progress=Progress()),
        method=method,
        recipe=recipe.model_copy(update={"params": params}),
        dataset="digits",
        resolution=8,
        channels=1,
        classes=train.classes,
        train_images=len(train),
        train_digest=train.digest,
        ipc=ipc,
        threat=ThreatModel("linf", Fraction(16, 255)),
    )


def test_more_processes_or_parts_than_images_of_a_batch_are_one_line(tmp_path) -> None:
    task = make_task(tmp_path, squeeze={"batch_size": 8, "accumulate": 3})
    SRe2L().plan(task)
    task.run.processes.count = 3
    with pytest.raises(GuardbenchError, match="batch_size 8: is too small for 3 processes"):
        SRe2L().plan(task)


def test_parts_of_a_batch_add_up_to_it() -> None:
    threat = ThreatModel("linf", Fraction(16, 255))

    def gradients(parts: list[slice]) -> list[torch.Tensor]:
        # Without BN layers, whose statistics are of a part.
        model = build_model("convnet-d3", channels=1, classes=10, resolution=8, seed=3).double()
        x = torch.rand(7, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        y = torch.arange(7)
        batches = [
            Batch(model=model, images=x[rows], labels=y[rows], part=(7, rows)) for rows in parts
        ]
        value = _backward(
            build_regulariser({"kind": "gradient-norm", "weight": 0.3}, threat), batches
        )
        return [value, *(p.grad for p in model.parameters())]

    whole = gradients([slice(0, 7)])
    for one, other in zip(whole, gradients([slice(0, 3), slice(3, 6), slice(6, 7)]), strict=True):
        torch.testing.assert_close(one, other)


def load_digits():
    return load_split(
        "digits", "train", resolution=8, data_dir=None, cache_dir=None, progress=Progress()
    )


def trained_teacher():
    model = build_model("convnet-d3-bn-small", channels=1, classes=10, resolution=8, seed=3)
    model.train()
    for _ in range(5):
        model(torch.rand(32, 1, 8, 8))
    return model.eval().requires_grad_(False)


def test_the_bn_term_against_a_plain_reference() -> None:
    model = trained_teacher()
    x = torch.rand(6, 1, 8, 8)
    with bn_discrepancy(model, 2, 10.0) as terms:
        model(x)
    seen: list[torch.Tensor] = []
    handles = [
        layer.register_forward_pre_hook(lambda _m, args: seen.append(args[0].double()))
        for layer in batch_norms(model)
    ]
    wanted = [0.0] * len(handles)
    for group in (x[:3], x[3:]):
        seen.clear()
        model(group)
        for k, (layer, features) in enumerate(zip(batch_norms(model), seen, strict=True)):
            columns = features.transpose(0, 1).flatten(1)
            mean = (columns.mean(1) - layer.running_mean).norm()
            var = (columns.var(1, unbiased=False) - layer.running_var).norm()
            wanted[k] += float(mean + var) * (10.0 if k == 0 else 1.0)
    for handle in handles:
        handle.remove()
    assert [t.item() for t in terms] == pytest.approx(wanted, rel=1e-4)


def test_hooks_are_gone_afterwards() -> None:
    model = trained_teacher()
    with bn_discrepancy(model, 1, 1.0) as terms:
        model(torch.rand(2, 1, 8, 8))
    model(torch.rand(2, 1, 8, 8))
    assert len(terms) == len(batch_norms(model))


def test_all_groups_at_once_give_what_one_after_another_gives(tmp_path) -> None:
    together = SRe2L().distill(make_task(tmp_path / "a", images_a_batch=100), load_digits())
    alone = SRe2L().distill(make_task(tmp_path / "b", images_a_batch=10), load_digits())
    torch.testing.assert_close(together.images, alone.images, rtol=0, atol=2e-3)
    assert torch.equal(together.hard, alone.hard)


def test_a_smaller_ipc_is_a_part_of_a_larger_one(tmp_path) -> None:
    """Every IPC of a teacher starts from the same noise, group by group."""
    one = SRe2L().distill(make_task(tmp_path, ipc=1, images_a_batch=10), load_digits())
    two = SRe2L().distill(make_task(tmp_path, ipc=2, images_a_batch=10), load_digits())
    torch.testing.assert_close(two.images[::2], one.images, rtol=0, atol=2e-3)


def plain_recover(task: Task, teacher: torch.nn.Module) -> torch.Tensor:
    """Recover written out for whole images: group after group, Adam by hand; [10, ipc, 1, 8, 8]."""
    words, groups = task.recipe.params["recover"], []
    norms = batch_norms(teacher)
    for group in range(task.ipc):
        noise = task.run.generator("recover", "noise", group)
        images = torch.randn(10, 1, 8, 8, generator=noise)
        first, second = torch.zeros_like(images), torch.zeros_like(images)
        for step in range(words["iterations"]):
            generator = task.run.generator("recover", "view", group, step)
            draw_crops(1, 8, (1.0, 1.0), generator)
            mirrored = bool(draw_flips(1, generator)) and words["flip"]
            jitter = words["jitter"]
            down, right = torch.randint(-jitter, jitter + 1, (2,), generator=generator).tolist()
            leaf = images.clone().requires_grad_()
            view = torch.roll(leaf.flip(3) if mirrored else leaf, (down, right), (2, 3))
            seen: list[torch.Tensor] = []
            hooks = [
                norm.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
                for norm in norms
            ]
            loss = F.cross_entropy(teacher.backbone(view), torch.arange(10))
            for hook in hooks:
                hook.remove()
            for layer, (norm, maps) in enumerate(zip(norms, seen, strict=True)):
                mean, var = maps.mean((0, 2, 3)), maps.var((0, 2, 3), unbiased=False)
                term = (mean - norm.running_mean).norm() + (var - norm.running_var).norm()
                loss = loss + words["r_bn"] * (10.0 if layer == 0 else 1.0) * term
            (slope,) = torch.autograd.grad(loss, leaf)
            first = 0.5 * first + 0.5 * slope
            second = 0.9 * second + 0.1 * slope**2
            root = (second / (1 - 0.9 ** (step + 1))).sqrt() + 1e-8
            lr = words["lr"] * 0.5 * (1 + math.cos(math.pi * step / words["iterations"]))
            images = images - lr * first / (1 - 0.5 ** (step + 1)) / root
            images = images.clamp(-1, 1)  # grey images: (0 - 0.5) / 0.5 to (1 - 0.5) / 0.5
        groups.append(images * 0.5 + 0.5)
    return torch.stack(groups, 1)


@pytest.mark.parametrize("moved", [{}, {"jitter": 2}, {"flip": True}], ids=str)
def test_recovered_images_are_those_of_a_plain_loop(tmp_path, moved: dict) -> None:
    torch.manual_seed(5)
    teacher = trained_teacher()
    words = {"iterations": 4, "lr": 0.25, "r_bn": 0.3, "crop_scale": [1.0, 1.0]}
    task = make_task(tmp_path, **words, **{"jitter": 0, "flip": False} | moved)
    wanted = plain_recover(task, teacher)
    made = recover(task, teacher)
    torch.testing.assert_close(made.images.view_as(wanted), wanted, rtol=0, atol=1e-3)


def test_group_all_shares_statistics_and_so_differs(tmp_path) -> None:
    classes = SRe2L().distill(make_task(tmp_path, group="classes"), load_digits())
    everything = SRe2L().distill(make_task(tmp_path, group="all"), load_digits())
    assert (classes.images - everything.images).abs().max() > 0.01


def test_the_curriculum_goes_from_whole_images_to_the_smallest_crops(tmp_path, monkeypatch) -> None:
    """On a cosine, as CDA has it (Yin & Shen 2023, section 3.2), and the views are drawn by it."""
    common = {"iterations": 4, "lr": 1, "r_bn": 1, "jitter": 0, "crop_scale": (0.2, 1.0)}
    rising = Recover(**common, curriculum="cosine")
    lows = [rising.scale_at(share)[0] for share in (0.0, 0.25, 0.5, 1.0)]
    quarter = 1 - 0.8 * (1 - math.sqrt(0.5)) / 2
    assert lows == pytest.approx([1.0, quarter, 0.6, 0.2])
    assert {Recover(**common).scale_at(share) for share in (0.0, 0.5, 1.0)} == {(0.2, 1.0)}
    drawn: list[tuple[float, float]] = []

    def noted(count, side, scale, generator):
        drawn.append(scale)
        return draw_crops(count, side, scale, generator)

    monkeypatch.setattr(sre2l, "draw_crops", noted)
    task = make_task(tmp_path, ipc=1, iterations=4, crop_scale=[0.2, 1.0], curriculum="cosine")
    found = SRe2L().distill(task, load_digits())
    assert [low for low, _ in drawn] == pytest.approx([rising.scale_at(k / 4)[0] for k in range(4)])
    plain = make_task(tmp_path, ipc=1, iterations=4, crop_scale=[0.2, 1.0])
    assert not torch.equal(found.images, SRe2L().distill(plain, load_digits()).images)


def test_one_batch_holds_one_image_of_every_class() -> None:
    params = Recover(iterations=1, lr=1, r_bn=1, jitter=0)
    groups = _groups(250, 2, params)
    assert [len(g.labels) for g in groups] == [100, 100, 50, 100, 100, 50]
    assert sorted(k for g in groups[:3] for k in g.labels) == list(range(250))
    for chunk in _chunks(groups, 200):
        assert len({len(g.labels) for g in chunk}) == 1
        assert sum(len(g.labels) for g in chunk) <= 200


def test_an_artifact_comes_back_and_a_changed_file_does_not(tmp_path) -> None:
    task = make_task(tmp_path)
    made = SRe2L().distill(task, load_digits())
    folder = _recover_folder(task).path / "distilled"
    again = load_distilled(folder)
    assert torch.equal(again.images, made.images)
    assert again.manifest == made.manifest
    assert made.images.min() >= 0
    assert made.images.max() <= 1
    x = torch.rand(3, 1, 8, 8)
    assert again.teacher is not None
    assert made.teacher is not None
    torch.testing.assert_close(again.teacher(x), made.teacher(x))
    path = folder / "images.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(GuardbenchError, match="changed since its manifest"):
        load_distilled(folder)


def test_the_regulariser_changes_the_teacher_and_not_the_key_of_anything_else(tmp_path) -> None:
    task = make_task(tmp_path)
    recipe = task.recipe.model_copy(update={"regulariser": {"kind": "none"}})
    plain = dataclasses.replace(task, recipe=recipe)
    keys = [[s.folder.key for s in SRe2L().plan(t)] for t in (task, plain)]
    assert keys[0][0] != keys[1][0]
    a, b = (squeeze(t, Squeeze(**t.recipe.params["squeeze"]), load_digits()) for t in (task, plain))
    assert any(not torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def plain_squeeze(task: Task, words: dict, lrs: list[list[float]]) -> torch.nn.Module:
    """Squeeze written out: torchvision's crops and flips image by image, SGD by hand, an lr a step."""
    run, train = task.run, load_digits()
    seed = run.generator("squeeze", "init").initial_seed()
    model = build_model(words["arch"], channels=1, classes=10, resolution=8, seed=seed).train()
    velocity = [torch.zeros_like(weight) for weight in model.parameters()]
    for epoch, steps in enumerate(lrs):
        generator = run.generator("squeeze", "epoch", epoch)
        order = torch.randperm(len(train), generator=generator)
        for picked, lr in zip(torch.split(order, words["batch_size"]), steps, strict=False):
            boxes = draw_crops(len(picked), 8, tuple(words["crop_scale"]), generator)
            mirrored = draw_flips(len(picked), generator) & words["flip"]
            views = []
            for image, box, flip in zip(train.batch(picked), boxes.tolist(), mirrored, strict=True):
                view = functional.resized_crop(image, *box, size=[8, 8], antialias=False)
                views.append(functional.hflip(view) if flip else view)
            loss = F.cross_entropy(model(torch.stack(views)), train.labels[picked])
            slopes = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for weight, slope, before in zip(model.parameters(), slopes, velocity, strict=True):
                    before.mul_(0.9).add_(slope + words["weight_decay"] * weight)
                    weight -= lr * before
    return model


@pytest.mark.parametrize("flip", [False, True])
def test_a_squeezed_teacher_is_that_of_sgd_step_by_step(tmp_path, flip: bool) -> None:
    """Two steps an epoch: one epoch of linear warm-up, then a cosine to 0 over the other two."""
    own = {"arch": "convnet-d3-bn-small", "epochs": 3, "batch_size": 600, "lr": 0.05, "flip": flip}
    words = {**own, "weight_decay": 0.01, "warmup_epochs": 1, "crop_scale": [0.4, 1.0]}
    task = make_task(tmp_path, squeeze=words)
    plain = task.recipe.model_copy(update={"regulariser": {"kind": "none"}})
    task = dataclasses.replace(task, recipe=plain)
    half = math.sqrt(0.5)
    shares = [[0.01, 0.51], [1.0, (1 + half) / 2], [0.5, (1 - half) / 2]]
    wanted = plain_squeeze(task, words, [[0.05 * share for share in epoch] for epoch in shares])
    found = squeeze(task, Squeeze(**words), load_digits()).state_dict()
    for name, value in wanted.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-5, msg=name)


@pytest.mark.parametrize("checkpoint", [1, 13, 20])  # 13 steps an epoch
def test_a_squeeze_killed_after_any_step_ends_with_the_same_teacher(
    tmp_path, killed_at, checkpoint: int
) -> None:
    train, few = load_digits(), {"batch_size": 100, "epochs": 2}
    params = Squeeze(**make_task(tmp_path).recipe.params["squeeze"] | few)
    unbroken = squeeze(make_task(tmp_path / "a"), params, train)
    broken = make_task(tmp_path / "b")
    killed_at(checkpoint, lambda: squeeze(broken, params, train))
    resumed = squeeze(broken, params, train)
    for name, value in unbroken.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_squeeze_goes_on_from_a_checkpoint_that_knows_epochs_alone(tmp_path, killed_at) -> None:
    train, task = load_digits(), make_task(tmp_path / "a")
    params = Squeeze(**task.recipe.params["squeeze"] | {"batch_size": 100, "epochs": 2})
    unbroken = squeeze(task, params, train)
    broken = make_task(tmp_path / "b")
    killed_at(13, lambda: squeeze(broken, params, train))  # at the end of the first epoch
    (path,) = (tmp_path / "b").rglob("checkpoint.pt")
    stored = torch.load(path, weights_only=True)
    assert (stored["state"].pop("epoch"), stored["state"].pop("step")) == (1, 0)
    del stored["state"]["generator"]
    stored["state"]["epoch"] = 1
    torch.save(stored, path)
    resumed = squeeze(broken, params, train)
    for name, value in unbroken.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.parametrize("checkpoint", [1, 4])
def test_a_recover_killed_after_any_step_ends_with_the_same_images(
    tmp_path, killed_at, checkpoint: int
) -> None:
    teacher = trained_teacher()
    unbroken = recover(make_task(tmp_path / "a", images_a_batch=10), teacher)
    broken = make_task(tmp_path / "b", images_a_batch=10)
    killed_at(checkpoint, lambda: recover(broken, teacher))
    assert torch.equal(recover(broken, teacher).images, unbroken.images)


def test_a_recover_of_many_groups_holds_one_of_them(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a checkpoint nor the optimiser grows with what is done, and a kill keeps what is done."""
    teacher = trained_teacher()
    whole = recover(make_task(tmp_path / "a", ipc=3, iterations=3), teacher)
    monkeypatch.setattr(stages, "CHECKPOINT_EVERY_S", -1.0)
    task = make_task(tmp_path / "b", ipc=3, iterations=3, images_a_batch=10)
    sizes, real = [], StageFolder.checkpoint

    def checkpoint(self: StageFolder, state) -> None:
        real(self, state)
        assert state["images"].shape[0] == 10
        sizes.append(self.checkpoint_path.stat().st_size)
        if len(sizes) == 5:  # in the third group
            raise KeyboardInterrupt

    monkeypatch.setattr(StageFolder, "checkpoint", checkpoint)
    with pytest.raises(KeyboardInterrupt):
        recover(task, teacher)
    assert max(sizes) - min(sizes) < 1000
    folder = _recover_folder(task).path
    assert len(list(folder.glob("recovered-*"))) == 2
    found = recover(task, teacher)
    assert len(sizes) == 6, "two of each of three groups: none was optimised twice"
    torch.testing.assert_close(found.images, whole.images, atol=1e-4, rtol=0)
    assert found.hard.tolist() == whole.hard.tolist()
    assert not list(folder.glob("recovered-*"))


@pytest.mark.parametrize("checkpointed", [True, False])
def test_a_recover_whose_teacher_was_made_anew_begins_anew(
    tmp_path, killed_at, checkpointed: bool
) -> None:
    """Its folder goes by what makes the teacher: deleted and squeezed again, that may differ in bits."""
    words = {"ipc": 2, "iterations": 3, "images_a_batch": 10}
    broken = make_task(tmp_path / "b", **words)
    killed_at(4, lambda: recover(broken, trained_teacher()))  # in the second of two chunks
    (folder,) = {path.parent for path in (tmp_path / "b").rglob("recovered-*")}
    if not checkpointed:
        (folder / "checkpoint.pt").unlink()
    other = trained_teacher()
    with torch.no_grad():
        next(other.parameters()).mul_(1.5)
    assert torch.equal(
        recover(broken, other).images, recover(make_task(tmp_path / "a", **words), other).images
    )
    assert not list(folder.glob("recovered-*"))
    # A finished set carries its teacher: it stands, whatever the squeeze has given since.
    assert recover(broken, trained_teacher()).digest == recover(broken, other).digest


def test_a_thousand_classes_are_recovered_a_hundred_images_at_a_time() -> None:
    params = Recover(iterations=1, lr=0.1, r_bn=0.1, jitter=0)
    chunks = _chunks(_groups(1000, 50, params), params.images_a_batch)
    assert len(chunks) == 500
    assert all(len(chunk) == 1 and len(chunk[0].labels) == 100 for chunk in chunks)
    labels = [label for chunk in chunks for label in chunk[0].labels]
    assert sorted(labels) == [label for label in range(1000) for _ in range(50)]


def test_a_teacher_is_shared_by_every_ipc(tmp_path) -> None:
    keys = {SRe2L().plan(make_task(tmp_path, ipc=ipc))[0].folder.key for ipc in (1, 10, 50)}
    assert len(keys) == 1


def test_a_loss_that_is_not_finite_stops_at_once(tmp_path) -> None:
    task = make_task(tmp_path, squeeze={"lr": 1e30})
    with pytest.raises(
        GuardbenchError,
        match=r"squeeze, epoch 1, step \d+.*lower squeeze.lr or regulariser.weight, as",
    ):
        SRe2L().distill(task, load_digits())
    assert not list(tmp_path.rglob("stage.json"))


def test_a_teacher_without_bn_is_refused_in_the_plan(tmp_path) -> None:
    with pytest.raises(GuardbenchError, match="BN statistics"):
        SRe2L().plan(make_task(tmp_path, squeeze={"arch": "convnet-d3"}))


def test_a_wrong_regulariser_is_told_in_the_plan(tmp_path) -> None:
    task = make_task(tmp_path)
    words = {"kind": "curvature", "weight": 1.0}
    recipe = task.recipe.model_copy(update={"regulariser": words})
    with pytest.raises(GuardbenchError, match=r"regulariser curvature.*'h'"):
        SRe2L().plan(dataclasses.replace(task, recipe=recipe))


def test_a_wrong_recipe_names_its_field(tmp_path) -> None:
    with pytest.raises(GuardbenchError, match=r"method.toml.*digits@8.*recover.lr"):
        SRe2L().plan(make_task(tmp_path, lr=-1))


@pytest.mark.parametrize(("count", "parts"), [(1, 1), (1, 3), (6, 8), (5, 4)])
def test_every_process_takes_a_step_in_as_many_parts(tmp_path, count: int, parts: int) -> None:
    """BN layers wait for each other at each part: one more on one process would stop the run."""
    task, train = make_task(tmp_path), load_digits()
    model = build_model("convnet-d3-bn-small", channels=1, classes=10, resolution=8, seed=1)
    params = Squeeze.model_validate({**task.recipe.params["squeeze"], "accumulate": parts})
    picked, seen = torch.arange(64), [[] for _ in range(parts)]
    for rank in range(count):
        task.run.__dict__["processes"] = Processes(
            SimpleNamespace(process_index=rank, num_processes=count)
        )
        generator = torch.Generator().manual_seed(0)
        batches = list(_batches(task, train, model, params, picked, generator, 1.0))
        assert len(batches) == parts
        assert all(len(batch.images) for batch in batches)
        for part, batch in zip(seen, batches, strict=True):
            part += batch.labels.tolist()
    # A part holds what it holds on one process, in order.
    ends = [number * 64 // parts for number in range(parts + 1)]
    wanted = [train.labels[picked[a:b]].tolist() for a, b in itertools.pairwise(ends)]
    assert seen == wanted


def test_a_teacher_of_split_batch_statistics_is_not_that_of_one_process(tmp_path) -> None:
    task, keys = make_task(tmp_path), {}
    for synced in (True, False):
        words = {**task.recipe.params["squeeze"], "sync_bn": synced}
        params = Squeeze.model_validate(words)
        for count in (1, 4):
            task.run.__dict__["processes"] = Processes(
                SimpleNamespace(process_index=0, num_processes=count)
            )
            keys[synced, count] = squeeze_folder(task, params).key
    assert keys[True, 1] == keys[True, 4]
    assert len(set(keys.values())) == 3


def test_recovered_chunks_are_found_again_whatever_their_size(tmp_path) -> None:
    part = partial(_part, tmp_path, "0" * 64)
    groups = _groups(10, 5, Recover(iterations=1, lr=0.1, r_bn=1.0, jitter=0))
    write_tensors(part(0), {"images": torch.zeros(20, 1, 2, 2)})
    assert _ready(part, groups, print) == {0: 2}
    write_tensors(part(2), {"images": torch.zeros(30, 1, 2, 2)})
    assert _ready(part, groups, print) == {0: 2, 2: 3}, "of a run with more processes"
    assert _left(groups, {0: 2, 2: 3}) == []
    assert [[g.number for g in run] for run in _left(groups, {1: 1, 4: 1})] == [[0], [2, 3]]


def test_a_damaged_chunk_is_recovered_anew_and_told(tmp_path) -> None:
    part = partial(_part, tmp_path, "0" * 64)
    groups = _groups(10, 3, Recover(iterations=1, lr=0.1, r_bn=1.0, jitter=0))
    for first in range(3):
        write_tensors(part(first), {"images": torch.rand(10, 1, 2, 2)})
    whole = part(1).read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    for damaged in (b"", b"rubbish", whole[:-7], bytes(flipped)):
        said = []
        part(1).write_bytes(damaged)
        assert _ready(part, groups, said.append) == {0: 1, 2: 1}, "the others stay"
        assert len(said) == 1
        assert "recovered-000000000000-00001.safetensors: unreadable" in said[0]
