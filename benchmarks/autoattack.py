"""AutoAttack standard: guardbench's engine against pyautoattack, same model, same images, one run.

    python benchmarks/autoattack.py --weights student.safetensors --arch resnet18 \
        --protocol imagenette-64 --images 200 --eps 1/255

Images go to both engines in the same slices, turn and turn about, so that a neighbour's load hits both.
Prints robust accuracy of both, the images on which they differ with a sign test, seconds, their
ratio, and peak memory. pyautoattack gets its best batch size with --batch; it sees the model as it
is, the engine its folded copy, as in `guardbench evaluate`.
"""

import argparse
import math
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import torch

from guardbench.attacks.autoattack import AutoAttack
from guardbench.attacks.base import run_batch, score_clean
from guardbench.data.catalog import dataset_info
from guardbench.data.dataset import load_split
from guardbench.imported import from_file
from guardbench.progress import Progress, clock
from guardbench.protocol import load_protocol
from guardbench.runtime import MemoryMeter, device_name
from guardbench.scoring import searchable


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--weights", type=Path, required=True)
    words.add_argument("--arch", required=True)
    words.add_argument("--normalisation")
    words.add_argument("--protocol", required=True)
    words.add_argument("--images", type=int, default=200)
    words.add_argument("--slice", type=int, default=100, help="images an engine gets at a turn")
    words.add_argument("--batch", type=int, help="pyautoattack's; the whole slice unless told")
    words.add_argument("--eps", type=Fraction, help="instead of the protocol's")
    words.add_argument("--data-dir", type=Path)
    words.add_argument("--cache-dir", type=Path)
    args = words.parse_args()
    protocol, progress = load_protocol(args.protocol), Progress()
    info = dataset_info(protocol.dataset)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = from_file(
        args.weights, args.arch, channels=info.channels, classes=info.num_classes,
        resolution=protocol.resolution, normalisation=args.normalisation, name="model",
    ).model.to(device)  # fmt: skip
    test = load_split(
        protocol.dataset, "val", resolution=protocol.resolution, data_dir=args.data_dir,
        cache_dir=args.cache_dir, progress=progress,
    )  # fmt: skip
    order = protocol.test_indices(test.ids)[: args.images]
    x, y = test.batch(order), test.labels[order]
    threat = protocol.threat.model
    if args.eps:
        threat = replace(threat, eps=args.eps)
    clean = score_clean(model, x, y)
    right = clean.nonzero().squeeze(1)
    fast = searchable(model, x[:8].to(device))
    size = args.batch or args.slice

    def reference(index: torch.Tensor) -> torch.Tensor:
        attack = AutoAttack(threat=threat, engine="reference")
        parts = [run_batch(attack, model, x, y, part, seed=0) for part in torch.split(index, size)]
        return torch.cat([part.broken for part in parts])

    def ours(index: torch.Tensor) -> torch.Tensor:
        return run_batch(
            AutoAttack(threat=threat), model, x, y, index, seed=0, searched=fast
        ).broken

    engines = {"pyautoattack": reference, "guardbench": ours}
    seconds, memory = dict.fromkeys(engines, 0.0), dict.fromkeys(engines, 0)
    robust = {name: torch.zeros(len(x), dtype=torch.bool) for name in engines}
    slices = torch.split(right, args.slice)
    with progress.stage("slices", 2 * len(slices), "turns") as bar:
        for number, index in enumerate(slices):
            turn = list(engines) if number % 2 == 0 else list(engines)[::-1]
            for name in turn:
                meter, begun = MemoryMeter(device), time.perf_counter()
                robust[name][index] = ~engines[name](index)
                seconds[name] += time.perf_counter() - begun
                memory[name] = max(memory[name], meter.peak())
                bar.advance(1)
    print(
        f"{args.weights.name}, {args.arch}, {len(x)} images of {protocol.id}, {threat}, "
        f"{100 * clean.float().mean():.1f}% clean; {device_name(device)}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    for name in engines:
        print(
            f"{name:<13} {100 * robust[name].float().mean():5.1f}% robust  "
            f"{clock(seconds[name]):>14}  {memory[name] / 1e9:.2f} GB"
        )
    theirs, own = robust.values()
    higher, lower = int((own & ~theirs).sum()), int((theirs & ~own).sum())
    print(
        f"differing images: {higher} robust to guardbench's alone, {lower} to pyautoattack's alone; "
        f"sign test p = {sign_test(higher, lower):.3f}"
    )
    print(
        f"seconds, guardbench / pyautoattack: {seconds['guardbench'] / seconds['pyautoattack']:.2f}"
    )


def sign_test(higher: int, lower: int) -> float:
    """Two-sided exact p of so uneven a split under a fair coin."""
    total, most = higher + lower, max(higher, lower)
    tail = sum(math.comb(total, k) for k in range(most, total + 1)) / 2**total
    return min(1.0, 2 * tail)


if __name__ == "__main__":
    main()
