"""The network that labels a submission's views: a stranger's weights in an architecture of ours."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from guardbench.data.catalog import DatasetInfo
from guardbench.errors import GuardbenchError
from guardbench.fields import printable
from guardbench.models import ARCHITECTURES, Classifier, build_model, load_weights
from guardbench.submissions.files import plain_file, safetensors_heads
from guardbench.submissions.form import FORM, Submission
from guardbench.submissions.problems import Problems

TEACHER_BYTES = 1 << 30
LARGEST_LOGIT = 65_504.0
"""Of float16, in which the teacher's labels are stored."""


def read_teacher(
    folder: Path, form: Submission, info: DatasetInfo, problems: Problems
) -> Classifier | None:
    """The teacher that a form names, in eval mode; None where there is none or it cannot be read."""
    if form.teacher is None:
        return None
    arch, path = form.teacher.arch, form.teacher.path
    if arch not in ARCHITECTURES:
        problems.add(FORM, "teacher.arch", f"{arch!r} is not one of {', '.join(ARCHITECTURES)}.")
        return None
    with problems.catching(path):
        file = plain_file(folder, path, most=TEACHER_BYTES)
        safetensors_heads(file, printable(path))
        teacher = build_model(
            arch,
            channels=info.channels,
            classes=info.num_classes,
            resolution=form.resolution,
            seed=0,
        )
        try:
            load_weights(teacher, file)
        except GuardbenchError as error:
            raise GuardbenchError(str(error).removeprefix(f"{file}: ")) from error
        for name, value in teacher.state_dict().items():
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise GuardbenchError(f"{name}: holds NaN or infinity; mend it.")
        return teacher.eval().requires_grad_(False)
    return None


def share_known(teacher: Classifier, images: Tensor, labels: Tensor) -> float:
    """The share of images [N, C, R, R] in [0, 1] that a teacher puts into their class [N].

    Raises:
        GuardbenchError: it answers NaN, or logits beyond float16, in which its labels are stored.
    """
    with torch.no_grad():
        logits = torch.cat([teacher(part) for part in torch.split(images, 256)])
    if not bool((logits.abs() <= LARGEST_LOGIT).all()):
        raise GuardbenchError(
            "answers NaN, or more than float16 holds, on the submission's images; mend it."
        )
    return float((logits.argmax(1) == labels).float().mean())
