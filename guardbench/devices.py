"""What a run computes on and in which precision, and how much memory that takes."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import importlib.util
import os
import platform
import resource
import sys
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.state import AcceleratorState  # type: ignore[import-untyped]
from accelerate.utils import InitProcessGroupKwargs  # type: ignore[import-untyped]
from accelerate.utils.memory import should_reduce_batch_size  # type: ignore[import-untyped]

from guardbench.errors import GuardbenchError
from guardbench.processes import HOURS_TO_WAIT
from guardbench.protocol import unknown

TRACKERS = ("tensorboard", "wandb")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
# Below this resolution a CPU's kernels are too small to gain by bf16 or by threads.
SMALL_RESOLUTION = 32


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
            `auto` is what `accelerate launch --mixed_precision` says; where that is `no`, as it also is where
            nobody has said it, bf16 where the device gains by it, float32 elsewhere. `fp16` scales the
            losses of networks, see `Run.scaler`, and leaves in float32 what is optimised without one: images.
        resolution: side of the images in pixels.
        trackers: `tensorboard`, `wandb`: who is told the losses of training, see `Run.log`.
        folder: where trackers write.

    Raises:
        GuardbenchError: the device is not there, or cannot do the precision, or a tracker is unknown or
            not installed, or the launcher asks for gradient accumulation.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision == "auto" and launched != "no":
        precision = launched
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
    official_arithmetic()
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
    accumulate = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulate != "1":
        raise GuardbenchError(
            f"the launcher's gradient_accumulation_steps {accumulate}: a recipe says in how many parts a "
            f"batch is taken; leave that out, and add --set squeeze.accumulate={accumulate}."
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


def official_arithmetic() -> None:
    """Float32 is float32 and not TF32, and a resumed run ends as an unbroken one."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def _check_device(device: str) -> str:
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if device == "auto":
        return "cuda" if there["cuda"] else "mps" if there["mps"] else "cpu"
    kind, colon, number = device.partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if not there.get(kind) or (colon and number not in map(str, range(count))):
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


def precision_support(kind: str) -> dict[str, str]:
    """How this machine's device of that kind computes in each precision that `--precision` names.

    `native`; `emulated`, so no faster than fp32; or `absent`, so that a run cannot have it.
    """
    bf16 = "native" if bf16_gains(kind, SMALL_RESOLUTION) else "emulated"
    old_gpu = kind == "cuda" and not torch.cuda.is_bf16_supported()
    if old_gpu or (kind == "mps" and not torch.backends.mps.is_macos_or_newer(14, 0)):
        bf16 = "absent"
    return {"fp32": "native", "bf16": bf16, "fp16": "native" if kind == "cuda" else "absent"}


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


def out_of_memory(error: RuntimeError) -> bool:
    """Whether a device's memory ran out."""
    said = str(error)
    # What Accelerate does not know: CUDA's own call, cuBLAS, and cuDNN without room for its workspace.
    others = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "unable to find an engine")
    return should_reduce_batch_size(error) or any(words in said for words in others)


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


def others_on(device: torch.device) -> bool:
    """Whether other processes compute on the same GPU, as far as NVIDIA's `pynvml` is there to tell."""
    if device.type != "cuda" or importlib.util.find_spec("pynvml") is None:
        return False
    import pynvml  # type: ignore[import-not-found,import-untyped,unused-ignore]

    try:
        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        there = pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByUUID(uuid))
    except pynvml.NVMLError:
        return False
    pids = [each.pid for each in there]
    # A suite has planned on the GPU that its cells run on, and waits.
    own = {os.getpid(), *_ancestors()}
    # In a container that sees other numbers than the driver, one is this process.
    others = pids if own & {*pids} else pids[1:]
    return any(pid not in own and not _shares(pid) for pid in others)


def _ancestors() -> list[int]:
    """The processes that this one was started by, as far as they can be seen."""
    try:
        return [each.pid for each in psutil.Process(os.getpid()).parents()]
    except psutil.Error:
        return []


def _shares(pid: int) -> bool:
    """Whether a process is the server through which several share a GPU, and none of them."""
    try:
        return str(psutil.Process(pid).name()).startswith("nvidia-cuda-mps")
    except psutil.Error:
        return False
