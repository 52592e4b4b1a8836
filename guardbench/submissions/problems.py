"""What is wrong with a submission: every problem found, each with its file, its field and its remedy."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from types import TracebackType

from guardbench.errors import GuardbenchError
from guardbench.fields import printable

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
        self._found: dict[object, list[Problem]] = {}
        self._counts: Counter[object] = Counter()

    def add(self, file: str, field: str, message: str, *, kind: str | None = None) -> None:
        """Notes a problem.

        Args:
            file, field, message: see `Problem`.
            kind: problems of one kind are counted together, in whatever file; those of one field of one
                file unless told.
        """
        alike = self._found.setdefault(kind or (file, field), [])
        self._counts[kind or (file, field)] += 1
        if len(alike) < MOST_ALIKE:
            alike.append(Problem(file, field, message))

    def catching(self, file: str, field: str = "", *, kind: str | None = None) -> _Catching:
        """Inside, one line for a user becomes a problem of `file` instead of an end; see `add`."""
        return _Catching(self, file, field, kind)

    def __bool__(self) -> bool:
        return bool(self._found)

    @property
    def listed(self) -> list[Problem]:
        """All of them in the order found, of those alike `MOST_ALIKE` and a line with the count."""
        lines: list[Problem] = []
        for kind, alike in self._found.items():
            lines += alike
            more = self._counts[kind] - len(alike)
            if more:
                lines.append(Problem("...", "", f"{more} more problems like the last one."))
        return lines

    @property
    def count(self) -> int:
        """How many there are, those that are not listed one by one included."""
        return sum(self._counts.values())


class _Catching:
    """See `Problems.catching`."""

    def __init__(self, problems: Problems, file: str, field: str, kind: str | None) -> None:
        self.problems, self.file, self.field, self.kind = problems, file, field, kind

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> bool:
        if not isinstance(error, GuardbenchError):
            return False
        message = str(error).removeprefix(f"{self.file}: ")
        self.problems.add(self.file, self.field, message, kind=self.kind)
        return True
