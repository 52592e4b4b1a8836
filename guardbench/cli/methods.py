"""`guardbench methods`: what can be run, and what of it has been measured."""

from __future__ import annotations


def methods() -> None:
    """List the methods: distiller, regulariser, where they come from, and the records there are.

    Example: guardbench methods
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from guardbench.methods import load_method, measured, method_names

    table = Table("method", "distiller", "regulariser", "source", "recipes", "measured")
    for name in method_names():
        method = load_method(name)
        kinds = dict.fromkeys(str(recipe.regulariser["kind"]) for recipe in method.recipes.values())
        cells = (
            name,
            method.distiller,
            ", ".join(kinds),
            method.paper,
            "\n".join(sorted(method.recipes)),
            "\n".join(measured(name)) or "nothing yet",
        )
        table.add_row(*(escape(cell) for cell in cells))
    Console(emoji=False).print(table)
