"""One run on two processes: the same numbers as on one, nothing lost when one of them dies."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from command import clean_environment, guardbench, quick_protocol
from PIL import Image
from safetensors.torch import load_file

from guardbench.data.catalog import dataset_info
from guardbench.protocol import _folder
from guardbench.record_files import load_record
from guardbench.records import ResultRecord

# Long enough to learn something, short enough that rounding has not yet grown into another network: from two
# epochs to three the teachers' largest difference grows from 6e-4 to 2e-2 (one thread, AVX-512).
SETTINGS = ("--set", "squeeze.epochs=2", "--set", "recover.iterations=10")
WORDS = ("run", "--method", "guard", "--protocol", "quick.toml", "--ipc", "10", *SETTINGS)
APART = 0.01  # of the images may have another verdict


def environment(**more: str) -> dict[str, str]:
    return clean_environment() | {"OMP_NUM_THREADS": "1"} | more


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# Without --multi_gpu it starts one process where there are no GPUs, whatever number it is given.
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")


def on_two(launcher: tuple[str, ...], *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *launcher, *words],
        cwd=cwd, env=environment(), capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


def the_record(workspace: Path) -> ResultRecord:
    (path,) = workspace.glob("records/quick/ipc10/*.json")
    return load_record(path)


def share_apart(one: ResultRecord, other: ResultRecord) -> float:
    """Of the verdicts, clean and attacked, how many differ."""
    pairs = [
        pair
        for a, b in zip(one.seeds, other.seeds, strict=True)
        for name in a.attacks
        for pair in zip(a.attacks[name].flags(), b.attacks[name].flags(), strict=True)
    ]
    return sum(x != y for x, y in pairs) / len(pairs)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    quick_protocol(folder)
    result = guardbench(*WORDS, "--output", "one", cwd=folder, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    return folder


def test_parts_add_up_to_the_whole() -> None:
    result = on_two(TORCHRUN, str(Path(__file__).with_name("on_two.py")), cwd=Path.cwd())
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("the same on two") == 2
    assert result.stdout.count("on from their midst") == 2
    assert result.stdout.count("waited") == 2


def test_two_processes_make_the_record_of_one(alone: Path) -> None:
    result = on_two(ACCELERATE, "-m", "guardbench", *WORDS, "--output", "two", cwd=alone)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("expected") == 1, "the first process alone speaks"
    assert "device       2 x cpu" in result.stdout
    one, two = the_record(alone / "one"), the_record(alone / "two")
    assert two.provenance.device == f"2 x {one.provenance.device}"
    assert {c.stage for c in two.cost} == {c.stage for c in one.cost}
    assert sum(seed.clean.correct for seed in one.seeds) > 60, (
        "networks that have learnt nothing agree with any other"
    )
    assert share_apart(one, two) <= APART
    teachers, images = (
        [load_file(*(alone / at).glob(name)) for at in ("one", "two")]
        for name in ("teachers/*/teacher.safetensors", "distilled/*/distilled/images.safetensors")
    )
    for key, value in teachers[0].items():
        torch.testing.assert_close(teachers[1][key], value, rtol=0.002, atol=0.002)
    # Adam divides a pixel's gradient by its own size, so rounding alone can turn a small one's sign.
    off = (images[0]["images"] - images[1]["images"]).abs().mean()
    assert off < 0.005, f"pixels differ by {off:.3f} on average"
    files = [sorted(p.relative_to(alone / at) for p in (alone / at).rglob("*") if p.is_file())
             for at in ("one", "two")]  # fmt: skip
    assert files[0] == files[1], "nothing more and nothing less is written"


def two_peers(cwd: Path, *words: str, **more: tuple[str, str]) -> list[subprocess.Popen[str]]:
    """Two processes of one run, started by hand; `more` is their environment, a value for each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [
        subprocess.Popen(
            [sys.executable, "-m", "guardbench", *words],
            cwd=cwd,
            env=environment(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                MASTER_ADDR="127.0.0.1", MASTER_PORT=port, ACCELERATE_USE_CPU="true",
                **{name: values[rank] for name, values in more.items()},
            ),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip


def small_imagenette(folder: Path, *, fewer: int = 0) -> None:
    """Four training and two validation images a class, of noise; `fewer` are left out of the first."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for number, name in enumerate(dataset_info("imagenette").classes):
            place = folder / "imagenette" / split / name
            place.mkdir(parents=True)
            for image in range(count - (fewer if split == "train" and not number else 0)):
                pixels = generator.integers(0, 255, (64, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{image}.png")


def test_processes_of_other_caches_go_on_together_and_of_other_images_are_refused(tmp_path) -> None:
    """A node that was replaced has decoded nothing yet, and may have another copy of the images."""
    small_imagenette(tmp_path / "whole")
    small_imagenette(tmp_path / "part", fewer=1)
    text = (_folder() / "imagenette-64.toml").read_text().partition("[[attacks]]")[0]
    for old, new in {
        'id = "imagenette-64"': 'id = "tiny"', "seeds = [0, 1, 2]": "seeds = [0]",
        "epochs = 300": "epochs = 1", "count = 1000": "count = 20", 'sha256 = "': '# sha256 = "',
        'rank_by = "autoattack"': 'rank_by = "fgsm"', 'arch = "resnet18"': 'arch = "convnet-d3-bn-small"',
    }.items():  # fmt: skip
        assert old in text, old
        text = text.replace(old, new)
    (tmp_path / "tiny.toml").write_text(text + '[[attacks]]\nname = "fgsm"\nkind = "fgsm"\n')
    settings = ("squeeze.epochs=1", "squeeze.arch=convnet-d3-bn-small", "recover.iterations=1",
                "squeeze.batch_size=10")  # fmt: skip
    words = [
        "run",
        "--method",
        "sre2l",
        "--protocol",
        "tiny.toml",
        "--ipc",
        "1",
        "--precision",
        "fp32",
    ]
    words += [word for each in settings for word in ("--set", each)]
    warm, cold = str(tmp_path / "warm"), str(tmp_path / "cold")
    alone = guardbench(
        *words, "--output", "a", "--data-dir", "whole", cwd=tmp_path, GUARDBENCH_CACHE=warm
    )
    assert alone.returncode == 0, alone.stderr
    peers = two_peers(
        tmp_path, *words, "--output", "b",
        GUARDBENCH_CACHE=(warm, cold), GUARDBENCH_DATA=("whole", "whole"),
    )  # fmt: skip
    said = [peer.communicate(timeout=120) for peer in peers]
    assert [peer.returncode for peer in peers] == [0, 0], said
    assert list((tmp_path / "b").rglob("records/tiny/ipc1/*.json"))
    peers = two_peers(
        tmp_path, *words, "--output", "c",
        GUARDBENCH_CACHE=(warm, cold), GUARDBENCH_DATA=("whole", "part"),
    )  # fmt: skip
    said = [peer.communicate(timeout=120) for peer in peers]
    assert [peer.returncode for peer in peers] == [2, 2], said
    assert "process 1 has train images" in said[0][1]
    assert said[0][1].splitlines()[-1].startswith("error: ")
    assert "Traceback" not in said[0][1] + said[1][1]


def test_a_process_that_dies_is_told_and_the_run_goes_on_without_it(alone: Path) -> None:
    peers = two_peers(alone, *WORDS, "--output", "three")
    teachers = alone / "three" / "teachers"
    deadline = time.monotonic() + 120
    while not list(teachers.glob("*/stage.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(peers[1].pid, signal.SIGKILL)
    _, said = peers[0].communicate(timeout=120)
    peers[1].communicate()
    assert peers[0].returncode == 2, said
    assert "another process of this run has stopped" in said
    assert "Traceback" not in said
    again = guardbench(*WORDS, "--output", "three", cwd=alone, OMP_NUM_THREADS="1")
    assert again.returncode == 0, again.stderr
    record = the_record(alone / "three")
    assert next(c for c in record.cost if c.stage == "squeeze").shared, "it was finished"
    assert share_apart(the_record(alone / "one"), record) <= APART
