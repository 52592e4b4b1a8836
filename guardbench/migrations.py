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


def _to_5(words: dict[str, Any]) -> dict[str, Any]:
    """Version 5 says whose verdicts a stage took over; before it, AutoAttack of this package's engine took
    those of a Square column on the same images, in every protocol that there was."""
    made, costs, runs = (words.get(name) for name in ("provenance", "cost", "seeds"))
    engines = made.get("engines") if isinstance(made, dict) else None
    if not (isinstance(engines, dict) and isinstance(costs, list) and isinstance(runs, list)):
        return words
    if [engines.get(name) for name in ("autoattack", "square")] != ["guardbench"] * 2:
        return words
    marked = []
    for cost in costs:
        seed = str(cost.get("stage")).partition("autoattack ")[2] if isinstance(cost, dict) else ""
        if any(_same_images(run, seed) for run in runs):
            cost = {**cost, "after": ["square"]}
        marked.append(cost)
    return {**words, "cost": marked}


def _same_images(run: Any, seed: str) -> bool:
    """Whether AutoAttack and Square of this seed's run met the same images."""
    if not isinstance(run, dict) or str(run.get("seed")) != seed:
        return False
    attacks = run.get("attacks")
    if not isinstance(attacks, dict):
        return False
    whole, part = (attacks.get(name) for name in ("autoattack", "square"))
    if not (isinstance(whole, dict) and isinstance(part, dict)):
        return False
    return all(whole.get(name) == part.get(name) for name in ("first", "total"))


# MIGRATIONS[k] turns the words of version k + 1 into those of version k + 2. A published entry
# never changes; with each, tests/golden gains a file of the version that it leads to.
MIGRATIONS: tuple[Migration, ...] = (_to_2, _to_3, _to_4, _to_5)


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
