import hashlib
import json
import os
import random
import re
import subprocess
import sys
import threading
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from guardbench import canonical, leaderboard
from guardbench.board import Board, ranks
from guardbench.board_files import load_board, load_index
from guardbench.cli.leaderboard import app
from guardbench.cli.show import show
from guardbench.errors import GuardbenchError
from guardbench.leaderboard import board_path, rebuild
from guardbench.locks import locked
from guardbench.methods import methods_folder
from guardbench.ranking import EVALUATION_STAGES, OTHER_PIXELS, RecordFile, build_leaderboard
from guardbench.reassessment import Assessment, AssessmentFile
from guardbench.record_files import load_record, record_paths, save_record
from guardbench.records import Outcome, ResultRecord, SeedRun
from guardbench.report import differences
from guardbench.threat import ThreatModel

GOLDEN = Path(__file__).parents[1] / "golden"
PROTOCOL_SHA = hashlib.sha256(b'"protocol"').hexdigest()


@dataclass(frozen=True)
class Attack:
    name: str
    images_per_seed: int | None = None


@dataclass(frozen=True)
class Student:
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True)
class Test:
    __test__ = False
    count: int = 60
    sha256: str | None = None


@dataclass(frozen=True)
class Protocol:
    """Stands in for guardbench.protocol.Protocol; the golden record was measured under it."""

    id: str = "toy"
    title: str = "A toy"
    superseded_by: str | None = None
    dataset: str = "digits"
    resolution: int = 32
    ipc: tuple[int, ...] = (1, 10)
    rank_by: str = "autoattack"
    attacks: tuple[Attack, ...] = (Attack("pgd-100"), Attack("cw"), Attack("autoattack", 20))
    threat: ThreatModel = ThreatModel("linf", Fraction(1, 255))  # noqa: RUF009
    student: Student = Student()
    test: Test = Test()
    digest: str = PROTOCOL_SHA

    def slice_of(self, attack, position):
        if attack.images_per_seed is None:
            return 0, self.test.count
        return position * attack.images_per_seed, attack.images_per_seed


TOY = Protocol()
GUARD = load_record(GOLDEN / "record-v1.json")


def record(name="guard", clean=50, pgd=30, aa=10, cw=20, kind="soft", official=True, **changes):
    """A record of three like seeds with these counts of 60, 60, 20 and 60 images."""

    def outcome(correct, total, first=0, **more):
        return Outcome.from_flags([i < correct for i in range(total)], first=first, **more)

    runs = []
    for k in range(3):
        # Only the first 20 images of seed 0 can be right under AutoAttack where clean is small.
        attacks = {
            "pgd-100": outcome(pgd, 60),
            "cw": outcome(cw, 60, bounded=False),
            "autoattack": outcome(min(aa, max(0, clean - 20 * k)), 20, first=20 * k),
        }
        runs.append(SeedRun(seed=k, clean=outcome(clean, 60), attacks=attacks))
    words = GUARD.model_dump()
    words["seeds"] = runs
    words["method"] = {**words["method"], "name": name, "title": name.upper(), "official": official}
    words["artifact"] = {**words["artifact"], "label_kind": kind}
    return ResultRecord(**{**words, **changes})


def stored(made, path=None):
    path = path or f"baselines/{made.method.name}/results/toy/ipc{made.ipc}.json"
    # As version 3 of records had it, whose digest the golden boards hold.
    words = made.model_dump(mode="json") | {"schema_version": 3}
    for run in words["seeds"]:
        del run["references"]
    for cost in words["cost"]:
        del cost["after"]
    return RecordFile(path, canonical.digest(words), made)


def places(board, track="soft"):
    return [(row["method"]["name"], row["rank"]) for row in board["tracks"][track]]


# --- one board


def golden_files():
    """A hard row, a row that a later attack lowered, and an unofficial one with a higher value."""
    hard = record("random", clean=30, pgd=3, aa=1, kind="hard")
    path = "baselines/guard/results/toy/ipc10.json"
    broken = [run.attacks["autoattack"].flags() for run in GUARD.seeds]
    broken[1][broken[1].index(True)] = False
    seen = [
        {"seed": k, "outcome": Outcome.from_flags(broken[k], first=20 * k, max_distance=1 / 255)}
        for k in (0, 1)
    ]
    later = Assessment(
        result_sha256=GUARD.result_sha256,
        attack="a longer search",
        made_by="A. Reader",
        date="2026-11-23",
        source="https://example.org/runs/7",
        seeds=seen,
    )
    beside = AssessmentFile("baselines/guard/assessments/toy/ipc10.long.json", "0" * 64, later)
    links = {"paper": "Xue et al., AAAI 2025", "code": "https://example.org/guard"}
    digest = canonical.file_digest(GOLDEN / "record-v1.json")
    changed = stored(record("sre2l", clean=60, aa=20, official=False))
    return [stored(hard), RecordFile(path, digest, GUARD, links, (beside,)), changed]


def test_the_golden_board_is_built_to_the_byte():
    board = build_leaderboard(golden_files(), TOY, 10)
    text = (GOLDEN / "board-v2.json").read_text(encoding="utf-8")
    assert canonical.dumps(board) == text
    assert Board.model_validate_json(text, strict=True).model_dump(mode="json") == board


def test_scores_stand_beside_the_row_and_the_whole_set_gives_the_last_of_them(tmp_path):
    scored = load_record(GOLDEN / "record-v4.json")
    protocol = TOY
    (row,) = build_leaderboard([RecordFile("a.json", "0" * 64, scored)], protocol, 10)["tracks"][
        "soft"
    ]
    assert row["scores"]["ior"] == pytest.approx(34 / 180, abs=1e-6)
    assert row["scores"]["lrs"] is None
    whole = record("full", clean=54, pgd=30, aa=10, kind="hard")
    method = whole.method.model_copy(update={"distiller": "full"})
    whole = whole.model_copy(update={"method": method})
    for made, name in ((scored, scored.method.name), (whole, "full")):
        save_record(tmp_path / f"baselines/{name}/results/toy/ipc10.json", made)
    board = json.loads(rebuild(tmp_path, load=lambda _: protocol)[board_path("toy", 10)])
    (row,) = board["tracks"]["soft"]
    accuracy = sum(run.clean.correct for run in whole.seeds) / sum(
        run.clean.total for run in whole.seeds
    )
    assert row["scores"]["hlr"] == pytest.approx(accuracy - 153 / 180, abs=1e-6)
    assert 0 < row["scores"]["lrs"] < 1


def test_a_dev_record_stands_on_no_board(tmp_path):
    dev = stored(record(tier="dev"))
    said = "tier: dev, a board takes official records alone; run it again with `guardbench run"
    with pytest.raises(GuardbenchError, match=said):
        build_leaderboard([dev], TOY, 10)
    save_record(tmp_path / dev.path, dev.record)
    with pytest.raises(GuardbenchError, match=f"{dev.path}: {said}"):
        rebuild(tmp_path, load=lambda _: TOY)


def test_numbers_of_a_row_by_hand():
    board = build_leaderboard([stored(record(clean=50, pgd=30, aa=10, cw=20))], TOY, 10)
    (row,) = board["tracks"]["soft"]
    assert row["clean"]["mean"] == 83.3333
    assert row["attacks"]["pgd-100"]["per_seed"] == [50, 50, 50]
    assert row["attacks"]["autoattack"]["mean"] == 50
    assert row["attacks"]["autoattack"]["images"] == 60
    assert row["attacks"]["autoattack"]["images_per_seed"] == [20, 20, 20]
    assert row["attacks"]["cw"]["bounded"] is False
    # Images 0-9, 20-29 and none of 40-49 survive both; PGD leaves 0-29.
    assert row["worst_case"]["per_seed"] == [50, 50, 0]
    assert row["worst_case"]["attacks"] == ["autoattack", "pgd-100"]
    assert row["worst_case"]["excluded"] == ["cw"]
    # squeeze (reused) and recover; student and pgd-100.
    assert row["cost"]["distill_seconds"] == 43.8
    assert row["cost"]["evaluate_seconds"] == 65.5
    assert row["cost"]["peak_memory_bytes"] == 1_512_000_000
    assert row["record"]["path"] == "baselines/guard/results/toy/ipc10.json"
    assert row["provenance"]["torch"] == "2.15.0"
    assert board["protocol"]["threat"] == "linf 1/255"
    assert board["protocol"]["attacks"] == ["pgd-100", "cw", "autoattack"]


def test_rows_stand_by_the_protocols_column_then_clean_and_tie_by_interval():
    files = [
        stored(record("a", clean=60, pgd=60, aa=9)),
        stored(record("b", clean=50, pgd=20, aa=10)),
        stored(record("c", clean=55, pgd=10, aa=10)),
    ]
    # Of 20 images each, 9 and 10 are one rank.
    assert places(build_leaderboard(files, TOY, 10)) == [("c", 1), ("b", 1), ("a", 1)]
    # 60, 20 and 10 of 60 images: 94.0 to 100, 22.7 to 45.9, 9.3 to 28.0 (Wilson).
    by_pgd = replace(TOY, rank_by="pgd-100")
    assert places(build_leaderboard(files, by_pgd, 10)) == [("a", 1), ("b", 2), ("c", 2)]
    # Worst of three slices: a 9 9 9, b 10 0 0, c 10 0 0.
    by_worst = replace(TOY, rank_by="worst_case")
    board = build_leaderboard(files, by_worst, 10)
    assert places(board) == [("a", 1), ("c", 1), ("b", 1)]
    rows = board["tracks"]["soft"]
    assert [row["ranked"]["per_seed"] for row in rows] == [[45, 45, 45], [50, 0, 0], [50, 0, 0]]
    for row in rows:
        assert row["ranked"].items() <= row["worst_case"].items()


def test_a_tie_is_not_passed_on_from_row_to_row():
    # Wilson's intervals of 30, 16 and 15 of 60: 37.74 to 62.26, 17.13 to 39.01, 15.78 to 37.23.
    files = [stored(record(n, clean=60, pgd=p)) for n, p in (("c", 15), ("a", 30), ("b", 16))]
    board = build_leaderboard(files, replace(TOY, rank_by="pgd-100"), 10)
    assert places(board) == [("a", 1), ("b", 1), ("c", 2)]
    lows = [row["ranked"]["low"] for row in board["tracks"]["soft"]]
    assert lows == pytest.approx([37.735, 17.13, 15.78], abs=0.02)


def test_ranks_by_hand():
    assert ranks([]) == []
    assert ranks([(True, 50, 60), (True, 40, 50), (True, 30, 39.9)]) == [1, 1, 3]
    assert ranks([(True, 50, 60), (True, 40, 49.9)]) == [1, 2]
    # The widest interval is that of the last row: nothing is surely better than it.
    assert ranks([(True, 49, 51), (True, 47.5, 48.5), (True, 20, 74)]) == [1, 2, 1]
    # Who is not official neither has a rank nor takes one.
    assert ranks([(False, 90, 99), (True, 40, 50), (False, 10, 20)]) == [None, 1, None]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 9), st.integers(0, 9)).map(
            lambda row: (row[0], min(row[1:]), max(row[1:]))
        ),
        max_size=8,
    ),
    st.randoms(use_true_random=False),
)
def test_a_rank_hangs_on_the_official_rows_and_not_on_their_order(rows, shuffler):
    before = dict(zip(range(len(rows)), ranks(rows), strict=True))
    order = [k for k in range(len(rows)) if rows[k][0]]
    shuffler.shuffle(order)
    assert ranks([rows[k] for k in order]) == [before[k] for k in order]
    assert min([before[k] for k in order], default=1) == 1


def test_equal_values_stand_by_name():
    files = [stored(record(n, pgd=p)) for n, p in (("d", 1), ("b", 2), ("c", 2))]
    files += [stored(record("e", aa=9)), stored(record("a"), "submissions/a/results/x.json")]
    board = build_leaderboard(files, TOY, 10)
    assert places(board) == [("a", 1), ("b", 1), ("c", 1), ("d", 1), ("e", 1)]
    areas = [row["area"] for row in board["tracks"]["soft"]]
    assert areas == ["submissions", *["baselines"] * 4]


def test_an_unofficial_row_stands_behind_the_others_and_takes_no_rank():
    files = [
        stored(record("best", clean=60, pgd=60, official=False, overrides=("squeeze.epochs=5",))),
        stored(record("a", clean=60, pgd=50)),
        stored(record("z", clean=60, pgd=10)),
        stored(record("worst", clean=60, pgd=0, official=False)),
    ]
    board = build_leaderboard(files, replace(TOY, rank_by="pgd-100"), 10)
    assert places(board) == [("a", 1), ("z", 2), ("best", None), ("worst", None)]


def test_a_superseded_protocol_keeps_its_board_and_says_so():
    board = build_leaderboard([stored(record())], replace(TOY, superseded_by="toy-2"), 10)
    assert board["protocol"]["superseded_by"] == "toy-2"
    assert places(board) == [("guard", 1)]
    plain = build_leaderboard([stored(record())], TOY, 10)
    assert plain["protocol"]["superseded_by"] is None
    assert plain["tracks"] == board["tracks"]


def test_tracks_are_never_ranked_together():
    files = [
        stored(record("weak", aa=1, kind="hard")),
        stored(record("strong", aa=10, kind="soft")),
        stored(record("other", aa=5, kind="teacher")),
    ]
    board = build_leaderboard(files, TOY, 10)
    assert places(board, "hard") == [("weak", 1)]
    assert places(board, "soft") == [("strong", 1)]
    assert places(board, "teacher") == [("other", 1)]


def test_two_results_of_one_method_both_stand_and_a_copy_does_not():
    one = stored(record(aa=10), "baselines/guard/results/z.json")
    two = stored(record(aa=9), "baselines/guard/results/y.json")
    words = one.record.model_dump()
    copy = ResultRecord(**{**words, "cost": ()})
    copied = stored(copy, "baselines/guard/results/a.json")
    board = build_leaderboard([one, two, copied], TOY, 10)
    assert [row["record"]["path"] for row in board["tracks"]["soft"]] == [
        "baselines/guard/results/a.json",
        "baselines/guard/results/y.json",
    ]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(40, 60), st.integers(0, 10)), min_size=1, max_size=6),
    st.randoms(use_true_random=False),
)
def test_the_order_of_records_does_not_matter(numbers, shuffler):
    kinds = ("hard", "soft", "soft")
    files = [
        stored(record(f"m{i % 4}", clean, aa=aa, kind=kinds[i % 3], official=i != 4), f"{i}.json")
        for i, (clean, aa) in enumerate(numbers)
    ]
    before = canonical.dumps(build_leaderboard(files, TOY, 10))
    shuffler.shuffle(files)
    assert canonical.dumps(build_leaderboard(files, TOY, 10)) == before


@pytest.mark.parametrize(
    ("changes", "protocol", "said"),
    [
        ({"protocol_sha256": "0" * 64}, TOY, "protocol: measured under toy, digest 000000000000"),
        ({"protocol": "other"}, TOY, "protocol: measured under other"),
        ({"dataset": "cifar10"}, TOY, "dataset: cifar10, protocol toy says digits"),
        ({"resolution": 64}, TOY, "resolution: 64, protocol toy says 32"),
        ({"ipc": 1}, TOY, "ipc: 1, protocol toy says 10"),
        ({}, replace(TOY, attacks=TOY.attacks[:2]), "attacks: autoattack, cw, pgd-100, protocol"),
        ({}, replace(TOY, student=Student((0, 1))), "seeds: 0, 1, 2, protocol toy says 0, 1"),
        ({}, replace(TOY, student=Student((0, 2, 1))), "seeds: 0, 1, 2, protocol toy says 0, 2, 1"),
        ({}, replace(TOY, test=Test(count=61)), "test.total: 60, protocol toy says 61"),
        ({}, replace(TOY, test=Test(sha256="0" * 64)), "test.list_sha256: "),
        (
            {},
            replace(TOY, attacks=(*TOY.attacks[:2], Attack("autoattack", 10))),
            "seeds: autoattack of seed 0 measures 20 images from 0, protocol toy says 10 from 0",
        ),
        ({}, replace(TOY, ipc=(1, 50)), "ipc: protocol toy measures 1, 50, not 10"),
    ],
)
def test_a_record_of_another_measurement_is_refused_by_name(changes, protocol, said):
    good = stored(record("sre2l"))
    bad = stored(record("guard", **changes), "baselines/guard/results/bad.json")
    with pytest.raises(GuardbenchError) as caught:
        build_leaderboard([good, bad] if changes else [bad], protocol, 10)
    line = str(caught.value)
    assert line.startswith(f"baselines/guard/results/bad.json: {said}")
    assert "run it again" in line
    assert "\n" not in line


def test_fewer_clean_images_than_the_protocols_are_refused():
    protocol = replace(TOY, attacks=TOY.attacks[2:])
    words = GUARD.model_dump()
    for run in words["seeds"]:
        run["attacks"] = {"autoattack": run["attacks"]["autoattack"]}
    build_leaderboard([stored(ResultRecord(**words))], protocol, 10)
    words["seeds"][1]["clean"] = Outcome.from_flags([True] * 59).model_dump()
    with pytest.raises(GuardbenchError, match="clean of seed 1 measures 59 images from 0"):
        build_leaderboard([stored(ResultRecord(**words))], protocol, 10)


def test_ranking_by_a_worst_case_that_is_not_there_is_refused():
    protocol = replace(TOY, attacks=(Attack("cw"),), rank_by="worst_case")
    words = GUARD.model_dump()
    for run in words["seeds"]:
        run["attacks"] = {"cw": run["attacks"]["cw"]}
    with pytest.raises(GuardbenchError, match="no worst case"):
        build_leaderboard([stored(ResultRecord(**words))], protocol, 10)
    board = build_leaderboard([stored(ResultRecord(**words))], replace(protocol, rank_by="cw"), 10)
    assert board["tracks"]["soft"][0]["worst_case"] is None


# --- all boards


def load(name):
    if name != "toy":
        raise GuardbenchError(f"unknown protocol {name!r}.")
    return TOY


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(leaderboard, "_load_protocol", load)
    for made in (
        record("guard"),
        record("guard", ipc=1),
        record("sre2l", aa=7),
        record("random", kind="hard"),
    ):
        path = f"baselines/{made.method.name}/results/toy/ipc{made.ipc}.json"
        save_record(tmp_path / path, made)
    save_record(tmp_path / "submissions/mine/results/deep/er/x.json", record("mine", aa=8))
    return tmp_path


def test_every_record_is_on_its_board(checkout):
    texts = rebuild(checkout)
    assert [path.as_posix() for path in texts] == [
        "leaderboards/assessment.schema.json",
        "leaderboards/board.schema.json",
        "leaderboards/index.json",
        "leaderboards/index.schema.json",
        "leaderboards/record.schema.json",
        "leaderboards/toy/ipc1.json",
        "leaderboards/toy/ipc10.json",
    ]
    board = json.loads(texts[Path("leaderboards/toy/ipc10.json")])
    assert places(board) == [("guard", 1), ("mine", 1), ("sre2l", 1)]
    for row in board["tracks"]["soft"]:
        assert canonical.file_digest(checkout / row["record"]["path"]) == row["record"]["sha256"]
    index = json.loads(texts[Path("leaderboards/index.json")])
    assert [(b["path"], b["rows"]) for b in index["boards"]] == [
        ("toy/ipc1.json", {"hard": 0, "soft": 1, "teacher": 0}),
        ("toy/ipc10.json", {"hard": 1, "soft": 3, "teacher": 0}),
    ]


def test_what_was_built_is_read_again(checkout):
    leaderboard.write(checkout, rebuild(checkout))
    index = load_index(checkout / "leaderboards/index.json")
    for entry in index.boards:
        board = load_board(checkout / "leaderboards" / entry.path)
        assert (board.protocol.id, board.ipc) == (entry.protocol, entry.ipc)
        assert {track: len(getattr(board.tracks, track)) for track in entry.rows} == entry.rows


@pytest.mark.parametrize(
    ("text", "links"),
    [
        ('paper = "A, 2026"\ncode = "https://a.example"', {"paper": "A, 2026", "code": "https://a.example"}),
        ('paper = ""\ncode = 5', {}),
        ('paper = "a\\u202eb"\ncode = "a\\nb"', {}),
        (f'paper = "{"x" * 401}"\ncode = "{"x" * 400}"', {"code": "x" * 400}),
        ('[paper]\ncode = "https://a.example"', {}),
    ],
)  # fmt: skip
def test_links_are_read_leniently_from_both_areas(checkout, text, links):
    (checkout / "baselines/guard/method.toml").write_text(text, encoding="utf-8")
    (checkout / "submissions/mine/submission.toml").write_text(text, encoding="utf-8")
    board = json.loads(rebuild(checkout)[Path("leaderboards/toy/ipc10.json")])
    found = {row["method"]["name"]: row["links"] for row in board["tracks"]["soft"]}
    assert found == {"guard": links, "mine": links, "sre2l": {}}


def test_links_that_cannot_be_read_are_told_by_file(checkout, tmp_path_factory):
    path = checkout / "submissions/mine/submission.toml"
    path.write_text("paper =", encoding="utf-8")
    with pytest.raises(GuardbenchError, match=r"submission\.toml: submission is not valid TOML"):
        rebuild(checkout)
    path.unlink()
    outside = tmp_path_factory.mktemp("outside") / "x.toml"
    outside.write_text('paper = "secret"', encoding="utf-8")
    path.symlink_to(outside)
    with pytest.raises(GuardbenchError, match=r"submission\.toml: not a plain file inside"):
        rebuild(checkout)


def test_no_record_gives_an_empty_index(tmp_path):
    (tmp_path / "baselines").mkdir()
    texts = rebuild(tmp_path, load=load)
    assert json.loads(texts[Path("leaderboards/index.json")])["boards"] == []


def test_the_schemas_name_every_field_of_what_they_describe(checkout):
    texts = rebuild(checkout)
    files = golden_files()
    described = {
        "board": build_leaderboard(files, TOY, 10),
        "index": json.loads(texts[Path("leaderboards/index.json")]),
        "record": GUARD.model_dump(mode="json"),
        "assessment": files[1].assessments[0].assessment.model_dump(mode="json"),
    }
    for name, found in described.items():
        schema = json.loads(texts[Path(f"leaderboards/{name}.schema.json")])
        conforms(found, schema, schema["$defs"])
        found["surprise"] = 1
        with pytest.raises(AssertionError):
            conforms(found, schema, schema["$defs"])


def conforms(value, schema, defs):
    """The part of JSON Schema that our schemas use; no validator is installed here."""
    if "$ref" in schema:
        schema = defs[schema["$ref"].removeprefix("#/$defs/")]
    if "anyOf" in schema:
        options = [option for option in schema["anyOf"] if (option == NULL) == (value is None)]
        assert options
        for option in options:
            conforms(value, option, defs)
        return
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
    if "type" in schema:
        assert isinstance(value, kinds.get(schema["type"], (int, float, type(None)))), schema
    if "const" in schema:
        assert value == schema["const"]
    if "enum" in schema:
        assert value in schema["enum"]
    if "properties" in schema:
        assert schema["additionalProperties"] is False
        assert value.keys() == set(schema["required"]) == schema["properties"].keys()
        for key, inner in schema["properties"].items():
            conforms(value[key], inner, defs)
    elif schema.get("type") == "object":
        for inner in value.values():
            conforms(inner, schema["additionalProperties"], defs)
    if schema.get("type") == "array":
        for inner in value:
            conforms(inner, schema["items"], defs)


NULL = {"type": "null"}


def test_a_record_in_another_methods_folder_is_refused(checkout):
    save_record(checkout / "submissions/evil/results/x.json", record("guard", aa=1))
    with pytest.raises(GuardbenchError, match=r"evil/results/x.json: method.name: 'guard' stands"):
        rebuild(checkout)


def test_an_unknown_protocol_is_told_with_the_file(checkout):
    save_record(checkout / "baselines/guard/results/new.json", record("guard", protocol="new"))
    with pytest.raises(GuardbenchError, match=r"results/new.json: protocol: unknown protocol"):
        rebuild(checkout)


def test_a_link_out_of_the_checkout_is_refused(checkout, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "x.json"
    save_record(outside, record("guard", aa=1))
    (checkout / "baselines/guard/results/link.json").symlink_to(outside)
    with pytest.raises(GuardbenchError, match=r"link.json: not a plain file inside"):
        rebuild(checkout)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(checkout):
    os.mkfifo(checkout / "baselines/guard/results/pipe.json")
    with pytest.raises(GuardbenchError, match=r"pipe.json: not a plain file"):
        rebuild(checkout)


# --- a workspace


def test_a_workspace_gets_boards_of_what_was_run_there(tmp_path):
    save_record(tmp_path / "records/toy/ipc10/guard-1.json", record("guard"))
    save_record(tmp_path / "records/toy/ipc10/sre2l.json", record("sre2l", aa=5))
    boards = leaderboard.build_workspace_boards(tmp_path, load=load)
    assert boards == [tmp_path / leaderboard.board_path("toy", 10)]
    # 30 of 60 images against 15: 37.74 to 62.26, and 15.78 to 37.23.
    assert places(json.loads(boards[0].read_text(encoding="utf-8"))) == [("guard", 1), ("sre2l", 2)]
    assert (tmp_path / "leaderboards/index.json").is_file()


def test_of_two_runs_that_end_at_once_neither_row_is_lost(tmp_path, monkeypatch):
    """The first has read the records, and not yet written, when the second's record comes."""
    save_record(tmp_path / "records/toy/ipc10/guard.json", record("guard"))
    real, threads = leaderboard.read_records, []

    def second():
        save_record(tmp_path / "records/toy/ipc10/sre2l.json", record("sre2l", aa=5))
        leaderboard.build_workspace_boards(tmp_path, load=load)

    def slow(root, pattern, warn):
        found = real(root, pattern, warn)
        if not threads:
            threads.append(threading.Thread(target=second))
            threads[0].start()
            while threads[0].is_alive() and not waits.wait(0.01):
                pass  # it has all the time that it needs, unless it must wait
        return found

    waits = threading.Event()
    monkeypatch.setattr(
        leaderboard, "locked", lambda lock, _: locked(lock, lambda _holder: waits.set())
    )
    monkeypatch.setattr(leaderboard, "read_records", slow)
    (board,) = leaderboard.build_workspace_boards(tmp_path, load=load)
    threads[0].join()
    assert places(json.loads(board.read_text(encoding="utf-8"))) == [("guard", 1), ("sre2l", 2)]
    assert not (tmp_path / "leaderboards/.lock").exists()


def test_a_stale_record_of_a_workspace_is_an_error_or_a_warning(tmp_path):
    save_record(tmp_path / "records/toy/ipc10/guard.json", record("guard"))
    old = record("sre2l", protocol_sha256="0" * 64)
    save_record(tmp_path / "records/toy/ipc10/sre2l.json", old)
    save_record(tmp_path / "records/gone/ipc10/x.json", record("guard", protocol="gone"))
    with pytest.raises(GuardbenchError, match=r"gone/ipc10/x\.json"):
        leaderboard.build_workspace_boards(tmp_path, load=load)
    told = []
    (path,) = leaderboard.build_workspace_boards(tmp_path, load=load, warn=told.append)
    assert places(json.loads(path.read_text(encoding="utf-8"))) == [("guard", 1)]
    assert len(told) == 2
    assert told[0].startswith("records/gone/ipc10/x.json: protocol: unknown protocol")
    assert told[1].startswith("records/toy/ipc10/sre2l.json: protocol: measured under toy")


def test_a_record_that_cannot_be_read_is_an_error_or_a_warning(tmp_path):
    save_record(tmp_path / "records/toy/ipc10/guard.json", record("guard"))
    (tmp_path / "records/toy/ipc10/half.json").write_text('{"schema_version": 5, "seeds"')
    with pytest.raises(GuardbenchError, match=r"half\.json: not a valid record"):
        leaderboard.build_workspace_boards(tmp_path, load=load)
    told = []
    (path,) = leaderboard.build_workspace_boards(tmp_path, load=load, warn=told.append)
    assert places(json.loads(path.read_text(encoding="utf-8"))) == [("guard", 1)]
    assert len(told) == 1
    assert "half.json: not a valid record" in told[0]


def on(name, **digests):
    """A record on test images of these digests."""
    made = record(name, aa=7)
    return made.model_copy(update={"test": made.test.model_copy(update=digests)})


def test_rows_on_other_test_images_do_not_stand_beside_each_other(tmp_path):
    """A protocol that names no list is measured on another where a copy names its images otherwise."""
    save_record(tmp_path / "records/toy/ipc10/guard.json", record("guard"))
    save_record(tmp_path / "records/toy/ipc10/mine.json", record("mine", aa=3))
    save_record(
        tmp_path / "records/toy/ipc1/sre2l.json",
        on("sre2l", list_sha256="0" * 64).model_copy(update={"ipc": 1}),
    )
    said = r"ipc1/sre2l\.json: test.list_sha256: other test images .* than records/toy/ipc10/guard\.json has"
    with pytest.raises(GuardbenchError, match=said):
        leaderboard.build_workspace_boards(tmp_path, load=load)
    told = []
    boards = leaderboard.build_workspace_boards(tmp_path, load=load, warn=told.append)
    assert [path.name for path in boards] == ["ipc10.json"], "the list of most rows stands"
    assert len(told) == 1


def test_rows_on_other_pixels_of_the_same_images_are_flagged():
    other = on("sre2l", data_sha256="0" * 64)
    files = [stored(record("guard")), stored(record("mine")), stored(other)]
    (rows,) = [build_leaderboard(files, TOY, 10)["tracks"]["soft"]]
    flags = {row["method"]["name"]: row["flags"] for row in rows}
    assert flags["guard"] == flags["mine"] == list(GUARD.flags)
    assert flags["sre2l"] == [*GUARD.flags, OTHER_PIXELS]
    # Of one each, those of the first path are the usual ones.
    (rows,) = [
        build_leaderboard([stored(other), stored(record("guard"))], TOY, 10)["tracks"]["soft"]
    ]
    assert [row["method"]["name"] for row in rows if OTHER_PIXELS in row["flags"]] == ["sre2l"]


# --- the commands


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_build_then_check(checkout):
    assert call("check", "--root", checkout).exit_code == 1
    built = call("build", "--root", checkout)
    assert built.exit_code == 0
    assert "wrote leaderboards/toy/ipc10.json" in built.output
    again = call("build", "--root", checkout)
    assert again.output == "nothing to do: 7 files are up to date\n"
    checked = call("check", "--root", checkout)
    assert (checked.exit_code, checked.output) == (0, "ok: 7 files are what the records give\n")


@pytest.mark.parametrize("name", ["toy/ipc10.json", "index.json", "record.schema.json"])
def test_check_sees_one_changed_byte(checkout, name):
    call("build", "--root", checkout)
    path = checkout / "leaderboards" / name
    content = bytearray(path.read_bytes())
    for at in random.Random(0).sample(range(len(content)), 5):
        changed = bytearray(content)
        changed[at] ^= 1
        path.write_bytes(changed)
        result = call("check", "--root", checkout)
        assert result.exit_code == 1
        assert f"--- leaderboards/{name} (found)" in result.output
        assert "+++ " in result.output
    path.write_bytes(content)
    assert call("check", "--root", checkout).exit_code == 0


def test_check_shows_the_line_that_differs(checkout):
    call("build", "--root", checkout)
    path = checkout / "leaderboards/toy/ipc10.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"mean": 83.3333', '"mean": 93.3333', 1), encoding="utf-8")
    lines = call("check", "--root", checkout).output.splitlines()
    assert any(line.startswith("-") and line.endswith('"mean": 93.3333,') for line in lines)
    assert any(line.startswith("+") and line.endswith('"mean": 83.3333,') for line in lines)


def test_check_sees_a_change_of_line_ends_and_of_the_last_newline(checkout):
    call("build", "--root", checkout)
    path = checkout / "leaderboards/index.json"
    text = path.read_bytes()
    for changed in (text.replace(b"\n", b"\r\n"), text.rstrip(b"\n"), text + b"\n"):
        path.write_bytes(changed)
        assert call("check", "--root", checkout).exit_code == 1


def test_a_hostile_board_cannot_write_on_the_terminal(checkout):
    call("build", "--root", checkout)
    path = checkout / "leaderboards/toy/ipc10.json"
    path.write_bytes(b"\x1b[2J\xff\r" + path.read_bytes())
    result = call("check", "--root", checkout)
    assert result.exit_code == 1
    assert r"-\x1b[2J\xff\r{" in result.output
    assert all(line.isprintable() for line in result.output.split("\n"))
    path.write_bytes(b"\n" * 10_000)
    lines = differences(checkout, rebuild(checkout), limit=50)
    assert len(lines) == 51
    assert lines[-1].startswith("... ")


def test_missing_and_extra_boards_are_told_and_mended(checkout):
    call("build", "--root", checkout)
    (checkout / "leaderboards/toy/ipc1.json").unlink()
    extra = checkout / "leaderboards/gone/ipc50.json"
    extra.parent.mkdir()
    extra.write_text("{}", encoding="utf-8")
    ours = checkout / "leaderboards/toy/README.md"
    ours.write_text("kept", encoding="utf-8")
    other = ours.with_name("notes.json")
    other.write_text("{}", encoding="utf-8")
    output = call("check", "--root", checkout).output
    assert "missing: leaderboards/toy/ipc1.json\n" in output
    assert "extra: leaderboards/gone/ipc50.json: no record supports it\n" in output
    built = call("build", "--root", checkout).output
    assert "removed leaderboards/gone/ipc50.json: no record supports it\n" in built
    assert "wrote leaderboards/toy/ipc1.json\n" in built
    assert not extra.parent.exists()
    assert ours.exists()
    assert other.exists()
    assert call("check", "--root", checkout).exit_code == 0


def test_the_checkout_is_found_from_a_folder_inside(checkout, monkeypatch):
    inside = checkout / "baselines/guard"
    monkeypatch.chdir(inside)
    assert call("build").exit_code == 0
    assert (checkout / "leaderboards/index.json").is_file()


def test_a_root_without_baselines_is_one_line(tmp_path, monkeypatch):
    result = call("check", "--root", tmp_path)
    assert isinstance(result.exception, GuardbenchError)
    assert "no baselines/ folder" in str(result.exception)
    monkeypatch.chdir(tmp_path)
    result = call("build")
    assert "no baselines/ folder" in str(result.exception)
    assert list(tmp_path.iterdir()) == []


def test_every_help_has_an_example():
    for arguments in ([], ["build"], ["check"], ["diff"], ["assess"]):
        output = call(*arguments, "--help").output
        assert "Example: guardbench leaderboard" in " ".join(output.split())
    assert "Example: guardbench show" in show.__doc__


def test_nothing_here_loads_torch_and_help_loads_no_pydantic():
    code = (
        "import sys, guardbench.cli.leaderboard, guardbench.cli.show\n"
        "assert 'pydantic' not in sys.modules\n"
        "import guardbench.report, guardbench.leaderboard, guardbench.board_diff\n"
        "heavy = {'torch', 'numpy', 'scipy', 'guardbench.protocol'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("path", record_paths(methods_folder(), "*/results/*/*.json"), ids=str)
def test_every_stage_of_a_record_is_of_distillation_or_of_evaluation(path: Path) -> None:
    record = load_record(path)
    named = {re.split(r"[\s:/]", cost.stage)[0] for cost in record.cost}
    distilling = named - EVALUATION_STAGES - set(record.attack_names)
    selecting = {"random", "herding", "k-center", "full"}
    assert distilling <= selecting | {
        "squeeze", "recover", "relabel", "match", "expert", "submission"
    }  # fmt: skip
