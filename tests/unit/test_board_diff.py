"""`guardbench leaderboard diff`: every change in words, with its reason."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from guardbench import canonical
from guardbench.board import Board
from guardbench.board_diff import difference
from guardbench.board_files import BoardFile, Boards, parse_board
from guardbench.cli.leaderboard import app
from guardbench.errors import GuardbenchError
from guardbench.ranking import build_leaderboard
from guardbench.reassessment import Assessment, AssessmentFile
from guardbench.records import Outcome
from tests.unit.test_leaderboard import GOLDEN, TOY, golden_files, record, replace, stored

PGD = replace(TOY, rank_by="pgd-100")


def board(*files, protocol=PGD, ipc=10, version=2):
    words = build_leaderboard(files, protocol, ipc)
    return BoardFile(version, Board.model_validate_json(json.dumps(words)))


def made(name, pgd, path=None, **changes):
    return stored(record(name, clean=60, pgd=pgd, **changes), path)


def several(*files, where="x"):
    return Boards(where, False, {file.key: file for file in files})


def said(old, new):
    """The lines of a difference of two boards, without their common beginning."""
    found = difference(several(old), several(new)).changes
    for change in found:
        assert change.text.isprintable()
        assert change.text.startswith(
            f"{change.board}, {change.track}: " if change.track else f"{change.board}: "
        )
    return [
        change.text.removeprefix("toy/ipc10").removeprefix(", soft").lstrip(": ,")
        for change in found
    ]


A30, B16, C15 = made("a", 30), made("b", 16), made("c", 15)


def test_the_same_board_has_no_change():
    assert said(board(A30, B16), board(A30, B16)) == []


def test_a_new_record_and_whom_it_moves():
    lines = said(board(A30, C15), board(A30, C15, made("new", 60)))
    assert lines == [
        "new: new record, pgd-100 100.0% (94.0 to 100.0), place 1, rank 1",
        "a: place 1 -> 2, rank 1 -> 2: behind new (new)",
        "c: place 2 -> 3, rank 2 -> 3: behind new (new)",
    ]


def test_a_record_that_is_gone_and_whom_it_moves():
    lines = said(board(A30, B16, C15), board(B16, C15))
    assert lines == [
        "a: record gone, it had 50.0% (37.7 to 62.3), place 1, rank 1",
        "b: place 2 -> 1, rank 1 as before: ahead of a (gone)",
        "c: place 3 -> 2, rank 2 -> 1: ahead of a (gone)",
    ]


def test_a_new_record_of_a_method_raises_it_past_another():
    lines = said(board(A30, B16), board(A30, made("b", 60)))
    assert lines == [
        "b: pgd-100 26.7% -> 100.0% (94.0 to 100.0): a new record of the same method",
        "b: worst case 16.7% -> 50.0% (37.7 to 62.3)",
        "b: place 2 -> 1, rank 1 as before: by its own value; ahead of a",
        "a: place 1 -> 2, rank 1 -> 2: behind b (26.7% -> 100.0%)",
    ]


def test_a_record_under_another_name_is_the_same_methods():
    other = made("b", 20, "baselines/b/results/toy/ipc10-seed1.json")
    lines = said(board(A30, B16), board(A30, other))
    assert lines == [
        "b: pgd-100 26.7% -> 33.3% (22.7 to 45.9): a new record of the same method",
        "b: its record is baselines/b/results/toy/ipc10-seed1.json now",
    ]


def test_several_records_of_a_method_are_told_apart_by_their_files():
    one, two = made("a", 20, "x/1.json"), made("a", 21, "x/2.json")
    new = made("a", 22, "x/3.json")
    assert said(board(one), board(one, two)) == [
        "a [x/2.json]: new record, pgd-100 35.0% (24.2 to 47.6), place 1, rank 1",
        "a [x/1.json]: place 1 -> 2, rank 1 as before: behind a [x/2.json] (new)",
    ]
    # Which of two came back under a new name cannot be known.
    lines = said(board(one, two), board(new))
    assert [line.split(",")[0] for line in lines] == [
        "a [x/2.json]: record gone", "a [x/1.json]: record gone", "a [x/3.json]: new record",
    ]  # fmt: skip


def test_a_tie_that_opens_and_one_that_closes():
    lines = said(board(A30, B16), board(A30, made("b", 15)))
    assert lines == [
        "b: pgd-100 26.7% -> 25.0% (15.8 to 37.2): a new record of the same method",
        "b: place 2 as before, rank 1 -> 2: by its own value; no longer tied with a",
    ]
    assert said(board(A30, made("b", 15)), board(A30, B16))[1] == (
        "b: place 2 as before, rank 2 -> 1: by its own value; now tied with a"
    )


def test_a_stronger_evaluation_is_named_and_so_is_its_end():
    assessment = Assessment(
        result_sha256=A30.record.result_sha256, attack="a longer search", made_by="A. Reader",
        date="2026-11-23", source="https://example.org/runs/7",
        seeds=[{"seed": 0, "outcome": Outcome.from_flags([False] * 30)}],
    )  # fmt: skip
    beside = AssessmentFile("baselines/a/assessments/toy/ipc10.long.json", "0" * 64, assessment)
    old, new = board(A30, B16), board(replace(A30, assessments=(beside,)), B16)
    reason = (
        "2026-11-23: A. Reader broke 30 images that stood, with a longer search "
        "(https://example.org/runs/7)"
    )
    lines = said(old, new)
    assert lines[0].startswith("a: pgd-100 50.0% -> 33.3% (0.0 to ")
    assert lines[0].endswith(f": a stronger evaluation, {reason}")
    assert lines[1].startswith("a: worst case ")
    assert len(lines) == 2
    back = said(new, old)
    assert back[0] == f"a: pgd-100 33.3% -> 50.0% (37.7 to 62.3): no longer counted: {reason}"
    (change, _) = difference(several(old), several(new)).changes
    assert (change.before, change.after) == (50.0, 33.3333)
    assert change.why == (f"a stronger evaluation, {reason}",)


def test_an_evaluation_that_was_made_again_is_no_change_of_the_software():
    def with_one(broken: int, sha256: str):
        assessment = Assessment(
            result_sha256=A30.record.result_sha256, attack="a search", made_by="A. Reader",
            date="2026-11-23", source="https://example.org/runs/7",
            seeds=[{"seed": 0, "outcome": Outcome.from_flags([k >= broken for k in range(30)])}],
        )  # fmt: skip
        path = "baselines/a/assessments/toy/ipc10.long.json"
        return board(replace(A30, assessments=(AssessmentFile(path, sha256, assessment),)), B16)

    lines = said(with_one(10, "0" * 64), with_one(30, "1" * 64))
    assert "a stronger evaluation, 2026-11-23: A. Reader broke 30 images" in lines[0]
    assert not any("computed otherwise" in line for line in lines)


def test_a_superseded_protocol_is_told_on_its_board():
    old, new = board(A30), board(A30, protocol=replace(PGD, superseded_by="toy-2"))
    assert said(old, new) == ["its protocol is superseded by toy-2; this board stays"]
    assert said(new, old) == ["its protocol is no longer superseded by toy-2"]


def other_protocol(pgd, **changes):
    protocol = replace(PGD, digest="1" * 64, **changes)
    own = record("a", clean=60, pgd=pgd, protocol=protocol.id, protocol_sha256="1" * 64)
    return board(stored(own, f"baselines/a/results/{protocol.id}/ipc10.json"), protocol=protocol)


def test_another_protocol_is_the_reason_of_another_value():
    lines = said(board(A30), other_protocol(16))
    assert lines[0].startswith(
        f"another protocol, toy ({PGD.digest[:12]}) -> toy (111111111111): numbers of"
    )
    assert lines[1].endswith(": measured under another protocol; a new record of the same method")


def test_a_board_beside_that_of_its_successor():
    old = board(A30, protocol=replace(PGD, superseded_by="toy-2"))
    new = other_protocol(16, id="toy-2", title="Another toy")
    pair = Boards("old.json", True, {old.key: old}), Boards("new.json", True, {new.key: new})
    lines = [change.text for change in difference(*pair).changes]
    assert "-> toy-2 (111111111111), which supersedes it: numbers of" in lines[0]
    assert lines[1:4] == [
        "toy-2/ipc10: its protocol is no longer superseded by toy-2",
        "toy-2/ipc10: id: toy -> toy-2",
        "toy-2/ipc10: title: A toy -> Another toy",
    ]
    assert "a: pgd-100 50.0% -> 26.7%" in lines[4]
    # In folders both stand, each for itself.
    lines = [change.text for change in difference(several(old), several(old, new)).changes]
    assert lines[0] == "toy-2/ipc10: board new"
    assert lines[1].startswith("toy-2/ipc10, soft: a: new record, pgd-100 26.7%")
    assert len(lines) == 2
    lines = [change.text for change in difference(several(old, new), several(old)).changes]
    assert lines[0] == "toy-2/ipc10: board gone"
    assert lines[1].startswith("toy-2/ipc10, soft: a: record gone, it had 26.7%")
    assert len(lines) == 2


def test_flags_gained_and_lost():
    old = made("a", 30, flags=("one", "two"))
    new = made("a", 30, flags=("two", "three"))
    lines = said(board(old), board(new))
    assert lines == [
        "a: its record is another file, of the same numbers",
        "a: flag gained: three",
        "a: flag lost: one",
    ]


def test_a_recipe_that_was_changed_is_no_longer_ranked():
    old, new = board(A30, B16), board(made("a", 30, official=False), B16)
    assert said(old, new) == [
        "b: place 2 -> 1, rank 1 as before: ahead of a (unranked now)",
        "a: no longer ranked, its recipe was changed",
        "a: its record is another file, of the same numbers",
        "a: also changed: method",
        "a: place 1 -> 2, rank 1 -> unranked: behind b",
    ]
    assert said(new, old)[0] == "a: ranked now"


def test_another_track_is_another_ranking():
    lines = said(board(A30, B16), board(made("a", 30, kind="hard"), B16))
    assert "toy/ipc10, hard: a: from track soft to hard".removeprefix("toy/ipc10, ") in lines
    assert "b: place 2 -> 1, rank 1 as before: ahead of a (now hard)" in lines


def test_a_record_that_only_moved_keeps_its_row():
    old = made("a", 30)
    new = replace(old, path="submissions/a/results/x.json")
    assert said(board(old), board(new)) == [
        "a: its record is submissions/a/results/x.json now",
        "a: also changed: area",
    ]


def test_nothing_that_differs_goes_untold():
    old = board(A30)
    (row,) = old.board.tracks.soft
    for field, value in (
        ("links", {"paper": "A"}),
        ("cost", row.cost.model_copy(update={"device": "x"})),
        ("clean", row.clean.model_copy(update={"mean": 99.9999})),
        ("attacks", {"pgd-100": row.attacks["pgd-100"]}),
        ("worst_case", None),
        ("provenance", row.provenance.model_copy(update={"commit": None})),
        ("rank", 7),
    ):
        tracks = old.board.tracks.model_copy(
            update={"soft": (row.model_copy(update={field: value}),)}
        )
        (line,) = said(old, BoardFile(2, old.board.model_copy(update={"tracks": tracks})))
        assert field.replace("_", " ").rstrip("s") in line or "no longer measured" in line


def test_the_schema_version_is_told_and_moves_nothing():
    old = parse_board((GOLDEN / "board-v1.json").read_text(encoding="utf-8"), "x")
    words = build_leaderboard(
        [replace(f, links={}, assessments=()) for f in golden_files()[:2]], TOY, 10
    )
    new = parse_board(canonical.dumps(words), "x")
    assert said(old, new) == ["schema version 1 -> 2, both read by the rules of today"]


@settings(max_examples=40, deadline=None)
@given(
    *[
        st.lists(
            st.tuples(st.sampled_from("abcd"), st.sampled_from([0, 15, 16, 30, 60])), max_size=4
        )
    ]
    * 2
)
def test_no_change_means_the_same_board_and_none_crashes(old, new):
    boards = [
        board(
            *(
                made(name, pgd, f"baselines/{name}/results/{k}.json")
                for k, (name, pgd) in enumerate(rows)
            )
        )
        for rows in (old, new)
    ]
    lines = said(*boards)
    assert (lines == []) == (boards[0].board == boards[1].board)


# --- the command


@pytest.fixture
def folders(tmp_path):
    for name, files in (("old", [A30]), ("new", [A30, B16])):
        folder = tmp_path / name / "toy"
        folder.mkdir(parents=True)
        (folder / "ipc10.json").write_text(canonical.dumps(build_leaderboard(files, PGD, 10)))
    return tmp_path


def call(*arguments):
    return CliRunner().invoke(app, ["diff", *map(str, arguments)])


LINE = "toy/ipc10, soft: b: new record, pgd-100 26.7% (17.1 to 39.0), place 2, rank 1\n"


def test_folders_files_and_both(folders):
    for old, new in (
        ("old", "new"),
        ("old/toy/ipc10.json", "new/toy/ipc10.json"),
        ("old", "new/toy/ipc10.json"),
    ):
        result = call(folders / old, folders / new)
        assert (result.exit_code, result.output) == (0, LINE)
    same = call(folders / "old", folders / "old")
    assert (same.exit_code, same.output) == (0, "no change; boards compared: 1\n")


def test_the_same_as_data(folders):
    target = folders / "changes.json"
    result = call(folders / "old", folders / "new", "--json", target)
    assert result.output == LINE
    found = json.loads(target.read_text(encoding="utf-8"))
    assert found["schema_version"] == 1
    assert found["changes"] == [
        {
            "board": "toy/ipc10", "kind": "record new", "track": "soft", "method": "b",
            "record": "baselines/b/results/toy/ipc10.json", "before": None, "after": 26.6667,
            "why": [], "text": LINE.rstrip("\n"),
        }
    ]  # fmt: skip
    call(folders / "old", folders / "old", "--json", target)
    assert json.loads(target.read_text(encoding="utf-8"))["changes"] == []


def test_bad_input_is_one_line(folders):
    words = json.loads((folders / "new/toy/ipc10.json").read_text())
    (folders / "other").mkdir()
    (folders / "other/ipc1.json").write_text(canonical.dumps({**words, "ipc": 1}))
    (folders / "old/toy/ipc50.json").write_text("{")
    one = folders / "new/toy/ipc10.json"
    for arguments, said in (
        (("nowhere", one), "nowhere: neither a board file nor a folder"),
        ((one, folders / "old"), "ipc50.json: not a valid board"),
        ((one, folders / "other/ipc1.json"), "at IPC 10 and"),
        ((one, folders / "other"), "no board of toy at IPC 10"),
        ((one, one, "--json", one), "that is one of the boards"),
    ):
        result = call(*arguments)
        assert isinstance(result.exception, GuardbenchError)
        assert said in str(result.exception)
        assert "\n" not in str(result.exception)
    assert json.loads(one.read_text()) == words


def test_a_hostile_board_cannot_write_on_the_terminal(folders):
    words = json.loads((folders / "new/toy/ipc10.json").read_text())
    words["protocol"]["title"] = "\x1b[2J"
    (row, _) = words["tracks"]["soft"]
    row["flags"] = ["\r\u202e[red]"]
    row["record"]["path"] = "\x1b]0;x\x07"
    path = folders / "new/toy/ipc10.json"
    path.write_text(json.dumps(words))
    result = call(folders / "old", path, "--json", folders / "changes.json")
    assert result.exit_code == 0
    assert all(line.isprintable() for line in result.output.split("\n"))
    assert r"flag gained: \r\u202e[red]" in result.output
    assert Path(folders / "changes.json").is_file()
