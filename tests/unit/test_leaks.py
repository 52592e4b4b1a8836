"""Validation images are found however they were altered, and what is honestly made is no leak."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from guardbench.data.dataset import RealDataset, load_split
from guardbench.data.locate import locate
from guardbench.errors import GuardbenchError
from guardbench.progress import Progress
from guardbench.submissions.leaks import Leaks, find_leaks

Splits = tuple[RealDataset, RealDataset]


@pytest.fixture(scope="module")
def digits() -> Splits:
    def load(split: str) -> RealDataset:
        return load_split(
            "digits", split, resolution=8, data_dir=None, cache_dir=None, progress=Progress()
        )

    return load("train"), load("val")


@pytest.fixture(scope="session")
def imagenette(tmp_path_factory: pytest.TempPathFactory) -> Splits:
    """Every sixth image at 64 px."""
    if not os.environ.get("GUARDBENCH_DATA"):
        pytest.skip("GUARDBENCH_DATA is not set")
    there = tmp_path_factory.mktemp("some")
    try:
        located = locate("imagenette", None, cache_dir=there)
    except GuardbenchError as error:
        pytest.skip(str(error))
    if located.path is None or located.kind != "folder":
        pytest.skip("GUARDBENCH_DATA has no imagenette")
    for image in sorted(located.path.glob("*/n*/*"))[::6]:
        link = there / "imagenette" / image.relative_to(located.path)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(image)

    def load(split: str) -> RealDataset:
        return load_split(
            "imagenette", split, resolution=64, data_dir=there, cache_dir=there, progress=Progress()
        )

    return load("train"), load("val")


def drawn(count: int, *, side: int, seed: int, name: str) -> RealDataset:
    """Smooth random pictures, where the claim needs colours and no real data."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 7, 7, generator=generator)
    images = F.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)
    return RealDataset(
        name="digits",
        split=name,
        resolution=side,
        images=eight_bit(images).numpy(),
        labels=torch.zeros(count, dtype=torch.int64),
        ids=tuple(str(row) for row in range(count)),
        classes=("one",),
        digest="0" * 64,
    )


@pytest.fixture(scope="module")
def pictures() -> Splits:
    return drawn(200, side=64, seed=1, name="train"), drawn(60, side=64, seed=2, name="val")


def eight_bit(images: Tensor) -> Tensor:
    return images.clamp(0, 1).mul(255).round().to(torch.uint8)


def found(images: Tensor, splits: Splits) -> Leaks:
    return find_leaks(eight_bit(images) / 255, *splits, Progress())


def noise(images: Tensor, strength: float) -> Tensor:
    return images + strength * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))


def crop(images: Tensor, share: float, down: float, across: float) -> Tensor:
    side = images.shape[-1]
    kept = round(side * share)
    top, left = round((side - kept) * down), round((side - kept) * across)
    return resized(images[..., top : top + kept, left : left + kept], side)


def resized(images: Tensor, side: int) -> Tensor:
    return F.interpolate(images, (side, side), mode="bilinear", antialias=True)


def border(images: Tensor, width: int, value: float) -> Tensor:
    inside = images[..., width:-width, width:-width]
    return F.pad(inside, (width,) * 4, value=value)


def mosaic(*images: Tensor) -> Tensor:
    a, b, c, d = (resized(one, one.shape[-1] // 2) for one in images)
    return torch.cat([torch.cat([a, b], 3), torch.cat([c, d], 3)], 2)


def rolled(images: Tensor) -> Tensor:
    return mosaic(*(images.roll(step, 0) for step in range(4)))


def gains(images: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return images * (0.5 + torch.rand(len(images), 3, 1, 1, generator=generator))


ANYWHERE: dict[str, Callable[[Tensor], Tensor]] = {
    "same": lambda x: x,
    "mirrored": lambda x: x.flip(-1),
    "upside down": lambda x: x.flip(-2),
    "a quarter turn": lambda x: x.rot90(1, (2, 3)),
    "half a turn": lambda x: x.rot90(2, (2, 3)),
    "three quarters of a turn": lambda x: x.rot90(3, (2, 3)),
    "negative": lambda x: 1 - x,
    "noisy": lambda x: noise(x, 0.02),
    "faded": lambda x: 0.2 + 0.6 * x,
    "dark": lambda x: 0.3 * x,
}
LARGE: dict[str, Callable[[Tensor], Tensor]] = {
    "channel gains": gains,
    "grey": lambda x: x.mean(1, keepdim=True).expand_as(x),
    "channels swapped": lambda x: x.flip(1),
    "very noisy": lambda x: noise(x, 0.1),
    "centre 0.85": lambda x: crop(x, 0.85, 0.5, 0.5),
    "centre 0.7": lambda x: crop(x, 0.7, 0.5, 0.5),
    "corner 0.9": lambda x: crop(x, 0.9, 0, 0),
    "corner 0.85": lambda x: crop(x, 0.85, 1, 0),
    "corner 0.8, mirrored": lambda x: crop(x, 0.8, 0, 1).flip(-1),
    "edge 0.8": lambda x: crop(x, 0.8, 0.5, 1),
    "black border": lambda x: border(x, 6, 0),
    "white border": lambda x: border(x, 6, 1),
    "within a frame": lambda x: F.pad(resized(x, 52), (6,) * 4),
    "mosaic": rolled,
    "mosaic, mirrored and dark": lambda x: 0.7 * rolled(x).flip(-1),
}


@pytest.mark.parametrize("how", ANYWHERE)
def test_altered_digits_are_found(how: str, digits: Splits) -> None:
    images = digits[1].batch(torch.arange(0, 445, 9))
    leaks = found(ANYWHERE[how](images), digits)
    assert leaks.leaked.float().mean() > 0.9
    assert bool(leaks.val.exact.all()) == (how == "same")
    assert not leaks.copied.any()


@pytest.mark.parametrize("how", {**ANYWHERE, **LARGE})
def test_altered_pictures_are_found(how: str, pictures: Splits) -> None:
    rows = torch.arange(len(pictures[1]))
    leaks = found({**ANYWHERE, **LARGE}[how](pictures[1].batch(rows)), pictures)
    assert leaks.leaked.float().mean() > 0.9
    if "mosaic" not in how:
        assert (leaks.val.position == rows).float().mean() > 0.9


def test_one_validation_image_in_a_mosaic_of_training_images_is_found(pictures: Splits) -> None:
    train, val = pictures
    own = train.batch(torch.arange(60))
    images = mosaic(own, own.roll(1, 0), val.batch(torch.arange(60)), own.roll(2, 0))
    leaks = found(images, pictures)
    assert leaks.leaked.all()
    assert torch.equal(leaks.val.position, torch.arange(60))
    assert not found(rolled(own), pictures).leaked.any()
    assert found(rolled(own), pictures).copied.float().mean() > 0.9


def class_means(split: RealDataset) -> Tensor:
    return torch.stack(
        [split.batch((split.labels == c).nonzero().flatten()).mean(0) for c in range(10)]
    )


def uniform(count: int, *shape: int) -> Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(1))


def honest(train: RealDataset, step: int) -> dict[str, Tensor]:
    """Sets that know nothing of the validation images, all but the first no copies either."""
    own = train.batch(torch.arange(0, len(train), step))
    channels, side = own.shape[1], own.shape[-1]
    return {
        "training images": own,
        "class means": class_means(train),
        "means of four": sum((own.roll(step, 0) for step in range(4)), torch.zeros_like(own)) / 4,
        "blends of two": (own + own.roll(1, 0)) / 2,
        "noise": uniform(50, channels, side, side),
        "smooth noise": F.interpolate(uniform(50, channels, 4, 4), (side, side), mode="bilinear"),
        "flat": uniform(50, channels, 1, 1).expand(-1, -1, side, side),
    }


def test_honest_digits_are_no_leak(digits: Splits) -> None:
    for name, images in honest(digits[0], step=11).items():
        leaks = found(images, digits)
        assert not leaks.leaked.any(), name
        assert bool(leaks.copied.all() if name == "training images" else not leaks.copied.any())


def test_a_flat_image_is_a_copy_only_to_the_pixel(pictures: Splits) -> None:
    train, val = (replace(split, images=np.array(split.images)) for split in pictures)
    for channel, level in enumerate((40, 90, 200)):
        train.images[:3, channel] = level
        val.images[:3, channel] = level + 1
    near = torch.tensor([40, 90, 201.0]).div(255).view(1, 3, 1, 1).expand(-1, -1, 64, 64)
    leaks = found(near, (train, val))
    assert not (leaks.leaked | leaks.copied).any()
    leaks = found(torch.cat([train.batch([0]), val.batch([0])]), (train, val))
    assert leaks.copied.tolist() == [True, False]
    assert leaks.leaked.tolist() == [False, True]
    assert leaks.val.distance[1] == 0


def test_equal_pixels_are_found_beside_a_likeness_as_near(pictures: Splits) -> None:
    train, val = pictures
    images = np.array(val.images)
    images[1] = images[0] // 2  # the same feature as its original, but for rounding
    images[2] = 255 - images[0]
    leaks = found(val.batch([0]), (train, replace(val, images=images[[2, 1, 0]])))
    assert leaks.val.exact.all()
    assert leaks.val.position.tolist() == [2]


def test_an_image_of_both_splits_is_a_copy_and_no_leak(pictures: Splits) -> None:
    train, val = pictures
    images = np.array(val.images)
    images[5] = train.images[7]
    leaks = found(train.batch([7]), (train, replace(val, images=images)))
    assert leaks.val.exact.all()
    assert leaks.copied.all()


def test_large_images_are_found_mirrored_and_in_pieces() -> None:
    """The mirror image of a large one has the very same feature, though not every pixel is read."""
    train, val = (drawn(count, side=224, seed=count, name="x") for count in (20, 12))
    images = torch.cat([train.batch(torch.arange(9)).flip(-1), val.batch(torch.arange(9)).flip(-1)])
    leaks = find_leaks(images, train, val, Progress())
    assert leaks.copied.tolist() == [True] * 9 + [False] * 9
    assert leaks.leaked.tolist() == [False] * 9 + [True] * 9
    assert leaks.train.distance[:9].max() < 0.01
    assert not leaks.val.exact.any()
    assert find_leaks(images.flip(-1), train, val, Progress()).val.exact[9:].all()
    altered = val.batch(torch.arange(9))
    altered[:, :, 0, 0] = (altered[:, :, 0, 0] + 0.5) % 1
    assert not find_leaks(altered, train, val, Progress()).val.exact.any()


def test_no_float_copy_of_all_large_images_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever becomes a feature has been sampled, and comes in pieces."""
    from guardbench.submissions import leaks

    shapes = []
    real = leaks._thumbnails

    def watched(images: Tensor, *words: object) -> Tensor:
        shapes.append(images.shape)
        return real(images, *words)  # type: ignore[arg-type]

    monkeypatch.setattr(leaks, "_thumbnails", watched)
    monkeypatch.setattr(leaks, "_BATCH", 8)
    train, val = (drawn(count, side=224, seed=count, name="x") for count in (20, 12))
    find_leaks(train.batch(torch.arange(20)), train, val, Progress())
    assert shapes
    assert max(shape[0] for shape in shapes) == 8
    assert {shape[-1] for shape in shapes} == {74}


@pytest.mark.real_data
def test_altered_photographs_are_found(imagenette: Splits) -> None:
    images = imagenette[1].batch(torch.arange(0, 640, 20))
    ways = {**ANYWHERE, **LARGE}
    leaks = found(torch.cat([ways[how](images) for how in ways]), imagenette)
    rates = leaks.leaked.view(len(ways), -1).float().mean(1).tolist()
    assert {how: rate for how, rate in zip(ways, rates, strict=True) if rate < 0.9} == {}


@pytest.mark.real_data
def test_honest_photographs_are_no_leak(imagenette: Splits) -> None:
    train, _ = imagenette
    own = train.batch(torch.arange(0, len(train), 16))
    sets = {
        **honest(train, step=16),
        "crops": crop(own, 0.8, 0.2, 0.7),
        "mosaics": rolled(own),
        "mosaics of crops": rolled(crop(own, 0.6, 0.3, 0.6)),
        "blurred": resized(resized(own, 12), 64),
    }
    for name, images in sets.items():
        leaks = found(images, imagenette)
        assert not leaks.leaked.any(), name
        if name == "flat":
            assert not leaks.copied.any()
