"""The loader at ImageNet's scale: its resident memory, and its speed beside a bare decode loop.

    python benchmarks/loader.py
    python benchmarks/loader.py --images 10000 --side 128 --resolution 64

Makes a set of 1,000 classes of JPEGs in a temporary folder, which is removed after: as class folders, as
parquet shards in the Hub's layout and as webdataset tars, of the same bytes (with one cache, about 45 GB at
the default size). For each container three processes take turns:

- the bare loop decodes, resizes and crops each file of the folders, one thread a core, and keeps nothing;
- the loader feeds the images of the container in their order, and keeps nothing;
- a build does that, hashes them and writes them to the cache, as the first `guardbench run` on them does.

Printed are images a second, their ratios to those of the bare loop, and the largest resident memory of each
process. Then another reads an epoch of batches in a random order from the finished cache, as training does.
The three datasets must have one digest.
"""

import argparse
import io
import os
import resource
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from turns import in_turns

from guardbench.data.catalog import dataset_info
from guardbench.data.decode import short_side_centre
from guardbench.data.source import read_image

CONTAINERS = ("folders", "parquet", "tars")
SHARD_IMAGES = 2000
BATCH = 128


def picture(number, side):
    """A JPEG of about the size and the detail of ImageNet's: smooth noise with some grain."""
    rng = np.random.default_rng(number)
    height, width = side, side * 4 // 3
    coarse = Image.fromarray(rng.integers(0, 256, (height // 12, width // 12, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    grain = rng.integers(-12, 13, (height, width, 1), dtype=np.int16)
    stream = io.BytesIO()
    Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def make(root, images, side):
    """The set three times below `root`, of a thousand pictures; gives the mean bytes of a file."""
    import pyarrow
    from pyarrow import parquet

    classes = dataset_info("imagenet").classes
    pictures = [picture(number, side) for number in range(min(images, 1000))]
    order = np.random.default_rng(0).permutation(images)
    for key in classes:
        (root / "folders/imagenet/train" / key).mkdir(parents=True)
    for container in ("parquet/imagenet/data", "tars/imagenet"):
        (root / container).mkdir(parents=True)
    shards = -(-images // SHARD_IMAGES)
    for shard in range(shards):
        rows = []
        with tarfile.open(root / f"tars/imagenet/imagenet1k-train-{shard:04d}.tar", "w") as archive:
            for number in order[shard * SHARD_IMAGES : (shard + 1) * SHARD_IMAGES].tolist():
                label, key = number % 1000, classes[number % 1000]
                stem = f"{key}_{number}"
                data = pictures[(number * 7 + number // 1000) % len(pictures)] + number.to_bytes(
                    4, "big"
                )
                (root / "folders/imagenet/train" / key / f"{stem}.JPEG").write_bytes(data)
                rows.append(
                    {"image": {"bytes": data, "path": f"{stem}_{key}.JPEG"}, "label": label}
                )
                for kind, part in (("jpg", data), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{stem}.{kind}")
                    member.size = len(part)
                    archive.addfile(member, io.BytesIO(part))
        name = f"train-{shard:05d}-of-{shards:05d}.parquet"
        table = pyarrow.Table.from_pylist(rows)
        parquet.write_table(table, root / "parquet/imagenet/data" / name, row_group_size=100)
    return sum(file.stat().st_size for file in (root / "tars/imagenet").iterdir()) / images


def prepare(contestant, container, root, resolution):
    """What `in_turns` times: the loader of a container, feeding or building, or the bare loop."""
    import datasets  # noqa: F401 - ten seconds on a busy machine, and no part of loading

    from guardbench.data.dataset import load_split
    from guardbench.data.decode import decoded
    from guardbench.data.locate import locate
    from guardbench.data.source import open_source
    from guardbench.progress import Progress

    cache = root / "cache" / container

    def feed():
        located = locate("imagenet", root / container, cache_dir=cache)
        source = open_source(dataset_info("imagenet"), located, "train")
        blocks = decoded(source.open(), resolution, source.channels)
        return sum(len(block.items) for block in blocks), resident()

    def build():
        begun = resident()
        split = load_split(
            "imagenet", "train", resolution=resolution, data_dir=root / container,
            cache_dir=cache, progress=Progress(),
        )  # fmt: skip
        return begun, resident(), split.digest, len(split)

    if contestant != "bare":
        return {"feed": feed, "build": build}[contestant]
    files = sorted(str(path) for path in (root / "folders").rglob("*.JPEG"))
    cores = len(os.sched_getaffinity(0))

    def bare():
        with ThreadPoolExecutor(cores) as pool:
            shares = [files[core::cores] for core in range(cores)]
            list(pool.map(decode, shares, [resolution] * cores))

    return bare


def decode(files, resolution):
    for file in files:
        short_side_centre(read_image(Path(file)), resolution, 3)


def prepare_read(root, container, resolution):
    """Every image of a finished cache once, in a random order, as batches: an epoch's reading."""
    import torch

    from guardbench.data.dataset import load_split
    from guardbench.progress import Progress

    split = load_split(
        "imagenet", "train", resolution=resolution, data_dir=root / container,
        cache_dir=root / "cache" / container, progress=Progress(),
    )  # fmt: skip

    def read():
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
        for picked in torch.split(order, BATCH):
            split.batch(picked)
        return resident()

    return read


def resident():
    """The largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main():
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--images", type=int, default=100_000)
    words.add_argument(
        "--side", type=int, default=375, help="of the JPEGs; the longer one is 4/3 of it"
    )
    words.add_argument("--resolution", type=int, default=224)
    words.add_argument("--folder", type=Path, help="where the temporary folder is made")
    args = words.parse_args()
    with tempfile.TemporaryDirectory(prefix="guardbench-loader-", dir=args.folder) as name:
        root, begun = Path(name), time.perf_counter()
        size = make(root, args.images, args.side)
        print(
            f"{args.images} JPEGs of {size / 1e3:.0f} kB in 1,000 classes, made in "
            f"{time.perf_counter() - begun:.0f} s; {len(os.sched_getaffinity(0))} cores, {args.resolution} px"
        )
        digests = set()
        for container in CONTAINERS:
            words = (container, root, args.resolution)
            found = in_turns(prepare, {name: (name, *words) for name in ("feed", "build", "bare")})
            (fed, fed_peak), feeding = found["feed"]
            (before, peak, digest, count), building = found["build"]
            bare = found["bare"][1]
            assert fed == count == args.images
            (read_peak, reading) = in_turns(
                prepare_read, {"read": (root, container, args.resolution)}
            )["read"]
            digests.add(digest)
            print(
                f"{container:8s} feeds {count / feeding:.0f} images/s, {bare / feeding:.2f} of the bare "
                f"loop's {count / bare:.0f}, resident at most {fed_peak / 1e6:.0f} MB; builds the cache at "
                f"{count / building:.0f}, {bare / building:.2f}, {peak / 1e6:.0f} MB ({before / 1e6:.0f} "
                f"before); batches from it at {count / reading:.0f}, {bare / reading:.1f}, "
                f"{read_peak / 1e6:.0f} MB",
                flush=True,
            )
            for file in (root / "cache" / container / "datasets").iterdir():
                file.unlink()
        print("one digest" if len(digests) == 1 else f"DIGESTS DIFFER: {digests}")


if __name__ == "__main__":
    main()
