"""Methods: which distiller, which regulariser, which hyperparameters for which dataset.

A method is a folder `baselines/<method>/` with a `method.toml`. The files travel in the wheel, and
`method_folder` finds them, installed or not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator

import guardbench
from guardbench.errors import GuardbenchError
from guardbench.protocol import first_problem, read_toml, unknown
from guardbench.records import Name, Strict


def _no_regulariser() -> dict[str, str | float | int]:
    return {"kind": "none"}


class Recipe(Strict):
    """The hyperparameters of a method on one dataset at one resolution.

    Attributes:
        source: where they come from: the paper's section, or what was measured.
        regulariser: `kind` and its parameters, see `guardbench.curvature`.
        params: a table a stage, read by the distiller.
    """

    source: str = Field(max_length=400)
    regulariser: dict[str, str | float | int] = Field(default_factory=_no_regulariser)
    params: dict[str, dict[str, Any]]

    @field_validator("regulariser")
    @classmethod
    def _named(cls, words: dict[str, str | float | int]) -> dict[str, str | float | int]:
        if "kind" not in words:
            raise ValueError("kind: which regulariser is it?")
        return words


class MethodFile(Strict):
    """A `method.toml`."""

    name: Name
    title: str = Field(max_length=80)
    paper: str = Field(max_length=400)
    distiller: Name
    recipes: dict[str, Recipe]  # "<dataset>@<resolution>"

    def recipe(self, dataset: str, resolution: int) -> Recipe:
        """The recipe for a dataset at a resolution, or a GuardbenchError that lists those that exist."""
        key = f"{dataset}@{resolution}"
        if key not in self.recipes:
            raise GuardbenchError(
                f"method {self.name} has no recipe for {key}; it has {', '.join(sorted(self.recipes))}. "
                f"Add [recipes.{key!r}] to its method.toml."
            )
        return self.recipes[key]


def methods_folder() -> Path:
    """The folder of the baselines: the checkout's, else the copy inside the installed package."""
    package = Path(guardbench.__file__).parent
    checkout = package.parent / "baselines"
    return checkout if (package.parent / "pyproject.toml").is_file() else package / "_baselines"


def method_names() -> list[str]:
    """Names of all methods, sorted."""
    return sorted(path.parent.name for path in methods_folder().glob("*/method.toml"))


def load_method(name: str) -> MethodFile:
    """The method of that name.

    Raises:
        GuardbenchError: there is none (with the nearest name), or a field of its file is wrong.
    """
    if name not in method_names():
        raise unknown("method", name, method_names())
    path = methods_folder() / name / "method.toml"
    try:
        method = MethodFile.model_validate(read_toml(path, what="method"))
    except ValidationError as error:
        raise GuardbenchError(f"{path}: {first_problem(error)}.") from error
    if method.name != name:
        raise GuardbenchError(f"{path}: name: {method.name!r} is not the folder's name.")
    return method
