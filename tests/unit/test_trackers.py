"""What `--log-with` is told: stage by stage, by the first process alone."""

from types import SimpleNamespace

import pytest
from accelerate import Accelerator

from guardbench.progress import Progress
from guardbench.runtime import Run


class Tracker:
    def __init__(self, name: str) -> None:
        self.name, self.told, self.metrics = name, [], set()
        self.tracker = SimpleNamespace(
            define_metric=lambda what, step_metric: self.metrics.add((what, step_metric))
        )

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        self.told.append((values, step))

    def finish(self) -> None:
        self.told.append("finished")


@pytest.fixture
def run() -> Run:
    accelerator = Accelerator(cpu=True)
    accelerator.trackers = [Tracker("tensorboard"), Tracker("wandb")]
    return Run(accelerator=accelerator, workspace=None, seed=0, progress=Progress())


def test_steps_of_a_stage_begin_anew_and_are_kept_apart(run: Run) -> None:
    run.log("squeeze", 9, loss=1.0)
    run.log("student 0", 1, loss=0.5)
    board, wandb = run.accelerator.trackers
    assert board.told == [({"squeeze/loss": 1.0}, 9), ({"student 0/loss": 0.5}, 1)]
    # Its own step only grows, and what came with a smaller one would be lost.
    assert wandb.told == [
        ({"squeeze/loss": 1.0, "squeeze/step": 9}, None),
        ({"student 0/loss": 0.5, "student 0/step": 1}, None),
    ]
    assert ("squeeze/*", "squeeze/step") in wandb.metrics


def test_the_first_process_alone_tells(run: Run) -> None:
    run.processes.rank = 1
    run.log("squeeze", 1, loss=1.0)
    assert not [tracker for tracker in run.accelerator.trackers if tracker.told]


def test_a_run_has_a_name_and_its_settings_and_is_closed_whatever_ends_it(
    tmp_path, monkeypatch
) -> None:
    accelerator = Accelerator(cpu=True, project_dir=tmp_path)
    accelerator.log_with = ["wandb"]
    begun: list[tuple] = []

    def init(project: str, config: dict, more: dict) -> None:
        begun.append((project, config, more, accelerator.logging_dir))
        accelerator.trackers = [Tracker("wandb")]

    monkeypatch.setattr(accelerator, "init_trackers", init)
    run = Run(accelerator=accelerator, workspace=None, seed=0, progress=Progress())
    with (
        pytest.raises(KeyboardInterrupt),
        run.tracked_as("guard-digits-ipc1-seed0", {"ipc": 1, "squeeze.crop_scale": (0.5, 1.0)}),
    ):
        raise KeyboardInterrupt
    ((project, config, more, folder),) = begun
    assert (project, more) == ("guardbench", {"wandb": {"name": "guard-digits-ipc1-seed0"}})
    assert config == {"ipc": 1, "squeeze.crop_scale": "(0.5, 1.0)"}
    assert folder == str(tmp_path / "guard-digits-ipc1-seed0")
    assert accelerator.trackers[0].told == ["finished"]
