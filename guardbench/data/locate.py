"""Where a dataset's images are: a local folder, a finished download, or an address to fetch.

Cheap: it lists a few folders and opens no image.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from guardbench.data.catalog import CATALOG, DatasetInfo, dataset_info
from guardbench.data.files import at_home, cache_root
from guardbench.data.shard_files import HUB, shard_layout
from guardbench.errors import GuardbenchError

DATA_VARIABLE = "GUARDBENCH_DATA"
WORDNET_ID = re.compile(r"n\d{8}")

Kind = Literal["embedded", "folder", "official", "download", "hub"]
Layout = Literal["none", "folders", "cifar-binary", "cifar-python", "parquet", "tars"]

_HOW: dict[Layout, str] = {"parquet": "parquet shards", "tars": "webdataset tars"}


@dataclass(frozen=True)
class Located:
    """Where a dataset is. `path` is None until a download is finished; `url` is set for one.

    Of a dataset on the Hub, which is read from there, `url` is the address and `path` stays None.

    `description` is for the plan; `searched` says where it was looked for before a download.
    """

    name: str
    kind: Kind
    description: str
    path: Path | None = None
    url: str | None = None
    layout: Layout = "none"
    searched: str = ""


@dataclass(frozen=True)
class _Place:
    """A folder to search, and what the user calls it."""

    folder: Path
    said: str
    chosen: bool


def locate(name: str, data_dir: Path | None, *, cache_dir: Path | None = None) -> Located:
    """Finds the dataset `name`: in `data_dir`, GUARDBENCH_DATA, finished downloads, or on-line.

    Each of the first two either contains the dataset's folder or is that folder.

    Args:
        name: a name of the catalogue.
        data_dir: the folder of `--data-dir`, or None; or a dataset of the Hub with parquet shards, as
            `hf://datasets/OWNER/NAME`.
        cache_dir: the cache, as `files.cache_root` takes it.

    Raises:
        GuardbenchError: unknown name; a named folder that is not there, is empty or is misnamed;
            or nothing found of a dataset that cannot be downloaded.
    """
    info = dataset_info(name)
    if info.embedded:
        return Located(name, "embedded", "scikit-learn's own copy, nothing to download")
    address = _hub_address(data_dir)
    if address is not None:
        how = f"parquet shards of {address}, read over the network"
        return Located(name, "hub", how, url=address, layout="parquet")
    downloads = cache_root(cache_dir) / "downloads"
    places = [*_named_places(data_dir), _Place(downloads, str(downloads), chosen=False)]
    for place in places:
        found = _search(info, place)
        if found is not None:
            return found
    searched = f"looked for {_wanted(info)} in {', '.join(place.said for place in places)}"
    if info.archive is None:
        raise GuardbenchError(
            f"{name} was not found ({searched}) and cannot be downloaded without an account: get "
            f"it from {info.homepage}, and {how_to_place(info)}."
        )
    return Located(
        name,
        "download",
        f"download of {info.archive.megabytes} MB from {info.archive.url} into {downloads}",
        url=info.archive.url,
        searched=searched,
    )


def how_to_place(info: DatasetInfo) -> str:
    """What to do by hand so that the dataset is found."""
    splits = f"{{train,{info.val_folders[0]}}}"
    return (
        f"put it in FOLDER/{info.name}/{splits}/<class>/ and name FOLDER with --data-dir "
        f"or {DATA_VARIABLE}"
    )


def layout_of(info: DatasetInfo, folder: Path) -> Layout:
    """How the images lie in `folder`; "none" where it does not look like the dataset's folder."""
    if info.cifar is not None:
        if (folder / info.cifar.train[0]).is_file():
            return "cifar-binary"
        if (folder / info.cifar.python_marker).is_file():
            return "cifar-python"
    shards = shard_layout(info, folder)
    if shards is not None and not _has_class_folders(info, folder):
        return shards
    splits = {"train", *info.val_folders}
    return "folders" if any((folder / split).is_dir() for split in splits) else "none"


def _has_class_folders(info: DatasetInfo, folder: Path) -> bool:
    """Whether a split's folder has folders in it: beside ImageNet's lie its official tars at times."""
    return any(
        entry.is_dir() and not entry.name.startswith(".")
        for split in ("train", *info.val_folders)
        if (folder / split).is_dir()
        for entry in (folder / split).iterdir()
    )


def _hub_address(data_dir: Path | None) -> str | None:
    """The address on the Hub that `--data-dir`, or else the environment, names; a Path loses a slash."""
    named = str(data_dir) if data_dir is not None else os.environ.get(DATA_VARIABLE, "")
    found = re.fullmatch(r"hf:/+datasets/([^/]+/[^/]+)/?", named)
    if found is None and named.startswith("hf:"):
        raise GuardbenchError(f"{named}: a dataset on the Hub is named {HUB}OWNER/NAME.")
    return None if found is None else HUB + found[1]


def _named_places(data_dir: Path | None) -> Iterator[_Place]:
    if data_dir is not None:
        yield _existing(at_home(data_dir, "--data-dir"), "--data-dir")
    named = os.environ.get(DATA_VARIABLE)
    if named and not named.startswith("hf:"):
        yield _existing(at_home(Path(named), DATA_VARIABLE), DATA_VARIABLE)


def _existing(folder: Path, setting: str) -> _Place:
    said = f"{setting} {folder}"
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise GuardbenchError(f"{said} {what}; name the folder that holds the datasets.")
    return _Place(folder, said, chosen=True)


def _wanted(info: DatasetInfo) -> str:
    return " or ".join(f"{folder}/" for folder in info.folders)


def _search(info: DatasetInfo, place: _Place) -> Located | None:
    """The dataset below `place`; None where it is simply not there."""
    hollow: Path | None = None
    for folder in _candidates(info, place.folder):
        layout = layout_of(info, folder)
        if layout != "none":
            return _located(info, folder, layout, place)
        hollow = hollow or folder
    if place.chosen and _is_itself(info, place.folder):
        return _located(info, place.folder, layout_of(info, place.folder), place)
    if hollow is not None:
        raise GuardbenchError(
            f"{hollow}: no images of {info.name} there (looked for train/ and "
            f"{'/ or '.join(info.val_folders)}/, parquet shards and tars); {how_to_place(info)}."
        )
    if place.chosen:
        _refuse_misnamed(info, place)
    return None


def _candidates(info: DatasetInfo, base: Path) -> Iterator[Path]:
    """The folders below `base` that bear one of the dataset's names, down to two levels."""
    for folder in info.folders:
        if (base / folder).is_dir():
            yield base / folder
            yield from (
                base / folder / inner
                for inner in info.folders
                if inner != folder and (base / folder / inner).is_dir()
            )


def _is_itself(info: DatasetInfo, folder: Path) -> bool:
    """Whether `folder` is the dataset's own folder, and not another dataset's or a plain parent."""
    layout = layout_of(info, folder)
    others = {known for entry in CATALOG.values() if entry is not info for known in entry.folders}
    if layout == "none" or folder.resolve().name in others:
        return False
    if layout != "folders" or folder.resolve().name in info.folders:
        return True
    inside = [
        entry.name
        for split in ("train", *info.val_folders)
        if (folder / split).is_dir()
        for entry in (folder / split).iterdir()
    ]
    if info.classes:
        return not set(info.classes).isdisjoint(inside)
    return any(WORDNET_ID.fullmatch(name) for name in inside)


def _located(info: DatasetInfo, folder: Path, layout: Layout, place: _Place) -> Located:
    annotated = (folder / "val" / "val_annotations.txt").is_file()
    official = layout != "folders" or annotated
    how = _HOW.get(layout, "official files" if official else "folders")
    source = f"named by {place.said.split()[0]}" if place.chosen else "downloaded before"
    return Located(
        info.name,
        "official" if official else "folder",
        f"{how} in {folder} ({source})",
        path=folder,
        layout=layout,
    )


def _refuse_misnamed(info: DatasetInfo, place: _Place) -> None:
    """Tells of an empty data folder, or a slip in a name, instead of downloading over it."""
    known = {folder for entry in CATALOG.values() for folder in entry.folders}
    inside = sorted(
        entry.name for entry in place.folder.iterdir() if not entry.name.startswith(".")
    )
    if not inside:
        raise GuardbenchError(f"{place.said} is empty; {how_to_place(info)}.")
    if layout_of(info, place.folder) != "none" and place.folder.resolve().name not in known:
        raise GuardbenchError(
            f"{place.said} has split folders, but none of their class folders is of {info.name}; "
            f"{how_to_place(info)}."
        )
    others = [name for name in inside if name not in known and (place.folder / name).is_dir()]
    near = difflib.get_close_matches(info.name, others, n=1, cutoff=0.8)
    if info.classes:  # so that its own class folders, or official files, tell it from a stranger
        near += [name for name in others if _is_itself(info, place.folder / name)]
    if near:
        raise GuardbenchError(
            f"{place.said} holds {near[0]!r} but no {info.name!r}: rename that folder to "
            f"{info.name!r} if it is the dataset, or name another folder."
        )
