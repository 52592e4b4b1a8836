"""What changed between boards, and why, in words and as data."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from pydantic import Field

from guardbench import board_words
from guardbench.board import Board, BoardHead, Past, Row
from guardbench.board_files import BoardFile, Boards
from guardbench.errors import GuardbenchError
from guardbench.fields import Strict, only_const, printable
from guardbench.metrics import Measurement
from guardbench.records import LabelKind

DIFF_VERSION: Literal[1] = 1

Kind = Literal[
    "schema", "board new", "board gone", "protocol", "superseded", "head", "record new",
    "record gone", "record moved", "record rewritten", "track", "official", "value",
    "measurements", "flag gained", "flag lost", "moved", "other",
]  # fmt: skip

# Fields of a row that have a kind of change of their own; the others are told together, as `other`.
_TOLD = {"rank", "ranked", "clean", "attacks", "worst_case", "flags", "record"}


class Change(Strict):
    """One thing that is not as it was.

    Attributes:
        board: `<protocol>/ipc<k>`.
        track, method, record: of the row; None where the change is of the board. `record` is the
            path of its file.
        before, after: percent for `value` and for records that came or went, a word for others; None
            for nothing.
        why: the reasons, in words; empty where the change says all.
        text: all of it in words, one printable line.
    """

    board: str
    kind: Kind
    track: LabelKind | None = None
    method: str | None = None
    record: str | None = None
    before: float | str | None = None
    after: float | str | None = None
    why: tuple[str, ...] = ()
    text: str


class Difference(Strict):
    """What `guardbench leaderboard diff --json` writes; `old` and `new` as the user named them."""

    schema_version: Literal[1] = Field(default=DIFF_VERSION, json_schema_extra=only_const)
    old: str
    new: str
    changes: tuple[Change, ...]


def difference(old: Boards, new: Boards) -> Difference:
    """Every change from `old` to `new`, by board, then by row.

    A single board file is held against the other place's board of its protocol and IPC; two files
    also where their protocols differ, as a superseded one and its successor do.

    Raises:
        GuardbenchError: a single board has no counterpart.
    """
    found: list[Change] = []
    for key, a, b in _pairs(old, new):
        if a is None or b is None:
            found += _one_sided(key, a, b)
        else:
            found += _Pair(f"{key[0]}/ipc{key[1]}", a, b).changes()
    return Difference(old=old.where, new=new.where, changes=tuple(found))


Key = tuple[str, int]


def _pairs(old: Boards, new: Boards) -> list[tuple[Key, BoardFile | None, BoardFile | None]]:
    if old.single and new.single:
        (a,), (b,) = old.files.values(), new.files.values()
        sizes = [f"{each.board.protocol.dataset} at IPC {each.board.ipc}" for each in (a, b)]
        if sizes[0] != sizes[1]:
            raise GuardbenchError(
                f"{old.where} is a board of {sizes[0]} and {new.where} of {sizes[1]}; name two boards "
                "of one dataset and IPC."
            )
        return [(b.key, a, b)]
    keys = sorted({*old.files, *new.files})
    for one, many in ((old, new), (new, old)):
        if one.single:
            keys = list(one.files)
            if keys[0] not in many.files:
                raise GuardbenchError(
                    f"{many.where}: no board of {keys[0][0]} at IPC {keys[0][1]}, of which "
                    f"{one.where} is one."
                )
    return [(key, old.files.get(key), new.files.get(key)) for key in keys]


@dataclass(frozen=True)
class _Stood:
    """A row and where it stood: `place` counts from 1 among the `rows` of its track."""

    row: Row
    track: LabelKind
    place: int
    rows: Sequence[Row]

    @property
    def above(self) -> set[str]:
        """The rows that stood above it, as the paths of their records."""
        return {row.record.path for row in self.rows[: self.place - 1]}

    @property
    def better(self) -> set[str]:
        """The rows that took a rank from it: the whole of their interval lay above its own."""
        high = self.row.ranked.high
        ranked = [row for row in self.rows if None not in (row.rank, self.row.rank)]
        return {row.record.path for row in ranked if row.ranked.low > high}


def _stood(board: Board) -> dict[str, _Stood]:
    """Path of the record -> row."""
    found: dict[str, _Stood] = {}
    for track in get_args(LabelKind):
        rows: Sequence[Row] = getattr(board.tracks, track)
        for place, row in enumerate(rows, 1):
            found[row.record.path] = _Stood(row, track, place, rows)
    return found


def _one_sided(key: Key, a: BoardFile | None, b: BoardFile | None) -> Iterator[Change]:
    """A board that came or went, with its rows."""
    name, file = f"{key[0]}/ipc{key[1]}", b or a
    assert file is not None
    kind: Kind = "board gone" if b is None else "board new"
    yield Change(board=name, kind=kind, text=f"{name}: {kind}")
    for each in _stood(file.board).values():
        who = _called(name, each, set())
        yield _gone(name, each, who) if b is None else _new(name, each, who, file.board.protocol)


def _gone(board: str, a: _Stood, who: str) -> Change:
    value = board_words.percent(a.row.ranked)
    text = f"{who}: record gone, it had {value}, place {a.place}, {board_words.rank(a.row)}"
    return _change(board, a, "record gone", text, before=a.row.ranked.mean)


def _new(board: str, b: _Stood, who: str, head: BoardHead) -> Change:
    value = f"{board_words.column(head)} {board_words.percent(b.row.ranked)}"
    text = f"{who}: new record, {value}, place {b.place}, {board_words.rank(b.row)}"
    return _change(board, b, "record new", text, after=b.row.ranked.mean)


def _change(
    board: str,
    at: _Stood,
    kind: Kind,
    text: str,
    *,
    before: float | str | None = None,
    after: float | str | None = None,
    why: Sequence[str] = (),
) -> Change:
    row = at.row
    because = f": {'; '.join(why)}" if why else ""
    return Change(
        board=board, kind=kind, track=at.track, method=row.method.name,
        record=printable(row.record.path), before=before, after=after, why=tuple(why),
        text=text + because,
    )  # fmt: skip


def _now(before: dict[str, _Stood], after: dict[str, _Stood]) -> dict[str, str]:
    """Path before -> path after. Rows are the same where the path of their record is, else its bytes,
    else the method, where one row of it alone came and went.
    """
    now = {path: path for path in before}
    for by_method in (False, True):
        gone, new = defaultdict[str, list[str]](list), defaultdict[str, list[str]](list)
        lost = {path: before[path] for path in before if now[path] not in after}
        come = {path: after[path] for path in after if path not in now.values()}
        for found, sides in ((gone, lost), (new, come)):
            for path, each in sides.items():
                row = each.row
                found[row.method.name if by_method else row.record.sha256].append(path)
        for key, paths in gone.items():
            if len(paths) == len(new[key]) == 1:
                now[paths[0]] = new[key][0]
    return now


class _Pair:
    """One board before and after."""

    def __init__(self, name: str, old: BoardFile, new: BoardFile) -> None:
        self.name = name
        self.old, self.new = old, new
        self.heads = old.board.protocol, new.board.protocol
        before, self.after = _stood(old.board), _stood(new.board)
        # A row keeps its past where its file lies elsewhere now; all is told under the new path.
        self.now = _now(before, self.after)
        self.before = {self.now[path]: a for path, a in before.items()}
        names = [Counter(e.row.method.name for e in side.values()) for side in (before, self.after)]
        self.twice = {name for count in names for name in count if count[name] > 1}

    def changes(self) -> Iterator[Change]:
        """All of them."""
        yield from self._heads()
        for path, a in self.before.items():
            if path not in self.after:
                yield _gone(self.name, a, self._who(a))
        for path, b in self.after.items():
            if path in self.before:
                yield from self._of_row(self.before[path], b)
            else:
                yield _new(self.name, b, self._who(b), self.heads[1])

    def _heads(self) -> Iterator[Change]:
        a, b = self.heads
        found: list[tuple[Kind, str, str | None, str | None]] = []
        if self.old.version != self.new.version:
            versions = str(self.old.version), str(self.new.version)
            text = f"schema version {versions[0]} -> {versions[1]}, both read by the rules of today"
            found.append(("schema", text, *versions))
        if a.sha256 != b.sha256:
            known = ", which supersedes it" if a.superseded_by == b.id != a.id else ""
            text = f"another protocol, {a.id} ({a.sha256[:12]}) -> {b.id} ({b.sha256[:12]}){known}"
            found.append(
                ("protocol", f"{text}: numbers of the two do not compare", a.sha256, b.sha256)
            )
        if a.superseded_by != b.superseded_by:
            text = (
                f"its protocol is superseded by {b.superseded_by}; this board stays"
                if b.superseded_by
                else f"its protocol is no longer superseded by {a.superseded_by}"
            )
            found.append(("superseded", text, a.superseded_by, b.superseded_by))
        for field in sorted(BoardHead.model_fields.keys() - {"sha256", "superseded_by"}):
            words = [printable(board_words.words(getattr(head, field))) for head in (a, b)]
            if words[0] != words[1]:
                found.append(("head", f"{field}: {words[0]} -> {words[1]}", words[0], words[1]))
        for kind, text, before, after in found:
            text = f"{self.name}: {text}"
            yield Change(board=self.name, kind=kind, before=before, after=after, text=text)

    def _of_row(self, a: _Stood, b: _Stood) -> Iterator[Change]:
        who, told = self._who(b), list[tuple[Kind, str, str | None, str | None]]()
        paths = printable(a.row.record.path), printable(b.row.record.path)
        if paths[0] != paths[1]:
            told.append(("record moved", f"its record is {paths[1]} now", *paths))
        if a.track != b.track:
            told.append(("track", f"from track {a.track} to {b.track}", a.track, b.track))
        if (a.row.rank is None) != (b.row.rank is None):
            way = "no longer ranked, its recipe was changed" if b.row.rank is None else "ranked now"
            told.append(("official", way, board_words.rank(a.row), board_words.rank(b.row)))
        values = list(self._values(a, b, who))
        again = a.row.record.sha256 != b.row.record.sha256
        if again and not values:
            told.append(
                ("record rewritten", "its record is another file, of the same numbers", None, None)
            )
        for flag in b.row.flags:
            if flag not in a.row.flags:
                told.append(
                    ("flag gained", f"flag gained: {printable(flag)}", None, printable(flag))
                )
        for flag in a.row.flags:
            if flag not in b.row.flags:
                told.append(("flag lost", f"flag lost: {printable(flag)}", printable(flag), None))
        skipped = _TOLD | {"history"} if values else _TOLD
        fields = [name for name in Row.model_fields if name not in skipped]
        other = [name for name in fields if getattr(a.row, name) != getattr(b.row, name)]
        if other and not (again and values):  # a new record differs in its cost and the like
            told.append(("other", f"also changed: {', '.join(other)}", None, None))
        yield from values
        for kind, text, before, after in told:
            yield _change(self.name, b, kind, f"{who}: {text}", before=before, after=after)
        if a.track == b.track:
            yield from self._move(a, b, who)

    def _values(self, a: _Stood, b: _Stood, who: str) -> Iterator[Change]:
        why = self._why(a.row, b.row)
        column = self.heads[1].rank_by
        (old, new), both = (a.row.ranked, b.row.ranked), []
        if old != new:
            text = f"{who}: {board_words.column(self.heads[1])} {board_words.from_to(old, new)}"
            yield _change(self.name, b, "value", text, before=old.mean, after=new.mean, why=why)
        measured = _measured(a.row), _measured(b.row)
        for name in sorted({*measured[0], *measured[1]}):
            was, now = measured[0].get(name), measured[1].get(name)
            if was == now or (
                name == column and old != new and _same(was, old) and _same(now, new)
            ):
                continue
            shown = name.replace("_", " ") if name == "worst_case" else name
            if was is None or now is None:
                both.append(f"{shown} {'no longer measured' if now is None else 'measured now'}")
            else:
                both.append(f"{shown} {board_words.from_to(was, now)}")
        if both:
            text = f"{who}: {'; '.join(both)}"
            yield _change(self.name, b, "measurements", text, why=() if old != new else why)

    def _why(self, a: Row, b: Row) -> list[str]:
        """Why a row's numbers are others."""
        found = []
        if self.heads[0].sha256 != self.heads[1].sha256:
            found.append("measured under another protocol")
        if a.record.sha256 != b.record.sha256:
            found.append("a new record of the same method")
        for past in _only(b.history, a.history):
            found.append(f"a stronger evaluation, {printable(past.reason, 700)}")
        for past in _only(a.history, b.history):
            found.append(f"no longer counted: {printable(past.reason, 700)}")
        return found or ["the same record, computed otherwise by this guardbench"]

    def _move(self, a: _Stood, b: _Stood, who: str) -> Iterator[Change]:
        if (a.place, a.row.rank) == (b.place, b.row.rank):
            return
        above = {self.now[path] for path in a.above}
        better = {self.now[path] for path in a.better}
        moved = [("behind", b.above - above), ("ahead of", above - b.above)]
        if None not in (a.row.rank, b.row.rank):
            moved += [
                ("no longer tied with", b.better - better - (b.above - above)),
                ("now tied with", better - b.better - (above - b.above)),
            ]
        why = [] if a.row.ranked == b.row.ranked else ["by its own value"]
        why += [f"{how} {self._stands(path)}" for how, paths in moved for path in sorted(paths)]
        where = (
            f"place {a.place} -> {b.place}" if a.place != b.place else f"place {b.place} as before"
        )
        ranks = (
            f"{board_words.rank(a.row)} -> {b.row.rank or 'unranked'}"
            if a.row.rank != b.row.rank
            else f"{board_words.rank(b.row)} as before"
        )
        before, after = (f"place {each.place}, {board_words.rank(each.row)}" for each in (a, b))
        yield _change(
            self.name, b, "moved", f"{who}: {where}, {ranks}", before=before, after=after, why=why
        )

    def _stands(self, path: str) -> str:
        """Another row by name, with what became of it."""
        a, b = self.before.get(path), self.after.get(path)
        at = b or a
        assert at is not None
        name = _named(at, self.twice)
        if a is None or b is None:
            return f"{name} ({'new' if a is None else 'gone'})"
        if a.track != b.track:
            return f"{name} (now {b.track})"
        if a.row.ranked.mean != b.row.ranked.mean:
            return f"{name} ({board_words.numbers(a.row.ranked, b.row.ranked)})"
        if (a.row.rank is None) != (b.row.rank is None):
            return f"{name} ({'unranked' if b.row.rank is None else 'ranked'} now)"
        return name

    def _who(self, at: _Stood) -> str:
        return _called(self.name, at, self.twice)


def _called(board: str, at: _Stood, twice: set[str]) -> str:
    return f"{board}, {at.track}: {_named(at, twice)}"


def _named(at: _Stood, twice: set[str]) -> str:
    """The method, and its record's file where the board has several of it."""
    name = at.row.method.name
    return f"{name} [{printable(at.row.record.path)}]" if name in twice else name


def _measured(row: Row) -> dict[str, Measurement]:
    worst = {} if row.worst_case is None else {"worst_case": row.worst_case}
    return {"clean": row.clean, **row.attacks, **worst}


def _same(a: Measurement | None, b: Measurement) -> bool:
    """Whether two measurements say the same number."""
    return a is not None and (a.mean, a.low, a.high) == (b.mean, b.low, b.high)


def _only(ours: Sequence[Past], theirs: Sequence[Past]) -> list[Past]:
    known = {past.source for past in theirs}
    return [past for past in ours if past.source not in known]
