"""`guardbench attacks`: what a protocol can name."""

from __future__ import annotations

_COLUMN = """A column of a protocol gives all that has no default; lengths in pixels are fractions in quotes:

    [[attacks]]
    name = "pgd20"
    kind = "pgd"
    images_per_seed = 100                        # all of the protocol's where it is left out
    params = { steps = 20, step = "0.25/255" }

What each parameter means stands in the class in guardbench/attacks/."""


def attacks() -> None:
    """List the attacks that a protocol can name as a column's kind, with norms, parameters and source.

    Example: guardbench attacks
    """
    from dataclasses import MISSING, fields

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from guardbench.attacks.build import ATTACKS, class_of, parameters

    def shown(default: object) -> str:
        return f'"{default}"' if isinstance(default, str) else str(default)

    table = Table("kind", "norms", "parameters and defaults", "source")
    for kind, (_, source, norms) in ATTACKS.items():
        known = [
            field.name if field.default is MISSING else f"{field.name} = {shown(field.default)}"
            for field in fields(class_of(kind))
            if field.name in parameters(class_of(kind)) and field.name != "engine"
        ]
        held = ", ".join(norms) or "none: unbounded"
        table.add_row(kind, held, escape(", ".join(known) or "none"), source)
    console = Console(emoji=False)
    console.print(table)
    console.print(_COLUMN, markup=False, highlight=False)
