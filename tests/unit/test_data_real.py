"""The real images that GUARDBENCH_DATA names: found, decoded, complete, and the same every time."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from PIL import Image

from guardbench.data.catalog import dataset_info
from guardbench.data.dataset import RealDataset, load_split
from guardbench.data.locate import locate
from guardbench.errors import GuardbenchError
from guardbench.methods import methods_folder
from guardbench.progress import Progress
from guardbench.protocol import load_protocol
from guardbench.record_files import load_record

pytestmark = pytest.mark.real_data


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def real(name: str, split: str, resolution: int, cache: Path) -> RealDataset:
    if not os.environ.get("GUARDBENCH_DATA"):
        pytest.skip("GUARDBENCH_DATA is not set")
    try:
        located = locate(name, None, cache_dir=cache)
    except GuardbenchError as error:
        pytest.skip(str(error))
    if located.kind == "download":
        pytest.skip(f"GUARDBENCH_DATA has no {name}")
    return load_split(
        name,
        split,
        resolution=resolution,
        data_dir=None,
        cache_dir=cache,
        progress=Progress(),
        per_class=10,
    )


def test_imagenette_val(cache: Path) -> None:
    data = real("imagenette", "val", 64, cache)
    assert data.complete
    assert data.images.shape == (3925, 3, 64, 64)
    assert data.labels.bincount().tolist() == [387, 395, 357, 386, 409, 394, 389, 419, 399, 390]
    assert data.classes == dataset_info("imagenette").classes
    assert data.ids[0] == "n01440764/ILSVRC2012_val_00009111.JPEG"
    mean = data.batch(torch.arange(0, len(data), 5)).mean((0, 2, 3))
    # ImageNet's own means, within what ten classes may differ.
    assert torch.allclose(mean, torch.tensor([0.485, 0.456, 0.406]), atol=0.05)
    again = real("imagenette", "val", 64, cache)
    assert again.digest == data.digest
    assert len(load_protocol("imagenette-64").test_indices(data.ids)) == 1000, "it pins its list"
    measured = [
        load_record(path) for path in methods_folder().glob("*/results/imagenette-64/*.json")
    ]
    first = Path(os.environ["GUARDBENCH_DATA"]) / "imagenette" / "val" / data.ids[0]
    if not first.is_file() or Image.open(first).size != (224, 224):
        pytest.skip("another copy of the images than the published rows are of")
    alike = [r for r in measured if r.provenance.versions["pillow"] == version("pillow")]
    if not alike:
        pytest.skip("another Pillow than decoded the images of the published rows")
    assert {record.test.data_sha256 for record in alike} == {data.digest}


def test_cifar10_test(cache: Path) -> None:
    data = real("cifar10", "val", 32, cache)
    assert data.complete
    assert data.images.shape == (10_000, 3, 32, 32)
    assert data.labels.bincount().tolist() == [1000] * 10
    mean = data.batch(range(0, 10_000, 7)).mean((0, 2, 3))
    assert torch.allclose(mean, torch.tensor([0.491, 0.482, 0.447]), atol=0.02)


def test_tiny_imagenet_val(cache: Path) -> None:
    data = real("tiny-imagenet", "val", 64, cache)
    assert data.complete
    assert data.num_classes == 200
    assert list(data.classes) == sorted(data.classes)
    assert data.labels.bincount().tolist() == [50] * 200
    assert len(load_protocol("tiny-imagenet").test_indices(data.ids)) == 10_000, "it pins its list"
