"""Peak memory of an evaluation: it does not grow with the number of images.

    python benchmarks/memory.py --protocol cifar10 --images 500 2000 5000 --data-dir DATA

For each number a process of its own scores a random ConvNet, clean, under PGD-5, under APGD-5 and under
Square with 20 queries, with the parts that `guardbench evaluate` uses, and reports the largest memory in
use, and by how much that is above what was in use before; the last line holds the ratios of the last to the
first. The second is the sharper: of the whole, a process's libraries are most. PGD at 8/255 leaves few
images, so the images decide and not the attack. A batch holds so many rows and no more (`rows_at_once`),
so memory levels off once the images fill it: fewer than that compare a part of a batch with a whole one.
"""

import argparse
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import psutil
import torch

from guardbench.attacks.apgd import APGD
from guardbench.attacks.base import plan_batches, run_batch
from guardbench.attacks.pgd import PGD
from guardbench.attacks.square import Square
from guardbench.data.catalog import dataset_info
from guardbench.data.dataset import load_split
from guardbench.devices import MemoryMeter, make_accelerator
from guardbench.models import build_model
from guardbench.progress import Progress
from guardbench.protocol import load_protocol
from guardbench.runtime import Run
from guardbench.scoring import attack_batch, clean_verdicts, images_at_a_time
from guardbench.threat import ThreatModel


def alone(protocol_id: str, count: int, data_dir: Path | None, device: str) -> None:
    """One measurement: prints the images that were attacked, the peak in bytes and what was there before."""
    protocol = load_protocol(protocol_id)
    info = dataset_info(protocol.dataset)
    test = load_split(
        protocol.dataset, "val", resolution=protocol.resolution, data_dir=data_dir,
        cache_dir=None, progress=Progress(),
    )  # fmt: skip
    x = test.select(range(count))
    model = build_model(
        "convnet-d3", channels=info.channels, classes=info.num_classes,
        resolution=protocol.resolution, seed=0,
    ).eval()  # fmt: skip
    size = attack_batch(protocol.resolution)
    accelerator = make_accelerator(device, "fp32", protocol.resolution)
    where = accelerator.device
    model = model.to(where)
    run = Run(accelerator=accelerator, workspace=Path(), seed=0, progress=Progress())
    threat = ThreatModel("linf", Fraction(8, 255))
    attacks = {
        "pgd": PGD(threat=threat, steps=5, step=Fraction(2, 255)),
        "apgd": APGD(threat=threat, loss="ce", steps=5),
        "square": Square(threat=threat, queries=20),
    }
    with torch.no_grad():  # labels that the model gives: all images are attacked
        parts = (x[first : first + size].to(where) for first in range(0, count, size))
        y = torch.cat([model(part).argmax(1).cpu() for part in parts])
    before = (
        torch.cuda.memory_allocated(where)
        if where.type == "cuda"
        else psutil.Process().memory_info().rss
    )
    meter = MemoryMeter(where)
    clean = clean_verdicts(run, model, x, y)
    for attack in attacks.values():
        for index in plan_batches(clean, images_at_a_time(attack, x[:1].to(where))):
            run_batch(attack, model, x, y, index, seed=0)
    print(int(clean.sum()), meter.peak(), before)


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--protocol", required=True)
    words.add_argument("--images", type=int, nargs="+", default=[500, 5000])
    words.add_argument("--data-dir", type=Path)
    words.add_argument("--device", default="cpu")
    words.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    args = words.parse_args()
    if args.alone:
        alone(args.protocol, args.images[0], args.data_dir, args.device)
        return
    peaks, above = [], []
    for count in args.images:
        command = [sys.executable, __file__, "--alone", "--protocol", args.protocol]
        command += ["--images", str(count), "--device", args.device]
        command += ["--data-dir", str(args.data_dir)] if args.data_dir else []
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        attacked, peak, before = map(int, done.stdout.split())
        peaks.append(peak)
        above.append(peak - before)
        print(
            f"{count} images, {attacked} attacked: {peak / 1e6:.0f} MB, {above[-1] / 1e6:.0f} MB above before"
        )
    print(f"ratio {peaks[-1] / peaks[0]:.3f}; above before {above[-1] / max(above[0], 1):.3f}")


if __name__ == "__main__":
    main()
