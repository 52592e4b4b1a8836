"""What distillation costs: each regulariser's step against the plain one, recover against a plain loop.

    python benchmarks/distilling.py --resolution 64 --batch 32

Everything in one run on one device: rounds alternate between the contestants, so that a neighbour's
load hits all of them, and a ratio is the median over rounds. The last column is the share of what
the bare network does: the images that are through a step in a second, over those that pass forward and
backward in a loop that does nothing else (with gradients of the weights in training, of the images in
recover). That recover's images come out as those of one IPC after another is for the tests to show.
With `--precision bf16` ours and the bare loops compute as a run does where that is faster; the one IPC
after another stays in float32, as the original has it, and so does the step that the last line compares.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from fractions import Fraction

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from guardbench.curvature import step_along
from guardbench.devices import device_name, official_arithmetic
from guardbench.distillers.base import Task
from guardbench.distillers.sre2l import Recover, _chunks, _groups, _Recovery
from guardbench.methods import load_method
from guardbench.models import Classifier, batch_norms, build_model, running_statistics_kept
from guardbench.progress import Progress
from guardbench.regularisers.base import Batch, build_regulariser
from guardbench.runtime import Run
from guardbench.threat import ThreatModel

THREAT = ThreatModel("linf", Fraction(1, 255))
KINDS: dict[str, dict[str, str | float | int]] = {
    "none": {"kind": "none"},
    "curvature, first order": {"kind": "curvature", "weight": 1.0, "h": "0.46/255"},
    "curvature, double backward": {"kind": "curvature-double", "weight": 1.0, "h": "0.46/255"},
    "gradient norm": {"kind": "gradient-norm", "weight": 0.1},
    "FBF": {"kind": "fbf"},
    "PGD-3": {"kind": "pgd", "steps": 3, "step": 0.5},
    "PGD-7": {"kind": "pgd"},
    "TRADES-10": {"kind": "trades"},
}


def naive_first_order(batch: Batch) -> None:
    """The first-order form as it reads: z by a backward of its own, then both losses anew."""
    images = batch.images.detach().requires_grad_()
    (slope,) = torch.autograd.grad(batch.loss(images), images)
    with running_statistics_kept(batch.model):
        moved = batch.loss(batch.images + step_along(slope, 0.46 / 255))
    loss = batch.loss(batch.images)
    (loss + (moved - loss).abs()).backward()


def measured(
    contestants: dict[str, Callable[[], None]], rounds: int, wait: Callable[[], None]
) -> dict[str, list[float]]:
    """Seconds of every contestant in every round, the first round left out."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, work in contestants.items():
            wait()
            begun = time.perf_counter()
            work()
            wait()
            seconds[name].append(time.perf_counter() - begun)
    return {name: found[1:] for name, found in seconds.items()}


def median_ratio(above: list[float], below: list[float]) -> float:
    """Of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def made_run(args: argparse.Namespace, device: torch.device) -> Run:
    precision = "no" if args.precision == "fp32" else args.precision
    return Run(
        accelerator=Accelerator(cpu=device.type == "cpu", mixed_precision=precision),
        workspace=None,
        seed=0,
        progress=Progress(),
    )


def regularisers(args: argparse.Namespace, run: Run, wait: Callable[[], None]) -> None:
    device = run.device
    model = build_model(args.arch, channels=3, classes=10, resolution=args.resolution, seed=0).to(
        device
    )
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.001, momentum=0.9)
    images = torch.rand(args.batch, 3, args.resolution, args.resolution, device=device)
    labels = torch.arange(args.batch, device=device) % 10
    batch = Batch(model=model, images=images, labels=labels, autocast=run.autocast)

    def step_of(backward: Callable[[Batch], object]) -> Callable[[], None]:
        def steps() -> None:
            for _ in range(args.steps):
                optimizer.zero_grad(set_to_none=True)
                backward(batch)
                optimizer.step()

        return steps

    def bare() -> None:
        for _ in range(args.steps):
            with run.autocast():
                loss = F.cross_entropy(model(images), labels)
            loss.backward()

    contestants = {
        name: step_of(build_regulariser(words, THREAT).backward) for name, words in KINDS.items()
    }
    contestants["curvature, first order, naive"] = step_of(naive_first_order)
    if args.precision != "fp32":
        whole = Batch(model=model, images=images, labels=labels)
        plain = build_regulariser(KINDS["none"], THREAT)
        contestants["none, in float32"] = step_of(lambda _: plain.backward(whole))
    found = measured({"bare": bare, **contestants}, args.rounds, wait)
    rate = args.steps * args.batch / statistics.median(found["bare"])
    print(f"bare forward and backward: {rate:.0f} images/s")
    print(f"{'regulariser':<32}{'ratio to the plain step':>24}{'images/s':>10}{'share':>8}")
    for name in contestants:
        ratio = median_ratio(found[name], found["none"])
        own = args.steps * args.batch / statistics.median(found[name])
        print(f"{name:<32}{ratio:>24.2f}{own:>10.0f}{own / rate:>8.2f}")


def plain_recover(
    model: Classifier, params: Recover, images: Tensor, labels: Tensor, steps: int
) -> float:
    """One IPC at a time as SRe2L describes it: views, cross-entropy, BN terms by hooks, Adam, clamp."""
    from torchvision.transforms import v2

    terms: list[Tensor] = []

    def hook(layer: nn.BatchNorm2d, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        x = inputs[0]
        mean = x.mean((0, 2, 3))
        var = x.permute(1, 0, 2, 3).contiguous().view(x.shape[1], -1).var(1, unbiased=False)
        terms.append((layer.running_var - var).norm() + (layer.running_mean - mean).norm())

    handles = [layer.register_forward_hook(hook) for layer in batch_norms(model)]
    view = v2.Compose(
        [v2.RandomResizedCrop(images.shape[-1], params.crop_scale, antialias=True),
         v2.RandomHorizontalFlip()]
    )  # fmt: skip
    low, high = (0 - model.mean) / model.std, (1 - model.mean) / model.std
    images = images.clone().requires_grad_()
    optimizer = torch.optim.Adam([images], params.lr, betas=(0.5, 0.9))
    value = 0.0
    for _ in range(steps):
        terms.clear()
        shift = torch.randint(-params.jitter, params.jitter + 1, (2,)).tolist()
        seen = torch.roll(view(images), shift, (2, 3))
        optimizer.zero_grad()
        loss = F.cross_entropy(model.backbone(seen), labels)
        bn = sum(t * (params.first_bn if k == 0 else 1) for k, t in enumerate(terms))
        (loss + params.r_bn * bn).backward()
        optimizer.step()
        with torch.no_grad():
            images.copy_(torch.maximum(torch.minimum(images, high), low))
        value = float((loss + params.r_bn * bn).detach())
    for handle in handles:
        handle.remove()
    return value


def recover(args: argparse.Namespace, run: Run, wait: Callable[[], None]) -> None:
    device = run.device
    method = load_method("sre2l")
    recipe = method.recipe("imagenette", args.resolution)
    words = {**recipe.params["recover"], "iterations": args.steps}
    params = Recover.model_validate(words)
    model = build_model(args.arch, channels=3, classes=10, resolution=args.resolution, seed=0)
    model.train()
    for _ in range(20):  # statistics that are not the initial ones
        model(torch.rand(32, 3, args.resolution, args.resolution))
    model.to(device).eval().requires_grad_(False)
    task = Task(
        run=run, method=method, recipe=recipe, dataset="imagenette", resolution=args.resolution,
        channels=3, classes=tuple("0123456789"), train_images=0, train_digest=None, ipc=args.ipc,
        threat=THREAT,
    )  # fmt: skip
    losses: dict[str, float] = {}
    all_images = torch.rand(10 * args.ipc, 3, args.resolution, args.resolution, device=device)

    def bare() -> None:
        for _ in range(args.steps):
            images = all_images.requires_grad_()
            with run.autocast():
                logits = model(images)
            torch.autograd.grad(logits.float().sum(), images)

    def ours() -> None:
        for number, chunk in enumerate(
            _chunks(_groups(10, args.ipc, params), params.images_a_batch)
        ):
            work = _Recovery(task, model, params, chunk, number)
            for step in range(args.steps):
                losses["ours"] = work._step(step)

    def theirs() -> None:
        for _ in range(args.ipc):
            noise = torch.randn(10, 3, args.resolution, args.resolution, device=device)
            labels = torch.arange(10, device=device)
            losses["one IPC at a time"] = plain_recover(model, params, noise, labels, args.steps)

    found = measured({"bare": bare, "ours": ours, "theirs": theirs}, args.rounds, wait)
    count = 10 * args.ipc * args.steps
    rate = count / statistics.median(found["bare"])
    for name, seconds in found.items():
        own = count / statistics.median(seconds)
        print(f"recover, {name:<8}{own:>10.0f} image-steps/s{own / rate:>8.2f}")
    print(f"ratio {median_ratio(found['theirs'], found['ours']):.2f}; last losses {losses}")


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--arch", default="resnet18")
    words.add_argument("--resolution", type=int, default=64)
    words.add_argument("--batch", type=int, default=32)
    words.add_argument("--ipc", type=int, default=10)
    words.add_argument("--steps", type=int, default=5, help="steps a round")
    words.add_argument("--rounds", type=int, default=5)
    words.add_argument("--device", default="cpu")
    words.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    args = words.parse_args()
    device = torch.device(args.device)
    official_arithmetic()
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    print(
        f"torch {torch.__version__}, {device_name(device)}, {torch.get_num_threads()} threads, {args}"
    )
    run = made_run(args, device)
    regularisers(args, run, wait)
    recover(args, run, wait)


if __name__ == "__main__":
    main()
