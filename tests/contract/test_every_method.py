"""Every baseline from real digits to a record, at one image per class: artifact, record, resume."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from guardbench.distilled import load_distilled
from guardbench.methods import load_method, method_names
from guardbench.pipeline import Settings, execute, make_plan
from guardbench.progress import Progress
from guardbench.protocol import load_protocol
from guardbench.record_files import load_record
from guardbench.registry import DISTILLERS
from guardbench.runtime import Run

SHORT = """
[threat]
norm = "linf"
eps = "16/255"
[student]
arch = "convnet-d3-bn-small"
seeds = [0, 1]
epochs = 4
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
params = { steps = 3, step = "8/255" }
"""
HEAD = """
id = "short"
title = "Short"
source = "tests"
dataset = "digits"
resolution = 8
ipc = [1]
rank_by = "pgd"
"""
TEACHER = ["squeeze.epochs=2"]
CUTS = {
    "sre2l": [*TEACHER, "recover.iterations=8"],
    "random": TEACHER,
    "herding": TEACHER,
    "k-center": TEACHER,
    "full": [],
    "dc": ["match.iterations=2"],
    "dsa": ["match.iterations=2"],
    "dm": ["match.iterations=2"],
    "mtt": ["match.iterations=2", "experts.count=1"],
    "tesla": ["match.iterations=2", "experts.count=1"],
}


def settings(folder: Path, method: str, overrides: list[str]) -> Settings:
    protocol = folder / "short.toml"
    protocol.write_text(HEAD + SHORT)
    return Settings(
        method=method,
        dataset=None,
        protocol=str(protocol),
        ipc=1,
        seed=0,
        device="cpu",
        precision="auto",
        data_dir=None,
        cache_dir=None,
        output=folder / "runs",
        publish=False,
        engine="guardbench",
        tier="official",
        images=None,
        overrides=tuple(overrides),
    )


def global_generators() -> tuple[object, ...]:
    """The states of torch's, numpy's and Python's own."""
    words = [str(part) for part in np.random.get_state()]
    return torch.get_rng_state().tolist(), words, random.getstate()


def test_every_distiller_has_its_cuts() -> None:
    assert CUTS.keys() == DISTILLERS.keys()


@pytest.mark.parametrize("name", method_names())
def test_a_method_runs_and_resumes(tmp_path: Path, monkeypatch, name: str) -> None:
    wanted = settings(tmp_path, name, CUTS[load_method(name).distiller])
    told: set[str] = set()
    monkeypatch.setattr(Run, "tracked", True)
    monkeypatch.setattr(Run, "log", lambda _run, stage, _step, **_values: told.add(stage))
    before = global_generators()
    first = execute(make_plan(wanted, Progress()))
    trained = {
        stage.folder.name
        for stage in make_plan(wanted, Progress()).stages
        if stage.folder.name.split()[0] in ("squeeze", "recover", "match", "expert", "student")
    }
    assert told == trained, "trackers are told the losses of all that is trained"
    assert global_generators() == before, "every draw is from a generator that a name has seeded"
    record = load_record(first.paths["record"])
    assert record.method.name == name
    assert record.method.official == (not wanted.overrides)
    assert record.overrides == wanted.overrides
    distilled = load_distilled(first.paths["artifact"].parent)
    assert distilled.manifest.sha256 == record.artifact.sha256
    assert distilled.manifest.method == name
    assert record.artifact.images == len(distilled.images)
    assert len(record.seeds) == 2
    assert record.protocol_sha256 == load_protocol(wanted.protocol).digest

    # Nothing is left to do, so the same command only reads.
    again = make_plan(wanted, Progress())
    assert all(stage.folder.finished() is not None for stage in again.stages)
    before = {path: path.stat().st_mtime_ns for path in wanted.output.rglob("stage.json")}
    assert execute(again).record.result_sha256 == first.record.result_sha256
    assert before == {p: p.stat().st_mtime_ns for p in wanted.output.rglob("stage.json")}

    # What evaluation needs is rebuilt from the artifact alone.
    board = json.loads(first.paths["board"].read_text())
    rows = board["tracks"][record.artifact.label_kind]
    assert [row["method"]["name"] for row in rows] == [name]


@pytest.mark.parametrize("name", ["guard", "sre2l-trades", "tesla", "k-center"])
def test_equal_seeds_give_equal_digests(tmp_path: Path, name: str) -> None:
    found = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        wanted = settings(tmp_path / folder, name, CUTS[load_method(name).distiller])
        found.append(execute(make_plan(wanted, Progress())).record.result_sha256)
    assert found[0] == found[1]
