"""Records, comparisons and boards as text: tables, and how a board differs from its records."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from guardbench.ddranking import in_words
from guardbench.fields import printable
from guardbench.leaderboard import stale_boards
from guardbench.metrics import Estimate, beard, estimate, worst_case
from guardbench.progress import clock
from guardbench.records import AnyRecord, ClassifierRecord, ResultRecord, StageCost

if TYPE_CHECKING:  # numpy, which `show` does not need
    from guardbench.compare import Comparison, Counts, Row, Side
    from guardbench.published import Cell

_SEED_COLUMNS = 4  # more students than these do not fit 80 columns side by side


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
    theirs = sorted(name for name, by in made.engines.items() if by == "reference")
    engine = f"pyautoattack for {', '.join(theirs)}" if theirs else "guardbench's own"
    return [
        *_subject(record, under + (f", threat {threat}" if threat else "")),
        *([] if record.tier == "official" else [f"tier       {record.tier}, unofficial: {DEV}"]),
        f"made by    guardbench {made.guardbench}, torch {made.versions.get('torch', '?')}, "
        f"commit {_short(made.commit)}",
        *([f"engine     {engine}"] if made.engines else []),
        *_checks(record),
        f"on         {made.device}, {made.threads} threads"
        + (f"; precision: {precision}" if precision else ""),
    ]


def _short(commit: str | None) -> str:
    """Twelve digits of a commit, and whether the code differed from it."""
    digits, dash, changed = (commit or "none").partition("-")
    return digits[:12] + dash + changed


DEV = "on no board, and not to be published"


def _checks(record: AnyRecord) -> list[str]:
    """How many signs of misleading robustness were looked for; none in records older than they are."""
    made = {name for run in record.seeds for name in run.checks}
    raised = {name for run in record.seeds for name, found in run.checks.items() if found.flagged}
    return [f"checks     {len(made)} made, {len(raised) or 'none'} flagged"] if made else []


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
        *([f"set        {', '.join(record.overrides)}"] if record.overrides else []),
        f"student    is given {artifact.images} images, {byte_size(artifact.image_bytes)}, and "
        f"{artifact.label_kind} labels, {byte_size(artifact.label_bytes)}",
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
    if (found_by := beard(record)) is not None:
        lines.append(
            f"BEARD (arXiv:2411.09265), over {', '.join(found_by.attacks)}: RR {found_by.ratio:.1f}%, "
            f"AE {found_by.efficiency:.1f}%, CREI {found_by.crei:.1f}%; times are of this record's stages, "
            "and AutoAttack's, where it took over a column, hold that column's, which met more images."
        )
    if isinstance(record, ResultRecord) and (beside := in_words(record)) is not None:
        lines.append(beside)
    if record.tier == "dev":
        lines.append(
            f"Images: {record.test.total} of the protocol's, an equal share a class, the first of each in "
            f"the protocol's order. Searched in {record.provenance.precision.get('search', 'fp32')}, "
            "judged in float32."
        )
    if len(record.seeds) > 1:
        lines.append(
            f"Interval: the wider of Student's t over {len(record.seeds)} seeds and Wilson over "
            "images."
        )
    else:
        lines.append("Interval: Wilson over images; one seed says nothing about other seeds.")
    return lines


def without_number(stage: str) -> str:
    """What the stages of several seeds have in common: `pgd100` of `pgd100 1`."""
    return re.sub(r" \d+$", "", stage)


def stage_groups(record: AnyRecord) -> list[tuple[str, list[StageCost]]]:
    """The stages in the order in which they ran, those that differ in a number alone together, with its name.

    `pgd100 0` and `pgd100 1` are `pgd100, 2 seeds`.
    """
    groups: dict[str, list[StageCost]] = {}
    for stage in record.cost:
        groups.setdefault(without_number(stage.stage), []).append(stage)
    several = {"expert": "trajectories"}
    return [
        (name if len(some) == 1 else f"{name}, {len(some)} {several.get(name, 'seeds')}", some)
        for name, some in groups.items()
    ]


def _costs(record: AnyRecord) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("stage", overflow="fold")
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("peak memory", justify="right", no_wrap=True)
    table.add_column("device", overflow="fold")
    table.add_column("")
    for name, stages in stage_groups(record):
        reused = sum(stage.shared for stage in stages)
        table.add_row(
            escape(name),
            clock(sum(stage.seconds for stage in stages)),
            byte_size(max(stage.peak_memory_bytes for stage in stages)),
            escape(", ".join(sorted({stage.device for stage in stages}))),
            "reused" if reused == len(stages) else f"{reused} reused" if reused else "",
        )
    total = sum(stage.seconds for stage in record.cost)
    before = sum(stage.seconds for stage in record.cost if stage.shared)
    note = f"of it reused {clock(before)}" if before else ""
    table.add_section()
    table.add_row("total", clock(total), "", note, "", style="bold")
    return table


def byte_size(count: int) -> str:
    """Bytes in the decimal unit that people read: `812 B`, `3.1 MB`."""
    if count < 1000:
        return f"{count} B"
    value = float(count)
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 999.5:
            return f"{value:.3g} {unit}"
    return f"{value / 1000:.3g} TB"


def print_comparison(console: Console, found: Comparison) -> None:
    """Prints two records row by row: accuracies, their difference, its tests, and the verdict.

    Fits 80 columns; plain text where the console is no terminal.
    """

    def line(text: str, style: str = "") -> None:
        # Without `emoji=False`, `A:B:` would come out with a picture in it.
        console.print(text, style=style, markup=False, highlight=False, emoji=False)

    line(f"protocol  {found.protocol} ({found.protocol_sha256[:12]})")
    for letter, side in (("A", found.a), ("B", found.b)):
        line(f"{letter:<8}  {_side(side)}")
    line("")
    console.print(_rows(found))
    for text in _comparison_footnotes(found):
        line(text, "dim")
    for text in found.notes:
        line(f"note: {text}", "yellow")
    line("")
    console.print(_students(found))
    line(
        "Only A : only B right, and McNemar's exact p for that pair of networks alone. "
        "All seeds: a description, no test, since seeds that share images are not independent.",
        "dim",
    )
    if len(_seeds(found)) > _SEED_COLUMNS:
        line(f"The tests of each of the {len(_seeds(found))} seeds are in --json.", "dim")


def print_paper(console: Console, cells: Sequence[Cell], doubts: Sequence[str]) -> None:
    """Prints published accuracies beside reproduced ones, a row a cell, and what a paper leaves open."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 0, 0, 1))
    for title in ("method", "dataset", "IPC", "measured"):
        table.add_column(title, overflow="fold")
    for title in ("paper %", "from", "here %", "95% interval", "gap"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("protocol here", overflow="fold")
    sources = {
        source: f"[{k + 1}]" for k, source in enumerate(dict.fromkeys(c.source for c in cells))
    }
    for cell in cells:
        found, record = cell.found, cell.record
        own = ", own settings" if not record.method.official else ""
        if cell.resolution != record.resolution:
            own += f", {record.resolution} px for {cell.resolution}"
        table.add_row(
            cell.method,
            cell.dataset,
            str(cell.ipc),
            cell.column,
            f"{cell.published:.2f}",
            escape(sources[cell.source]),
            f"{100 * float(found.share):.1f}",
            f"{found.low:.1f} - {found.high:.1f}",
            f"{cell.gap:+.1f}",
            f"{record.protocol}, {found.images} images{own}",
        )
    console.print(table)
    for source, mark in sources.items():
        console.print(f"{mark} {source}", style="dim", markup=False, highlight=False, emoji=False)
    console.print(
        "The papers measure on the whole validation set, and some train students for longer or with "
        "other augmentation; a gap says nothing of a method where the protocol here is another.",
        style="dim",
        highlight=False,
    )
    for text in doubts:
        console.print(text, style="yellow", markup=False, highlight=False)


def _side(side: Side) -> str:
    return f"{side.title} ({side.name}), {side.made_from}"


def _rows(found: Comparison) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 0, 0, 1))
    table.add_column("measured", overflow="fold")
    for title in ("images", "A %", "B %", "A - B", "95% interval", "A:B", "p"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold")
    for row in found.rows:
        counts = sorted(set(row.images_per_seed))
        images = str(counts[0]) if len(counts) == 1 else f"{counts[0]}-{counts[-1]}"
        table.add_row(
            escape(_shown(row)),
            f"{images}x{len(row.images_per_seed)}",
            f"{row.a:.1f}",
            f"{row.b:.1f}",
            f"{row.difference:+.1f}",
            f"{row.low:.1f} to {row.high:.1f}",
            f"{row.by_image.only_a}:{row.by_image.only_b}",
            _p(row.p_holm),
            row.verdict,
            style="bold" if row.measurement == "worst_case" else None,
        )
    return table


def _shown(row: Row) -> str:
    name = "worst case" if row.measurement == "worst_case" else row.measurement
    return name if row.bounded else f"{name} *"


def _comparison_footnotes(found: Comparison) -> list[str]:
    several = any(row.interval != "images" for row in found.rows)
    lines = [
        "images: those that both measured, each seed, x seeds. Interval: of A - B in points, "
        + (
            "the widest of a bootstrap over seeds and images, Tango's score interval over images and "
            "Student's t over seeds."
            if several
            else "the wider of a bootstrap and Tango's score interval over images; one seed says nothing "
            "about other seeds."
        ),
        "A:B: images that more students of A have right, and of B. p: McNemar's exact test on "
        f"these, with Holm's correction over {len(found.rows)} rows.",
        "A difference stands when its interval excludes 0 and p is below 0.05.",
        "One distilled set each: nothing here is about another run of the distillation.",
    ]
    free = [row.measurement for row in found.rows if not row.bounded]
    if free:
        lines.append(
            f"* {', '.join(free)}: not held inside the threat model, not in the worst case."
        )
    return lines


def _seeds(found: Comparison) -> list[int]:
    return sorted({counts.seed for row in found.rows for counts in row.by_seed})


def _students(found: Comparison) -> Table:
    seeds = _seeds(found)
    shown = seeds if len(seeds) <= _SEED_COLUMNS else []
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 0, 0, 1))
    table.add_column("measured", overflow="fold")
    for title in (*(f"seed {seed}" for seed in shown), "all seeds"):
        table.add_column(title, justify="right", overflow="fold")
    for row in found.rows:
        by_seed = {counts.seed: _counts(counts) for counts in row.by_seed}
        cells = [by_seed.get(seed, "") for seed in shown]
        table.add_row(escape(_shown(row)), *cells, _counts(row.pooled))
    return table


def _counts(counts: Counts) -> str:
    return f"{counts.only_a}:{counts.only_b} {_p(counts.p)}"


def _p(p: float) -> str:
    """A p-value in six characters at most, never rounded to 0."""
    if p >= 0.001:
        return f"{p:.3f}"
    return f"{p:.0e}" if p >= 1e-99 else "<1e-99"


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
