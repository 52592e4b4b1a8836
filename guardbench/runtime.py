"""What every stage needs to know about the run that it belongs to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from torch import Tensor

import guardbench
from guardbench import canonical
from guardbench.commit import running_commit
from guardbench.devices import effective_precision
from guardbench.errors import GuardbenchError
from guardbench.processes import Processes
from guardbench.progress import Progress
from guardbench.stages import StageFolder


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, a model that draws from torch's own generators answers as it would at any other time."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def drawn_so_far() -> list[Tensor]:
    """Where torch's own generators stand, of the CPU and of the GPU if there is one."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state()] if torch.cuda.is_available() else states


def draw_on(state: Sequence[Tensor]) -> None:
    """Puts torch's own generators where `drawn_so_far` found them; an empty state moves none."""
    if state:
        torch.set_rng_state(state[0])
    if len(state) > 1 and torch.cuda.is_available():
        torch.cuda.set_rng_state(state[1])


@dataclass(frozen=True, kw_only=True)
class Run:
    """What every stage needs to know about the run that it belongs to.

    Attributes:
        made: the keys of the stages that it has finished.
        commit: see `running_commit`.
    """

    accelerator: Accelerator
    workspace: Path
    seed: int
    progress: Progress
    made: set[str] = field(default_factory=set)
    commit: str | None = field(default_factory=running_commit)

    @cached_property
    def processes(self) -> Processes:
        """Those that share the work."""
        return Processes(self.accelerator)

    @property
    def device(self) -> torch.device:
        """Where tensors live."""
        return torch.device(self.accelerator.device)

    @property
    def precision(self) -> str:
        """Effective precision of distillation and training."""
        return effective_precision(self.accelerator)

    def autocast(self) -> AbstractContextManager[None]:
        """Precision of forward passes whose gradients, if any, `scaler` guards."""
        return cast(AbstractContextManager[None], self.accelerator.autocast())

    def unscaled(self) -> AbstractContextManager[None]:
        """Precision of forward passes whose gradients nothing guards: float32 in a run in float16."""
        return contextlib.nullcontext() if self.precision == "fp16" else self.autocast()

    def scaler(self) -> torch.amp.GradScaler:
        """A new scaler of a network's loss, which does nothing but in a run in float16.

        There, small gradients would be 0 without it; where it is too large for a step, the step is left
        out and it is halved (Micikevicius et al., ICLR 2018, section 3.2).
        """
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        scaler.scale(torch.ones((), device=self.device))  # it makes its state at the first tensor
        return scaler

    @property
    def tracked(self) -> bool:
        """Whether `--log-with` names any tracker."""
        return bool(self.accelerator.log_with)

    @contextlib.contextmanager
    def tracked_as(self, name: str, settings: Mapping[str, object]) -> Iterator[None]:
        """Inside, the trackers of `--log-with` hold a run of that name; whatever ends it, they are closed.

        Args:
            name: TensorBoard's folder below `trackers`; Weights & Biases has all runs in one project.
            settings: what the run is compared by.
        """
        if self.tracked:
            config = self.accelerator.project_configuration
            config.logging_dir = str(Path(config.logging_dir or "") / name)
            known = {key: value if isinstance(value, (int, float)) else str(value)
                     for key, value in settings.items()}  # fmt: skip
            self.accelerator.init_trackers("guardbench", known, {"wandb": {"name": name}})
        try:
            yield
        finally:
            for tracker in self.accelerator.trackers:
                tracker.finish()

    def log(self, stage: str, step: int, **values: float) -> None:
        """Tells the trackers of `--log-with`, if any, as `<stage>/<value>`.

        Args:
            step: of the stage. Weights & Biases, whose own step never goes back, gets it as
                `<stage>/step`.
        """
        for tracker in self.accelerator.trackers if self.processes.main else ():
            named = {f"{stage}/{name}": value for name, value in values.items()}
            if tracker.name == "wandb":
                tracker.tracker.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
                tracker.log({**named, f"{stage}/step": step})
            else:
                tracker.log(named, step=step)

    def require_alike(self, **facts: str | int | None) -> None:
        """Refuses processes that would work on other things, in another precision or by other code.

        Args:
            facts: what shapes the result beside those: digests of files and settings, by name.
        """
        code = {
            "precision": self.precision,
            "seed": self.seed,
            "guardbench": guardbench.__version__,
            "commit": self.commit,
            "torch": torch.__version__,
        }
        self.processes.require_alike(
            {
                name.replace("_", " "): None if value is None else str(value)
                for name, value in {**facts, **code}.items()
            }
        )

    def stage(self, name: str, kind: str, words: Mapping[str, Any]) -> StageFolder:
        """The folder of a stage: `<workspace>/<kind>/<first 16 digits of its key>`.

        The versions of guardbench and torch are part of the key, so that an upgrade to another release
        never takes over what an earlier one made. Commits between releases are not: a record names all
        that worked on its stages.
        """
        made_by = {"guardbench": guardbench.__version__, "torch": torch.__version__}
        words = {**words, "made_by": made_by}
        say, made = self.progress.say, self.made
        folder = StageFolder(name, Path(), words, self.processes, say, made, self.commit)
        folder.path = self.workspace / kind / folder.key[:16]
        return folder

    def generator(self, *names: str | int, seed: int | None = None) -> torch.Generator:
        """A CPU generator for the random choice called `names`."""
        root = self.seed if seed is None else seed
        return torch.Generator().manual_seed(canonical.derive_seed(root, *names))


def take_step(
    scaler: torch.amp.GradScaler,
    optimizer: torch.optim.Optimizer,
    loss: Tensor,
    where: str,
    remedy: str,
) -> float:
    """Moves a network along its gradients, which `scaler` has scaled, and gives the loss as a float.

    In float16 a step that overflows is left out and the scale halved, as it is now and then by design.

    Args:
        loss: not scaled.
        where, remedy: see `check_finite`.

    Raises:
        GuardbenchError: the loss is not finite, and no smaller scale would mend that.
    """
    before = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    if 1 <= scaler.get_scale() < before:
        return loss.item()
    return check_finite(loss, where, remedy)


def check_finite(loss: Tensor, where: str, remedy: str) -> float:
    """The loss as a float; stops at once when it is not finite, naming the step and the way out."""
    value = loss.item()
    if value != value or value in (float("inf"), float("-inf")):
        raise GuardbenchError(f"{where}: the loss is {value}; {remedy}.")
    return value
