"""How long what is left of a plan will take on this device."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache

import torch

from guardbench.data.catalog import dataset_info
from guardbench.distillers.base import PlannedStage
from guardbench.models import build_model
from guardbench.protocol import Protocol
from guardbench.runtime import Run


def expected_seconds(run: Run, protocol: Protocol, stages: Sequence[PlannedStage]) -> float:
    """A forecast of what is left of `stages`, from a short probe of their networks on this device."""
    left = [stage for stage in stages if stage.folder.finished() is None]
    if not left:
        return 0.0

    def alone(stage: PlannedStage) -> float:
        arch = stage.arch or protocol.student.arch
        precision = "fp32" if stage.fp32 else run.precision
        return stage.passes / _images_per_second(
            run.device, precision, arch, protocol.dataset, protocol.resolution
        )

    count = run.processes.count
    return sum(alone(stage) / (count if stage.split else 1) for stage in left)


@cache  # a suite asks for each of its cells
def _images_per_second(
    device: torch.device, precision: str, arch: str, dataset: str, resolution: int
) -> float:
    """Forward+backward rate of a network on the images of a dataset."""
    info = dataset_info(dataset)
    model = build_model(
        arch, channels=info.channels, classes=info.num_classes, resolution=resolution, seed=0
    ).to(device)
    count = 64 if resolution <= 64 else 16
    shape = (count, info.channels, resolution, resolution)
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device)
    rate = 0.0
    for _ in range(3):  # the first pass pays for initialisation
        begun = time.perf_counter()
        narrow = torch.float16 if precision == "fp16" else torch.bfloat16
        with torch.autocast(device.type, narrow, enabled=precision != "fp32"):
            loss = model(images).float().logsumexp(1).mean()
        loss.backward()
        loss.item()
        rate = max(rate, count / (time.perf_counter() - begun))
    if device.type == "cuda":
        del model, images, loss  # a suite keeps this process, and its cells want the memory
        torch.cuda.empty_cache()
    return rate
