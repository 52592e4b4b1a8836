"""`guardbench submission check`: everything that is wrong with a submission, in seconds, without a GPU."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from guardbench import canonical, json_files
from guardbench.data.catalog import DatasetInfo, dataset_info
from guardbench.data.dataset import RealDataset
from guardbench.errors import GuardbenchError
from guardbench.methods import method_names
from guardbench.models import Classifier
from guardbench.progress import Progress
from guardbench.record_files import CURVE_SUFFIX, FILE_LIMIT, load_record
from guardbench.submissions.files import plain_file, walk
from guardbench.submissions.form import FILL_IN, FORM, Submission, protocols_for, unmeasured
from guardbench.submissions.leaks import find_leaks
from guardbench.submissions.pixels import MOST_VALUES
from guardbench.submissions.problems import Problems
from guardbench.submissions.read import Content, read_content
from guardbench.submissions.teacher import read_teacher, share_known
from guardbench.toml_files import read_toml

SUM_TOLERANCE = 1e-3
"""How far a soft label may sum from 1: float16 labels of many classes are off by about this."""
BESIDE = ("preview.png", "README.md", "LICENSE", "LICENSE.md", "LICENSE.txt")
"""Files that a submission may hold though nothing reads them."""
_RESULT = re.compile(
    r"(results|assessments)/[a-z0-9][a-z0-9._+-]*/[a-z0-9][a-z0-9._+-]*\.(json|png)"
)
"""What scoring leaves in the folder: records, assessments of them, and a curve or a picture beside one."""


@dataclass
class Report:
    """What a check found.

    Attributes:
        form, content, teacher: what could be read.
        problems: each stops the submission.
        notes: what a reader should know, such as that images are training images.
        facts: for the table: images, bytes, distances.
        copied: images that are training images; None where that was not looked for.
    """

    form: Submission | None
    content: Content | None
    teacher: Classifier | None
    problems: Problems
    notes: list[str] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    copied: int | None = None

    def words(self) -> dict[str, Any]:
        """The report as JSON words."""
        return {
            "submission": None if self.form is None else self.form.model_dump(mode="json"),
            "facts": self.facts,
            "notes": self.notes,
            "problems": [asdict(problem) for problem in self.problems.listed],
            "problem_count": self.problems.count,
        }


def check(
    folder: Path,
    *,
    fetched: Path | None,
    real: tuple[RealDataset, RealDataset] | None,
    progress: Progress,
    own_protocol: bool = False,
) -> Report:
    """Checks the submission in `folder`.

    Args:
        fetched: of data that lie elsewhere (kinds `hub` and `url`): where they were fetched to.
        real: the training and the validation split at the submission's resolution; None leaves out
            the search for copies, which is then noted.
        progress: where the search is shown.
        own_protocol: the setting is measured by a protocol of the user's own, if by no published one.
    """
    problems = Problems()
    report = Report(read_form(folder, problems), None, None, problems)
    form = report.form
    if form is None:
        return report
    _check_strays(folder, form, problems)
    if not measurable(form, problems, own_protocol=own_protocol):
        return report  # how much there may be of it, its own form would say
    info = dataset_info(form.dataset)
    if form.data.kind in ("hub", "url") and fetched is None:
        return report  # that it could not be fetched, its caller says
    report.content = content = read_content(folder, form, info, fetched, problems)
    report.teacher = read_teacher(folder, form, info, problems)
    if content is None:
        return report
    sound = _check_images(form, info, content, problems)
    _check_soft(form, info, content, problems)
    _check_results(folder, recipe_of(form, content), problems)
    _state(report, form, content, folder)
    if not sound:
        return report
    _check_duplicates(content, problems)
    if report.teacher is not None and form.teacher is not None:
        with problems.catching(form.teacher.path):
            share = share_known(report.teacher, content.images, content.labels)
            report.facts["teacher"] = f"{form.teacher.arch}, right on {share:.0%} of the images"
            if share < 2 / info.num_classes:
                report.notes.append(
                    "the teacher is near chance on the images: is its order of classes another?"
                )
    if real is None:
        report.notes.append(f"copies were not looked for: {form.dataset} is not here (--data-dir).")
    else:
        _check_leaks(content, real, report, progress)
    return report


def read_form(folder: Path, problems: Problems) -> Submission | None:
    """The form, or None and all that is wrong with it."""
    form = None
    with problems.catching(FORM):
        path = plain_file(folder, FORM, most=1 << 16)
        try:
            words = read_toml(path, what="submission")
        except GuardbenchError as error:
            raise GuardbenchError(str(error).removeprefix(f"{path}: ")) from error
        try:
            form = json_files.strictly(Submission, words)
        except ValidationError as error:
            for field, message in json_files.problems(error):
                problems.add(FORM, field, f"{message}.")
            return None
        except RecursionError:
            raise GuardbenchError("is nested too deeply.") from None
        if form.name in method_names():
            problems.add(FORM, "name", f"{form.name!r} is a method's own name; take another.")
        if form.name != folder.resolve().name:
            problems.add(
                FORM, "name", f"{form.name!r} is not the folder's name; rename one of them."
            )
        for field, text in form.model_dump().items():
            if any(str(part).startswith(FILL_IN) for part in _list(text)):
                problems.add(FORM, field, f"still says {FILL_IN}; say it.")
        with problems.catching(FORM, "dataset"):
            dataset_info(form.dataset)
            return form
    return None


def _list(value: object) -> list[object]:
    return [*value] if isinstance(value, list | tuple) else [value]


def recipe_of(form: Submission, content: Content) -> str:
    """Digest of all that a submission is, which its record holds as that of its recipe."""
    return canonical.digest({"form": form.sha256, "files": content.files})


def measurable(form: Submission, problems: Problems, *, own_protocol: bool) -> bool:
    """Whether a protocol measures its setting; what is wrong where none does."""
    if own_protocol:
        info = dataset_info(form.dataset)
        values = form.ipc * info.num_classes * info.channels * form.resolution**2
        if values <= MOST_VALUES:
            return True
        problems.add(FORM, "ipc", "so many images of that size are more than can be read.")
        return False
    problem = unmeasured(form)
    if problem is not None:
        problems.add(FORM, "ipc", problem)
    return problem is None


def _check_strays(folder: Path, form: Submission, problems: Problems) -> None:
    named = [form.data.path] + [
        table.path for table in (form.soft, form.teacher) if table is not None
    ]
    with problems.catching(folder.name):
        for name in walk(folder):
            belongs = any(name == path or name.startswith(f"{path}/") for path in named if path)
            if not (belongs or name == FORM or name in BESIDE or _RESULT.fullmatch(name)):
                problems.add(
                    name, "", "nothing in the form names this file; remove it.", kind="stray"
                )


def _check_results(folder: Path, recipe: str, problems: Problems) -> None:
    """Records beside a submission must be of this very one."""
    with problems.catching(folder.name):
        for name in walk(folder):
            beside = name.endswith((".png", CURVE_SUFFIX))
            if beside or not (_RESULT.fullmatch(name) and name.startswith("results/")):
                continue
            with problems.catching(name):
                record = load_record(plain_file(folder, name, most=FILE_LIMIT))
                if record.method.recipe_sha256 != recipe:
                    raise GuardbenchError(
                        "method.recipe_sha256: the form or a file has changed since; score it again."
                    )


def _check_images(
    form: Submission, info: DatasetInfo, content: Content, problems: Problems
) -> bool:
    """Whether images and labels are what they must be."""
    before = problems.count
    images, labels = content.images, content.labels
    shape = (info.channels, form.resolution, form.resolution)
    if tuple(images.shape[1:]) != shape or not len(images):
        problems.add(
            FORM,
            "resolution",
            f"images are {[*images.shape]}, must be [N, {', '.join(map(str, shape))}].",
        )
        return False
    finite = images.flatten(1).isfinite().all(1)
    for row in (~finite).nonzero().flatten().tolist():
        problems.add(content.names[row], "", "holds NaN or infinity; mend it.", kind="finite")
    low, high = images.flatten(1).amin(1), images.flatten(1).amax(1)
    for row in (finite & ((low < 0) | (high > 1))).nonzero().flatten().tolist():
        problems.add(
            content.names[row],
            "",
            f"values from {float(low[row]):.4g} to {float(high[row]):.4g}, must be in [0, 1]; undo the "
            "normalisation (`guardbench convert` can).",
            kind="range",
        )
    strange = (labels < 0) | (labels >= info.num_classes)
    for row in strange.nonzero().flatten().tolist():
        problems.add(
            content.names[row],
            "label",
            f"{int(labels[row])} is no class of {info.name}, which has 0 to {info.num_classes - 1}.",
            kind="label",
        )
    counts = Counter(labels[~strange].tolist())
    names = info.names or info.classes
    for label in range(info.num_classes):
        if counts[label] != form.ipc:
            called = f" ({names[label]})" if label < len(names) else ""
            problems.add(
                FORM,
                "ipc",
                f"class {label}{called} has {counts[label]} images, IPC {form.ipc} means {form.ipc}.",
            )
    return problems.count == before


def _check_soft(form: Submission, info: DatasetInfo, content: Content, problems: Problems) -> None:
    soft = content.soft
    if soft is None:
        if form.labels == "soft":
            problems.add(FORM, "labels", "soft, and there are no soft labels; add a [soft] table.")
        return
    where = form.soft.path if form.soft is not None else form.data.path or FORM
    if soft.shape != (len(content.images), info.num_classes):
        wanted = [len(content.images), info.num_classes]
        problems.add(where, "soft", f"is {[*soft.shape]}, must be {wanted}, a row an image.")
        return
    bad = ~((soft >= 0).all(1) & ((soft.sum(1) - 1).abs() <= SUM_TOLERANCE))  # NaN is bad too
    for row in bad.nonzero().flatten().tolist():
        problems.add(
            where,
            f"soft[{row}]",
            f"sums to {float(soft[row].sum()):.4g} and begins at {float(soft[row].min()):.4g}; a row must be "
            "probabilities (send softmax of logits).",
            kind="soft",
        )
    off = (soft.argmax(1) != content.labels).sum()
    if off > len(soft) / 2:
        problems.add(
            where, "soft", f"{int(off)} of {len(soft)} rows favour another class than their label."
        )


def _check_duplicates(content: Content, problems: Problems) -> None:
    bytes_ = content.images.mul(255).round().to(torch.uint8).flatten(1).numpy()
    first: dict[bytes, int] = {}
    for row, image in enumerate(bytes_):
        earlier = first.setdefault(image.tobytes(), row)
        if earlier == row:
            continue
        problems.add(
            content.names[row],
            "",
            f"is the same image as {content.names[earlier]}; every one must be its own.",
            kind="duplicate",
        )


def _check_leaks(
    content: Content, real: tuple[RealDataset, RealDataset], report: Report, progress: Progress
) -> None:
    train, val = real
    found = find_leaks(content.images, train, val, progress)
    for row in found.leaked.nonzero().flatten().tolist():
        there = val.ids[int(found.val.position[row])]
        how = "is" if found.val.exact[row] else "is made from"
        report.problems.add(
            content.names[row],
            "",
            f"{how} validation image {there} (distance {float(found.val.distance[row]):.2f}, from any "
            f"training image {float(found.train.distance[row]):.2f}); make it from training images.",
            kind="leak",
        )
    copies = report.copied = int(found.copied.sum())
    if copies:
        report.notes.append(
            f"{copies} of {len(content.images)} images are training images"
            f" ({int(found.train.exact.sum())} to the pixel): a coreset."
        )
    report.facts["nearest real image"] = (
        f"training {_quartiles(found.train.distance)}, validation {_quartiles(found.val.distance)} "
        "(median, least; 0 is a copy, 1.4 unrelated)"
    )


def _quartiles(distance: Tensor) -> str:
    return f"{float(distance.median()):.2f}, {float(distance.min()):.2f}"


def _state(report: Report, form: Submission, content: Content, folder: Path) -> None:
    report.facts["images"] = f"{len(content.images)}, {[*content.images.shape[1:]]}"
    report.facts["image bytes"] = f"{content.images.numel()} at 8 bits a value"
    stored = sum(
        (folder / name).stat().st_size for name in content.files if (folder / name).is_file()
    )
    report.facts["stored"] = f"{stored} bytes in {len(content.files)} files"
    labels = content.labels.numel()
    if content.soft is not None:
        labels = content.soft.numel() * 4
    if form.teacher is not None and (folder / form.teacher.path).is_file():
        labels = (folder / form.teacher.path).stat().st_size
    report.facts["label bytes"] = f"{labels} ({form.labels})"
    report.facts["protocols"] = ", ".join(protocol.id for protocol in protocols_for(form)) or "none"
