"""`guardbench run` as a user types it: plan, table, files, resume after a kill, bad input."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import clean_environment, guardbench, quick_protocol

from guardbench.data.catalog import dataset_info
from guardbench.record_files import load_record


def quick(folder: Path, *more: str) -> list[str]:
    protocol = quick_protocol(folder)
    return ["run", "--method", "guard", "--protocol", str(protocol), "--ipc", "1", *more]


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("ran")
    return folder, guardbench(*quick(folder), cwd=folder)


def the_record(folder: Path) -> Path:
    (path,) = folder.glob("guardbench-runs/records/quick/ipc1/*.json")
    return path


def test_a_run_prints_its_plan_its_stages_its_table_and_its_files(ran) -> None:
    folder, result = ran
    assert result.returncode == 0, result.stderr
    plan, _, rest = result.stdout.partition("expected")
    for word in ("digits at 8 px", "IPC", "quick", "squeeze", "recover", "relabel", "student",
                 "pgd100", "precision", "fp32", "guardbench-runs", "to do"):  # fmt: skip
        assert word in plan, word
    for word in ("squeeze: ", "recover: ", "relabel: ", "student 1: ", "mim 1: ", "95%", "worst"):
        assert word in rest, word
    paths = [Path(line.split()[-1]) for line in result.stdout.splitlines()[-8:] if "/" in line]
    assert len(paths) == 7, "artifact, record, images, teacher, two students, board"
    for path in paths:
        assert (folder / path).is_file(), path


def test_the_record_says_what_was_measured(ran) -> None:
    record = load_record(the_record(ran[0]))
    assert record.method.name == "guard"
    assert record.method.regulariser == "curvature"
    assert [run.seed for run in record.seeds] == [0, 1]
    assert record.test.total == 100
    assert {c.stage.split()[0] for c in record.cost} == {
        "squeeze", "recover", "relabel", "student", "clean", "checks",
        "pgd100", "fgsm", "mim", "cw", "square",
    }  # fmt: skip
    for run in record.seeds:
        assert run.attacks["square"].first == 20 * run.seed
        assert run.attacks["pgd100"].max_distance <= 16 / 255 + 1e-6
        assert not run.attacks["cw"].bounded
        assert {"zero-gradients", "restarts", "black-box", "single-step"} <= run.checks.keys()
    assert record.provenance.engines == {"square": "guardbench"}


def test_the_board_ranks_the_run(ran) -> None:
    board = json.loads((ran[0] / "guardbench-runs/leaderboards/quick/ipc1.json").read_text())
    assert "guard" in json.dumps(board)


def test_a_second_run_does_nothing_again_and_gives_the_same(ran) -> None:
    folder, _ = ran
    before = the_record(folder).read_bytes()
    stamps = {p: p.stat().st_mtime_ns for p in folder.rglob("stage.json")}
    result = guardbench(*quick(folder), cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "nothing is left to do" in result.stdout
    assert stamps == {p: p.stat().st_mtime_ns for p in folder.rglob("stage.json")}
    record = load_record(the_record(folder))
    assert all(cost.shared for cost in record.cost)
    old = json.loads(before)
    assert json.loads(the_record(folder).read_bytes())["seeds"] == old["seeds"]


def test_show_prints_the_table_again(ran) -> None:
    folder, result = ran
    shown = guardbench("show", str(the_record(folder)), cwd=folder)
    assert shown.returncode == 0, shown.stderr
    table = [line for line in result.stdout.splitlines() if line.startswith("pgd100  ")]
    assert table
    assert table[0] in shown.stdout


def test_a_dev_run_takes_over_the_students_and_stands_on_no_board(ran, tmp_path) -> None:
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(ran[0], folder)
    boards = {p: p.read_bytes() for p in folder.rglob("leaderboards/**/*.json")}
    result = guardbench(*quick(folder, "--tier", "dev"), cwd=folder)
    assert result.returncode == 0, result.stderr
    plan, _, rest = result.stdout.partition("expected")
    assert re.search(r"tier +dev, unofficial: 20 of 100 test images", plan)
    assert re.search(r"student .* done", plan)
    assert re.search(r"pgd100 .* to do", plan)
    assert re.search(r"^pgd100 +20 x 2 ", rest, re.MULTILINE)
    (path,) = folder.glob("guardbench-runs/dev/quick/ipc1/*.json")
    assert load_record(path).tier == "dev"
    assert "board" not in rest.partition("total")[2]
    assert {p: p.read_bytes() for p in folder.rglob("leaderboards/**/*.json")} == boards


def test_a_suite_goes_on_from_a_run_and_leaves_what_a_run_leaves(ran, tmp_path) -> None:
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(ran[0], folder)
    whole = load_record(the_record(folder))
    the_record(folder).unlink()
    words = ["--methods", "guard", "--protocols", "quick.toml", "--ipcs", "1"]
    result = guardbench("suite", *words, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert re.search(r"quick/ipc1/guard +0 of \d+ ", result.stdout)
    assert re.search(r"quick/ipc1/guard +[\d.]+ +pgd100 [\d.]+ .* done", result.stdout)
    record = load_record(the_record(folder))
    assert record.result_sha256 == whole.result_sha256
    assert record.provenance.threads == whole.provenance.threads


def test_dry_run_stops_after_the_plan_and_writes_nothing(tmp_path) -> None:
    result = guardbench(*quick(tmp_path, "--dry-run"), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "expected" in result.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["quick.toml"]


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_it_still_imports_is_one_line_too(tmp_path, sent, code: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "guardbench", *quick(tmp_path)],
        cwd=tmp_path, env=clean_environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    maps = Path(f"/proc/{process.pid}/maps")
    if not maps.exists():
        pytest.skip("no /proc to see what a process has imported")
    while "libtorch" not in maps.read_text():
        time.sleep(0.01)
    process.send_signal(sent)
    begun = time.monotonic()
    out, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert time.monotonic() - begun < 5
    assert errors == "interrupted; run the same command again\n"
    assert "Plan" not in out, "it was still importing"


BAD = {
    "no method": (["--dataset", "digits"], "Missing option '--method'. See "),
    "mistyped option": (["--metod", "guard"], "No such option: --metod"),
    "no number": (["--method", "guard", "--dataset", "digits", "--ipc", "many"], "'--ipc'"),
    "capitals": (["--method", "GUARD", "--dataset", "digits"], "Did you mean guard"),
    "method": (["--method", "gaurd", "--dataset", "digits"], "Did you mean guard"),
    "dataset": (["--method", "guard", "--dataset", "digit"], "Did you mean digits"),
    "protocol": (["--method", "guard", "--protocol", "cifar10_8"], "Did you mean cifar10-8"),
    "nothing": (["--method", "guard"], "--dataset digits"),
    "both": (["--method", "guard", "--dataset", "digits", "--protocol", "cifar10"], "drop one"),
    "ipc": (["--method", "guard", "--dataset", "digits", "--ipc", "7"], "1, 10, 50, 100"),
    "no protocol": (["--method", "guard", "--dataset", "cifar100"], "no protocol measures"),
    "field": (
        ["--method", "guard", "--dataset", "digits", "--set", "squeeze.epoch=5"],
        "Did you mean squeeze.epochs",
    ),
    "no recipe": (
        ["--method", "dsa", "--protocol", "imagenette"], "no recipe for imagenette@224; it has cifar10",
    ),
    "no recipe for the ipc": (
        ["--method", "mtt", "--protocol", "cifar10-convnet", "--ipc", "100"],
        "for IPC 100; it has IPC 1, 10, 50.",
    ),
    "folder": (
        ["--method", "guard", "--dataset", "imagenette", "--data-dir", "nowhere"], "nowhere",
    ),
    "device": (["--method", "guard", "--dataset", "digits", "--device", "cuda:9"], "cuda:9"),
    "precision": (["--method", "guard", "--dataset", "digits", "--precision", "fp8"], "fp8"),
    "output": (["--method", "guard", "--dataset", "digits", "--output", "file/x"], "file"),
    "long output": (
        ["--method", "guard", "--dataset", "digits", "--output", "x" * 300], "cannot be written",
    ),
    "nothing can be made there": (
        ["--method", "guard", "--dataset", "digits", "--output", "/proc/here"],
        "/proc/here: cannot be written",
    ),
    "dev publish": (
        ["--method", "guard", "--dataset", "digits", "--tier", "dev", "--publish"], "unofficial",
    ),
    "checkout": (["--method", "guard", "--dataset", "digits", "--publish"], "no checkout"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_2(tmp_path, name: str) -> None:
    words, said = BAD[name]
    (tmp_path / "file").write_text("")
    result = guardbench("run", *words, cwd=tmp_path)
    assert result.returncode == 2
    assert said in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stdout + result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_teacher_that_diverges_is_one_line_and_no_stage_is_finished(tmp_path) -> None:
    result = guardbench(*quick(tmp_path, "--set", "squeeze.lr=1e30"), cwd=tmp_path)
    assert result.returncode == 2
    assert re.fullmatch(
        r"error: squeeze, epoch 1, step \d+: .*--set squeeze.lr=0.01\.\n", result.stderr
    )
    assert "Traceback" not in result.stdout
    left = [path for path in (tmp_path / "guardbench-runs").rglob("*") if path.is_file()]
    assert left == []


def test_what_the_system_refuses_to_read_is_one_line(tmp_path) -> None:
    """A link to itself; permissions would say the same, but not to root."""
    for split in ("train", "val"):
        for name in dataset_info("imagenette").classes:
            folder = tmp_path / "data" / "imagenette" / split / name
            folder.mkdir(parents=True)
            (folder / "loop.png").symlink_to("loop.png")
    words = ["--method", "guard", "--dataset", "imagenette", "--data-dir", "data"]
    result = guardbench("run", *words, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "loop.png" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("damage", ["stage", "weights"])
def test_a_damaged_workspace_is_told_and_not_believed(ran, tmp_path, damage: str) -> None:
    import shutil

    shutil.copytree(ran[0], tmp_path / "copy")
    folder = tmp_path / "copy"
    (teacher,) = folder.glob("guardbench-runs/teachers/*")
    if damage == "stage":
        (teacher / "stage.json").write_text("{")
    if damage == "weights":
        (teacher / "teacher.safetensors").write_bytes(b"x")
    result = guardbench(*quick(folder), cwd=folder)
    assert result.returncode == 2
    assert "delete" in result.stderr
    assert str(teacher.name) in result.stderr


def test_a_full_disk_is_one_line(tmp_path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    code = (
        "import sys\nfrom pathlib import Path\nfrom unittest import mock\n"
        "import guardbench.store as store\n"
        "real = Path.write_bytes\n"
        "def full(self, data):\n"
        "    open('/dev/full', 'wb', buffering=0).write(data[:1])\n"
        "with mock.patch.object(Path, 'write_bytes', full):\n"
        "    sys.argv = ['guardbench', *sys.argv[1:]]\n"
        "    from guardbench.cli import main\n"
        "    main()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *quick(tmp_path)],
        cwd=tmp_path, env=clean_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert "the disk is full" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not list(tmp_path.rglob("*.part"))


def test_a_reader_that_closes_the_pipe_ends_it_quietly() -> None:
    """As `| head` does. SIGPIPE keeps Python's meaning: a broken socket must not kill a download."""
    code = (
        "import signal, sys\nfrom guardbench.cli import main\n"
        "sys.argv = ['guardbench', 'methods']\n"
        "try:\n    main()\n"
        "finally:\n    assert signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN\n"
    )
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed:
        ended = subprocess.run(
            [sys.executable, "-c", code],
            stdout=closed,
            stderr=subprocess.PIPE,
            env=clean_environment(),
            check=False,
        )
    assert ended.returncode == 1
    assert ended.stderr == b""
