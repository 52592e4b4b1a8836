"""Submissions: each broken one gets its exact line, a sound one none, and nothing hostile is followed."""

import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from guardbench.data.dataset import RealDataset, load_split
from guardbench.errors import GuardbenchError
from guardbench.models import build_model, save_weights
from guardbench.progress import Progress
from guardbench.submissions.check import check, recipe_of
from guardbench.submissions.fetch import require_public
from guardbench.submissions.files import inside, read_png, safetensors_heads, walk
from guardbench.submissions.form import FORM, Submission, form_text, load_form
from guardbench.submissions.pack import opened, pack, unpack
from guardbench.submissions.score import check_submission

FORM_WORDS = {
    "name": "mine",
    "title": "Mine",
    "authors": ["A. Nobody"],
    "licence": "CC0-1.0",
    "dataset": "digits",
    "resolution": 8,
    "ipc": 1,
    "labels": "hard",
    "made": "Drawn from a random generator for a test.",
    "extra_data": False,
    "data": {"kind": "safetensors", "path": "images.safetensors"},
}


def form(**changes: object) -> Submission:
    return Submission.model_validate({**FORM_WORDS, **changes})


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {"images": torch.rand(10, 1, 8, 8, generator=generator), "labels": torch.arange(10)}


@pytest.fixture
def folder(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A sound submission."""
    there = tmp_path / "mine"
    there.mkdir()
    (there / FORM).write_text(form_text(form()))
    save_file(tensors, there / "images.safetensors")
    return there


def lines(folder: Path, real: tuple[RealDataset, RealDataset] | None = None) -> list[str]:
    report = check(folder, fetched=None, real=real, progress=Progress())
    return [str(problem) for problem in report.problems.listed]


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def chunked(packed: bytes) -> bytes:
    """A grey PNG of 8 x 8 with these compressed pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


GREY = png(np.arange(64, dtype=np.uint8).reshape(8, 8))


def as_folder(folder: Path) -> Path:
    """The same submission with PNGs by class, all different."""
    (folder / "images.safetensors").unlink()
    words = {"kind": "folder", "path": "images"}
    (folder / FORM).write_text(form_text(form(data=words)))
    for label in range(10):
        (folder / "images" / str(label)).mkdir(parents=True)
        pixels = np.full((8, 8), 10 * label, np.uint8)
        pixels[0, 0] = 255
        (folder / "images" / str(label) / "0.png").write_bytes(png(pixels))
    return folder


def test_a_sound_one_has_no_problem(folder: Path) -> None:
    assert lines(folder) == []
    report = check(folder, fetched=None, real=None, progress=Progress())
    assert report.facts["image bytes"] == "640 at 8 bits a value"
    assert report.facts["protocols"] == "digits"
    assert lines(as_folder(folder)) == []


def test_the_form_reads_back_what_it_wrote(folder: Path) -> None:
    tricky = form(title='Quotes " and \\ and ümlaut', authors=["A", 'B "C"'], claimed_clean=61.5)
    (folder / FORM).write_text(form_text(tricky))
    assert load_form(folder) == tricky


def rewritten(**changes: object) -> Callable[[Path, dict[str, torch.Tensor]], None]:
    """Puts other words into the form, past its own checks."""

    def change(folder: Path, _: dict[str, torch.Tensor]) -> None:
        text = form_text(form())
        for key, value in changes.items():
            there = [line for line in text.splitlines() if line.startswith(f"{key} =")]
            line = f"{key} = {value}"
            text = text.replace(there[0], line) if there else f"{line}\n{text}"
        (folder / FORM).write_text(text)

    return change


def tensor(**changes: torch.Tensor | None) -> Callable[[Path, dict[str, torch.Tensor]], None]:
    def change(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        found = {**tensors, **changes}
        save_file({k: v for k, v in found.items() if v is not None}, folder / "images.safetensors")

    return change


def value(row: int, number: float) -> Callable[[Path, dict[str, torch.Tensor]], None]:
    def change(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        tensors["images"][row, 0, 0, 0] = number
        save_file(tensors, folder / "images.safetensors")

    return change


def twice(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    tensors["images"][3] = tensors["images"][2]
    save_file(tensors, folder / "images.safetensors")


def soft_rows(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    (folder / FORM).write_text(form_text(form(labels="soft")))
    soft = torch.eye(10)
    soft[4] *= 2
    save_file({**tensors, "soft": soft}, folder / "images.safetensors")


def soft_missing(folder: Path, _: dict[str, torch.Tensor]) -> None:
    (folder / FORM).write_text(form_text(form(labels="soft")))


def teacher_missing(folder: Path, _: dict[str, torch.Tensor]) -> None:
    words = {"arch": "convnet-d3-bn-small", "path": "teacher.safetensors"}
    (folder / FORM).write_text(form_text(form(labels="teacher", teacher=words)))


def teacher_unknown(folder: Path, _: dict[str, torch.Tensor]) -> None:
    words = {"arch": "vit-h", "path": "teacher.safetensors"}
    (folder / FORM).write_text(form_text(form(labels="teacher", teacher=words)))


def stray(folder: Path, _: dict[str, torch.Tensor]) -> None:
    (folder / "notes.txt").write_text("x")


def link(folder: Path, _: dict[str, torch.Tensor]) -> None:
    (folder / "images.safetensors").unlink()
    (folder / "images.safetensors").symlink_to("/etc/hostname")


def pipe(folder: Path, _: dict[str, torch.Tensor]) -> None:
    (folder / "images.safetensors").unlink()
    os.mkfifo(folder / "images.safetensors")


BROKEN = {
    "no form": (
        lambda folder, _: (folder / FORM).unlink(),
        "submission.toml: No such file or directory; add it.",
    ),
    "no toml": (
        lambda folder, _: (folder / FORM).write_text("name = "),
        "submission.toml: submission is not valid TOML: Invalid value (at end of document).",
    ),
    "title with a tag": (
        rewritten(title='"<script>alert(1)</script>"'),
        "submission.toml: title: must be one line without control characters, < and >.",
    ),
    "name of another folder": (
        rewritten(name='"other"'),
        "submission.toml: name: 'other' is not the folder's name; rename one of them.",
    ),
    "unknown dataset": (
        rewritten(dataset='"digit"'),
        "submission.toml: dataset: unknown dataset 'digit'. Did you mean digits? Known: cifar10, cifar100, "
        "digits, imagenet, imagenette, tiny-imagenet.",
    ),
    "path upwards": (
        rewritten(path='"../../etc/passwd"'),
        "submission.toml: data.path: must be a path below the submission's folder, such as images or "
        "a/b.parquet.",
    ),
    "link address": (
        rewritten(paper='"javascript:alert(1)"'),
        "submission.toml: paper: must be an https:// address, without spaces, quotes or brackets.",
    ),
    "ipc that is not there": (
        rewritten(ipc="10"),
        "submission.toml: ipc: class 0 (0) has 1 images, IPC 10 means 10.",
    ),
    "ipc that no protocol has": (
        rewritten(ipc="7"),
        "submission.toml: ipc: no protocol measures digits at 8 px, IPC 7; there are cifar10 at 32 px, "
        "IPC 1, 10, 50, 100; digits at 8 px, IPC 1, 10, 50, 100; imagenet at 224 px, IPC 1, 10, 50, 100; "
        "imagenette at 224 px, IPC 1, 10, 50, 100; imagenette at 64 px, IPC 1, 10, 50, 100; "
        "tiny-imagenet at 64 px, IPC 1, 10, 50, 100.",
    ),
    "unknown field": (
        rewritten(colour='"red"'),
        "submission.toml: colour: there is no such field; remove it, or correct its name.",
    ),
    "what convert left open": (
        rewritten(licence='"FILL IN, such as CC-BY-4.0"'),
        "submission.toml: licence: still says FILL IN; say it.",
    ),
    "no pixels": (
        tensor(images=torch.rand(10, 1, 0, 8)),
        "submission.toml: resolution: images are [10, 1, 0, 8], must be [N, 1, 8, 8].",
    ),
    "no images": (
        tensor(images=torch.rand(0, 1, 8, 8), labels=torch.arange(0)),
        "submission.toml: resolution: images are [0, 1, 8, 8], must be [N, 1, 8, 8].",
    ),
    "a date for a text": (
        rewritten(title="2026-11-28"),
        "submission.toml: title: must be text in quotes.",
    ),
    "a method's name": (
        rewritten(name='"guard"'),
        "submission.toml: name: 'guard' is a method's own name; take another.",
    ),
    "a name with capitals": (
        rewritten(name='"Mine"'),
        'submission.toml: name: must be lower-case letters, figures and ._+- alone, at most 64, not "Mine".',
    ),
    "nan": (
        value(3, float("nan")),
        "images.safetensors: images[3]: holds NaN or infinity; mend it.",
    ),
    "range": (
        value(5, -1.5),
        "images.safetensors: images[5]: values from -1.5 to 0.992, must be in [0, 1]; undo the "
        "normalisation (`guardbench convert` can).",
    ),
    "wrong size": (
        tensor(images=torch.rand(10, 1, 9, 9)),
        "submission.toml: resolution: images are [10, 1, 9, 9], must be [N, 1, 8, 8].",
    ),
    "wrong type": (
        tensor(images=torch.rand(10, 1, 8, 8).double()),
        "images.safetensors: images: is F64 [10, 1, 8, 8]; it must be one of F32, F16, U8 with 4 "
        "dimensions. Convert it.",
    ),
    "no labels": (
        tensor(labels=None),
        "images.safetensors: labels: missing; the file holds images. Rename or add it.",
    ),
    "fewer labels": (
        tensor(labels=torch.arange(9)),
        "images.safetensors: one label an image is needed; the lengths are images 10, labels 9.",
    ),
    "label beyond the classes": (
        tensor(labels=torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 10])),
        "images.safetensors: images[9]: label: 10 is no class of digits, which has 0 to 9.",
    ),
    "too many images": (
        tensor(images=torch.rand(90, 1, 8, 8), labels=torch.arange(90) % 10),
        "images.safetensors: images: 90 of them, IPC 1 allows 10.",
    ),
    "duplicate": (
        twice,
        "images.safetensors: images[3]: is the same image as images.safetensors: images[2]; every one "
        "must be its own.",
    ),
    "soft rows that do not sum to 1": (
        soft_rows,
        "images.safetensors: soft[4]: sums to 2 and begins at 0; a row must be probabilities (send "
        "softmax of logits).",
    ),
    "soft labels that are not there": (
        soft_missing,
        "images.safetensors: soft: missing; the file holds images, labels. Rename or add it.",
    ),
    "teacher that is not there": (
        teacher_missing,
        "teacher.safetensors: No such file or directory; add it.",
    ),
    "teacher of an unknown kind": (
        teacher_unknown,
        "submission.toml: teacher.arch: 'vit-h' is not one of resnet18, resnet50, convnet-d3, "
        "convnet-d2-small, convnet-d3-bn, convnet-d3-bn-small.",
    ),
    "a file too many": (stray, "notes.txt: nothing in the form names this file; remove it."),
    "a link": (link, "images.safetensors: is a link; put the file itself there."),
    "a pipe": (pipe, "images.safetensors: is neither a file nor a folder; remove it."),
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_broken_one_gets_its_line(
    name: str, folder: Path, tensors: dict[str, torch.Tensor]
) -> None:
    breaks, wanted = BROKEN[name]
    breaks(folder, tensors)  # type: ignore[operator]
    found = lines(folder)
    assert found
    assert all("\n" not in line and len(line) < 900 for line in found)
    assert wanted in found


@pytest.mark.parametrize("text", ["x = " + "[" * 20_000, "ipc = " + "1" * 5_000])
def test_toml_beyond_what_python_takes_is_one_line(text: str, folder: Path) -> None:
    (folder / FORM).write_text(text)
    (line,) = lines(folder)
    assert line.startswith("submission.toml: submission is not valid TOML: ")


def test_several_problems_are_all_told(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    tensors["images"][0, 0, 0, 0] = torch.nan
    tensors["images"][1, 0, 0, 0] = 7
    tensors["labels"][2] = 3
    save_file(tensors, folder / "images.safetensors")
    (folder / "extra.bin").write_bytes(b"x")
    found = " | ".join(lines(folder))
    for part in ("images[0]", "images[1]", "class 2", "class 3", "extra.bin"):
        assert part in found


def test_problems_alike_are_counted(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    tensors["images"] -= 5
    save_file(tensors, folder / "images.safetensors")
    found = lines(folder)
    assert sum("undo the normalisation" in line for line in found) == 5
    assert found[-1] == "...: 5 more problems like the last one."


def test_soft_labels_in_their_own_file_count_for_every_kind_of_data(folder: Path) -> None:
    """A folder of PNGs, or parquet, beside soft labels is no hard-labelled set."""
    soft = 0.1 * torch.eye(10) + 0.09
    for kind in ("folder", "parquet"):
        if kind == "folder":
            as_folder(folder)
        else:
            parquet(folder, rows_of())
        path = {"folder": "images", "parquet": "images.parquet"}[kind]
        words = {"labels": "soft", "data": {"kind": kind, "path": path}}
        (folder / FORM).write_text(form_text(form(**words)))
        others = [line for line in lines(folder) if "nothing in the form" not in line]
        wanted = "soft_label" if kind == "parquet" else "there are no soft labels"
        assert any(wanted in line for line in others), others
        (folder / FORM).write_text(form_text(form(**words, soft={"path": "soft.safetensors"})))
        save_file({"soft": soft}, folder / "soft.safetensors")
        report = check(folder, fetched=None, real=None, progress=Progress())
        assert report.content is not None
        assert torch.equal(report.content.soft, soft)
        assert "soft.safetensors" in report.content.files
        save_file({"soft": torch.full((3, 7), 9.0)}, folder / "soft.safetensors")
        assert any("soft: is [3, 7], must be [10, 10]" in line for line in lines(folder))


def test_what_a_record_is_of_may_not_change_behind_it(folder: Path) -> None:
    golden = Path(__file__).parents[1] / "golden" / "record-v4.json"
    words = json.loads(golden.read_text())
    report = check(folder, fetched=None, real=None, progress=Progress())
    assert report.form is not None
    assert report.content is not None
    words["method"]["recipe_sha256"] = recipe_of(report.form, report.content)
    there = folder / "results" / "digits" / "ipc1-seed0.json"
    there.parent.mkdir(parents=True)
    there.write_text(json.dumps(words))
    assert lines(folder) == []
    for beside in ("ipc1-seed0.png", "ipc1-seed0.curve.json"):  # which its page shows
        there.with_name(beside).write_bytes(b"")
    assert lines(folder) == []
    (folder / FORM).write_text(form_text(form(title="Another title")))
    (line,) = lines(folder)
    assert line == (
        "results/digits/ipc1-seed0.json: method.recipe_sha256: the form or a file has changed since; "
        "score it again."
    )
    later = folder / "assessments" / "digits" / "ipc1-seed0.longer.json"
    later.parent.mkdir(parents=True)
    later.write_text("{}")  # which the boards read, and refuse, when they are built
    assert not any("assessments" in line for line in lines(folder))
    there.write_text("{}")
    assert any("not a valid record" in line for line in lines(folder))
    (folder / "results" / "digits" / "x.pkl").write_bytes(b"x")
    assert any("x.pkl: nothing in the form names this file" in line for line in lines(folder))


@pytest.mark.parametrize("name", ["<img src=x>.png", "a\x1b[2J.png", "\u202egnp.png", b"\xff.png"])
def test_names_that_could_move_a_terminal_or_begin_a_tag_are_refused(
    name: str | bytes, folder: Path
) -> None:
    as_folder(folder)
    path = os.fsencode(folder / "images" / "0") + b"/" + (os.fsencode(name))
    Path(os.fsdecode(path)).write_bytes(GREY)
    found = lines(folder)
    assert any("is no plain name; rename it" in line for line in found)
    assert all(line.isprintable() for line in found)


def test_a_file_that_cannot_be_read_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_folder(folder)

    def refused(_: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refused)
    assert any("cannot be read (Permission denied)" in line for line in lines(folder))


PNGS = {
    "another size": (png(np.zeros((9, 9), np.uint8)), "is 9 x 9, resolution says 8; resize it."),
    "colour": (
        png(np.zeros((8, 8, 3), np.uint8)),
        "is RGB with 8 bits; save it as 8-bit grey, or send safetensors.",
    ),
    "no png": (b"GIF89a" + b"0" * 50, "is not a PNG; `guardbench convert` reads other formats."),
    "cut off": (GREY[:-20], "is cut off or no whole PNG; save it anew."),
    "polyglot": (GREY + b"PK\x03\x04", "4 bytes follow the image's end; save it anew."),
    "bytes behind the pixels": (
        chunked(zlib.compress(bytes(72)) + b"PK"),
        "holds more or less than its pixels; save it anew.",
    ),
    "more pixels than it says": (
        chunked(zlib.compress(bytes(10_000_000))),
        "holds more or less than its pixels; save it anew.",
    ),
    "an empty profile": (
        GREY[:-12] + chunk(b"iCCP", b"") + GREY[-12:],
        "cannot be decoded (index out of range); save it anew.",
    ),
    "animation": (
        GREY[:33] + chunk(b"acTL", b"\0" * 8) + GREY[33:],
        "holds b'acTL', no part of a plain image; save it anew.",
    ),
    "a long text": (
        GREY[:33] + chunk(b"tEXt", b"a\0" + b"x" * 70_000) + GREY[33:],
        "holds more than 8192 bytes beside its pixels.",
    ),
    "a bomb": (
        GREY[:8]
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0))
        + GREY[33:],
        "is 60000 x 60000, resolution says 8; resize it.",
    ),
}


@pytest.mark.parametrize("name", PNGS)
def test_each_hostile_png_gets_its_line(name: str, folder: Path) -> None:
    data, wanted = PNGS[name]
    as_folder(folder)
    (folder / "images" / "3" / "0.png").write_bytes(data)
    assert f"images/3/0.png: pixels: {wanted}" in lines(folder)


def test_pixels_of_a_folder_are_the_files_own(folder: Path) -> None:
    as_folder(folder)
    report = check(folder, fetched=None, real=None, progress=Progress())
    assert report.content is not None
    assert report.content.labels.tolist() == list(range(10))
    assert report.content.images[4, 0, 1, 1].item() == pytest.approx(40 / 255)


def test_class_folders_must_be_the_classes(folder: Path) -> None:
    as_folder(folder)
    (folder / "images" / "9").rename(folder / "images" / "nine")
    assert any("class folders: nine is no class" in line for line in lines(folder))


def parquet(folder: Path, rows: list[dict[str, object]], **more: object) -> None:
    import pyarrow
    from pyarrow import parquet as writer

    (folder / "images.safetensors").unlink(missing_ok=True)
    words = {"kind": "parquet", "path": "images.parquet"}
    (folder / FORM).write_text(form_text(form(data=words, **more)))
    writer.write_table(pyarrow.Table.from_pylist(rows), folder / "images.parquet")


def rows_of(count: int = 10) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for label in range(count):
        pixels = np.full((8, 8), 20 * label % 256, np.uint8)
        pixels[0, label % 8] = 255
        found.append({"image": {"bytes": png(pixels), "path": "/etc/passwd"}, "label": label})
    return found


def test_parquet_in_the_hubs_layout_is_read(folder: Path) -> None:
    parquet(folder, rows_of())
    assert lines(folder) == []


def test_parquet_without_a_row_is_a_problem(folder: Path) -> None:
    from pyarrow import parquet as files

    parquet(folder, rows_of())
    files.write_table(
        files.read_table(folder / "images.parquet").slice(0, 0), folder / "images.parquet"
    )
    assert lines(folder) == ["images.parquet: no image could be read."]


def test_a_form_nested_without_end_is_one_line(folder: Path) -> None:
    """Some versions of the TOML reader refuse it themselves."""
    (folder / FORM).write_text(".".join("a" * 12_000) + " = 1\n")
    (line,) = lines(folder)
    assert line.startswith("submission.toml: ")
    assert "nested too deeply" in line or "more than the allowed" in line


def test_what_no_protocol_measures_is_not_read(folder: Path, monkeypatch) -> None:
    """How large it may be would be for its own form to say: here 250 TB."""

    def read(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("guardbench.submissions.check.read_content", read)
    wide = form(dataset="imagenet", resolution=1024, ipc=10_000)
    (folder / FORM).write_text(form_text(wide))
    assert any(
        "no protocol measures imagenet at 1024 px, IPC 10000" in line for line in lines(folder)
    )
    report = check(folder, fetched=None, real=None, progress=Progress(), own_protocol=True)
    assert any("more than can be read" in str(problem) for problem in report.problems.listed)


def test_what_no_protocol_measures_is_not_fetched(folder: Path, monkeypatch) -> None:
    def fetched(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("guardbench.submissions.score.fetch_data", fetched)
    data = {"kind": "url", "url": "https://example.org/x.safetensors", "sha256": "0" * 64}
    (folder / FORM).write_text(form_text(form(resolution=1024, data=data)))
    report, _ = check_submission(
        folder, data_dir=None, cache_dir=None, progress=Progress(), copies=False
    )
    assert any("no protocol measures" in str(problem) for problem in report.problems.listed)


def test_parquet_with_soft_labels(folder: Path) -> None:
    rows = [{**row, "soft_label": torch.eye(10)[i].tolist()} for i, row in enumerate(rows_of())]
    parquet(folder, rows, labels="soft")
    report = check(folder, fetched=None, real=None, progress=Progress())
    assert not report.problems
    assert report.content is not None
    assert torch.equal(report.content.soft, torch.eye(10))


@pytest.mark.parametrize("kept", ["both", "parquet alone"])
def test_of_a_hub_dataset_the_exact_tensor_counts_before_the_pictures(
    kept: str, folder: Path, tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    fetched = tmp_path / "fetched"
    (fetched / "guardbench").mkdir(parents=True)
    (fetched / "data").mkdir()
    parquet(folder, rows_of())
    (folder / "images.parquet").rename(fetched / "data" / "train.parquet")
    if kept == "both":
        save_file(tensors, fetched / "guardbench" / "images.safetensors")
        save_file({"weight": torch.zeros(3)}, fetched / "guardbench" / "teacher.safetensors")
    words = {"kind": "hub", "repo": "someone/digits", "revision": "0" * 40}
    (folder / FORM).write_text(form_text(form(data=words)))
    report = check(folder, fetched=fetched, real=None, progress=Progress())
    assert not report.problems
    assert report.content is not None
    exact = torch.equal(report.content.images, tensors["images"])
    assert exact == (kept == "both")


def test_parquet_that_is_wrong(folder: Path) -> None:
    parquet(folder, [{"picture": b"", "label": 0}])
    assert lines(folder) == ["images.parquet: has no column image; it has picture, label."]
    rows = rows_of()
    rows[2]["image"] = {"bytes": None, "path": "/etc/passwd"}
    rows[5]["label"] = -1
    parquet(folder, rows)
    found = lines(folder)
    assert (
        "images.parquet: image[2]: image: holds no bytes; store the image itself and not its path."
        in found
    )
    assert "images.parquet: image[5]: label: -1 is no class number from 0 on." in found
    parquet(folder, rows_of() * 10)
    assert any(
        "100 rows of" in line and "more than the IPC allows" in line for line in lines(folder)
    )


def test_a_teacher_is_tried_on_the_images(folder: Path) -> None:
    teacher = build_model("convnet-d3-bn-small", channels=1, classes=10, resolution=8, seed=0)
    save_weights(teacher, folder / "teacher.safetensors")
    words = {"arch": "convnet-d3-bn-small", "path": "teacher.safetensors"}
    (folder / FORM).write_text(form_text(form(labels="teacher", teacher=words)))
    report = check(folder, fetched=None, real=None, progress=Progress())
    assert not report.problems
    assert "right on" in report.facts["teacher"]
    with torch.no_grad():
        next(teacher.parameters()).fill_(torch.nan)
    save_weights(teacher, folder / "teacher.safetensors")
    assert any("holds NaN or infinity" in line for line in lines(folder))


@pytest.fixture(scope="module")
def real() -> tuple[RealDataset, RealDataset]:
    def load(split: str) -> RealDataset:
        return load_split(
            "digits", split, resolution=8, data_dir=None, cache_dir=None, progress=Progress()
        )

    return load("train"), load("val")


def test_a_leak_and_a_coreset_are_told(
    folder: Path, real: tuple[RealDataset, RealDataset], tensors: dict[str, torch.Tensor]
) -> None:
    train, val = real
    firsts = [int((train.labels == label).nonzero()[0]) for label in range(10)]
    tensors["images"] = train.batch(firsts)
    save_file(tensors, folder / "images.safetensors")
    report = check(folder, fetched=None, real=real, progress=Progress())
    assert not report.problems
    assert report.notes == ["10 of 10 images are training images (10 to the pixel): a coreset."]
    leaked = int((val.labels == 4).nonzero()[0])
    tensors["images"][4] = val.batch([leaked])[0]
    save_file(tensors, folder / "images.safetensors")
    (line,) = lines(folder, real)
    assert line.startswith(
        f"images.safetensors: images[4]: is validation image {val.ids[leaked]} (distance 0.00, "
    )


def test_a_directory_of_millions_is_refused_before_it_is_read(folder: Path, tmp_path: Path) -> None:
    """The 64-bit record, which zipfile believes, says what the 32-bit one does not."""
    pack(folder, tmp_path / "one.zip")
    data = (tmp_path / "one.zip").read_bytes()
    at = data.rindex(b"PK\x05\x06")
    wide = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 1, 1, 1 << 30, 0)
    found = b"PK\x06\x07" + struct.pack("<IQI", 0, at, 1)
    (tmp_path / "two.zip").write_bytes(data[:at] + wide + found + data[at:])
    with pytest.raises(GuardbenchError, match="its directory has 1073741824 bytes; not unpacked"):
        unpack(tmp_path / "two.zip", tmp_path / "there")


def test_packed_and_unpacked_it_is_the_same(folder: Path, tmp_path: Path) -> None:
    (folder / "results").mkdir()
    (folder / "results" / "x.json").write_text("{}")
    pack(folder, tmp_path / "one.zip")
    pack(folder, tmp_path / "two.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    again = unpack(tmp_path / "one.zip", tmp_path / "there")
    assert sorted(walk(again)) == ["images.safetensors", FORM]
    assert (again / FORM).read_bytes() == (folder / FORM).read_bytes()
    with opened(tmp_path / "one.zip") as there:
        assert lines(there) == []
    with pytest.raises(GuardbenchError, match="is there already"):
        unpack(tmp_path / "one.zip", tmp_path / "there")


def hostile_zips() -> Iterator[tuple[str, list[tuple[zipfile.ZipInfo, bytes]], str]]:
    def entry(name: str, mode: int = 0o100644) -> zipfile.ZipInfo:
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        info.compress_type = zipfile.ZIP_DEFLATED
        return info

    top = (entry(f"mine/{FORM}"), b"x")
    yield "upwards", [top, (entry("mine/../../x"), b"x")], "leads out of the folder"
    yield "absolute", [top, (entry("/etc/x"), b"x")], "leads out of the folder"
    yield "backslash", [top, (entry("mine/..\\x"), b"x")], "leads out of the folder"
    yield "link", [top, (entry("mine/a", 0o120777), b"/etc/passwd")], "is a link"
    yield "two folders", [top, (entry("other/a"), b"x")], "must hold one folder"
    yield "no form", [(entry("mine/a"), b"x")], "must hold one folder"
    yield "bomb", [top, (entry("mine/a"), bytes(10_000_000))], "would become"
    yield "twice", [top, top], "stands twice"
    yield "moving name", [top, (entry("mine/\x1b[2J"), b"x")], "no plain name"
    yield "moving top", [(entry(f"\x1b[2J/{FORM}"), b"x")], "no plain name"
    bzip = entry("mine/a")
    bzip.compress_type = zipfile.ZIP_BZIP2
    yield "bzip2", [top, (bzip, b"x" * 99)], "compressed in an unusual way"


@pytest.mark.parametrize(
    ("entries", "wanted"), [pytest.param(*rest, id=name) for name, *rest in hostile_zips()]
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_hostile_zips_leave_nothing_behind(
    entries: list[tuple[zipfile.ZipInfo, bytes]], wanted: str, tmp_path: Path
) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as packed:
        for info, data in entries:
            packed.writestr(info, data)
    with pytest.raises(GuardbenchError, match=wanted):
        unpack(tmp_path / "x.zip", tmp_path / "there")
    assert not (tmp_path / "there").exists() or not any((tmp_path / "there").iterdir())


def test_a_corrupt_zip_leaves_nothing_behind(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr(f"mine/{FORM}", form_text(form()) * 9)
    data = bytearray((tmp_path / "x.zip").read_bytes())
    at = data.index(FORM.encode()) + len(FORM) + 5
    data[at : at + 40] = b"\xff" * 40
    (tmp_path / "x.zip").write_bytes(data)
    with pytest.raises(GuardbenchError, match="is no packed submission"):
        unpack(tmp_path / "x.zip", tmp_path / "there")
    assert not any((tmp_path / "there").iterdir())


def test_paths_never_leave_the_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "secret").write_text("x")
    (tmp_path / "in" / "way").symlink_to(tmp_path / "out")
    for path in ("../out/secret", "way/secret", "/etc/passwd", "a\\b", ".", "", "way\0"):
        with pytest.raises(GuardbenchError):
            inside(tmp_path / "in", path)
    with pytest.raises(GuardbenchError, match="is a link"):
        list(walk(tmp_path / "in"))


@pytest.mark.parametrize(
    "url",
    ["https://127.0.0.1/x", "https://10.0.0.1/x", "https://[::1]/x", "https://169.254.169.254/x"],
)
def test_a_form_cannot_reach_into_the_network_of_who_checks_it(url: str) -> None:
    with pytest.raises(GuardbenchError, match="no public address"):
        require_public(url)


ANY = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@ANY
@given(data=st.binary(max_size=300), cut=st.integers(0, len(GREY)), keep=st.booleans())
def test_no_bytes_crash_the_png_reader(data: bytes, cut: int, keep: bool) -> None:
    hostile = GREY[:cut] + data + (GREY[cut:] if keep else b"")
    with suppress(GuardbenchError):
        assert read_png(hostile, side=8, channels=1, where="x").shape == (1, 8, 8)


@pytest.fixture(scope="module")
def sound_bytes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    there = tmp_path_factory.mktemp("sound")
    images = torch.arange(640).view(10, 1, 8, 8) / 640
    parquet(there, rows_of())
    save_file({"images": images, "labels": torch.arange(10)}, there / "images.safetensors")
    return {path.name: path.read_bytes() for path in there.glob("images.*")}


@ANY
@given(
    kind=st.sampled_from(["images.parquet", "images.safetensors"]),
    flips=st.lists(st.tuples(st.integers(0, 8000), st.integers(0, 255)), min_size=1, max_size=8),
    cut=st.integers(0, 400),
)
def test_no_bytes_crash_the_tensor_and_parquet_readers(
    kind: str,
    flips: list[tuple[int, int]],
    cut: int,
    sound_bytes: dict[str, bytes],
    tmp_path: Path,
) -> None:
    data = bytearray(sound_bytes[kind])
    for place, byte in flips:
        data[place % len(data)] = byte
    there = tmp_path / "mine"
    there.mkdir(exist_ok=True)
    for other in there.iterdir():
        other.unlink()
    (there / kind).write_bytes(bytes(data[: len(data) - cut // 4]))
    words = {"kind": kind.rpartition(".")[2], "path": kind}
    (there / FORM).write_text(form_text(form(data=words)))
    for line in lines(there):
        assert line.isprintable()


@ANY
@given(text=st.text(max_size=400), form_too=st.booleans())
def test_no_text_crashes_the_form(text: str, form_too: bool, tmp_path: Path) -> None:
    there = tmp_path / "mine"
    there.mkdir(exist_ok=True)
    (there / FORM).write_bytes(
        ((form_text(form()) if form_too else "") + text).encode("utf-8", "surrogatepass")
    )
    for line in lines(there):
        assert line.isprintable()


@pytest.mark.parametrize(
    "header",
    [b"", b"[]", b"{" * 5000, b'{"a":{"dtype":"F32","shape":[-1]}}', b'{"a":{"dtype":"F32","shape":[9e99]}}',
     b'{"a":{"dtype":"F32","shape":[1000000000000]}}', b'{"images":3}', b"\xff\xfe"],
)  # fmt: skip
def test_hostile_tensor_headers(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(GuardbenchError, match="x: "):
        safetensors_heads(path, "x")
    path.write_bytes((1 << 40).to_bytes(8, "little") + header)
    with pytest.raises(GuardbenchError, match="no safetensors file"):
        safetensors_heads(path, "x")
