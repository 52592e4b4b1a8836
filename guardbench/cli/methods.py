"""`guardbench methods`: what can be run, and what of it has been measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from guardbench.methods import MethodFile


def methods(
    name: Annotated[
        str | None, typer.Argument(help="Show every setting of this method's recipes instead.")
    ] = None,
) -> None:
    """List the methods: distiller, regulariser, where they come from, and the records there are.

    With a NAME, that method's recipes: where each comes from, and what every setting is. The names of the
    settings are those of `guardbench run --set`.

    Example: guardbench methods guard
    """
    from guardbench.methods import load_method, method_names

    if name is not None:
        _recipes(name)
        return
    for each in method_names():
        method = load_method(each)
        kinds = dict.fromkeys(str(recipe.regulariser["kind"]) for recipe in method.recipes.values())
        typer.echo(f"{each}: {method.title}")
        _line("distiller", method.distiller)
        _line("regulariser", ", ".join(kinds))
        _line("source", method.paper)
        _line("recipes", ", ".join(sorted(method.recipes)))
        _measured(method)


def _recipes(name: str) -> None:
    from guardbench.methods import load_method

    method = load_method(name)
    typer.echo(f"{name}: {method.title}")
    _line("distiller", method.distiller)
    _line("source", method.paper)
    _measured(method)
    for key, recipe in sorted(method.recipes.items()):
        typer.echo(f"\n{key}")
        _line("source", recipe.source)
        for table, words in {"regulariser": recipe.regulariser, **recipe.params}.items():
            for word, value in words.items():
                typer.echo(f"  {table}.{word} = {value}")


def _measured(method: MethodFile) -> None:
    from guardbench.methods import measured

    _line("measured", ", ".join(measured(method)) or "nothing yet")


def _line(what: str, text: str) -> None:
    """A field and its value, wrapped to the terminal's width under itself."""
    import shutil
    import textwrap

    width = max(40, shutil.get_terminal_size().columns)
    first, rest = f"  {what:<13}", " " * 15
    for line in textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False
    ):
        typer.echo(line)
