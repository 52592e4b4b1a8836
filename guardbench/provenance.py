"""Where numbers come from: versions, commit and hardware, for a record."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Collection, Iterable, Mapping

import torch

import guardbench
from guardbench.commit import commits_text
from guardbench.devices import device_name
from guardbench.records import ENGINE, Engine, Provenance
from guardbench.runtime import Run

ENGINE_VERSION = 6
"""Part of the key of what attacks find: raised when their verdicts, or their checkpoints, may change."""
PACKAGES = ("torch", "torchvision", "accelerate", "pyautoattack", "numpy", "pillow", "scikit-learn")


def provenance(
    run: Run,
    engines: Mapping[str, Engine],
    commits: Iterable[str | None],
    searched: Collection[str] = (),
    *,
    trained: bool = True,
) -> Provenance:
    """Versions and hardware of a run, and whose loops ran which attack, for its record.

    Args:
        commits: that made the stages.
        searched: the precisions that attacks of the dev tier searched in.
        trained: whether the run distilled and trained students, or attacked a finished classifier.
    """
    made_in = "fp16, images fp32" if run.precision == "fp16" else run.precision  # see Run.unscaled
    precision = {"distillation": made_in, "students": run.precision} if trained else {}
    precision["attacks"] = "fp32"
    if searched:
        precision["search"] = " and ".join(sorted(searched))
    return Provenance(
        guardbench=guardbench.__version__,
        commit=commits_text(commits),
        versions={name: importlib.metadata.version(name) for name in PACKAGES}
        | {ENGINE: str(ENGINE_VERSION)},
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        device=run.processes.times(device_name(run.device)),
        precision=precision,
        threads=torch.get_num_threads(),
        engines=dict(engines),
    )
