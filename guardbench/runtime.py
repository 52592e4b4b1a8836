"""Where and how stages run: device, precision, memory, and folders that survive a kill.

A stage is keyed by a digest of everything that shapes its result. Its folder holds checkpoints while
it runs and a `stage.json` once it is finished; a finished stage is never run again.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import importlib.util
import io
import json
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.state import AcceleratorState  # type: ignore[import-untyped]
from accelerate.utils import InitProcessGroupKwargs  # type: ignore[import-untyped]
from torch import Tensor

import guardbench
from guardbench import canonical, interrupts, locks
from guardbench.commit import running_commit
from guardbench.errors import GuardbenchError, brief
from guardbench.processes import HOURS_TO_WAIT, Processes
from guardbench.progress import Progress
from guardbench.protocol import unknown
from guardbench.records import StageCost
from guardbench.store import explained, write_bytes, write_text

TRACKERS = ("tensorboard", "wandb")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
CHECKPOINT_EVERY_S = 20.0
# Below this resolution a CPU's kernels are too small to gain by bf16 or by threads.
SMALL_RESOLUTION = 32


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, a model that draws from torch's own generators answers as it would at any other time."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def make_accelerator(
    device: str,
    precision: str,
    resolution: int,
    trackers: tuple[str, ...] = (),
    folder: Path | None = None,
) -> Accelerator:
    """The Accelerator of a run.

    Args:
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        precision: of training and distillation (official attacks are float32 whatever it is).
            `auto` is bf16 where the device gains by it, float32 elsewhere. `fp16` scales the losses of
            networks, see `Run.scaler`, and leaves in float32 what is optimised without one: images.
        resolution: side of the images in pixels.
        trackers: `tensorboard`, `wandb`: who is told the losses of training, see `Run.log`.
        folder: where trackers write.

    Raises:
        GuardbenchError: the device is not there, or cannot do the precision, or a tracker is unknown or
            not installed.
    """
    if precision not in PRECISIONS:
        raise GuardbenchError(f"--precision {precision}: choose one of {', '.join(PRECISIONS)}.")
    kind = _check_device(device)
    if kind == "cuda" and ":" in device:
        torch.cuda.set_device(torch.device(device))
    if precision == "fp16" and kind != "cuda":
        raise GuardbenchError(
            f"--precision fp16: for GPUs without bf16, and this runs on {kind}; choose bf16 or fp32."
        )
    if precision == "auto":
        precision = "bf16" if bf16_gains(kind, resolution) else "fp32"
    if kind == "cpu" and resolution < SMALL_RESOLUTION:
        torch.set_num_threads(1)  # on tiny kernels a second thread waits more than it works
    mixed = "no" if precision == "fp32" else precision
    # Official numbers are float32 and not TF32, and a resumed run must end as an unbroken one.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    # Accelerate keeps one state a process and refuses another precision; a second run may want one.
    AcceleratorState._reset_state(reset_partial_state=True)
    patience = InitProcessGroupKwargs(timeout=datetime.timedelta(hours=HOURS_TO_WAIT))
    for name in trackers:
        if name not in TRACKERS:
            raise unknown("tracker", name, TRACKERS)
        if importlib.util.find_spec(name) is None:
            raise GuardbenchError(
                f"--log-with {name}: it is not installed; python -m pip install {name}."
            )
    accelerator = Accelerator(
        cpu=kind == "cpu",
        mixed_precision=mixed,
        kwargs_handlers=[patience],
        log_with=list(trackers) or None,
        project_dir=folder,
    )
    if accelerator.num_processes > 1:
        atexit.register(accelerator.state.destroy_process_group)
    return accelerator


def _check_device(device: str) -> str:
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if device == "auto":
        return "cuda" if there["cuda"] else "mps" if there["mps"] else "cpu"
    kind, _, number = device.partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if not there.get(kind) or (number and not (number.isdigit() and int(number) < count)):
        found = ", ".join(name for name, ok in there.items() if ok)
        raise GuardbenchError(f"--device {device}: not on this machine, which has {found}.")
    return kind


def bf16_gains(kind: str, resolution: int) -> bool:
    """Whether this machine's device of that kind (`cpu`, `cuda`, `mps`) is faster in bf16 than in float32.

    Args:
        resolution: side of the images in pixels.
    """
    native = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    flags = Path("/proc/cpuinfo")
    text = flags.read_text() if kind == "cpu" and flags.is_file() else ""
    return _gains(kind, resolution, native=native, flags=text)


def _gains(kind: str, resolution: int, *, native: bool, flags: str) -> bool:
    """`bf16_gains` of a GPU that has bf16 units or not, or of a processor with these flags.

    Emulated bf16 is slower than float32, so what counts is whether the instructions are there.
    """
    if kind == "cuda":
        return native
    if kind != "cpu" or resolution < SMALL_RESOLUTION:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def effective_precision(accelerator: Accelerator) -> str:
    """`fp32`, `bf16` or `fp16`: what autocast really does on this accelerator."""
    mixed = str(accelerator.mixed_precision)
    return "fp32" if mixed == "no" else mixed


class MemoryMeter:
    """Peak memory since it was made: of the device's allocator on CUDA, of the process elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            # Linux forgets the old peak on request; elsewhere the peak is the process's.
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        """Bytes."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        status = Path("/proc/self/status")
        if status.is_file():
            for line in status.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


@dataclass
class StageFolder:
    """One stage of a run on disk.

    Attributes:
        name: `squeeze`, `recover`, `relabel`, `student 0`, `attack pgd100 0` and so on.
        path: its folder.
        words: everything that shaped its result; `key` is their digest.
        processes: of the run. Its first one reads and writes the folder and tells the others, so each
            method must be called by all of them.
        say: where a line goes that the user should see.
        made: the keys of the stages that this run has finished itself.
        commit: of the code that runs.
    """

    name: str
    path: Path
    words: Mapping[str, Any]
    processes: Processes
    say: Callable[[str], None]
    made: set[str]
    commit: str | None
    _alone: bool = field(default=False, init=False)
    _begun: float = field(default=0.0, init=False)
    _spent: float = field(default=0.0, init=False)
    _saved: float = field(default=0.0, init=False)
    _took: float = field(default=0.0, init=False)
    _calls: int = field(default=0, init=False)
    _ask_at: int = field(default=0, init=False)
    _meter: MemoryMeter | None = field(default=None, init=False)

    @property
    def key(self) -> str:
        """SHA-256 of `words`."""
        return canonical.digest(self.words)

    @property
    def checkpoint_path(self) -> Path:
        """Where the unfinished stage keeps its state."""
        return self.path / "checkpoint.pt"

    @property
    def reused(self) -> bool:
        """Whether what it left is of an earlier run, or of another one at the same time."""
        return self.key not in self.made

    @contextlib.contextmanager
    def claimed(self) -> Iterator[dict[str, Any] | None]:
        """Gives what `finish` stored, or None when the stage is left to the block, and to it alone.

        Waits while another process is at it, says who that is, and then reads what it has left. Inside,
        a signal waits for the next checkpoint (`interrupts.inside_stage`).
        """
        stored = self.finished()
        if stored is not None:
            yield stored
            return
        with contextlib.ExitStack() as stack:
            self._lock(stack)
            stored = self.finished()
            if stored is None:
                stack.enter_context(interrupts.inside_stage(self.name))
            yield stored

    def _lock(self, stack: contextlib.ExitStack) -> None:
        """Holds the folder's lock to the end of `stack`; the others hear that it waits."""
        if not self.processes.main:
            while self._told_to_wait(wait=True):
                pass
            return
        lock = self.path / ".lock"
        with explained(lock):
            held = locks.locked(lock, self._waiting, lambda: self._told_to_wait(wait=True))
            self._alone = stack.enter_context(held)
        self._told_to_wait(wait=False)

    def _told_to_wait(self, *, wait: bool) -> bool:
        return self.processes.from_main(lambda: wait)

    def _waiting(self, holder: str) -> None:
        self.say(f"{self.name}: waiting for another process that is at it: {holder}")

    def finished(self) -> dict[str, Any] | None:
        """What `finish` stored, or None when the stage has not ended."""
        return self.processes.from_main(self._finished)

    def _finished(self) -> dict[str, Any] | None:
        path = self.path / "stage.json"
        if not path.is_file():
            return None
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            seal = stored.pop("seal", None)  # older ones have none
            if seal not in (None, canonical.digest(stored)):
                raise ValueError("it has changed since it was written")
            if stored["key"] != self.key:
                raise ValueError("it belongs to another stage")
            for name, sha in stored["files"].items():
                if canonical.file_digest(self.path / name) != sha:
                    raise ValueError(f"{name} has changed since it was written")
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise GuardbenchError(
                f"{path}: {error}; delete the folder and run again to rebuild it."
            ) from error
        return dict(stored)

    def begin(self, device: torch.device) -> dict[str, Any] | None:
        """Starts the clock; returns the last checkpoint of an earlier, unfinished run, if any.

        One that is damaged is set aside with a line, and the stage begins anew.
        """
        self._begun = self._saved = time.monotonic()
        self._meter = MemoryMeter(device)
        found = self.processes.from_main(self._last_checkpoint)
        if found is None:
            return None
        self._spent, state = found
        return state

    def _last_checkpoint(self) -> tuple[float, dict[str, Any]] | None:
        if self._alone:
            for part in self.path.rglob(".*.part"):  # of a run that was killed while it wrote
                part.unlink(missing_ok=True)
        if not self.checkpoint_path.is_file():
            return None
        try:
            return self._read_checkpoint()
        except ValueError as error:
            aside = self.checkpoint_path.with_suffix(".damaged")
            with explained(aside):
                self.checkpoint_path.replace(aside)
            self.say(
                f"{self.checkpoint_path}: unreadable checkpoint ({error}); set aside as {aside.name}, "
                f"and {self.name} begins anew"
            )
            return None

    def _read_checkpoint(self) -> tuple[float, dict[str, Any]]:
        try:
            stored = torch.load(self.checkpoint_path, map_location="cpu", weights_only=True)
            if stored["key"] != self.key:
                raise ValueError("it belongs to another stage")
            return float(stored["seconds"]), dict(stored["state"])
        # Broad on purpose: torch's restricted unpickler raises struct.error, IndexError and more for
        # damaged bytes, no list of them is complete, and each means the same to the user.
        except Exception as error:
            raise ValueError(brief(error)) from error

    @property
    def seconds(self) -> float:
        """Seconds worked on this stage, earlier runs included."""
        return self._spent + time.monotonic() - self._begun

    def due(self) -> bool:
        """Whether the last checkpoint is old enough to be worth another, at most a twentieth of the time.

        Or whether a signal asks for one.
        """
        self._calls += 1
        if self._calls < self._ask_at:
            return False
        elapsed = time.monotonic() - self._saved
        old = interrupts.wanted() or elapsed > CHECKPOINT_EVERY_S * max(1.0, self._took)
        if self.processes.count > 1:
            # A message a step would slow down short ones, so the next is a second away.
            rate = int(self._calls / max(time.monotonic() - self._begun, 1e-3))
            old, rate = self.processes.from_main(lambda: (old, rate))
            self._ask_at = self._calls + max(1, rate)
        return old

    def checkpoint(self, state: Mapping[str, Any], *, last: bool = True) -> None:
        """Writes tensors and plain values from which `begin` can go on; those of the first process.

        Args:
            last: whether a signal may end the command now; False where more is to be written.

        Raises:
            interrupts.Interrupted: a signal asked for the checkpoint, and it is written.
        """
        begun = time.monotonic()
        # torch's writer in C++ is called back, and an error there is fatal.
        with interrupts.unbroken():
            if self.processes.main:
                buffer = io.BytesIO()
                torch.save({"key": self.key, "seconds": self.seconds, "state": dict(state)}, buffer)
                write_bytes(self.checkpoint_path, buffer.getvalue())
            if last:
                interrupts.stop(f"{self.name} is saved")
        self._saved = time.monotonic()
        self._took = self._saved - begun

    def finish(
        self,
        device: torch.device,
        files: tuple[str, ...] = (),
        *,
        shared: bool = True,
        **facts: Any,
    ) -> dict[str, Any]:
        """Marks the stage as finished with its `files` (in `path`), cost and further `facts`.

        The peak memory is that of the process that took most.

        Args:
            shared: whether all processes of the run worked on it, or one, as on a student.
        """
        assert self._meter is not None, "begin comes first"
        cost = {
            "stage": self.name,
            "seconds": round(self.seconds, 3),
            "peak_memory_bytes": max(self.processes.collect(self._meter.peak())),
            "device": self.processes.times(device_name(device)) if shared else device_name(device),
        }
        stored = self.processes.from_main(lambda: self._finish(files, cost, facts))
        self.made.add(self.key)
        return stored

    def _finish(
        self, files: tuple[str, ...], cost: Mapping[str, Any], facts: Mapping[str, Any]
    ) -> dict[str, Any]:
        stored = {
            "key": self.key,
            "words": dict(self.words),
            "files": {name: canonical.file_digest(self.path / name) for name in files},
            "cost": cost,
            "commit": self.commit,
            **facts,
        }
        seal = canonical.digest(json.loads(canonical.dumps(stored)))
        write_text(self.path / "stage.json", canonical.dumps({**stored, "seal": seal}))
        self.checkpoint_path.unlink(missing_ok=True)
        return stored


def stage_cost(stored: Mapping[str, Any], *, shared: bool) -> StageCost:
    """The cost that `StageFolder.finish` stored, for a record."""
    return StageCost(**stored["cost"], shared=shared)


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

    def stage(self, name: str, kind: str, words: Mapping[str, Any]) -> StageFolder:
        """The folder of a stage: `<workspace>/<kind>/<first 16 digits of its key>`.

        The versions of guardbench and torch are part of the key, so that an upgrade never takes over
        what another version made.
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


def device_name(device: torch.device) -> str:
    """`NVIDIA H200`, or the name of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{device.type}: {name}"


def check_finite(loss: Tensor, where: str, remedy: str) -> float:
    """The loss as a float; stops at once when it is not finite, naming the step and the way out."""
    value = loss.item()
    if value != value or value in (float("inf"), float("-inf")):
        raise GuardbenchError(f"{where}: the loss is {value}; {remedy}.")
    return value
