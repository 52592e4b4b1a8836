"""`guardbench curve`: robust accuracy over the radius, as a table, a plot and JSON."""

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


def curve(
    protocol: Annotated[
        str, typer.Option(help="Whose images and norm: an id such as cifar10-8, or your FILE.toml.")
    ],
    weights: Weights = None,
    arch: Arch = None,
    python: Python = None,
    normalisation: Normalisation = None,
    name: Annotated[
        str | None,
        typer.Option(help="In the legend; by default the file's name.", show_default=False),
    ] = None,
    radii: Annotated[
        str | None,
        typer.Option(
            help="Rising, such as 0.5/255,1/255,2/255; by default from a quarter to 32 times the "
            "protocol's, and 1 in linf.",
            show_default=False,
        ),
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(help="The first of the protocol's images; by default all.", min=1),
    ] = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option(help="A curve made before, drawn too; may be repeated.", show_default=False),
    ] = None,
    device: Device = "auto",
    data_dir: DataDir = None,
    cache_dir: CacheDir = None,
    output: Annotated[
        Path,
        typer.Option(
            help="The curve as JSON; its plot goes beside it as PNG, and what is finished of it into "
            "guardbench-runs/."
        ),
    ] = Path("curve.json"),
) -> None:
    """Attack a classifier at rising radii and draw its security curve.

    PGD goes on from one radius to the next with the images that are left. The curve shows how accuracy
    falls, and whether it falls to nothing, as it must: one that ends above chance is flagged. The number
    for a comparison is AutoAttack's, by `guardbench evaluate`. A killed curve goes on when the same command
    is given again.

    Example: guardbench curve --protocol digits --weights guard.safetensors --arch convnet-d3-bn-small
    """
    from fractions import Fraction

    from rich.console import Console
    from rich.table import Table

    import guardbench
    from guardbench.classifiers import Source, open_classifier
    from guardbench.curve import (
        STEPS,
        above_chance,
        draw_curves,
        in_255ths,
        points_of,
        require_alike,
        rising_radii,
        stored_curve,
    )
    from guardbench.curve_files import Curve, load_curve, save_curve
    from guardbench.data.catalog import dataset_info
    from guardbench.data.dataset import load_split
    from guardbench.devices import make_accelerator
    from guardbench.metrics import wilson
    from guardbench.pipeline import choose_protocol
    from guardbench.progress import Progress
    from guardbench.protocol import list_digest
    from guardbench.runtime import Run
    from guardbench.store import check_writable, explained

    require_alone("curve")
    source = Source(
        weights=weights, arch=arch, python=python, normalisation=normalisation, name=name
    )
    source.require_one()
    chosen = choose_protocol(None, protocol)
    threat = chosen.threat.model
    wanted = rising_radii(radii, threat)
    if output.suffix != ".json":
        raise GuardbenchError(f"--output {output}: must end in .json; the plot ends in .png.")
    earlier = [(path, load_curve(path)) for path in beside or []]
    for folder in (output.parent, Path("guardbench-runs")):
        check_writable(folder)
    console = Console(emoji=False)
    progress = Progress(console)
    run = Run(
        accelerator=make_accelerator(device, "fp32", chosen.resolution),
        workspace=Path("guardbench-runs"), seed=0, progress=progress,
    )  # fmt: skip
    imported = open_classifier(source, chosen, run.device, cache_dir)
    test = load_split(
        chosen.dataset, "val", resolution=chosen.resolution, data_dir=data_dir,
        cache_dir=cache_dir, progress=progress, per_class=1,
    )  # fmt: skip
    order = chosen.test_indices(test.ids)[:images]
    x, y = test.select(order), test.labels[order]
    alike = {"protocol_sha256": chosen.digest, "norm": threat.norm, "steps": STEPS, "total": len(x)}
    require_alike(earlier, alike)
    with explained(run.workspace):
        found, on = stored_curve(
            run, imported, x, y, threat.norm, wanted,
            test_digest=test.digest, images_digest=list_digest(test.ids[i] for i in order),
        )  # fmt: skip
    points, classes = points_of(found, wanted), dataset_info(chosen.dataset).num_classes
    made = Curve(
        classifier=imported.described.name, weights_sha256=imported.described.weights_sha256,
        protocol=chosen.id, **alike, points=points, guardbench=guardbench.__version__, device=on,
        flags=above_chance(points, len(x), classes, threat.norm),
    )  # fmt: skip
    table = Table("eps", "accuracy %", "95% interval")
    for point in made.points:
        low, high = wilson(point.correct / made.total, made.total)
        eps = in_255ths(Fraction(point.eps)) + "/255" if threat.norm == "linf" else point.eps
        table.add_row(eps, f"{100 * point.correct / made.total:.1f}", f"{low:.1f} to {high:.1f}")
    console.print(table)
    for flag in made.flags:
        console.print(f"[yellow]flag:[/yellow] {flag}", highlight=False)
    save_curve(output, made)
    draw_curves(output.with_suffix(".png"), [made, *(curve for _, curve in earlier)])
    console.print(f"curve  {output}\nplot   {output.with_suffix('.png')}", highlight=False)
