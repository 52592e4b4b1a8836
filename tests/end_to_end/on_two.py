"""Started twice by `torchrun`: what each process computes on its part, against the whole on its own."""

from fractions import Fraction

import torch
from accelerate import Accelerator
from torch import nn

from guardbench.batch_norm import synchronised
from guardbench.models import build_model
from guardbench.processes import Processes
from guardbench.regularisers.base import Batch, build_regulariser
from guardbench.threat import ThreatModel

REGULARISERS = (
    {"kind": "none"},
    {"kind": "curvature", "weight": 0.7, "h": "4/255"},
    {"kind": "curvature-double", "weight": 0.7, "h": "4/255"},
    {"kind": "gradient-norm", "weight": 0.1},
    {"kind": "pgd", "steps": 2},
    {"kind": "trades", "steps": 2},
    {"kind": "fbf"},
    {"kind": "pgd-released", "steps": 2},
)


def network() -> nn.Module:
    model = build_model("convnet-d3-bn-small", channels=3, classes=10, resolution=8, seed=1)
    return model.double().train()


def step(
    processes: Processes | None, words: dict[str, object], images: int
) -> dict[str, torch.Tensor]:
    """One squeeze step's loss, gradients and running statistics, of the batch or of a part of it."""
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(images, 3, 8, 8, generator=generator, dtype=torch.float64)
    y = torch.randint(10, (images,), generator=generator)
    model = network()
    regulariser = build_regulariser(words, ThreatModel(norm="linf", eps=Fraction(8, 255)))
    whole = Batch(model=model, images=x, labels=y, generator=torch.Generator().manual_seed(4))
    if processes is None:
        value = sum(regulariser.backward(whole))
    else:
        mine = processes.share(images)
        batch = Batch(
            model=model, images=x[mine], labels=y[mine], part=(images, mine),
            generator=torch.Generator().manual_seed(4), total=processes.total,
        )  # fmt: skip
        with synchronised(model, processes):
            value = processes.total(sum(regulariser.backward(batch)))
        processes.sum_gradients(model)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": value, **found, **dict(model.named_buffers())}


def main() -> None:
    accelerator = Accelerator(cpu=True)
    processes = Processes(accelerator)
    assert processes.count == 2
    for images in (8, 7):  # an even split and an uneven one
        for words in REGULARISERS:
            alone, shared = step(None, words, images), step(processes, words, images)
            for name, value in alone.items():
                off = float((value - shared[name]).abs().max() / (value.abs().max() + 1e-3))
                # pgd-released takes its logits in float32 whatever the network's precision.
                most = 1e-5 if words["kind"] == "pgd-released" else 1e-9
                assert off < most, (words["kind"], images, name, off)
    print("regularisers: the same on two")
    accelerator.end_training()


main()
