"""Where numbers come from: versions, commit and hardware, for a record."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Collection, Mapping
from pathlib import Path

import torch

import guardbench
from guardbench.records import Engine, Provenance
from guardbench.runtime import Run, device_name

# What of a checkout shapes a number; boards and records, which `--publish` rewrites, do not.
CODE = ("guardbench", "pyproject.toml", "baselines/*/method.toml")
PACKAGES = ("torch", "torchvision", "accelerate", "pyautoattack", "numpy", "pillow", "scikit-learn")


def provenance(
    run: Run,
    engines: Mapping[str, Engine],
    searched: Collection[str] = (),
    *,
    trained: bool = True,
) -> Provenance:
    """Versions and hardware of a run, and whose loops ran which attack, for its record.

    Args:
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
        commit=_commit(),
        versions={name: importlib.metadata.version(name) for name in PACKAGES},
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        device=run.processes.times(device_name(run.device)),
        precision=precision,
        threads=torch.get_num_threads(),
        engines=dict(engines),
    )


def _commit() -> str | None:
    """The commit of the checkout that this package runs from, `-dirty` where its code differs."""
    root = Path(guardbench.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    found = []
    for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", *CODE]):
        command = ["git", "-C", str(root), *words]
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        found.append(run.stdout.strip())
    head, changed = found
    return f"{head}-dirty" if changed else head or None
