"""What is wrong with a submission: every problem found, each with its file, its field and its remedy."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType

from guardbench.errors import GuardbenchError
from guardbench.records import printable

MOST_ALIKE = 5
"""Problems of one field that are listed one by one; the others are counted."""


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        file: from the submission's folder.
        field: what in it, such as `ipc` or `images[17]`.
        message: what is wrong, and what to do.
    """

    file: str
    field: str
    message: str

    def __str__(self) -> str:
        where = f"{self.file}: {self.field}" if self.field else self.file
        return f"{printable(where)}: {printable(self.message, 600)}"


class Problems:
    """Collects problems; many alike become a few and a count."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], list[Problem]] = {}

    def add(self, file: str, field: str, message: str, *, kind: str | None = None) -> None:
        """Notes a problem.

        Args:
            file, field, message: see `Problem`.
            kind: problems of one file and one kind are counted together; the field unless told.
        """
        self._found.setdefault((file, kind or field), []).append(Problem(file, field, message))

    def catching(self, file: str, field: str = "") -> _Catching:
        """Inside, one line for a user becomes a problem of `file` instead of an end."""
        return _Catching(self, file, field)

    def __bool__(self) -> bool:
        return bool(self._found)

    @property
    def listed(self) -> list[Problem]:
        """All of them in the order found, of those alike `MOST_ALIKE` and a line with the count."""
        lines: list[Problem] = []
        for (file, kind), alike in self._found.items():
            lines += alike[:MOST_ALIKE]
            if len(alike) > MOST_ALIKE:
                more = len(alike) - MOST_ALIKE
                lines.append(Problem(file, kind, f"{more} more problems of this kind."))
        return lines


class _Catching:
    """See `Problems.catching`."""

    def __init__(self, problems: Problems, file: str, field: str) -> None:
        self.problems, self.file, self.field = problems, file, field

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> bool:
        if not isinstance(error, GuardbenchError):
            return False
        self.problems.add(self.file, self.field, str(error).removeprefix(f"{self.file}: "))
        return True
