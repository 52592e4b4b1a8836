"""Parquet shards in the Hub's layout, streamed with `datasets`: `image` {bytes, path} and `label`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from guardbench.data.shard_files import HUB, ShardFile
from guardbench.data.shards import Entry
from guardbench.errors import GuardbenchError, brief
from guardbench.fields import printable

_ROWS_A_BATCH = 64
_BUFFER_BYTES = 1 << 20


def parquet_rows(file: ShardFile) -> int | None:
    """How many images a local shard has, from its footer; None of one on the Hub, which is not asked.

    Raises:
        GuardbenchError: it is cut off, or no parquet file.
    """
    from pyarrow import parquet  # type: ignore[import-untyped]

    if file.address.startswith(HUB):
        return None
    with _named(file):
        return int(parquet.read_metadata(file.address).num_rows)


def label_names(file: ShardFile) -> tuple[str, ...] | None:
    """The names that the shard gives to its labels, in their order; None where it gives none.

    Raises:
        GuardbenchError: it cannot be read, or lacks a column.
    """
    features = _streamed(file).features
    names = None if features is None else getattr(features["label"], "names", None)
    return None if names is None else tuple(str(name) for name in names)


def parquet_entries(file: ShardFile, names: tuple[str, ...] | None) -> Iterator[Entry]:
    """The rows of a shard; a few are in memory at a time.

    Args:
        names: class keys by the shard's own labels, where they are not in the catalogue's order.

    Raises:
        GuardbenchError: the shard cannot be read to its end, or a row has no image or no label.
    """
    tables = _streamed(file).with_format("arrow").iter(_ROWS_A_BATCH)
    for number, row in enumerate(_rows(file, tables)):
        where = f"{file.address}, row {number}"
        image, label = row["image"], row["label"]
        data = image.get("bytes") if isinstance(image, dict) else None
        if not data:
            raise GuardbenchError(f"{where}: has no image bytes; get the shard again.")
        if isinstance(label, bool) or not isinstance(label, int | str):
            raise GuardbenchError(f"{where}: has no label; get the shard again.")
        if names is not None and isinstance(label, int) and 0 <= label < len(names):
            label = names[label]
        path = image.get("path")
        yield Entry(where, f"{number:06d}", None if path is None else str(path), label, data)


def _rows(file: ShardFile, tables: Iterator[Any]) -> Iterator[dict[str, Any]]:
    while True:
        with _named(file):
            table = next(tables, None)
            rows = [] if table is None else table.to_pylist()
        yield from rows
        if table is None:
            return


def _streamed(file: ShardFile) -> Any:
    """The shard's two columns as a `datasets` stream of undecoded images."""
    import datasets  # type: ignore[import-untyped]
    from pyarrow.dataset import ParquetFragmentScanOptions  # type: ignore[import-untyped]

    with _named(file):
        stream = datasets.load_dataset(
            "parquet",
            data_files={"shard": [file.address]},
            split="shard",
            streaming=True,
            columns=["image", "label"],
            batch_size=_ROWS_A_BATCH,
            # A row group may be as large as the file; in pieces, it need not be in memory.
            fragment_scan_options=ParquetFragmentScanOptions(
                use_buffered_stream=True, buffer_size=_BUFFER_BYTES, pre_buffer=False
            ),
        )
        lacking = [name for name in ("image", "label") if name not in (stream.features or {})]
        if lacking:
            raise GuardbenchError(
                f"{file.address}: has no column {lacking[0]}; shards have `image` and `label`."
            )
        return stream.cast_column("image", datasets.Image(decode=False))


@contextmanager
def _named(file: ShardFile) -> Iterator[None]:
    try:
        yield
    except GuardbenchError:
        raise
    # Broad on purpose: Arrow, datasets and the Hub's client each raise their own kinds for a file that
    # is damaged or does not come, and each means the same to the user.
    except Exception as error:
        raise GuardbenchError(
            f"{file.address}: cannot be read ({printable(brief(error))}); get the shard again."
        ) from error
