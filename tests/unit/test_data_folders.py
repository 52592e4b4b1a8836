"""Data folders as people have them: order, layouts, and one line for each fault."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from guardbench.data import catalog
from guardbench.data.catalog import CATALOG, dataset_info
from guardbench.data.dataset import RealDataset, load_split
from guardbench.errors import GuardbenchError
from guardbench.progress import Progress

WNIDS = ("n01440764", "n01443537", "n02102040")


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GUARDBENCH_DATA", raising=False)


def paint(path: Path, shade: int = 0, size: tuple[int, int] = (12, 10), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, shade if mode == "L" else (shade, 2 * shade, 255 - shade)).save(path)


def imagenette(root: Path) -> Path:
    for split in ("train", "val"):
        for label, key in enumerate(dataset_info("imagenette").classes):
            paint(root / "imagenette" / split / key / "b.png", 10 * label)
            paint(root / "imagenette" / split / key / "a.JPEG", 10 * label)
    return root


def load(root: Path, name: str = "imagenette", split: str = "train", **more: int) -> RealDataset:
    return load_split(
        name,
        split,
        resolution=8,
        data_dir=root,
        cache_dir=root / "cache",
        progress=Progress(),
        **more,
    )


def refused(root: Path, name: str = "imagenette", split: str = "train", **more: int) -> str:
    with pytest.raises(GuardbenchError) as caught:
        load(root, name, split, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_images_come_by_class_and_then_by_name(tmp_path: Path) -> None:
    data = load(imagenette(tmp_path))
    assert data.classes == dataset_info("imagenette").classes
    assert data.class_names[0] == "tench"
    assert data.labels.tolist() == [label for label in range(10) for _ in range(2)]
    assert data.ids[:3] == ("n01440764/a.JPEG", "n01440764/b.png", "n02102040/a.JPEG")
    # The PNG of class 3 is exactly its colour, so label, id and pixels belong together.
    assert data.images[7][:, 4, 4].tolist() == [30, 60, 225]
    assert not data.complete


def test_a_name_that_is_not_utf_8_is_told(tmp_path: Path) -> None:
    tench = imagenette(tmp_path) / "imagenette" / "train" / "n01440764"
    try:
        shutil.copy(tench / "b.png", os.fsdecode(os.fsencode(tench) + b"/caf\xe9.png"))
    except OSError:
        pytest.skip("this file system takes names in UTF-8 alone")
    with pytest.raises(GuardbenchError, match=r"caf\\udce9\.png: the name is not UTF-8; rename"):
        load(tmp_path)


def test_odd_but_valid_files(tmp_path: Path) -> None:
    root = imagenette(tmp_path) / "imagenette" / "train"
    tench = root / "n01440764"
    paint(tench / "c.bmp")
    paint(tench / "d.WebP")
    paint(tench / "e.JPG", mode="L")
    paint(tmp_path / "elsewhere.png", 77)
    (tench / "f.png").symlink_to(tmp_path / "elsewhere.png")
    Image.new("RGBA", (9, 30), (1, 2, 3, 128)).save(tench / "g.png")
    (tench / "notes.txt").write_text("not an image, and not named like one")
    (tench / ".hidden.png").write_text("a file of the system's")
    (root / ".DS_Store").touch()
    (root / "readme.md").touch()
    # A PNG that is named as a JPEG: ImageNet has one.
    (tench / "h.JPEG").write_bytes((tench / "b.png").read_bytes())
    data = load(tmp_path)
    assert [name.split("/")[1] for name in data.ids if name.startswith("n01440764")] == [
        "a.JPEG",
        "b.png",
        "c.bmp",
        "d.WebP",
        "e.JPG",
        "f.png",
        "g.png",
        "h.JPEG",
    ]
    assert data.images[5][:, 0, 0].tolist() == [77, 154, 178]


@pytest.mark.parametrize("folder", ["val", "test"])
def test_val_may_be_called_test(tmp_path: Path, folder: str) -> None:
    for label, key in enumerate(dataset_info("cifar10").classes):
        paint(tmp_path / "cifar10" / folder / key / "0.png", label)
    assert load(tmp_path, "cifar10", "val").ids[0] == "airplane/0.png"


def test_missing_split(tmp_path: Path) -> None:
    imagenette(tmp_path)
    (tmp_path / "imagenette" / "val").rename(tmp_path / "imagenette" / "validation")
    assert "has no val split" in refused(tmp_path, split="val")
    assert "Unknown split 'valid'" in refused(tmp_path, split="valid")


def test_misnamed_class(tmp_path: Path) -> None:
    train = imagenette(tmp_path) / "imagenette" / "train"
    (train / "n01440764").rename(train / "n0144076")
    said = refused(tmp_path)
    assert "unexpected class folder 'n0144076' (did you mean n01440764?)" in said
    assert "missing class folder n01440764 (tench)" in said
    assert str(train) in said


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_among_the_images_is_not_waited_for(tmp_path: Path) -> None:
    folder = imagenette(tmp_path) / "imagenette" / "train" / "n01440764"
    os.mkfifo(folder / "pipe.png")
    assert f"{folder / 'pipe.png'}: is no ordinary file" in refused(tmp_path)


def test_empty_split_and_empty_class(tmp_path: Path) -> None:
    train = imagenette(tmp_path) / "imagenette" / "train"
    for file in (train / "n03000684").iterdir():
        file.unlink()
    assert "class n03000684 (chain saw) has no images" in refused(tmp_path)
    for folder in train.iterdir():
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    assert "missing class folder n01440764 (tench)" in refused(tmp_path)
    assert "and 7 more" in refused(tmp_path)


def test_too_few_images_are_counted_before_and_after_the_cache(tmp_path: Path) -> None:
    imagenette(tmp_path)
    (tmp_path / "imagenette" / "train" / "n03028079" / "a.JPEG").unlink()
    expected = "class n03028079 (church) has 1 of the 2 images needed"
    assert expected in refused(tmp_path, per_class=2)
    assert not (tmp_path / "cache").exists()
    assert len(load(tmp_path, per_class=1)) == 19
    assert expected in refused(tmp_path, per_class=2)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", None])
def test_broken_file_is_named_and_nothing_unfinished_counts(
    tmp_path: Path, content: bytes | None
) -> None:
    file = imagenette(tmp_path) / "imagenette" / "train" / "n03425413" / "a.JPEG"
    file.unlink()
    if content is None:
        paint(file, size=(200, 200))
        content = file.read_bytes()[:-200]
    file.write_bytes(content)
    assert str(file) in refused(tmp_path)
    left = [path.suffix for path in (tmp_path / "cache" / "datasets").iterdir()]
    assert set(left) <= {".lock", ".part", ".journal"}
    paint(file, 70)
    load(tmp_path)
    left = [path.suffix for path in (tmp_path / "cache" / "datasets").iterdir()]
    assert sorted(left) == [".json", ".npy"]


def test_truncated_png_is_named(tmp_path: Path) -> None:
    file = imagenette(tmp_path) / "imagenette" / "train" / "n03425413" / "b.png"
    noise = Image.frombytes("RGB", (40, 40), os.urandom(4800))
    noise.save(file)
    file.write_bytes(file.read_bytes()[:2000])
    assert str(file) in refused(tmp_path)


def test_link_to_nothing_is_named(tmp_path: Path) -> None:
    link = imagenette(tmp_path) / "imagenette" / "train" / "n03425413" / "c.png"
    link.symlink_to(tmp_path / "gone.png")
    said = refused(tmp_path)
    assert str(link) in said
    assert "missing" in said


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tiny ImageNet in its official layout, with three classes instead of two hundred."""
    info = dataclasses.replace(CATALOG["tiny-imagenet"], num_classes=3)
    monkeypatch.setitem(catalog.CATALOG, "tiny-imagenet", info)
    root = tmp_path / "tiny-imagenet-200"
    for label, key in enumerate(WNIDS):
        paint(root / "train" / key / "images" / f"{key}_0.JPEG", 40 * label)
        (root / "train" / key / f"{key}_boxes.txt").write_text("boxes")
    lines = []
    for index, label in enumerate((2, 0, 1, 0)):
        paint(root / "val" / "images" / f"val_{index}.png", 40 * label)
        lines.append(f"val_{index}.png\t{WNIDS[label]}\t0\t0\t9\t9\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    # Not sorted, as in the official file.
    (root / "wnids.txt").write_text("\n".join(reversed(WNIDS)) + "\n")
    return tmp_path


def test_tiny_imagenet_official_layout(tiny: Path) -> None:
    train = load(tiny, "tiny-imagenet")
    assert train.classes == WNIDS
    assert train.ids[1] == "n01443537/images/n01443537_0.JPEG"
    val = load(tiny, "tiny-imagenet", "val")
    assert val.labels.tolist() == [0, 0, 1, 2]
    assert val.ids == (
        "images/val_1.png",
        "images/val_3.png",
        "images/val_2.png",
        "images/val_0.png",
    )
    assert val.images[:][:, 0, 0, 0].tolist() == [0, 0, 40, 80]


def test_tiny_imagenet_as_plain_folders(tiny: Path) -> None:
    root = tiny / "tiny-imagenet-200"
    (root / "wnids.txt").unlink()
    (root / "val" / "val_annotations.txt").unlink()
    for file in (root / "val" / "images").iterdir():
        file.unlink()
    (root / "val" / "images").rmdir()
    for key in WNIDS:
        paint(root / "val" / key / "x.jpg")
    assert load(tiny, "tiny-imagenet", "val").labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("n02102040", "n0210204", "line 1: expected .*did you mean n02102040"),
        ("val_2.png", "val_9.png", r"val_9\.png: the image is missing"),
        ("val_1.png\tn01440764\t0\t0\t9\t9\n", "", r"val_1\.png: the image has no line"),
        ("val_2.png\tn01443537", "val_2.png\tn01440764", "no images of class n01443537"),
        ("val_3.png\tn01440764", "val_3.png n01440764", "line 4: expected"),
    ],
)
def test_tiny_imagenet_faults(tiny: Path, old: str, new: str, expected: str) -> None:
    file = tiny / "tiny-imagenet-200" / "val" / "val_annotations.txt"
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(GuardbenchError, match=expected):
        load(tiny, "tiny-imagenet", "val")


def test_tiny_imagenet_counts_and_names(tiny: Path) -> None:
    root = tiny / "tiny-imagenet-200"
    (root / "train" / "n02102040").rename(root / "train" / "n02102041")
    assert "did you mean n02102040?" in refused(tiny, "tiny-imagenet")
    (root / "wnids.txt").unlink()
    (root / "train" / "n02102041").rename(root / "train" / "springer")
    assert "unexpected class springer" in refused(tiny, "tiny-imagenet")
    paint(root / "train" / "n02102040" / "x.jpg")
    (root / "train" / "springer").rename(root / "train" / "n09999999")
    assert "4 classes where tiny-imagenet has 3" in refused(tiny, "tiny-imagenet")


def test_imagenet_needs_all_its_classes(tmp_path: Path) -> None:
    paint(tmp_path / "imagenet" / "train" / "n01440764" / "x.jpg")
    said = refused(tmp_path, "imagenet")
    assert "missing class folder n01443537" in said
    assert "imagenet has 1000 class folders" in said


@pytest.mark.parametrize("resolution", [0, -3, 5000])
def test_impossible_resolution(tmp_path: Path, resolution: int) -> None:
    with pytest.raises(GuardbenchError, match=f"resolution of {resolution} px"):
        load_split(
            "digits",
            "train",
            resolution=resolution,
            data_dir=tmp_path,
            cache_dir=tmp_path,
            progress=Progress(),
        )
