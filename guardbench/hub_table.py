"""What of a distilled set people and other tools see on the Hub: its images at 8 bits a value."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from PIL import Image

from guardbench.distilled import DistilledDataset, readable_classes, save_preview
from guardbench.errors import GuardbenchError
from guardbench.fields import printable
from guardbench.progress import Progress

ROWS = 100  # images a row group: some megabytes, which viewers fetch one at a time


def check_pictures(distilled: DistilledDataset, where: str) -> None:
    """Raises a GuardbenchError where a set can be no pictures with named classes."""
    classes = distilled.manifest.classes
    if distilled.manifest.channels == 2:
        raise GuardbenchError(f"{where}: images of 2 channels are no pictures; 1, 3 or 4 are.")
    if len(set(classes)) < len(classes) or not all(0 < len(name) <= 200 for name in classes):
        raise GuardbenchError(
            f"{where}: classes: names must differ, and have from 1 to 200 characters."
        )


def draw_preview(path: Path, distilled: DistilledDataset) -> None:
    """Draws the grid of images; names are a stranger's, and Matplotlib would take `$` for a formula."""
    names = readable_classes(distilled.manifest.dataset, distilled.manifest.classes)
    shown = tuple(printable(name, 40).replace("$", r"\$") for name in names)
    save_preview(path, distilled.images, distilled.hard, shown)


def write_table(path: Path, distilled: DistilledDataset, progress: Progress) -> int:
    """Writes a set as parquet in Hugging Face's image layout: `image`, `label`, maybe `soft_label`.

    Images become PNGs of 8 bits a value, which moves each value by at most 1/510; the schema holds
    the features, so that `datasets` gives images and class names.

    Returns:
        Bytes of the columns as Arrow holds them.

    Raises:
        GuardbenchError: the images have a number of channels that PNG has not.
    """
    from datasets import ClassLabel, Features, List, Value  # type: ignore[import-untyped]
    from datasets import Image as ImageFeature

    features = {
        "image": ImageFeature(),
        "label": ClassLabel(names=list(distilled.manifest.classes)),
    }
    if distilled.soft is not None:
        features["soft_label"] = List(Value("float32"))
    schema = Features(features).arrow_schema
    path.parent.mkdir(parents=True, exist_ok=True)
    size = 0
    with (
        pq.ParquetWriter(path, schema) as writer,
        progress.stage("encode", len(distilled.images), "images") as stage,
    ):
        for first in range(0, len(distilled.images), ROWS):
            rows = range(first, min(first + ROWS, len(distilled.images)))
            batch = pa.RecordBatch.from_pydict(_columns(distilled, rows), schema=schema)
            writer.write_batch(batch)
            size += batch.nbytes
            stage.advance(len(rows))
    return size


def _columns(distilled: DistilledDataset, rows: range) -> dict[str, list[object]]:
    at = slice(rows.start, rows.stop)
    pixels = (distilled.images[at] * 255).round().byte().permute(0, 2, 3, 1)
    pictures: list[object] = []
    for index, values in zip(rows, pixels.numpy(), strict=True):
        buffer = io.BytesIO()
        Image.fromarray(values.squeeze(-1) if values.shape[-1] == 1 else values).save(buffer, "PNG")
        pictures.append({"bytes": buffer.getvalue(), "path": f"{index:06d}.png"})
    columns: dict[str, list[object]] = {"image": pictures, "label": distilled.hard[at].tolist()}
    if distilled.soft is not None:
        columns["soft_label"] = distilled.soft[at].tolist()
    return columns
