"""What can be known of a dataset before any image is decoded: for plans."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from guardbench.data.cache import Entry, find, in_memory
from guardbench.data.catalog import DatasetInfo, Split
from guardbench.data.files import cache_root
from guardbench.data.locate import Located
from guardbench.data.source import open_source


def peek(
    info: DatasetInfo, located: Located, split: Split, *, resolution: int, cache_dir: Path | None
) -> Entry | None:
    """The decoded `split`, whose digest is `RealDataset.digest`; None while it is not in the cache."""
    if located.kind == "download":
        return None
    if info.embedded:
        return _embedded(info, located, split, resolution)
    source = open_source(info, located, split)
    return find(source, resolution, cache_root(cache_dir), f"{info.name}-{split}")


@cache  # they lie in an installed package, and a suite asks for each of its cells
def _embedded(info: DatasetInfo, located: Located, split: Split, resolution: int) -> Entry:
    return in_memory(open_source(info, located, split), resolution)


def class_order(info: DatasetInfo, located: Located) -> tuple[str, ...]:
    """The classes in label order, read from the folders where only they name them."""
    if info.classes:
        return info.classes
    if located.kind == "download":
        return tuple(f"class {k}" for k in range(info.num_classes))
    return open_source(info, located, "train").classes
