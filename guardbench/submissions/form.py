"""`submission.toml`: who made a distilled set, from what, how, and where its images lie."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from guardbench import canonical
from guardbench.data.catalog import DatasetInfo
from guardbench.fields import HIDDEN, Name, Sha256, Strict, only_const
from guardbench.protocol import Protocol, load_protocol, protocol_ids
from guardbench.records import LabelKind
from guardbench.toml_files import checked, read_toml

FORM = "submission.toml"
FORM_VERSION: Literal[1] = 1
FILL_IN = "FILL IN"
"""How the fields of a form begin that `guardbench convert` cannot know."""


def _line(text: str) -> str:
    if not re.fullmatch(f"[^{HIDDEN}<>]+", text):
        raise ValueError("must be one line without control characters, < and >")
    return text


def _repository(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", text, re.ASCII):
        raise ValueError("must be OWNER/NAME")
    return text


def _commit(text: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{40}", text):
        raise ValueError("must be a commit, 40 figures from 0 to f")
    return text


def _address(text: str) -> str:
    if not re.fullmatch(r"https://[A-Za-z0-9][A-Za-z0-9.-]*(:\d+)?(/[!#-;=?-Z_a-z~]*)?", text):
        raise ValueError("must be an https:// address, without spaces, quotes or brackets")
    return text


Text = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_line)]
"""One line without control characters and without what could begin an HTML tag."""
Link = Annotated[str, Field(max_length=300), AfterValidator(_address)]
"""An https address without anything that could end an attribute or a line."""


def _plain(path: str) -> str:
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\\" in path or ":" in path:
        raise ValueError(
            "must be a path below the submission's folder, such as images or a/b.parquet"
        )
    return path


RelativePath = Annotated[Text, AfterValidator(_plain)]
"""A path below the submission's folder, with `/`."""


class Data(Strict):
    """The `[data]` table: where the images and their labels are.

    | kind | fields | what is there |
    |---|---|---|
    | `folder` | `path` | `<path>/<class>/<name>.png`, a folder a class, named as the dataset's classes |
    | `parquet` | `path` | Hugging Face's image layout: `image`, `label`, maybe `soft_label` |
    | `safetensors` | `path` | `images` [N, C, H, W], `labels` [N], maybe `soft` [N, K] |
    | `hub` | `repo`, `revision` | a Hugging Face dataset at one commit, in one of the last two forms |
    | `url` | `url`, `sha256` | one `.safetensors` or `.parquet` file |

    Images are float32 in [0, 1] or uint8, labels integers from 0 in the dataset's order of classes.
    """

    kind: Literal["folder", "parquet", "safetensors", "hub", "url"]
    path: RelativePath | None = None
    repo: Annotated[str, AfterValidator(_repository)] | None = None
    revision: Annotated[str, AfterValidator(_commit)] | None = None
    url: Link | None = None
    sha256: Sha256 | None = None

    @model_validator(mode="after")
    def _fields_of_its_kind(self) -> Data:
        wanted = {"hub": {"repo", "revision"}, "url": {"url", "sha256"}}.get(self.kind, {"path"})
        given = {
            name for name in ("path", "repo", "revision", "url", "sha256") if getattr(self, name)
        }
        if missing := sorted(wanted - given):
            raise ValueError(f"kind {self.kind} needs {' and '.join(missing)}")
        if extra := sorted(given - wanted):
            raise ValueError(f"kind {self.kind} has no {' or '.join(extra)}")
        if self.url is not None and not self.url.endswith((".safetensors", ".parquet")):
            raise ValueError("url: must end in .safetensors or .parquet")
        return self


class SoftLabels(Strict):
    """The `[soft]` table: a safetensors file with `soft` [N, K], rows that sum to 1."""

    path: RelativePath


class Teacher(Strict):
    """The `[teacher]` table: the network that labels every view of an image.

    Attributes:
        arch: an architecture of `guardbench.models`, for the submission's resolution.
        path: its weights, safetensors.
    """

    arch: Name
    path: RelativePath


class Submission(Strict):
    """A `submission.toml`.

    Attributes:
        name: the folder's, and the row's.
        title: as people write it.
        authors: at least one.
        paper, code: where they are.
        licence: of the distilled images, such as `CC-BY-4.0`.
        dataset, resolution, ipc: what was distilled, to how many images per class.
        labels: the track: `hard`, `soft`, or `teacher`.
        made: how the set was made, in a few sentences.
        extra_data: whether anything but the dataset's training images shaped it, a pretrained
            network included.
        claimed_clean: the clean accuracy in percent that the authors report, if they do.
    """

    schema_version: Literal[1] = Field(default=FORM_VERSION, json_schema_extra=only_const)
    name: Name
    title: Annotated[Text, Field(max_length=80)]
    authors: tuple[Text, ...] = Field(min_length=1, max_length=100)
    paper: Link | None = None
    code: Link | None = None
    licence: Annotated[Text, Field(max_length=80)]
    dataset: Name
    resolution: int = Field(gt=0, le=1024)
    ipc: int = Field(gt=0, le=10_000)
    labels: LabelKind
    made: Annotated[str, Field(min_length=20, max_length=2000), AfterValidator(_line)]
    extra_data: bool
    claimed_clean: float | None = Field(default=None, ge=0, le=100)
    data: Data
    soft: SoftLabels | None = None
    teacher: Teacher | None = None

    @model_validator(mode="after")
    def _labels_are_there(self) -> Submission:
        if (self.teacher is not None) != (self.labels == "teacher"):
            raise ValueError('teacher: belongs to labels = "teacher", and to no other kind')
        if self.soft is not None and self.labels != "soft":
            raise ValueError('soft: belongs to labels = "soft", and to no other kind')
        return self

    @property
    def sha256(self) -> str:
        """Digest of what it says; the files that it names have digests of their own."""
        return canonical.digest(self.model_dump(mode="json"))


def load_form(folder: Path) -> Submission:
    """The form of the submission in `folder`.

    Raises:
        GuardbenchError: it is missing, too large, not TOML, or a field is wrong (the first of them;
            `check.read_form` gives all).
    """
    path = folder / FORM
    return checked(Submission, read_toml(path, what="submission"), where=str(path))


def protocols_for(form: Submission) -> list[Protocol]:
    """The published protocols that measure a submission's dataset, resolution and IPC."""
    known = [load_protocol(name) for name in protocol_ids()]
    return [
        protocol
        for protocol in known
        if (protocol.dataset, protocol.resolution) == (form.dataset, form.resolution)
        and form.ipc in protocol.ipc
        and protocol.superseded_by is None
    ]


def unmeasured(form: Submission) -> str | None:
    """That no published protocol measures its setting, and which settings there are; None where one does."""
    if protocols_for(form):
        return None
    settings = sorted(
        {
            f"{p.dataset} at {p.resolution} px, IPC {', '.join(map(str, p.ipc))}"
            for p in map(load_protocol, protocol_ids())
        }
    )
    return (
        f"no protocol measures {form.dataset} at {form.resolution} px, IPC {form.ipc}; there are "
        f"{'; '.join(settings)}."
    )


def layout(form: Submission, info: DatasetInfo) -> list[str]:
    """Which files belong into the folder of a submission, a line each, to be filled by its author."""
    side, ipc = form.resolution, form.ipc
    every, inline = info.num_classes * ipc, form.labels == "soft" and form.soft is None
    shape = f"[{every}, {info.channels}, {side}, {side}]"
    order = ", ".join(f"{label} {info.describe(key)}" for label, key in enumerate(info.classes[:3]))
    labels = f"whole numbers from 0 to {info.num_classes - 1}" + (
        f" ({order}, ...)" if order else ""
    )
    path = form.data.path or form.data.url or str(form.data.repo)
    if path.endswith(".parquet"):
        rows = f"{path}: Hugging Face's layout, a row an image: image (a PNG of {side} px), label: {labels}"
        found = [rows + (", soft_label: probabilities" if inline else "")]
    elif form.data.kind == "folder":
        some = ", ".join(info.describe(key) for key in info.classes[:3]) or "as in the training set"
        found = [
            f"{path}/<class>/<name>.png: {ipc} of {side} px in each of {info.num_classes} folders: {some}"
        ]
    else:
        found = [
            f"{path}: images {shape}, float32 in [0, 1] or uint8, not normalised",
            f"{path}: labels [{every}], {labels}",
        ]
        if inline:
            found.append(f"{path}: soft [{every}, {info.num_classes}], probabilities")
    if form.soft is not None:
        found.append(
            f"{form.soft.path}: soft [{every}, {info.num_classes}], probabilities, in the order of "
            "the images' paths"
        )
    if form.teacher is not None:
        found.append(f"{form.teacher.path}: the weights of a guardbench {form.teacher.arch}")
    return found


def form_text(form: Submission) -> str:
    """The TOML text of a form: what `load_form` reads back as an equal one."""
    words = form.model_dump(mode="json", exclude_none=True, exclude={"schema_version"})
    tables = {key: value for key, value in words.items() if isinstance(value, dict)}
    lines = [f"schema_version = {form.schema_version}"]
    lines += [f"{key} = {_toml(value)}" for key, value in words.items() if key not in tables]
    for name, table in tables.items():
        lines += ["", f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return repr(value)
