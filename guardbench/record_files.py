"""Records on disk: canonical JSON out, any version in, checked both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from guardbench import canonical
from guardbench.errors import GuardbenchError
from guardbench.migrations import migrate
from guardbench.records import AnyRecord, ClassifierRecord, ResultRecord, printable
from guardbench.store import read_text, write_text

FILE_LIMIT = 16 << 20


def load_record(path: Path) -> ResultRecord:
    """Reads and checks the record of a distilled dataset, of any schema version there has been.

    Raises:
        GuardbenchError: as `load_any_record`; or it is the record of a classifier.
    """
    record = load_any_record(path)
    if isinstance(record, ClassifierRecord):
        raise GuardbenchError(
            f"{printable(str(path))}: the record of a classifier, made by `guardbench evaluate`; here "
            "only records of distilled datasets have a place."
        )
    return record


def load_any_record(path: Path) -> AnyRecord:
    """Reads and checks a record file, of any kind and any schema version there has been.

    Raises:
        GuardbenchError: it cannot be read, is over 16 MiB, is not JSON, is newer than this
            guardbench, or a field is wrong: one line naming the file, the field and the way out.
    """
    text = read_text(path, what="record", limit=FILE_LIMIT)
    try:
        words = json.loads(text, object_pairs_hook=_unique)
        if not isinstance(words, dict):
            raise ValueError("must be a JSON object")
        # Strict, and through JSON so that lists may stand for tuples: "5" or true is no count.
        kind: type[AnyRecord] = ClassifierRecord if "classifier" in words else ResultRecord
        return kind.model_validate_json(json.dumps(migrate(words)), strict=True)
    except ValidationError as error:
        reason = _first_problem(error)
    except json.JSONDecodeError as error:
        reason = f"not valid JSON ({error.msg}, line {error.lineno})"
    except RecursionError:
        reason = "nested too deeply"
    except ValueError as error:
        reason = str(error)
    raise GuardbenchError(
        f"{printable(str(path))}: not a valid record: {reason}. Records are written by "
        "`guardbench run`, not by hand; restore this one or run it again."
    )


def save_record(path: Path, record: AnyRecord) -> None:
    """Checks `record` again and writes it as canonical JSON, whole or not at all.

    Raises:
        GuardbenchError: the file cannot be written.
        pydantic.ValidationError: a copy or an update has made the record contradict itself.
    """
    checked = type(record).model_validate(record.model_dump())
    write_text(path, record_text(checked))


def record_text(record: AnyRecord) -> str:
    """The canonical JSON that `save_record` writes: equal records give equal bytes."""
    return canonical.dumps(record.model_dump(mode="json"))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    words = dict(pairs)
    if len(words) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in words if keys.count(key) > 1)
        raise ValueError(f"{printable(twice, 64)}: the key stands twice")
    return words


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
    field = printable(".".join(str(part) for part in problem["loc"]), 160)
    message = printable(problem["msg"].removeprefix("Value error, "))
    return f"{field}: {message}" if field else message
