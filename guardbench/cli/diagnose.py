"""`guardbench diagnose`: curvature, gradients and the paper's bound, as a table, a plot and JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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

if TYPE_CHECKING:
    from rich.console import Console

    from guardbench.classifiers import Source
    from guardbench.diagnosed import Diagnosed, Diagnosis

DIAGNOSIS, PLOT = "diagnosis.json", "diagnosis.png"


def diagnose(
    protocol: Annotated[
        str, typer.Option(help="Whose images and threat: an id such as digits, or your FILE.toml.")
    ],
    weights: Weights = None,
    arch: Arch = None,
    python: Python = None,
    normalisation: Normalisation = None,
    name: Annotated[
        str | None,
        typer.Option(
            help="In the table and the plot; by default the file's name.", show_default=False
        ),
    ] = None,
    beside: Annotated[
        list[str] | None,
        typer.Option(
            help="Other weights of the same --arch, as FILE or NAME=FILE; may be repeated.",
            show_default=False,
        ),
    ] = None,
    distilled: Annotated[
        list[Path] | None,
        typer.Option(
            help="The folder (with manifest.json) of the set a student was trained on: adds sigma and L. "
            "Once for all classifiers, or once for each in their order.",
            show_default=False,
        ),
    ] = None,
    images: Annotated[
        int, typer.Option(help="The first of the protocol's images; at most all.", min=1)
    ] = 256,
    tolerance: Annotated[
        float,
        typer.Option(
            help="Of an eigenvalue's residual, as a share of the eigenvalue.", min=1e-12, max=1
        ),
    ] = 1e-3,
    iterations: Annotated[
        int, typer.Option(help="Of the power iteration, at most, an image.", min=1)
    ] = 100,
    device: Device = "auto",
    data_dir: DataDir = None,
    cache_dir: CacheDir = None,
    output: Annotated[Path, typer.Option(help=f"The folder for {DIAGNOSIS} and {PLOT}.")] = Path(
        "diagnosis"
    ),
) -> None:
    """Measure why a classifier is robust or not: curvature, gradients, each term of GUARD's bound.

    For each image: the largest eigenvalue of the loss's Hessian in the image, the gradient, and the loss
    under the protocol's PGD. The paper's bound is printed beside that loss, term by term, with the
    first-order term that it leaves out.

    Example: guardbench diagnose --protocol digits --weights guard.safetensors --arch convnet-d3-bn-small
    --beside sre2l.safetensors
    """
    import math

    from rich.console import Console

    import guardbench
    from guardbench.classifiers import Source, open_classifier
    from guardbench.curvature import l2_radius
    from guardbench.devices import device_name, make_accelerator
    from guardbench.diagnosed import Diagnosis, draw_diagnosis, save_diagnosis
    from guardbench.diagnosis import Measure, load_real, open_distilled, pgd_of
    from guardbench.diagnosis import diagnose as diagnose_one
    from guardbench.pipeline import choose_protocol
    from guardbench.progress import Progress
    from guardbench.store import check_writable

    require_alone("diagnose")
    first = Source(
        weights=weights, arch=arch, python=python, normalisation=normalisation, name=name
    )
    first.require_one()
    sources = named_apart(first, beside or [])
    folders = spread_over(distilled or [], len(sources))
    chosen = choose_protocol(None, protocol)
    how = Measure(
        threat=chosen.threat.model,
        attack=pgd_of(chosen),
        tolerance=tolerance,
        iterations=iterations,
    )
    check_writable(output)
    where = make_accelerator(device, "fp32", chosen.resolution).device
    models = [open_classifier(source, chosen, where, cache_dir) for source in sources]
    console = Console(emoji=False)
    progress = Progress(console)

    real = load_real(
        chosen, images, train=bool(distilled), data_dir=data_dir, cache_dir=cache_dir,
        progress=progress,
    )  # fmt: skip
    sets = [
        open_distilled(folder, chosen, real.train) if folder and real.train else None
        for folder in folders
    ]
    found = Diagnosis(
        protocol=chosen.id, protocol_sha256=chosen.digest, norm=how.threat.norm,
        eps=str(how.threat.eps), rho=l2_radius(how.threat, math.prod(real.x.shape[1:])),
        attack=f"PGD-{how.attack.steps}, step {how.attack.step}", tolerance=tolerance,
        iterations=iterations, total=len(real.x), guardbench=guardbench.__version__,
        device=device_name(where),
        models=tuple(
            diagnose_one(model, real, of, how, progress) for model, of in zip(models, sets, strict=True)
        ),
    )  # fmt: skip
    # Written first: `guardbench diagnose ... | head` ends here with the pipe.
    save_diagnosis(output / DIAGNOSIS, found)
    draw_diagnosis(output / PLOT, found)
    print_diagnosis(console, found)
    console.print(f"values  {output / DIAGNOSIS}\nplot    {output / PLOT}", highlight=False)


def named_apart(first: Source, beside: list[str]) -> list[Source]:
    """The classifiers to measure: the first, and one for each FILE or NAME=FILE of `--beside`.

    Files of one name, as the students of a workspace are, get their folder's name before it.

    Raises:
        GuardbenchError: `--beside` without `--weights`, or two classifiers that are called alike.
    """
    from dataclasses import replace

    if beside and first.weights is None:
        raise GuardbenchError("--beside: needs --weights and --arch, which its files share.")
    sources = [first]
    for text in beside:
        title, equals, file = text.partition("=")
        whole = not equals or Path(text).is_file()
        sources.append(
            replace(first, weights=Path(text if whole else file), name=None if whole else title)
        )
    stems = [source.weights.stem for source in sources if source.weights is not None]
    for place, source in enumerate(sources):
        path = source.weights
        if source.name is None and path is not None and stems.count(path.stem) > 1:
            sources[place] = replace(source, name=f"{path.absolute().parent.name}-{path.stem}")
    names = [source.name or (source.weights.stem if source.weights else "") for source in sources]
    for title in names:
        if names.count(title) > 1:
            raise GuardbenchError(
                f"--beside: two classifiers are called {title}; say NAME=FILE, and --name for the first."
            )
    return sources


def spread_over(folders: list[Path], count: int) -> list[Path | None]:
    """One distilled set, or none, for each of `count` classifiers.

    Raises:
        GuardbenchError: neither one for all nor one for each.
    """
    if not folders:
        return [None] * count
    if len(folders) not in (1, count):
        raise GuardbenchError(
            f"--distilled: {len(folders)} folders for {count} classifiers; give one for all, or one each."
        )
    return [*folders] * (count if len(folders) == 1 else 1)


def print_diagnosis(console: Console, found: Diagnosis) -> None:
    """Prints the tables, and what each number is."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("mean over images", box=None, pad_edge=False)
    for model in found.models:
        table.add_column(model.classifier.name, justify="right", overflow="fold")
    columns = [_column(model) for model in found.models]
    for row in columns[0]:
        table.add_row(escape(row), *(column[row] for column in columns))
    console.print()
    console.print(table)
    if any(model.shift is not None for model in found.models):
        console.print()
        _print_shift(console, found.models)
    console.print()
    for line in _notes(found):
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _column(model: Diagnosed) -> dict[str, str]:
    """One classifier's numbers by what they are."""
    from statistics import fmean, median, quantiles

    images, terms = model.images, model.terms
    values = list(images.eigenvalue)
    tenth = quantiles(values, n=10, method="inclusive")[-1] if len(values) > 1 else values[0]
    missed = images.converged.count(False)
    return {
        "accuracy, clean": f"{100 * fmean(images.correct):.1f}%",
        "lambda_1: mean": f"{fmean(values):.4g}",
        "lambda_1: median": f"{median(values):.4g}",
        "lambda_1: 9 of 10 below": f"{tenth:.4g}",
        "lambda_1: largest": f"{max(values):.4g}",
        "lambda_1: not converged": f"{missed} of {len(values)}",
        "largest residual / lambda_1": f"{_worst_residual(model):.1g}",
        "||grad||_2": f"{fmean(images.gradient_l2):.4g}",
        "||grad||_1": f"{fmean(images.gradient_l1):.4g}",
        "E[l], clean loss": f"{terms.clean:.4g}",
        "+ rho^2/2 E[lambda_1]": f"{terms.curvature:.4g}",
        "= the paper's bound, sigma 0": f"{terms.paper:.4g}",
        "measured under PGD": f"{terms.adversarial:.4g}",
        "it lies under the bound": _verdict(terms.under_paper, terms.share_paper),
        "first order, eps E||grad||": f"{terms.first_order:.4g}",
        "bound with the first order": f"{terms.second_order:.4g}",
        "it lies under that": _verdict(terms.under_second_order, terms.share_second_order),
    }


def _worst_residual(model: Diagnosed) -> float:
    pairs = zip(model.images.residual, model.images.eigenvalue, strict=True)
    return max((residual / abs(value) for residual, value in pairs if value), default=0.0)


def _verdict(under: bool, share: float | None) -> str:
    of = "" if share is None else f" ({100 * share:.0f}% of images)"
    return f"{'yes' if under else 'no'}{of}"


def _print_shift(console: Console, models: tuple[Diagnosed, ...]) -> None:
    """The distances between distilled and real features, and the bound as the paper states it."""
    from rich.table import Table

    having = [(model.classifier.name, model.shift) for model in models if model.shift is not None]
    table = Table("sigma (spread of the real)", box=None, pad_edge=False)
    for title, _ in having:
        table.add_column(title, justify="right", overflow="fold")
    for rows in zip(*(shift.classes for _, shift in having), strict=True):
        table.add_row(rows[0].name, *(f"{row.sigma:.3g} ({row.spread:.3g})" for row in rows))
    table.add_row("mean over classes", *(f"{shift.sigma:.4g}" for _, shift in having))
    table.add_row("L, at least", *(f"{shift.lipschitz:.4g}" for _, shift in having))
    table.add_row("L sigma", *(f"{shift.terms.shift:.4g}" for _, shift in having))
    table.add_row("the paper's bound", *(f"{shift.terms.paper:.4g}" for _, shift in having))
    table.add_row("distilled, under PGD", *(f"{s.terms.adversarial:.4g}" for _, s in having))
    table.add_row(
        "it lies under the bound", *(_verdict(s.terms.under_paper, None) for _, s in having)
    )
    console.print(table)


def _notes(found: Diagnosis) -> list[str]:
    """What the numbers are, in lines for the foot of the table."""
    holds = "eps sqrt(CHW), the smallest l2 ball that holds the l-inf box"
    ball = holds if found.norm == "linf" else "eps"
    lines = [
        f"{found.total} images of {found.protocol}; {found.norm} eps {found.eps}; rho = {found.rho:.4g} "
        f"({ball}); {found.attack}, all steps on all images: at most the true adversarial loss.",
        "The paper's bound takes the loss for convex and quadratic within rho and drops the gradient; the "
        "last rows bring that back. Where a loss lies under neither, it is not quadratic there.",
        "lambda_1 of a ReLU network is the softmax's part alone: never negative, and blind to the kinks.",
    ]
    if any(model.shift is not None for model in found.models):
        lines.append(
            "sigma: between the mean features of distilled and real training images of a class; L: the "
            "steepest secant of the loss under PGD between two measured images of a class, a lower bound "
            "of the Lipschitz constant, so that L sigma may be larger."
        )
    return lines
