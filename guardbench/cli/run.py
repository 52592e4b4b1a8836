"""`guardbench run`: distil, train students, attack them, write a record and the boards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from guardbench.cli.options import (
    CacheDir,
    DataDir,
    Device,
    DevImages,
    EngineName,
    EngineOption,
    Precision,
    References,
    TierName,
    TierOption,
    make_console,
)

if TYPE_CHECKING:
    from rich.console import Console

    from guardbench.distillers.base import PlannedStage
    from guardbench.pipeline import Plan


def run(
    method: Annotated[
        str, typer.Option(help="Such as guard or sre2l; guardbench methods lists them.")
    ],
    dataset: Annotated[
        str | None,
        typer.Option(
            help="digits, imagenette, cifar10 or imagenet: the protocol of that name.",
            show_default=False,
        ),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            help="What is measured: an id such as imagenette-64, or your own FILE.toml. "
            "By default the protocol called as the dataset.",
            show_default=False,
        ),
    ] = None,
    ipc: Annotated[
        int,
        typer.Option(
            help="Images per class of the distilled set; protocols measure 1, 10, 50 and 100."
        ),
    ] = 10,
    seed: Annotated[
        int,
        typer.Option(
            help="Root of every random choice; the protocol says which students.",
            min=0,
        ),
    ] = 0,
    device: Device = "auto",
    precision: Precision = "auto",
    engine: EngineOption = EngineName.guardbench,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="STAGE.FIELD=VALUE",
            help="Override a value of the recipe, such as squeeze.epochs=5 or regulariser.weight=0.1; "
            "may be repeated. The record says so and counts as unofficial.",
            show_default=False,
        ),
    ] = None,
    tier: TierOption = TierName.official,
    images: DevImages = None,
    references: References = False,
    log_with: Annotated[
        list[str] | None,
        typer.Option(
            help="Tell the losses of training to tensorboard or wandb (the package must be installed); may "
            "be repeated. Files go to `trackers` in the workspace.",
            show_default=False,
        ),
    ] = None,
    data_dir: DataDir = None,
    cache_dir: CacheDir = None,
    output: Annotated[
        Path, typer.Option(help="The workspace: artifacts, records and boards of what is run.")
    ] = Path("guardbench-runs"),
    publish: Annotated[
        bool,
        typer.Option(
            "--publish",
            help="In a checkout: also store the record under baselines/ and rebuild leaderboards/.",
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Stop after the plan.")] = False,
) -> None:
    """Distil a dataset, train students on it, attack them, and rank the result.

    A killed run goes on where it stopped when the same command is given again.

    Example: guardbench run --method guard --dataset digits --ipc 10
    """
    console = make_console()
    with console.status("looking around") if console.is_terminal else _Quiet():
        from guardbench.forecast import expected_seconds
        from guardbench.pipeline import Settings, execute, make_plan
        from guardbench.progress import Progress

        settings = Settings(
            method=method,
            dataset=dataset,
            protocol=protocol,
            ipc=ipc,
            seed=seed,
            device=device,
            precision=precision,
            data_dir=data_dir,
            cache_dir=cache_dir,
            output=output,
            publish=publish,
            engine=engine.value,
            overrides=tuple(set_ or ()),
            tier=tier.value,
            images=images,
            references=references,
            log_with=tuple(log_with or ()),
        )
        plan = make_plan(settings, Progress(console))
        seconds = expected_seconds(plan.task.run, plan.protocol, plan.stages)
    print_plan(console, plan, seconds)
    if dry_run:
        return
    console.print()
    finished = execute(plan)
    from rich.markup import escape

    from guardbench.ranking import threat_text
    from guardbench.report import print_record

    for warning in finished.warnings:
        console.print(f"[yellow]not ranked:[/yellow] {escape(warning)}", highlight=False)
    console.print()
    print_record(console, finished.record, threat=threat_text(plan.protocol), paths=finished.paths)


class _Quiet:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


def print_plan(console: Console, plan: Plan, seconds: float) -> None:
    """Prints what a run will do, stage by stage, and what of it is done."""
    from rich.markup import escape

    from guardbench.devices import device_name
    from guardbench.ranking import threat_text
    from guardbench.tier import dev_text

    protocol, task = plan.protocol, plan.task
    run, settings = task.run, plan.settings
    search = plan.evaluating.seeds[0].scoring.search
    train = f"{task.train_images} training, {protocol.test.count} test images"
    state = "decoded" if plan.decoded else "to be decoded"
    lines = {
        "method": f"{plan.method.title} ({task.recipe.regulariser['kind']} regulariser)",
        **({"set": ", ".join(plan.changed)} if plan.changed else {}),
        "dataset": f"{protocol.dataset} at {protocol.resolution} px, {train}; {state}",
        "images from": plan.located.description,
        "protocol": f"{protocol.id} ({protocol.digest[:12]}): {protocol.title}",
        "IPC": f"{settings.ipc}, {plan.distiller.image_count(task)} images in all",
        "students": f"{len(protocol.student.seeds)} x {protocol.student.arch}, "
        f"{protocol.student.epochs} epochs",
        "threat": f"{threat_text(protocol)}; attacks: {', '.join(a.name for a in protocol.attacks)}",
        "engine": settings.engine,
        "device": run.processes.times(device_name(run.device)),
        "precision": f"{run.precision} for distillation and training, fp32 for attacks"
        + (f", which search in {search}" if plan.evaluating.sample is not None else ""),
        "files": str(settings.output),
    }
    if plan.evaluating.sample is not None:
        lines["tier"] = dev_text(plan.evaluating.sample, protocol.test.count)
    console.print("[bold]Plan[/bold]")
    for name, text in lines.items():
        console.print(f"  {name:<12} {escape(text)}", highlight=False, soft_wrap=True)
    print_stages(console, plan.stages, seconds)
    if seconds > 6 * 3600 and protocol.id == "imagenette" and run.device.type == "cpu":
        console.print(
            "  [yellow]hint[/yellow]         --protocol imagenette-64 is made for machines "
            "without a GPU: 64 px, fewer test images",
            highlight=False,
            soft_wrap=True,
        )


def print_stages(console: Console, stages: Sequence[PlannedStage], seconds: float) -> None:
    """Prints stages by name, the seeds of one kind together, what is done, and the expected time."""
    from guardbench.progress import clock
    from guardbench.report import without_number

    groups: dict[str, list[PlannedStage]] = {}
    for stage in stages:
        kind = without_number(stage.folder.name)
        groups.setdefault("reference" if kind.startswith("reference") else kind, []).append(stage)
    console.print("  stages", highlight=False)
    for title, alike in groups.items():
        done = sum(stage.folder.finished() is not None for stage in alike)
        mark = "done" if done == len(alike) else f"{done} of {len(alike)} done" if done else "to do"
        many = f" x {len(alike)}" if len(alike) > 1 else ""
        many += " seeds" if many and title not in ("reference", "expert") else ""
        console.print(
            f"    {title:<16} {alike[0].steps + many:<28} {mark}", highlight=False, soft_wrap=True
        )
    time = "nothing is left to do" if not seconds else f"about {clock(seconds)}"
    console.print(f"  {'expected':<12} {time}", highlight=False)
