"""Rows of a stranger's parquet file: image bytes, label, soft label."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from guardbench.errors import GuardbenchError, brief
from guardbench.fields import printable

Row = dict[str, Any]


def parquet_rows(path: Path, *, soft: bool, most: int, size: int) -> Iterator[Row]:
    """The rows of a parquet file in Hugging Face's image layout: columns `image` and `label`.

    Args:
        soft: whether there must be a column `soft_label`.
        most: rows that it may have.
        size: bytes that all of them may take.

    Raises:
        GuardbenchError: it is no parquet file, lacks a column, or holds more than it may.
    """
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        with path.open("rb") as stream:
            file = parquet.ParquetFile(
                stream, thrift_string_size_limit=1 << 24, thrift_container_size_limit=1 << 20
            )
            head = file.metadata
            columns = [*file.schema_arrow.names]
            wanted = ["image", "label", *(["soft_label"] if soft else [])]
            if lacking := [name for name in wanted if name not in columns]:
                raise GuardbenchError(
                    f"has no column {lacking[0]}; it has {printable(', '.join(columns))}."
                )
            unpacked = sum(head.row_group(i).total_byte_size for i in range(head.num_row_groups))
            if head.num_rows > most or unpacked > size:
                raise GuardbenchError(
                    f"{head.num_rows} rows of {unpacked} bytes, more than the IPC allows."
                )
            # What a file says of itself may be wrong, and a dictionary may stand for much: few at once.
            for batch in file.iter_batches(batch_size=8, columns=wanted, use_threads=False):
                size -= batch.nbytes
                if size < 0:
                    raise GuardbenchError("unpacks to more than the IPC allows.")
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, OverflowError) as error:
        raise GuardbenchError(
            f"cannot be read ({printable(brief(error))}); write it anew."
        ) from error


def parse_row(words: Row) -> tuple[bytes, int, list[float] | None]:
    """Image bytes, label and soft label of a parquet row."""
    image, label, soft = words["image"], words["label"], words.get("soft_label")
    data = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(data, bytes):
        raise GuardbenchError("image: holds no bytes; store the image itself and not its path.")
    if not isinstance(label, int) or not 0 <= label < 1 << 31:
        raise GuardbenchError(f"label: {printable(str(label), 40)} is no class number from 0 on.")
    if soft is None:
        return data, label, None
    if not isinstance(soft, list) or not all(isinstance(value, float) for value in soft):
        raise GuardbenchError("soft_label: must be a list of floats.")
    return data, label, soft
