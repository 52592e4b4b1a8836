"""Options that several verbs have, each defined once."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from guardbench.errors import GuardbenchError

if TYPE_CHECKING:
    from rich.console import Console


class EngineName(str, Enum):
    """The two engines, for the option's choices."""

    guardbench = "guardbench"
    reference = "reference"


EngineOption = Annotated[
    EngineName,
    typer.Option(help="Whose AutoAttack and Square run; reference is pyautoattack, untouched."),
]


class TierName(str, Enum):
    """The two tiers, for the option's choices."""

    official = "official"
    dev = "dev"


TierOption = Annotated[
    TierName,
    typer.Option(
        help="dev is for work in progress: fewer images, an equal share a class, searched in bf16 where "
        "the device gains by it and verified in float32. Its record stands on no board."
    ),
]
DevImages = Annotated[
    int | None,
    typer.Option(
        "--images",
        help="Of --tier dev: how many test images, a multiple of the classes; by default at most 200.",
        min=1,
        show_default=False,
    ),
]
References = Annotated[
    bool,
    typer.Option(
        "--references/--no-references",
        help="Also train students on a random subset, with hard labels and without augmentation: what "
        "DD-Ranking's IOR, LRS and ARS need. Three to four times the students' time.",
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        help="A .safetensors file, or a .pt/.pth that holds a state dict; code in it is never run.",
        show_default=False,
    ),
]
Arch = Annotated[
    str | None,
    typer.Option(
        help="Of --weights: resnet18, resnet50, convnet-d3, ... (with the stem that fits the "
        "protocol's resolution), or torchvision:NAME for a stock network. Without --weights: "
        "robustbench:MODEL, with the weights of RobustBench's zoo.",
        show_default=False,
    ),
]
Python = Annotated[
    str | None,
    typer.Option(
        help="Instead of --weights: package.module:function, which gives a model that maps images "
        "in [0, 1] to logits.",
        show_default=False,
    ),
]
Normalisation = Annotated[
    str | None,
    typer.Option(
        help="Of --weights: imagenet, cifar10, cifar10-dc (of DC, DSA, DM and MTT), cifar100, svhn, mnist, "
        "fashion-mnist, half ([-1, 1]), bytes (0 to 255), none, or numbers such as 0.5,0.5,0.5/0.2,0.2,0.2. "
        "Students of guardbench hold their own.",
        show_default=False,
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Precision = Annotated[
    str,
    typer.Option(
        help="Of distillation and training: auto, fp32, bf16, or fp16 with a scaled loss, for GPUs without "
        "bf16. Attacks are fp32."
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        help="Where <dataset>/{train,val}/<class>/, or its parquet shards or tars, lie, or "
        "hf://datasets/OWNER/NAME; GUARDBENCH_DATA says the same.",
        show_default=False,
    ),
]
CacheDir = Annotated[
    Path | None,
    typer.Option(
        help="Where decoded images are kept; GUARDBENCH_CACHE says the same. "
        "By default ~/.cache/guardbench.",
        show_default=False,
    ),
]


def make_console() -> Console:
    """Where a command prints; silent in all processes of a run but the first, which speaks for them."""
    from rich.console import Console

    return Console(emoji=False, quiet=process_rank() != 0)


def process_rank() -> int:
    """This process's number among those that `accelerate launch` or `torchrun` has started, from 0."""
    # A RANK without others is left over from another command.
    rank = os.environ.get("RANK", "0")
    return int(rank) if several_processes() and rank.isdecimal() else 0


def require_alone(verb: str) -> None:
    """Refuses a verb that each of several processes would do from end to end, all writing the same files."""
    if several_processes():
        raise GuardbenchError(f"guardbench {verb} is one process: run it without a launcher.")


def several_processes() -> bool:
    """Whether a launcher has started this process as one of several."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1")
