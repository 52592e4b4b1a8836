"""TOML files and values that people write: read with the line named, checked strictly."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from guardbench.errors import GuardbenchError, brief
from guardbench.fields import Strict
from guardbench.json_files import first_problem, strictly
from guardbench.store import read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Model = TypeVar("Model", bound=Strict)


def read_toml(path: Path, *, what: str) -> dict[str, Any]:
    """Reads a TOML file of at most 1 MiB; the error names the file and the line."""
    try:
        return tomllib.loads(read_text(path, what=what, limit=1 << 20))
    except (ValueError, RecursionError) as error:  # deep nesting, and figures beyond what int takes
        raise GuardbenchError(f"{path}: {what} is not valid TOML: {brief(error)}.") from error


def toml_value(text: str) -> Any:
    """A value as it stands in TOML; a bare word is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def checked(model: type[Model], words: dict[str, Any], *, where: str, inside: str = "") -> Model:
    """The model of those words.

    Args:
        where: whose words they are, for the error: a file's path, or an option.
        inside: the table that they are, with its dot, such as `params.`.

    Raises:
        GuardbenchError: a field is wrong; the first that is.
    """
    try:
        return strictly(model, words)
    except ValidationError as error:
        raise GuardbenchError(f"{where}: {inside}{first_problem(error)}.") from error
    except RecursionError as error:
        raise GuardbenchError(f"{where}: is nested too deeply.") from error
