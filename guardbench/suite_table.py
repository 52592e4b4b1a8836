"""A suite in print and as JSON: its plan, and what became of it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from guardbench import canonical
from guardbench.errors import GuardbenchError
from guardbench.fields import printable
from guardbench.metrics import Estimate, estimate, worst_case
from guardbench.progress import clock
from guardbench.report import byte_size
from guardbench.suite import Cell, Suite, decoded_bytes
from guardbench.suite_run import Result

RULE = (
    "cells that share a stage run one after another; the group with the least left to do comes first, "
    "and in it the cell that takes least"
)


@dataclass(frozen=True)
class Part:
    """What one command runs of a suite.

    Attributes:
        suite: all of it.
        cells: those of this command, in the order in which they will run; the others of it behind.
        shard: `2/4`, or `1/1`.
        division: digest of which cell falls to which shard: equal in every shard that agrees.
    """

    suite: Suite
    cells: tuple[Cell, ...]
    shard: str
    division: str

    @property
    def refused(self) -> tuple[Cell, ...]:
        """Cells that cannot be run."""
        return tuple(cell for cell in self.cells if cell.plan is None)

    @property
    def shared(self) -> dict[tuple[str, tuple[str, ...]], int]:
        """(name of a stage, the cells that share it) -> how many such stages there are."""
        users: dict[str, list[str]] = {}
        for cell in self.cells:
            for stage in cell.stages:
                users.setdefault(stage, []).append(cell.name)
        found: dict[tuple[str, tuple[str, ...]], int] = {}
        for stage, names in users.items():
            if len(names) > 1:
                key = (self.suite.needs[stage].name.split(" ")[0], tuple(names))
                found[key] = found.get(key, 0) + 1
        return found


def division(shards: Sequence[Sequence[Cell]]) -> str:
    """Twelve digits that two machines compare to know that they deal the cells out alike."""
    return canonical.digest([[cell.name for cell in shard] for shard in shards])[:12]


def require_room(part: Part, folders: Mapping[Path, int]) -> None:
    """Refuses to begin what cannot fit on the disk.

    Args:
        folders: folder -> bytes that it will gain.

    Raises:
        GuardbenchError: a disk has less left than its folders will need.
    """
    disks: dict[int, list[Path]] = {}
    for folder in folders:
        disks.setdefault(_there(folder).stat().st_dev, []).append(folder)
    for on_it in disks.values():
        needed = sum(folders[folder] for folder in on_it)
        free = shutil.disk_usage(_there(on_it[0])).free
        if needed > free:
            names = " and ".join(str(folder) for folder in on_it)
            raise GuardbenchError(
                f"{names}: {len(part.cells)} cells need about {byte_size(needed)} and {byte_size(free)} are "
                "free; free some space, choose another folder with --output or --cache-dir, or run fewer."
            )


def _there(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def room(part: Part, output: Path, cache: Path) -> dict[Path, int]:
    """Folder -> about how many bytes this part will add to it."""
    return {output: part.suite.size(part.cells), cache: decoded_bytes(part.cells)}


def print_plan(console: Console, part: Part, folders: Mapping[Path, int]) -> None:
    """Prints every cell with what is left of it, what is shared, and the time and the disk expected."""
    suite, made = part.suite, list[Cell]()
    table = _table("#", "cell", "stages left", "expected")
    for number, cell in enumerate(part.cells, 1):
        if cell.plan is None:
            table.add_row(str(number), escape(cell.name), "cannot be run", "", style="yellow")
            continue
        if cell.record is not None:
            table.add_row(str(number), escape(cell.name), "done", "", style="dim")
            continue
        left = suite.left([cell]) - suite.left(made)
        whole = len(cell.stages)
        seconds = suite.seconds([*made, cell]) - suite.seconds(made)
        made.append(cell)
        table.add_row(
            str(number),
            escape(cell.name),
            f"{len(left)} of {whole}",
            clock(max(0.0, seconds)),
        )
    console.print(table)
    console.print()
    remarks = Table.grid(padding=(0, 2))
    for head, text in _remarks(part, folders):
        remarks.add_row(head, escape(text))
    console.print(remarks)


def _remarks(part: Part, folders: Mapping[Path, int]) -> list[tuple[str, str]]:
    lines = []
    for (stage, names), count in part.shared.items():
        what = stage if count == 1 else f"{stage} x {count}"
        lines.append(("made once", f"{what}: {', '.join(names)}"))
    reasons: dict[str, list[str]] = {}
    for cell in part.refused:
        reasons.setdefault(cell.refusal, []).append(cell.name)
    for reason, refused in reasons.items():
        lines.append(("cannot be run", f"{', '.join(refused)}: {printable(reason, 1000)}"))
    seconds = part.suite.seconds(part.cells)
    to_do = sum(cell.to_do for cell in part.cells)
    done = sum(cell.record is not None for cell in part.cells)
    disk = [f"{byte_size(size)} in {folder}" for folder, size in folders.items() if size]
    text = f"{done} done, {to_do} to do, {len(part.refused)} cannot be run; about {clock(seconds)}"
    lines.append(("in all", text + (f", {' and '.join(disk)}" if disk else "")))
    if part.shard != "1/1":
        lines.append(
            ("shard", f"{part.shard} of division {part.division}, the same in every shard")
        )
    return [*lines, ("order", RULE)]


def print_summary(console: Console, results: Sequence[Result]) -> None:
    """Prints one row a cell: clean and robust accuracy, state and time."""
    table = _table("cell", "clean %", "ranked by %", "time", "state")
    for each in results:
        clean, ranked, _ = _accuracies(each)
        by = "" if ranked is None or each.cell.plan is None else each.cell.plan.protocol.rank_by
        table.add_row(
            escape(each.cell.name),
            _percent(clean),
            f"{by} {_percent(ranked)}".strip(),
            "" if each.seconds is None else clock(each.seconds),
            each.state,
            style={"failed": "red", "cannot be run": "yellow"}.get(each.state),
        )
    console.print(table)
    for each in results:
        if each.reason:
            line = f"{each.cell.name} {each.state}: {printable(each.reason, 1000)}"
            console.print(escape(line), highlight=False)


def as_json(part: Part, results: Sequence[Result]) -> str:
    """The plan and what became of it."""
    cells = []
    for each in results:
        wanted, suite = each.cell.wanted, part.suite
        clean, ranked, worst = (None if e is None else round(e.mean, 2) for e in _accuracies(each))
        plan = each.cell.plan
        cells.append({
            "name": wanted.name, "method": wanted.method, "protocol": wanted.measured, "ipc": wanted.ipc,
            "set": list(wanted.overrides), "references": wanted.references,
            "state": each.state, "reason": each.reason, "seconds": each.seconds,
            "stages": len(each.cell.stages), "stages_to_do": len(suite.left([each.cell])),
            "expected_seconds_alone": round(suite.seconds([each.cell]), 1),
            "clean": clean, "robust": ranked, "worst_case": worst,
            "ranked_by": None if plan is None else plan.protocol.rank_by,
        })  # fmt: skip
    shared = [
        {"stage": stage, "count": count, "cells": list(names)}
        for (stage, names), count in part.shared.items()
    ]
    found: dict[str, Any] = {
        "shard": part.shard, "division": part.division, "cells": cells, "shared": shared,
        "expected_seconds": round(part.suite.seconds(part.cells), 1),
        "expected_bytes": part.suite.size(part.cells),
    }  # fmt: skip
    return canonical.dumps(found)


def _accuracies(each: Result) -> tuple[Estimate | None, Estimate | None, Estimate | None]:
    """Clean, under the attack that the protocol ranks by, and under the worst of all, where measured."""
    if each.record is None or each.cell.plan is None:
        return None, None, None
    seeds, by = each.record.seeds, each.cell.plan.protocol.rank_by
    found = worst_case(seeds)
    worst = None if found is None else found.estimate
    ranked = worst if by == "worst_case" else estimate([run.attacks[by] for run in seeds])
    return estimate([run.clean for run in seeds]), ranked, worst


def _percent(found: Estimate | None) -> str:
    return "" if found is None else f"{found.mean:.1f}"


def _table(*titles: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title in titles:
        right = title.endswith("%") or title in ("#", "expected", "time")
        table.add_column(title, justify="right" if right else "left", overflow="fold")
    return table
