"""A suite: many runs as one plan, in which what they share is counted once.

Stages that several cells need have one folder, so that a folder is a stage here. What a cell is and how it
is run is `guardbench.pipeline`'s; this module weighs the cells, orders them and deals them out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor, nn

from guardbench.data.catalog import dataset_info
from guardbench.distillers.base import PlannedStage
from guardbench.errors import GuardbenchError
from guardbench.forecast import expected_seconds
from guardbench.labels import LabelStore
from guardbench.methods import load_method
from guardbench.models import build_model
from guardbench.pipeline import (
    Plan,
    Settings,
    choose_protocol,
    make_plan,
    official_stages,
    planned_method,
    prepare,
)
from guardbench.progress import Progress
from guardbench.protocol import Protocol
from guardbench.record_files import load_record
from guardbench.records import ResultRecord
from guardbench.scoring_plan import engines_used
from guardbench.suite_file import Wanted


@dataclass(frozen=True)
class Need:
    """A stage, once for all cells that need it.

    Attributes:
        name: such as `squeeze` or `student 0`.
        work: multiplications, reckoned as the expected time is: of the protocol's student, for each image
            that passes. Equal whatever is done.
        done: whether it is finished.
        seconds: expected on this machine; 0 when done.
        size: about how many bytes it will add to the workspace; 0 when done.
    """

    name: str
    work: int
    done: bool
    seconds: float
    size: int


@dataclass(frozen=True, eq=False)
class Cell:
    """One run of the suite.

    Attributes:
        wanted: which.
        settings: of its run.
        plan: None where it cannot be run.
        refusal: why it cannot; empty where it can.
        record: what an earlier run measured; None where that is still to do.
        stages: the folders of its stages in the workspace, in the order in which they run.
    """

    wanted: Wanted
    settings: Settings
    plan: Plan | None = None
    refusal: str = ""
    record: ResultRecord | None = None
    stages: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As `Wanted.name`."""
        return self.wanted.name

    @property
    def to_do(self) -> bool:
        """Whether it can be run and has not been."""
        return self.plan is not None and self.record is None


@dataclass(frozen=True)
class Suite:
    """The cells, and what their stages take."""

    cells: tuple[Cell, ...]
    needs: dict[str, Need] = field(default_factory=dict)

    def work(self, cells: Iterable[Cell]) -> int:
        """Of all their stages, done or not."""
        return sum(self.needs[path].work for path in stages_of(cells))

    def left(self, cells: Iterable[Cell]) -> set[str]:
        """The stages that have to be run for those of the cells that are to do."""
        wanted = stages_of(cell for cell in cells if cell.to_do)
        return {path for path in wanted if not self.needs[path].done}

    def work_left(self, cells: Iterable[Cell]) -> int:
        """As `work`, of what is left."""
        return sum(self.needs[path].work for path in self.left(cells))

    def seconds(self, cells: Iterable[Cell]) -> float:
        """Expected for what is left on this machine, shared stages once."""
        return sum(self.needs[path].seconds for path in self.left(cells))

    def size(self, cells: Iterable[Cell]) -> int:
        """About how many bytes what is left adds to the workspace."""
        return sum(self.needs[path].size for path in self.left(cells))


def stages_of(cells: Iterable[Cell]) -> set[str]:
    """The stages that the cells need."""
    return {path for cell in cells for path in cell.stages}


def plan_suite(wanted: Sequence[Wanted], common: Settings, progress: Progress) -> Suite:
    """Plans every cell; decodes nothing and writes nothing.

    A cell that cannot be run keeps the line that says why.

    Args:
        wanted: the cells.
        common: all that they do not say themselves.

    Raises:
        GuardbenchError: a method, a dataset or a protocol that there is not: no cell of it could ever run.
    """
    suite = Suite(())
    cells = [
        _planned(each, settings, suite.needs, progress) for each, settings in _each(wanted, common)
    ]
    return replace(suite, cells=tuple(cells))


def official_suite(wanted: Sequence[Wanted], common: Settings, progress: Progress) -> Suite:
    """The cells by the work that they are with all official images, for `divide`; none can be run as it is.

    Neither the machine, the images that it has nor what is done moves it. A cell that no machine can run
    has no stages.

    Raises:
        GuardbenchError: as `plan_suite` does.
    """
    suite, cells = Suite(()), []
    for each, settings in _each(wanted, common):
        try:
            found = official_stages(settings, progress)
        except GuardbenchError:
            found = []
        protocol = choose_protocol(each.dataset, each.protocol)
        info = dataset_info(protocol.dataset)
        shape = (info.channels, info.num_classes, protocol.resolution)
        for stage in found:
            work = _work(stage, protocol, shape)
            suite.needs[stage.folder.key] = Need(stage.folder.name, work, False, 0.0, 0)
        keys = tuple(stage.folder.key for stage in found)
        cells.append(Cell(each, settings, stages=keys))
    return replace(suite, cells=tuple(cells))


def _each(wanted: Sequence[Wanted], common: Settings) -> Iterator[tuple[Wanted, Settings]]:
    """The cells with the settings of their runs; refuses names that there are not before the first."""
    for each in wanted:
        load_method(each.method)
        choose_protocol(each.dataset, each.protocol)
    threads = torch.get_num_threads()
    for each in wanted:
        yield each, replace(
            common, method=each.method, dataset=each.dataset, protocol=each.protocol, ipc=each.ipc,
            overrides=each.overrides, references=each.references,
        )  # fmt: skip
        torch.set_num_threads(threads)  # planning tiny images leaves one thread


def _planned(
    wanted: Wanted, settings: Settings, needs: dict[str, Need], progress: Progress
) -> Cell:
    try:
        plan = make_plan(settings, progress)
        record = recorded(plan)
        stages = {
            stage.folder.path.relative_to(settings.output).as_posix(): stage
            for stage in plan.stages
        }
        for place, stage in stages.items():
            if place not in needs:
                needs[place] = _need(plan, stage)
    except GuardbenchError as error:
        return Cell(wanted, settings, refusal=str(error))
    return Cell(wanted, settings, plan, record=record, stages=tuple(stages))


def recorded(plan: Plan) -> ResultRecord | None:
    """The record that the run would make, if it is there: of this protocol, recipe and engine, by any device.

    With `--publish`, the published one counts.

    Raises:
        GuardbenchError: there is one that cannot be read.
    """
    protocol, ipc, tier = plan.protocol.id, plan.settings.ipc, plan.settings.tier
    path = plan.place.published_path(protocol, ipc) or plan.place.record_path(protocol, ipc, tier)
    if not path.is_file():
        return None
    record = load_record(path)
    same = (
        record.protocol_sha256 == plan.protocol.digest
        and record.method.recipe_sha256 == planned_method(plan).recipe_sha256
        and record.test.total == (plan.evaluating.sample or plan.protocol.test.count)
        and record.provenance.engines == engines_used(plan.protocol, plan.settings.engine)
        and (not plan.settings.references or all(run.references for run in record.seeds))
    )
    return record if same else None


def _need(plan: Plan, stage: PlannedStage) -> Need:
    protocol, info = plan.protocol, dataset_info(plan.protocol.dataset)
    shape = (info.channels, len(plan.task.classes), protocol.resolution)
    done = stage.folder.finished() is not None
    return Need(
        name=stage.folder.name,
        work=_work(stage, protocol, shape),
        done=done,
        seconds=0.0 if done else expected_seconds(plan.task.run, protocol, [stage]),
        size=0 if done else _size(plan, stage, shape),
    )


def _work(stage: PlannedStage, protocol: Protocol, shape: tuple[int, int, int]) -> int:
    return round(stage.passes * network(stage.arch or protocol.student.arch, *shape)[0])


def _size(plan: Plan, stage: PlannedStage, shape: tuple[int, int, int]) -> int:
    """About how many bytes a stage leaves, by the folder that it lies in; images are float32."""
    words = stage.folder.words
    images, (channels, classes, side) = plan.distiller.image_count(plan.task), shape
    kind = stage.folder.path.parent.name
    if kind == "teachers":
        return network(words["squeeze"]["arch"], *shape)[1]
    if kind == "experts":
        epochs = int(words["experts"]["epochs"])
        return network(words["experts"]["arch"], *shape)[1] * (epochs + 1)
    if kind == "labels":
        kept = LabelStore(stage.folder.path, classes, plan.protocol.student.label_top_k)
        return int(words["views"]["epochs"]) * images * kept.row_bytes
    if kind == "students":
        return network(plan.protocol.student.arch, *shape)[1]
    if kind == "distilled":
        labels = plan.distiller.label_kind(plan.task)
        arch = plan.task.recipe.params["squeeze"]["arch"] if labels == "teacher" else None
        teacher = network(arch, *shape)[1] if arch else 0
        return images * channels * side * side * 4 + teacher
    return 0  # attacks leave a bit an image


@cache
def network(arch: str, channels: int, classes: int, resolution: int) -> tuple[int, int]:
    """Multiplications of an image's forward pass, in convolutions and linear layers, and bytes of weights."""
    model = build_model(arch, channels=channels, classes=classes, resolution=resolution, seed=0)
    counts = []

    def count(layer: nn.Module, _: object, out: Tensor) -> None:
        assert isinstance(layer.weight, Tensor)
        counts.append(layer.weight.numel() * out[0, 0].numel())

    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    for layer in layers:
        layer.register_forward_hook(count)
    with torch.no_grad():
        model.eval()(torch.zeros(1, channels, resolution, resolution))
    return sum(counts), sum(each.nbytes for each in model.state_dict().values())


def prepared(cells: Sequence[Cell]) -> list[Cell]:
    """The cells, their images downloaded, decoded and looked at now rather than when it is their turn.

    Where a protocol's images are not what it needs, its cells of that IPC and above cannot be run.
    """
    failed: dict[str, str] = {}
    seen: set[tuple[str, int]] = set()
    found = {}
    for cell in sorted(cells, key=lambda cell: cell.wanted.ipc):
        measured, ipc = cell.wanted.measured, cell.wanted.ipc
        if cell.plan is not None and cell.to_do:
            if measured not in failed and (measured, ipc) not in seen:
                seen.add((measured, ipc))
                try:
                    prepare(cell.plan)
                except GuardbenchError as error:
                    failed[measured] = str(error)
            if measured in failed:
                cell = replace(cell, plan=None, refusal=failed[measured])
        found[cell.name] = cell
    return [found[cell.name] for cell in cells]


def decoded_bytes(cells: Iterable[Cell]) -> int:
    """Bytes that the cache will gain by the images that the cells need and that are not decoded yet."""
    sets = {
        (cell.plan.protocol.dataset, cell.plan.protocol.resolution)
        for cell in cells
        if cell.plan is not None and cell.to_do and not cell.plan.decoded
    }
    total = 0
    for name, side in sets:
        info = dataset_info(name)
        if not info.embedded:
            total += (info.train_count + info.val_count) * info.channels * side * side
    return total


def related(cells: Iterable[Cell]) -> list[list[Cell]]:
    """The cells in groups: two that share a stage are in one."""
    groups: list[tuple[set[str], list[Cell]]] = []
    for cell in cells:
        stages, members = set(cell.stages), [cell]
        apart = []
        for paths, others in groups:
            if paths.isdisjoint(cell.stages):
                apart.append((paths, others))
            else:
                stages, members = stages | paths, [*others, *members]
        groups = [*apart, (stages, members)]
    return [members for _, members in groups]


def ordered(suite: Suite, cells: Iterable[Cell]) -> list[Cell]:
    """The cells that are to do, in the order of least waste.

    Cells that share a stage run one after another: the group with the least work left comes first, and in
    it always the cell that takes least on top of what will have been made.
    """
    groups = related(cell for cell in cells if cell.to_do)
    order: list[Cell] = []
    for group in sorted(groups, key=lambda group: (suite.work_left(group), group[0].name)):
        waiting, made = list(group), list[Cell]()
        while waiting:
            cell = min(waiting, key=lambda each: suite.work_left([*made, each]))
            waiting.remove(cell)
            made.append(cell)
        order += made
    return order


def divide(suite: Suite, shards: int) -> list[list[Cell]]:
    """The cells of an `official_suite` dealt out to `shards` machines.

    Cells that share a stage stay together, unless parting them is worth it: of all divisions tried, that is
    taken whose longest shard and work done twice are least together. It hangs on the cells alone.
    """
    cells = suite.cells
    whole, parts = suite.work(cells), related(cells)
    best, least = _dealt(suite, parts, shards), math.inf
    for _ in range(4 * shards if shards > 1 else 0):  # each parts the heaviest, which soon is light
        dealt = _dealt(suite, parts, shards)
        works = [suite.work(shard) for shard in dealt]
        cost = max(works) + sum(works) - whole
        if cost < least:
            best, least = dealt, cost
        parts = _one_parted(suite, parts)
        if not parts:
            break
    place = {cell.name: number for number, cell in enumerate(cells)}
    return [sorted(shard, key=lambda cell: place[cell.name]) for shard in best]


def _dealt(suite: Suite, parts: list[list[Cell]], shards: int) -> list[list[Cell]]:
    """The heaviest part first, each to the shard that is lightest with it."""
    dealt: list[list[Cell]] = [[] for _ in range(shards)]
    held: list[set[str]] = [set() for _ in range(shards)]
    works = [0] * shards
    for part in _heaviest_first(suite, parts):
        stages = stages_of(part)
        more = [sum(suite.needs[path].work for path in stages - paths) for paths in held]
        to = min(range(shards), key=lambda number: works[number] + more[number])
        dealt[to] += part
        held[to] |= stages
        works[to] += more[to]
    return dealt


def _one_parted(suite: Suite, parts: list[list[Cell]]) -> list[list[Cell]]:
    """The parts with the heaviest that can be parted in two; none where no part can."""
    for part in _heaviest_first(suite, parts):
        halves = _dealt(suite, [[cell] for cell in part], 2)
        if all(halves):  # cells of equal stages, as of the whole set at two IPCs, stay together
            return [*(other for other in parts if other is not part), *halves]
    return []


def _heaviest_first(suite: Suite, parts: Iterable[list[Cell]]) -> list[list[Cell]]:
    return sorted(parts, key=lambda part: (-suite.work(part), part[0].name))
