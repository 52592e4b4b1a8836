"""`guardbench convert`: a submission out of what another tool wrote."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class LayoutName(str, Enum):
    """The two orders of axes, for the option's choices."""

    nchw = "nchw"
    nhwc = "nhwc"


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="Class folders of JPEG or PNG (SRe2L's new000/...), res_*.pt (DC, DSA, DM), "
            "images_*.pt with labels_*.pt beside it (MTT, TESLA), .npz, .npy, other .pt or .pth, "
            ".safetensors, or a folder that holds one of them. Code in a file is never run.",
        ),
    ],
    output: Annotated[
        Path, typer.Option(help="The submission's folder, which must not be there or be empty.")
    ],
    dataset: Annotated[str, typer.Option(help="What was distilled: cifar10, imagenette, ...")],
    name: Annotated[
        str | None,
        typer.Option(help="Of the submission; by default the folder's.", show_default=False),
    ] = None,
    layout: Annotated[
        LayoutName | None,
        typer.Option(help="The order of axes, where the shape leaves it open.", show_default=False),
    ] = None,
    normalisation: Annotated[
        str | None,
        typer.Option(
            help="What the values are in: imagenet, cifar10, cifar10-dc, cifar100, svhn, mnist, "
            "fashion-mnist, half ([-1, 1]), bytes (0 to 255), none ([0, 1]), or numbers such as "
            "0.5,0.5,0.5/0.2,0.2,0.2. By default it is found out, or refused.",
            show_default=False,
        ),
    ] = None,
    zca: Annotated[
        Path | None,
        typer.Option(
            help="A .npz or .safetensors with mean [D] and matrix [D, D], inverse [D, D] or both: the "
            "whitening (x - mean) @ matrix that the images are in, which is undone.",
            show_default=False,
        ),
    ] = None,
    experiment: Annotated[
        int | None,
        typer.Option(
            help="Of res_*.pt: which, from 0; by default the last.", min=0, show_default=False
        ),
    ] = None,
    ipc: Annotated[
        int | None,
        typer.Option(
            help="Images per class; without labels in the file, that many of each class in order.",
            min=1,
            show_default=False,
        ),
    ] = None,
    clip: Annotated[
        bool, typer.Option("--clip", help="Cut off values outside [0, 1], and say how many.")
    ] = False,
) -> None:
    """Make a submission of a distilled set that another tool wrote, and say what was assumed.

    Example: guardbench convert syn_data --output submissions/mine --dataset imagenette
    """
    from rich.console import Console

    from guardbench.data.catalog import dataset_info
    from guardbench.submissions.convert import check_vacant, write_submission
    from guardbench.submissions.convert import convert as read
    from guardbench.submissions.form import FILL_IN, FORM

    info = dataset_info(dataset)
    check_vacant(output)
    converted = read(
        source,
        layout=layout.value if layout else None,
        normalisation=normalisation,
        zca=zca,
        ipc=ipc,
        experiment=experiment,
        clip=clip,
        info=info,
    )
    own = output.absolute().name
    write_submission(converted, output, name=name or own, info=info, source=source)
    console = Console(emoji=False, markup=False, highlight=False, soft_wrap=True)
    for line in converted.said:
        title, _, text = line.partition(": ")
        console.print(f"  {title:<14} {text}")
    console.print(f"  {'written':<14} {output}")
    if name not in (None, own):
        console.print(f"  {'name':<14} {name}: call the folder so before you check it")
    console.print(f"Open {output / FORM}, replace what begins with {FILL_IN}, and set extra_data.")
    console.print(f"Then: guardbench submission check {output}")
