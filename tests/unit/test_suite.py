"""A suite: read, planned, ordered, dealt out, and run; on tiny cells, and on made-up stages."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from guardbench import forecast, pipeline, suite_run, suite_table
from guardbench.cli import app
from guardbench.data.catalog import dataset_info
from guardbench.data.dataset import load_split
from guardbench.errors import GuardbenchError
from guardbench.methods import load_method, methods_folder
from guardbench.pipeline import Settings, execute, make_plan
from guardbench.progress import Progress
from guardbench.protocol import load_protocol
from guardbench.record_files import load_record, save_record
from guardbench.suite import Cell, Need, Suite, divide, ordered, plan_suite, prepared, recorded
from guardbench.suite_file import Wanted, narrowed, read_suite
from guardbench.suite_run import Ended, Runner, words

SHORT = """
id = "short"
title = "Short"
source = "tests"
dataset = "digits"
resolution = 8
ipc = [1, 10]
rank_by = "pgd"
[threat]
norm = "linf"
eps = "16/255"
[student]
arch = "convnet-d3-bn-small"
seeds = [0]
epochs = 2
batch_size = 100
lr = 0.001
weight_decay = 0.01
temperature = 20.0
crop_scale = [0.5, 1.0]
flip = false
cutmix = 1.0
[test]
count = 40
[[attacks]]
name = "pgd"
kind = "pgd"
params = { steps = 2, step = "8/255" }
"""
QUICK = "squeeze.epochs=1"
BROKEN = "squeeze.lr=1e30"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "short.toml").write_text(SHORT)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


def settings(**changes) -> Settings:
    found = {
        "method": "random", "dataset": None, "protocol": "short.toml", "ipc": 1, "seed": 0,
        "device": "cpu", "precision": "fp32", "data_dir": None, "cache_dir": None,
        "output": Path("runs"), "publish": False, "engine": "guardbench", "tier": "official",
        "images": None, "overrides": (QUICK,),
    }  # fmt: skip
    return Settings(**{**found, **changes})


def wanted(method: str, ipc: int, *overrides: str) -> Wanted:
    return Wanted(method, "short.toml", None, ipc, overrides or (QUICK,))


def planned(*cells: Wanted) -> Suite:
    return plan_suite(cells, settings(), Progress())


# --- the file


def test_a_file_is_every_combination_of_its_matrices(tmp_path) -> None:
    path = tmp_path / "s.toml"
    path.write_text(
        '[[matrix]]\nmethods = ["guard", "dc"]\nprotocols = ["mine.toml"]\nipcs = [1, 10]\n'
        '[[matrix]]\nmethods = ["guard"]\ndatasets = ["digits"]\nset = ["squeeze.epochs=5"]\n'
        "references = true\n"
    )
    found = read_suite(path)
    names = ["mine/ipc1/guard", "mine/ipc1/dc", "mine/ipc10/guard", "mine/ipc10/dc"]
    assert [cell.name for cell in found[:4]] == names
    assert found[0].protocol == str(tmp_path / "mine.toml")
    assert found[4].name.startswith("digits/ipc10/guard-set-")
    assert found[4].references
    assert not found[0].references
    kept = narrowed(found, ["guard"], ["mine"], [10])
    assert [cell.name for cell in kept] == ["mine/ipc10/guard"]
    with pytest.raises(
        GuardbenchError, match=r"unknown method of the suite 'gaurd'. Did you mean guard"
    ):
        narrowed(found, ["gaurd"], [], [])
    with pytest.raises(GuardbenchError, match="no cell of the suite"):
        narrowed(found, ["dc"], ["digits"], [])


MATRIX = '[[matrix]]\ndatasets = ["d"]\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "matrix: is missing; add it"),
        ("matrix = [", "not valid TOML"),
        ("matrix = 3", r"matrix: must be a list in \[ \], not 3"),
        ("matrix = [3]", r"matrix\.0: must be a table, not 3"),
        ('[[matrix]]\nmethods = ["a"]', r"matrix\.0: protocols: say what to run on"),
        (MATRIX + "methods = []", r"matrix\.0\.methods: must have at least 1 item"),
        (MATRIX + 'methods = "a"', r'matrix\.0\.methods: must be a list in \[ \], not "a"'),
        (MATRIX + "methods = [3]", r"matrix\.0\.methods\.0: must be text in quotes, not 3"),
        (MATRIX + 'methods = ["A"]', r'methods\.0: must be lower-case letters, .*, not "A"'),
        (MATRIX + 'methods = ["a"]\nreferences = 1', r"references: must be true or false, not 1"),
        (MATRIX + 'methods = ["a"]\nipcs = [true]', r"ipcs\.0: must be a whole number, not true"),
        (MATRIX + 'methods = ["a"]\nipcs = ["1"]', r'ipcs\.0: must be a whole number, not "1"'),
        (MATRIX + 'methods = ["a"]\nipcs = [1.0]', r"ipcs\.0: must be a whole number, not 1\.0"),
        (MATRIX + 'methods = ["a"]\nipcs = [0]', r"matrix\.0\.ipcs\.0: must be greater than 0, not 0"),
        (MATRIX + 'methods = ["a"]\nepochs = 1', r"matrix\.0\.epochs: there is no such field"),
        (MATRIX + 'methods = ["a", "a"]', "d/ipc10/a stands twice"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_one_line_that_names_file_and_field(tmp_path, text, said) -> None:
    path = tmp_path / "s.toml"
    path.write_text(text)
    with pytest.raises(GuardbenchError, match=said) as error:
        read_suite(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_the_suite_of_the_public_boards_can_be_run_and_holds_every_record() -> None:
    path = methods_folder().parent / "leaderboards" / "records.toml"
    if not path.is_file():
        pytest.skip("not in a checkout")
    found = read_suite(path)
    for cell in found:
        protocol = load_protocol(cell.measured)
        protocol.check_ipc(cell.ipc)
        load_method(cell.method).recipe(protocol.dataset, protocol.resolution)
    names = {cell.name for cell in found}
    for record in methods_folder().glob("*/results/*/ipc*-seed0.json"):
        ipc, _, rest = record.stem.removesuffix("-seed0").partition("-")
        mark = f"-{rest}" if rest else ""
        assert f"{record.parent.name}/{ipc}/{record.parents[2].name}{mark}" in names


# --- the plan


def test_cells_that_share_a_teacher_count_it_once(folder) -> None:
    found = planned(wanted("random", 1), wanted("random", 10), wanted("guard", 1, QUICK))
    one, ten, guard = found.cells
    (teacher,) = set(one.stages) & set(ten.stages)
    assert found.needs[teacher].name == "squeeze"
    alone = found.work([one]) + found.work([ten])
    assert found.work([one, ten]) == alone - found.needs[teacher].work
    assert (
        found.size([one, ten]) == found.size([one]) + found.size([ten]) - found.needs[teacher].size
    )
    assert not set(guard.stages) & set(one.stages)
    assert not list(folder.glob("runs")), "planning writes nothing"


@pytest.mark.usefixtures("folder")
def test_what_cannot_be_run_keeps_its_reason_and_a_name_that_is_not_there_is_refused() -> None:
    found = planned(
        wanted("random", 50), wanted("random", 1), wanted("dc", 1, "match.iterations=0")
    )
    assert [cell.plan is None for cell in found.cells] == [True, False, True]
    assert "--ipc 50: protocol short measures 1, 10" in found.cells[0].refusal
    assert "match.iterations" in found.cells[2].refusal
    with pytest.raises(GuardbenchError, match="unknown method 'randon'"):
        planned(wanted("random", 1), wanted("randon", 1))


@pytest.mark.usefixtures("folder")
def test_images_that_do_not_serve_are_told_before_the_first_cell_runs(monkeypatch) -> None:
    found = planned(wanted("random", 10), wanted("random", 1))

    def refuse(plan) -> None:
        if plan.settings.ipc == 10:
            raise GuardbenchError("class 3 has 4 of the 10 images needed")

    monkeypatch.setattr("guardbench.suite.prepare", refuse)
    ten, one = prepared(found.cells)
    assert "class 3" in ten.refusal
    assert one.to_do


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A workspace in which one cell has been run."""
    there = tmp_path_factory.mktemp("made")
    (there / "short.toml").write_text(SHORT)
    threads, here = torch.get_num_threads(), Path.cwd()
    os.chdir(there)
    try:
        execute(make_plan(settings(), Progress()))
    finally:
        os.chdir(here)
        torch.set_num_threads(threads)
    return there


@pytest.mark.usefixtures("folder")
def test_the_size_is_about_what_the_run_leaves(made) -> None:
    kinds = ("teachers", "distilled", "labels", "students")
    files = [path for kind in kinds for path in (made / "runs" / kind).rglob("*.safetensors")]
    expected = planned(wanted("random", 1))
    assert expected.size(expected.cells) == pytest.approx(
        sum(path.stat().st_size for path in files), rel=0.2
    )


def test_a_cell_is_done_when_its_record_is_of_this_protocol_and_recipe(made, monkeypatch) -> None:
    monkeypatch.chdir(made)
    plan = make_plan(settings(), Progress())
    path = plan.place.record_path("short", 1, "official")
    record = recorded(plan)
    assert record == load_record(path)
    assert recorded(make_plan(settings(ipc=10), Progress())) is None
    assert recorded(make_plan(settings(references=True), Progress())) is None
    other = record.model_copy(
        update={"method": record.method.model_copy(update={"recipe_sha256": "0" * 64})}
    )
    made_by = record.provenance.model_copy(update={"engines": {"square": "reference"}})
    for changed in (
        other,
        record.model_copy(update={"protocol_sha256": "0" * 64}),
        record.model_copy(update={"provenance": made_by}),
    ):
        save_record(path, changed)
        assert recorded(plan) is None
    path.write_text("{")
    found = planned(wanted("random", 1))
    assert str(path) in found.cells[0].refusal
    save_record(path, record)
    assert recorded(plan) == record


# --- order and shards, on stages that are made up


def made_up(cells: dict[str, dict[str, int]], done: tuple[str, ...] = ()) -> Suite:
    """Cells by name -> {stage: work}."""
    needs = {
        stage: Need(stage, work, stage in done, float(work), work)
        for stages in cells.values()
        for stage, work in stages.items()
    }
    found = [
        Cell(Wanted(name, "p", None, 1), None, plan=object(), stages=tuple(stages))
        for name, stages in cells.items()
    ]
    return Suite(tuple(found), needs)


def names(cells) -> list[str]:
    return [cell.wanted.method for cell in cells]


def test_cells_that_share_run_together_and_the_cheapest_come_first() -> None:
    found = made_up({
        "b10": {"tb": 50, "b10": 20}, "a1": {"ta": 9, "a1": 2}, "c": {"c": 30},
        "b1": {"tb": 50, "b1": 1}, "a10": {"ta": 9, "a10": 3},
    })  # fmt: skip
    assert names(ordered(found, found.cells)) == ["a1", "a10", "c", "b1", "b10"]


def test_the_order_goes_by_what_is_left() -> None:
    stages = {"a": {"ta": 50, "a": 2}, "c": {"c": 30}}
    assert names(ordered(made_up(stages), made_up(stages).cells)) == ["c", "a"]
    found = made_up(stages, done=("ta",))
    assert names(ordered(found, found.cells)) == ["a", "c"]


@pytest.mark.parametrize("seed", range(8))
def test_shards_are_disjoint_cover_all_and_hang_on_the_cells_alone(seed: int) -> None:
    draw = random.Random(seed)
    cells = {}
    for number in range(draw.randint(1, 30)):
        teacher = f"t{draw.randint(0, 5)}"
        cells[f"c{number}"] = {teacher: 7 * int(teacher[1:]) + 1, f"s{number}": draw.randint(1, 40)}
    found = made_up(cells)
    for shards in (1, 2, 3, 8, 40):
        dealt = divide(found, shards)
        assert len(dealt) == shards
        assert sorted(name for shard in dealt for name in names(shard)) == sorted(cells)
        some_done = made_up(
            cells, done=tuple(draw.sample(list(found.needs), len(found.needs) // 2))
        )
        assert [names(shard) for shard in divide(some_done, shards)] == [names(s) for s in dealt]
        works = [found.work(shard) for shard in dealt]
        assert max(works) + sum(works) - found.work(found.cells) <= found.work(found.cells)


def test_no_teacher_is_trained_by_two_shards_where_families_balance() -> None:
    families = {f"{t}{n}": {t: 10, f"{t}{n}": 5} for t in "abcd" for n in range(3)}
    dealt = divide(made_up(families), 4)
    assert sorted({name[0] for name in names(shard)} for shard in dealt) == [{t} for t in "abcd"]


@pytest.mark.parametrize(("teacher", "parted"), [(5, True), (500, False)])
def test_a_family_is_parted_only_where_that_is_worth_its_teacher(
    teacher: int, parted: bool
) -> None:
    found = made_up({f"c{n}": {"t": teacher, f"c{n}": 40} for n in range(4)})
    sizes = sorted(len(shard) for shard in divide(found, 2))
    assert sizes == ([2, 2] if parted else [0, 4])


def test_cells_of_equal_stages_stay_together() -> None:
    found = made_up({"full1": {"t": 9}, "full10": {"t": 9}})
    assert sorted(len(shard) for shard in divide(found, 2)) == [0, 2]


# --- running


@pytest.mark.usefixtures("folder")
def test_the_command_of_a_cell_says_all_of_its_settings(monkeypatch) -> None:
    """Each option of `run` has a value that is not its default, and comes back as it was."""
    asked = settings(
        dataset="digits", seed=3, data_dir=Path("data x"), cache_dir=Path("c"), publish=True,
        engine="reference", tier="dev", images=20, references=True, overrides=(QUICK, "recover.lr=0.1"),
    )  # fmt: skip
    caught = []

    def stop(found, _) -> None:
        caught.append(found)
        raise GuardbenchError("stop")

    monkeypatch.setattr(pipeline, "make_plan", stop)
    CliRunner().invoke(app, words(asked))
    assert caught == [asked]


def launcher(folder: Path, code: str) -> Runner:
    """Runs `code` instead of guardbench; what was asked stands in sys.argv."""
    path = folder / "fake.py"
    path.write_text(textwrap.dedent(code))
    return Runner([sys.executable, str(path)])


@pytest.mark.parametrize(
    ("code", "ended"),
    [
        ("", Ended(0)),
        ("import sys; assert sys.argv[1:4] == ['-m', 'guardbench', 'run']", Ended(0)),
        ("import sys; print('w', file=sys.stderr); sys.exit('error: no luck')", Ended(1, "no luck")),
        ("raise MemoryError('too big')", Ended(1, "MemoryError: too big")),
        ("import os; os.kill(os.getpid(), 9)", Ended(137, "killed by SIGKILL; out of memory?")),
    ],
)  # fmt: skip
def test_how_a_cell_ends_is_told(folder, code: str, ended: Ended) -> None:
    assert launcher(folder, code).run(settings()) == ended


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_wish_to_stop_reaches_the_cell_and_no_other_begins(folder, number) -> None:
    runner = launcher(
        folder,
        f"""
        import pathlib, signal, sys, time
        def end(*_):
            pathlib.Path("saved").write_text("x")
            sys.exit(5)
        signal.signal({int(number)}, end)
        pathlib.Path("begun").write_text("x")
        time.sleep(60)
        """,
    )

    def ask() -> None:
        while not Path("begun").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    threading.Thread(target=ask).start()
    with runner.stopping():
        first, second = runner.run(settings()), runner.run(settings())
    assert Path("saved").exists()
    assert first == second == Ended(128 + number)
    assert first.stopped
    assert signal.getsignal(number) is before


def test_a_wish_to_stop_reaches_what_a_launcher_started(folder) -> None:
    """With one process `accelerate launch` only waits for it, and passes no signal on."""
    runner = launcher(
        folder,
        """
        import pathlib, signal, subprocess, sys
        child = (
            "import pathlib, signal, sys, time\\n"
            "def end(*_):\\n    pathlib.Path('saved').write_text('x')\\n    sys.exit(143)\\n"
            "signal.signal(signal.SIGTERM, end)\\n"
            "pathlib.Path('begun').write_text('x')\\ntime.sleep(60)"
        )
        signal.signal(signal.SIGTERM, lambda *_: None)
        sys.exit(subprocess.Popen([sys.executable, "-c", child]).wait())
        """,
    )

    def ask() -> None:
        deadline = time.monotonic() + 30
        while not Path("begun").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask, daemon=True).start()
    begun = time.monotonic()
    with runner.stopping():
        assert runner.run(settings()) == Ended(143)
    assert Path("saved").exists()
    assert time.monotonic() - begun < 30, "and it was not waited for to its end"


@pytest.fixture
def here(monkeypatch):
    """Cells run in this process, by what `guardbench run` calls; gives what was run."""
    ran = []

    def run(_: Runner, asked: Settings) -> Ended:
        ran.append(f"ipc{asked.ipc}/{asked.overrides[-1]}")
        try:
            execute(make_plan(asked, Progress()))
        except GuardbenchError as error:
            return Ended(2, str(error))
        return Ended(0)

    monkeypatch.setattr(Runner, "run", run)
    return ran


def typed(*more: str):
    return CliRunner().invoke(app, ["suite", *more, "--device", "cpu", "--output", "runs"])


def test_a_failed_cell_is_told_the_others_go_on_and_the_same_command_does_what_is_left(
    folder, here
) -> None:
    head = '[[matrix]]\nprotocols = ["short.toml"]\nmethods = ["random"]\n'
    (folder / "s.toml").write_text(
        f'{head}ipcs = [1, 10]\nset = ["{QUICK}"]\n{head}ipcs = [1]\nset = ["{QUICK}", "{BROKEN}"]\n'
    )
    first = typed("s.toml", "--json", "first.json")
    assert first.exit_code == 1
    assert here[-2:] == [f"ipc1/{QUICK}", f"ipc10/{QUICK}"], "cells of one teacher, cheapest first"
    assert f"ipc1/{BROKEN}" in here
    assert "the loss is nan" in " ".join(first.output.split())
    states = {c["name"]: c for c in json.loads((folder / "first.json").read_text())["cells"]}
    assert sorted(c["state"] for c in states.values()) == ["done", "done", "failed"]
    done = next(c for c in states.values() if c["ipc"] == 10)
    assert done["clean"] >= done["robust"] >= 0
    assert done["ranked_by"] == "pgd"
    for ipc in (1, 10):
        board = json.loads((folder / f"runs/leaderboards/short/ipc{ipc}.json").read_text())
        assert len(board["tracks"]["teacher"]) == 1
    here.clear()
    stamps = {p: p.stat().st_mtime_ns for p in folder.rglob("runs/records/**/*.json")}
    assert typed("s.toml").exit_code == 1
    assert here == [f"ipc1/{BROKEN}"]
    assert stamps == {p: p.stat().st_mtime_ns for p in folder.rglob("runs/records/**/*.json")}


def test_a_cell_that_cannot_be_run_is_refused_before_any_runs_or_left_out(folder, here) -> None:
    options = ["--methods", "random", "--protocols", "short.toml", "--set", QUICK]
    refused = typed(*options, "--ipcs", "1,50")
    assert isinstance(refused.exception, GuardbenchError)
    assert "1 of 2 cells cannot be run" in str(refused.exception)
    assert "--skip" in str(refused.exception)
    assert here == []
    assert not (folder / "runs").exists()
    left = typed(*options, "--ipcs", "1,50", "--skip", "--dry-run", "--json", "plan.json")
    assert left.exit_code == 0
    plan = json.loads((folder / "plan.json").read_text())
    assert [c["state"] for c in plan["cells"]] == ["to do", "cannot be run"]
    assert here == []
    assert not (folder / "runs").exists()


def test_boards_heal_when_another_shard_wrote_its_record(made, tmp_path, monkeypatch, here) -> None:
    """Records that arrive from elsewhere stand on the board, and their cells are done without a stage."""
    (tmp_path / "short.toml").write_text(SHORT)
    monkeypatch.chdir(tmp_path)
    (record,) = made.glob("runs/records/short/ipc1/*.json")
    save_record(tmp_path / record.relative_to(made), load_record(record))
    (tmp_path / "runs/protocols").mkdir()
    (tmp_path / "runs/protocols/short.toml").write_text(SHORT)
    options = ["--methods", "random", "--protocols", "short.toml", "--ipcs", "1", "--set", QUICK]
    assert typed(*options).exit_code == 0
    assert here == []
    assert (tmp_path / "runs/leaderboards/short/ipc1.json").is_file()


@pytest.mark.usefixtures("folder")
def test_what_does_not_fit_on_the_disk_is_refused(monkeypatch, here) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(suite_table.shutil, "disk_usage", lambda _: usage(1, 1, 1000))
    found = typed("--methods", "random", "--protocols", "short.toml", "--ipcs", "1", "--set", QUICK)
    assert "need about" in str(found.exception)
    assert "1 kB are free" in str(found.exception)
    assert here == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "say what to run"),
        (["--methods", "random"], "say what to run"),
        (["--methods", "random", "--datasets", "digits", "--ipcs", "1,x"], "--ipcs 1,x"),
        (["--methods", "random", "--datasets", "digits", "--ipcs", "0"], "--ipcs 0"),
        (["--methods", "random", "--datasets", "digits", "--shard", "3/2"], "--shard 3/2"),
        (["--methods", "random", "--datasets", "digits", "--shard", "0/2"], "--shard 0/2"),
        (["--methods", "random,random", "--datasets", "digits"], "stands twice"),
        (["--methods", "randon", "--datasets", "digits"], "Did you mean random"),
        (["--methods", "random", "--datasets", "cifar100"], "no protocol measures"),
        (["--methods", "random", "--datasets", "digits", "--launch", "acelerate x"], "no command acelerate"),
        (["--methods", "random", "--datasets", "digits", "--launch", "a 'b"], "No closing quotation"),
        (["none.toml"], "none.toml: cannot read suite"),
        (["none.toml", "--set", "a.b=1"], "stand in the file"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(folder, options: list[str], said: str) -> None:
    found = typed(*options)
    assert isinstance(found.exception, GuardbenchError)
    assert said in str(found.exception)
    assert "\n" not in str(found.exception)
    assert [path.name for path in folder.iterdir()] == ["short.toml"]


@pytest.mark.usefixtures("folder")
def test_under_a_launcher_it_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = typed("--methods", "random", "--datasets", "digits")
    assert "--launch" in str(found.exception)


@pytest.mark.usefixtures("folder")
def test_the_reason_of_a_run_without_a_record_is_told() -> None:
    (cell,) = planned(wanted("random", 1)).cells
    found = suite_run.result_of(cell, Ended(0), 1.0)
    assert (found.state, found.reason) == ("failed", "it left no record that fits the plan")
    assert suite_run.result_of(cell, Ended(143), 1.0).state == "to do"


# --- what the README tells schedulers


def block(language: str, inside: str) -> str:
    """The README's code block in that language that has `inside` in it."""
    readme = Path(suite_run.__file__).parents[1] / "README.md"
    if not readme.is_file():
        pytest.skip("not in a checkout")
    found = re.findall(rf"```{language}\n(.*?)```", readme.read_text(), re.DOTALL)
    (text,) = (each for each in found if inside in each)
    return text


@pytest.fixture
def stub(tmp_path, monkeypatch) -> Path:
    """A `guardbench` that writes down what it was told; and a `timeout -s TERM 5h`, which macOS lacks."""
    path = tmp_path / "bin" / "guardbench"
    path.parent.mkdir()
    path.write_text(f'#!/bin/sh\necho "$@" >> "{tmp_path}/told"\n')
    path.with_name("timeout").write_text('#!/bin/sh\nshift 3\nexec "$@"\n')
    for program in path.parent.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "told"


def shards_of(told: Path) -> list[str]:
    return [words.split("--shard ")[1].split()[0] for words in told.read_text().splitlines()]


def test_the_slurm_array_runs_every_shard_once(stub, tmp_path, monkeypatch) -> None:
    script = block("bash", "#SBATCH --array")
    first, last = map(int, re.search(r"--array=(\d+)-(\d+)", script).groups())
    monkeypatch.setenv("SLURM_SUBMIT_DIR", str(tmp_path))
    for number in range(first, last + 1):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(number))
        subprocess.run(["bash", "-c", script], check=True)
    assert shards_of(stub) == [f"{number}/{last}" for number in range(1, last + 1)]


def test_the_github_matrix_runs_every_shard_once(stub) -> None:
    jobs = yaml.safe_load(block("yaml", "--shard"))["jobs"]
    numbers = jobs["shard"]["strategy"]["matrix"]["shard"]
    (line,) = (s["run"] for s in jobs["shard"]["steps"] if "suite" in s.get("run", ""))
    for number in numbers:
        step = line.replace("${{ matrix.shard }}", str(number))
        subprocess.run(["bash", "-c", step], check=True)
    assert shards_of(stub) == [f"{number}/{len(numbers)}" for number in range(1, len(numbers) + 1)]


def test_the_readmes_suite_is_one(tmp_path) -> None:
    (tmp_path / "suite.toml").write_text(block("toml", "[[matrix]]"))
    assert len(read_suite(tmp_path / "suite.toml")) == 8


# --- shards of real cells

PARTIAL = (
    SHORT.replace('"short"', '"partial"')
    .replace('"digits"', '"imagenette"')
    .replace("resolution = 8", "resolution = 64")
)


def plan_of(shard: str, *more: str) -> dict:
    """What `guardbench suite --shard` says of its part: its cells and the division."""
    result = typed(
        "--methods", "random,dm", "--ipcs", "1,10", "--protocols", "short.toml,partial.toml",
        "--shard", shard, "--skip", "--dry-run", "--json", "plan.json", *more,
    )  # fmt: skip
    assert result.exit_code == 0, result.exception
    found = json.loads(Path("plan.json").read_text())
    return {"division": found["division"], "cells": {c["name"]: c["state"] for c in found["cells"]}}


def test_shards_are_divided_alike_before_and_after_a_part_of_the_images_is_decoded(
    folder, monkeypatch
) -> None:
    """Two images a class are there: too few for IPC 10, which is known only when they are decoded."""
    (folder / "partial.toml").write_text(PARTIAL)
    info = dataset_info("imagenette")
    for split in ("train", "val"):
        for name in info.classes:
            place = folder / "data" / "imagenette" / split / name
            place.mkdir(parents=True)
            for number in range(4 if split == "val" else 2):
                Image.new("RGB", (32, 32), (number, 0, 0)).save(place / f"{number}.png")
    monkeypatch.setenv("GUARDBENCH_CACHE", str(folder / "cache"))
    monkeypatch.setattr(forecast, "_images_per_second", lambda *_: 100.0)
    before = [plan_of(shard, "--data-dir", "data") for shard in ("1/2", "2/2")]
    names = [name for each in before for name in each["cells"]]
    assert len(names) == len(set(names)) == 8, "disjoint, and together all"
    assert all(each["cells"] for each in before)
    for split in ("train", "val"):
        load_split(
            "imagenette", split, resolution=64, data_dir=folder / "data", cache_dir=None,
            progress=Progress(),
        )  # fmt: skip
    after = [plan_of(shard, "--data-dir", "data") for shard in ("1/2", "2/2")]
    for one, other in zip(before, after, strict=True):
        assert one["division"] == other["division"]
        assert one["cells"].keys() == other["cells"].keys()
    states = {name: state for each in after for name, state in each["cells"].items()}
    assert states["partial/ipc10/random"] == "cannot be run"
    assert states["partial/ipc1/random"] == "to do"


def test_two_shards_that_are_run_make_every_record_once(folder, here) -> None:
    (folder / "s.toml").write_text(
        '[[matrix]]\nprotocols = ["short.toml"]\nmethods = ["random"]\nipcs = [1, 10]\n'
        f'set = ["{QUICK}"]\n'
        '[[matrix]]\nprotocols = ["short.toml"]\nmethods = ["random"]\nipcs = [1]\n'
        'set = ["squeeze.epochs=2"]\n'
    )
    shares = []
    for shard in ("1/2", "2/2"):
        here.clear()
        assert typed("s.toml", "--shard", shard).exit_code == 0
        shares.append([*here])
    assert all(shares)
    assert sorted(shares[0] + shares[1]) == [
        f"ipc1/{QUICK}",
        "ipc1/squeeze.epochs=2",
        f"ipc10/{QUICK}",
    ]
    assert len([*folder.glob("runs/records/short/ipc*/*.json")]) == 3
    here.clear()
    assert typed("s.toml").exit_code == 0
    assert here == [], "together they are the whole suite"
