"""What a distiller gets and what it gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, get_args

from guardbench.fields import Strict
from guardbench.methods import MethodFile, Recipe
from guardbench.records import LabelKind
from guardbench.runtime import Run
from guardbench.stages import StageFolder
from guardbench.threat import ThreatModel
from guardbench.toml_files import checked

if TYPE_CHECKING:
    from guardbench.data.dataset import RealDataset
    from guardbench.distilled import DistilledDataset


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be distilled, known before any image is decoded.

    Attributes:
        run: device, workspace, seed, progress.
        method, recipe: the method and its hyperparameters for this dataset.
        dataset, resolution, channels, classes: of the training images; `classes` in label order.
        train_images: how many there are.
        train_digest: of the decoded training images; None while they have not been decoded.
        ipc: images per class.
        threat: the protocol's, for regularisers that attack.
    """

    run: Run
    method: MethodFile
    recipe: Recipe
    dataset: str
    resolution: int
    channels: int
    classes: tuple[str, ...]
    train_images: int
    train_digest: str | None
    ipc: int
    threat: ThreatModel

    def words(self) -> dict[str, Any]:
        """What shapes every stage of this task: data, seed and effective precision."""
        return {
            "dataset": self.dataset,
            "resolution": self.resolution,
            "train": self.train_digest,
            "seed": self.run.seed,
            "precision": self.run.precision,
        }


@dataclass(frozen=True)
class PlannedStage:
    """A stage of a plan.

    Attributes:
        folder: its folder, by which it is known whether it is done.
        steps: what the plan says of its length, such as `8 epochs`.
        passes: forward+backward passes of one image that it costs, for the expected time.
        fp32: whether it must run in float32.
        arch: the network that passes them, the protocol's student where it is None.
        split: whether the processes of a run share it; else each does all of it.
    """

    folder: StageFolder
    steps: str
    passes: float
    fp32: bool = False
    split: bool = True
    arch: str | None = None


class Distiller(Protocol):
    """Turns real training images into a distilled dataset.

    Attributes:
        params: what a recipe's `params` hold, one field a stage, each a table of its own.
    """

    params: ClassVar[type[Strict]]

    def plan(self, task: Task) -> list[PlannedStage]:
        """The stages in order; checks the recipe, and needs no images."""
        ...

    def label_kind(self, task: Task) -> LabelKind:
        """What will label the images: decides the track, and whether students are relabelled."""
        ...

    def image_count(self, task: Task) -> int:
        """How many images the distilled set will have."""
        ...

    def distill(self, task: Task, train: RealDataset) -> DistilledDataset:
        """Runs the stages that are not finished; raises GuardbenchError when the input is at fault."""
        ...


P = TypeVar("P", bound=Strict)


def read_params(task: Task, family: type[P]) -> P:
    """The recipe's `params` as a distiller's own tables.

    Raises:
        GuardbenchError: a field is missing, unknown or wrong; the message names file and field.
    """
    where = f"baselines/{task.method.name}/method.toml (or --set)"
    recipe = f"recipe {task.dataset}@{task.resolution}"
    return checked(family, task.recipe.params, where=f"{where}: {recipe}", inside="params.")


def to_lower(task: Task, setting: str) -> str:
    """What to do about a loss that diverges: lower `setting`, a learning rate, or what else pulls."""
    weight = " or regulariser.weight" if "weight" in task.recipe.regulariser else ""
    return f"lower {setting}{weight}, as by --set {setting}=0.01"


def tables(family: type[Strict]) -> dict[str, type[Strict]]:
    """The tables that a distiller's `params` consist of, optional ones too, by their names."""
    found = {}
    for name, field in family.model_fields.items():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, Strict):
                found[name] = kind
    return found
