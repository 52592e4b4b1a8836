"""Trains a network adversarially on a protocol's training images, for the other benchmarks.

    python benchmarks/adversarial.py --protocol digits --arch convnet-d3-bn-small --output at.safetensors

Madry et al., ICLR 2018 (arXiv:1706.06083): SGD on the images that ten steps of PGD inside --eps find.
"""

import argparse
from fractions import Fraction
from pathlib import Path

import torch
from torch.nn import functional as F

from guardbench.ball import project, random_start
from guardbench.data.catalog import dataset_info
from guardbench.data.dataset import load_split
from guardbench.models import build_model, save_weights
from guardbench.progress import Progress
from guardbench.protocol import load_protocol
from guardbench.threat import ThreatModel

STEPS = 10


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--protocol", required=True)
    words.add_argument("--arch", required=True)
    words.add_argument("--output", type=Path, required=True)
    words.add_argument("--eps", type=Fraction, help="instead of the protocol's")
    words.add_argument("--epochs", type=int, default=20)
    words.add_argument("--batch", type=int, default=64)
    words.add_argument("--lr", type=float, default=0.05)
    words.add_argument("--seed", type=int, default=0)
    words.add_argument("--data-dir", type=Path)
    args = words.parse_args()
    protocol = load_protocol(args.protocol)
    info = dataset_info(protocol.dataset)
    train = load_split(
        protocol.dataset, "train", resolution=protocol.resolution, data_dir=args.data_dir,
        cache_dir=None, progress=Progress(),
    )  # fmt: skip
    threat = protocol.threat.model
    if args.eps:
        threat = ThreatModel(threat.norm, args.eps)
    model = build_model(
        args.arch, channels=info.channels, classes=info.num_classes,
        resolution=protocol.resolution, seed=args.seed,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(args.seed)
    optimiser = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=5e-4)
    batches = len(train) // args.batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, args.lr, args.epochs * batches)
    for epoch in range(args.epochs):
        wrong, order = 0, torch.randperm(len(train), generator=generator)
        for rows in order[: batches * args.batch].split(args.batch):
            x, y = train.batch(rows), train.labels[rows]
            adv = random_start(x, threat, args.seed, epoch)
            model.eval()
            for _ in range(STEPS):
                adv.requires_grad_()
                (slope,) = torch.autograd.grad(F.cross_entropy(model(adv), y), adv)
                moved = adv.detach() + 2.5 * float(threat.eps) / STEPS * slope.sign()
                adv = project(moved, x, threat)
            model.train()
            logits = model(adv)
            optimiser.zero_grad()
            F.cross_entropy(logits, y).backward()
            optimiser.step()
            schedule.step()
            wrong += int((logits.argmax(1) != y).sum())
        share = 100 * wrong / (batches * args.batch)
        print(f"epoch {epoch + 1}: {100 - share:.1f}% of training images right under PGD-{STEPS}")
    save_weights(model.eval(), args.output)


if __name__ == "__main__":
    main()
