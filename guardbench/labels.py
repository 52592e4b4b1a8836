"""A teacher's labels on every view of every epoch: on disk, one file an epoch, float16, all or the top k.

Fifty images of each of a thousand classes, labelled for 300 epochs, are 30 GB; students read them an
epoch at a time. The store is FKD's (Shen & Xing, ECCV 2022), with logits for probabilities.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor

from guardbench import canonical
from guardbench.errors import GuardbenchError, not_now
from guardbench.sealed import read_tensors, write_tensors
from guardbench.store import read_text, write_text

INDEX = "labels.json"


@dataclass(frozen=True)
class LabelStore:
    """The labels of one distilled set under one protocol.

    An epoch's file is whole or absent, and depends on nothing but its epoch, so that any process may
    write any epoch in any order.

    Attributes:
        folder: where the files are.
        classes: K.
        top_k: how many of a row's logits are kept, None for all. The others are then given one value,
            at which they have together, at the students' `temperature`, the probability that they had:
            FKD's marginal smoothing.
        temperature: of the students' loss; it counts where `top_k` is set.
    """

    folder: Path
    classes: int
    top_k: int | None = None
    temperature: float = 1.0

    @property
    def row_bytes(self) -> int:
        """Stored bytes of the labels of one view of one image."""
        kept = self._kept
        return 2 * self.classes if kept is None else 2 * (2 * kept + 1)

    @property
    def _kept(self) -> int | None:
        return self.top_k if self.top_k is not None and self.top_k < self.classes else None

    def path(self, epoch: int) -> Path:
        """The file of an epoch."""
        return self.folder / f"labels-{epoch:05d}.safetensors"

    def write(self, epoch: int, logits: Tensor) -> None:
        """Stores the logits [N, K] on an epoch's views, in the views' order, as float16."""
        write_tensors(self.path(epoch), self._packed(logits.cpu()))

    def read(self, epoch: int, sha256: str) -> Tensor:
        """The logits of an epoch, float16 [N, K].

        Args:
            sha256: of the epoch's file, from `digests`.

        Raises:
            GuardbenchError: the file is missing, is not the one that was written, or cannot be read now.
        """
        path = self.path(epoch)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            data = b""
        except OSError as error:
            raise not_now(path, error) from error
        if hashlib.sha256(data).hexdigest() != sha256:
            raise GuardbenchError(
                f"{path}: missing or changed since it was written; delete its folder and run again to "
                "make the labels anew."
            )
        return self._unpacked(load(data))

    def clear(self) -> None:
        """Removes the files of all epochs."""
        for path in self.folder.glob("labels-*.safetensors"):
            path.unlink(missing_ok=True)

    def left(self, epochs: int, rows: int) -> list[int]:
        """The epochs, of the first `epochs`, that are not there yet, or damaged.

        Args:
            rows: of an epoch.

        Raises:
            GuardbenchError: they do not fit into what the file system has left.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        left = [epoch for epoch in range(epochs) if not self._whole(epoch, rows)]
        self._require_space(len(left) * rows)
        return left

    def seal(self, epochs: int) -> int:
        """Writes the index, with the digest of every epoch's file; gives the bytes of all of them."""
        files = [self.path(epoch) for epoch in range(epochs)]
        words = {"epochs": [canonical.file_digest(path) for path in files]}
        write_text(self.folder / INDEX, canonical.dumps(words))
        return sum(path.stat().st_size for path in files)

    def digests(self) -> list[str]:
        """The digest of every epoch's file, from the index.

        Raises:
            GuardbenchError: the index cannot be read.
        """
        path = self.folder / INDEX
        try:
            return [str(sha) for sha in json.loads(read_text(path, what="index"))["epochs"]]
        except (ValueError, KeyError, TypeError) as error:
            raise GuardbenchError(
                f"{path}: not an index of labels; delete its folder and run again."
            ) from error

    def _whole(self, epoch: int, rows: int) -> bool:
        """Whether an epoch's file can be read and has the labels of `rows` views."""
        try:
            stored = read_tensors(self.path(epoch))
        except (FileNotFoundError, ValueError):
            return False
        shapes = {name: [*value.shape] for name, value in stored.items()}
        kept = self._kept
        if kept is None:
            return shapes == {"logits": [rows, self.classes]}
        return shapes == {"top": [rows, kept], "classes": [rows, kept], "rest": [rows]}

    def _require_space(self, rows: int) -> None:
        needed, free = rows * self.row_bytes, shutil.disk_usage(self.folder).free
        if free < needed:
            raise GuardbenchError(
                f"{self.folder}: the teacher's labels take {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB "
                "are free; free some space or choose another folder with --output."
            )

    def _packed(self, logits: Tensor) -> dict[str, Tensor]:
        kept = self._kept
        if kept is None:
            return {"logits": logits.half().contiguous()}
        logits = logits.float()
        values, classes = logits.topk(kept, dim=1)
        others = logits.scatter(1, classes, float("-inf"))
        share = torch.logsumexp(others / self.temperature, 1)
        rest = self.temperature * (share - torch.tensor(float(self.classes - kept)).log())
        return {"top": values.half(), "classes": classes.to(torch.int16), "rest": rest.half()}

    def _unpacked(self, stored: dict[str, Tensor]) -> Tensor:
        if self._kept is None:
            return stored["logits"]
        logits = stored["rest"][:, None].expand(-1, self.classes).clone()
        return logits.scatter_(1, stored["classes"].long(), stored["top"])
