"""The cache: the same pixels as torchvision, and nothing unfinished is ever taken for finished."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import guardbench
from guardbench.data.cache import Entry, cached, short_side_centre
from guardbench.data.files import cache_root
from guardbench.data.source import Listing, Source
from guardbench.errors import GuardbenchError
from guardbench.progress import Progress

COUNT = 40


def noise(seed: int, size: tuple[int, int] = (11, 9)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def source(fingerprint: str = "one", first_seed: int = 0) -> Source:
    listing = Listing(
        ids=tuple(f"a/{index}" for index in range(COUNT)),
        labels=tuple(index % 2 for index in range(COUNT)),
        read=lambda index: noise(first_seed + index),
    )
    return Source("memory", ("a", "b"), 3, fingerprint, lambda: listing)


def build(root: Path, wanted: Source | None = None, resolution: int = 8) -> Entry:
    return cached(wanted or source(), resolution, root, "made-train", Progress())


def files(root: Path, ending: str) -> list[Path]:
    return sorted((root / "datasets").glob(f"*{ending}"))


@pytest.mark.parametrize("size", [(64, 64), (100, 75), (75, 101), (33, 200), (20, 17), (65, 64)])
@pytest.mark.parametrize("resolution", [64, 32, 17])
def test_preprocessing_is_torchvisions_resize_and_centre_crop(
    size: tuple[int, int], resolution: int
) -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    image = noise(1, size)
    theirs = transforms.Compose(
        [transforms.Resize(resolution), transforms.CenterCrop(resolution), transforms.PILToTensor()]
    )(image)
    ours = short_side_centre(image, resolution, 3)
    assert ours.flags.c_contiguous
    assert np.array_equal(ours, theirs.numpy())


def test_right_size_is_kept_to_the_bit_and_grey_becomes_rgb() -> None:
    image = noise(2, (16, 16))
    assert np.array_equal(short_side_centre(image, 16, 3).transpose(1, 2, 0), np.asarray(image))
    grey = image.convert("L")
    assert np.array_equal(short_side_centre(grey, 16, 3)[1], np.asarray(grey))
    assert short_side_centre(image, 16, 1).shape == (1, 16, 16)


def test_entry_is_mapped_and_read_only(tmp_path: Path) -> None:
    entry = build(tmp_path)
    assert isinstance(entry.images, np.memmap)
    assert entry.images.dtype == np.uint8
    assert entry.images.shape == (COUNT, 3, 8, 8)
    assert not entry.images.flags.writeable
    assert np.array_equal(entry.images[7], short_side_centre(noise(7), 8, 3))
    assert (tmp_path / "datasets").stat()
    assert len(files(tmp_path, ".npy")) == 1
    assert not files(tmp_path, ".part")


def test_second_time_opens_nothing(tmp_path: Path) -> None:
    first = build(tmp_path)

    def refuse() -> Listing:
        raise AssertionError("opened although the cache is there")

    again = build(tmp_path, Source("memory", ("a", "b"), 3, "one", refuse))
    assert (again.digest, again.ids, again.labels) == (first.digest, first.ids, first.labels)


def test_changed_data_and_resolution_have_entries_of_their_own(tmp_path: Path) -> None:
    one = build(tmp_path)
    two = build(tmp_path, source("two", first_seed=1))
    assert one.digest != two.digest
    assert build(tmp_path, resolution=6).images.shape[-1] == 6
    assert len(files(tmp_path, ".npy")) == 3
    # The digest is of the content, so that another machine's files give the same one.
    assert build(tmp_path, source("three")).digest == one.digest


@pytest.mark.parametrize("fault", ["cut", "longer", "empty", "header", "gone", "json", "no ids"])
def test_damaged_entry_is_built_again(tmp_path: Path, fault: str) -> None:
    before = build(tmp_path)
    digest, pixels = before.digest, np.array(before.images)
    (array,), (meta,) = files(tmp_path, ".npy"), files(tmp_path, ".json")
    raw, text = array.read_bytes(), meta.read_text()
    damaged = {
        "cut": raw[:-100],
        "longer": raw + b"\0",
        "empty": b"",
        "header": b"\x93NUMPY\x01\x00garbage" + raw[15:],
    }
    if fault in damaged:
        array.write_bytes(damaged[fault])
    elif fault == "gone":
        array.unlink()
    elif fault == "json":
        meta.write_text(text[: len(text) // 2])
    else:
        meta.write_text(json.dumps({**json.loads(text), "ids": ["a/0"]}))
    entry = build(tmp_path)
    assert entry.digest == digest
    assert np.array_equal(entry.images, pixels)
    assert array.read_bytes() == raw
    assert meta.read_text() == text


def test_failure_half_way_leaves_nothing(tmp_path: Path) -> None:
    def broken(index: int) -> Image.Image:
        if index == 30:
            raise GuardbenchError("x.png: broken")
        return noise(index)

    listing = source().open()
    bad = Source(
        "memory", ("a", "b"), 3, "one", lambda: Listing(listing.ids, listing.labels, broken)
    )
    with pytest.raises(GuardbenchError, match=r"x\.png"):
        build(tmp_path, bad)
    assert not files(tmp_path, ".npy")
    assert not files(tmp_path, ".json")
    assert not list((tmp_path / "datasets").glob("*.part"))


def test_full_disk_is_one_line_before_and_during(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(GuardbenchError, match=r"GB are free.*GUARDBENCH_CACHE"):
            build(tmp_path)

    def full(_: int) -> Image.Image:
        raise OSError(errno.ENOSPC, "No space left on device")

    listing = source().open()
    bad = Source("memory", ("a", "b"), 3, "one", lambda: Listing(listing.ids, listing.labels, full))
    with pytest.raises(GuardbenchError, match=r"the disk is full.*GUARDBENCH_CACHE"):
        build(tmp_path, bad)
    assert not list((tmp_path / "datasets").glob("*.part"))


def test_cache_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(GuardbenchError, match="GUARDBENCH_CACHE"):
        build(tmp_path / "file")


def test_a_cache_that_is_deleted_meanwhile_costs_a_reader_nothing(tmp_path: Path) -> None:
    entry = build(tmp_path)
    before = entry.images.copy()
    shutil.rmtree(tmp_path / "datasets")
    assert np.array_equal(entry.images, before), "the file lives as long as it is mapped"
    again = build(tmp_path)
    assert again.digest == entry.digest, "a run that is resumed finds its stages"
    assert np.array_equal(again.images, before)


def test_a_cache_that_is_deleted_while_it_is_built_is_one_line(tmp_path: Path) -> None:
    def read(index: int) -> Image.Image:
        if index == COUNT - 1:
            shutil.rmtree(tmp_path / "datasets")
        return noise(index)

    listing = source().open()
    wanted = Source(
        "memory", ("a", "b"), 3, "one", lambda: Listing(listing.ids, listing.labels, read)
    )
    with pytest.raises(GuardbenchError, match=r"made-train.*removed while it was needed") as caught:
        build(tmp_path, wanted)
    assert "\n" not in str(caught.value)
    assert len(build(tmp_path).images) == COUNT


def test_cache_root_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUARDBENCH_CACHE", str(tmp_path / "named"))
    assert cache_root(tmp_path) == tmp_path
    assert cache_root(None) == tmp_path / "named"
    monkeypatch.delenv("GUARDBENCH_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root(None) == tmp_path / ".cache" / "guardbench"


def test_progress_is_shown(tmp_path: Path) -> None:
    console = Console(record=True, width=200)
    cached(source(), 8, tmp_path, "made-train", Progress(console))
    assert f"decode made-train at 8 px: {COUNT}/{COUNT} images" in console.export_text()


# A process that builds the same entry slowly, and writes a line for each time it starts to.
SLOW = """
import sys, time
from pathlib import Path
import numpy as np
from PIL import Image
from rich.console import Console
from guardbench.data.cache import cached
from guardbench.data.source import Listing, Source
from guardbench.progress import Progress

root, log, pause = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])

def read(index):
    time.sleep(pause)
    pixels = np.random.default_rng(index).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    return Image.fromarray(pixels)

def opened():
    with log.open("a") as stream:
        stream.write("built\\n")
    ids = tuple(f"a/{index}" for index in range(40))
    return Listing(ids, tuple(index % 2 for index in range(40)), read)

entry = cached(Source("memory", ("a", "b"), 3, "one", opened), 8, root, "made-train",
               Progress(Console(width=200)))
print("digest", entry.digest)
"""


def start(root: Path, log: Path, pause: float) -> subprocess.Popen[str]:
    path = str(Path(guardbench.__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, "-c", SLOW, str(root), str(log), str(pause)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    )


def wait_for(log: Path) -> None:
    deadline = time.monotonic() + 60
    while not log.is_file():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_two_processes_build_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    first = start(tmp_path, log, 0.1)
    wait_for(log)
    second = start(tmp_path, log, 0.1)
    said = [process.communicate(timeout=120)[0] for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0]
    assert log.read_text() == "built\n"
    assert "waiting for another process" in said[1]
    digest = build(tmp_path).digest
    assert all(f"digest {digest}" in text for text in said)


def test_killed_builder_leaves_nothing_that_counts(tmp_path: Path) -> None:
    log = tmp_path / "log"
    victim = start(tmp_path, log, 5.0)
    wait_for(log)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "datasets").glob(".*.part")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    victim.communicate(timeout=60)
    assert not files(tmp_path, ".npy")
    assert list((tmp_path / "datasets").glob(".*.part"))
    entry = build(tmp_path)
    assert np.array_equal(entry.images[39], short_side_centre(noise(39), 8, 3))
    assert not list((tmp_path / "datasets").glob(".*.part"))
