"""How long `guardbench submission check` takes on a large submission.

    python benchmarks/checking.py --data-dir DATA

1,000 PNGs of 224 px, made of mirrored training images of Imagenette, are compared with all of its
images, which have been decoded before. Prints seconds of the public command from first line to last.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from guardbench.data.dataset import load_split
from guardbench.progress import Progress

WORDS = (
    "--title", "Mirrored", "--author", "A. Nobody", "--licence", "CC0-1.0", "--labels", "hard",
    "--made", "Mirrored training images, for a benchmark.",
)  # fmt: skip


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--dataset", default="imagenette")
    words.add_argument("--resolution", type=int, default=224)
    words.add_argument("--ipc", type=int, default=100)
    words.add_argument("--data-dir", type=Path, required=True)
    args = words.parse_args()
    train, val = (
        load_split(
            args.dataset, split, resolution=args.resolution, data_dir=args.data_dir, cache_dir=None,
            progress=Progress(),
        )
        for split in ("train", "val")
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "mirrored"
        for label, key in enumerate(train.classes):
            rows = torch.nonzero(train.labels == label).flatten()[: args.ipc]
            (folder / "images" / key).mkdir(parents=True)
            for row, image in zip(rows.tolist(), train.batch(rows).flip(-1), strict=True):
                pixels = (255 * image).round().byte().permute(1, 2, 0).squeeze(-1).numpy()
                Image.fromarray(pixels).save(folder / "images" / key / f"{row}.png")
        base = [sys.executable, "-m", "guardbench", "submission"]
        setting = [
            "--dataset",
            args.dataset,
            "--resolution",
            str(args.resolution),
            "--ipc",
            str(args.ipc),
        ]
        subprocess.run([*base, "new", str(folder), *WORDS, *setting], check=True)
        begun = time.perf_counter()
        subprocess.run([*base, "check", str(folder), "--data-dir", str(args.data_dir)], check=True)
        spent = time.perf_counter() - begun
    count, beside = args.ipc * train.num_classes, len(train) + len(val)
    print(
        f"check of {count} images of {args.resolution} px beside {beside}: {spent:.1f} s with "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
