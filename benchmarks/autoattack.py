"""AutoAttack standard: guardbench's engine against pyautoattack, same models, same images, one run.

    python benchmarks/adversarial.py --protocol digits --arch convnet-d3-bn-small --output at.safetensors
    python benchmarks/autoattack.py --weights sre2l.safetensors guard.safetensors at.safetensors \
        --arch convnet-d3-bn-small --protocol digits --images 300 --eps 1/255 8/255

Both engines run in processes of their own, which take turns of a few seconds (`turns.py`), so that a
neighbour's load or a slow minute hits both. Prints for each model and radius the robust accuracy of both,
the places of the images on which they differ, seconds, their ratio and peak memory, and at the end the
same over all, with a sign test. pyautoattack gets the one of the batch sizes --batch at which bare
loops of the model are fastest; it sees the model as it is, the engine its folded copy, as in `guardbench
evaluate`. The networks of this package hold their maps channels-last, which gives pyautoattack a faster pass
than torchvision's own: with `--peer contiguous` it gets the same weights in PyTorch's default order, as its
users have them (both may be named). With `--tier dev` the engine runs once more, as that tier searches on
this device.
`--torchattacks N` asks torchattacks' AutoAttack too, in batches of 25 as the paper has them, against the
engine on the first N images alone, since it takes long (it asks for an old `requests`: install it with
--no-deps).
"""

import argparse
import math
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from turns import TURN_S, in_turns

from guardbench.attacks.autoattack import AutoAttack, part_name
from guardbench.attacks.base import LOGIT_NOISE, frozen, run_batch, score_clean
from guardbench.attacks.reference import NORMS, FormerAutoAttack
from guardbench.attacks.searched import SLACK, search_model, searchable
from guardbench.attacks.stream import rows_at_once
from guardbench.data.catalog import dataset_info
from guardbench.data.dataset import load_split
from guardbench.devices import MemoryMeter, bf16_gains, device_name, make_accelerator
from guardbench.imported import from_file
from guardbench.models import Classifier
from guardbench.progress import Progress, clock
from guardbench.protocol import load_protocol
from guardbench.scoring import images_at_a_time
from guardbench.threat import ThreatModel

PEERS = {"channels-last": "pyautoattack", "contiguous": "pyautoattack, contiguous"}
OURS = "guardbench"
DEV = "dev tier"
TORCHATTACKS = "torchattacks"
PAPERS_BATCH = 25
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class Measured:
    """What the engines found on the same images: verdicts by engine, seconds and bytes at the peak."""

    robust: dict[str, Tensor]
    seconds: dict[str, float]
    memory: dict[str, int]

    def lines(self) -> list[str]:
        """The table of one model at one radius, or of all."""
        reference, *others = self.robust
        found = [
            f"  {name:<25}{100 * self.robust[name].float().mean():6.2f}% robust"
            f"{clock(self.seconds[name]):>14}  {self.memory[name] / 1e9:.2f} GB"
            for name in self.robust
        ]
        for name in others:
            theirs, own = self.robust[reference], self.robust[name]
            higher, lower = int((own & ~theirs).sum()), int((theirs & ~own).sum())
            ratio = self.seconds[name] / max(self.seconds[reference], 1e-9)
            places = (own ^ theirs).nonzero().squeeze(1).tolist()
            found.append(
                f"  differing: {higher} robust to {name}'s alone, {lower} to {reference}'s alone, "
                f"sign test p = {sign_test(higher, lower):.3f}; seconds {ratio:.2f} of {reference}'s"
            )
            if places:
                found.append(f"  images that differ: {', '.join(map(str, places))}")
        return found


@dataclass(frozen=True)
class Question:
    """One model at one radius, on the first images of a protocol."""

    weights: Path
    arch: str
    normalisation: str | None
    protocol: str
    images: int
    eps: Fraction
    data_dir: Path | None
    cache_dir: Path | None

    def load(self) -> tuple[nn.Module, Tensor, Tensor, ThreatModel]:
        """The model on its device, images and labels on the CPU, and the threat."""
        protocol = load_protocol(self.protocol)
        make_accelerator(
            DEVICE.type, "fp32", protocol.resolution
        )  # sets torch as official runs have it
        info = dataset_info(protocol.dataset)
        test = load_split(
            protocol.dataset, "val", resolution=protocol.resolution, data_dir=self.data_dir,
            cache_dir=self.cache_dir, progress=Progress(),
        )  # fmt: skip
        order = protocol.test_indices(test.ids)[: self.images]
        model = from_file(
            self.weights, self.arch, channels=info.channels, classes=info.num_classes,
            resolution=protocol.resolution, normalisation=self.normalisation, name="model",
        ).model.to(DEVICE)  # fmt: skip
        threat = ThreatModel(protocol.threat.norm, self.eps)
        return model, test.batch(order), test.labels[order], threat


def contestant(engine: str, question: Question, batch: int) -> Callable[[], tuple[list[bool], int]]:
    """What an engine does when it is its turn: who survives, bool [N], and the peak of memory.

    Images that the model gets wrong count as not robust, and are not attacked.
    """
    model, x, y, threat = question.load()
    right = score_clean(model, x, y).nonzero().squeeze(1)
    if engine in PEERS.values():
        peer = peers_model(engine, model)
        return lambda: by_pyautoattack(peer, x, y, right, threat, batch)
    if engine == TORCHATTACKS:
        return lambda: by_torchattacks(model, x, y, right, threat)
    attack = AutoAttack(threat=threat)
    fast, slack = searchable(model, x[:8].to(DEVICE)), LOGIT_NOISE
    if engine == DEV:
        half = bf16_gains(DEVICE.type, x.shape[-1])
        fast, precision = search_model(model, x[:8].to(DEVICE), "bf16" if half else "fp32")
        slack = SLACK if precision == "bf16" else LOGIT_NOISE

    def run() -> tuple[list[bool], int]:
        meter, robust = MemoryMeter(DEVICE), torch.zeros(len(x), dtype=torch.bool)
        whole = images_at_a_time(attack, x[:1].to(DEVICE))
        for index in torch.split(right, whole):
            found = run_batch(attack, model, x, y, index, seed=0, searched=fast, slack=slack)
            robust[index] = ~found.broken
        return robust.tolist(), meter.peak()

    return run


class Contiguous(nn.Module):
    """A network of this package, as an equal one of torchvision's would run: maps in NCHW order."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = deepcopy(model).to(memory_format=torch.contiguous_format)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.model.backbone((x - self.model.mean) / self.model.std)
        return answer


def peers_model(engine: str, model: nn.Module) -> nn.Module:
    """What pyautoattack attacks: the network as it is, or in PyTorch's default memory format."""
    if engine == PEERS["channels-last"]:
        return model
    assert isinstance(model, Classifier), "no other network is channels-last of itself"
    return Contiguous(model).eval()


def by_pyautoattack(
    model: nn.Module, x: Tensor, y: Tensor, right: Tensor, threat: ThreatModel, batch: int
) -> tuple[list[bool], int]:
    """Its own evaluation of all images at once: between attacks it fills its batches with survivors."""
    meter, robust = MemoryMeter(DEVICE), torch.zeros(len(x), dtype=torch.bool)
    images, labels = x[right].to(DEVICE), y[right].to(DEVICE)
    with frozen(model):
        engine = FormerAutoAttack(
            model, norm=NORMS[threat.norm], eps=float(threat.eps), version="standard", device=DEVICE
        )
        engine.engine.verbose = False
        found = engine.run_standard_evaluation(images, labels, bs=batch)
        for part in torch.arange(len(found)).split(batch):
            robust[right[part]] = (model(found[part]).argmax(1) == labels[part]).cpu()
    return robust.tolist(), meter.peak()


def by_torchattacks(
    model: nn.Module, x: Tensor, y: Tensor, right: Tensor, threat: ThreatModel
) -> tuple[list[bool], int]:
    """torchattacks' AutoAttack, batch by batch, as the paper used it."""
    import torchattacks  # type: ignore[import-not-found,import-untyped,unused-ignore]

    meter, robust = MemoryMeter(DEVICE), torch.zeros(len(x), dtype=torch.bool)
    with frozen(model):
        classes = model(x[:1].to(DEVICE)).shape[1]
        attack = torchattacks.AutoAttack(
            model, norm={"linf": "Linf", "l2": "L2"}[threat.norm], eps=float(threat.eps),
            version="standard", n_classes=classes, seed=0,
        )  # fmt: skip
        for index in torch.split(right, PAPERS_BATCH):
            images, labels = x[index].to(DEVICE), y[index].to(DEVICE)
            found = attack(images, labels)
            robust[index] = (model(found).argmax(1) == labels).cpu()
    return robust.tolist(), meter.peak()


def measure(question: Question, names: list[str], batches: list[int]) -> Measured:
    """Runs the engines in turns; ratios are to the first."""
    model, x, *_ = question.load()
    asked = {
        name: fastest(name, peers_model(name, model), x.to(DEVICE), batches)
        for name in names
        if name in PEERS.values()
    }
    found = in_turns(contestant, {name: (name, question, asked.get(name, 0)) for name in names})
    return Measured(
        {name: torch.tensor(robust) for name, ((robust, _), _) in found.items()},
        {name: seconds for name, (_, seconds) in found.items()},
        {name: peak for name, ((_, peak), _) in found.items()},
    )


class Counted(nn.Module):
    """Counts the images that a network is asked about, with and without gradient."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.forward_only, self.with_gradient = 0, 0

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            self.with_gradient += len(x)
        else:
            self.forward_only += len(x)
        return self.net(x)


def now(x: Tensor) -> float:
    """Seconds, when everything that was asked of `x`'s device is done."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()


def fastest(name: str, model: nn.Module, x: Tensor, batches: list[int]) -> int:
    """The batch size at which a forward and a gradient pass over an image take the least time."""
    if len(batches) == 1:
        return batches[0]
    seconds = {}
    for size in batches:
        forward, gradient = bare_rates(model, x, size=size)
        seconds[size] = 1 / forward + 1 / gradient
    best = min(seconds, key=lambda size: seconds[size])
    told = ", ".join(f"{1e3 * seconds[size]:.2f} ms at {size}" for size in batches)
    print(f"  {name}: batch {best} (an image's forward and gradient pass: {told})", flush=True)
    return best


def bare_rates(
    net: nn.Module, x: Tensor, seconds: float = 3.0, size: int | None = None
) -> tuple[float, float]:
    """Images a second of `net` in bare loops: forward, and with gradient.

    Args:
        size: of the batches, the engine's unless told.
    """
    size = size or rows_at_once(x)
    batch = x[torch.arange(size) % len(x)]

    def forward() -> None:
        with torch.no_grad():
            net(batch)

    def gradient() -> None:
        point = batch.clone().requires_grad_()
        torch.autograd.grad(net(point).sum(), point)

    rates = []
    for run in (forward, gradient):
        run()
        count, begun = 0, now(batch)
        while now(batch) - begun < seconds:
            run()
            count += size
        rates.append(count / (now(batch) - begun))
    return rates[0], rates[1]


def compiled_rates(net: nn.Module, x: Tensor) -> str:
    """What `torch.compile` would gain on the same loops, and what it costs before the first answer."""
    begun = now(x)
    compiled = torch.compile(net)
    try:
        point = x[torch.arange(rows_at_once(x)) % len(x)].clone().requires_grad_()
        torch.autograd.grad(compiled(point).sum(), point)
        with torch.no_grad():
            compiled(point)
        spent = now(x) - begun
        forward, gradient = bare_rates(compiled, x)
    # Broad on purpose: a compiler may be missing or fail in its own ways, and the table goes on.
    except Exception as error:  # noqa: BLE001
        return f"  torch.compile: none here ({type(error).__name__})"
    return (
        f"  torch.compile: {forward:.0f} forward, {gradient:.0f} gradient images a second, "
        f"after {spent:.0f} s"
    )


def floating_point_rate(x: Tensor, side: int = 4096, seconds: float = 2.0) -> float:
    """Operations a second of float32 products of square matrices: what the device gives at best."""
    one, other = torch.randn(2, side, side, device=x.device)
    one @ other
    count, begun = 0, now(x)
    while now(x) - begun < seconds:
        one @ other
        count += 1
    return 2 * side**3 * count / (now(x) - begun)


def operations(net: nn.Module, x: Tensor) -> tuple[int, int]:
    """Floating-point operations for an image of `net`: of a forward pass, and of one with gradient."""
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        net(x[:1])
    point = x[:1].clone().requires_grad_()
    with FlopCounterMode(display=False) as gradient:
        torch.autograd.grad(net(point * 1).sum(), point)  # its hooks refuse a leaf
    return forward.get_total_flops(), gradient.get_total_flops()


def shares(
    model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, *, compiling: bool
) -> list[str]:
    """Where the engine's time goes: by part, and over the bare loops of the same folded network."""
    device = next(model.parameters()).device
    x, y = x.to(device), y.to(device)
    fast = Counted(searchable(model, x[:8])).eval()
    forward, gradient = bare_rates(fast.net, x)
    alive = score_clean(model, x, y).nonzero().squeeze(1).to(device)
    rows = []
    for part in AutoAttack(threat=threat).parts():
        fast.forward_only = fast.with_gradient = 0
        begun = now(x)
        found = part.perturb(fast, x[alive], y[alive], seed=0)
        spent = now(x) - begun
        bare = fast.forward_only / forward + fast.with_gradient / gradient
        rows.append(
            (part_name(part), len(alive), fast.forward_only, fast.with_gradient, spent, bare)
        )
        with torch.no_grad():
            alive = alive[model(found).argmax(1) == y[alive]]
    whole, bare = sum(row[4] for row in rows), sum(row[5] for row in rows)
    peak, (passed, pulled_back) = floating_point_rate(x), operations(fast.net, x)
    done = sum(row[2] * passed + row[3] * pulled_back for row in rows)
    return [
        f"  bare loops: {forward:.0f} forward, {gradient:.0f} gradient images a second, "
        f"{100 * forward * passed / peak:.0f}% and {100 * gradient * pulled_back / peak:.0f}% of the "
        f"{peak / 1e12:.2f} TFLOP/s of float32 products of matrices; the attacks "
        f"{100 * done / whole / peak:.0f}%",
        *([compiled_rates(fast.net, x)] if compiling else []),
        *(
            f"  {name:<18}{100 * spent / whole:5.1f}%  {count} images, {asked} forward, {pulled} gradients, "
            f"{clock(spent)}, bare {clock(alone)}"
            for name, count, asked, pulled, spent, alone in rows
        ),
        f"  overhead over the bare loops: {100 * (whole / bare - 1):.1f}%",
    ]


def together(parts: list[Measured]) -> Measured:
    """Everything as one."""
    names = [*parts[0].robust]
    return Measured(
        {name: torch.cat([part.robust[name] for part in parts]) for name in names},
        {name: sum(part.seconds[name] for part in parts) for name in names},
        {name: max(part.memory[name] for part in parts) for name in names},
    )


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--weights", type=Path, nargs="+", required=True)
    words.add_argument("--arch", required=True)
    words.add_argument("--normalisation")
    words.add_argument("--protocol", required=True)
    words.add_argument("--images", type=int, default=200)
    words.add_argument(
        "--batch",
        type=int,
        nargs="+",
        default=[32, 64, 128, 256, 512],
        help="images that pyautoattack gets at once; of several the best is found",
    )
    words.add_argument(
        "--peer",
        choices=PEERS,
        nargs="+",
        default=["channels-last"],
        help="memory format of the network that pyautoattack gets; ratios are to the first",
    )
    words.add_argument("--tier", choices=("official", "dev"), default="official")
    words.add_argument("--torchattacks", type=int, metavar="N", help="against it too, on N images")
    words.add_argument("--eps", type=Fraction, nargs="+", help="instead of the protocol's")
    words.add_argument(
        "--shares", action="store_true", help="also say where the engine's time goes"
    )
    words.add_argument(
        "--compile", action="store_true", help="with --shares: what torch.compile would gain"
    )
    words.add_argument("--data-dir", type=Path)
    words.add_argument("--cache-dir", type=Path)
    args = words.parse_args()
    protocol = load_protocol(args.protocol)
    print(
        f"{args.arch}, {args.images} images of {protocol.id}; {device_name(DEVICE)}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}; turns of {TURN_S:g} s"
    )
    parts = []
    for weights in args.weights:
        for eps in args.eps or [protocol.threat.model.eps]:
            question = Question(
                weights, args.arch, args.normalisation, args.protocol, args.images, eps,
                args.data_dir, args.cache_dir,
            )  # fmt: skip
            names = [*(PEERS[peer] for peer in args.peer), OURS]
            names += [DEV] if args.tier == "dev" else []
            parts.append(measure(question, names, args.batch))
            print(
                f"{weights.stem}, {protocol.threat.norm} {eps}",
                *parts[-1].lines(),
                sep="\n",
                flush=True,
            )
            if args.torchattacks:
                few = replace(question, images=args.torchattacks)
                found = measure(few, [TORCHATTACKS, OURS], [])
                print(f"  on {few.images} of them", *found.lines(), sep="\n", flush=True)
            if args.shares:
                print(*shares(*question.load(), compiling=args.compile), sep="\n", flush=True)
    if len(parts) > 1:
        whole = together(parts)
        print(f"all, {len(whole.robust[OURS])} verdicts", *whole.lines(), sep="\n")


def sign_test(higher: int, lower: int) -> float:
    """Two-sided exact p of so uneven a split under a fair coin."""
    total, most = higher + lower, max(higher, lower)
    tail = sum(math.comb(total, k) for k in range(most, total + 1)) / 2**total
    return min(1.0, 2 * tail)


if __name__ == "__main__":
    main()
