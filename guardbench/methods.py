"""Methods: which distiller, which regulariser, which hyperparameters for which dataset.

A method is a folder `baselines/<method>/` with a `method.toml`. The files travel in the wheel, and
`method_folder` finds them, installed or not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

import guardbench
from guardbench import canonical
from guardbench.errors import GuardbenchError
from guardbench.fields import Name, Strict
from guardbench.protocol import unknown
from guardbench.record_files import load_record, record_paths
from guardbench.toml_files import checked, read_toml, toml_value


def _no_regulariser() -> dict[str, str | float | int]:
    return {"kind": "none"}


class Recipe(Strict):
    """The hyperparameters of a method on one dataset at one resolution.

    Attributes:
        source: where they come from: the paper's section, or what was measured.
        regulariser: `kind`, a name of `registry.REGULARISERS`, and the parameters of that kind.
        params: a table a stage, read by the distiller.
    """

    source: str = Field(max_length=400)
    regulariser: dict[str, str | float | int] = Field(default_factory=_no_regulariser)
    params: dict[str, dict[str, Any]]

    @property
    def digest(self) -> str:
        """Of the settings, whatever their source."""
        return canonical.digest(self.model_dump(mode="json", exclude={"source"}))

    @field_validator("regulariser")
    @classmethod
    def _named(cls, words: dict[str, str | float | int]) -> dict[str, str | float | int]:
        if "kind" not in words:
            raise ValueError("kind: which regulariser is it?")
        return words

    @field_validator("regulariser", mode="before")
    @classmethod
    def _numbers(cls, words: Any) -> Any:
        for name, value in words.items() if isinstance(words, dict) else ():
            if isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
                raise ValueError(f"{name}: must be a finite number, not {value}")
        return words


class Published(Strict):
    """Accuracies that the method's paper, or GUARD's, reports on a dataset at one IPC.

    Attributes:
        dataset, ipc, resolution: of the setting; robust accuracies are at l-inf 1/255.
        source: paper and table.
        note: what is doubtful about the cells, if anything.
        cells: top-1 accuracy in percent, by `clean` or the attack's column.
    """

    dataset: Name
    ipc: int = Field(gt=0)
    resolution: int = Field(gt=0)
    source: str = Field(max_length=400)
    note: str = Field(default="", max_length=400)
    cells: dict[Name, float]


class MethodFile(Strict):
    """A `method.toml`.

    Attributes:
        name: the folder's.
        title: as people write it.
        paper: whose method it is.
        distiller: name in the registry.
        like: a method whose distiller and recipes this one takes over where it says nothing else;
            tables of `params` merge field by field, a `regulariser` replaces the other's whole.
        published_of: a method whose published accuracies are this one's too, where their paper leaves open
            which of the two it ran.
        recipes: by `<dataset>@<resolution>`. A `regulariser` table of the file itself is that of
            every recipe that names none of its own.
        published: what papers report for it.
    """

    name: Name
    title: str = Field(max_length=80)
    paper: str = Field(max_length=400)
    distiller: Name
    like: Name | None = None
    published_of: Name | None = None
    recipes: dict[str, Recipe]
    published: tuple[Published, ...] = ()

    def recipe(self, dataset: str, resolution: int) -> Recipe:
        """The recipe for a dataset at a resolution, or a GuardbenchError that lists those that exist."""
        key = f"{dataset}@{resolution}"
        if key not in self.recipes:
            raise GuardbenchError(
                f"method {self.name} has no recipe for {key}; it has {', '.join(sorted(self.recipes))}. "
                f"Add [recipes.{key!r}] to its method.toml."
            )
        return self.recipes[key]


def methods_folder() -> Path:
    """The folder of the baselines: the checkout's, else the copy inside the installed package."""
    package = Path(guardbench.__file__).parent
    checkout = package.parent / "baselines"
    return checkout if (package.parent / "pyproject.toml").is_file() else package / "_baselines"


def method_names() -> list[str]:
    """Names of all methods, sorted."""
    return sorted(path.parent.name for path in methods_folder().glob("*/method.toml"))


def measured(method: MethodFile) -> list[str]:
    """The records of a method that came with guardbench, such as `digits ipc10-seed0`, sorted.

    One whose recipe has changed since is marked.
    """
    current = {recipe.digest for recipe in method.recipes.values()}
    found = []
    for path in record_paths(methods_folder() / method.name / "results", "*/*.json"):
        record = load_record(path).method
        earlier = record.official and record.recipe_sha256 not in current
        found.append(
            f"{path.parent.name} {path.stem}" + (" (an earlier recipe)" if earlier else "")
        )
    return sorted(found)


def load_method(name: str) -> MethodFile:
    """The method of that name.

    Raises:
        GuardbenchError: there is none (with the nearest name), or a field of its file is wrong.
    """
    if name not in method_names():
        raise unknown("method", name, method_names())
    path = method_path(name)
    method = checked(MethodFile, _words(name, ()), where=str(path))
    if method.name != name:
        raise GuardbenchError(f"{path}: name: {method.name!r} is not the folder's name.")
    return method


def method_path(name: str) -> Path:
    """Where the file of a method lies."""
    return methods_folder() / name / "method.toml"


def _words(name: str, above: Sequence[str]) -> dict[str, Any]:
    """The words of a method file with what it takes over from the method that it is like."""
    path = method_path(name)
    words = read_toml(path, what="method")
    for field in ("like", "published_of"):
        other = words.get(field)
        if other is not None and (other not in method_names() or other in (name, *above)):
            raise GuardbenchError(f"{path}: {field}: {other!r} is no other method.")
    if (like := words.get("like")) is not None:
        words = _inherited(_words(str(like), (name, *above)), words)
    if (other := words.get("published_of")) is not None:
        words["published"] = _words(str(other), (name, *above)).get("published", [])
    regulariser = words.pop("regulariser", None)
    if regulariser is not None:
        for recipe in _table(words, "recipes").values():
            if isinstance(recipe, dict):
                recipe.setdefault("regulariser", regulariser)
    return words


def _inherited(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    recipes = {key: dict(recipe) for key, recipe in _table(base, "recipes").items()}
    if "regulariser" in own:
        for recipe in recipes.values():
            recipe.pop("regulariser", None)
    for key, recipe in _table(own, "recipes").items():
        if not isinstance(recipe, dict):
            return own  # not a recipe, as the validation will say
        found = recipes.get(key, {})
        params, changes = dict(_table(found, "params")), _table(recipe, "params")
        for stage, table in changes.items():
            params[stage] = {**_table(params, stage), **_table(changes, stage)} if table else table
        recipes[key] = {**found, **recipe, "params": params}
    return {"distiller": base.get("distiller"), **own, "recipes": recipes}


def _table(words: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The table under `key`, or an empty one where there is something else."""
    found = words.get(key)
    return found if isinstance(found, dict) else {}


def overridden(
    recipe: Recipe,
    assignments: Sequence[str],
    known: Callable[[str], Mapping[str, Collection[str]]],
) -> Recipe:
    """A recipe with some values set anew, as `--set stage.field=value` asks.

    Another `regulariser.kind` starts from an empty table, since every kind has its own parameters.

    Args:
        assignments: such as `squeeze.epochs=5` or `regulariser.weight=0.1`; values as in TOML, a
            bare word stands for a string.
        known: the names that exist with a kind of regulariser, by table: the distiller's stages and
            `regulariser`.

    Raises:
        GuardbenchError: no assignment, it names no field (with the nearest name), or no such value fits.
    """
    words = recipe.model_dump()
    split = [_assignment(text) for text in assignments]
    kinds = [value for path, value in split if path == "regulariser.kind"]
    if kinds and kinds[0] != words["regulariser"]["kind"]:
        words["regulariser"] = {"kind": kinds[0]}
    fields = known(str(words["regulariser"]["kind"]))
    names = [f"{table}.{name}" for table, found in fields.items() for name in found]
    for place, (path, value) in enumerate(split):
        if path not in names:
            raise unknown("--set field", path, names)
        if path in [earlier for earlier, _ in split[:place]]:
            raise GuardbenchError(f"--set {path}: is given twice; leave one of them.")
        table, _, field = path.partition(".")
        where = words if table == "regulariser" else words["params"]
        where.setdefault(table, {})[field] = value
    return checked(Recipe, words, where=f"--set {' '.join(assignments)}")


def set_mark(assignments: Sequence[str]) -> str:
    """Nothing for the committed recipe, else a mark of what was set, so that both records can stand."""
    return f"-set-{canonical.digest(sorted(assignments))[:8]}" if assignments else ""


def _assignment(text: str) -> tuple[str, Any]:
    path, sign, value = text.partition("=")
    if not sign or "." not in path or not value.strip():
        raise GuardbenchError(f"--set {text}: write STAGE.FIELD=VALUE, as squeeze.epochs=5.")
    return path.strip(), toml_value(value.strip())
