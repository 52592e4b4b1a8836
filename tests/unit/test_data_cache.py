"""The cache: the same pixels as torchvision, and nothing unfinished is ever taken for finished."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import guardbench
from guardbench.data import cache, decode
from guardbench.data.cache import Entry, cached
from guardbench.data.decode import short_side_centre
from guardbench.data.files import cache_root
from guardbench.data.pixels import PixelFile
from guardbench.data.source import Item, Shard, Source
from guardbench.errors import GuardbenchError
from guardbench.progress import Progress

COUNT = 40


def noise(seed: int, size: tuple[int, int] = (11, 9)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def source(
    fingerprint: str = "one",
    first_seed: int = 0,
    *,
    read: Callable[[int], Image.Image] | None = None,
    shards: int = 1,
    order: Sequence[int] = range(COUNT),
    name: Callable[[int], str] = "a/{:02d}".format,
) -> Source:
    """Forty images `a/00` to `a/39`, of class 0 and 1 in turns, in so many shards of equal size."""
    read = read or (lambda index: noise(first_seed + index))
    size = COUNT // shards

    def items(first: int) -> Iterator[Item]:
        for index in order[first : first + size]:
            yield Item(name(index), index % 2, partial(read, index))

    made = [Shard(f"{fingerprint} {k}", partial(items, k), size) for k in range(0, COUNT, size)]
    shuffled = list(order) != list(range(COUNT))
    return Source("memory", ("a", "b"), 3, fingerprint, lambda: made, shuffled=shuffled)


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
    assert np.array_equal(ours, theirs.numpy())


def test_right_size_is_kept_to_the_bit_and_grey_becomes_rgb() -> None:
    image = noise(2, (16, 16))
    assert np.array_equal(short_side_centre(image, 16, 3).transpose(1, 2, 0), np.asarray(image))
    grey = image.convert("L")
    assert np.array_equal(short_side_centre(grey, 16, 3)[1], np.asarray(grey))
    assert short_side_centre(image, 16, 1).shape == (1, 16, 16)


def test_entry_is_read_row_by_row(tmp_path: Path) -> None:
    entry = build(tmp_path)
    assert isinstance(entry.images, PixelFile)
    assert entry.images.shape == (COUNT, 3, 8, 8)
    everything = np.stack([short_side_centre(noise(index), 8, 3) for index in range(COUNT)])
    for wanted in (7, -1, slice(3, 30), slice(30, 3, -4), slice(5, 5)):
        assert np.array_equal(entry.images[wanted], everything[wanted])
    places = np.array([5, 6, 7, 2, -1, 5])
    assert np.array_equal(entry.images[places], everything[places])
    assert entry.images[np.array([], dtype=np.int64)].shape == (0, 3, 8, 8)
    for outside in (COUNT, -COUNT - 1):
        with pytest.raises(IndexError):
            entry.images[outside]
    (array,) = files(tmp_path, ".npy")
    assert np.array_equal(np.load(array), everything), "NumPy's own format"
    assert (tmp_path / "datasets").stat()
    assert len(files(tmp_path, ".npy")) == 1
    assert not files(tmp_path, ".part")


def test_second_time_opens_nothing(tmp_path: Path) -> None:
    first = build(tmp_path)

    def refuse() -> list[Shard]:
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


@pytest.mark.parametrize(
    "fault", ["cut", "longer", "empty", "header", "pixel", "gone", "json", "no ids"]
)
def test_damaged_entry_is_built_again(tmp_path: Path, fault: str) -> None:
    before = build(tmp_path)
    digest, pixels = before.digest, before.images[:]
    (array,), (meta,) = files(tmp_path, ".npy"), files(tmp_path, ".json")
    raw, text = array.read_bytes(), meta.read_text()
    damaged = {
        "cut": raw[:-100],
        "longer": raw + b"\0",
        "empty": b"",
        "header": b"\x93NUMPY\x01\x00garbage" + raw[15:],
        "pixel": raw[:-50] + bytes([raw[-50] ^ 1]) + raw[-49:],
    }
    if fault in damaged:
        array.write_bytes(damaged[fault])
    elif fault == "gone":
        array.unlink()
    elif fault == "json":
        meta.write_text(text[: len(text) // 2])
    else:
        meta.write_text(json.dumps({**json.loads(text), "ids": ["a/0"]}))
    cache._HELD.clear()  # as in another process
    entry = build(tmp_path)
    assert entry.digest == digest
    assert np.array_equal(entry.images[:], pixels)
    assert array.read_bytes() == raw
    assert meta.read_text() == text


def test_failure_half_way_leaves_nothing(tmp_path: Path) -> None:
    def broken(index: int) -> Image.Image:
        if index == 30:
            raise GuardbenchError("x.png: broken")
        return noise(index)

    bad = source(read=broken)
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

    bad = source(read=full)
    with pytest.raises(GuardbenchError, match=r"the disk is full.*GUARDBENCH_CACHE"):
        build(tmp_path, bad)
    assert not list((tmp_path / "datasets").glob("*.part"))


def test_cache_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(GuardbenchError, match="GUARDBENCH_CACHE"):
        build(tmp_path / "file")


def test_a_cache_that_is_deleted_meanwhile_costs_a_reader_nothing(tmp_path: Path) -> None:
    entry = build(tmp_path)
    before = entry.images[:]
    shutil.rmtree(tmp_path / "datasets")
    assert np.array_equal(entry.images[:], before), "the file lives as long as it is open"
    again = build(tmp_path)
    assert again.digest == entry.digest, "a run that is resumed finds its stages"
    assert np.array_equal(again.images[:], before)


def test_a_cache_that_is_deleted_while_it_is_built_is_one_line(tmp_path: Path) -> None:
    def read(index: int) -> Image.Image:
        if index == COUNT - 1:
            shutil.rmtree(tmp_path / "datasets")
        return noise(index)

    with pytest.raises(GuardbenchError, match=r"made-train.*removed while it was needed") as caught:
        build(tmp_path, source(read=read))
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
from guardbench.data import cache
from guardbench.data import cache
from guardbench.data.cache import cached
from guardbench.data.source import Item, Shard, Source
from guardbench.progress import Progress

cache._JOURNAL_EVERY_S = 0.0
root, log, pause = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])

def read(index):
    time.sleep(pause)
    while not pause and not (root / "go").is_file():
        time.sleep(0.02)
    pixels = np.random.default_rng(index).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    return Image.fromarray(pixels)

def items(first):
    for index in range(first, first + 20):
        yield Item(f"a/{index:02d}", index % 2, lambda index=index: read(index))

def opened():
    with log.open("a") as stream:
        stream.write("built\\n")
    return [Shard(f"one {first}", lambda first=first: items(first), 20) for first in (0, 20)]

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
    first = start(tmp_path, log, 0)
    wait_for(log)
    second = start(tmp_path, log, 0)
    assert second.stdout is not None
    waits = second.stdout.readline()
    (tmp_path / "go").touch()
    said = [process.communicate(timeout=120)[0] for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0]
    assert log.read_text() == "built\n"
    assert "waiting for another process" in waits
    digest = build(tmp_path).digest
    assert all(f"digest {digest}" in text for text in said)


def test_killed_builder_goes_on_behind_its_last_whole_shard(
    tmp_path: Path,
) -> None:
    log = tmp_path / "log"
    victim = start(tmp_path, log, 0.1)
    wait_for(log)
    part, journal = (
        (tmp_path / "datasets" / f".made-train-8px.{end}") for end in ("part", "journal")
    )
    deadline = time.monotonic() + 60
    while not journal.is_file():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    victim.communicate(timeout=60)
    assert not files(tmp_path, ".npy")
    assert part.is_file()
    decoded: list[int] = []

    def read(index: int) -> Image.Image:
        decoded.append(index)
        return noise(index)

    entry = build(tmp_path, source(read=read, shards=2))
    assert sorted(decoded) == list(range(20, COUNT))
    assert entry.digest == build(tmp_path / "unbroken", source(shards=2)).digest
    assert np.array_equal(entry.images[3], short_side_centre(noise(3), 8, 3))
    assert not part.exists()
    assert not journal.exists()


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("place", ["index", "name"])
def test_a_kill_at_the_very_end_decodes_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, older: bool
) -> None:
    """Before the index is written, or between it and the file's name; beside an older entry, too."""
    if older:
        build(tmp_path, source("of before"))
        monkeypatch.setattr(cache, "_HELD", {})

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        if place == "index":
            patched.setattr(cache, "write_text", killed)
        else:
            real = Path.replace

            def replace(self: Path, target: Path) -> Path:
                if self.name.startswith(".made") and self.suffix == ".part":
                    raise KeyboardInterrupt
                return real(self, target)

            patched.setattr(Path, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path, source(shards=4))
    decoded: list[int] = []

    def read(index: int) -> Image.Image:
        decoded.append(index)
        return noise(index)

    entry = build(tmp_path, source(read=read, shards=4))
    assert decoded == []
    assert entry.digest == build(tmp_path / "unbroken", source(shards=4)).digest


@pytest.mark.parametrize("cores", [2, 7])
def test_the_number_of_decoding_threads_moves_no_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int
) -> None:
    seen: set[int] = set()

    def read(index: int) -> Image.Image:
        seen.add(threading.get_ident())
        time.sleep(0.005 if index < 10 else 0.001)  # so that later ones are done sooner
        return noise(index)

    for order in (range(COUNT), [*range(10, COUNT), *range(10)]):
        found = []
        for threads in (1, cores):
            seen.clear()
            monkeypatch.setattr(decode, "_cores", lambda threads=threads: threads)
            many = source(read=read, shards=4, order=order)
            found.append(build(tmp_path / f"{order[0]} {threads}", many).digest)
            assert (len(seen) > 1) is (threads > 1)
            assert len(seen) <= threads
        assert found[0] == found[1]


@pytest.mark.parametrize("fault", ["half a line", "half a letter", "short rows", "changed shard"])
def test_only_what_is_whole_is_taken_over(tmp_path: Path, fault: str) -> None:
    def broken(index: int) -> Image.Image:
        if index == 35:
            raise GuardbenchError("x.png: broken")
        return noise(index)

    with pytest.raises(GuardbenchError, match=r"x\.png"):
        build(tmp_path, source(read=broken, shards=4))
    part, journal = (
        (tmp_path / "datasets" / f".made-train-8px.{end}") for end in ("part", "journal")
    )
    assert len(journal.read_text().splitlines()) == 3
    decoded: list[int] = []

    def read(index: int) -> Image.Image:
        decoded.append(index)
        return noise(index)

    if fault == "half a line":
        journal.write_text(journal.read_text()[:-20])
    elif fault == "half a letter":
        journal.write_bytes(journal.read_bytes()[:-20] + b"\xc3")
    elif fault == "short rows":
        os.truncate(part, part.stat().st_size - 5 * 192)
    again = source("one" if fault != "changed shard" else "two", read=read, shards=4)
    entry = build(tmp_path, again)
    assert entry.digest == build(tmp_path / "unbroken").digest
    assert min(decoded) == (0 if fault == "changed shard" else 20)


def test_a_resume_that_is_killed_itself_loses_no_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal is replaced by its good lines in one step: no moment is without it."""

    def broken(index: int) -> Image.Image:
        if index == 35:
            raise GuardbenchError("x.png: broken")
        return noise(index)

    with pytest.raises(GuardbenchError, match=r"x\.png"):
        build(tmp_path, source(read=broken, shards=4))
    journal = tmp_path / "datasets" / ".made-train-8px.journal"
    before = journal.read_text()

    def killed(*_: object, **__: object) -> None:
        assert journal.read_text() == before
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, source(shards=4))
    monkeypatch.undo()
    assert journal.read_text() == before
    decoded: list[int] = []

    def read(index: int) -> Image.Image:
        decoded.append(index)
        return noise(index)

    build(tmp_path, source(read=read, shards=4))
    assert min(decoded) == 30


def test_images_in_any_order_have_the_digest_of_the_sorted_ones(tmp_path: Path) -> None:
    """By class and then by name, whatever the order in which a container has them, broken off or not."""
    order = [*range(1, COUNT, 2), *range(0, COUNT, 2)]
    turned = build(tmp_path, source("turned", order=order, shards=4))
    assert list(turned.labels) == [0] * 20 + [1] * 20
    assert list(turned.ids) == [f"a/{index:02d}" for index in order[20:] + order[:20]]
    assert np.array_equal(turned.images[19], short_side_centre(noise(38), 8, 3))
    other = build(tmp_path, source("other", order=order[::-1], shards=2))
    assert other.digest == turned.digest
    assert np.array_equal(other.images[:], turned.images[:])
    again = build(tmp_path, source("other", order=order[::-1], shards=2))
    assert np.array_equal(again.images[:], turned.images[:])


def test_two_images_of_one_name_are_told(tmp_path: Path) -> None:
    with pytest.raises(GuardbenchError, match="memory: two images are called a/x"):
        build(tmp_path, source(name=lambda index: "a/x" if index > 37 else f"a/{index}"))


def test_a_file_that_is_cut_or_deleted_while_it_is_read(tmp_path: Path) -> None:
    entry = build(tmp_path)
    (array,) = files(tmp_path, ".npy")
    os.truncate(array, 2000)
    assert entry.images[2].shape == (3, 8, 8)
    with pytest.raises(GuardbenchError, match="the cache was cut short while it was in use"):
        entry.images[30]
    entry = build(tmp_path)
    array.unlink()
    assert np.array_equal(entry.images[30], short_side_centre(noise(30), 8, 3))


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="asks Linux")
def test_reading_a_large_cache_leaves_nothing_of_it_in_memory(tmp_path: Path) -> None:
    """A memory map would count every page that it has shown, a quarter of a gigabyte here."""

    def resident() -> int:
        words = Path("/proc/self/status").read_text().split("VmRSS:")[1].split()
        return int(words[0]) * 1024

    path, count, size = tmp_path / "large", 5000, 3 * 128 * 128
    path.touch()
    os.truncate(path, count * size)
    rows = np.random.default_rng(0).permutation(count)
    images = PixelFile(path, offset=0, shape=(count, 3, 128, 128), rows=rows.tolist())
    images[rows[:64]]
    before = resident()
    for first in range(0, count, 64):
        images[rows[first : first + 64]]
    assert resident() - before < 32 << 20
