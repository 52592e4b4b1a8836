"""JSON files that people can send us: parsed once, checked strictly, refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import ValidationError

from guardbench.errors import GuardbenchError
from guardbench.records import Strict, printable

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
    return model.model_validate_json(json.dumps(words), strict=True)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    words = dict(pairs)
    if len(words) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in words if keys.count(key) > 1)
        raise ValueError(f"{printable(twice, 64)}: the key stands twice")
    return words


def first_problem(error: ValidationError) -> str:
    """The first complaint of pydantic as `field: message`, printable."""
    problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
    field = printable(".".join(str(part) for part in problem["loc"]), 160)
    message = printable(problem["msg"].removeprefix("Value error, "))
    return f"{field}: {message}" if field else message
