"""What a suite is to run: methods x protocols x IPCs, from a TOML file or from options."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from guardbench.errors import GuardbenchError
from guardbench.fields import Name, Strict
from guardbench.methods import set_mark
from guardbench.protocol import unknown
from guardbench.toml_files import checked, read_toml


class Matrix(Strict):
    """A `[[matrix]]` table: every method under every protocol at every IPC.

    Attributes:
        methods: folders of `baselines/`.
        protocols: ids, or TOML files of one's own, looked for from the suite's folder.
        datasets: each stands for the protocol that is called as it.
        ipcs: images per class.
        set: what is changed in the recipes, as `guardbench run --set` takes it.
        references: as `guardbench run --references`.
    """

    methods: tuple[Name, ...] = Field(min_length=1)
    protocols: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    datasets: tuple[Name, ...] = ()
    ipcs: tuple[Annotated[int, Field(gt=0)], ...] = Field(default=(10,), min_length=1)
    set: tuple[str, ...] = ()
    references: bool = False

    @model_validator(mode="after")
    def _measures(self) -> Matrix:
        if not self.protocols and not self.datasets:
            raise ValueError("protocols: say what to run on, here or as datasets")
        return self


class SuiteFile(Strict):
    """A suite file."""

    matrix: tuple[Matrix, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Wanted:
    """One cell of a matrix: the part of a run's settings that differs between cells.

    Attributes:
        protocol, dataset: one of them, as `guardbench run` takes it; the other is None.
        overrides: as `--set`.
    """

    method: str
    protocol: str | None
    dataset: str | None
    ipc: int
    overrides: tuple[str, ...] = ()
    references: bool = False

    @property
    def measured(self) -> str:
        """The id of the protocol."""
        named = self.protocol or self.dataset or ""
        return Path(named).stem if is_file(named) else named

    @property
    def name(self) -> str:
        """How people are told of it, such as `digits/ipc10/guard`: where its record goes."""
        return f"{self.measured}/ipc{self.ipc}/{self.method}{set_mark(self.overrides)}"


def is_file(protocol: str | None) -> bool:
    """Whether that is a protocol of one's own."""
    return protocol is not None and protocol.endswith(".toml")


def read_suite(path: Path) -> list[Wanted]:
    """The cells of a suite file, in its order.

    Raises:
        GuardbenchError: it cannot be read, a field is wrong, or a cell stands twice; the line names
            file and field.
    """
    suite = checked(SuiteFile, read_toml(path, what="suite"), where=str(path))
    return unique([cell for each in suite.matrix for cell in cells(each, path.parent)], str(path))


def cells(matrix: Matrix, folder: Path) -> list[Wanted]:
    """Every combination; `folder` is where protocols of one's own lie."""
    protocols: list[tuple[str | None, str | None]] = [
        (str(folder / each) if is_file(each) else each, None) for each in matrix.protocols
    ]
    protocols += [(None, each) for each in matrix.datasets]
    return [
        Wanted(method, protocol, dataset, ipc, matrix.set, matrix.references)
        for protocol, dataset in protocols
        for ipc in matrix.ipcs
        for method in matrix.methods
    ]


def unique(found: list[Wanted], where: str) -> list[Wanted]:
    """Refuses cells whose records would be one file; `where` names what holds them."""
    names = [cell.name for cell in found]
    for name in names:
        if names.count(name) > 1:
            raise GuardbenchError(f"{where}: {name} stands twice; name it once.")
    return found


def narrowed(
    found: Sequence[Wanted],
    methods: Collection[str],
    protocols: Collection[str],
    ipcs: Collection[int],
) -> list[Wanted]:
    """Those cells that are of the named methods, protocols and IPCs; nothing named takes all.

    Raises:
        GuardbenchError: no cell is of a name.
    """
    _require("method", methods, {cell.method for cell in found})
    _require("protocol", protocols, {cell.measured for cell in found})
    _require("IPC", map(str, ipcs), {str(cell.ipc) for cell in found})
    kept = [
        cell
        for cell in found
        if (not methods or cell.method in methods)
        and (not protocols or cell.measured in protocols)
        and (not ipcs or cell.ipc in ipcs)
    ]
    if not kept:
        raise GuardbenchError("no cell of the suite is of all that was named; name less.")
    return kept


def _require(what: str, named: Iterable[str], there: set[str]) -> None:
    for name in named:
        if name not in there:
            raise unknown(f"{what} of the suite", name, there)
