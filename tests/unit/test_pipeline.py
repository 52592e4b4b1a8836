"""The plan of a run: what it knows of the images that are here."""

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import guardbench
from guardbench import filing, forecast, pipeline
from guardbench.data.catalog import dataset_info
from guardbench.data.dataset import load_split
from guardbench.distillers.base import PlannedStage
from guardbench.errors import GuardbenchError
from guardbench.filing import require_committed, require_known_code, require_the_boards_images
from guardbench.forecast import expected_seconds
from guardbench.pipeline import (
    Plan,
    Settings,
    execute,
    make_plan,
    planned_method,
    prepare,
)
from guardbench.progress import Progress
from guardbench.protocol import load_protocol
from guardbench.record_files import load_record, save_record
from guardbench.runtime import Run

PER_CLASS = {"train": 2, "val": 1}


@pytest.fixture
def imagenette(tmp_path: Path) -> Path:
    """The folders of Imagenette with 20 training and 10 validation images."""
    draw = np.random.default_rng(0)
    for split, count in PER_CLASS.items():
        for name in dataset_info("imagenette").classes:
            folder = tmp_path / "data" / "imagenette" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 256, (70, 70, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "data"


def planned(data: Path, ipc: int = 1, publish: bool = False) -> Plan:
    settings = Settings(
        method="guard", dataset=None, protocol="imagenette-64", ipc=ipc, seed=0, device="cpu",
        precision="fp32", data_dir=data, cache_dir=data.parent / "cache",
        output=data.parent / "runs", publish=publish, engine="guardbench", tier="official",
        images=None,
    )  # fmt: skip
    return make_plan(settings, Progress())


def decode(data: Path) -> None:
    for split in PER_CLASS:
        load_split(
            "imagenette", split, resolution=64, data_dir=data, cache_dir=data.parent / "cache",
            progress=Progress(),
        )  # fmt: skip


def test_a_part_of_the_training_images_makes_no_official_record(imagenette: Path) -> None:
    before = planned(imagenette)
    assert not before.decoded
    decode(imagenette)
    plan = planned(imagenette)
    assert plan.task.train_images == 20
    assert plan.changed == ("train=20 of 9469 images",)
    assert not planned_method(plan).official
    assert plan.place.mark != before.place.mark, "a record of all images is not replaced"


def test_too_few_training_images_for_an_ipc_are_told_from_what_is_here(imagenette: Path) -> None:
    decode(imagenette)
    with pytest.raises(GuardbenchError, match="has only 20 training images"):
        planned(imagenette, ipc=10)


def test_too_few_test_images_are_refused_before_the_long_part(imagenette: Path) -> None:
    with pytest.raises(GuardbenchError, match="10 validation images found"):
        prepare(planned(imagenette))


def test_a_part_of_either_split_is_told_and_not_published(imagenette: Path, monkeypatch) -> None:
    """Where a protocol names no list, fewer validation images are other test images."""
    monkeypatch.setattr(pipeline, "measured_test", lambda *_: None)
    plan = planned(imagenette)
    said: list[str] = []
    monkeypatch.setattr(plan.task.run.progress, "say", said.append)
    prepare(plan)
    assert len(said) == 1, "a list that a protocol names is here whole, or refused"
    said.clear()
    test = plan.protocol.test.model_copy(update={"sha256": None})
    plan = dataclasses.replace(plan, protocol=plan.protocol.model_copy(update={"test": test}))
    prepare(plan)
    assert [line.split(" of ")[1].split(" images")[0] for line in said] == [
        "9469 training", "3925 validation",
    ]  # fmt: skip
    public = dataclasses.replace(plan, checkout=imagenette)
    with pytest.raises(
        GuardbenchError, match="--publish: 20 training images of imagenette are here"
    ):
        prepare(public)
    whole = [SimpleNamespace(complete=True), load_test(imagenette)]
    monkeypatch.setattr(pipeline, "_load", lambda _, split: whole[split == "val"])
    with pytest.raises(
        GuardbenchError, match="--publish: 10 validation images of imagenette are here"
    ):
        prepare(public)


def load_test(data: Path):
    return load_split(
        "imagenette", "val", resolution=64, data_dir=data, cache_dir=data.parent / "cache",
        progress=Progress(),
    )  # fmt: skip


def test_a_public_record_keeps_its_references(imagenette: Path, tmp_path, monkeypatch) -> None:
    """The plan stands all the same: a suite asks for it to see that the record is there."""
    path = tmp_path / "baselines/guard/results/imagenette-64/ipc1-seed0.json"
    monkeypatch.setattr(pipeline, "checkout_for", lambda _: tmp_path)
    path.parent.mkdir(parents=True)
    path.touch()
    plan = planned(imagenette, publish=True)
    kept = SimpleNamespace(seeds=[SimpleNamespace(references={"random": None})])
    monkeypatch.setattr(pipeline, "load_record", lambda _: kept)
    said = r"ipc1-seed0\.json holds the references .* add --references"
    with pytest.raises(GuardbenchError, match=said):
        execute(plan)
    asked = dataclasses.replace(plan, settings=dataclasses.replace(plan.settings, references=True))
    for other, references in ((asked, {"random": None}), (plan, {})):
        kept.seeds[0].references = references
        with pytest.raises(GuardbenchError, match="10 validation images found"):  # comes next
            execute(other)


def test_other_test_images_than_the_public_rows_are_refused_before_the_long_part(tmp_path) -> None:
    record = load_record(Path(__file__).parents[1] / "golden" / "record-v4.json")
    save_record(tmp_path / "baselines/guard/results/toy/ipc10.json", record)
    protocol = SimpleNamespace(id=record.protocol)
    require_the_boards_images(tmp_path, protocol, record.test)
    other = record.test.model_copy(update={"list_sha256": "0" * 64})
    with pytest.raises(GuardbenchError, match=r"--publish: test.list_sha256: other test images"):
        require_the_boards_images(tmp_path, protocol, other)
    require_the_boards_images(tmp_path, SimpleNamespace(id="another"), other)


@pytest.mark.parametrize(
    ("commit", "here", "said"),
    [
        (None, True, "git knows no commit"),
        ("abc-dirty", True, "recipes are not committed"),
        ("abc", False, "run python -m pip install -e"),
        ("abc", True, None),
    ],
)
def test_a_public_row_names_the_code_that_made_it(
    tmp_path, monkeypatch, commit: str | None, here: bool, said: str | None
) -> None:
    monkeypatch.setattr(filing, "running_commit", lambda: commit)
    checkout = Path(guardbench.__file__).parents[1] if here else tmp_path
    with nullcontext() if said is None else pytest.raises(GuardbenchError, match=said):
        require_known_code(checkout)


def test_a_public_row_takes_over_no_stage_of_code_that_it_cannot_name() -> None:
    require_committed(Path("squeeze"), ["abc", "unknown"])  # older stages did not say
    for commit in (None, "abc-dirty"):
        with pytest.raises(
            GuardbenchError, match=r"^--publish: squeeze was made by code that is not"
        ):
            require_committed(Path("squeeze"), ["abc", commit])


def test_another_engine_makes_another_file(imagenette: Path) -> None:
    plan = planned(imagenette)
    theirs = dataclasses.replace(
        plan, settings=dataclasses.replace(plan.settings, engine="reference")
    )
    assert plan.place.mark == "-seed0"
    assert theirs.place.mark == "-seed0-reference"


def test_a_stage_is_reckoned_at_the_speed_of_its_own_network(tmp_path, monkeypatch) -> None:
    """DC under a protocol of ResNet-18 students matches a ConvNet, and does so on every process alone."""
    rates = {"resnet18": 10.0, "convnet-d3": 100.0}
    monkeypatch.setattr(
        forecast, "_images_per_second", lambda _device, _precision, arch, *_: rates[arch]
    )
    protocol = load_protocol("cifar10")
    assert protocol.student.arch == "resnet18"
    accelerator = SimpleNamespace(
        process_index=0, num_processes=1, device="cpu", mixed_precision="no"
    )
    run = Run(accelerator=accelerator, workspace=tmp_path, seed=0, progress=Progress())
    folder = SimpleNamespace(finished=lambda: None)
    match = PlannedStage(folder, "s", 500.0, split=False, arch="convnet-d3")
    student = PlannedStage(folder, "s", 500.0)
    assert expected_seconds(run, protocol, [match, student]) == 5 + 50
    run = dataclasses.replace(run)
    run.__dict__["processes"] = SimpleNamespace(count=4)
    assert expected_seconds(run, protocol, [match, student]) == 5 + 12.5
