"""`guardbench robustbench`: RobustBench's own evaluation, its corruptions, and its record format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from guardbench.cli.options import (
    Arch,
    CacheDir,
    DataDir,
    Device,
    Normalisation,
    Python,
    Weights,
    require_alone,
)
from guardbench.errors import GuardbenchError

app = typer.Typer(
    no_args_is_help=True,
    help="RobustBench's own evaluation and corruptions of a classifier, and records in its format.\n\n"
    "Example: guardbench robustbench benchmark --protocol cifar10-8 --arch robustbench:Wong2020Fast",
)

ProtocolId = Annotated[
    str, typer.Option("--protocol", help="Gives data set, resolution, threat model and images.")
]


@app.command()
def benchmark(
    protocol: ProtocolId,
    weights: Weights = None,
    arch: Arch = None,
    python: Python = None,
    normalisation: Normalisation = None,
    images: Annotated[
        int | None,
        typer.Option(help="The first of the protocol's images; by default all.", min=1),
    ] = None,
    device: Device = "auto",
    data_dir: DataDir = None,
    cache_dir: CacheDir = None,
) -> None:
    """Run robustbench.eval.benchmark on a classifier: clean accuracy, and AutoAttack by pyautoattack.

    The images are the protocol's, in its order. `guardbench evaluate` measures the same sooner, with
    checks and a record; this is the original beside it.

    Example: guardbench robustbench benchmark --protocol digits --weights s.pth --arch convnet-d3-bn-small
    """
    from rich.console import Console

    from guardbench.attacks.robustbench import benchmark as run_benchmark
    from guardbench.attacks.robustbench import require_robustbench, unlike_table
    from guardbench.classifiers import Source, open_classifier
    from guardbench.data.dataset import load_split
    from guardbench.devices import make_accelerator
    from guardbench.pipeline import choose_protocol
    from guardbench.progress import Progress

    require_alone("robustbench benchmark")
    source = Source(weights=weights, arch=arch, python=python, normalisation=normalisation)
    source.require_one()
    chosen = choose_protocol(None, protocol)
    require_robustbench(chosen.threat.norm)
    where = make_accelerator(device, "fp32", chosen.resolution).device
    model = open_classifier(source, chosen, where, cache_dir).model
    console = Console(emoji=False)
    if source.zoo and (said := unlike_table(source.zoo, chosen.dataset, chosen.threat.norm)):
        console.print(f"{source.zoo}: {said}", highlight=False)
    test = load_split(
        chosen.dataset, "val", resolution=chosen.resolution, data_dir=data_dir,
        cache_dir=cache_dir, progress=Progress(console), per_class=1,
    )  # fmt: skip
    order = chosen.test_indices(test.ids)[:images]
    _require_memory(len(order), test.batch(order[:1]).nbytes)
    clean, robust = run_benchmark(model, test.batch(order), test.labels[order], chosen.threat.model)
    console.print(
        f"{len(order)} images, {chosen.threat.norm} {chosen.threat.eps}: clean {100 * clean:.2f}%, "
        f"AutoAttack {100 * robust:.2f}%",
        highlight=False,
    )


def _require_memory(count: int, size: int) -> None:
    """Refuses more images than memory holds: robustbench takes them all at once.

    Args:
        size: bytes of an image.
    """
    import psutil  # type: ignore[import-untyped]

    # The images, their adversarial ones, and a copy.
    needed, free = 3 * count * size, psutil.virtual_memory().available
    if needed > free:
        from guardbench.report import byte_size

        raise GuardbenchError(
            f"robustbench holds all {count} images at once, which takes about {byte_size(needed)} of the "
            f"{byte_size(free)} of memory that are free; say --images {max(1, free // (3 * size))}, or take "
            "guardbench evaluate, which holds a batch."
        )


@app.command()
def corruptions(
    protocol: ProtocolId,
    folder: Annotated[
        Path, typer.Option(help="Laid out as CIFAR-10-C: labels.npy and <corruption>.npy.")
    ],
    weights: Weights = None,
    arch: Arch = None,
    python: Python = None,
    normalisation: Normalisation = None,
    images: Annotated[
        int, typer.Option(help="The first of each corruption and severity.", min=1)
    ] = 10_000,
    device: Device = "auto",
    cache_dir: CacheDir = None,
) -> None:
    """Measure a classifier under RobustBench's fifteen corruptions at five severities.

    RobustBench's number is the mean over all of them, the last line. Its second one, mCE, needs
    AlexNet's accuracies, which its package does not bring.

    Example: guardbench robustbench corruptions --protocol cifar10-8 --folder CIFAR-10-C --python mine:network
    """
    from rich.console import Console
    from rich.table import Table

    from guardbench.attacks.robustbench import SEVERITIES
    from guardbench.attacks.robustbench import corruptions as measure
    from guardbench.classifiers import Source, open_classifier
    from guardbench.data.catalog import dataset_info
    from guardbench.devices import make_accelerator
    from guardbench.pipeline import choose_protocol
    from guardbench.progress import Progress

    require_alone("robustbench corruptions")
    source = Source(weights=weights, arch=arch, python=python, normalisation=normalisation)
    source.require_one()
    chosen = choose_protocol(None, protocol)
    if not chosen.dataset.startswith("cifar"):
        raise GuardbenchError(
            f"--protocol {protocol}: its classes are those of {chosen.dataset}; the corruption files are "
            "of CIFAR."
        )
    where = make_accelerator(device, "fp32", chosen.resolution).device
    model = open_classifier(source, chosen, where, cache_dir).model
    console = Console(emoji=False)
    with Progress(console).stage("corruptions", 15, "corruptions") as bar:
        found = measure(
            model, folder, resolution=chosen.resolution, count=images,
            classes=dataset_info(chosen.dataset).num_classes,
            told=lambda name: bar.advance(1, name),
        )  # fmt: skip
    table = Table("corruption", *(f"severity {s}" for s in range(1, SEVERITIES + 1)), "mean")
    for name, shares in found.items():
        table.add_row(name, *(f"{100 * s:.1f}" for s in [*shares, sum(shares) / SEVERITIES]))
    console.print(table)
    everything = [share for shares in found.values() for share in shares]
    console.print(f"mean {100 * sum(everything) / len(everything):.2f}%", highlight=False)


@app.command()
def export(
    record: Annotated[Path, typer.Argument(help="A record of `guardbench evaluate`.")],
    measured_by: Annotated[
        str | None,
        typer.Option("--protocol", help="The file of a protocol of your own.", show_default=False),
    ] = None,
    paper: Annotated[
        str | None, typer.Option(help="Title of the paper.", show_default=False)
    ] = None,
    authors: Annotated[str | None, typer.Option(help="Of the paper.", show_default=False)] = None,
    link: Annotated[str | None, typer.Option(help="To the paper.", show_default=False)] = None,
    venue: Annotated[
        str | None, typer.Option(help="Such as ICML 2026.", show_default=False)
    ] = None,
    extra_data: Annotated[
        bool | None, typer.Option(help="Whether it was trained on more data.", show_default=False)
    ] = None,
    reported: Annotated[
        float | None,
        typer.Option(help="Robust accuracy in the paper, %.", min=0, max=100, show_default=False),
    ] = None,
) -> None:
    """Print a classifier's record as RobustBench's model-info JSON; what is not said stays empty there.

    Example: guardbench robustbench export guardbench-runs/classifiers/cifar10-8/mine-seed0.json > mine.json
    """
    import json

    from guardbench.attacks.robustbench import NORMS, model_info
    from guardbench.protocol import load_protocol
    from guardbench.record_files import load_any_record
    from guardbench.records import ClassifierRecord

    found = load_any_record(record)
    if not isinstance(found, ClassifierRecord):
        raise GuardbenchError(
            f"{record}: the record of a distilled dataset; RobustBench lists classifiers, so give one "
            "of `guardbench evaluate`."
        )
    if found.tier != "official":
        raise GuardbenchError(f"{record}: of the {found.tier} tier; evaluate it without --tier.")
    protocol = load_protocol(measured_by or found.protocol)
    column = next((spec.name for spec in protocol.attacks if spec.is_standard), None)
    if (
        protocol.digest != found.protocol_sha256
        or column is None
        or protocol.threat.norm not in NORMS
    ):
        raise GuardbenchError(
            f"{record}: its protocol {found.protocol} is not this one with AutoAttack standard in linf "
            "or l2; --protocol names the file of one of your own."
        )
    words = model_info(
        found, column, protocol.threat.eps, name=paper, authors=authors, link=link, venue=venue,
        additional_data=extra_data, reported=None if reported is None else f"{reported:.2f}",
    )  # fmt: skip
    typer.echo(json.dumps(words, indent=2))
