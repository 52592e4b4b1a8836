"""The order of search, and what is said when nothing is found."""

from __future__ import annotations

import pwd
from pathlib import Path

import pytest

from guardbench.data.catalog import dataset_info
from guardbench.data.dataset import load_split
from guardbench.data.locate import locate
from guardbench.errors import GuardbenchError
from guardbench.progress import Progress


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("GUARDBENCH_DATA", raising=False)
    monkeypatch.setenv("GUARDBENCH_CACHE", str(tmp_path / "cache"))


def folders(
    root: Path, name: str = "imagenette", splits: tuple[str, ...] = ("train", "val")
) -> Path:
    for split in splits:
        for key in dataset_info(name).classes or ("n01440764", "n01443537"):
            (root / split / key).mkdir(parents=True)
    return root


def one_line(name: str, data_dir: Path | None) -> str:
    with pytest.raises(GuardbenchError) as caught:
        locate(name, data_dir)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_digits_are_embedded_whatever_the_folders(tmp_path: Path) -> None:
    located = locate("digits", tmp_path / "missing")
    assert (located.kind, located.path, located.url) == ("embedded", None, None)


def test_argument_comes_before_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = folders(tmp_path / "a" / "imagenette")
    theirs = folders(tmp_path / "b" / "imagenette")
    monkeypatch.setenv("GUARDBENCH_DATA", str(tmp_path / "b"))
    assert locate("imagenette", tmp_path / "a").path == ours
    assert locate("imagenette", None).path == theirs
    (tmp_path / "c" / "other").mkdir(parents=True)
    assert locate("imagenette", tmp_path / "c").path == theirs


def test_finished_download_comes_before_another_one(tmp_path: Path) -> None:
    there = folders(tmp_path / "cache" / "downloads" / "imagenette2")
    located = locate("imagenette", None)
    assert (located.kind, located.path) == ("folder", there)
    assert "downloaded before" in located.description


@pytest.mark.parametrize(
    "name", ["imagenette", "imagenette2", "imagenette2-320", "imagenette2-160"]
)
def test_official_folder_names_and_the_folder_itself(tmp_path: Path, name: str) -> None:
    there = folders(tmp_path / name)
    assert locate("imagenette", tmp_path).path == there
    assert locate("imagenette", there).path == there


def test_full_size_comes_before_the_reduced_ones(tmp_path: Path) -> None:
    folders(tmp_path / "imagenette2-160")
    full = folders(tmp_path / "imagenette2")
    assert locate("imagenette", tmp_path).path == full


def test_official_folder_inside_the_dataset_folder(tmp_path: Path) -> None:
    there = folders(tmp_path / "imagenette" / "imagenette2-160")
    assert locate("imagenette", tmp_path).path == there


def test_folder_of_any_name_is_known_by_its_classes(tmp_path: Path) -> None:
    there = folders(tmp_path / "my-images", "cifar10", ("train", "test"))
    assert locate("cifar10", there).path == there


def test_folder_of_another_dataset_is_not_taken(tmp_path: Path) -> None:
    there = folders(tmp_path / "imagenette")
    assert locate("cifar10", there).kind == "download"
    assert "split folders" in one_line("cifar10", folders(tmp_path / "my-images"))
    (tmp_path / "pets" / "train" / "cat").mkdir(parents=True)
    assert "split folders" in one_line("tiny-imagenet", tmp_path / "pets")


def test_official_cifar_files(tmp_path: Path) -> None:
    binary = tmp_path / "x" / "cifar-10-batches-bin"
    binary.mkdir(parents=True)
    (binary / "data_batch_1.bin").touch()
    located = locate("cifar10", tmp_path / "x")
    assert (located.kind, located.layout, located.path) == ("official", "cifar-binary", binary)
    python = tmp_path / "y" / "cifar10" / "cifar-10-batches-py"
    python.mkdir(parents=True)
    (python / "data_batch_1").touch()
    located = locate("cifar10", tmp_path / "y")
    assert (located.kind, located.layout, located.path) == ("official", "cifar-python", python)
    assert locate("cifar10", python).path == python


def test_official_tiny_imagenet(tmp_path: Path) -> None:
    there = tmp_path / "tiny-imagenet-200"
    (there / "val" / "images").mkdir(parents=True)
    (there / "val" / "val_annotations.txt").touch()
    assert locate("tiny-imagenet", tmp_path).kind == "official"


def test_tiny_imagenet_is_not_taken_for_imagenet(tmp_path: Path) -> None:
    there = folders(tmp_path / "tiny-imagenet", "tiny-imagenet")
    assert "cannot be downloaded" in one_line("imagenet", there)
    assert "cannot be downloaded" in one_line("imagenet", tmp_path)


def test_nothing_there_is_a_download_with_its_size(tmp_path: Path) -> None:
    located = locate("cifar100", None)
    assert (located.kind, located.path) == ("download", None)
    assert located.url == "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"
    assert "169 MB" in located.description
    assert str(tmp_path / "cache" / "downloads") in located.description


def test_imagenet_is_explained(tmp_path: Path) -> None:
    (tmp_path / "data" / "something").mkdir(parents=True)
    said = one_line("imagenet", tmp_path / "data")
    assert "imagenet/" in said
    assert f"--data-dir {tmp_path / 'data'}" in said
    assert "https://image-net.org" in said
    assert "GUARDBENCH_DATA" in said


def test_named_folder_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "does not exist" in one_line("imagenette", tmp_path / "nowhere")
    (tmp_path / "file").touch()
    assert "is not a folder" in one_line("imagenette", tmp_path / "file")
    monkeypatch.setenv("GUARDBENCH_DATA", str(tmp_path / "nowhere"))
    assert "GUARDBENCH_DATA" in one_line("imagenette", None)


def test_empty_and_misnamed_data_folders(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "is empty" in one_line("imagenette", tmp_path / "empty")
    (tmp_path / "slip" / "imagenete").mkdir(parents=True)
    assert "holds 'imagenete' but no 'imagenette'" in one_line("imagenette", tmp_path / "slip")
    (tmp_path / "called" / "mydata" / "train" / "n01440764").mkdir(parents=True)
    said = one_line("imagenette", tmp_path / "called")
    assert "holds 'mydata' but no 'imagenette'" in said
    (tmp_path / "other" / "woof" / "train" / "n02086240").mkdir(parents=True)
    assert locate("imagenette", tmp_path / "other", cache_dir=tmp_path).kind == "download"
    (tmp_path / "hollow" / "imagenette").mkdir(parents=True)
    said = one_line("imagenette", tmp_path / "hollow")
    assert "train/" in said
    assert str(tmp_path / "hollow" / "imagenette") in said


def test_a_home_that_is_not_known_is_one_line(tmp_path: Path, monkeypatch) -> None:
    """`~name` of nobody, in quotes or from a variable; and containers without HOME or passwd entry."""
    nobody = "~no-such-user-of-guardbench/data"
    with pytest.raises(GuardbenchError, match=f"^{nobody}: no such home .* with --data-dir"):
        locate("imagenette", Path(nobody), cache_dir=tmp_path)
    monkeypatch.setenv("GUARDBENCH_DATA", nobody)
    with pytest.raises(GuardbenchError, match=f"^{nobody}: no such home .* with GUARDBENCH_DATA"):
        locate("imagenette", None, cache_dir=tmp_path)
    monkeypatch.delenv("GUARDBENCH_DATA")
    monkeypatch.delenv("GUARDBENCH_CACHE", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])
    with pytest.raises(GuardbenchError, match=r"no such home .* with GUARDBENCH_CACHE"):
        locate("imagenette", None, cache_dir=None)
    digits = load_split(
        "digits", "train", resolution=8, data_dir=None, cache_dir=None, progress=Progress()
    )
    assert len(digits), "they need neither data nor cache"
