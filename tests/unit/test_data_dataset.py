"""RealDataset: digits, the official CIFAR files, batches, and what the digest covers."""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from guardbench.attacks.base import score_clean
from guardbench.data import catalog
from guardbench.data.catalog import CATALOG, CifarFiles
from guardbench.data.dataset import RealDataset, load_split
from guardbench.errors import GuardbenchError
from guardbench.progress import Progress


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GUARDBENCH_DATA", raising=False)


def load(
    name: str, split: str, root: Path, resolution: int, per_class: int | None = None
) -> RealDataset:
    return load_split(
        name,
        split,
        resolution=resolution,
        data_dir=root,
        cache_dir=root / "cache",
        progress=Progress(),
        per_class=per_class,
    )


def test_digits_are_whole_and_split_for_ever(tmp_path: Path) -> None:
    train = load("digits", "train", tmp_path, 8)
    val = load("digits", "val", tmp_path, 8)
    assert (len(train), len(val)) == (1352, 445)
    assert train.complete
    assert val.complete
    assert not set(train.ids) & set(val.ids)
    assert train.images.shape == (1352, 1, 8, 8)
    assert train.channels == 1
    assert train.num_classes == 10
    assert train.class_names == tuple("0123456789")
    # Seventeen grey levels fill the range, and a changed split would change the digest.
    assert set(np.unique(train.images)) == {round(level * 255 / 16) for level in range(17)}
    assert val.labels.bincount().tolist() == [44, 45, 44, 45, 45, 45, 45, 44, 43, 45]
    names = "\n".join(val.ids).encode()
    assert hashlib.sha256(names).hexdigest() == DIGITS_VAL_IDS
    assert not (tmp_path / "cache").exists()


DIGITS_VAL_IDS = "e100cbe01ee8ae8cc38f00a6ae40207831a5a4ccae6cec634118075e1d19e7dd"


def test_digits_can_be_enlarged_and_are_read_only(tmp_path: Path) -> None:
    data = load("digits", "val", tmp_path, 32)
    assert data.images.shape == (445, 1, 32, 32)
    with pytest.raises(ValueError, match="read-only"):
        data.images[0] = 0


def test_batch_is_float_in_the_unit_range_and_in_order(tmp_path: Path) -> None:
    data = load("digits", "val", tmp_path, 8)
    batch = data.batch(torch.tensor([3, 0, 3]))
    assert batch.dtype == torch.float32
    assert batch.shape == (3, 1, 8, 8)
    assert torch.equal(batch[0], batch[2])
    assert torch.equal(batch[1], data.batch([0])[0])
    assert torch.equal((batch * 255).round().to(torch.uint8)[1], torch.tensor(data.images[0]))
    everything = data.batch(range(len(data)))
    assert everything.min() == 0
    assert everything.max() == 1
    assert data.batch([]).shape == (0, 1, 8, 8)
    with pytest.raises(IndexError):
        data.batch([len(data)])
    batch.zero_()  # a copy: the dataset stays
    assert data.batch([0]).max() > 0


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_a_copy_on_the_device_gives_the_same_batches(tmp_path: Path, monkeypatch, rows) -> None:
    data = load("digits", "val", tmp_path, 8)
    wanted = torch.randint(-len(data), len(data), (50,))
    before = data.batch(wanted)
    copied = data._copied(torch.device("cpu"), rows)
    assert torch.equal(copied, torch.tensor(data.images[:]))
    monkeypatch.setattr(RealDataset, "_resident", lambda *_: copied)
    assert torch.equal(data.batch(wanted), before)
    assert data.batch([]).shape == (0, 1, 8, 8)
    with pytest.raises(IndexError):
        data.batch([len(data)])
    data.batch([0]).zero_()
    assert torch.equal(data.batch(wanted), before)


def test_too_few_digits(tmp_path: Path) -> None:
    with pytest.raises(GuardbenchError, match="class 8 has 43 of the 44 images needed"):
        load("digits", "val", tmp_path, 8, per_class=44)


def small_cifar(name: str, monkeypatch: pytest.MonkeyPatch) -> CifarFiles:
    """Official files of 20 records each instead of thousands; the format is the real one."""
    info = CATALOG[name]
    assert info.cifar is not None
    files = dataclasses.replace(info.cifar, records_per_train_file=20, records_per_test_file=20)
    monkeypatch.setitem(catalog.CATALOG, name, dataclasses.replace(info, cifar=files))
    return files


def cifar_records(labels: list[int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    planes = np.random.default_rng(seed).integers(0, 256, (len(labels), 3072), dtype=np.uint8)
    return np.array(labels, dtype=np.uint8), planes


def write_binary(folder: Path, files: CifarFiles, classes: int) -> np.ndarray:
    folder.mkdir(parents=True)
    first = np.empty(0)
    for seed, name in enumerate([*files.train, *files.test]):
        labels, planes = cifar_records([(seed + i) % classes for i in range(20)], seed)
        coarse = [np.full((20, 1), 99, np.uint8)] * (files.label_bytes - 1)
        np.concatenate([*coarse, labels[:, None], planes], axis=1).tofile(folder / name)
        if seed == 0:
            first = planes.reshape(-1, 3, 32, 32)
    return first


@pytest.mark.parametrize(
    ("name", "folder", "batches", "second"),
    [
        ("cifar10", "cifar-10-batches-bin", 5, "automobile/00001"),
        ("cifar100", "cifar-100-binary", 1, "aquarium_fish/00001"),
    ],
)
def test_binary_cifar_is_read_plane_by_plane(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    folder: str,
    batches: int,
    second: str,
) -> None:
    files = small_cifar(name, monkeypatch)
    planes = write_binary(tmp_path / folder, files, 10)
    data = load(name, "train", tmp_path, 32)
    assert len(data) == 20 * batches
    assert np.array_equal(data.images[:20], planes)
    assert data.ids[1] == second
    assert data.labels[:3].tolist() == [0, 1, 2]
    again = load(name, "train", tmp_path, 32)
    assert again.digest == data.digest
    assert load(name, "val", tmp_path, 32).digest != data.digest
    assert load(name, "train", tmp_path, 16).images.shape == (20 * batches, 3, 16, 16)


def test_broken_binary_cifar_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = small_cifar("cifar10", monkeypatch)
    folder = tmp_path / "cifar-10-batches-bin"
    write_binary(folder, files, 10)
    file = folder / "data_batch_3.bin"
    whole = file.read_bytes()
    file.write_bytes(whole[:-7])
    with pytest.raises(GuardbenchError, match=r"data_batch_3\.bin: 61453 bytes where 61460"):
        load("cifar10", "train", tmp_path, 32)
    file.write_bytes(b"\x0b" + whole[1:])
    with pytest.raises(GuardbenchError, match="label 11 in a dataset of 10 classes"):
        load("cifar10", "train", tmp_path, 32)
    file.unlink()
    with pytest.raises(GuardbenchError, match=r"data_batch_3\.bin: cannot be read"):
        load("cifar10", "train", tmp_path, 32)


@pytest.mark.parametrize("renamed", [False, True])
def test_python_cifar_is_unpickled_only_when_it_is_the_official_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renamed: bool
) -> None:
    theirs = pytest.importorskip("torchvision.datasets").CIFAR10
    folder = tmp_path / ("cifar10" if renamed else "cifar-10-batches-py")
    folder.mkdir()
    lists: dict[str, list[list[str]]] = {"train_list": [], "test_list": []}
    kept = []
    for seed, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        labels, planes = cifar_records([(seed + i) % 10 for i in range(4)], seed)
        raw = pickle.dumps({"data": planes, "labels": labels.tolist()})
        (folder / name).write_bytes(raw)
        digest = hashlib.md5(raw, usedforsecurity=False).hexdigest()
        lists["test_list" if name == "test_batch" else "train_list"].append([name, digest])
        kept.append(planes.reshape(-1, 3, 32, 32))
    raw = pickle.dumps({"label_names": CATALOG["cifar10"].classes})
    (folder / "batches.meta").write_bytes(raw)
    digest = hashlib.md5(raw, usedforsecurity=False).hexdigest()
    monkeypatch.setattr(theirs, "train_list", lists["train_list"])
    monkeypatch.setattr(theirs, "test_list", lists["test_list"])
    monkeypatch.setattr(
        theirs, "meta", {"filename": "batches.meta", "key": "label_names", "md5": digest}
    )
    data = load("cifar10", "train", tmp_path, 32)
    assert np.array_equal(data.images, np.concatenate(kept[:5]))
    assert data.ids[5] == "bird/00005"

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "sprung",)  # type: ignore[return-value]

    (folder / "data_batch_2").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(GuardbenchError, match="data_batch_2: missing, or not the official file"):
        load("cifar10", "train", tmp_path, 32)
    assert not (tmp_path / "sprung").exists()


def test_selected_images_are_decoded_when_asked_for(tmp_path: Path, monkeypatch) -> None:
    val = load("digits", "val", tmp_path, 8)
    order = [7, 3, 11, 3]
    some = val.select(order)
    assert some.shape == (4, 1, 8, 8)
    assert len(some) == 4
    whole = val.batch(order)
    assert torch.equal(some[1:3], whole[1:3])
    assert torch.equal(some[torch.tensor([3, 0])], whole[[3, 0]])
    assert torch.equal(some[torch.tensor([True, False, False, True])], whole[[0, 3]])
    asked: list[int] = []
    batch = RealDataset.batch
    monkeypatch.setattr(
        RealDataset, "batch", lambda self, rows: asked.append(len(rows)) or batch(self, rows)
    )
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()
    right = score_clean(model, val.select(range(100)), val.labels[:100], batch_size=32)
    assert right.shape == (100,)
    assert max(asked) == 32, "never all at once"
