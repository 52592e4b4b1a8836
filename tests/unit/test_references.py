"""References: the comparison students get what they should, and nothing else."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from guardbench.data.dataset import load_split
from guardbench.distilled import load_distilled, save_distilled
from guardbench.models import build_model
from guardbench.progress import Progress
from guardbench.protocol import load_protocol
from guardbench.references import measure_references, plan_references, random_subset
from guardbench.runtime import Run
from guardbench.scoring import Costs
from guardbench.training import train_students
from guardbench.views import epoch_views


@pytest.fixture(scope="module")
def digits():
    return [
        load_split(
            "digits", split, resolution=8, data_dir=None, cache_dir=None, progress=Progress()
        )
        for split in ("train", "val")
    ]


@pytest.fixture
def run(tmp_path):
    return Run(accelerator=Accelerator(cpu=True), workspace=tmp_path, seed=0, progress=Progress())


@pytest.fixture(scope="module")
def protocol():
    base = load_protocol("digits")
    student = base.student.model_copy(update={"epochs": 3, "seeds": (0, 1)})
    return base.model_copy(update={"student": student})


def distilled(tmp_path, train, kind):
    teacher = build_model(
        "convnet-d3-bn-small", channels=1, classes=10, resolution=8, seed=5
    ).eval()
    firsts = [int((train.labels == label).nonzero()[0]) for label in range(10)]
    soft = torch.full((10, 10), 0.05) + 0.5 * torch.eye(10)
    return save_distilled(
        tmp_path / "set",
        images=1 - train.batch(firsts),
        hard=torch.arange(10),
        soft=soft if kind == "soft" else None,
        teacher=teacher if kind == "teacher" else None,
        teacher_arch="convnet-d3-bn-small" if kind == "teacher" else None,
        dataset="digits",
        ipc=1,
        method="x",
        classes=train.classes,
        provenance={},
    )


def test_other_training_images_give_another_random_subset(run, protocol):
    def keys(digest, kind="hard", artifact="a"):
        plans = plan_references(
            run, protocol, artifact=artifact, images=10, kind=kind, train_digest=digest
        )
        return {plan.way: plan.seeds[0].folder.key for plan in plans}

    one, other = keys("t"), keys("u")
    assert one["random"] != other["random"]
    assert one["plain"] == other["plain"]
    assert one["random"] == keys("t", artifact="b")["random"], "shared between hard-labelled sets"
    assert keys("t", "teacher")["random"] != keys("t", "teacher", "b")["random"]


def test_a_protocol_without_augmentation_has_no_plain_way(run, protocol):
    student = protocol.student.model_copy(
        update={"crop_scale": (1.0, 1.0), "flip": False, "cutmix": 0.0}
    )
    bare = protocol.model_copy(update={"student": student})
    plans = plan_references(run, bare, artifact="a", images=10, kind="hard", train_digest="t")
    assert [plan.way for plan in plans] == ["random"]


def test_without_augmentation_a_view_is_the_image_itself(run, protocol):
    (_, plain, _) = plan_references(
        run, protocol, artifact="a", images=10, kind="hard", train_digest="t"
    )
    images = torch.rand(10, 1, 8, 8)
    for view in epoch_views(plain.student, images=10, resolution=8, seed=0, epoch=1):
        assert torch.equal(view.render(images), images[view.indices])


@pytest.mark.parametrize(
    ("kind", "ways", "labelled"),
    [
        ("hard", ["random", "plain", "random-plain"], []),
        ("soft", ["hard", "plain"], []),
        (
            "teacher",
            ["random", "hard", "plain", "random-plain"],
            ["random", "plain", "random-plain"],
        ),
    ],
)
def test_every_kind_of_label_has_its_references(run, protocol, kind, ways, labelled):
    plans = plan_references(run, protocol, artifact="a", images=10, kind=kind, train_digest="t")
    assert [plan.way for plan in plans] == ways
    assert [plan.way for plan in plans if plan.labels is not None] == labelled
    keys = [stage.folder.key for plan in plans for stage in plan.stages]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("kind", ["hard", "soft", "teacher"])
def test_each_way_is_what_its_name_says(run, protocol, digits, tmp_path, kind):
    """Each reference is trained again by hand, from the tensors that it should have got."""
    train, val = digits
    given = distilled(tmp_path, train, kind)
    plans = plan_references(run, protocol, artifact="a", images=10, kind=kind, train_digest="t")
    x, y = val.batch(torch.arange(50)), val.labels[:50]
    found = measure_references(run, plans, given, train, x, y, Costs())
    assert [sorted(seed) for seed in found] == [sorted(plan.way for plan in plans)] * 2
    chosen = random_subset(run, train, given.hard)
    assert torch.bincount(train.labels[chosen], minlength=10).tolist() == [1] * 10
    sets = {
        "random": replace(given, images=train.batch(chosen), hard=train.labels[chosen], soft=None),
        "hard": replace(given, soft=None, teacher=None),
        "plain": given,
    }
    sets["random-plain"] = sets["random"]
    by_hand = Run(
        accelerator=run.accelerator, workspace=tmp_path / "again", seed=0, progress=Progress()
    )
    from guardbench.training import plan_relabel, plan_student, relabel

    for plan in plans:
        student, labels = plan.student, None
        if plan.labels is not None:
            labels = plan_relabel(by_hand, plan.way, student, 10)
            relabel(by_hand, sets[plan.way], student, labels)
        stage = plan_student(by_hand, plan.way, student, 10, 1)
        model = train_students(by_hand, sets[plan.way], student, {1: stage}, labels)[0]
        with torch.no_grad():
            right = (model(x).argmax(1) == y).tolist()
        assert found[1][plan.way].flags() == right
    assert load_distilled(tmp_path / "set").manifest.label_kind == kind
