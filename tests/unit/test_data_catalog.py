"""The catalogue: explicit class order, honest counts, and no torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import guardbench
from guardbench.data.catalog import CATALOG, class_names, dataset_info
from guardbench.errors import GuardbenchError

IMAGENETTE = [
    ("n01440764", "tench"),
    ("n02102040", "English springer"),
    ("n02979186", "cassette player"),
    ("n03000684", "chain saw"),
    ("n03028079", "church"),
    ("n03394916", "French horn"),
    ("n03417042", "garbage truck"),
    ("n03425413", "gas pump"),
    ("n03445777", "golf ball"),
    ("n03888257", "parachute"),
]


def test_every_dataset_of_the_design_is_there() -> None:
    assert list(CATALOG) == [
        "digits",
        "imagenette",
        "cifar10",
        "cifar100",
        "tiny-imagenet",
        "imagenet",
    ]


@pytest.mark.parametrize("name", CATALOG)
def test_entry_holds_together(name: str) -> None:
    info = dataset_info(name)
    assert info.name == name
    assert len(info.names) in (0, len(info.classes))
    if info.classes:
        assert len(set(info.classes)) == info.num_classes
    if info.archive is not None:
        assert info.archive.folder in info.folders
        assert len(info.archive.md5) == 32
        assert info.archive.filename
    if info.cifar is not None:
        assert len(info.cifar.train) * info.cifar.records_per_train_file == info.train_count
        assert len(info.cifar.test) * info.cifar.records_per_test_file == info.val_count


def test_imagenette_order_is_the_sorted_wordnet_ids() -> None:
    info = dataset_info("imagenette")
    assert list(zip(info.classes, info.names, strict=True)) == IMAGENETTE
    assert list(info.classes) == sorted(info.classes)
    assert info.describe("n01440764") == "n01440764 (tench)"


def test_imagenets_order_is_the_sorted_wordnet_ids() -> None:
    classes = dataset_info("imagenet").classes
    assert list(classes) == sorted(set(classes))
    assert (classes[0], classes[207], classes[999]) == ("n01440764", "n02099601", "n15075141")
    assert set(dataset_info("imagenette").classes) < set(classes)


def test_cifar_orders_are_the_official_ones() -> None:
    assert class_names("cifar10") == (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    )
    fine = dataset_info("cifar100").classes
    assert list(fine) == sorted(fine)
    assert (fine[0], fine[1], fine[50], fine[99]) == ("apple", "aquarium_fish", "mouse", "worm")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("cifar10", "cifar10"), ("cifar100", "cifar100")],
)
def test_catalogue_agrees_with_torchvision(name: str, expected: str) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    theirs = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[expected]
    info = dataset_info(name)
    assert info.cifar is not None
    assert theirs.base_folder in info.folders
    files = {entry[0] for entry in [*theirs.train_list, *theirs.test_list]}
    assert info.cifar.python_marker in files | {theirs.meta["filename"]}


def test_imagenette_archive_is_torchvisions() -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    archive = dataset_info("imagenette").archive
    assert archive is not None
    assert (archive.url, archive.md5) == datasets.Imagenette._ARCHIVES["full"]
    theirs = {key: names[0] for key, names in datasets.Imagenette._WNID_TO_CLASS.items()}
    assert theirs == dict(IMAGENETTE)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("imagnette", "imagenette"), ("CIFAR-10", "cifar10"), ("tinyimagenet", "tiny-imagenet")],
)
def test_unknown_name_is_told_with_the_nearest(typed: str, meant: str) -> None:
    with pytest.raises(GuardbenchError, match=rf"Did you mean {meant}\?") as caught:
        dataset_info(typed)
    assert "\n" not in str(caught.value)


def test_unknown_name_without_a_neighbour_lists_what_is_known() -> None:
    with pytest.raises(GuardbenchError, match="Known: cifar10, cifar100, digits"):
        dataset_info("qqqq")


def test_catalogue_and_search_load_no_torch() -> None:
    code = (
        "import sys, guardbench.data.locate, guardbench.data.download;"
        "print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    root = Path(guardbench.__file__).parents[1]
    answer = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.split() == ["False", "False"]
