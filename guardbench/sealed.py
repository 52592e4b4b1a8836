"""What an unfinished stage leaves for itself, sealed by a digest: a bit that flips on the disk is noticed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from guardbench.errors import brief
from guardbench.store import write_bytes

_MARK = b"guardbench-sha256:"
_CHANGED = "it has changed or was cut since it was written"


def write_sealed(target: Path, data: bytes) -> None:
    """Writes `data` and its digest, whole or not at all."""
    write_bytes(target, data + _MARK + hashlib.sha256(data).digest())


def read_sealed(path: Path) -> memoryview:
    """What `write_sealed` was given.

    Raises:
        ValueError: it is not that any more.
        OSError: it cannot be read.
    """
    whole = memoryview(path.read_bytes())
    end = len(whole) - len(_MARK) - hashlib.sha256().digest_size
    data, seal = whole[: max(end, 0)], whole[max(end, 0) :]
    if seal != _MARK + hashlib.sha256(data).digest():
        raise ValueError(_CHANGED)
    return data


def write_tensors(target: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file whose metadata holds the digest of its tensors, which are on the CPU."""
    write_bytes(target, save(dict(tensors), metadata={"sha256": _digest(tensors)}))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """What `write_tensors` was given.

    Raises:
        ValueError: it is not that any more.
        OSError: it cannot be read.
    """
    try:
        with safe_open(path, "pt") as stored:
            found = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            sha = (stored.metadata() or {}).get("sha256")
    except SafetensorError as error:
        raise ValueError(brief(error)) from error
    if sha != _digest(found):
        raise ValueError(_CHANGED)
    return found


def _digest(tensors: Mapping[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        sha.update(f"{name} {value.dtype} {[*value.shape]}\n".encode())
        sha.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
