"""The dataset card of a pushed set: what it is, how it was made, how to load and to score it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from huggingface_hub import DatasetCardData

import guardbench
from guardbench.distilled import IMAGES, PREVIEW, TEACHER, Manifest, readable_classes
from guardbench.errors import GuardbenchError
from guardbench.fields import printable
from guardbench.metrics import Estimate, estimate, worst_case
from guardbench.protocol import load_protocol
from guardbench.records import ResultRecord

ARTIFACT = "guardbench"
TABLE = "data/train.parquet"
CARD = "README.md"
LICENCE = "unknown"

_LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")
_MARKDOWN = re.compile(r"[\\`*_\[\]<>|&$~#]")
_CLASSES_SHOWN = 200


@dataclass(frozen=True)
class Facts:
    """What a card says beside the manifest.

    Attributes:
        repo: `OWNER/NAME`.
        branch: where it is pushed to, None for the main one.
        licence: an identifier of the Hub's, such as `cc-by-4.0`.
        images: how many.
        table_bytes: of the images and labels as Arrow holds them.
        file_bytes: of the parquet file.
        record: of the set, measured under a protocol, if there is one.
    """

    repo: str
    branch: str | None
    licence: str
    images: int
    table_bytes: int
    file_bytes: int
    record: ResultRecord | None


def check_licence(licence: str) -> None:
    """Raises a GuardbenchError unless `licence` looks as the Hub's identifiers do."""
    if not _LICENCE.fullmatch(licence):
        raise GuardbenchError(
            f"--license {printable(licence, 80)!r}: give an identifier of the Hub, such as cc-by-4.0, "
            "apache-2.0, other or unknown."
        )


def card_text(manifest: Manifest, facts: Facts) -> str:
    """The README.md of a pushed set: a YAML head that `datasets` and the Hub read, then Markdown.

    Text of the manifest and the record is escaped: it may be a stranger's.
    """
    parts = [
        f"---\n{_head(manifest, facts).to_yaml()}\n---\n",
        f"# {_title(manifest)}\n",
        _what(manifest, facts),
        f"![Some of the images, a row a class]({PREVIEW})\n",
        _summary(manifest, facts),
        *([] if facts.record is None else [_measured(facts.record)]),
        _loading(manifest, facts),
        _scoring(manifest, facts),
        _provenance(manifest, facts.record),
        _classes(manifest),
    ]
    return "\n".join(part for part in parts if part)


def _head(manifest: Manifest, facts: Facts) -> DatasetCardData:
    label = {"class_label": {"names": {str(k): name for k, name in enumerate(manifest.classes)}}}
    features: list[dict[str, Any]] = [
        {"name": "image", "dtype": "image"},
        {"name": "label", "dtype": label},
    ]
    if manifest.label_kind == "soft":
        features.append({"name": "soft_label", "list": "float32"})
    split = {"name": "train", "num_bytes": facts.table_bytes, "num_examples": facts.images}
    return DatasetCardData(
        license=facts.licence,
        pretty_name=_title(manifest),
        task_categories=["image-classification"],
        size_categories=[_size_category(facts.images)],
        tags=["dataset-distillation", "adversarial-robustness", "guardbench", manifest.dataset],
        dataset_info={
            "features": features,
            "splits": [split],
            "download_size": facts.file_bytes,
            "dataset_size": facts.table_bytes,
        },
        configs=[
            {"config_name": "default", "data_files": [{"split": "train", "path": TABLE}]},
        ],
    )


def _size_category(images: int) -> str:
    """The Hub's words for a number of images."""
    if images < 1000:
        return "n<1K"
    for low, high, words in ((3, 4, "1K<n<10K"), (4, 5, "10K<n<100K"), (5, 6, "100K<n<1M")):
        if 10**low <= images < 10**high:
            return words
    return "1M<n<10M"


def _title(manifest: Manifest) -> str:
    return f"{manifest.dataset} distilled by {manifest.method}, {_ipc(manifest)}"


def _ipc(manifest: Manifest) -> str:
    if not manifest.ipc:
        return "every image"
    return f"{manifest.ipc} image{'s' * (manifest.ipc > 1)} per class"


def _what(manifest: Manifest, facts: Facts) -> str:
    return (
        f"{facts.images} images that stand for the training set of {code(manifest.dataset)}: networks are "
        "trained on them alone, and then tested on the real test images, clean and under attack. "
        f"Published with guardbench {guardbench.__version__}, a benchmark suite for adversarially "
        "robust dataset distillation.\n"
    )


def _summary(manifest: Manifest, facts: Facts) -> str:
    side = manifest.resolution
    labels = {
        "hard": "hard: the class that each image stands for",
        "soft": f"soft: a row of {len(manifest.classes)} probabilities an image, in `soft_label`",
        "teacher": "of a teacher: in training, every view of an image is labelled by the network "
        f"{code(str(manifest.teacher_arch))} in `{ARTIFACT}/{TEACHER}`; `label` is the class that the "
        "image stands for",
    }[manifest.label_kind]
    rows = {
        "dataset": f"{code(manifest.dataset)}, {len(manifest.classes)} classes",
        "images": f"{facts.images} of {manifest.channels} x {side} x {side}",
        "IPC": _ipc(manifest),
        "method": code(manifest.method),
        "labels": labels,
        "bytes": f"images {facts.images * manifest.channels * side * side:,} at 8 bits a value, "
        f"labels {manifest.label_bytes:,}",
        "SHA-256": f"{code(manifest.sha256)}, of the manifest, and through it of every file of the "
        "artifact",
    }
    return (
        _table(["", ""], [[name, text] for name, text in rows.items()])
        + f"\n**The tensor is the artifact.** `{ARTIFACT}/{IMAGES}` holds the images as float32 in [0, 1], "
        f"not normalised, as students are trained on them. `{TABLE}` is a copy to look at and for other "
        "tools: its PNGs have 8 bits a value, which moves each value by at most 1/510. What is measured on "
        "one need not hold for the other to the last digit.\n"
    )


def _measured(record: ResultRecord) -> str:
    seeds = record.seeds
    rows = [_row("clean", estimate([run.clean for run in seeds]))]
    for name in record.attack_names:
        found = estimate([run.attacks[name] for run in seeds])
        rows.append(_row(name if found.bounded else f"{name} (not held in the ball)", found))
    worst = worst_case(seeds)
    if worst is not None:
        rows.append(_row("worst case", worst.estimate))
    notes = [f"Flag: {text(flag)}.\n" for flag in record.flags]
    notes.append(
        "The interval is the wider of Student's t over students and Wilson's over images. In the worst case "
        "an image counts when it survives every attack that is held in the ball.\n"
    )
    tier = "" if record.tier == "official" else f" Tier {record.tier}: unofficial, on no board."
    return (
        "## Measured\n\n"
        f"Under the protocol {code(record.protocol)} ({code(record.protocol_sha256[:12])}"
        f"{_threat(record)}), {len(seeds)} student{'s' * (len(seeds) > 1)} trained on this set, in percent "
        f"of the test images.{tier}\n\n"
        + _table(["measurement", "mean", "95% interval", "per student", "images a student"], rows)
        + "".join(f"\n{note}" for note in notes)
    )


def _row(name: str, found: Estimate) -> list[str]:
    counts = sorted(set(found.images_per_seed))
    return [
        text(name),
        f"{found.mean:.1f}",
        f"{found.low:.1f} to {found.high:.1f}",
        " ".join(f"{value:.1f}" for value in found.per_seed),
        str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}",
    ]


def _threat(record: ResultRecord) -> str:
    """The threat model in words, where that very protocol comes with this guardbench."""
    try:
        known = load_protocol(record.protocol)
    except GuardbenchError:
        return ""
    if known.digest != record.protocol_sha256:
        return ""
    return f", threat {known.threat.norm} {known.threat.eps}"


def _loading(manifest: Manifest, facts: Facts) -> str:
    branch = "" if facts.branch is None else f', revision="{facts.branch}"'
    option = "" if facts.branch is None else f" --revision {facts.branch}"
    soft = '\nrow["soft_label"]  # a row of probabilities' if manifest.label_kind == "soft" else ""
    return f"""## Load it

The 8-bit copy, with `datasets`:

```python
from datasets import load_dataset

rows = load_dataset("{facts.repo}", split="train"{branch})
row = rows[0]
row["image"]  # a PIL image
rows.features["label"].int2str(row["label"]){soft}
```

The artifact itself, every digest checked, with guardbench:

```console
guardbench pull {facts.repo}{option} --output distilled
```

```python
from pathlib import Path

from guardbench.distilled import load_distilled

images = load_distilled(Path("distilled")).images  # float32 [N, C, H, W] in [0, 1]
```
"""


def _scoring(manifest: Manifest, facts: Facts) -> str:
    teacher = (
        f" Its teacher is `{TEACHER}` of the pulled folder."
        if manifest.label_kind == "teacher"
        else ""
    )
    return f"""## Score it

Name a commit of this repository in the `submission.toml` of a guardbench submission; `guardbench submission
score` then trains students on the set and attacks them.{teacher}

```toml
[data]
kind = "hub"
repo = "{facts.repo}"
revision = "..."  # the 40 digits of a commit, under "Files and versions"
```
"""


def _provenance(manifest: Manifest, record: ResultRecord | None) -> str:
    rows = [[code(key), code(str(value))] for key, value in sorted(manifest.provenance.items())]
    lines = ["## How it was made\n", _table(["manifest", ""], rows) if rows else ""]
    if record is not None:
        method, made = record.method, record.provenance
        regulariser = "" if method.regulariser == "none" else f" with {code(method.regulariser)}"
        settings = "the committed recipe" if method.official else "settings of its own"
        changed = "".join(f", {code(words)}" for words in record.overrides)
        lines.append(
            f"{text(method.title)}: distiller {code(method.distiller)}{regulariser}, {settings} "
            f"({code(method.recipe_sha256[:12])}){changed}; guardbench {code(made.guardbench)}, commit "
            f"{code(made.commit or 'none')}, on {text(made.device)}.\n"
        )
    return "\n".join(line for line in lines if line)


def _classes(manifest: Manifest) -> str:
    """What the names of `label` mean, where they are not words already."""
    names = readable_classes(manifest.dataset, manifest.classes)
    if names == manifest.classes or len(names) > _CLASSES_SHOWN:
        return ""
    rows = [
        [str(k), code(key), text(name)]
        for k, (key, name) in enumerate(zip(manifest.classes, names, strict=False))
    ]
    return "## Classes\n\n" + _table(["label", "name", "meaning"], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def text(words: str) -> str:
    """A stranger's words as plain Markdown text on one line."""
    return _MARKDOWN.sub(lambda found: f"\\{found[0]}", printable(words))


def code(words: str) -> str:
    """A stranger's words as Markdown code on one line, within a table too."""
    return f"`{printable(words).replace('`', chr(39)).replace('|', chr(92) + '|')}`"
