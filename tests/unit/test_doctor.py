"""The doctor: each kind of line at its worst, what strangers may read of it, and its exit code."""

import errno
import json
from email.message import Message
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from typer.testing import CliRunner

from guardbench import doctor, locks
from guardbench.attacks import robustbench
from guardbench.cli import app
from guardbench.doctor import Line, Places, examine, private
from guardbench.errors import GuardbenchError


@pytest.fixture
def places(tmp_path, monkeypatch) -> Places:
    for name in ("GUARDBENCH_DATA", "GUARDBENCH_CACHE"):
        monkeypatch.delenv(name, raising=False)
    return Places(device="cpu", cache_dir=tmp_path / "cache", output=tmp_path / "runs")


def by_name(lines) -> dict[str, Line]:
    found = {line.name: line for line in lines}
    for line in found.values():
        assert line.state == "green" or line.remedy, f"{line.name} does not say what to do"
        assert "\n" not in line.found
    return found


def test_this_machine_can_run_the_digits(places, tmp_path) -> None:
    found = by_name(examine(places, seconds=0.2))
    assert not [line for line in found.values() if line.state == "red"]
    assert {"guardbench", "python", "torch", "robustbench", "pyautoattack", "device", "threads",
            "precision", "float32", "processes", "memory", "GUARDBENCH_DATA", "data digits",
            "data imagenet", "disk workspace", "disk cache", "write workspace", "write cache",
            "robustbench use", "speed"} <= found.keys()  # fmt: skip
    assert "models in its zoo" in found["robustbench use"].found
    assert "resnet18 at 64 px" in found["speed"].found
    assert list(tmp_path.iterdir()) == [], "it writes nothing"


@pytest.mark.parametrize("check", ["versions", "devices", "data", "adapter", "speed", "processes"])
def test_a_check_that_crashes_is_a_red_line_and_the_others_go_on(
    places, monkeypatch, check
) -> None:
    def crash(*_: object) -> None:
        raise ZeroDivisionError("by\nzero")

    for name in ("versions", "devices", "precision", "processes", "memory", "data", "disk",
                 "writable", "adapter", "speed"):  # fmt: skip
        monkeypatch.setattr(doctor, name, lambda *_: iter([Line("fine", "green", "")]))
    monkeypatch.setattr(doctor, check, crash)
    lines = list(examine(places))
    assert len(lines) == 10
    (red,) = (line for line in lines if line.state == "red")
    assert red.found == "ZeroDivisionError: by"
    assert red.remedy
    assert red.vital == (check in ("versions", "devices", "speed"))


def test_versions(monkeypatch) -> None:
    about = Message()
    about["Requires-Python"] = ">=3.10"
    about["Requires-Dist"] = "torch>=99"
    about["Requires-Dist"] = "nothing-like-it>=1"
    about["Requires-Dist"] = "other; python_version < '3'"
    monkeypatch.setattr(metadata, "metadata", lambda _: about)
    found = by_name(doctor.versions())
    assert (found["torch"].state, found["torch"].vital) == ("red", True)
    assert found["torch"].remedy == "python -m pip install 'torch>=99'"
    assert (found["nothing-like-it"].state, found["nothing-like-it"].vital) == ("red", True)
    assert "other" not in found
    assert found["python"].state == found["accelerate"].state == "green"
    about.replace_header("Requires-Python", "<3")
    python = by_name(doctor.versions())["python"]
    assert (python.state, python.vital) == ("red", True)

    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "metadata", absent)
    assert by_name(doctor.versions())["guardbench"].state == "yellow"


def test_devices(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_nvidia", lambda: True)
    monkeypatch.setattr(doctor, "_cores", lambda: 0)
    found = by_name(doctor.devices("cpu"))
    assert found["cuda"].state == "yellow"
    assert found["threads"].state == "yellow"
    monkeypatch.setattr(doctor, "versions", lambda: iter(()))
    line = next(examine(Places(device="cuda:99")))
    assert (line.state, line.vital) == ("red", True)
    assert "cuda:99" in line.found


@pytest.mark.parametrize(("free", "state"), [(1e9, "yellow"), (9e9, "green")])
def test_a_gpu_and_what_is_left_of_it(monkeypatch, free: float, state: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(free), int(16e9)))
    line = by_name(doctor.devices("cpu"))["cuda:0"]
    assert line.state == state
    assert "A GPU, " in line.found
    assert "of 16 GB free" in line.found


def test_precision(monkeypatch) -> None:
    gpu = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr("guardbench.devices.make_accelerator", lambda *_: gpu)
    monkeypatch.setattr("guardbench.devices.bf16_gains", lambda *_: False)
    monkeypatch.setattr(doctor, "_product_error", lambda _: 1e-3)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    found = by_name(doctor.precision("cuda"))
    assert found["precision"].state == "yellow"
    assert found["float32"].state == "red"
    assert "unset NVIDIA_TF32_OVERRIDE" in found["float32"].remedy


def test_a_product_in_half_precision_would_be_seen() -> None:
    assert doctor._product_error(torch.device("cpu")) < doctor.ROUGH / 10
    a, b = (torch.randn(256, 256, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    # TF32 keeps ten bits of the mantissa.
    a, b = ((x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (a, b))
    exact = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)) @ torch.randn(
        256, 256, generator=torch.Generator().manual_seed(1)
    )
    assert ((a @ b - exact).norm() / exact.norm()).item() > doctor.ROUGH


def test_processes_memory_and_speed(monkeypatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    assert by_name(doctor.processes())["processes"].state == "yellow"
    scarce = SimpleNamespace(available=1_000_000_000, total=2_000_000_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: scarce)
    assert by_name(doctor.memory())["memory"].state == "yellow"
    monkeypatch.setattr(doctor, "_rate", lambda *_, **__: 1.0)
    assert by_name(doctor.speed("cpu", 0.1))["speed"].state == "yellow"


def test_data(places, tmp_path, monkeypatch) -> None:
    found = by_name(doctor.data(places))
    assert found["data digits"].state == "green"
    assert found["data imagenette"].state == found["data imagenet"].state == "yellow"
    assert "1557 MB" in found["data imagenette"].found
    image = tmp_path / "data" / "imagenette" / "train" / "n01440764" / "a.jpg"
    image.parent.mkdir(parents=True)
    image.write_bytes(bytes(1234))
    monkeypatch.setenv("GUARDBENCH_DATA", str(tmp_path / "data"))
    (tmp_path / "data" / "cifar10").mkdir()
    found = by_name(doctor.data(places))
    assert found["data imagenette"].found.endswith("1 files, 1.23 kB")
    assert found["data cifar10"].state == "red"
    monkeypatch.setattr(doctor, "LISTING_S", -1.0)
    assert "at least" in by_name(doctor.data(places))["data imagenette"].found
    monkeypatch.setenv("GUARDBENCH_DATA", str(tmp_path / "nowhere"))
    found = by_name(doctor.data(places))
    assert found["GUARDBENCH_DATA"].state == "red"
    assert found["data digits"].state == "green"
    assert "data imagenette" not in found


@pytest.mark.parametrize(("free", "state"), [(1e8, "red"), (5e9, "yellow"), (5e10, "green")])
def test_disk(places, monkeypatch, free: float, state: str) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=int(free)))
    found = by_name(doctor.disk(places))
    assert found["disk workspace"].state == found["disk cache"].state == state
    assert found["disk workspace"].vital == (state != "green")
    assert not found["disk cache"].vital


def test_writable(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    blocked = Places(cache_dir=tmp_path / "file" / "cache", output=tmp_path / "file" / "runs")
    found = by_name(doctor.writable(blocked))
    assert (found["write workspace"].state, found["write workspace"].vital) == ("red", True)
    assert (found["write cache"].state, found["write cache"].vital) == ("red", False)
    assert found["write Hugging Face cache"].state == "green"


def test_an_adapter_that_is_broken(places, monkeypatch) -> None:
    def broken() -> None:
        raise GuardbenchError("robustbench cannot be imported (no luck): pip install it.")

    monkeypatch.setattr(robustbench, "robustbench", broken)
    monkeypatch.setattr(doctor, "_rate", lambda *_, **__: 1e6)
    line = by_name(examine(places))["robustbench use"]
    assert line.found.startswith("robustbench cannot be imported")


def test_what_a_stranger_reads_has_no_home_and_no_secret(monkeypatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/home/jane"))
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    said = private("/home/jane/.cache and /home/janet by hf_abcdefgh at /home/jane")
    assert said == "~/.cache and /home/janet by *** at ~"


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (Line("a", "green", "x"), 0),
        (Line("a", "red", "x", "y"), 0),
        (Line("a", "yellow", "x", "y", vital=True), 0),
        (Line("a", "red", "x", "y", vital=True), 1),
    ],
)
def test_the_exit_code_says_whether_the_digits_can_be_run(
    monkeypatch, line: Line, code: int
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda *_: iter([line]))
    assert CliRunner().invoke(app, ["doctor"]).exit_code == code
    found = CliRunner().invoke(app, ["doctor", "--json"])
    assert found.exit_code == code
    words = json.loads(found.output)
    assert words["digits_can_be_run"] == (code == 0)
    assert words["lines"][0]["state"] == line.state


@pytest.mark.parametrize(
    ("kind", "flags", "units", "tensors", "expected"),
    [
        ("cpu", "avx2", False, False, "fp32 native, bf16 emulated, fp16 absent, on cpu"),
        ("cpu", "avx2 amx_bf16", False, False, "fp32 native, bf16 native, fp16 absent, on cpu"),
        ("cuda", "", True, True, "fp32 native, bf16 native, fp16 native, on cuda"),
        ("cuda", "", False, True, "fp32 native, bf16 emulated, fp16 native, on cuda"),
        ("cuda", "", False, False, "fp32 native, bf16 absent, fp16 native, on cuda"),
    ],
)
def test_each_precision_is_native_emulated_or_absent(
    monkeypatch, kind: str, flags: str, units: bool, tensors: bool, expected: str
) -> None:
    """As of a GPU with bf16 units, of one on which torch emulates them, and of one without either."""
    device = SimpleNamespace(device=torch.device(kind))
    monkeypatch.setattr("guardbench.devices.make_accelerator", lambda *_: device)
    monkeypatch.setattr("guardbench.devices.Path.is_file", lambda _: True)  # /proc/cpuinfo
    monkeypatch.setattr("guardbench.devices.Path.read_text", lambda _: flags)
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: tensors if including_emulation else units,
    )
    monkeypatch.setattr(doctor, "_product_error", lambda _: 0.0)
    assert by_name(doctor.precision(kind))["precisions"].found == expected


def test_a_folder_without_file_locks_is_yellow_and_says_what_to_do(
    places, tmp_path, monkeypatch
) -> None:
    def refuses(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    names = ("locks workspace", "locks cache")
    assert [by_name(doctor.writable(places))[name].state for name in names] == ["green"] * 2
    monkeypatch.setattr(locks.fcntl, "flock", refuses)
    found = by_name(doctor.writable(places))
    for name, option in zip(names, ("runs", "cache"), strict=True):
        assert found[name].state == "yellow"
        assert option in found[name].found
        assert "a folder of its own" in found[name].remedy
    assert found["write workspace"].state == "green"
    assert list(tmp_path.iterdir()) == []
