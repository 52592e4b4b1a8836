"""What this machine has of what guardbench needs: versions, devices, data, disk, speed.

Every check imports what it looks at by itself, so that what is broken becomes a red line and no traceback.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import guardbench
from guardbench.errors import GuardbenchError, brief

if TYPE_CHECKING:
    import torch
    from torch import nn

State = Literal["green", "yellow", "red"]
PACKAGES = ("torch", "torchvision", "accelerate", "robustbench", "pyautoattack")
LITTLE_DISK, NO_DISK = 10e9, 0.5e9  # bytes
LITTLE_MEMORY = 2e9  # bytes; the digits take 1.2 GB
ROUGH = 1e-4  # relative error of a float32 product; TF32's is about 1e-3
LISTING_S = 2.0
NETWORK, SIDE, BATCH = "resnet18", 64, 64
SLOW = {"cpu": 20.0, "cuda": 1000.0, "mps": 100.0}
"""Images a second, forward and backward, below which something is in the way or the device is small."""


@dataclass(frozen=True)
class Line:
    """One finding.

    Attributes:
        name: what was looked at.
        state: `green`: as it should be; `yellow`: some uses suffer; `red`: something does not work.
        found: what there is.
        remedy: what to do where it is not green.
        vital: whether, where it is red, `guardbench run --dataset digits` cannot work.
    """

    name: str
    state: State
    found: str
    remedy: str = ""
    vital: bool = False


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where a run would look and write; as the options of `guardbench run`."""

    device: str = "auto"
    data_dir: Path | None = None
    cache_dir: Path | None = None
    output: Path = Path("guardbench-runs")


def examine(places: Places, seconds: float = 10.0) -> Iterator[Line]:
    """All findings, one after another.

    Args:
        seconds: what the speed check may take.
    """
    checks: list[tuple[str, Callable[[], Iterator[Line]], bool]] = [
        ("versions", versions, True),
        ("device", lambda: devices(places.device), True),
        ("precision", lambda: precision(places.device), True),
        ("processes", processes, False),
        ("memory", memory, False),
        ("data", lambda: data(places), False),
        ("disk", lambda: disk(places), True),
        ("writable", lambda: writable(places), True),
        ("robustbench use", adapter, False),
        ("speed", lambda: speed(places.device, seconds), True),
    ]
    for name, check, vital in checks:
        try:
            yield from check()
        # Broad on purpose: a check looks for what is broken, and however it breaks is what it found.
        except Exception as error:  # noqa: BLE001
            kind = "" if isinstance(error, GuardbenchError) else f"{type(error).__name__}: "
            remedy = (
                "mend that; if it is guardbench's fault, report it with `guardbench doctor --json`"
            )
            yield Line(name, "red", f"{kind}{brief(error, 300)}", remedy, vital)


def private(text: str) -> str:
    """`text` for strangers' eyes: the home folder as `~`, and no secret that the environment holds."""
    for name, value in os.environ.items():
        if len(value) >= 8 and any(
            word in name.upper() for word in ("TOKEN", "SECRET", "PASSWORD", "KEY")
        ):
            text = text.replace(value, "***")
    try:
        home = str(Path.home())
    except RuntimeError:  # none is known, as in some containers
        return text
    return re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text) if len(home) > 1 else text


def versions() -> Iterator[Line]:
    """Python and the packages, beside what this guardbench asks for."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    try:
        about = metadata.metadata("guardbench")
    except metadata.PackageNotFoundError:
        yield Line(
            "guardbench", "yellow", f"{guardbench.__version__}, not installed, so nothing says what it needs",
            "python -m pip install . in its folder",
        )  # fmt: skip
        asked, python = {}, ""
    else:
        yield Line("guardbench", "green", guardbench.__version__)
        parsed = (Requirement(text) for text in about.get_all("Requires-Dist") or [])
        asked = {
            each.name: each.specifier
            for each in parsed
            if not each.marker or each.marker.evaluate()
        }
        python = about["Requires-Python"] or ""
    fits = SpecifierSet(python).contains(platform.python_version(), prereleases=True)
    words = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    remedy = f"install a Python {python}"
    yield Line("python", "green", words) if fits else Line("python", "red", words, remedy, True)
    for name in [*PACKAGES, *sorted(set(asked) - set(PACKAGES))]:
        wanted = asked.get(name, SpecifierSet())
        remedy = f"python -m pip install '{name}{wanted}'"
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Line(name, "red", "not installed", remedy, True)
            continue
        if not wanted.contains(version, prereleases=True):
            yield Line(name, "red", f"{version}, needed is {wanted}", remedy, True)
        elif name in PACKAGES:
            yield Line(name, "green", version)


def devices(device: str) -> Iterator[Line]:
    """The device that a run would take, the GPUs that there are, and the threads of the CPU."""
    import torch

    from guardbench.devices import device_name, make_accelerator
    from guardbench.report import byte_size

    chosen = make_accelerator(device, "fp32", SIDE).device
    yield Line("device", "green", f"runs take {device_name(chosen)} (--device {device})")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for number in range(count):
        free, total = torch.cuda.mem_get_info(number)
        found = (
            f"{torch.cuda.get_device_name(number)}, {byte_size(free)} of {byte_size(total)} free"
        )
        little = free < LITTLE_MEMORY
        remedy = "end what else uses it (nvidia-smi names it)"
        yield (
            Line(f"cuda:{number}", "yellow", found, remedy)
            if little
            else Line(f"cuda:{number}", "green", found)
        )
    if not count and _nvidia():
        build = f"torch {torch.__version__}" + (
            "" if torch.version.cuda else ", a build without CUDA"
        )
        yield Line(
            "cuda", "yellow", f"an NVIDIA GPU is here and {build} cannot use it",
            "install the CUDA build that fits the driver, from pytorch.org/get-started",
        )  # fmt: skip
    cores, threads = _cores(), torch.get_num_threads()
    found = f"{cores} cores for this process, {threads} threads"
    if threads > cores:
        yield Line(
            "threads", "yellow", found, f"threads wait for each other: OMP_NUM_THREADS={cores}"
        )
    else:
        yield Line("threads", "green", found)


def _nvidia() -> bool:
    """Whether an NVIDIA driver is loaded, whatever torch says."""
    return Path("/proc/driver/nvidia/version").is_file()


def _cores() -> int:
    there = getattr(os, "sched_getaffinity", None)
    return len(there(0)) if there is not None else os.cpu_count() or 1


def precision(device: str) -> Iterator[Line]:
    """What `--precision auto` means here, and whether float32 is really float32, as official numbers need."""
    from guardbench.devices import bf16_gains, make_accelerator, precision_support

    where = make_accelerator(device, "fp32", SIDE).device
    words = ", ".join(f"{name} {how}" for name, how in precision_support(where.type).items())
    yield Line("precisions", "green", f"{words}, on {where.type}")
    gains = bf16_gains(where.type, SIDE)
    found = f"training in {'bf16' if gains else 'fp32'} by --precision auto, attacks in fp32"
    if where.type == "cuda" and not gains:
        remedy = "nothing, if time does not matter: GPUs from Ampere on train several times faster"
        yield Line("precision", "yellow", f"{found}; this GPU has no bf16", remedy)
    else:
        yield Line("precision", "green", found)
    error = _product_error(where)
    words = f"a product is off by {error:.1e} of its size"
    if error < ROUGH:
        yield Line("float32", "green", words)
        return
    forced = os.environ.get("NVIDIA_TF32_OVERRIDE")
    remedy = (
        "unset NVIDIA_TF32_OVERRIDE" if forced else f"do not measure on {where}; use another device"
    )
    yield Line("float32", "red", f"{words}, which is not float32", remedy)


def _product_error(where: torch.device) -> float:
    """Relative error of a matrix product on the device, against float64 on the CPU."""
    import torch

    a, b = (torch.randn(256, 256, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    exact = a.double() @ b.double()
    found = (a.to(where) @ b.to(where)).cpu().double()
    return float((found - exact).norm() / exact.norm())


def processes() -> Iterator[Line]:
    """Whether `accelerate launch` can start several processes."""
    from torch import distributed

    kinds = ("gloo", "nccl")
    there = distributed.is_available()
    found = [kind for kind in kinds if there and getattr(distributed, f"is_{kind}_available")()]
    if found:
        yield Line("processes", "green", f"several can work together by {' and '.join(found)}")
    else:
        remedy = "for `accelerate launch`, install a torch with torch.distributed"
        yield Line("processes", "yellow", "torch cannot let several work together", remedy)


def memory() -> Iterator[Line]:
    """What is left of the main memory."""
    import psutil  # type: ignore[import-untyped]

    from guardbench.report import byte_size

    there = psutil.virtual_memory()
    found = f"{byte_size(there.available)} of {byte_size(there.total)} free"
    if there.available < LITTLE_MEMORY:
        yield Line(
            "memory",
            "yellow",
            found,
            f"end other programs: runs need {byte_size(int(LITTLE_MEMORY))}",
        )
    else:
        yield Line("memory", "green", found)


def _is_folder(said: str) -> bool:
    try:
        return Path(said).expanduser().is_dir()
    except RuntimeError:  # of no such user's home
        return False


def data(places: Places) -> Iterator[Line]:
    """Where each dataset is, how large, and what is missing."""
    from guardbench.data.catalog import CATALOG
    from guardbench.data.locate import DATA_VARIABLE, how_to_place, locate
    from guardbench.report import byte_size

    named = os.environ.get(DATA_VARIABLE)
    given = {DATA_VARIABLE: named, "--data-dir": places.data_dir and str(places.data_dir)}
    lost = {
        name: said
        for name, said in given.items()
        if said and not said.startswith("hf:") and not _is_folder(said)
    }
    for name, said in lost.items():
        yield Line(name, "red", f"{said} is no folder", "name the folder that holds the datasets")
    if not lost:
        yield Line(DATA_VARIABLE, "green", named or "not set; --data-dir says the same")
    for name, info in CATALOG.items():
        what = f"data {name}"
        if lost and not info.embedded:
            continue
        try:
            where = locate(name, places.data_dir, cache_dir=places.cache_dir)
        except GuardbenchError as error:
            if info.archive is None and "was not found" in str(error):
                found = f"not here, and to be had with an account alone, from {info.homepage}"
                yield Line(what, "yellow", found, how_to_place(info))
            else:
                yield Line(what, "red", str(error), "mend what the line says")
            continue
        if where.kind == "download":
            remedy = f"a run downloads it; or {how_to_place(info)}"
            yield Line(what, "yellow", f"not here: {where.description}", remedy)
        elif where.path is None:
            yield Line(what, "green", where.description)
        else:
            files, size, whole = _listed(where.path)
            least = "" if whole else f"at least (looked for {LISTING_S:.0f} s) "
            yield Line(
                what, "green", f"{where.description}: {least}{files} files, {byte_size(size)}"
            )


def _listed(folder: Path) -> tuple[int, int, bool]:
    """Files below `folder`, their bytes, and whether the time was enough for all."""
    files, size, until = 0, 0, time.monotonic() + LISTING_S
    for root, _, names in os.walk(folder):
        for name in names:
            files, size = files + 1, size + (Path(root) / name).lstat().st_size
            if time.monotonic() > until:
                return files, size, False
    return files, size, True


def _written(places: Places) -> list[tuple[str, Path, str]]:
    """What a run writes, where, and the option that names the folder."""
    from guardbench.data.files import cache_root

    cache = cache_root(places.cache_dir)
    return [("workspace", places.output, "--output"), ("cache", cache, "--cache-dir")]


def disk(places: Places) -> Iterator[Line]:
    """Space left where results and decoded images go."""
    from guardbench.report import byte_size

    for name, folder, option in _written(places):
        free = shutil.disk_usage(_there(folder)).free
        found = f"{byte_size(free)} free for {folder}"
        remedy = f"free some space, or choose another folder with {option}"
        if free >= LITTLE_DISK:
            yield Line(f"disk {name}", "green", found)
        else:
            state: State = "red" if free < NO_DISK else "yellow"
            yield Line(f"disk {name}", state, found, remedy, vital=name == "workspace")


def writable(places: Places) -> Iterator[Line]:
    """Whether results and caches can be written, and files be locked there."""
    from huggingface_hub.constants import HF_HOME

    hub = ("Hugging Face cache", Path(HF_HOME), "HF_HOME")
    for name, folder, setting in (*_written(places), hub):
        remedy, vital = f"choose another folder with {setting}", name == "workspace"
        there = _there(folder)
        try:
            if not there.is_dir():
                raise NotADirectoryError(20, f"{there} is a file")
            with tempfile.NamedTemporaryFile(prefix=".guardbench-", dir=there):
                pass
        except OSError as error:
            yield Line(f"write {name}", "red", f"{folder}: {error.strerror}", remedy, vital)
        else:
            yield Line(f"write {name}", "green", str(folder))
            if name != "Hugging Face cache":
                yield _lockable(name, folder, there)


def _lockable(name: str, folder: Path, there: Path) -> Line:
    """Whether a process can keep others from a file in `there`, which `folder` is or will be made in."""
    from guardbench.locks import locked

    with (
        tempfile.TemporaryDirectory(prefix=".guardbench-", dir=there) as inside,
        locked(Path(inside) / ".lock", lambda _: None) as held,
    ):
        if held:
            return Line(f"locks {name}", "green", f"files can be locked in {folder}")
    remedy = "give each run a folder of its own, or choose one on a disk with locks (Lustre: mount -o flock)"
    found = f"{folder}: no file locks there, so two runs at a time would get in each other's way"
    return Line(f"locks {name}", "yellow", found, remedy)


def _there(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that there is."""
    whole = folder.absolute()
    return next(path for path in (whole, *whole.parents) if path.exists())


def adapter() -> Iterator[Line]:
    """Whether robustbench, which cannot be imported as the index has it, can be used."""
    from importlib.util import find_spec

    from guardbench.attacks.robustbench import robustbench

    package = robustbench()
    count = sum(
        len(models) for by_norm in package.utils.all_models.values() for models in by_norm.values()
    )
    absent = [name for name in ("autoattack", "pkg_resources") if find_spec(name) is None]
    found = f"usable, {count} models in its zoo"
    yield Line(
        "robustbench use",
        "green",
        found + (f"; stand-ins for {', '.join(absent)}" if absent else ""),
    )


def speed(device: str, seconds: float) -> Iterator[Line]:
    """Images a second of ResNet-18 at 64 px, the student of `imagenette-64`: forward, and with backward."""
    from guardbench.devices import make_accelerator
    from guardbench.models import build_model

    where = make_accelerator(device, "fp32", SIDE).device
    model = build_model(NETWORK, channels=3, classes=10, resolution=SIDE, seed=0).to(where)
    forward, both = (_rate(model, where, seconds / 2, backward=each) for each in (False, True))
    found = (
        f"{NETWORK} at {SIDE} px in float32 on {where.type}: {forward:.0f} images/s forward, {both:.0f} "
        "forward and backward"
    )
    if both >= SLOW[where.type]:
        yield Line("speed", "green", found)
    else:
        remedy = "see what else runs here (top, nvidia-smi), or take a larger machine for more than digits"
        yield Line("speed", "yellow", f"{found}; {SLOW[where.type]:.0f} is little", remedy)


def _rate(model: nn.Module, where: torch.device, seconds: float, *, backward: bool) -> float:
    """Images a second, after one batch that pays for the start."""
    import torch

    images = torch.rand(BATCH, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).to(where)
    done, begun = 0, 0.0
    while not begun or time.perf_counter() - begun < seconds:
        with torch.set_grad_enabled(backward):
            loss = model(images).logsumexp(1).mean()
        if backward:
            loss.backward()
        loss.item()
        if begun:
            done += BATCH
        begun = begun or time.perf_counter()
    return done / (time.perf_counter() - begun)
