"""Board files: every schema version loads for ever, and what is wrong is one line."""

import copy
import json
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guardbench import canonical
from guardbench.board import Board
from guardbench.board_files import (
    BOARD_MIGRATIONS,
    INDEX_MIGRATIONS,
    load_board,
    load_index,
    parse_board,
    read_boards,
)
from guardbench.errors import GuardbenchError
from guardbench.migrations import migrate

GOLDEN = Path(__file__).parents[1] / "golden"
V1 = json.loads((GOLDEN / "board-v1.json").read_text(encoding="utf-8"))
V2 = json.loads((GOLDEN / "board-v2.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("version", range(1, len(BOARD_MIGRATIONS) + 2))
def test_every_version_there_has_been_loads(version):
    path = GOLDEN / f"board-v{version}.json"
    assert isinstance(load_board(path), Board)
    assert parse_board(path.read_text(encoding="utf-8"), "x").version == version


def test_version_1_becomes_version_2_by_hand():
    before = copy.deepcopy(V1)
    found = migrate(V1, BOARD_MIGRATIONS)
    assert before == V1  # pure
    (hard,) = found["tracks"]["hard"]
    (old,) = V1["tracks"]["hard"]
    assert hard["ranked"] == old["attacks"]["autoattack"]
    new = {"ranked", "area", "links", "scores", "history"}
    assert {name: hard[name] for name in new - {"ranked"}} == {
        "area": "baselines", "links": {}, "scores": None, "history": [],
    }  # fmt: skip
    assert {name: value for name, value in hard.items() if name not in new} == old
    assert found["protocol"] == {**V1["protocol"], "superseded_by": None}
    assert found["schema_version"] == 2


def test_version_1_is_ranked_anew_by_interval():
    words = copy.deepcopy(V1)
    (row,) = words["tracks"]["soft"]  # autoattack 16.7 to 96.6

    def other(name, low, high, rank, **changes):
        ranked = {**row["attacks"]["autoattack"], "low": low, "high": high, "mean": high}
        made = {**row, "attacks": {**row["attacks"], "autoattack": ranked}, "rank": rank}
        made["method"] = {**row["method"], "name": name, **changes}
        made["record"] = {**row["record"], "path": f"submissions/{name}/results/x.json"}
        return made

    rows = [other("a", 97.0, 99.0, 1, official=False), other("b", 96.6, 98.0, 2)]
    words["tracks"]["soft"] = [*rows, {**row, "rank": 3}, other("c", 1.0, 16.7, 4)]
    board = parse_board(canonical.dumps(words), "x").board
    found = [(each.method.name, each.rank, each.area) for each in board.tracks.soft]
    # 96.6 is not above 96.5936's rounding: it is, by 0.0064, so b is surely better than guard.
    assert found == [
        ("b", 1, "submissions"), ("guard", 2, "baselines"), ("c", 3, "submissions"),
        ("a", None, "submissions"),
    ]  # fmt: skip


def test_version_1_ranked_by_the_worst_case():
    words = copy.deepcopy(V1)
    words["protocol"]["rank_by"] = "worst_case"
    board = parse_board(canonical.dumps(words), "x").board
    (row,) = board.tracks.soft
    assert row.ranked.mean == V1["tracks"]["soft"][0]["worst_case"]["mean"]
    assert row.worst_case.excluded == ("cw",)


def test_the_index_of_version_1_loads(tmp_path):
    entry = {
        "path": "toy/ipc10.json", "protocol": "toy", "protocol_sha256": "0" * 64, "title": "A toy",
        "dataset": "digits", "resolution": 32, "ipc": 10, "rows": {"hard": 0, "soft": 1, "teacher": 0},
    }  # fmt: skip
    path = tmp_path / "index.json"
    for version in range(1, len(INDEX_MIGRATIONS) + 2):
        path.write_text(canonical.dumps({"schema_version": version, "boards": [entry]}))
        assert load_index(path).model_dump(mode="json") == {"schema_version": 2, "boards": [entry]}
    path.write_text(canonical.dumps({"schema_version": 2, "boards": [{**entry, "x": 1}]}))
    with pytest.raises(GuardbenchError, match=r"not a valid index of boards: boards\.0\.x"):
        load_index(path)


def without(words, *path):
    words = copy.deepcopy(words)
    at = words
    for part in path[:-1]:
        at = at[part]
    del at[path[-1]]
    return words


def with_(words, value, *path):
    words = copy.deepcopy(words)
    at = words
    for part in path[:-1]:
        at = at[part]
    at[path[-1]] = value
    return words


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not valid JSON"),
        ("[]", "must be a JSON object"),
        ('{"a": 1, "a": 2}', "a: the key stands twice"),
        ("[" * 100_000, "nested too deeply"),
        (canonical.dumps({**V2, "schema_version": 99}), "made by a newer guardbench"),
        (canonical.dumps(without(V2, "schema_version")), "schema_version: must be an integer"),
        (canonical.dumps({**V2, "surprise": 1}), "surprise: there is no such field"),
        (canonical.dumps(with_(V2, "2", "tracks", "soft", 0, "rank")), "tracks.soft.0.rank: "),
        (canonical.dumps(with_(V2, 0, "tracks", "soft", 0, "rank")), "tracks.soft.0.rank: "),
        (canonical.dumps(with_(V2, "ours", "tracks", "soft", 0, "area")), "tracks.soft.0.area: "),
        (canonical.dumps(without(V1, "protocol")), "a field of that schema version"),
        (canonical.dumps(with_(V1, 5, "tracks")), "a field of that schema version"),
        (canonical.dumps(with_(V1, [5], "tracks", "hard")), "a field of that schema version"),
        (canonical.dumps(with_(V1, "nothing", "protocol", "rank_by")), "'nothing'"),
        (canonical.dumps(with_(V1, None, "tracks", "soft", 0, "worst_case")), None),
        (canonical.dumps({**V2, "\x1b[2J": 1}), r"\x1b[2J"),
    ],
)
def test_a_wrong_board_is_one_line(tmp_path, text, said):
    path = tmp_path / "ipc10.json"
    path.write_text(text, encoding="utf-8")
    if said is None:
        assert load_board(path).tracks.soft[0].worst_case is None
        return
    with pytest.raises(GuardbenchError) as caught:
        load_board(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: not a valid board: ")
    assert said in line
    assert line.isprintable()
    assert line.endswith("build this one again.")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


def paths_of(words, at=()):
    yield at
    items = (
        words.items()
        if isinstance(words, dict)
        else enumerate(words)
        if isinstance(words, list)
        else ()
    )
    for key, value in items:
        yield from paths_of(value, (*at, key))


PATHS = sorted((path for path in paths_of(V1) if path), key=str)


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(PATHS), JSON)
def test_no_word_in_a_board_of_version_1_is_a_crash(path, value):
    text, said = json.dumps(with_(V1, value, *path)), ""
    try:
        parse_board(text, "x")
    except GuardbenchError as error:
        said = str(error)
    assert said.isprintable()


# --- where boards are


def git(folder, *words):
    named = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *named, *words], check=True, capture_output=True)


@pytest.fixture
def boards(tmp_path):
    folder = tmp_path / "leaderboards"
    (folder / "toy").mkdir(parents=True)
    (folder / "toy/ipc10.json").write_text(canonical.dumps(V2))
    (folder / "toy/ipc1.json").write_text(canonical.dumps({**V1, "ipc": 1}))
    (folder / "toy/notes.json").write_text("{")
    (folder / "index.json").write_text("{")
    return folder


def test_boards_of_a_file_a_folder_and_its_checkout(boards):
    one = read_boards(str(boards / "toy/ipc1.json"))
    assert one.single
    assert [(key, file.version) for key, file in one.files.items()] == [(("toy", 1), 1)]
    for where in (boards, boards.parent, boards / "toy"):
        several = read_boards(str(where))
        assert not several.single
        assert sorted(several.files) == [("toy", 1), ("toy", 10)]


def test_an_index_without_boards_is_a_folder_of_none(tmp_path):
    (tmp_path / "index.json").write_text('{"boards": [], "schema_version": 2}')
    assert read_boards(str(tmp_path)).files == {}


def test_boards_of_a_revision(boards, monkeypatch):
    root = boards.parent
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-qm", "one")
    (boards / "toy/ipc1.json").unlink()
    git(root, "commit", "-qam", "two")
    monkeypatch.chdir(boards / "toy")
    assert sorted(read_boards("HEAD~1:").files) == [("toy", 1), ("toy", 10)]
    assert sorted(read_boards("HEAD:").files) == [("toy", 10)]
    one = read_boards("HEAD~1:leaderboards/toy/ipc1.json")
    assert (one.single, sorted(one.files)) == (True, [("toy", 1)])
    for where, said in (
        ("nothing:", "there is no such revision"),
        ("HEAD:elsewhere", "no board there"),
        (":", "name a revision before the colon"),
        ("--output=x:", "name a revision before the colon"),
    ):
        with pytest.raises(GuardbenchError, match=said):
            read_boards(where)
    assert not Path("x").exists()


def test_no_place_of_boards_is_one_line(boards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    empty = tmp_path / "empty"
    empty.mkdir()
    for where, said in (
        ("nowhere", "neither a board file nor a folder of boards"),
        (str(empty), "no board in it"),
        ("HEAD:", "not a git repository"),
        ("a\x1bb:", r"a\x1bb:"),
    ):
        with pytest.raises(GuardbenchError) as caught:
            read_boards(where)
        assert said in str(caught.value)
        assert str(caught.value).isprintable()
    (boards / "other").mkdir()
    (boards / "other/ipc10.json").write_text(canonical.dumps(V2))
    with pytest.raises(GuardbenchError, match="two boards of toy at IPC 10"):
        read_boards(str(boards))
    (boards / "other/ipc10.json").unlink()
    (boards / "other/ipc10.json").mkdir()
    with pytest.raises(GuardbenchError, match="not a plain file"):
        read_boards(str(boards))
