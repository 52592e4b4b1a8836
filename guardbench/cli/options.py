"""Options that several verbs have, each defined once."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class EngineName(str, Enum):
    """The two engines, for the option's choices."""

    guardbench = "guardbench"
    reference = "reference"


EngineOption = Annotated[
    EngineName,
    typer.Option(help="Whose AutoAttack and Square run; reference is pyautoattack, untouched."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
DataDir = Annotated[
    Path | None,
    typer.Option(
        help="Where <dataset>/{train,val}/<class>/ lies; GUARDBENCH_DATA says the same.",
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
