import json
import math
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from guardbench import canonical, migrations, record_files, records
from guardbench.errors import GuardbenchError
from guardbench.record_files import load_record, save_record
from guardbench.records import Outcome, ResultRecord, SeedRun

GOLDEN = Path(__file__).parents[1] / "golden" / "record-v5.json"


def words():
    """The golden record as JSON words, to be bent."""
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


def write(folder, value):
    path = folder / "record.json"
    text = value if isinstance(value, str) else json.dumps(value)
    path.write_text(text, encoding="utf-8")
    return path


def bent(*keys, to):
    value = words()
    inner = value
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = to
    return value


def refused(folder, value):
    with pytest.raises(GuardbenchError) as caught:
        load_record(write(folder, value))
    line = str(caught.value)
    assert "\n" not in line
    assert line.isprintable()
    assert line.startswith(str(folder / "record.json"))
    assert "run it again" in line
    return line


# --- outcomes


def test_bits_are_most_significant_first_and_padded_to_bytes():
    outcome = Outcome.from_flags([True] + [False] * 7 + [False, True, True], first=5)
    assert outcome.bits == "8060"
    assert (outcome.first, outcome.total, outcome.correct, outcome.end) == (5, 11, 3, 16)


@given(st.lists(st.booleans(), min_size=1, max_size=200), st.integers(0, 1000))
def test_flags_survive_the_round_trip(flags, first):
    outcome = Outcome.from_flags(flags, first=first)
    assert outcome.flags() == flags
    assert outcome.correct == sum(flags)
    assert len(outcome.bits) == 2 * math.ceil(len(flags) / 8)
    assert Outcome.model_validate_json(outcome.model_dump_json(), strict=True) == outcome


def test_an_outcome_of_no_image_is_refused():
    with pytest.raises(ValidationError, match="total"):
        Outcome.from_flags([])


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("correct", 2, "correct: 2, but 3 bits are set"),
        ("correct", 12, "12 of only 11 images"),
        ("correct", -1, "greater than or equal to 0"),
        ("bits", "80", "11 images need 4"),
        ("bits", "806000", "11 images need 4"),
        ("bits", "8070", "padding|4 bits"),
        ("bits", "8048", "bits are set|padding"),
        ("bits", "80 6", "pattern"),
        ("bits", "0x80", "pattern"),
        ("bits", "8A60", "pattern"),
        ("first", -1, "greater than or equal to 0"),
        ("max_distance", -0.1, "greater than or equal to 0"),
        ("max_distance", math.nan, "finite"),
        ("max_distance", math.inf, "finite"),
        ("surprise", 1, "not permitted"),
    ],
)
def test_a_contradictory_outcome_is_refused(field, value, said):
    good = {"first": 0, "total": 11, "correct": 3, "bits": "8060"}
    Outcome(**good)
    with pytest.raises(ValidationError, match=said):
        Outcome(**{**good, field: value})


def test_padding_is_refused_even_when_the_count_agrees():
    with pytest.raises(ValidationError, match="padding"):
        Outcome(first=0, total=11, correct=3, bits="8050")


@given(
    st.lists(st.booleans(), min_size=1, max_size=40).flatmap(
        lambda clean: st.tuples(
            st.just(clean),
            st.lists(st.booleans(), min_size=1, max_size=len(clean)),
            st.integers(0, len(clean) + 3),
        )
    )
)
def test_robust_never_exceeds_clean_on_any_image(case):
    clean, robust, first = case
    attack = Outcome.from_flags(robust, first=first)
    inside = first + len(robust) <= len(clean)
    honest = inside and all(clean[first + i] for i, right in enumerate(robust) if right)
    try:
        SeedRun(seed=0, clean=Outcome.from_flags(clean), attacks={"pgd": attack})
    except ValidationError as error:
        said = str(error)
    else:
        said = ""
    assert bool(said) is not honest
    assert honest or ("robust exceeds clean" if inside else "among the clean") in said


def test_the_ranges_are_compared_from_where_clean_begins():
    clean = Outcome.from_flags([True, False, True], first=10)
    SeedRun(seed=0, clean=clean, attacks={"pgd": Outcome.from_flags([True], first=12)})
    with pytest.raises(ValidationError, match="image 11 is right under the attack"):
        SeedRun(seed=0, clean=clean, attacks={"pgd": Outcome.from_flags([True], first=11)})
    with pytest.raises(ValidationError, match="among the clean"):
        SeedRun(seed=0, clean=clean, attacks={"pgd": Outcome.from_flags([False], first=9)})


# --- files


# What version 4 adds, the golden one holds, and so it is another result; version 5 adds to a cost.
DIGESTS = dict.fromkeys(
    (1, 2, 3), "a842b6fbe4b125ff7aadc5b420213260898f7b2a3301ccf8234091da71b7444b"
) | dict.fromkeys((4, 5), "1f0a2706585d95a9cdfc9c62196368225493ee4c65c43a0329fff28de1633bc4")


@pytest.mark.parametrize("version", DIGESTS)
def test_the_golden_record_of_every_version_loads_for_ever(version):
    record = load_record(GOLDEN.with_name(f"record-v{version}.json"))
    assert record.result_sha256 == DIGESTS[version]
    assert [run.clean.correct for run in record.seeds] == [51, 60, 60]
    assert record.provenance.engines == {
        "autoattack": "reference" if version == 1 else "guardbench"
    }
    assert record.tier == "official"


def test_saving_gives_the_golden_bytes(tmp_path):
    save_record(tmp_path / "a.json", load_record(GOLDEN))
    assert (tmp_path / "a.json").read_bytes() == GOLDEN.read_bytes()


@st.composite
def result_records(draw):
    total = draw(st.integers(1, 30))
    names = draw(st.sets(st.from_regex(r"\A[a-z][a-z0-9-]{0,9}\Z"), min_size=1, max_size=4))
    names -= set(records.RESERVED)
    bounded = {name: draw(st.booleans()) for name in sorted(names) or ["pgd"]}
    runs = []
    for seed in draw(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=4, unique=True)):
        clean = draw(st.lists(st.booleans(), min_size=total, max_size=total))
        attacks = {}
        for name, held in bounded.items():
            first = draw(st.integers(0, total - 1))
            keep = draw(st.lists(st.booleans(), min_size=1, max_size=total - first))
            attacks[name] = Outcome.from_flags(
                [k and clean[first + i] for i, k in enumerate(keep)],
                first=first,
                bounded=held,
                max_distance=draw(st.floats(0, 100)),
            )
        runs.append(SeedRun(seed=seed, clean=Outcome.from_flags(clean), attacks=attacks))
    value = words()
    value["seeds"] = [run.model_dump() for run in runs]
    value["test"]["total"] = total
    value["ipc"] = draw(st.integers(1, 100))
    title = st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=50)
    value["method"]["title"] = draw(title)
    value["cost"][0]["seconds"] = draw(st.floats(0, 1e9))
    return ResultRecord.model_validate(value)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(result_records())
def test_any_record_survives_the_file(tmp_path_factory, record):
    folder = tmp_path_factory.mktemp("records")
    save_record(folder / "a.json", record)
    again = load_record(folder / "a.json")
    assert again == record
    assert again.result_sha256 == record.result_sha256
    save_record(folder / "b.json", again)
    assert (folder / "a.json").read_bytes() == (folder / "b.json").read_bytes()


def test_the_result_digest_ignores_what_a_resume_changes_and_nothing_else():
    record = load_record(GOLDEN)
    other = record.model_dump()
    other["cost"] = other["cost"][:1]
    other["provenance"]["device"] = "elsewhere"
    assert ResultRecord(**other).result_sha256 == record.result_sha256
    ignored = {"cost", "provenance", "schema_version"}
    changed = {
        "protocol": "other",
        "protocol_sha256": "0" * 64,
        "dataset": "other",
        "resolution": 31,
        "ipc": 11,
        "method": {**record.method.model_dump(), "official": False},
        "artifact": {**record.artifact.model_dump(), "label_bytes": 1},
        "test": {**record.test.model_dump(), "total": 61},
        "seeds": record.seeds[:2],
        "flags": (),
        "tier": "dev",
    }
    assert changed.keys() | ignored | {"overrides"} == set(ResultRecord.model_fields)
    own = {**record.model_dump(), "method": changed["method"]}
    said = ResultRecord(**{**own, "overrides": ("squeeze.epochs=5",)})
    assert said.result_sha256 != ResultRecord(**own).result_sha256
    with pytest.raises(ValidationError, match="overrides: settings were changed"):
        ResultRecord(**{**record.model_dump(), "overrides": ("squeeze.epochs=5",)})
    for field, value in changed.items():
        bent_record = ResultRecord(**{**record.model_dump(), field: value})
        assert bent_record.result_sha256 != record.result_sha256, field


def test_a_record_bent_after_it_was_made_is_not_saved(tmp_path):
    record = load_record(GOLDEN).model_copy(update={"ipc": -1})
    with pytest.raises(ValidationError, match="ipc"):
        save_record(tmp_path / "a.json", record)
    assert list(tmp_path.iterdir()) == []


CHANGES = [
    (("seeds",), [], "seeds: "),
    (("ipc",), "10", "ipc: "),
    (("ipc",), True, "ipc: "),
    (("ipc",), 10.5, "ipc: "),
    (("ipc",), 0, "ipc: "),
    (("flags",), ["a", "a"], "flags: a flag stands twice"),
    (("protocol",), "../../etc", "protocol: "),
    (("protocol",), ".hidden", "protocol: "),
    (("protocol_sha256",), "A" * 64, "protocol_sha256: "),
    (("dataset",), "", "dataset: "),
    (("resolution",), -1, "resolution: "),
    (("artifact", "label_kind"), "fuzzy", "artifact.label_kind: "),
    (("artifact", "image_bytes"), -1, "artifact.image_bytes: "),
    (("cost", 0, "seconds"), -1.0, "cost.0.seconds: "),
    (("cost", 0, "seconds"), math.nan, "cost.0.seconds: "),
    (("cost", 0, "seconds"), math.inf, "cost.0.seconds: "),
    (("cost", 0, "peak_memory_bytes"), -1, "cost.0.peak_memory_bytes: "),
    (("method", "title"), "\x1b[31mred", "method.title: "),
    (("method", "title"), "two\nlines", "method.title: "),
    (("method", "title"), "new\n", "method.title: "),
    (("method", "title"), "\u202eback", "method.title: "),
    (("method", "title"), "\x9bcsi", "method.title: "),
    (("method", "title"), "x" * 201, "method.title: "),
    (("method", "title"), "\ud800", "JSON"),
    (("method", "name"), "Guard Two", "method.name: "),
    (("method", "name"), "guard\n", "method.name: "),
    (("method", "\x1b[31mred"), 1, "method.\\x1b[31mred: "),
    (("flags",), ["\x1b]0;title\x07"], "flags.0: "),
    (("provenance", "versions"), {"\x1b[2J": "1"}, "provenance.versions: \\x1b[2J"),
    (("provenance", "device"), "cpu\rgpu", "provenance.device: "),
    (("provenance", "threads"), 0, "provenance.threads: "),
    (("seeds", 1, "seed"), 0, "a seed stands twice"),
    (("seeds", 1, "seed"), -1, "seeds.1.seed: "),
    (("seeds", 0, "attacks"), {}, "seeds.0.attacks: "),
    (("seeds", 0, "clean", "max_distance"), 0.1, "nothing was perturbed"),
    (("seeds", 0, "clean", "correct"), 1, "bits are set"),
    (("seeds", 2, "attacks", "cw", "bounded"), True, "bounded for one seed"),
    (("test", "total"), 59, "measures image 59 of a list of 59"),
    (("tier",), "almost", "tier: "),
    (("schema_version",), 6, "made by a newer guardbench"),
    (("schema_version",), "1", "schema_version: must be an integer"),
    (("schema_version",), True, "schema_version: must be an integer"),
    (("schema_version",), 0, "schema_version: must be an integer"),
    (("schema_version",), 10**30, "made by a newer guardbench"),
]


@pytest.mark.parametrize(("keys", "value", "said"), CHANGES, ids=lambda v: repr(v)[:40])
def test_a_wrong_field_is_named(tmp_path, keys, value, said):
    assert said in refused(tmp_path, bent(*keys, to=value))


@pytest.mark.parametrize("name", ["clean", "worst_case", "PGD", "p gd", "", "a/b", "\x1b[31m"])
def test_an_attack_has_a_plain_name(tmp_path, name):
    value = words()
    for run in value["seeds"]:
        run["attacks"][name] = run["attacks"].pop("cw")
    assert "seeds.0.attacks" in refused(tmp_path, value)


def test_every_field_is_needed(tmp_path):
    for field in set(words()) - {"flags"}:
        value = words()
        del value[field]
        assert f"{field}: " in refused(tmp_path, value)


def test_different_attacks_for_different_seeds_are_refused(tmp_path):
    value = words()
    del value["seeds"][1]["attacks"]["cw"]
    assert "not attacked by the same attacks (cw)" in refused(tmp_path, value)


def test_robust_above_clean_is_told_by_image(tmp_path):
    value = words()
    run = value["seeds"][0]
    flags = Outcome(**run["clean"]).flags()
    wrong = flags.index(False)
    robust = [i == wrong for i in range(len(flags))]
    run["attacks"]["pgd-100"] = Outcome.from_flags(robust).model_dump()
    line = refused(tmp_path, value)
    assert f"seeds.0: attacks.pgd-100: robust exceeds clean: image {wrong} is right" in line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[]", "must be a JSON object"),
        ("null", "must be a JSON object"),
        ("[" * 200_000, "nested too deeply"),
        ('{"a":' * 200_000, "nested too deeply"),
        ('{"schema_version": 1, "a": ' + "[" * 400 + "]" * 400 + "}", "not a valid record"),
        ('{"a": 1, "a": 2}', "a: the key stands twice"),
        ('{"\\u001b[31m": 1, "\\u001b[31m": 2}', "\\x1b[31m: the key stands twice"),
        ('{"schema_version": ' + "9" * 5000 + "}", "not a valid record"),
        ('{"schema_version": NaN}', "schema_version"),
        ('{"schema_version": 1e999}', "schema_version"),
        ('"\\ud800"', "must be a JSON object"),
        ("\ufeff{}", "not valid JSON"),
    ],
    ids=lambda v: v[:20],
)
def test_a_hostile_file_gets_one_line(tmp_path, text, said):
    assert said in refused(tmp_path, text)


def test_a_duplicate_key_deep_inside_is_refused(tmp_path):
    text = GOLDEN.read_text(encoding="utf-8").replace('"seed": 0', '"seed": 0, "seed": 7')
    assert "seed: the key stands twice" in refused(tmp_path, text)


def test_nan_and_infinity_in_the_text_are_refused_with_their_field(tmp_path):
    text = GOLDEN.read_text(encoding="utf-8")
    assert '"seconds": 31.25' in text
    for number in ("NaN", "-Infinity", "1e999"):
        line = refused(tmp_path, text.replace('"seconds": 31.25', f'"seconds": {number}'))
        assert "cost.0.seconds: " in line


def test_a_huge_file_is_not_read(tmp_path):
    path = tmp_path / "record.json"
    with path.open("wb") as stream:
        stream.truncate(record_files.FILE_LIMIT + 1)
    with pytest.raises(GuardbenchError, match="over the limit"):
        load_record(path)


def test_a_file_that_is_not_text_or_not_there_gets_one_line(tmp_path):
    path = tmp_path / "record.json"
    with pytest.raises(GuardbenchError, match="cannot read record"):
        load_record(path)
    with pytest.raises(GuardbenchError, match="cannot read record"):
        load_record(tmp_path)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(GuardbenchError, match="not UTF-8"):
        load_record(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.data(), json_values)
def test_no_value_anywhere_causes_another_error(tmp_path_factory, data, value):
    tree = words()
    inner = tree
    while True:
        keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
        key = data.draw(st.sampled_from(keys))
        if isinstance(inner[key], dict | list) and inner[key] and data.draw(st.booleans()):
            inner = inner[key]
            continue
        inner[key] = value
        break
    path = write(tmp_path_factory.mktemp("fuzz"), tree)
    try:
        record = load_record(path)
    except GuardbenchError as error:
        said = str(error)
    else:
        said = canonical.digest(record.model_dump(mode="json"))
    assert said.isprintable()


@given(st.text(max_size=400))
def test_printable_text_is_printable(text):
    shown = records.printable(text)
    assert shown.isprintable()
    assert records.printable("plain é text") == "plain é text"


# --- migrations


def test_the_version_counts_the_migrations_and_each_has_a_golden_file():
    assert len(migrations.MIGRATIONS) + 1 == records.SCHEMA_VERSION
    for version in range(1, records.SCHEMA_VERSION + 1):
        path = GOLDEN.with_name(f"record-v{version}.json")
        assert json.loads(path.read_text(encoding="utf-8"))["schema_version"] == version
        load_record(path)


@pytest.mark.parametrize(
    ("engines", "first", "after"),
    [
        ({"autoattack": "guardbench", "square": "guardbench"}, 0, ("square",)),
        ({"autoattack": "guardbench", "square": "reference"}, 0, ()),
        ({"autoattack": "guardbench", "square": "guardbench"}, 1, ()),
    ],
)
def test_version_5_knows_what_older_records_took_over(engines, first, after):
    words = json.loads(GOLDEN.with_name("record-v4.json").read_text(encoding="utf-8"))
    run, *others = words["seeds"]
    whole = run["attacks"]["autoattack"]
    square = {**whole, "first": whole["first"] + first, "total": whole["total"] - first}
    stage = {**words["cost"][0], "stage": f"autoattack {run['seed']}"}
    found = migrations.migrate(
        {
            **words,
            "seeds": [{**run, "attacks": {**run["attacks"], "square": square}}, *others],
            "cost": [*words["cost"], stage],
            "provenance": {**words["provenance"], "engines": engines},
        }
    )
    assert tuple(found["cost"][-1].get("after", ())) == after
    assert all("after" not in cost for cost in found["cost"][:-1])


def test_migrations_run_from_the_files_version_on_and_change_nothing_given():
    steps = (
        lambda old: {**old, "seen": [*old.get("seen", []), 1]},
        lambda old: {**old, "seen": [*old.get("seen", []), 2]},
    )
    first = {"schema_version": 1}
    assert migrations.migrate(first, steps) == {"schema_version": 3, "seen": [1, 2]}
    assert first == {"schema_version": 1}
    assert migrations.migrate({"schema_version": 2}, steps) == {"schema_version": 3, "seen": [2]}
    assert migrations.migrate({"schema_version": 3}, steps) == {"schema_version": 3}
    with pytest.raises(ValueError, match="newer guardbench"):
        migrations.migrate({"schema_version": 4}, steps)
