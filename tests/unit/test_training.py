"""Views and students: the teacher labels exactly what the student sees."""

import contextlib
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from guardbench import training
from guardbench.distilled import save_distilled
from guardbench.errors import GuardbenchError
from guardbench.labels import INDEX, LabelStore
from guardbench.models import build_model
from guardbench.progress import Progress
from guardbench.protocol import load_protocol
from guardbench.runtime import Run
from guardbench.stages import StageFolder
from guardbench.training import (
    label_store,
    plan_relabel,
    plan_student,
    relabel,
    train_students,
)
from guardbench.views import epoch_views

CLASSES = tuple(str(k) for k in range(10))


def make_run(tmp_path) -> Run:
    return Run(accelerator=Accelerator(cpu=True), workspace=tmp_path, seed=0, progress=Progress())


def make_student(**update: object):
    return load_protocol("digits").student.model_copy(update={"epochs": 3, **update})


def make_set(tmp_path, kind: str, *, ipc: int = 2, images: torch.Tensor | None = None):
    hard = torch.arange(10).repeat_interleave(ipc)
    torch.manual_seed(1)
    teacher = build_model("convnet-d3-bn-small", channels=1, classes=10, resolution=8, seed=9)
    return save_distilled(
        tmp_path / "set",
        images=torch.rand(10 * ipc, 1, 8, 8) if images is None else images,
        hard=hard,
        teacher=teacher.eval() if kind == "teacher" else None,
        teacher_arch="convnet-d3-bn-small" if kind == "teacher" else None,
        soft=torch.eye(10)[hard] if kind == "soft" else None,
        dataset="digits",
        ipc=ipc,
        method="made-by-hand",
        classes=CLASSES,
        provenance={},
    )


def test_every_image_is_seen_once_an_epoch_and_epochs_differ() -> None:
    student = make_student(batch_size=16)
    kwargs = {"images": 50, "resolution": 8, "seed": 4}
    one, same, other = (list(epoch_views(student, epoch=e, **kwargs)) for e in (0, 0, 1))
    assert torch.cat([v.indices for v in one]).sort().values.tolist() == list(range(50))
    assert [len(v.indices) for v in one] == [16, 16, 16, 2]
    images = torch.rand(50, 1, 8, 8)
    for a, b in zip(one, same, strict=True):
        assert torch.equal(a.render(images), b.render(images))
    assert not torch.equal(one[0].indices, other[0].indices)


def test_a_view_without_augmentation_is_the_image() -> None:
    student = make_student(crop_scale=(1.0, 1.0), cutmix=0.0, flip=False)
    images = torch.rand(20, 1, 8, 8)
    for view in epoch_views(student, images=20, resolution=8, seed=0, epoch=0):
        torch.testing.assert_close(view.render(images), images[view.indices], atol=1e-5, rtol=0)


def test_the_stored_labels_are_the_teachers_on_the_students_views(tmp_path) -> None:
    run, student = make_run(tmp_path), make_student(batch_size=8)
    made = make_set(tmp_path, "teacher")
    stage = plan_relabel(run, "k", student, 20)
    relabel(run, made, student, stage)
    store = label_store(made, student, stage)
    stored = [store.read(epoch, sha) for epoch, sha in enumerate(store.digests())]
    assert [(rows.shape, rows.dtype) for rows in stored] == [((20, 10), torch.float16)] * 3
    files = [store.path(epoch) for epoch in range(3)]
    told = stage.folder.finished()["label_bytes"]
    assert told == sum(file.stat().st_size for file in files)
    assert 0 < told - 3 * 20 * store.row_bytes < 3 * 200, "the headers"
    name = run.generator("views", "shared").initial_seed()
    for epoch in range(3):
        views = epoch_views(student, images=20, resolution=8, seed=name, epoch=epoch)
        with torch.no_grad():
            rows = torch.cat([made.teacher(v.render(made.images)) for v in views])
        torch.testing.assert_close(stored[epoch].float(), rows, atol=5e-3, rtol=5e-3)


def test_the_top_k_keep_their_probabilities_and_the_others_share_what_is_left(tmp_path) -> None:
    """FKD's marginal smoothing, at the students' temperature, in 2 (2 k + 1) bytes a row."""
    torch.manual_seed(0)
    logits, heat = 10 * torch.randn(50, 1000), 20.0
    store = LabelStore(tmp_path, classes=1000, top_k=5, temperature=heat)
    store.write(0, logits)
    store.seal(1)
    (sha,) = store.digests()
    assert store.row_bytes == 22
    assert store.path(0).stat().st_size - 50 * 22 < 300
    truth = torch.softmax(logits / heat, 1)
    found = torch.softmax(store.read(0, sha).float() / heat, 1)
    best = truth.topk(5, 1)
    torch.testing.assert_close(found.gather(1, best.indices), best.values, rtol=2e-3, atol=0)
    others = found.scatter(1, best.indices, 0.0)
    left = (1 - best.values.sum(1)) / 995
    torch.testing.assert_close(others.max(1).values, left, rtol=2e-3, atol=0)
    assert int((others > 0).sum(1).min()) == 995
    whole = LabelStore(tmp_path / "whole", classes=1000, top_k=1000)
    whole.write(0, logits)
    whole.seal(1)
    assert whole.read(0, whole.digests()[0]).equal(logits.half()), "k of K is all of them"


@pytest.mark.parametrize("top_k", [None, 5])
def test_a_damaged_file_of_an_unfinished_relabel_is_written_again(tmp_path, top_k) -> None:
    torch.manual_seed(0)
    logits = torch.randn(20, 10)
    store = LabelStore(tmp_path, classes=10, top_k=top_k)
    for epoch in range(5):
        store.write(epoch, logits)
    assert store.left(6, 20) == [5]
    whole = store.path(1).read_bytes()
    store.path(1).write_bytes(whole[:-3])
    store.path(2).write_bytes(b"rubbish")
    store.write(3, logits[:19])
    store.path(4).write_bytes(b"")
    assert store.left(6, 20) == [1, 2, 3, 4, 5]
    flipped = bytearray(whole)
    flipped[-1] ^= 1  # in a number, where the file still has its form
    store.path(0).write_bytes(flipped)
    assert store.left(1, 20) == [0]
    store.write(1, logits)
    assert store.path(1).read_bytes() == whole
    other = LabelStore(tmp_path, classes=10, top_k=None if top_k else 5)
    assert 0 in other.left(1, 20), "the labels of another store are not taken for these"


def test_a_protocol_with_top_k_is_another_and_one_without_is_as_it_was(tmp_path) -> None:
    run, plain, few = make_run(tmp_path), make_student(), make_student(label_top_k=3)
    assert "label_top_k" not in plain.words()
    assert few.words()["label_top_k"] == 3
    made = make_set(tmp_path, "teacher")
    keys, students = [], []
    for student in (plain, few):
        labels = plan_relabel(run, "k", student, 20)
        stage = plan_student(run, "k", student, 20, 0)
        relabel(run, made, student, labels)
        students.append(train_students(run, made, student, {0: stage}, labels)[0](made.images))
        keys += [labels.folder.key, stage.folder.key]
    assert len(set(keys)) == 4
    assert not torch.equal(*students)


@pytest.mark.parametrize("fault", ["changed", "gone", "index"])
def test_labels_that_are_not_those_that_were_written_are_refused(tmp_path, fault: str) -> None:
    run, student = make_run(tmp_path), make_student()
    made = make_set(tmp_path, "teacher")
    labels = plan_relabel(run, "k", student, 20)
    relabel(run, made, student, labels)
    store = label_store(made, student, labels)
    file = store.path(1)
    if fault == "changed":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    elif fault == "gone":
        file.unlink()
    else:
        (store.folder / INDEX).write_text("{}")
    stage = plan_student(run, "k", student, 20, 0)
    with pytest.raises(GuardbenchError, match=r"labels(-00001\.safetensors|\.json).*run again"):
        train_students(run, made, student, {0: stage}, labels)[0]


def test_a_killed_relabel_labels_only_the_epochs_that_are_not_there(
    tmp_path, killed_at, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, student = make_run(tmp_path), make_student(epochs=5)
    made = make_set(tmp_path, "teacher")
    labels = plan_relabel(run, "k", student, 20)
    killed_at(3, lambda: relabel(run, made, student, labels))  # the first is before all epochs
    store = label_store(made, student, labels)
    assert store.left(5, rows=20) == [2, 3, 4]
    store.path(0).unlink()
    asked: list[int] = []
    real = training.label_epoch
    monkeypatch.setattr(
        training, "label_epoch", lambda *words: asked.append(words[-1]) or real(*words)
    )
    relabel(run, made, student, labels)
    assert asked == [0, 2, 3, 4]


def test_labels_for_which_there_is_no_room_are_refused_before_the_first(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, student = make_run(tmp_path), make_student()
    made = make_set(tmp_path, "teacher")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3 * 20 * 20 - 1))
    labels = plan_relabel(run, "k", student, 20)
    with pytest.raises(GuardbenchError, match=r"labels take 0\.00 GB .* --output"):
        relabel(run, made, student, labels)
    assert not list(labels.folder.path.glob("labels-*"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    relabel(run, made, student, labels)


def test_an_added_student_moves_no_other(tmp_path) -> None:
    student, found = make_student(batch_size=10, cutmix=1.0), []
    made = make_set(tmp_path, "hard")
    for seeds in ([1], [7, 1]):
        run = make_run(tmp_path / f"{len(seeds)}")
        for seed in seeds:
            stage = plan_student(run, "k", student, 20, seed)
            (model,) = train_students(run, made, student, {seed: stage}, None)
        found.append(model.state_dict())
    alone, after = found
    assert all(torch.equal(weights, after[name]) for name, weights in alone.items())


@pytest.mark.parametrize("kind", ["hard", "soft", "teacher"])
def test_a_student_learns_from_every_kind_of_label(tmp_path, kind: str) -> None:
    """Ten classes of one bright row or column each: a student that learns nothing stays at 10%."""
    images = torch.zeros(40, 1, 8, 8)
    for k, picture in enumerate(images):
        line = (k // 4) % 5
        if k // 4 < 5:
            picture[:, line + 1] = 1
        else:
            picture[:, :, line + 1] = 1
    run = make_run(tmp_path)
    student = make_student(
        epochs=40, batch_size=10, crop_scale=(1.0, 1.0), cutmix=0.0, temperature=1.0, lr=0.01
    )
    made = make_set(tmp_path, kind, ipc=4, images=images)
    labels = None
    truth = made.hard
    if kind == "teacher":
        labels = plan_relabel(run, "k", student, 40)
        relabel(run, made, student, labels)
        with torch.no_grad():
            truth = made.teacher(images).argmax(1)
    stage = plan_student(run, "k", student, 40, 0)
    model = train_students(run, made, student, {0: stage}, labels)[0]
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert (model(images).argmax(1) == truth).float().mean() > 0.9


def test_a_student_of_sgd_is_that_of_a_plain_loop(tmp_path) -> None:
    """Two epochs of one step on all images as they are, the second at a tenth of the learning rate."""
    run = make_run(tmp_path)
    student = make_student(
        optimizer="sgd", schedule="half", epochs=2, batch_size=20, lr=0.1, momentum=0.8,
        weight_decay=0.05, crop_scale=(1.0, 1.0), cutmix=0.0, flip=False,
    )  # fmt: skip
    made = make_set(tmp_path, "hard")
    seed = run.generator("student", "init", 4).initial_seed()
    model = build_model(student.arch, channels=1, classes=10, resolution=8, seed=seed).train()
    velocity = [torch.zeros_like(weight) for weight in model.parameters()]
    for lr in (0.1, 0.01):
        loss = torch.nn.functional.cross_entropy(model(made.images), made.hard)
        slopes = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for weight, slope, before in zip(model.parameters(), slopes, velocity, strict=True):
                before.mul_(0.8).add_(slope + 0.05 * weight)
                weight -= lr * before
    stage = plan_student(run, "k", student, 20, 4)
    (found,) = train_students(run, made, student, {4: stage}, None)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=0, atol=2e-5, msg=name)


def test_seeds_differ_and_a_finished_student_is_read_back(tmp_path) -> None:
    run, student = make_run(tmp_path), make_student()
    made = make_set(tmp_path, "hard")
    x = torch.rand(4, 1, 8, 8)
    out = []
    for seed in (0, 0, 1):
        stage = plan_student(run, "k", student, 20, seed)
        out.append(train_students(run, made, student, {seed: stage}, None)[0](x))
    assert torch.equal(out[0], out[1])
    assert not torch.equal(out[0], out[2])


@pytest.mark.parametrize("checkpoint", [1, 2])
def test_labels_and_students_killed_after_any_epoch_end_the_same(
    tmp_path, killed_at, checkpoint: int
) -> None:
    made, student = make_set(tmp_path, "teacher"), make_student()
    found = []
    for name in ("unbroken", "broken"):
        run = make_run(tmp_path / name)
        labels = plan_relabel(run, "k", student, 20)
        stage = plan_student(run, "k", student, 20, 0)

        def label(run=run, labels=labels) -> object:
            return relabel(run, made, student, labels)

        def train(run=run, labels=labels, stage=stage) -> object:
            return train_students(run, made, student, {0: stage}, labels)[0]

        if name == "broken":
            killed_at(checkpoint, label)
        label()
        if name == "broken":
            killed_at(checkpoint, train)
        found.append(train().state_dict())
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


def test_students_are_claimed_in_one_order_whatever_that_of_their_seeds(
    tmp_path, monkeypatch
) -> None:
    """Two runs that share two students and name them in turn would wait for each other."""
    run, made, student = make_run(tmp_path), make_set(tmp_path, "hard"), make_student()
    stages = {seed: plan_student(run, "k", student, 20, seed) for seed in range(4)}
    asked: list[Path] = []

    @contextlib.contextmanager
    def claimed(folder, _made_from):
        asked.append(folder.path)
        yield {}

    monkeypatch.setattr(StageFolder, "claimed", claimed)
    monkeypatch.setattr(training, "load_trained", lambda *_: None)
    for seeds in ((0, 1, 2, 3), (3, 1, 0, 2)):
        asked.clear()
        train_students(run, made, student, {seed: stages[seed] for seed in seeds}, None)
        assert asked == sorted(stage.folder.path for stage in stages.values())


def test_a_student_whose_loss_explodes_is_stopped(tmp_path) -> None:
    run, student = make_run(tmp_path), make_student(lr=1e20)
    made = make_set(tmp_path, "hard")
    stage = plan_student(run, "k", student, 20, 0)
    with pytest.raises(GuardbenchError, match=r"student 0, epoch \d.*student\.lr"):
        train_students(run, made, student, {0: stage}, None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x * 2 - 1, r"\[0, 1\]"),
        (lambda x: x / 0, "finite"),
        (lambda x: x[:-1], "one label each"),
        (lambda x: x.double(), "float32"),
    ],
)
def test_what_is_no_distilled_set_is_not_written(tmp_path, change, said: str) -> None:
    images = change(torch.rand(20, 1, 8, 8))
    with pytest.raises(GuardbenchError, match=said):
        make_set(tmp_path, "hard", images=images)
    assert not (tmp_path / "set").exists()


def test_a_class_with_too_few_images_is_named(tmp_path) -> None:
    with pytest.raises(GuardbenchError, match="class 0 has 2 images where IPC is 3"):
        save_distilled(
            tmp_path,
            images=torch.rand(20, 1, 8, 8),
            hard=torch.arange(10).repeat_interleave(2),
            teacher=None,
            dataset="digits",
            ipc=3,
            method="m",
            classes=CLASSES,
            provenance={},
        )


def test_labels_of_a_set_made_anew_are_made_anew_however_early_the_kill(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The set was deleted and made again with other bits, as on another device."""
    student, real = make_student(), training.label_epoch
    old = make_set(tmp_path / "old", "teacher")
    new = make_set(tmp_path / "new", "teacher", images=old.images.flip(0))
    run = make_run(tmp_path / "broken")
    labels = plan_relabel(run, "k", student, 20)

    def dies(*words):
        if words[-1] == 1:
            raise KeyboardInterrupt
        return real(*words)

    with monkeypatch.context() as patched:
        patched.setattr(training, "label_epoch", dies)
        with pytest.raises(KeyboardInterrupt):
            relabel(run, old, student, labels, old.digest)
    store = label_store(new, student, labels)
    assert store.left(3, rows=20) == [1, 2], "long before the first checkpoint that is due"
    relabel(run, new, student, labels, new.digest)
    unbroken = make_run(tmp_path / "unbroken")
    whole = plan_relabel(unbroken, "k", student, 20)
    relabel(unbroken, new, student, whole, new.digest)
    assert store.digests() == label_store(new, student, whole).digests()


def test_labels_without_the_checkpoint_that_says_whose_they_are_are_made_anew(tmp_path) -> None:
    run, student, made = make_run(tmp_path), make_student(), make_set(tmp_path, "teacher")
    labels = plan_relabel(run, "k", student, 20)
    store = label_store(made, student, labels)
    store.write(0, torch.zeros(20, 10))  # whole, and of whatever set
    relabel(run, made, student, labels, made.digest)
    assert store.read(0, store.digests()[0]).any()


def test_an_unfinished_student_begins_anew_where_its_labels_are_others_now(
    tmp_path, killed_at, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were deleted and made again on a device that rounds otherwise; what is finished stands."""
    made, student, real = make_set(tmp_path, "teacher"), make_student(), training.label_epoch
    run = make_run(tmp_path / "broken")
    labels, stages = (
        plan_relabel(run, "k", student, 20),
        [plan_student(run, "k", student, 20, seed) for seed in (0, 1)],
    )
    relabel(run, made, student, labels)
    (finished,) = train_students(run, made, student, {1: stages[1]}, labels)
    killed_at(2, lambda: train_students(run, made, student, {0: stages[0]}, labels))
    shutil.rmtree(labels.folder.path)
    monkeypatch.setattr(training, "label_epoch", lambda *words: real(*words) / 2)
    found = []
    for where in (run, make_run(tmp_path / "unbroken")):
        labels = plan_relabel(where, "k", student, 20)
        relabel(where, made, student, labels)
        stage = plan_student(where, "k", student, 20, 0)
        found.append(train_students(where, made, student, {0: stage}, labels)[0](made.images))
    assert torch.equal(*found)
    (again,) = train_students(run, made, student, {1: stages[1]}, labels)
    assert torch.equal(again(made.images), finished(made.images))
