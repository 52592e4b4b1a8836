"""Byte-stable JSON and digests: equal content gives equal bytes on every machine."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def dumps(value: Any) -> str:
    """JSON text of `value`: sorted keys, two-space indent, UTF-8 kept, a final newline; NaN is refused."""
    return json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def digest(value: Any) -> str:
    """SHA-256 (hex) of the compact canonical JSON of `value`."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes, read in pieces."""
    sha = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            sha.update(piece)
    return sha.hexdigest()


def derive_seed(root: int, *names: str | int) -> int:
    """A 63-bit seed for the random choice called `names`, so that a new choice never moves the others.

    Args:
        root: the one seed of the run.
        names: what the choice is for, from the general to the particular, such as `"recover", "step", 17`.
    """
    return int.from_bytes(hashlib.sha256(repr((root, *names)).encode()).digest()[:8], "big") >> 1
