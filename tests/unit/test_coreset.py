"""Coresets against brute force on small clouds of points, and what they take from real digits."""

import dataclasses
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guardbench.distillers.coreset import Full, Herding, KCenter, Random
from guardbench.errors import GuardbenchError
from guardbench.methods import load_method
from guardbench.registry import DISTILLERS, resolve
from tests.unit.test_sre2l import load_digits, make_task


def coreset_task(tmp_path, name: str, ipc: int, **select: object):
    method = load_method(name)
    recipe = method.recipe("digits", 8)
    params = {**recipe.params, "select": {**recipe.params["select"], **select}}
    if "squeeze" in params:
        params["squeeze"] = {**params["squeeze"], "epochs": 1}
    return dataclasses.replace(
        make_task(tmp_path, ipc=ipc),
        method=method,
        recipe=recipe.model_copy(update={"params": params}),
    )


@pytest.mark.parametrize("name", ["full", "dm"])
def test_a_regulariser_with_nothing_to_act_on_is_refused(tmp_path, name: str) -> None:
    method = load_method(name)
    recipe = method.recipe("digits", 8).model_copy(update={"regulariser": {"kind": "trades"}})
    task = dataclasses.replace(make_task(tmp_path), method=method, recipe=recipe)
    distiller = resolve(DISTILLERS, "distiller", method.distiller)()
    with pytest.raises(GuardbenchError, match="regulariser trades has nothing to act on"):
        distiller.plan(task)


def radius(points: torch.Tensor, chosen: list[int]) -> float:
    return torch.cdist(points, points[chosen]).amin(1).max().item()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(4, 9), st.integers(1, 4))
def test_k_center_is_within_twice_the_smallest_radius(seed: int, n: int, count: int) -> None:
    points = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed)).double()
    chosen = KCenter().pick(points, count).tolist()
    assert len(set(chosen)) == count
    best = min(radius(points, list(some)) for some in combinations(range(n), count))
    assert radius(points, chosen) <= 2 * best + 1e-9


def test_k_center_starts_in_the_middle_and_goes_to_the_edge() -> None:
    points = torch.tensor([[0.0], [1.0], [2.0], [3.0], [10.0]]).double()
    assert KCenter().pick(points, 3).tolist() == [3, 4, 0]


def test_herding_follows_the_mean_step_by_step() -> None:
    points = torch.randn(12, 3, generator=torch.Generator().manual_seed(5)).double()
    chosen = Herding().pick(points, 12).tolist()
    assert sorted(chosen) == list(range(12))
    for step in range(1, 12):
        gaps = {
            k: (points.mean(0) - points[[*chosen[: step - 1], k]].mean(0)).norm().item()
            for k in range(12)
            if k not in chosen[: step - 1]
        }
        assert gaps[chosen[step - 1]] == pytest.approx(min(gaps.values()), rel=1e-12)


@pytest.mark.parametrize(
    ("name", "kind"), [("random", Random), ("herding", Herding), ("k-center", KCenter)]
)
def test_they_are_training_images_of_their_class(tmp_path, name: str, kind: type) -> None:
    train = load_digits()
    made = kind().distill(coreset_task(tmp_path, name, 3), train)
    assert made.manifest.label_kind == "teacher"
    assert torch.equal(made.hard, torch.arange(10).repeat_interleave(3))
    rows = train.batch(torch.arange(len(train))).flatten(1)
    for image, label in zip(made.images.flatten(1), made.hard, strict=True):
        where = torch.nonzero((rows == image).all(1)).flatten()
        assert label in train.labels[where]
    assert len(torch.unique(made.images.flatten(1), dim=0)) == 30


def test_a_smaller_random_subset_is_the_beginning_of_a_larger_one(tmp_path) -> None:
    train = load_digits()
    one, three = (
        Random().distill(coreset_task(tmp_path, "random", n, labels="hard"), train) for n in (1, 3)
    )
    assert torch.equal(three.images[::3], one.images)
    assert one.manifest.label_kind == "hard"
    assert one.teacher is None


def test_hard_labels_of_a_random_subset_need_no_teacher(tmp_path) -> None:
    task = coreset_task(tmp_path, "random", 1, labels="hard")
    assert [stage.folder.name for stage in Random().plan(task)] == ["random"]
    task = coreset_task(tmp_path, "herding", 1, labels="hard")
    assert [stage.folder.name for stage in Herding().plan(task)] == ["squeeze", "herding"]


def test_the_whole_set_is_whole_and_alike_at_every_ipc(tmp_path) -> None:
    train = load_digits()
    task = coreset_task(tmp_path, "full", 1)
    made = Full().distill(task, train)
    assert len(made.images) == len(train) == Full().image_count(task)
    assert torch.equal(torch.bincount(made.hard), torch.bincount(train.labels))
    other = coreset_task(tmp_path, "full", 10)
    assert Full().plan(task)[-1].folder.key == Full().plan(other)[-1].folder.key


def test_what_cannot_be_is_told(tmp_path) -> None:
    with pytest.raises(GuardbenchError, match=r"--ipc 1000: class 0 of digits has only \d+"):
        Random().distill(coreset_task(tmp_path, "random", 1000, labels="hard"), load_digits())
    task = coreset_task(tmp_path, "random", 1)
    recipe = task.recipe.model_copy(update={"params": {"select": {"labels": "teacher"}}})
    with pytest.raises(GuardbenchError, match=r"params.squeeze: missing"):
        Random().plan(dataclasses.replace(task, recipe=recipe))
    huge = dataclasses.replace(coreset_task(tmp_path, "full", 1), train_images=10**8)
    with pytest.raises(GuardbenchError, match="GiB of memory"):
        Full().plan(huge)
