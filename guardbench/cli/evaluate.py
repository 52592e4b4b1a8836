"""`guardbench evaluate`: attack any classifier under a protocol and write a record."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from guardbench.cli.options import (
    Arch,
    CacheDir,
    DataDir,
    Device,
    DevImages,
    EngineName,
    EngineOption,
    Normalisation,
    Python,
    TierName,
    TierOption,
    Weights,
    make_console,
)


def evaluate(
    protocol: Annotated[
        str, typer.Option(help="What is measured: an id such as cifar10-8, or your own FILE.toml.")
    ],
    weights: Weights = None,
    arch: Arch = None,
    python: Python = None,
    normalisation: Normalisation = None,
    name: Annotated[
        str | None,
        typer.Option(
            help="What the record calls it; by default the file's name.", show_default=False
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Of the attacks' random choices.", min=0, max=2**63 - 1)
    ] = 0,
    student: Annotated[
        int,
        typer.Option(
            help="Whose images to take, counted from 0, where a protocol gives every student its own.",
            min=0,
        ),
    ] = 0,
    engine: EngineOption = EngineName.guardbench,
    tier: TierOption = TierName.official,
    images: DevImages = None,
    device: Device = "auto",
    data_dir: DataDir = None,
    cache_dir: CacheDir = None,
    output: Annotated[
        Path, typer.Option(help="The workspace: what is finished is not attacked again.")
    ] = Path("guardbench-runs"),
) -> None:
    """Attack a classifier with a protocol's attacks: clean and robust accuracy, and a record.

    Attacks for which a protocol gives every student images of its own run on the first one's, or on those
    that --student names. A killed evaluation goes on when the same command is given again.

    Example: guardbench evaluate --protocol digits --weights student.safetensors --arch convnet-d3-bn-small
    """
    console = make_console()
    from guardbench.assessment import Request, assess, prepare
    from guardbench.classifiers import Source
    from guardbench.progress import Progress

    request = Request(
        protocol=protocol,
        source=Source(
            weights=weights, arch=arch, python=python, normalisation=normalisation, name=name
        ),
        student=student,
        seed=seed,
        engine=engine.value,
        tier=tier.value,
        images=images,
        device=device,
        data_dir=data_dir,
        cache_dir=cache_dir,
        output=output,
    )
    prepared = prepare(request, Progress(console))
    from rich.markup import escape

    from guardbench.devices import device_name
    from guardbench.ranking import threat_text
    from guardbench.report import print_record
    from guardbench.tier import dev_text

    described = prepared.imported.described
    lines = {
        "classifier": f"{described.name}: {described.arch}, {described.parameters} parameters",
        "weights": described.weights,
        "normalisation": described.normalisation,
        "protocol": f"{prepared.protocol.id}: {prepared.protocol.title}",
        "threat": threat_text(prepared.protocol),
        "engine": request.engine,
        "device": device_name(prepared.run.device),
    }
    if prepared.sample is not None:
        lines["tier"] = dev_text(prepared.sample, prepared.protocol.test.count)
    for title, text in lines.items():
        console.print(f"  {title:<14} {escape(text)}", highlight=False, soft_wrap=True)
    console.print()
    record, path = assess(prepared)
    console.print()
    print_record(console, record, threat=threat_text(prepared.protocol), paths={"record": path})
