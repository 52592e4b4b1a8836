"""How records written by older versions of guardbench still load: one pure function a version."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Migration = Callable[[dict[str, Any]], dict[str, Any]]


def _to_2(words: dict[str, Any]) -> dict[str, Any]:
    """Version 2 says whose engine attacked; before it there was pyautoattack's alone."""
    made, runs = words.get("provenance"), words.get("seeds")
    if not isinstance(made, dict):
        return words
    first = runs[0] if isinstance(runs, list) and runs and isinstance(runs[0], dict) else {}
    attacks = first.get("attacks")
    known = set(attacks) if isinstance(attacks, dict) else set()
    engines = dict.fromkeys(sorted({"autoattack", "square"} & known), "reference")
    return {**words, "provenance": {**made, "engines": engines}}


def _to_3(words: dict[str, Any]) -> dict[str, Any]:
    """Version 3 says the tier, and what was set; before it all was official, and nothing was."""
    own: dict[str, Any] = {"overrides": []} if "method" in words else {}
    return {**words, "tier": "official", **own}


def _to_4(words: dict[str, Any]) -> dict[str, Any]:
    """Version 4 may hold references; before it there were none."""
    return words


# MIGRATIONS[k] turns the words of version k + 1 into those of version k + 2. A published entry
# never changes; with each, tests/golden gains a file of the version that it leads to.
MIGRATIONS: tuple[Migration, ...] = (_to_2, _to_3, _to_4)


def migrate(words: dict[str, Any], migrations: Sequence[Migration] = MIGRATIONS) -> dict[str, Any]:
    """Brings the words of a record file to the current schema version.

    Args:
        words: the parsed JSON object; it is not changed.
        migrations: the steps, oldest first; the current version is one more than their number.

    Raises:
        ValueError: `schema_version` is missing, no positive integer, or newer than this guardbench.
    """
    current = len(migrations) + 1
    version = words.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError("schema_version: must be an integer from 1 on")
    if version > current:
        raise ValueError(
            "schema_version: made by a newer guardbench "
            f"(version {str(version)[:20]}, this one reads up to {current}); upgrade guardbench"
        )
    for step in migrations[version - 1 :]:
        version += 1
        words = {**step(words), "schema_version": version}
    return words
