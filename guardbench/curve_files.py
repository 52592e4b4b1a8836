"""Security curves on disk: what `guardbench curve` writes, checked on the way in."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from guardbench import canonical, json_files
from guardbench.fields import Line, Name, Sha256, Strict, only_const
from guardbench.migrations import Migration, migrate
from guardbench.store import read_text, write_text
from guardbench.threat import Norm

MOST = 200
"""How many radii a curve may have."""


class Point(Strict):
    """One radius.

    Attributes:
        eps: a fraction such as `1/255`; `0` for clean.
        correct: images still right, of the curve's total.
    """

    eps: str = Field(pattern=r"^\d{1,18}(/[1-9]\d{0,17})?$")
    correct: int = Field(ge=0)


class Curve(Strict):
    """Robust accuracy of one classifier under PGD at rising radii.

    Attributes:
        classifier: what its owner calls it.
        weights_sha256: of the file, None where there is none.
        protocol, protocol_sha256: whose images, in its order.
        norm: of the radii.
        steps: of PGD at each radius.
        total: images.
        points: by rising radius, clean first; never rising.
        flags: why the curve should not be believed as it stands (`curve.above_chance`).
    """

    schema_version: Literal[2] = Field(default=2, json_schema_extra=only_const)
    classifier: Name
    weights_sha256: Sha256 | None
    protocol: Name
    protocol_sha256: Sha256
    norm: Norm
    steps: int = Field(ge=1)
    total: int = Field(ge=1)
    points: tuple[Point, ...] = Field(min_length=2, max_length=MOST + 1)
    flags: tuple[Line, ...] = Field(default=(), max_length=8)
    guardbench: Line
    device: Line

    @model_validator(mode="after")
    def _falls(self) -> Curve:
        radii = [Fraction(point.eps) for point in self.points]
        counts = [point.correct for point in self.points]
        if radii[0] != 0 or radii != sorted(set(radii)):
            raise ValueError("points: radii must begin at 0 and rise")
        if counts != sorted(counts, reverse=True) or counts[0] > self.total:
            raise ValueError("points: what is broken at one radius is broken at every larger one")
        return self


def _to_2(words: dict[str, Any]) -> dict[str, Any]:
    """Version 2 holds flags; before it nobody looked."""
    return {**words, "flags": []}


# Version 1 to 2, and so on; see `migrations`.
_MIGRATIONS: tuple[Migration, ...] = (_to_2,)


def save_curve(path: Path, curve: Curve) -> None:
    """Writes a curve as canonical JSON."""
    write_text(path, canonical.dumps(curve.model_dump(mode="json")))


def load_curve(path: Path) -> Curve:
    """Reads and checks a curve of any version.

    Raises:
        GuardbenchError: it cannot be read, or a field is wrong.
    """
    return json_files.parse(
        read_text(path, what="curve", limit=1 << 20),
        lambda words: json_files.strictly(Curve, migrate(words, _MIGRATIONS)),
        where=str(path),
        what="curve of `guardbench curve`",
        remedy="Measure it again, or remove it.",
    )
