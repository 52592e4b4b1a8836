"""Files that hold many images each: which of them are a split's, in a folder or a repository of the Hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from guardbench.data.catalog import DatasetInfo, Split
from guardbench.errors import GuardbenchError, brief

HUB = "hf://datasets/"
_SUFFIXES = {"parquet": ".parquet", "tars": ".tar"}
_NUMBERED = re.compile(r"-(\d+)-of-(\d+)(?=\.)")

ShardLayout = Literal["parquet", "tars"]


@dataclass(frozen=True)
class ShardFile:
    """A file: its path or `hf://` address, its name, and what changes when it does."""

    address: str
    name: str
    state: tuple[str, int, int | str]


def shard_layout(info: DatasetInfo, folder: Path) -> ShardLayout | None:
    """Whether `folder` holds parquet shards or tars of either split; None where it holds none."""
    for layout in ("parquet", "tars"):
        if any(_local(info, folder, split, layout) for split in ("train", "val")):
            return layout
    return None


def shard_files(info: DatasetInfo, place: Path | str, split: Split, layout: str) -> list[ShardFile]:
    """The shards of a split, sorted by name.

    Args:
        place: a folder; or the address of a dataset on the Hub, such as `hf://datasets/OWNER/NAME`.
        layout: `parquet` or `tars`.

    Raises:
        GuardbenchError: there are none, one of a numbered row is missing, or the Hub does not answer.
    """
    if isinstance(place, Path):
        found = []
        for path in _local(info, place, split, layout):
            state = path.stat()
            changes = (path.name, state.st_size, state.st_mtime_ns)
            found.append(ShardFile(str(path), path.name, changes))
    else:
        found = _remote(info, place, split, layout)
    if not found:
        words = " or ".join(_words(info, split))
        raise GuardbenchError(
            f"{place}: {info.name} has no {split} split there (looked for {_SUFFIXES[layout]} files "
            f"of {words}); add it, or name another place with --data-dir."
        )
    _require_whole(place, [file.name for file in found])
    return found


def _words(info: DatasetInfo, split: Split) -> tuple[str, ...]:
    """What the files or the folder of a split may be called, the usual one first."""
    if split == "train":
        return ("train",)
    return ("validation", "valid", *info.val_folders)


def _local(info: DatasetInfo, folder: Path, split: Split, layout: str) -> list[Path]:
    suffix = _SUFFIXES[layout]
    for word in _words(info, split):
        inside = _files(folder / word, suffix)
        if inside:
            return inside
        for place in (folder / "data", folder):
            named = [path for path in _files(place, suffix) if _is_of(path.name, word)]
            if named:
                return named
    return []


def _files(folder: Path, suffix: str) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.glob(f"*{suffix}")
        if not path.name.startswith(".") and path.is_file()
    )


def _is_of(name: str, word: str) -> bool:
    """Whether `train-00000-of-00294.parquet` or `imagenet1k-train-0000.tar` is of the split `train`."""
    return word in re.findall(r"[a-z]+", name.lower())


def _remote(info: DatasetInfo, place: str, split: Split, layout: str) -> list[ShardFile]:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    repository, _, revision = place.removeprefix(HUB).partition("@")
    try:
        tree = HfApi().list_repo_tree(
            repository, repo_type="dataset", revision=revision or None, recursive=True
        )
        listed = [
            file
            for file in tree
            if isinstance(file, RepoFile) and file.path.endswith(_SUFFIXES[layout])
        ]
    # Broad on purpose: the library raises its own errors, those of its HTTP client and OSError.
    except Exception as error:
        raise GuardbenchError(
            f"{place}: the Hub does not give its files ({brief(error)}); check the name, the network and "
            "`hf auth login`, or download the dataset and name its folder."
        ) from error
    for word in _words(info, split):
        found = [
            ShardFile(f"{place}/{file.path}", Path(file.path).name, state)
            for file in sorted(listed, key=lambda file: file.path)
            if file.path.count("/") == file.path.startswith("data/")
            and _is_of(Path(file.path).name, word)
            for state in [(file.path, file.size, file.blob_id)]
        ]
        if found:
            return found
    return []


def _require_whole(place: Path | str, names: Sequence[str]) -> None:
    """Refuses a row of `-00000-of-00294` that lacks one."""
    for name in names:
        numbered = _NUMBERED.search(name)
        if numbered is None:
            continue
        width = len(numbered[1])
        for number in range(int(numbered[2])):
            wanted = _NUMBERED.sub(f"-{number:0{width}d}-of-{numbered[2]}", name)
            if wanted not in names:
                raise GuardbenchError(
                    f"{place}: {wanted} is missing beside {name}; get it, for a part of the split is "
                    "another dataset."
                )
        return
