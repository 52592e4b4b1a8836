"""Records and boards as text: the table after a run, and how a board differs from its records."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from guardbench.leaderboard import stale_boards
from guardbench.metrics import Estimate, estimate, worst_case
from guardbench.progress import clock
from guardbench.records import AnyRecord, ClassifierRecord, StageCost, printable


def print_record(
    console: Console,
    record: AnyRecord,
    *,
    threat: str | None = None,
    paths: Mapping[str, Path] | None = None,
) -> None:
    """Prints what was measured, the accuracies, the cost of each stage, and where files are.

    Fits 80 columns with three seeds; plain text where the console is no terminal.

    Args:
        console: where to.
        record: the result.
        threat: the protocol's threat model, such as `linf 1/255`; left out when None.
        paths: what a file is -> the file, printed last.
    """
    for line in _head(record, threat):
        console.print(escape(line), highlight=False)
    for flag in record.flags:
        console.print(f"[yellow]flag:[/yellow] {escape(flag)}", highlight=False)
    console.print()
    console.print(_accuracies(record))
    for line in _footnotes(record):
        console.print(f"[dim]{escape(line)}[/dim]", highlight=False)
    console.print()
    console.print(_costs(record))
    console.print()
    width = max((len(what) for what in paths or {}), default=0)
    for what, path in (paths or {}).items():
        line = escape(f"{what:<{width}}  {printable(str(path), 4096)}")
        console.print(line, highlight=False, soft_wrap=True)


def _head(record: AnyRecord, threat: str | None) -> list[str]:
    made = record.provenance
    precision = ", ".join(f"{stage} {kind}" for stage, kind in made.precision.items())
    under = f"protocol   {record.protocol} ({record.protocol_sha256[:12]})"
    engine = "guardbench's" if made.engine == "guardbench" else "pyautoattack's own (reference)"
    return [
        *_subject(record, under + (f", threat {threat}" if threat else "")),
        f"made by    guardbench {made.guardbench}, torch {made.versions.get('torch', '?')}, "
        f"commit {(made.commit or 'none')[:12]}",
        f"engine     {engine}",
        f"on         {made.device}, {made.threads} threads"
        + (f"; precision: {precision}" if precision else ""),
    ]


def _subject(record: AnyRecord, under: str) -> list[str]:
    """Who was measured, in what way."""
    if isinstance(record, ClassifierRecord):
        found = record.classifier
        sha = "" if found.weights_sha256 is None else f" ({found.weights_sha256[:12]})"
        return [
            f"{found.name} on {record.dataset} at {record.resolution} px",
            under,
            f"network    {found.arch}, {found.parameters} parameters",
            f"weights    {found.weights}{sha}",
            f"pixels     normalised as {found.normalisation}",
        ]
    method, artifact = record.method, record.artifact
    parts = method.distiller
    if method.regulariser != "none":
        parts += f" + {method.regulariser}"
    return [
        f"{method.title} ({method.name}) on {record.dataset} at {record.resolution} px, "
        f"{record.ipc} images per class",
        under,
        f"recipe     {parts}, {'official' if method.official else 'own'} settings "
        f"({method.recipe_sha256[:12]})",
        f"student    is given {artifact.images} images, {_size(artifact.image_bytes)}, and "
        f"{artifact.label_kind} labels, {_size(artifact.label_bytes)}",
    ]


def _accuracies(record: AnyRecord) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("measurement", overflow="fold")
    for title in ("images x seeds", "mean %", "95% interval"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("per seed", overflow="fold")
    worst = worst_case(record.seeds)
    _add(table, "clean", estimate([run.clean for run in record.seeds]))
    for name in record.attack_names:
        found = estimate([run.attacks[name] for run in record.seeds])
        _add(table, name if found.bounded else f"{name} *", found)
    if worst is not None:
        _add(table, "worst case", worst.estimate, style="bold")
    return table


def _add(table: Table, name: str, found: Estimate, style: str | None = None) -> None:
    counts = sorted(set(found.images_per_seed))
    images = str(counts[0]) if len(counts) == 1 else f"{counts[0]}-{counts[-1]}"
    table.add_row(
        escape(name),
        f"{images} x {len(found.per_seed)}",
        f"{found.mean:.1f}",
        f"{found.low:.1f} to {found.high:.1f}",
        " ".join(f"{value:.1f}" for value in found.per_seed),
        style=style,
    )


def _footnotes(record: AnyRecord) -> list[str]:
    lines = []
    worst = worst_case(record.seeds)
    for name in record.attack_names:
        found = estimate([run.attacks[name] for run in record.seeds])
        if not found.bounded:
            lines.append(
                f"* {name} is not held inside the threat model (largest l2 distance "
                f"{found.max_distance:.3g}) and does not count in the worst case."
            )
    if worst is None:
        lines.append("No worst case: no image was measured by every bounded attack.")
    else:
        lines.append(
            "Worst case: an image counts when it survives all of "
            f"{', '.join(worst.attacks)}; on {worst.estimate.images} images."
        )
    if len(record.seeds) > 1:
        lines.append(
            f"Interval: the wider of Student's t over {len(record.seeds)} seeds and Wilson over "
            "images."
        )
    else:
        lines.append("Interval: Wilson over images; one seed says nothing about other seeds.")
    return lines


def _costs(record: AnyRecord) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("stage", overflow="fold")
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("peak memory", justify="right", no_wrap=True)
    table.add_column("device", overflow="fold")
    table.add_column("")
    groups: dict[str, list[StageCost]] = {}
    for stage in record.cost:  # `pgd100 0` and `pgd100 1` are one row
        groups.setdefault(stage.stage.split(" ")[0], []).append(stage)
    for name, stages in groups.items():
        reused = sum(stage.shared for stage in stages)
        table.add_row(
            escape(name if len(stages) == 1 else f"{name}, {len(stages)} seeds"),
            clock(sum(stage.seconds for stage in stages)),
            _size(max(stage.peak_memory_bytes for stage in stages)),
            escape(", ".join(sorted({stage.device for stage in stages}))),
            "reused" if reused == len(stages) else f"{reused} reused" if reused else "",
        )
    total = sum(stage.seconds for stage in record.cost)
    before = sum(stage.seconds for stage in record.cost if stage.shared)
    note = f"of it reused {clock(before)}" if before else ""
    table.add_section()
    table.add_row("total", clock(total), "", note, "", style="bold")
    return table


def _size(count: int) -> str:
    """Bytes in the decimal unit that people read: `812 B`, `3.1 MB`."""
    if count < 1000:
        return f"{count} B"
    value = float(count)
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 999.5:
            return f"{value:.3g} {unit}"
    return f"{value / 1000:.3g} TB"


def differences(root: Path, texts: Mapping[Path, str], *, limit: int = 200) -> list[str]:
    """How the files under `root` differ from what they should be; empty when they do not.

    Args:
        root: the checkout.
        texts: what `guardbench.leaderboard.rebuild` gives.
        limit: lines of diff shown for each file.

    Returns:
        Printable lines: a unified diff for each changed file, one line for each missing or extra.
    """
    lines = []
    for path, text in texts.items():
        name, target = path.as_posix(), root / path
        if not target.is_file():
            lines.append(f"missing: {name}")
        elif (found := target.read_bytes()) != text.encode():
            titles = f"{name} (found)", f"{name} (from the records)"
            before = found.decode("utf-8", "backslashreplace").split("\n")
            diff = list(difflib.unified_diff(before, text.split("\n"), *titles, lineterm=""))
            lines += [printable(line) for line in diff[:limit]]
            if len(diff) > limit:
                lines.append(f"... {len(diff) - limit} more lines of {name}")
    extra = stale_boards(root, texts)
    return lines + [f"extra: {path.as_posix()}: no record supports it" for path in extra]
