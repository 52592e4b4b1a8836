"""Stages on disk, devices, seeds and the progress of a run."""

import errno
import io
import json
import os
import resource
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from rich.console import Console
from typer.testing import CliRunner

import guardbench
from guardbench import assessment, canonical, devices, interrupts, models, stages
from guardbench.classifiers import Source
from guardbench.cli import app
from guardbench.commit import checkout_commit, commits_text
from guardbench.devices import effective_precision, make_accelerator
from guardbench.errors import GuardbenchError
from guardbench.labels import LabelStore
from guardbench.models import load_weights, save_weights
from guardbench.processes import Processes
from guardbench.progress import Progress, clock
from guardbench.protocol import load_protocol
from guardbench.runtime import Run, check_finite
from guardbench.scoring import Costs
from guardbench.sealed import write_sealed
from guardbench.stages import StageFolder
from guardbench.store import explained
from guardbench.submissions import score as submission

CPU = torch.device("cpu")


def make_run(tmp_path) -> Run:
    return Run(accelerator=Accelerator(cpu=True), workspace=tmp_path, seed=5, progress=Progress())


def test_a_stage_is_finished_only_when_all_of_it_is_there(tmp_path) -> None:
    folder = make_run(tmp_path).stage("squeeze", "teachers", {"lr": 0.1})
    assert folder.finished() is None
    assert folder.begin(CPU) is None
    assert folder.finished() is None
    folder.path.mkdir(parents=True)
    (folder.path / "a.bin").write_bytes(b"abc")
    folder.finish(CPU, ("a.bin",), note="kept")
    stored = folder.finished()
    assert stored is not None
    assert stored["note"] == "kept"
    assert stored["cost"]["peak_memory_bytes"] > 1_000_000
    (folder.path / "a.bin").write_bytes(b"abd")
    with pytest.raises(GuardbenchError, match=r"a\.bin has changed"):
        folder.finished()


def test_other_words_are_another_stage(tmp_path) -> None:
    run = make_run(tmp_path)
    assert run.stage("s", "k", {"a": 1}).path != run.stage("s", "k", {"a": 2}).path


def test_a_checkpoint_comes_back_with_its_seconds_and_goes_at_the_end(tmp_path) -> None:
    run = make_run(tmp_path)
    folder = run.stage("s", "k", {"a": 1})
    folder.begin(CPU)
    folder._spent = 100.0
    folder.checkpoint({"step": 3, "tensor": torch.arange(4)})
    again = run.stage("s", "k", {"a": 1})
    state = again.begin(CPU)
    assert state is not None
    assert state["step"] == 3
    assert torch.equal(state["tensor"], torch.arange(4))
    assert again.seconds >= 100
    again.finish(CPU)
    assert not folder.checkpoint_path.exists()


@pytest.mark.parametrize(
    "content", [b"", b"junk", b"PK\x03\x04broken", "truncated", "another's", "flipped"]
)
def test_a_damaged_checkpoint_is_set_aside_and_its_stage_begins_anew(tmp_path, content) -> None:
    folder, said = stage_that_says(tmp_path)
    folder.path.mkdir(parents=True)
    if isinstance(content, str):
        of = make_run(tmp_path).stage("s", "k", {"a": 2}) if content == "another's" else folder
        of.path.mkdir(parents=True, exist_ok=True)
        of.begin(CPU)
        of.checkpoint({"step": 3, "tensor": torch.rand(1000)})
        whole = of.checkpoint_path.read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1  # in the tensor, where torch would not notice
        content = {"truncated": whole[:3000], "flipped": bytes(flipped)}.get(content, whole)
    folder.checkpoint_path.write_bytes(content)
    assert folder.begin(CPU) is None
    (line,) = said
    assert "\n" not in line
    assert line.startswith(f"{folder.checkpoint_path}: unreadable checkpoint")
    assert folder.path.joinpath("checkpoint.damaged").read_bytes() == content
    folder.checkpoint({"step": 1})
    assert make_run(tmp_path).stage("s", "k", {"a": 1}).begin(CPU) == {"step": 1}


def test_a_checkpoint_is_never_unpickled(tmp_path, capsys) -> None:
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    folder, _ = stage_that_says(tmp_path)
    buffer = io.BytesIO()
    torch.save({"key": folder.key, "seconds": 0, "state": Evil()}, buffer)
    write_sealed(folder.checkpoint_path, buffer.getvalue())
    with pytest.raises(GuardbenchError, match="cannot be read now"):
        folder.begin(CPU)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), MemoryError()])
def test_a_checkpoint_that_cannot_be_read_now_is_kept(tmp_path, monkeypatch, error) -> None:
    folder, said = stage_that_says(tmp_path)
    folder.begin(CPU)
    folder.checkpoint({"step": 3})

    def fails(_: object) -> bytes:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(stages, "read_sealed", fails)
        with pytest.raises(GuardbenchError, match="run again to go on from it"):
            folder.begin(CPU)
    assert folder.begin(CPU) == {"step": 3}
    assert not said


def stage_that_says(tmp_path) -> tuple[StageFolder, list[str]]:
    said: list[str] = []
    folder = make_run(tmp_path).stage("s", "k", {"a": 1})
    folder.say = said.append
    return folder, said


def test_a_finished_stage_that_was_changed_or_cut_is_told(tmp_path) -> None:
    folder = make_run(tmp_path).stage("s", "k", {"a": 1})
    folder.begin(CPU)
    folder.finish(CPU, outcome={"flags": "0110", "share": 0.1}, counts={2: 1, 10: 2})
    file = folder.path / "stage.json"
    whole = file.read_text()
    assert folder.finished()["outcome"]["flags"] == "0110"
    for text in (whole.replace("0110", "0111"), whole[: len(whole) // 2], "[]", ""):
        assert text != whole
        file.write_text(text)
        with pytest.raises(GuardbenchError, match=r"stage\.json: .*delete the folder") as caught:
            folder.finished()
        assert "\n" not in str(caught.value)
    words = json.loads(whole)
    del words["seal"]  # as it was before there was one
    file.write_text(json.dumps(words))
    assert folder.finished()["outcome"]["flags"] == "0110"


def test_of_two_that_want_a_stage_one_works_and_the_other_reads(tmp_path) -> None:
    """As of two processes; their locks are of two open files, so two threads are as good."""
    first, second = (make_run(tmp_path).stage("teacher", "k", {"a": 1}) for _ in range(2))
    said: list[str] = []
    second.say = said.append
    found: list[object] = []

    def wants() -> None:
        with second.claimed() as stored:
            found.append(None if stored is None else stored["note"])

    with first.claimed() as stored:
        assert stored is None
        first.begin(CPU)
        thread = threading.Thread(target=wants)
        thread.start()
        deadline = time.monotonic() + 30
        while not said and time.monotonic() < deadline:
            time.sleep(0.01)
        first.finish(CPU, note="made by the first")
        assert not found
    thread.join()
    assert found == ["made by the first"]
    (line,) = said
    assert line.startswith(
        f"teacher: waiting for another process that is at it: pid {os.getpid()} on "
    )
    assert (first.reused, second.reused) == (False, True)
    assert sorted(path.name for path in first.path.iterdir()) == ["stage.json"]


def test_a_stage_that_fails_is_free_again(tmp_path) -> None:
    with pytest.raises(ValueError, match="mine"), make_run(tmp_path).stage("s", "k", {}).claimed():
        raise ValueError("mine")
    with make_run(tmp_path).stage("s", "k", {}).claimed() as stored:
        assert stored is None


def test_what_a_killed_writer_left_is_removed_by_the_holder_alone(tmp_path) -> None:
    folder = make_run(tmp_path).stage("s", "k", {})
    part = folder.path / "distilled" / ".images.x.part"
    part.parent.mkdir(parents=True)
    part.touch()
    folder.begin(CPU)
    assert part.exists(), "of another process, perhaps, where there are no locks"
    with folder.claimed():
        folder.begin(CPU)
    assert not part.exists()


def test_a_folder_that_cannot_be_written_is_one_line_and_what_is_finished_is_read(
    tmp_path, monkeypatch
) -> None:
    done, new = (make_run(tmp_path).stage("s", "k", {"a": a}) for a in (1, 2))
    done.begin(CPU)
    done.finish(CPU, note="kept")

    def refuses(*_: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("guardbench.locks.os.open", refuses)
    with (
        pytest.raises(GuardbenchError, match="Read-only file system"),
        new.claimed(),
    ):
        pass
    with done.claimed() as stored:
        assert stored is not None
        assert stored["note"] == "kept"


def test_a_full_disk_is_one_line_and_costs_no_checkpoint(tmp_path) -> None:
    """The kernel's own refusal: a limit of the process on the size of a file."""
    folder = make_run(tmp_path).stage("s", "k", {"a": 1})
    folder.begin(CPU)
    folder.checkpoint({"step": 1})
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, old[1]))
    try:
        with pytest.raises(GuardbenchError, match="File too large"):
            folder.checkpoint({"step": 2, "tensor": torch.rand(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert [path.name for path in folder.path.iterdir()] == ["checkpoint.pt"]
    assert make_run(tmp_path).stage("s", "k", {"a": 1}).begin(CPU) == {"step": 1}


def test_a_process_without_a_disk_goes_on_without_a_place_of_its_own(tmp_path, monkeypatch) -> None:
    """It says so once, asks for the next checkpoint later, and a signal still ends it."""
    folder = make_run(tmp_path).stage("pgd100 0", "attacks", {"a": 1})
    said: list[str] = []
    folder.say = said.append
    folder.path.parent.mkdir()
    folder.path.write_text("where the folder should be")
    folder._saved = -1e9
    assert folder.due_alone()
    folder.checkpoint_own({"decided": 1})
    assert not folder.due_alone()
    folder.checkpoint_own({"decided": 2})
    assert len(said) == 1
    assert "cannot be written" in said[0]
    assert folder.own() == {}
    monkeypatch.setattr(interrupts, "wanted", lambda: True)
    with pytest.raises(interrupts.Interrupted):
        folder.checkpoint_own({"decided": 3})


def test_a_stage_is_bound_to_the_files_that_it_was_made_from(tmp_path) -> None:
    """Its key holds what made them: deleted and made anew, they may differ in bits."""
    folder = make_run(tmp_path).stage("student 0", "students", {"a": 1})
    said: list[str] = []
    folder.say = said.append
    with folder.claimed("one") as stored:
        assert stored is None
        folder.begin(CPU)
        folder.checkpoint({"epoch": 1})
    with folder.claimed("one"):
        assert folder.begin(CPU) == {"epoch": 1}
    with folder.claimed("another"):
        (folder.path / "labels").mkdir()
        (folder.path / "labels" / "0").write_text("of the first one")
        assert folder.begin(CPU) is None
        assert said == ["student 0: what it was made from is another now, so it begins anew"]
        assert [path.name for path in folder.path.iterdir()] == [".lock"]
        folder.finish(CPU, note="kept")
    for same in ("another", None):
        with folder.claimed(same) as stored:
            assert stored is not None
            assert stored["note"] == "kept"
    folder._made_from = "one"
    assert folder.finished() is None
    assert (folder.path / "stage.json").is_file(), "nobody but the holder of the lock removes it"
    with folder.claimed("one") as stored:
        assert stored is None
        assert [path.name for path in folder.path.iterdir()] == [".lock"]
    assert len(said) == 2
    # What an earlier version finished says nothing of it, and is taken as it is.
    old = make_run(tmp_path).stage("student 0", "students", {"a": 2})
    old.begin(CPU)
    old.finish(CPU)
    with old.claimed("one") as stored:
        assert stored is not None


def test_processes_are_alike_in_seed_and_code_too(tmp_path, monkeypatch) -> None:
    run, seen = make_run(tmp_path), {}
    monkeypatch.setattr(run.processes, "require_alike", seen.update)
    run.require_alike(train_images="abc", IPC=10, engine=None)
    assert seen == {
        "train images": "abc", "IPC": "10", "engine": None, "precision": "fp32", "seed": "5",
        "guardbench": guardbench.__version__, "commit": run.commit, "torch": torch.__version__,
    }  # fmt: skip


def test_a_clean_pass_that_another_seed_has_made_is_listed_under_the_name_it_is_asked_by(
    tmp_path,
) -> None:
    run, costs = make_run(tmp_path), Costs()
    first = run.stage("clean 0", "attacks", {"a": 1})
    first.begin(CPU)
    first.finish(CPU)
    costs.add(run.stage("clean 1", "attacks", {"a": 1}))
    assert [cost.stage for cost in costs.found] == ["clean 1"]


def test_clocks_that_jump_or_begin_anew_cost_nothing_and_never_less(tmp_path, monkeypatch) -> None:
    now = [1e6]
    monkeypatch.setattr(stages.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(stages.time, "time", lambda: 1 / 0)  # a wall clock may jump
    folder = make_run(tmp_path).stage("s", "k", {"a": 1})
    folder.begin(CPU)
    now[0] += 60
    folder.checkpoint({"step": 1})
    now[0] = 5.0  # as after a reboot
    again = make_run(tmp_path).stage("s", "k", {"a": 1})
    again.begin(CPU)
    now[0] += 1
    assert again.finish(CPU)["cost"]["seconds"] == 61


def test_a_workspace_that_is_removed_meanwhile_is_one_line(tmp_path) -> None:
    from safetensors.torch import load_file

    for read in (
        lambda: (tmp_path / "gone.json").read_text(),
        lambda: load_file(tmp_path / "gone"),
    ):
        with (
            pytest.raises(GuardbenchError, match=r"gone.*removed while it was needed"),
            explained(tmp_path),
        ):
            read()


def test_seeds_are_named_so_that_a_new_choice_moves_no_other(tmp_path) -> None:
    run = make_run(tmp_path)
    first = torch.rand(3, generator=run.generator("recover", "noise", 0))
    torch.rand(100, generator=run.generator("something", "new"))
    assert torch.equal(first, torch.rand(3, generator=run.generator("recover", "noise", 0)))
    names = {run.generator(*n).initial_seed() for n in [("a", "bc"), ("ab", "c"), ("a", "b", "c")]}
    assert len(names) == 3
    assert canonical.derive_seed(1, "a") != canonical.derive_seed(2, "a")


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "cpu:3", "cuda:x", "cpu:", "cpu:²", "cpu:00"])
def test_a_device_that_is_not_there_is_told(device: str) -> None:
    with pytest.raises(GuardbenchError, match=r"not on this machine, which has .*cpu"):
        make_accelerator(device, "auto", 8)


def test_precision_is_what_autocast_does() -> None:
    for asked in ("fp32", "bf16"):
        accelerator = make_accelerator("cpu", asked, 8)
        assert effective_precision(accelerator) == asked
        with accelerator.autocast():
            out = torch.nn.Linear(2, 2)(torch.rand(1, 2))
        assert out.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[asked]
    assert effective_precision(make_accelerator("cpu", "auto", 8)) == "fp32"
    with pytest.raises(GuardbenchError, match="fp8"):
        make_accelerator("cpu", "fp8", 8)


def test_float32_is_not_tf32_and_convolutions_repeat() -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.deterministic = False
    make_accelerator("cpu", "fp32", 8)
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.deterministic


def test_another_version_of_torch_is_another_stage(tmp_path, monkeypatch) -> None:
    run = make_run(tmp_path)
    before = run.stage("s", "k", {"a": 1}).path
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert run.stage("s", "k", {"a": 1}).path != before


def test_bf16_is_not_chosen_where_it_would_be_emulated(monkeypatch) -> None:
    monkeypatch.setattr(devices.Path, "read_text", lambda _self: "flags: avx2 avx512f")
    assert not devices.bf16_gains("cpu", 224)
    monkeypatch.setattr(devices.Path, "read_text", lambda _self: "flags: avx512_bf16")
    assert devices.bf16_gains("cpu", 224)
    assert not devices.bf16_gains("cpu", 8)


@pytest.mark.parametrize(
    ("pids", "others"),
    [
        ([7], False),
        ([7, 8], True),
        ([7, 9], False),
        ([7, 5], False),
        ([5, 7, 8], True),
        ([40], False),
        ([40, 41], True),
        ([], False),
    ],
)
def test_who_else_is_on_the_gpu(monkeypatch, pids, others) -> None:
    """This process is 7, a suite's that started it 5, and 9 is the server of NVIDIA's MPS.

    A container may see other numbers.
    """
    asked = []
    nvml = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=asked.append,
        nvmlDeviceGetComputeRunningProcesses=lambda _: [SimpleNamespace(pid=pid) for pid in pids],
    )
    names = {9: "nvidia-cuda-mps-server"}
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda _: nvml)
    monkeypatch.setattr(devices.os, "getpid", lambda: 7)
    monkeypatch.setattr(
        devices.psutil,
        "Process",
        lambda pid: SimpleNamespace(
            name=lambda: names.get(pid, "python"), parents=lambda: [SimpleNamespace(pid=5)]
        ),
    )
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1-2-3")
    )
    assert devices.others_on(torch.device("cuda")) is others
    assert asked == ["GPU-1-2-3"]
    assert not devices.others_on(CPU)


def test_a_cost_says_when_others_used_the_gpu(tmp_path, monkeypatch) -> None:
    run = make_run(tmp_path)
    for name, others in (("alone", False), ("beside", True)):
        monkeypatch.setattr(stages, "others_on", lambda _, others=others: others)
        folder = run.stage(name, "teachers", {"stage": name})
        folder.begin(CPU)
        folder.path.mkdir(parents=True)
        cost = folder.finish(CPU)["cost"]
        assert cost["device"].endswith(", beside other processes") is others


def test_a_loss_that_is_not_finite_names_step_and_remedy() -> None:
    assert check_finite(torch.tensor(2.0), "squeeze, step 1", "lower lr") == 2.0
    for bad in (float("nan"), float("inf")):
        with pytest.raises(GuardbenchError, match=r"squeeze, step 7: the loss is .*lower lr"):
            check_finite(torch.tensor(bad), "squeeze, step 7", "lower lr")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.9, "59.9 s"), (245, "4 min 05 s"), (7620, "2 h 07 min")],
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_a_log_gets_one_line_a_stage_and_no_control_codes() -> None:
    sink = io.StringIO()
    with Progress(Console(file=sink, width=80)).stage("squeeze", 3, "steps") as bar:
        for _ in range(3):
            bar.advance(1, "loss 0.5")
    assert sink.getvalue().count("\n") == 1
    assert sink.getvalue().startswith("squeeze: 3/3 steps in ")
    assert "\x1b" not in sink.getvalue()


def test_a_terminal_gets_a_bar_with_an_eta() -> None:
    sink = io.StringIO()
    console = Console(file=sink, width=120, force_terminal=True)
    with Progress(console).stage("recover", 4, "steps", done=1) as bar:
        bar.advance(3, "loss 0.1")
    assert "ETA" in sink.getvalue()
    assert "4/4" in sink.getvalue()


def test_work_inside_a_unit_moves_the_eta_and_not_the_count(monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr("guardbench.progress.time.monotonic", lambda: now[0])
    sink = io.StringIO()
    with Progress(Console(file=sink, width=120)).stage("autoattack 0", 100, "images") as bar:
        now[0] = 40.0
        bar.within(25.0, "50 of 100 not yet broken")
        now[0] = 90.0
        bar.advance(50, "30 robust so far")
    first, second, _ = sink.getvalue().splitlines()
    assert first == "autoattack 0: 0/100 images, 2 min 00 s left  50 of 100 not yet broken"
    assert second == "autoattack 0: 50/100 images, 1 min 30 s left  30 robust so far"


def test_a_commit_is_dirty_where_the_code_differs_and_not_where_boards_do(
    tmp_path, monkeypatch
) -> None:
    def git(*words: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    for name in ("guardbench/__init__.py", "leaderboards/board.json", "baselines/x/method.toml"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "all")
    git("tag", "v1")
    head = git("rev-parse", "HEAD")
    monkeypatch.setattr(guardbench, "__file__", str(tmp_path / "guardbench" / "__init__.py"))
    assert checkout_commit() == head
    (tmp_path / "leaderboards" / "board.json").write_text("2")
    (tmp_path / "baselines" / "x" / "record.json").write_text("2")
    assert checkout_commit() == head
    (tmp_path / "baselines" / "x" / "method.toml").write_text("2")
    assert checkout_commit() == f"{head}-dirty"


def test_a_stage_keeps_the_commit_that_ran_it_and_a_record_names_them_all(tmp_path) -> None:
    for number, commit in enumerate(("a" * 40, "b" * 40, "a" * 40)):
        run = Run(
            accelerator=Accelerator(cpu=True), workspace=tmp_path, seed=5, progress=Progress(),
            commit=commit,
        )  # fmt: skip
        folder = run.stage(f"stage {number}", "things", {"number": number})
        with folder.claimed():
            folder.begin(run.device)
            folder.finish(run.device)
    later = Costs()  # of a run at another commit, which finds them finished
    later.add(*(run.stage(f"stage {k}", "things", {"number": k}) for k in range(3)))
    assert later.commits == ["a" * 40, "b" * 40, "a" * 40]
    assert commits_text(later.commits) == f"{'a' * 40}, {'b' * 40}"
    assert commits_text([None, None]) is None
    assert commits_text([None, "c"]) == "no checkout, c"
    assert len(commits_text(str(k) * 40 for k in range(9)) or "") < 200


def test_a_stage_begun_at_one_commit_and_finished_at_another_names_both(tmp_path) -> None:
    costs = Costs()
    for commit in ("a" * 40, "b" * 40, "b" * 40):
        run = Run(
            accelerator=Accelerator(cpu=True), workspace=tmp_path, seed=5, progress=Progress(),
            commit=commit,
        )  # fmt: skip
        folder = run.stage("squeeze", "teachers", {"stage": "squeeze"})
        with folder.claimed() as stored:
            if commit == "a" * 40:
                folder.begin(run.device)
                folder.checkpoint({"epoch": 1})
            elif stored is None:
                assert folder.begin(run.device) == {"epoch": 1}
                folder.finish(run.device)
    costs.add(folder)
    assert costs.commits == ["a" * 40, "b" * 40]


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("removed", [0, 1, 2, 3])
def test_a_kill_while_outdated_files_are_removed_leaves_none_untold(
    tmp_path, monkeypatch, removed: int, finished: bool
) -> None:
    """Else those that are left would be taken over, with nothing to say of which set they are."""
    folder = make_run(tmp_path).stage("relabel", "labels", {"a": 1})
    with folder.claimed("one"):
        folder.begin(CPU)
        folder.checkpoint({})
        for name in ("labels-0", "a", "z"):
            (folder.path / name).write_text("of the first set")
        if finished:
            folder.finish(CPU, ("a",))
    left, real = [removed], stages.Path.unlink

    def unlink(path, **words) -> None:
        if path.name != ".lock" and path.exists():
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
        real(path, **words)

    with monkeypatch.context() as patched:
        patched.setattr(stages.Path, "unlink", unlink)
        with pytest.raises(KeyboardInterrupt), folder.claimed("another"):
            folder.begin(CPU)
    with folder.claimed("another") as stored:
        assert stored is None
        assert folder.begin(CPU) is None
        assert [path.name for path in folder.path.iterdir()] == [".lock"]


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE])
@pytest.mark.parametrize("what", ["stage", "file", "labels", "weights"])
def test_what_is_finished_and_cannot_be_read_now_need_not_be_deleted(
    tmp_path, monkeypatch, what: str, number: int
) -> None:
    folder, net = make_run(tmp_path).stage("s", "k", {"a": 1}), torch.nn.Linear(2, 2)
    folder.begin(CPU)
    store = LabelStore(folder.path, classes=2)
    store.write(0, torch.zeros(1, 2))
    store.seal(1)
    save_weights(net, folder.path / "w")
    folder.finish(CPU, ("w",))
    (sha,) = store.digests()

    def fails(*_: object, **__: object) -> bytes:
        raise OSError(number, os.strerror(number))

    module, name, read = {
        "stage": (stages.Path, "read_text", folder.finished),
        "file": (canonical, "file_digest", folder.finished),
        "labels": (stages.Path, "read_bytes", lambda: store.read(0, sha)),
        "weights": (models, "load_file", lambda: load_weights(net, folder.path / "w")),
    }[what]
    with monkeypatch.context() as patched:
        patched.setattr(module, name, fails)
        with pytest.raises(GuardbenchError, match=r"cannot be read now .*; run again") as caught:
            read()
    assert "delete" not in str(caught.value)
    read()


@pytest.mark.parametrize("finished", [True, False])
def test_without_locks_nothing_that_may_be_another_runs_is_removed(
    tmp_path, monkeypatch, finished: bool
) -> None:
    folder = make_run(tmp_path).stage("relabel", "labels", {"a": 1})
    with folder.claimed("one"):
        folder.begin(CPU)
        folder.checkpoint({})
        (folder.path / "labels-0").write_text("of the first set")
        if finished:
            folder.finish(CPU, ("labels-0",))
    there = {path.name for path in folder.path.iterdir()}
    with monkeypatch.context() as patched:
        patched.setattr("guardbench.locks._take", lambda *_: False)
        again = make_run(tmp_path).stage("relabel", "labels", {"a": 1})
        refused = pytest.raises(GuardbenchError, match=r"another run may be at it; .*delete")
        with refused as caught, again.claimed("another"):
            again.begin(CPU)
        assert "\n" not in str(caught.value)
        assert there <= {path.name for path in folder.path.iterdir()}
        with again.claimed("one") as stored:
            assert (stored is not None) is finished, "what is up to date is taken as ever"
    with folder.claimed("another") as stored:
        assert stored is None
        assert folder.begin(CPU) is None
        assert not (folder.path / "labels-0").exists()


@pytest.mark.parametrize("main", [True, False])
@pytest.mark.parametrize("verb", ["evaluate", "submission score"])
def test_only_the_first_process_needs_the_workspace(
    tmp_path, monkeypatch, verb: str, main: bool
) -> None:
    (tmp_path / "file").touch()
    save_weights(
        models.build_model("convnet-d3", channels=1, classes=10, resolution=8, seed=0),
        tmp_path / "w.safetensors",
    )
    words = {
        "protocol": "digits", "engine": "guardbench", "tier": "official", "images": None, "device": "cpu",
        "data_dir": None, "cache_dir": None, "output": tmp_path / "file" / "runs",
    }  # fmt: skip

    def evaluate() -> None:
        named = {"weights": tmp_path / "w.safetensors", "arch": "convnet-d3"}
        source = Source(**named, python=None, normalisation=None)
        assessment.prepare(
            assessment.Request(**words, source=source, student=0, seed=0), Progress()
        )

    def submission_score() -> None:
        report = SimpleNamespace(form=SimpleNamespace(), content=(), problems=())
        monkeypatch.setattr(submission, "check_submission", lambda *_, **__: (report, ()))
        monkeypatch.setattr(submission, "_protocol", lambda *_: load_protocol("digits"))
        more = {"folder": tmp_path, "precision": "fp32", "publish": False, "references": False}
        submission.plan_score(submission.Settings(**words, **more, smoke=False), Progress())

    begin = {"evaluate": evaluate, "submission score": submission_score}[verb]
    if main:
        with pytest.raises(GuardbenchError, match="cannot be written"):
            begin()
        return
    monkeypatch.setattr(Processes, "from_main", lambda *_: None)
    if verb == "evaluate":
        begin()
    else:
        with pytest.raises(
            AttributeError
        ):  # past the workspace: the form of this submission says nothing
            begin()


@pytest.mark.parametrize(
    "words",
    [
        ["curve", "--protocol", "digits"],
        ["diagnose", "--protocol", "digits"],
        ["robustbench", "benchmark", "--protocol", "digits"],
        ["robustbench", "corruptions", "--protocol", "digits", "--folder", "here"],
    ],
)
def test_a_verb_that_all_processes_would_do_is_refused_under_a_launcher(
    tmp_path, monkeypatch, words
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = CliRunner().invoke(app, words)
    assert isinstance(found.exception, GuardbenchError)
    assert "is one process: run it without a launcher" in str(found.exception)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("asked", "launched", "effective"),
    [
        ("auto", "bf16", "bf16"),
        ("auto", "no", "fp32"),
        ("fp32", "bf16", "fp32"),
        ("bf16", "no", "bf16"),
    ],
)
def test_a_launchers_mixed_precision_counts_where_the_command_says_none(
    monkeypatch, asked: str, launched: str, effective: str
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    assert effective_precision(make_accelerator("cpu", asked, 8)) == effective


def test_a_launcher_that_names_no_precision_leaves_it_to_the_device(monkeypatch) -> None:
    """`accelerate launch` says `no` to its processes where nobody has said anything."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr(devices, "bf16_gains", lambda *_: True)
    assert effective_precision(make_accelerator("cpu", "auto", 64)) == "bf16"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("MIXED_PRECISION", "fp16", "fp16: for GPUs without bf16"),
        ("MIXED_PRECISION", "fp8", "fp8: choose one of"),
        ("GRADIENT_ACCUMULATION_STEPS", "4", r"steps 4: .*--set squeeze\.accumulate=4"),
    ],
)
def test_what_a_launcher_asks_for_in_vain_is_one_line(
    monkeypatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with pytest.raises(GuardbenchError, match=said) as caught:
        make_accelerator("cpu", "auto", 8)
    assert "\n" not in str(caught.value)
