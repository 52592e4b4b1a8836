"""Later evaluations: a row can only fall, its history says why, and what does not fit is refused."""

import json
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from guardbench import leaderboard, reassessment
from guardbench.cli.leaderboard import app
from guardbench.errors import GuardbenchError
from guardbench.leaderboard import rebuild
from guardbench.ranking import build_leaderboard
from guardbench.reassessment import (
    Assessment,
    AssessmentFile,
    assessed_path,
    assessment_path,
    load_assessment,
    refusal,
    save_assessment,
)
from guardbench.record_files import save_record
from guardbench.records import Classifier, ClassifierRecord, Outcome
from guardbench.threat import ThreatModel
from tests.unit.test_leaderboard import TOY, places, record, replace, stored

# Seed k has 10 of its 20 images right under AutoAttack: 20 k to 20 k + 9.
OWN = record(clean=50, pgd=30, aa=10)
LINF = ThreatModel("linf", Fraction(1, 255))
BOARD = Path("leaderboards/toy/ipc10.json")


def seen(wrong, *, first=0, total=20, own=50, **changes):
    """What an attack leaves of the images `first` on: those that are right without, but for `wrong`."""
    flags = [i < own and i not in wrong for i in range(first, first + total)]
    return Outcome.from_flags(flags, first=first, **{"max_distance": 1 / 255, **changes})


def later(outcomes, date="2026-11-23", **changes):
    words = {
        "result_sha256": OWN.result_sha256,
        "attack": "a longer search",
        "made_by": "A. Reader",
        "date": date,
        "source": "https://example.org/runs/7",
        "seeds": [{"seed": seed, "outcome": outcome} for seed, outcome in outcomes.items()],
    }
    return Assessment(**{**words, **changes})


def row_of(*assessments, own=OWN, protocol=TOY):
    files = [
        AssessmentFile(f"baselines/guard/assessments/toy/ipc10.{word}.json", word * 64, each)
        for word, each in zip("abcdef", assessments, strict=False)
    ]
    board = build_leaderboard([replace(stored(own), assessments=tuple(files))], protocol, 10)
    (row,) = board["tracks"]["soft"]
    return row


# --- what it does


def test_a_row_falls_and_keeps_its_earlier_value():
    plain, row = row_of(), row_of(later({0: seen({0, 1})}))
    assert plain["ranked"]["per_seed"] == [50, 50, 50]
    assert plain["history"] == []
    assert row["ranked"]["per_seed"] == [40, 50, 50]
    assert row["ranked"]["mean"] == 46.6667
    assert row["worst_case"]["per_seed"] == [40, 50, 0]
    assert row["ranked"]["max_distance"] == 0.003922
    assert row["history"] == [
        {
            "ranked": plain["ranked"],
            "reason": "2026-11-23: A. Reader broke 2 images that stood, with a longer search "
            "(https://example.org/runs/7)",
            "source": {"path": "baselines/guard/assessments/toy/ipc10.a.json", "sha256": "a" * 64},
        }
    ]
    # What the protocol's own attacks measured stays.
    same = ("clean", "attacks", "record", "cost", "flags")
    assert {name: row[name] for name in same} == {name: plain[name] for name in same}


def test_only_images_that_the_row_measured_can_fall():
    # Student 1's images under AutoAttack are 20 to 39; PGD-100 has 0 to 29 right.
    row = row_of(later({1: seen({3, 25}, total=60)}))
    assert row["ranked"]["per_seed"] == [50, 45, 50]
    by_pgd = row_of(later({1: seen({3, 25}, total=60)}), protocol=replace(TOY, rank_by="pgd-100"))
    assert by_pgd["ranked"]["per_seed"] == [50, 46.6667, 50]
    assert "broke 2 images" in by_pgd["history"][0]["reason"]
    assert by_pgd["worst_case"]["per_seed"] == [50, 45, 0]


def test_a_part_of_the_images_tells_nothing_of_the_others():
    row = row_of(later({0: seen({9}, first=8, total=2)}))
    assert row["ranked"]["per_seed"] == [45, 50, 50]
    assert "broke 1 image that stood" in row["history"][0]["reason"]


def test_what_lowers_nothing_is_on_no_board():
    assert row_of(later({0: seen(()), 2: seen({30}, total=60)})) == row_of()


def test_history_is_in_the_order_of_dates_and_holds_what_lowered():
    assessments = [
        later({0: seen({0, 5})}, "2026-11-25"),
        later({0: seen({0})}, "2026-11-24"),
        later({0: seen({5})}, "2026-11-26"),
    ]
    row = row_of(*assessments)
    assert [past["ranked"]["per_seed"][0] for past in row["history"]] == [50, 45]
    assert [past["source"]["sha256"][0] for past in row["history"]] == ["b", "a"]
    assert row["ranked"]["per_seed"] == [40, 50, 50]


def test_where_only_the_worst_case_falls_the_history_says_so():
    # Ranked by an attack without a bound, which has broken image 0 already.
    cw = replace(TOY, rank_by="cw")
    own = record(clean=50, pgd=30, aa=10, cw=0)
    row = row_of(later({0: seen({0})}, result_sha256=own.result_sha256), own=own, protocol=cw)
    (past,) = row["history"]
    assert past["ranked"] == row["ranked"]
    assert row["ranked"]["bounded"] is False
    assert row["worst_case"]["per_seed"] == [45, 50, 0]


def test_a_lowered_row_gives_way():
    strong = stored(record("sre2l", clean=60, aa=20))
    files = [stored(OWN), replace(strong, record=record("sre2l", clean=60, aa=20))]
    assert places(build_leaderboard(files, TOY, 10)) == [("sre2l", 1), ("guard", 2)]
    broken = {k: seen(range(60), first=20 * k, own=60) for k in range(3)}
    fall = later(broken, result_sha256=strong.record.result_sha256)
    files[1] = replace(files[1], assessments=(AssessmentFile("a.json", "0" * 64, fall),))
    board = build_leaderboard(files, TOY, 10)
    assert places(board) == [("guard", 1), ("sre2l", 2)]
    assert board["tracks"]["soft"][1]["ranked"]["mean"] == 0
    assert board["tracks"]["soft"][1]["history"][0]["ranked"]["mean"] == 100


def test_an_assessment_of_a_copy_lowers_the_row_that_stays():
    copy = replace(stored(OWN), path="baselines/guard/results/z.json")
    file = AssessmentFile("baselines/guard/assessments/z.x.json", "0" * 64, later({0: seen({0})}))
    board = build_leaderboard([stored(OWN), replace(copy, assessments=(file,))], TOY, 10)
    (row,) = board["tracks"]["soft"]
    assert row["record"]["path"] == stored(OWN).path
    assert row["ranked"]["per_seed"] == [45, 50, 50]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 59), st.sets(st.integers(0, 59), max_size=9)),
        min_size=1,
        max_size=3,
    ),
    st.permutations(range(3)),
    st.sampled_from(["autoattack", "pgd-100", "worst_case"]),
)
def test_a_row_never_rises_and_ends_the_same_in_any_order(found, order, rank_by):
    assessments = [
        later({seed: seen(wrong, first=first, total=60 - first)}) for seed, first, wrong in found
    ]
    protocol = replace(TOY, rank_by=rank_by)
    row = row_of(*assessments, protocol=protocol)
    values = [*(past["ranked"]["mean"] for past in row["history"]), row["ranked"]["mean"]]
    assert values[0] == row_of(protocol=protocol)["ranked"]["mean"]
    assert values == sorted(values, reverse=True)
    assert row["worst_case"]["mean"] <= row_of()["worst_case"]["mean"]
    shuffled = [assessments[k] for k in order if k < len(assessments)]
    again = row_of(*shuffled, protocol=protocol)
    assert (again["ranked"], again["worst_case"]) == (row["ranked"], row["worst_case"])


# --- what is refused


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (later({0: seen(())}, result_sha256="0" * 64), "result_sha256: of the result 000000000000"),
        (later({3: seen(())}), "seeds.0.seed: 3, the record has 0, 1, 2; name one"),
        (
            later({0: seen(()), 1: seen((), max_distance=0.00393)}),
            "seeds.1.outcome.max_distance: 0.00393 is outside the threat model, linf 1/255",
        ),
        (
            later({0: seen((), first=41)}),
            "seeds.0.outcome: images 41 to 60, the record measures 0 to 59; leave",
        ),
        (
            later({0: seen((), first=40, own=51)}),
            "seeds.0.outcome.bits: image 50 is right under the attack and wrong without it",
        ),
    ],
)
def test_what_does_not_fit_the_record_is_refused_by_field(made, said):
    reason = refusal(made, OWN, LINF)
    assert reason is not None
    assert reason.startswith(said)
    with pytest.raises(GuardbenchError) as caught:
        row_of(made)
    assert str(caught.value) == f"baselines/guard/assessments/toy/ipc10.a.json: {reason}"


@pytest.mark.parametrize(
    ("norm", "eps", "allowed"),
    [
        # Two float32 steps; where lengths are sums also a hundred-thousandth, over 3 x 32 x 32 values.
        ("linf", Fraction(1, 255), 1 / 255 + 2 * 2**-23),
        ("l2", Fraction(1, 2), 0.5 + 0.5e-5 + 2 * 2**-23 * 3072**0.5),
        ("l1", Fraction(12), 12 + 12e-5 + 2 * 2**-23 * 3072),
    ],
)
def test_the_radius_is_the_threats_up_to_rounding(norm, eps, allowed):
    threat = ThreatModel(norm, eps)
    assert refusal(later({0: seen((), max_distance=allowed * (1 - 1e-12))}), OWN, threat) is None
    beyond = later({0: seen((), max_distance=allowed * (1 + 1e-9))})
    assert "outside the threat model" in str(refusal(beyond, OWN, threat))


GOOD = later({0: seen({0})}).model_dump(mode="json")


def changed(**words):
    return {**GOOD, **words}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (changed(schema_version=2), "schema_version: made by a newer guardbench"),
        (changed(schema_version=None), "schema_version: must be an integer"),
        (changed(surprise=1), "surprise: there is no such field"),
        (changed(result_sha256="x"), "result_sha256: "),
        (changed(attack="a\nb"), "attack: "),
        (changed(made_by="\u202ea"), "made_by: "),
        (changed(source=""), "source: "),
        (changed(date="2026-02-30"), "date: "),
        (changed(date="20261123"), "date: "),
        (changed(seeds=[]), "seeds: "),
        (changed(seeds=GOOD["seeds"] * 2), "seeds: a seed stands twice"),
        (
            changed(
                seeds=[{"seed": 0, "outcome": {**GOOD["seeds"][0]["outcome"], "bounded": False}}]
            ),
            "seeds: the attack on seed 0 is not held inside the threat model",
        ),
        (
            changed(seeds=[{"seed": 0, "outcome": {**GOOD["seeds"][0]["outcome"], "correct": 10}}]),
            "seeds.0.outcome: correct: 10, but 19 bits are set",
        ),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, words, said):
    path = tmp_path / "ipc10.x.json"
    path.write_text(json.dumps(words), encoding="utf-8")
    with pytest.raises(GuardbenchError) as caught:
        load_assessment(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: not a valid assessment: {said}")
    assert line.isprintable()


def test_what_is_saved_is_read_again(tmp_path):
    made = later({0: seen({0}), 2: seen({40}, first=40)})
    save_assessment(tmp_path / "ipc10.x.json", made)
    assert load_assessment(tmp_path / "ipc10.x.json") == made


# --- in a checkout


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(leaderboard, "_load_protocol", lambda _: TOY)
    save_record(tmp_path / "baselines/guard/results/toy/ipc10.v1.json", OWN)
    return tmp_path


def test_paths_of_records_and_assessments_lead_to_each_other():
    own = Path("baselines/guard/results/toy/deep/ipc10.v1.json")
    made = assessment_path(own, "long-1")
    assert made.as_posix() == "baselines/guard/assessments/toy/deep/ipc10.v1.long-1.json"
    assert assessed_path(made.as_posix()) == own.as_posix()
    assert assessed_path("baselines/guard/assessments/toy/ipc10.json") is None
    for word in ("", "a.b", "../x", "A", "x" * 65):
        with pytest.raises(GuardbenchError, match="--word"):
            assessment_path(own, word)
    with pytest.raises(GuardbenchError, match="not in a results/ folder"):
        assessment_path(Path("records/toy/ipc10/results"), "x")


def test_an_assessment_lowers_the_row_of_its_record(checkout):
    before = json.loads(rebuild(checkout)[BOARD])["tracks"]["soft"][0]
    path = checkout / "baselines/guard/assessments/toy/ipc10.v1.long.json"
    save_assessment(path, later({0: seen({0})}))
    row = json.loads(rebuild(checkout)[BOARD])["tracks"]["soft"][0]
    assert row["ranked"]["per_seed"] == [45, 50, 50]
    assert row["history"][0]["ranked"] == before["ranked"]
    assert row["history"][0]["source"]["path"] == path.relative_to(checkout).as_posix()
    assert row["record"] == before["record"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("toy/ipc10.long.json", "(baselines/guard/results/toy/ipc10.json)"),
        ("ipc10.v1.long.json", "(baselines/guard/results/ipc10.v1.json)"),
        ("toy/long.json", "(NAME.WORD.json where the record is NAME.json)"),
    ],
)
def test_an_assessment_of_no_record_is_refused(checkout, name, said):
    path = checkout / "baselines/guard/assessments" / name
    save_assessment(path, later({0: seen({0})}))
    with pytest.raises(GuardbenchError, match="no record that it could be of") as caught:
        rebuild(checkout)
    assert str(caught.value).startswith(path.relative_to(checkout).as_posix())
    assert said in str(caught.value)


def test_a_record_made_again_does_not_shed_its_assessment(checkout):
    path = checkout / "baselines/guard/assessments/toy/ipc10.v1.long.json"
    save_assessment(path, later({0: seen({0})}))
    save_record(checkout / "baselines/guard/results/toy/ipc10.v1.json", record(clean=51))
    with pytest.raises(
        GuardbenchError, match=r"ipc10\.v1\.long\.json: result_sha256: of the result"
    ):
        rebuild(checkout)


def test_a_link_out_of_the_checkout_is_refused(checkout, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "x.json"
    save_assessment(outside, later({0: seen({0})}))
    path = checkout / "baselines/guard/assessments/toy/ipc10.v1.long.json"
    path.parent.mkdir(parents=True)
    path.symlink_to(outside)
    with pytest.raises(GuardbenchError, match=r"long\.json: not a plain file inside"):
        rebuild(checkout)


# --- the command


def unlike(own):
    """The record with students that differ in their clean verdicts, as real ones do."""
    words = own.model_dump()
    for k, run in enumerate(words["seeds"]):
        flags = [i < 50 or i == 51 + k for i in range(60)]
        run["clean"] = Outcome.from_flags(flags).model_dump()
    return type(own)(**words)


STUDENTS = unlike(OWN)


def classifier(position, wrong, *, own=STUDENTS, **changes):
    """What `evaluate` writes of the record's student at a position, attacked anew."""
    run = own.seeds[position]
    attacks = {"pgd-100": seen(wrong, total=60), "cw": run.attacks["cw"]}
    found = run.model_copy(update={"seed": 7, "attacks": attacks})
    words = own.model_dump(exclude={"method", "artifact", "ipc", "overrides"})
    described = Classifier(
        name=f"student-{position}", arch="x", weights_sha256=None, weights="x",
        normalisation="none", parameters=1,
    )  # fmt: skip
    return ClassifierRecord(**{**words, "seeds": [found], "classifier": described, **changes})


def call(folder, *records, **options):
    paths = []
    for number, made in enumerate(records):
        save_record(folder / f"{number}.json", made)
        paths.append(str(folder / f"{number}.json"))
    words = {"attack": "pgd-100", "by": "A. Reader", "source": "a run", "date": "2026-11-23"}
    flags = [part for key, value in {**words, **options}.items() for part in (f"--{key}", value)]
    own = folder / "baselines/guard/results/toy/ipc10.v1.json"
    return CliRunner().invoke(app, ["assess", str(own), *paths, *flags])


@pytest.fixture
def students(checkout):
    save_record(checkout / "baselines/guard/results/toy/ipc10.v1.json", STUDENTS)
    return checkout


def test_the_command_lowers_the_row_of_the_students_it_knows(students):
    # Given in another order than the record's, and with the attack's seed, not the student's.
    result = call(students, classifier(2, {41}), classifier(0, {0, 1, 30}))
    assert result.exit_code == 0, result.output
    path = students / "baselines/guard/assessments/toy/ipc10.v1.pgd-100.json"
    assert "now run `guardbench leaderboard build`" in result.output
    made = load_assessment(path)
    assert [each.seed for each in made.seeds] == [0, 2]
    assert made.attack == "pgd-100 of protocol toy, guardbench 0.1.0"
    assert made.result_sha256 == STUDENTS.result_sha256
    row = json.loads(rebuild(students)[BOARD])["tracks"]["soft"][0]
    assert row["ranked"]["per_seed"] == [40, 50, 45]
    again = call(students, classifier(2, {41}))
    assert "is there already" in str(again.exception)
    assert call(students, classifier(2, {41}), word="second").exit_code == 0


def test_the_command_refuses_what_it_cannot_place(students):
    for records, options, said in (
        ([classifier(0, ()), classifier(0, {1})], {}, "student 0 is given twice"),
        ([classifier(0, ())], {"attack": "cw"}, "--attack cw: student-0 has the bounded attacks pgd-100"),
        ([classifier(0, ())], {"attack": "fgsm"}, "--attack fgsm: student-0 has the bounded"),
        ([classifier(0, (), protocol_sha256="0" * 64)], {}, "measured under toy (000000000000)"),
        ([classifier(0, (), test={**OWN.test.model_dump(), "data_sha256": "0" * 64})], {}, "same images"),
        ([OWN], {}, "no record of a classifier"),
        ([classifier(0, ())], {"date": "soon"}, "the assessment: date: "),
        ([classifier(0, ())], {"by": "a\nb"}, "the assessment: made_by: "),
        ([classifier(0, ())], {"word": "../x"}, "--word ../x: "),
    ):  # fmt: skip
        result = call(students, *records, **options)
        assert isinstance(result.exception, GuardbenchError), result.output
        assert said in str(result.exception)
        assert "\n" not in str(result.exception)
    assert not (students / "baselines/guard/assessments").exists()


def test_students_that_cannot_be_told_apart_are_refused(checkout):
    alike = classifier(0, (), own=OWN)
    result = call(checkout, alike)
    assert "3 students of the record are nearest to it, 0 of 60 clean verdicts away" in str(
        result.exception
    )
    result = call(checkout, classifier(0, ()))
    assert "3 students of the record are nearest to it, 1 of 60 clean verdicts away" in str(
        result.exception
    )


def test_a_student_is_known_though_another_machine_rounds_an_image_otherwise(students, monkeypatch):
    """An image that is wrong in the record without attack stays so under it."""
    monkeypatch.setattr(reassessment, "SAME_STUDENT", 1 / 60)
    found = classifier(1, {0, 1})
    run = found.seeds[0]
    clean = run.clean.flags()
    assert not clean[55]
    clean[55] = True
    left = [i == 55 or (2 <= i < 50) for i in range(60)]
    attacks = {**run.attacks, "pgd-100": Outcome.from_flags(left, max_distance=1 / 255)}
    run = run.model_copy(update={"clean": Outcome.from_flags(clean), "attacks": attacks})
    result = call(students, found.model_copy(update={"seeds": (run,)}))
    assert result.exit_code == 0, result.exception
    made = load_assessment(students / "baselines/guard/assessments/toy/ipc10.v1.pgd-100.json")
    assert [each.seed for each in made.seeds] == [1]
    assert not made.seeds[0].outcome.flags()[55]
    assert sum(made.seeds[0].outcome.flags()) == 48
    monkeypatch.setattr(reassessment, "SAME_STUDENT", 0.5 / 60)
    result = call(students, found.model_copy(update={"seeds": (run,)}), word="second")
    assert "nearest to it, 1 of 60 clean verdicts away" in str(result.exception)


def test_an_attack_on_the_images_of_another_student_is_refused(students):
    """It could lower nothing: the row of the second student rests on its own images."""
    found = classifier(1, ())
    run = found.seeds[0]
    attacks = {**run.attacks, "autoattack": seen({1, 2}, total=20)}
    run = run.model_copy(update={"attacks": attacks})
    result = call(students, found.model_copy(update={"seeds": (run,)}), attack="autoattack")
    assert "autoattack was measured on images 0 to 19" in str(result.exception)
    assert "student 1 rests on 20 to 39; evaluate it with --student 1." in str(result.exception)
