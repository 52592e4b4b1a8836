"""The pages: templates filled in, the same bytes for the same boards, written whole."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

import jinja2

import guardbench
from guardbench import canonical
from guardbench.errors import GuardbenchError
from guardbench.fields import printable
from guardbench.metrics import beard
from guardbench.progress import clock
from guardbench.report import byte_size
from guardbench.site import view
from guardbench.site.charts import board_data, row_data
from guardbench.site.read import TRACKS, Entry, Shown
from guardbench.store import read_text, write_bytes

LISTING = "guardbench-site.json"
"""What a build has written, so that the next one removes what is no longer there and nothing else."""

POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self' 'unsafe-inline'",
    "img-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
}
"""The Content-Security-Policy: nothing but the site's own files, no code in a page, no request elsewhere.

plotly.js styles what it draws by `<style>` and `style=`, hence 'unsafe-inline' for styles alone."""


def render(boards: Sequence[Shown]) -> dict[str, bytes]:
    """Every file of the site of what `read_boards` gives, path from its root -> content."""
    pages = _Pages()
    files: dict[str, bytes] = {
        "index.html": pages.make("index.html", "", groups=_by_dataset(boards))
    }
    for shown in boards:
        files[f"{shown.folder}.html"] = pages.make(
            "board.html", "../../", shown=shown, head=shown.board.protocol, data=board_data(shown)
        )
        for entry in shown.entries:
            files[f"{shown.folder}/{entry.slug}.html"] = pages.row(shown, entry)
            if entry.picture is not None:
                files[f"{shown.folder}/{entry.slug}.png"] = entry.picture.data
    static = resources.files("guardbench.site") / "static"
    for name in ("site.css", "site.js", "icon.svg"):
        files[f"assets/{name}"] = (static / name).read_bytes()
    if any(shown.entries for shown in boards):
        files["assets/plotly.min.js"] = _plotly()
    return dict(sorted(files.items()))


class _Pages:
    """The templates. Whatever they print is escaped, and a name that is not there is an error."""

    def __init__(self) -> None:
        self._env = jinja2.Environment(
            loader=jinja2.PackageLoader("guardbench.site"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._env.policies["json.dumps_kwargs"] = {
            "sort_keys": True,
            "allow_nan": False,
            "separators": (",", ":"),
        }
        self._env.filters |= {
            "percent": "{:.1f}".format,
            "clock": clock,
            "bytes": byte_size,
            "https": view.https,
        }
        self._env.globals |= {
            "policy": "; ".join(f"{name} {value}" for name, value in POLICY.items()),
            "version": guardbench.__version__,
            "tracks": TRACKS,
            "tied": view.tied,
            "distinct": view.distinct,
            "attack_words": view.attack_words,
        }

    def make(self, template: str, up: str, **words: Any) -> bytes:
        """One page; `up` leads from its folder to the site's root."""
        return self._env.get_template(template).render(up=up, **words).encode()

    def row(self, shown: Shown, entry: Entry) -> bytes:
        """The page of a row."""
        return self.make(
            "row.html",
            "../../../",
            shown=shown,
            entry=entry,
            row=entry.row,
            head=shown.board.protocol,
            record=entry.record,
            lines=view.lines(shown, entry),
            checks=view.checks(entry.record),
            stages=view.stages(entry.record),
            beard=beard(entry.record),
            references=view.references(entry.record),
            command=view.command(entry.record, area=entry.row.area, path=entry.row.record.path),
            curves=[(name, curve, view.curve_points(curve)) for name, curve in entry.curves],
            data=row_data(entry),
        )


def _by_dataset(boards: Sequence[Shown]) -> list[tuple[str, list[Shown]]]:
    def dataset(shown: Shown) -> str:
        return shown.board.protocol.dataset

    return [
        (name, list(group)) for name, group in groupby(sorted(boards, key=dataset), key=dataset)
    ]


def _plotly() -> bytes:
    from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

    return str(get_plotlyjs()).encode()


def write_site(folder: Path, files: Mapping[str, bytes]) -> int:
    """Writes what differs, each file whole, and removes what an earlier build wrote and this did not.

    Args:
        folder: of the site; other files in it are left alone.
        files: what `render` gives.

    Returns:
        How many files were written or removed.

    Raises:
        GuardbenchError: a file is in the way that no earlier build has written, or it cannot be written.
    """
    earlier = set(_earlier(folder))
    taken = [name for name in files if (folder / name).exists() and name not in earlier]
    if taken:
        raise GuardbenchError(
            f"{printable(str(folder / taken[0]))}: is there and not of an earlier build; choose another "
            "folder with --output."
        )
    # The list first, of both: a build that is killed leaves nothing that the next one does not know.
    _list(folder, earlier | files.keys())
    changes = 0
    for name, content in files.items():
        target = folder / name
        if not target.is_file() or target.read_bytes() != content:
            write_bytes(target, content)
            changes += 1
    for name in sorted(earlier - files.keys()):
        target = folder / name
        if target.is_file():
            target.unlink()
            changes += 1
            while target.parent != folder and not any(target.parent.iterdir()):
                target = target.parent
                target.rmdir()
    _list(folder, files.keys())
    return changes


def _list(folder: Path, names: Iterable[str]) -> None:
    text = canonical.dumps(sorted(names)).encode()
    path = folder / LISTING
    if not path.is_file() or path.read_bytes() != text:
        write_bytes(path, text)


def _earlier(folder: Path) -> Iterator[str]:
    """What the last build wrote; of its list only names inside the folder that a site can have."""
    path = folder / LISTING
    if not path.is_file():
        return
    try:
        names = json.loads(read_text(path, what="list of files", limit=16 << 20))
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list):
        raise GuardbenchError(
            f"{printable(str(path))}: not the list of files of an earlier build; choose another folder "
            "with --output."
        )
    for name in names:
        parts = PurePosixPath(name).parts if isinstance(name, str) and name.isprintable() else ()
        ours = parts[:1] in (("assets",), ("boards",)) or parts == ("index.html",)
        if (
            ours
            and ".." not in parts
            and (folder / name).resolve().is_relative_to(folder.resolve())
        ):
            yield name
