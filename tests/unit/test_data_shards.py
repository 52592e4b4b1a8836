"""Parquet shards and tars: the same dataset as the folders, and one line for each fault."""

from __future__ import annotations

import io
import json
import random
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
import pytest
from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoFile
from PIL import Image
from pyarrow import parquet
from rich.console import Console

from guardbench.data.catalog import dataset_info
from guardbench.data.dataset import RealDataset, load_split
from guardbench.data.locate import locate
from guardbench.errors import GuardbenchError
from guardbench.progress import Progress

CLASSES = dataset_info("imagenette").classes


class Made(NamedTuple):
    label: int
    stem: str
    data: bytes


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GUARDBENCH_DATA", raising=False)


@pytest.fixture(scope="module")
def made() -> list[Made]:
    """Three JPEGs a class under the names that ImageNet gives, in no order."""
    found = []
    for label, key in enumerate(CLASSES):
        for number in (4, 10026, 7):
            pixels = np.random.default_rng(number + 7 * label).integers(0, 256, (14, 12, 3))
            stream = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(stream, "JPEG")
            found.append(Made(label, f"{key}_{number}", stream.getvalue()))
    random.Random(0).shuffle(found)
    return found


def as_folders(root: Path, made: list[Made]) -> None:
    for image in made:
        path = root / "imagenette" / "train" / CLASSES[image.label] / f"{image.stem}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image.data)


def as_parquet(
    root: Path, made: list[Made], *, names: list[str] | None = None, path: bool = True
) -> list[Path]:
    """Two shards as the Hub has them: the class stands behind the file's name, rows in small groups."""
    folder = root / "imagenette" / "data"
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for shard in range(2):
        rows = [
            {
                "image": {
                    "bytes": image.data,
                    "path": f"{image.stem}_{CLASSES[image.label]}.JPEG" if path else None,
                },
                "label": image.label if names is None else names.index(CLASSES[image.label]),
            }
            for image in made[shard::2]
        ]
        table = pyarrow.Table.from_pylist(rows)
        if names is not None:
            features = {
                "image": {"_type": "Image"},
                "label": {"names": names, "_type": "ClassLabel"},
            }
            words = json.dumps({"info": {"features": features}})
            table = table.replace_schema_metadata({"huggingface": words})
        found.append(folder / f"train-{shard:05d}-of-00002.parquet")
        parquet.write_table(table, found[-1], row_group_size=4)
    return found


def as_tars(root: Path, made: list[Made], labels: str = "cls") -> list[Path]:
    folder = root / "imagenette"
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for shard in range(2):
        found.append(folder / f"imagenette-train-{shard:06d}.tar")
        with tarfile.open(found[-1], "w") as archive:
            for number, image in enumerate(made[shard::2]):
                key, words = CLASSES[image.label], {"label": image.label}
                parts = {"jpg": image.data, "cls": str(image.label).encode()}
                if labels == "json":
                    words["filename"] = f"{key}/{image.stem}.JPEG"
                    parts = {"json": json.dumps(words).encode(), "jpg": image.data}
                elif labels == "key":
                    parts["cls"] = key.encode()
                for kind, data in parts.items():
                    stem = f"{number:06d}" if labels in ("json", "number") else image.stem
                    add(archive, f"{stem}.{kind}", data)
    return found


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def load(root: Path, console: Console | None = None) -> RealDataset:
    return load_split(
        "imagenette",
        "train",
        resolution=8,
        data_dir=root,
        cache_dir=root / "cache",
        progress=Progress(console),
    )


def refused(root: Path) -> str:
    with pytest.raises(GuardbenchError) as caught:
        load(root)
    assert "\n" not in str(caught.value)
    assert not list((root / "cache").rglob("*.json"))
    return str(caught.value)


@pytest.fixture(scope="module")
def folders(made: list[Made], tmp_path_factory: pytest.TempPathFactory) -> RealDataset:
    root = tmp_path_factory.mktemp("folders")
    as_folders(root, made)
    return load(root)


@pytest.mark.parametrize(
    "layout", ["parquet", "parquet with class names", "cls", "json", "key", "in train/"]
)
def test_the_container_does_not_show_in_the_dataset(
    tmp_path: Path, made: list[Made], folders: RealDataset, layout: str
) -> None:
    if layout == "parquet":
        as_parquet(tmp_path, made)
    elif layout.startswith("parquet"):
        as_parquet(tmp_path, made, names=[*reversed(CLASSES)])
    elif layout == "in train/":
        (tmp_path / "imagenette" / "train").mkdir(parents=True)
        for number, path in enumerate(as_tars(tmp_path, made)):
            path.rename(tmp_path / "imagenette" / "train" / f"{number:06d}.tar")
    else:
        as_tars(tmp_path, made, layout)
    said = Console(record=True, width=200)
    found = load(tmp_path, said)
    assert found.digest == folders.digest
    assert found.ids == folders.ids
    assert found.classes == folders.classes
    assert found.labels.equal(folders.labels)
    places = [29, 0, 14, 14]
    assert found.batch(places).equal(folders.batch(places))
    text = said.export_text()
    assert "30/30 images" in text
    assert "its own" not in text
    how = "parquet shards" if layout.startswith("parquet") else "webdataset tars"
    assert how in locate("imagenette", tmp_path).description


@pytest.mark.parametrize("layout", ["parquet", "tars"])
def test_shards_without_the_original_names_are_another_order_and_it_is_said(
    tmp_path: Path, made: list[Made], folders: RealDataset, layout: str
) -> None:
    if layout == "parquet":
        as_parquet(tmp_path, made, path=False)
    else:
        as_tars(tmp_path, made, "number")
    said = Console(record=True, width=300)
    found = load(tmp_path, said)
    assert "does not give its images the names that the folders have" in said.export_text()
    assert found.digest != folders.digest
    assert found.labels.equal(folders.labels)
    pixels = [{split.images[place].tobytes() for place in range(30)} for split in (found, folders)]
    assert pixels[0] == pixels[1]


def test_a_build_that_stops_goes_on_at_the_shard(
    tmp_path: Path, made: list[Made], folders: RealDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    from guardbench.data import tars

    first, second = as_tars(tmp_path, made)
    whole = second.read_bytes()
    second.write_bytes(whole[:9000])
    assert f"{second}" in refused(tmp_path)
    second.write_bytes(whole)
    opened, real = [], tars.tar_entries
    monkeypatch.setattr(tars, "tar_entries", lambda file: opened.append(file.address) or real(file))
    assert load(tmp_path).digest == folders.digest
    assert opened == [str(second)]
    assert first.is_file()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("no image", ["-000001.tar: n0", ".jpg: not an image"]),
        ("cut image", ["-000001.tar: n0", ".jpg: the image cannot be decoded"]),
        ("no label", ["-000001.tar: n0", "has no label"]),
        ("no picture", ["-000001.tar: odd", "has a label and no image"]),
        ("label", ["-000001.tar: odd.jpg: label 10 is none of the 10 classes"]),
        ("order", ["-000001.tar: n01440764_9.jpg: label 3", "its name says n01440764"]),
        ("text", ["-000001.tar: odd.json: cannot be read"]),
        ("header", ["-000001.tar, behind n0", "cut off or damaged"]),
        ("end", ["-000001.tar, behind n0", "cut off or damaged"]),
        ("no tar", ["-000001.tar: cannot be read as a tar"]),
        ("large", ["-000001.tar: odd.cls: 2000 bytes, over the limit"]),
        ("twice", ["imagenette: two images are called n"]),
    ],
)
def test_a_broken_tar_is_named_with_its_entry(
    tmp_path: Path, made: list[Made], fault: str, said: list[str]
) -> None:
    path = as_tars(tmp_path, made)[1]
    if fault in ("header", "end", "no tar"):
        data = bytearray(path.read_bytes())
        with tarfile.open(path) as archive:
            at = archive.getmembers()[12].offset
        if fault == "header":
            data[at : at + 100] = b"\xff" * 100
        path.write_bytes({"end": data[:at], "no tar": b"<html>" * 99}.get(fault, data))
    else:
        image = made[1]
        with tarfile.open(path, "w") as archive:
            parts = {
                "no image": {f"{image.stem}.jpg": b"<html>", f"{image.stem}.cls": b"1"},
                "cut image": {f"{image.stem}.jpg": image.data[:-99], f"{image.stem}.cls": b"1"},
                "no label": {f"{image.stem}.jpg": image.data},
                "no picture": {"odd.cls": b"1"},
                "label": {"odd.jpg": image.data, "odd.cls": b"10"},
                "order": {"n01440764_9.jpg": image.data, "n01440764_9.cls": b"3"},
                "text": {"odd.jpg": image.data, "odd.json": b"{"},
                "large": {"odd.jpg": image.data, "odd.cls": b"1" * 2000},
                "twice": {
                    f"{made[0].stem}.jpg": image.data,
                    f"{made[0].stem}.cls": b"%d" % made[0].label,
                },
            }[fault]
            for name, data in parts.items():
                if fault in ("no image", "cut image") and name.endswith("cls"):
                    data = b"%d" % image.label
                add(archive, name, data)
    found = refused(tmp_path)
    for part in said:
        assert part in found


def test_a_tar_with_hostile_names_writes_nothing_and_is_read(
    tmp_path: Path, made: list[Made]
) -> None:
    path = as_tars(tmp_path, made)[1]
    image = made[1]
    with tarfile.open(path, "a") as archive:
        for name in ("../../escaped", "/escaped", "a\x1b[2J\n/b"):
            add(archive, f"{name}.jpg", image.data)
            add(archive, f"{name}.cls", b"2")
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE):
            link = tarfile.TarInfo("link.jpg")
            link.type, link.linkname = kind, "/etc/passwd"
            archive.addfile(link)
    before = {entry for entry in tmp_path.rglob("*") if "cache" not in entry.parts}
    found = load(tmp_path)
    assert len(found) == 33
    assert sum("escaped" in name for name in found.ids) == 2
    assert all(name.isprintable() for name in found.ids)
    assert before == {entry for entry in tmp_path.rglob("*") if "cache" not in entry.parts}
    assert not (tmp_path.parent / "escaped.jpg").exists()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("cut", ["train-00001-of-00002.parquet: cannot be read"]),
        ("bytes", ["train-00001-of-00002.parquet, row 1: not an image"]),
        ("none", ["train-00001-of-00002.parquet, row 0: has no image bytes"]),
        ("label", ["train-00001-of-00002.parquet, row 0: label -1 is none of the 10 classes"]),
        ("order", ["train-00001-of-00002.parquet, row 0: label", "its name says"]),
        ("column", ["train-00001-of-00002.parquet: has no column label"]),
        ("missing", ["train-00000-of-00002.parquet is missing beside train-00001-of-00002"]),
    ],
)
def test_a_broken_parquet_shard_is_named_with_its_row(
    tmp_path: Path, made: list[Made], fault: str, said: list[str]
) -> None:
    first, second = as_parquet(tmp_path, made)
    rows = parquet.read_table(second).to_pylist()
    if fault == "bytes":
        rows[1]["image"]["bytes"] = b"<html>"
    elif fault == "none":
        rows[0]["image"]["bytes"] = None
    elif fault == "label":
        rows[0]["label"] = -1
    elif fault == "order":
        rows[0]["label"] = (rows[0]["label"] + 1) % 10
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(
        table.rename_columns(["image", "cls"]) if fault == "column" else table, second
    )
    if fault == "cut":
        second.write_bytes(second.read_bytes()[:-2000])
    elif fault == "missing":
        first.unlink()
    found = refused(tmp_path)
    for part in said:
        assert part in found


def test_another_number_of_classes_is_another_dataset(tmp_path: Path, made: list[Made]) -> None:
    as_parquet(tmp_path, made, names=[*CLASSES, "n15075141"])
    assert "11 classes where imagenette has 10" in refused(tmp_path)


def test_class_folders_come_before_the_official_archives_beside_them(
    tmp_path: Path, made: list[Made], folders: RealDataset
) -> None:
    as_folders(tmp_path, made)
    with tarfile.open(tmp_path / "imagenette" / "ILSVRC2012_img_train.tar", "w") as archive:
        add(archive, "n01440764.tar", b"")
    assert load(tmp_path).digest == folders.digest


def test_a_repository_of_the_hub_is_listed_and_its_faults_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from guardbench.data.shard_files import shard_files

    place = Path("hf://datasets/frgfm/imagenette")
    located = locate("imagenette", place, cache_dir=tmp_path)
    assert located.url == "hf://datasets/frgfm/imagenette"
    assert located.path is None
    with pytest.raises(GuardbenchError, match="is named hf://datasets/OWNER/NAME"):
        locate("imagenette", Path("hf://frgfm"), cache_dir=tmp_path)
    paths = [
        "data/validation-00000-of-00001.parquet",
        "data/train-00001-of-00002.parquet",
        "data/train-00000-of-00002.parquet",
        "other/train-00000-of-00002.parquet",
        "README.md",
    ]

    def tree(*_: object, **words: object) -> list[RepoFile]:
        assert words["revision"] is None
        return [RepoFile(path=path, size=1, oid="a") for path in paths]

    monkeypatch.setattr(HfApi, "list_repo_tree", tree)
    info = dataset_info("imagenette")
    found = [file.address for file in shard_files(info, located.url, "train", "parquet")]
    assert found == [f"{located.url}/data/train-0000{n}-of-00002.parquet" for n in (0, 1)]
    assert len(shard_files(info, located.url, "val", "parquet")) == 1

    def away(*_: object, **__: object) -> list[RepoFile]:
        raise OSError("no network")

    monkeypatch.setattr(HfApi, "list_repo_tree", away)
    with pytest.raises(GuardbenchError, match="frgfm/imagenette: the Hub does not give its files"):
        load_split(
            "imagenette",
            "train",
            resolution=8,
            data_dir=place,
            cache_dir=tmp_path,
            progress=Progress(),
        )
