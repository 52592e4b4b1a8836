"""Training speed of ResNet-18: our small-map convolutions against PyTorch's own, in one run.

    python benchmarks/training.py --resolution 64 --batch 32 --precision bf16

Rounds alternate between the two, so that a neighbour's load hits both; the ratio is the median over
rounds. The update of the weights is part of a step, as it is in squeeze.
"""

import argparse
import platform
import statistics
import time

import torch
from torch.nn import functional as F

from guardbench import models


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--resolution", type=int, default=64)
    words.add_argument("--batch", type=int, default=32)
    words.add_argument("--steps", type=int, default=10, help="steps a round")
    words.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    words.add_argument("--rounds", type=int, default=7)
    words.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = words.parse_args()
    torch.set_num_threads(args.threads)
    x = torch.rand(args.batch, 3, args.resolution, args.resolution)
    y = torch.randint(0, 10, (args.batch,))
    net = models.build_model(
        "resnet18", channels=3, classes=10, resolution=args.resolution, seed=0
    ).train()
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)

    def speed(largest: int) -> float:
        models.SMALL_MAP = largest
        for step in range(args.steps + 2):
            if step == 2:
                begun = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
                logits = net(x)
            F.cross_entropy(logits.float(), y).backward()
            optimizer.step()
        return args.steps * args.batch / (time.perf_counter() - begun)

    fitted = models.SMALL_MAP
    pairs = [(speed(0), speed(fitted)) for _ in range(args.rounds)]
    plain, ours = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    print(f"torch {torch.__version__}, {platform.machine()}, {args.threads} threads, {args}")
    print(f"PyTorch's convolutions {plain:.0f} images/s, ours {ours:.0f}, ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
