"""Records on disk: canonical JSON out, any version in, checked both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from guardbench import canonical, json_files
from guardbench.errors import GuardbenchError
from guardbench.fields import printable
from guardbench.migrations import migrate
from guardbench.records import AnyRecord, ClassifierRecord, ResultRecord
from guardbench.store import read_text, write_text

FILE_LIMIT = 16 << 20
CURVE_SUFFIX = ".curve.json"
"""Of a security curve that lies beside the record that it belongs to, as `<record stem>*.curve.json`."""


def record_paths(root: Path, pattern: str) -> list[Path]:
    """The record files under `root` that match the glob `pattern`, sorted; not the curves beside them."""
    return sorted(path for path in root.glob(pattern) if not path.name.endswith(CURVE_SUFFIX))


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
    return json_files.parse(
        read_text(path, what="record", limit=FILE_LIMIT),
        _record,
        where=str(path),
        what="record",
        remedy="Records are written by `guardbench run`, not by hand; restore this one or run it again.",
    )


def _record(words: dict[str, Any]) -> AnyRecord:
    if "classifier" in words:
        return json_files.strictly(ClassifierRecord, migrate(words))
    return json_files.strictly(ResultRecord, migrate(words))


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
