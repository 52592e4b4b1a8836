"""The commit of the checkout that this package runs from."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import guardbench

# What of a checkout shapes a number; boards and records, which `--publish` rewrites, do not.
CODE = ("guardbench", "pyproject.toml", "baselines/*/method.toml")
UNKNOWN = "unknown"


def checkout_commit() -> str | None:
    """The commit as the checkout stands now, `-dirty` where its code differs; None outside one."""
    root = Path(guardbench.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    found = []
    for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", *CODE]):
        command = ["git", "-C", str(root), *words]
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        found.append(run.stdout.strip())
    head, changed = found
    return f"{head}-dirty" if changed else head or None


@cache
def running_commit() -> str | None:
    """`checkout_commit` when it was first asked for: while a run goes on, the checkout may move."""
    return checkout_commit()


def is_named(commit: str | None) -> bool:
    """Whether a commit says which code it was: there is one, and the code was as it has it."""
    return commit is not None and not commit.endswith("-dirty")


def commits_text(commits: Iterable[str | None]) -> str | None:
    """The commits that made the stages of a record, each once, in their order; None for no checkout.

    Stages of before they kept it are `unknown`.
    """
    found = list(dict.fromkeys(commits))
    if found == [None]:
        return None
    named = [commit or "no checkout" for commit in found]
    return ", ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")
