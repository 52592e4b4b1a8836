"""What people have, as a submission: images in [0, 1] and labels, with all that was assumed.

Nothing is guessed where two readings would both make sense, and nothing is cut off in silence: a
wrong normalisation gives images that train, and a row that nobody can explain.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save
from torch import Tensor

from guardbench.data.catalog import DatasetInfo
from guardbench.distilled import IMAGES, PREVIEW, save_preview
from guardbench.errors import GuardbenchError
from guardbench.fields import HIDDEN, Name, printable
from guardbench.store import check_writable, explained, write_bytes, write_text
from guardbench.submissions.form import FILL_IN, FORM, Data, Submission, form_text
from guardbench.submissions.labels import read_labels
from guardbench.submissions.pixels import (
    LAYOUTS,
    Ranged,
    channels_first,
    check_tensor,
    in_pieces,
    load_whitening,
    to_unit,
)
from guardbench.submissions.sources import Source, read_source

_LARGE = ("tiny-imagenet", "imagenette", "imagenet")
# What the authors' scripts subtract and divide by, per dataset of the catalogue.
_DC: dict[str, tuple[str, ...]] = {
    "cifar10": ("cifar10-dc",),
    "cifar100": ("cifar10-dc", "cifar100"),
    **dict.fromkeys(_LARGE, ("imagenet",)),
}
_MTT: dict[str, tuple[str, ...]] = dict.fromkeys(_LARGE, ("imagenet",))


@dataclass(frozen=True)
class Converted:
    """A distilled set as every part of guardbench takes it.

    Attributes:
        images: float32 [N, C, R, R] in [0, 1].
        labels: int64 [N], every class of 0 to K - 1 equally often.
        soft: float32 [N, K], rows sum to 1, or None.
        said: what was found and assumed, one line each, for the user.
    """

    images: Tensor
    labels: Tensor
    soft: Tensor | None
    said: tuple[str, ...]

    @property
    def ipc(self) -> int:
        """Images per class."""
        return int((self.labels == 0).sum())

    @property
    def classes(self) -> int:
        """K: labels are 0 to K - 1."""
        return int(self.labels.max()) + 1


def convert(
    source: Path,
    *,
    layout: str | None = None,
    normalisation: str | None = None,
    zca: Path | None = None,
    ipc: int | None = None,
    classes: int | None = None,
    experiment: int | None = None,
    clip: bool = False,
    info: DatasetInfo | None = None,
) -> Converted:
    """Reads a distilled set that another tool wrote.

    | source | written by |
    |---|---|
    | folder of class folders of JPEG or PNG | SRe2L (`new000/class000_id000.jpg`), and others |
    | `res_*.pt` | DC, DSA, DM: `data`, a list of [images, labels], one an experiment |
    | `images_*.pt`, with `labels_*.pt` beside it | MTT, TESLA |
    | `.pt`, `.npz`, `.npy`, `.safetensors` | anything with images and labels in it |

    Args:
        source: a file, or a folder that holds one of these.
        layout: `nchw` or `nhwc`, where the shape leaves both open.
        normalisation: what the values are: a name of `NORMALISATIONS` or `MEAN,.../STD,...`.
        zca: the whitening that the values are in, see `load_whitening`; it is undone first.
        ipc: images per class, where the labels are missing; checked where they are there.
        classes: K; that of `info` if None.
        experiment: of a `res_*.pt`, from 0; the last if None.
        clip: whether values further outside [0, 1] than 1/510 are cut off.
        info: the dataset, which names the classes, the channels and what DC normalises with.

    Raises:
        GuardbenchError: it cannot be read, or what it means cannot be known; the line says what would.
    """
    if layout is not None and layout not in LAYOUTS:
        raise GuardbenchError(f"--layout {layout}: choose {' or '.join(LAYOUTS)}.")
    if ipc is not None and ipc < 1:
        raise GuardbenchError(f"--ipc {ipc}: is at least 1.")
    found = read_source(source, experiment=experiment, info=info)
    said = list(found.said)
    if found.kind == "folders" and (normalisation is not None or zca is not None or layout):
        raise GuardbenchError(
            f"{source}: image files hold plain pixels; leave out --normalisation, --zca and --layout."
        )
    images, how = channels_first(
        check_tensor(found.images, f"{found.where}: images"),
        found.where,
        layout=layout,
        channels=info.channels if info else None,
    )
    said.append(how if found.kind != "folders" else how.partition(", shape")[0])
    ranged = _ranged(found, info, normalisation, clip)
    if zca is not None:
        whitening = load_whitening(zca)
        images = whitening.undo(in_pieces(images, lambda piece: piece), found.where)
        said.append(f"whitening: undone with {printable(zca.name)}")
        if normalisation is None:
            ranged = replace(ranged, normalisation="none", source="as MTT whitens plain pixels")
    images, lines = to_unit(images, found.where, ranged)
    hard, soft, more = read_labels(
        found.labels,
        found.soft,
        found.where,
        count=len(images),
        ipc=ipc,
        classes=classes or (info.num_classes if info else None),
    )
    return Converted(images.contiguous(), hard, soft, (*said, *lines, *more))


def _ranged(
    found: Source, info: DatasetInfo | None, normalisation: str | None, clip: bool
) -> Ranged:
    """What may be guessed of a source's values: a tool's own normalisation before all known ones."""
    ranged = Ranged(normalisation, clip=clip)
    if normalisation is not None:
        return ranged
    if found.kind == "folders":
        return replace(ranged, normalisation="bytes", source="as in image files of 8 bits")
    if found.unwhitened:
        return replace(ranged, normalisation="none", source="as MTT un-whitens to plain pixels")
    known = {"dc": _DC, "mtt": _MTT}.get(found.kind, {})
    own = known.get(info.name) if info else None
    if own is not None and info is not None:
        tool = "DC" if found.kind == "dc" else "MTT"
        return replace(ranged, candidates=own, why=f"that {tool} uses for {info.name}")
    if found.kind == "mtt":
        # Whitened values lie within what a normalisation could give, so the range tells nothing.
        return replace(
            ranged,
            advice="MTT whitens the CIFARs unless told not to, and the values cannot tell: say "
            "--zca FILE (mean, and matrix or inverse), or --normalisation cifar10-dc if it ran without "
            "ZCA, or name the images_zca_*.pt of the same run, which are pixels.",
        )
    return ranged


def check_vacant(folder: Path) -> None:
    """Raises a GuardbenchError where `folder` is anything but absent or an empty folder."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise GuardbenchError(f"{folder}: is no folder; choose another with --output.")
    if folder.is_dir() and any(folder.iterdir()):
        raise GuardbenchError(f"{folder}: is not empty; choose another with --output.")
    check_writable(folder)


def write_submission(
    converted: Converted, folder: Path, *, name: str, info: DatasetInfo, source: Path
) -> None:
    """Writes images, a preview and the form into `folder`: all of them, or nothing.

    Args:
        folder: absent or empty.
        name: of the submission, which must be a name that the form allows.
        info: the dataset.
        source: what was converted; its last part is named in the form.

    Raises:
        GuardbenchError: `folder` is in use or cannot be written, or `name` is no name.
    """
    check_vacant(folder)
    text = write_form(converted, name=name, info=info, source=source)
    names = info.names or info.classes or tuple(f"class {k}" for k in range(converted.classes))
    with explained(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
        try:
            part.chmod(0o755)
            tensors = {"images": converted.images, "labels": converted.labels}
            if converted.soft is not None:
                tensors["soft"] = converted.soft.contiguous()
            write_bytes(part / IMAGES, save(tensors))
            save_preview(part / PREVIEW, converted.images, converted.labels, names)
            write_text(part / FORM, text)
            if folder.is_dir():
                folder.rmdir()  # refuses, should it have been filled meanwhile
            part.replace(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def write_form(converted: Converted, *, name: str, info: DatasetInfo, source: Path) -> str:
    """The text of `submission.toml`, with `FILL_IN` where only the authors know.

    `extra_data` is true until they say otherwise, which is the claim that costs them and no reader.

    Raises:
        GuardbenchError: `name` is no name that the form allows.
    """
    try:
        TypeAdapter(Name).validate_python(name)
    except ValidationError:
        raise GuardbenchError(
            f"--name {printable(name, 80)}: is not made of at most 64 lower-case letters, digits and "
            "._+-; choose such a name."
        ) from None
    made = f"{FILL_IN} how it was made. Converted from {source.name}: {'; '.join(converted.said)}."
    form = Submission(
        name=name,
        title=name,
        authors=(f"{FILL_IN} the authors",),
        licence=f"{FILL_IN} the licence of the images, such as CC-BY-4.0",
        dataset=info.name,
        resolution=converted.images.shape[-1],
        ipc=converted.ipc,
        labels="hard" if converted.soft is None else "soft",
        made=_plain(made)[:2000],
        extra_data=True,
        data=Data(kind="safetensors", path=IMAGES),
    )
    return form_text(form)


def _plain(text: str) -> str:
    """The text with what the form forbids shown as a question mark."""
    return re.sub(f"[{HIDDEN}<>]", "?", text)
