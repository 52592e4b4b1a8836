"""JSON files that people can send us: parsed once, checked strictly, refused in one line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from guardbench.errors import GuardbenchError
from guardbench.fields import NAME, SHA256, Strict, printable

Made = TypeVar("Made")
Model = TypeVar("Model", bound=Strict)


def parse(
    text: str, make: Callable[[dict[str, Any]], Made], *, where: str, what: str, remedy: str
) -> Made:
    """What `make` makes of the JSON object in `text`.

    Args:
        make: raises ValueError, or pydantic's ValidationError, where a field is wrong.
        where: the file's name, for the error.
        what: the kind of file, such as `record`.
        remedy: a sentence that says the way out.

    Raises:
        GuardbenchError: it is no JSON object, a key stands twice, or `make` refuses it.
    """
    try:
        words = json.loads(text, object_pairs_hook=_unique)
        if not isinstance(words, dict):
            raise ValueError("must be a JSON object")
        return make(words)
    except ValidationError as error:
        reason = first_problem(error)
    except json.JSONDecodeError as error:
        reason = f"not valid JSON ({error.msg}, line {error.lineno})"
    except RecursionError:
        reason = "nested too deeply"
    except ValueError as error:
        reason = str(error)
    raise GuardbenchError(f"{printable(where)}: not a valid {what}: {reason}. {remedy}")


def strictly(model: type[Model], words: dict[str, Any]) -> Model:
    """The model of those words; strict, and through JSON, so that lists may stand for tuples.

    Raises:
        pydantic.ValidationError: a field is wrong: `"5"` and true are no count.
    """
    # A date of TOML is nothing that JSON has; as a table it fits no field.
    text = json.dumps(words, default=lambda value: {type(value).__name__: str(value)})
    return model.model_validate_json(text, strict=True)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    words = dict(pairs)
    if len(words) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in words if keys.count(key) > 1)
        raise ValueError(f"{printable(twice, 64)}: the key stands twice")
    return words


def problems(error: ValidationError) -> list[tuple[str, str]]:
    """Every complaint of pydantic as field and message, both printable; the field may be empty."""
    return [
        (printable(".".join(str(part) for part in problem["loc"]), 160), _message(problem))
        for problem in error.errors(include_url=False)
    ]


def first_problem(error: ValidationError) -> str:
    """The first complaint of pydantic as `field: message`, printable."""
    field, message = problems(error)[0]
    return f"{field}: {message}" if field else message


_KINDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text in quotes",
    "tuple_type": "a list in [ ]",
    "list_type": "a list in [ ]",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
}
_WRITTEN = {
    NAME: "lower-case letters, figures and ._+- alone, at most 64",
    SHA256: "64 figures from 0 to f",
}


def _message(problem: ErrorDetails) -> str:
    """What pydantic says of a field, for people; what stands there is shown where it is short."""
    kind, given = problem["type"], problem["input"]
    if kind == "extra_forbidden":
        return "there is no such field; remove it, or correct its name"
    if kind == "missing":
        return "is missing; add it"
    if kind == "value_error":
        return printable(problem["msg"].removeprefix("Value error, "))
    if kind == "string_pattern_mismatch":
        message = f"must be {_WRITTEN.get(problem['ctx']['pattern'], 'written otherwise')}"
    elif kind in _KINDS:
        message = f"must be {_KINDS[kind]}"
    else:
        said = re.sub("^[A-Z][a-z]+ should", "must", problem["msg"])
        message = printable(said.replace(" after validation", ""))
    shown = json.dumps(given, default=str) if isinstance(given, str | int | float) else ""
    return f"{message}, not {printable(shown, 60)}" if shown else message
