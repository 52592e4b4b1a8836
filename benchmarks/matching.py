"""Gradient matching: all classes' gradients at once against one class after another, in one run.

    python benchmarks/matching.py --arch convnet-d3 --resolution 32 --ipc 1 --real-batch 32

Synthetic: per-class gradients with their own graph, distance, and backward to the images. Real: per-class
gradients alone, as a torch.func batch and as the loop that a regulariser needs. Rounds alternate, and on a
CPU the processor's own seconds are counted (one thread unless told), so that a neighbour's load hits all
alike; numbers are medians over rounds. The bare rate is a forward and backward
of the same network on as many images, in pieces that suit the machine, as the distillers send them; the
share of a way is the passes it must do (a synthetic image costs three, a real one one) at the bare rate,
over the time that it took. The last line is what the pieces gain on one class's real batch.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from guardbench.devices import device_name, official_arithmetic
from guardbench.distillers import matching
from guardbench.distillers.synthetic import InPieces
from guardbench.models import build_model


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--arch", default="convnet-d3")
    words.add_argument("--resolution", type=int, default=32)
    words.add_argument("--channels", type=int, default=3)
    words.add_argument("--classes", type=int, default=10)
    words.add_argument("--ipc", type=int, nargs="+", default=[1, 10])
    words.add_argument("--real-batch", type=int, default=256, help="0: leave the real side out")
    words.add_argument("--rounds", type=int, default=5)
    words.add_argument("--device", default="cpu")
    words.add_argument("--threads", type=int, default=1)
    args = words.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    official_arithmetic()
    model = build_model(
        args.arch, channels=args.channels, classes=args.classes, resolution=args.resolution, seed=0
    )
    net = InPieces(model.to(device).train().backbone)
    print(f"torch {torch.__version__}, {device_name(device)}, {args.threads} threads, {args}")

    def batch(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        images = torch.randn(args.classes, n, args.channels, args.resolution, args.resolution)
        labels = torch.arange(args.classes)[:, None].expand(-1, n)
        return images.to(device), labels.to(device)

    ways = {"at once": matching.gradients_at_once, "one by one": matching.gradients_one_by_one}
    wanted = [torch.randn(args.classes, *w.shape, device=device)
              for w in matching.matched_weights(net).values()]  # fmt: skip
    for ipc in args.ipc:
        images, labels = batch(ipc)

        def synthetic(way: str, images=images, labels=labels) -> None:
            leaf = images.clone().requires_grad_()
            found = ways[way](net, leaf, labels)
            torch.autograd.grad(matching.gradient_distance(found, wanted), leaf)

        show(f"synthetic, IPC {ipc}", ways, synthetic, net, images, labels, args.rounds, 3)
    if args.real_batch:
        images, labels = batch(args.real_batch)

        def real(way: str) -> None:
            if way == "at once":
                with torch.no_grad():  # no graph of the gradients themselves
                    matching.gradients_at_once(net, images, labels)
                return
            weights = list(matching.matched_weights(net).values())
            for x, y in zip(images, labels, strict=True):
                torch.autograd.grad(F.cross_entropy(net(x), y), weights)

        show(f"real, {args.real_batch} a class", ways, real, net, images, labels, args.rounds, 1)

        def one_class(network: torch.nn.Module) -> None:
            network.zero_grad(set_to_none=True)
            F.cross_entropy(network(images[0]), labels[0]).backward()

        pairs = [
            [timed(lambda network=network: one_class(network), device)
             for network in (net.network, net)]
            for _ in range(args.rounds + 1)
        ]  # fmt: skip
        whole, pieces = (statistics.median(side) for side in zip(*pairs[1:], strict=True))
        gain = statistics.median(a / b for a, b in pairs[1:])
        print(f"{args.real_batch} real images: whole {args.real_batch / whole:.0f} images/s, "
              f"in pieces {args.real_batch / pieces:.0f}, {gain:.2f} times as fast")  # fmt: skip


def show(
    what: str,
    ways: dict[str, object],
    step: Callable[[str], None],
    net: torch.nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    rounds: int,
    passes: int,
) -> None:
    """Prints the line of one side: milliseconds of both ways, their ratio, and the shares."""
    together, flat = images.flatten(0, 1), labels.flatten()

    def bare() -> None:
        net.zero_grad(set_to_none=True)
        F.cross_entropy(net(together), flat).backward()

    seconds: dict[str, list[float]] = {"bare": [], **{way: [] for way in ways}}
    for _ in range(rounds + 1):
        seconds["bare"].append(timed(bare, images.device))
        for way in ways:
            seconds[way].append(timed(lambda way=way: step(way), images.device))
    taken = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    ratio = statistics.median(
        b / a for a, b in zip(*(seconds[way][1:] for way in ways), strict=True)
    )
    parts = [
        f"{way} {1000 * taken[way]:.1f} ms ({100 * passes * taken['bare'] / taken[way]:.0f}% of bare)"
        for way in ways
    ]
    chosen = images.is_cuda or images[0, :, 0].numel() <= matching.SMALL_CLASS
    print(f"{what}: {', '.join(parts)}, at once {ratio:.2f} times as fast; "
          f"class_gradients takes {'at once' if chosen else 'one by one'}")  # fmt: skip


def timed(step: Callable[[], None], device: torch.device) -> float:
    """Seconds of a step: of the clock on a GPU, of the processor on a CPU."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    begun = clock()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - begun


if __name__ == "__main__":
    main()
