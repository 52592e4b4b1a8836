"""One classifier x attacks: what it gets right, clean and under each attack of a protocol.

Attacks see a float32 model in eval mode; each outcome is counted by `run_verified`'s harness, image
by image. Attacks search a faster copy of the model, which in the dev tier is in bf16 where the device
gains by it; the verdicts are the model's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from guardbench import canonical
from guardbench.attacks.autoattack import AutoAttack
from guardbench.attacks.base import (
    LOGIT_NOISE,
    Attack,
    BatchOutcome,
    Images,
    UnsteadyError,
    plan_batches,
    run_batch,
    score_clean,
)
from guardbench.attacks.search import answering_at_random
from guardbench.attacks.searched import SLACK, Precision, search_model
from guardbench.attacks.stream import (
    Journal,
    Tell,
    journaling,
    remembering_what_fits,
    rows_at_once,
    telling,
)
from guardbench.canonical import derive_seed
from guardbench.checks import (
    COMPARED,
    IMAGES,
    TARGETED,
    UNSTEADY,
    alone,
    compared,
    inspect,
    judge,
)
from guardbench.commit import UNKNOWN
from guardbench.distillers.base import PlannedStage
from guardbench.errors import GuardbenchError
from guardbench.processes import Processes
from guardbench.progress import Stage
from guardbench.protocol import AttackSpec, Protocol
from guardbench.records import Check, Outcome, SeedRun, StageCost
from guardbench.runtime import Run, seeded
from guardbench.scoring_plan import ScoringPlan, built, run_by, taken_over
from guardbench.stages import StageFolder, stage_cost
from guardbench.store import write_text
from guardbench.tier import measured

UNSTEADY_LATER, UNSTEADY_NOTE = "unsteady", "unsteady.txt"
"""In the folder of the checks: an attack has found two answers to one image, which the checks had not."""


class Costs:
    """Collects what stages cost, whether an earlier run had finished them, the commits that made them,
    and in which precisions attacks of the dev tier searched."""

    def __init__(self) -> None:
        self.found: list[StageCost] = []
        self.commits: list[str | None] = []
        self.searched: set[str] = set()

    @contextmanager
    def of(self, *stages: PlannedStage) -> Iterator[None]:
        """Notes the costs of stages that finish inside."""
        # Made by this very run already, for another use.
        before = [not stage.folder.reused for stage in stages]
        yield
        for stage, shared in zip(stages, before, strict=True):
            stored = stage.folder.finished()
            assert stored is not None, stage.folder.name
            self._add(stage.folder, stored, shared=shared or stage.folder.reused)

    def add(self, *folders: StageFolder) -> None:
        """Notes the costs of finished stages."""
        for folder in folders:
            stored = folder.finished()
            assert stored is not None, folder.name
            self._add(folder, stored, shared=folder.reused)

    def _add(self, folder: StageFolder, stored: Mapping[str, Any], *, shared: bool) -> None:
        # Who finished it may have had another name for it: a clean pass is the same for every seed.
        cost = stage_cost(stored, shared=shared).model_copy(update={"stage": folder.name})
        self.found.append(cost)
        self.commits += stored.get("commits", [stored.get("commit", UNKNOWN)])
        if "searched" in stored:
            self.searched.add(stored["searched"])


@remembering_what_fits()
def score(
    run: Run,
    protocol: Protocol,
    plan: ScoringPlan,
    model: nn.Module,
    x: Images,
    y: Tensor,
    costs: Costs,
    made_from: str | None = None,
) -> SeedRun:
    """Scores one classifier, clean and under each attack; finished stages are read, not run.

    Args:
        made_from: digest of its weights where the plan's `subject` does not hold them, see
            `StageFolder.claimed`.
        model: in eval mode, on the run's device, float32.
        x, y: the test images that the tier measures [N, C, H, W] in [0, 1] and their labels [N].
    """
    protocol = measured(protocol, plan.sample)
    with costs.of(plan.clean):
        clean = _score(run, model, x, y, plan.clean, made_from)
    with costs.of(plan.checks):
        checks = _inspect(run, protocol, plan, model, x, y, clean, made_from)
    unsteady = [
        name for name in (*UNSTEADY, UNSTEADY_LATER) if name in checks and checks[name].flagged
    ]
    left = any(stage.folder.finished() is None for stage in plan.stages)
    fast = search_model(model, x[:8].to(run.device), plan.search) if left else (model, plan.search)
    outcomes: dict[str, Outcome] = {}
    for spec, stage in zip(protocol.attacks, plan.attacks, strict=True):
        lucky = answering_at_random("random-answers" in unsteady)
        noted = _noting_unsteady(run, plan.checks.folder)
        with costs.of(stage), stage.folder.claimed(made_from) as stored, lucky, noted:
            before = {
                each.name: outcomes[each.name] for each in taken_over(protocol, spec, plan.engine)
            }
            if stored is None:
                stored = _attack(
                    run, protocol, spec, plan, stage.folder, model, *fast, x, y, clean, before,
                    steady=not unsteady,
                )  # fmt: skip
            outcomes[spec.name] = Outcome.model_validate(stored["outcome"])
    scored = SeedRun(seed=plan.seed, clean=clean, attacks=outcomes)
    standing = None
    if (last := plan.targeted) is not None:
        found = alone(scored, protocol)
        # Made anew where other images are alone now.
        of = canonical.digest([made_from, found.model_dump(mode="json")])
        noted = _noting_unsteady(run, plan.checks.folder)
        with costs.of(last), last.folder.claimed(of) as stored, noted:
            if stored is None:
                stored = _attack(
                    run, protocol, TARGETED, plan, last.folder, model, *fast, x, y, found, {},
                    steady=not unsteady,
                )  # fmt: skip
            standing = Outcome.model_validate(stored["outcome"])
    judged = judge(scored, protocol, standing)
    return scored.model_copy(update={"checks": {**checks, **judged}})


@contextmanager
def _noting_unsteady(run: Run, checks: StageFolder) -> Iterator[None]:
    """Has the next run know what the checks did not see: that the model answers one image in two ways.

    All processes of the run raise it.
    """
    try:
        yield
    except UnsteadyError as error:
        if run.processes.main:
            write_text(checks.path / UNSTEADY_NOTE, f"{error}\n")
        raise GuardbenchError(
            f"{error}, which the checks did not see. Run the same command again: it goes on, counts such "
            "an image as broken and flags the record."
        ) from error


def images_at_a_time(attack: Attack, x: Tensor) -> int:
    """Images between two checkpoints. `stream` fills its batch from all that it is given, so a few
    batches' worth keep it full; more would cost memory that grows with the number of images."""
    if run_by(attack) == "reference":
        return attack_batch(x.shape[-1])
    rows = rows_at_once(x)
    return min(512, 16 * rows) if x.device.type == "cpu" else 4 * rows


def attack_batch(resolution: int) -> int:
    """Images between two checkpoints; fixed by the resolution, since the reference engine's draws
    depend on the batch."""
    return 256 if resolution <= 64 else 64


def part_of(index: Tensor, processes: Processes, size: int, *, whole: bool) -> Tensor:
    """This process's images of a round, `index`, which holds up to `size` for each process.

    Args:
        whole: a batch as one process alone would have it, for the reference engine, which draws for a
            batch; else every n-th image of n processes, so that all have as many.
    """
    if whole:
        return index[processes.rank * size : (processes.rank + 1) * size]
    return index[processes.rank :: processes.count]


def clean_verdicts(run: Run, model: nn.Module, x: Images, y: Tensor) -> Tensor:
    """Which images the model gets right, bool [N]; the processes of the run share them."""
    rows = torch.arange(len(x))[run.processes.share(len(x))]
    size = attack_batch(x.shape[-1])
    found = [
        score_clean(model, x[part], y[part], batch_size=size) for part in torch.split(rows, size)
    ]
    return torch.cat([right for part in run.processes.collect(found) for right in part])


def _score(
    run: Run, model: nn.Module, x: Images, y: Tensor, stage: PlannedStage, made_from: str | None
) -> Outcome:
    folder = stage.folder
    with folder.claimed(made_from) as stored:
        if stored is None:
            folder.begin(run.device)
            # A model that answers at random is drawn from alike in every run; the pass has no seed.
            with run.progress.stage(folder.name, len(x), "images") as bar, seeded(0):
                right = clean_verdicts(run, model, x, y)
                bar.advance(len(x), f"{100 * right.float().mean():.1f}% right")
            outcome = Outcome.from_flags(right.tolist())
            stored = folder.finish(run.device, outcome=outcome.model_dump(mode="json"))
    return Outcome.model_validate(stored["outcome"])


def _inspect(
    run: Run,
    protocol: Protocol,
    plan: ScoringPlan,
    model: nn.Module,
    x: Images,
    y: Tensor,
    clean: Outcome,
    made_from: str | None,
) -> dict[str, Check]:
    folder = plan.checks.folder
    with folder.claimed(made_from) as stored:
        if stored is None:
            folder.begin(run.device)
            right = torch.tensor(clean.flags()).nonzero().squeeze(1)[:IMAGES]
            named = derive_seed(plan.seed, "checks")
            with run.progress.stage(folder.name, len(right), "images") as bar, seeded(named):
                mine = right[run.processes.share(len(right))]
                found = inspect(
                    model,
                    x[mine].to(run.device),
                    y[mine].to(run.device),
                    protocol.threat.model,
                    seed=named,
                    compare=COMPARED.keys() - compared(protocol),
                    gather=run.processes.gathered,
                )
                raised = [name for name, check in found.items() if check.flagged]
                bar.advance(
                    len(right), f"flagged: {', '.join(raised)}" if raised else "nothing flagged"
                )
            words = {name: check.model_dump(mode="json") for name, check in found.items()}
            stored = folder.finish(run.device, checks=words)
    checks = {name: Check.model_validate(words) for name, words in stored["checks"].items()}
    noted = run.processes.from_main((folder.path / UNSTEADY_NOTE).is_file)
    if noted:  # one image at least
        checks[UNSTEADY_LATER] = Check(value=1 / clean.total, limit=0.0, images=clean.total)
    return checks


def _shown(bar: Stage, count: int, sure: int) -> Tell:
    """Shows how far an attack is on `count` images, after `sure` that are robust."""
    return lambda share, alive: bar.within(
        share * count, f"{sure} robust, {alive} of {count} not yet broken"
    )


def _same(state: Mapping[str, Any], right: Tensor, steady: bool) -> bool:
    """Whether a checkpoint counts among the images that are `right` now, bool [N], and judged as now.

    Verdicts that an attack builds on may have been deleted and made anew, with others on another device.
    Older checkpoints do not say.
    """
    alike = torch.equal(state.get("right", right), right)
    return alike and state.get("steady", steady) == steady


def _attack(
    run: Run,
    protocol: Protocol,
    spec: AttackSpec,
    plan: ScoringPlan,
    folder: StageFolder,
    model: nn.Module,
    fast: nn.Module,
    precision: Precision,
    x: Images,
    y: Tensor,
    clean: Outcome,
    before: Mapping[str, Outcome],
    *,
    steady: bool,
) -> dict[str, Any]:
    """Attacks the images that are right when clean and in the columns `before`, which it takes over."""
    attack = built(protocol, spec, plan.engine)
    if isinstance(attack, AutoAttack) and before:
        done = [each for each in protocol.attacks if each.name in before]
        attack = replace(attack, without=tuple(built(protocol, each, plan.engine) for each in done))
    first, count = protocol.slice_of(spec, plan.position)
    right = torch.tensor(clean.flags()[first - clean.first :][:count])
    for outcome in before.values():
        right &= torch.tensor(outcome.flags())
    robust, distance = right.clone(), torch.zeros(count, dtype=torch.float64)
    size = images_at_a_time(attack, x[:1].to(run.device))
    untouched = run_by(attack) == "reference"
    state = folder.begin(run.device)
    decided = 0  # how many of those that are right have their verdict, in order
    if state is not None and _same(state, right, steady):
        decided, robust, distance = int(state["decided"]), state["robust"], state["distance"]
    elif state is not None:
        folder.say(
            f"{folder.name}: its images, or how they are judged, are others now, so it begins anew"
        )
    processes = run.processes
    # Of several processes, each is at another place of its own streams.
    kept = (state or {}) if processes.main else folder.own()
    same = "streams" in kept and _same(kept, right, steady)
    streams = kept["streams"] if same and kept["decided"] == decided else []
    on = {"right": right, "steady": steady}

    def keep(decided: int, streams: list[dict[str, Any]]) -> None:
        whole = {"robust": robust, "distance": distance}
        folder.checkpoint({**on, "decided": decided, "streams": streams, **whole})

    def keep_own(decided: int, streams: list[dict[str, Any]]) -> None:
        folder.checkpoint_own({**on, "decided": decided, "streams": streams})

    named = derive_seed(plan.seed, "attack", spec.name)
    # Planned anew from the first undecided image: on another device a batch may be of another size.
    total = int(right.sum())
    batches = plan_batches(right & (right.cumsum(0) > decided), size * processes.count)
    with run.progress.stage(folder.name, count, "images", count - total + decided) as bar:
        for index in batches:
            rest = total - decided - len(index)
            sure = int(robust.sum()) - rest - len(index)
            write = partial(keep if processes.main else keep_own, decided)
            journal = Journal(folder.due_alone, write, streams)
            mine = part_of(index, processes, size, whole=untouched)
            shown = _shown(bar, len(index), sure)
            found: BatchOutcome | UnsteadyError | None = None
            with telling(shown), journaling(journal), seeded(named):
                try:
                    found = run_batch(
                        attack, model, x, y, mine + first, seed=named,
                        searched=None if untouched else fast,
                        slack=SLACK if precision == "bf16" else LOGIT_NOISE, steady=steady,
                    ) if len(mine) else None  # fmt: skip
                except UnsteadyError as error:
                    found = error  # which all processes end with
            for part in processes.collect(found):
                if isinstance(part, UnsteadyError):
                    raise part
                if part is not None:
                    robust[part.index - first] = ~part.broken
                    distance[part.index - first] = part.distance
            decided += len(index)
            bar.advance(len(index), f"{int(robust.sum()) - rest} robust so far")
            streams = []
            if folder.due() and rest:
                keep(decided, streams)
        bar.advance(0, f"{100 * robust.float().mean():.1f}% robust")
    result = Outcome.from_flags(
        robust.tolist(),
        first=first,
        bounded=attack.threat is not None,
        max_distance=max(
            [float(distance.max()), *(outcome.max_distance for outcome in before.values())]
        ),
    )
    facts: dict[str, Any] = {"outcome": result.model_dump(mode="json")}
    if plan.sample is not None:
        facts["searched"] = "fp32" if untouched else precision
    return folder.finish(run.device, **facts)
