import io
import json
import math
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from guardbench import canonical, metrics, paired
from guardbench.cli import app
from guardbench.compare import Comparison, compare
from guardbench.errors import GuardbenchError
from guardbench.paired import Pairs, bootstrap, holm, interval, mcnemar, pair, score_interval
from guardbench.record_files import load_record, save_record
from guardbench.records import Outcome, ResultRecord
from guardbench.report import print_comparison

GOLDEN = Path(__file__).parents[1] / "golden"
RECORD = load_record(GOLDEN / "record-v1.json")


def flags(text, first=0, **more):
    return Outcome.from_flags([c == "1" for c in text], first=first, **more)


def record(runs, **fields):
    """A record whose students are `{seed: (clean, {attack: outcome})}`."""
    words = {**RECORD.model_dump(), "flags": (), **fields}
    words["test"] = {**words["test"], "total": 4000}
    words["seeds"] = [
        {"seed": seed, "clean": clean, "attacks": attacks}
        for seed, (clean, attacks) in runs.items()
    ]
    return ResultRecord(**words)


def outcomes(right, **more):
    return Outcome.from_flags([bool(x) for x in right], **more)


def simulated(rng, *, images=200, seeds=3, gap=0.0, spread=0.05):
    """Students of one kind on the same images; an image is as hard for one as for the other."""
    hardness = rng.uniform(0.2, 0.8, images)
    made = []
    for shift in (gap / 2, -gap / 2):
        runs = {}
        for seed in range(seeds):
            level = np.clip(hardness + shift + rng.normal(0, spread), 0, 1)
            draws = rng.random(images)  # one draw an image: attacks and clean go together
            runs[seed] = (
                outcomes(draws < level + 0.1),
                {"fgsm": outcomes(draws < level), "pgd": outcomes(draws < level - 0.1)},
            )
        made.append(record(runs))
    return made


def table(a, b, measured=None):
    a, b = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    full = np.ones(a.shape, dtype=bool) if measured is None else np.asarray(measured, dtype=bool)
    return Pairs(tuple(range(a.shape[1])), a & full, b & full, full)


# --- McNemar and Holm


def test_mcnemar_on_sums_worked_by_hand():
    assert mcnemar(0, 0) == 1
    assert mcnemar(7, 7) == 1
    assert mcnemar(0, 1) == 1  # 2 * 1/2
    assert mcnemar(0, 5) == pytest.approx(2 / 32)
    assert mcnemar(9, 1) == pytest.approx(2 * (1 + 10) / 1024)
    # 1 + 20 + 190 + 1140 + 4845 + 15504 of 2^20 ways
    assert mcnemar(5, 15) == pytest.approx(2 * 21700 / 2**20)


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_is_the_exact_binomial_test(only_a, only_b):
    total, k = only_a + only_b, min(only_a, only_b)
    tail = sum(Fraction(math.comb(total, i), 2**total) for i in range(k + 1))
    assert mcnemar(only_a, only_b) == pytest.approx(float(min(1, 2 * tail)), rel=1e-10)
    assert mcnemar(only_a, only_b) == mcnemar(only_b, only_a)


@pytest.mark.parametrize("counts", [(4900, 5100), (2300, 2700), (49_600, 50_400)])
def test_mcnemar_agrees_with_scipy_on_many_pairs(counts):
    expected = scipy.stats.binomtest(counts[0], sum(counts)).pvalue
    assert mcnemar(*counts) == pytest.approx(expected, rel=1e-7)


def test_mcnemar_at_its_ends():
    assert 0 <= mcnemar(0, 5_000_000) < 1e-300
    with pytest.raises(ValueError, match="pairs"):
        mcnemar(-1, 3)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.04, 0.045]) == pytest.approx([0.08, 0.08])
    assert holm([0.6, 0.7]) == [1, 1]
    assert holm([]) == []


# --- pairing


def test_only_images_that_both_measured_under_one_seed_are_paired():
    found = pair(
        [4, 7], [flags("1100"), flags("10", first=8)], [flags("0101", first=2), flags("1")]
    )
    assert found.seeds == (4,)
    assert found.a.tolist() == [[False], [False]]
    assert found.b.tolist() == [[False], [True]]
    assert pair([0], [flags("1")], [flags("1", first=1)]) is None


def test_slices_of_seeds_keep_their_own_images():
    found = pair([0, 1], [flags("11"), flags("01", first=4)], [flags("01"), flags("11", first=4)])
    assert found.measured.tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]
    assert found.difference.tolist() == [[1, 0], [0, 0], [0, -1], [0, 0]]
    assert found.by_image == (1, 1)


# --- intervals


def test_one_seed_gives_the_interval_of_a_mean_of_paired_differences():
    rng = np.random.default_rng(0)
    a, b = rng.random((2000, 1)) < 0.7, rng.random((2000, 1)) < 0.6
    found = table(a, b)
    d = found.difference.ravel()
    half = 1.96 * d.std(ddof=1) / math.sqrt(len(d))
    low, high, basis = interval(found)
    assert (low, high) == pytest.approx((100 * (d.mean() - half), 100 * (d.mean() + half)), abs=0.2)
    assert basis == "images"


@pytest.mark.parametrize("layout", ["shared", "disjoint"])
def test_counting_equal_images_is_drawing_them_one_by_one(layout):
    rng = np.random.default_rng(1)
    n, s = 90, 3
    a, b = rng.random((n, s)) < [0.8, 0.6, 0.7], rng.random((n, s)) < [0.5, 0.5, 0.6]
    full = np.ones((n, s), dtype=bool)
    if layout == "disjoint":
        full = np.arange(n)[:, None] // 30 == np.arange(s)
    found = table(a, b, full)
    means = []
    for _ in range(4000):  # the plain way: an image at a time, a seed at a time
        if layout == "shared":
            drawn = rng.integers(0, n, n)
        else:
            drawn = np.concatenate([rng.integers(30 * k, 30 * k + 30, 30) for k in range(s)])
        chosen = rng.integers(0, s, s)
        per_seed = found.difference[drawn].sum(axis=0) / full[drawn].sum(axis=0)
        means.append(100 * per_seed[chosen].mean())
    expected = np.quantile(means, [0.025, 0.975])
    assert bootstrap(found) == pytest.approx(tuple(expected), abs=1.2)


def test_the_score_interval_is_tangos():
    # Fagerland, Lydersen and Laake 2014, Statistics in Medicine 33, table V: 1 and 7 of 21 pairs.
    assert score_interval(1, 7, 21) == pytest.approx((-51.7, -2.6), abs=0.05)
    # Without a discordant pair, by hand: 3.8415 / (100 + 3.8415).
    assert score_interval(0, 0, 100) == pytest.approx((-3.6993, 3.6993), abs=1e-4)


@pytest.mark.parametrize(
    "counts", [(12, 2, 50), (0, 1, 44), (5, 0, 5), (46.5, 11.5, 100), (1, 0, 1)]
)
def test_at_its_ends_the_likeliest_shares_are_just_rejected(counts):
    """The same by maximising the likelihood over the free share, for each difference of a grid."""
    only_a, only_b, n = counts
    both = n - only_a - only_b

    def kept(difference):
        def loss(share):  # of pairs that only B has
            cells = (
                (share + difference, only_a),
                (share, only_b),
                (1 - difference - 2 * share, both),
            )
            return -sum(count * math.log(max(p, 1e-300)) for p, count in cells if count)

        low, high = max(0, -difference), (1 - difference) / 2
        found = scipy.optimize.minimize_scalar(
            loss, bounds=(low, high), method="bounded", options={"xatol": 1e-10}
        )
        variance = n * (2 * found.x + difference - difference**2)
        return abs(only_a - only_b - n * difference) <= 1.959964 * math.sqrt(max(0, variance))

    grid = np.linspace(-0.999, 0.999, 1999)
    inside = [difference for difference in grid if kept(difference)]
    found = score_interval(*counts)
    assert found == pytest.approx((100 * min(inside), 100 * max(inside)), abs=0.11)


def test_shares_of_seeds_add_up_to_the_difference_of_the_means():
    rng = np.random.default_rng(13)
    full = np.arange(60)[:, None] // [40, 60, 25] == [0, 0, 1]  # slices of 40, 60 and 25 images
    found = table(rng.random((60, 3)) < 0.8, rng.random((60, 3)) < 0.5, full)
    wanted = (found.difference.sum(axis=0) / full.sum(axis=0)).mean()
    only_a, only_b = found.net
    assert (only_a - only_b) / 60 == pytest.approx(wanted)
    assert min(only_a, only_b) > 0
    assert only_a + only_b <= 60
    one = table([[1], [1], [0]], [[0], [0], [1]])
    assert one.net == (2, 1)


def test_the_interval_covers_where_images_seldom_differ():
    """Of 60 images 1 in 100 is right under A alone, 1 in 200 under B alone: often none of the 60."""
    rng = np.random.default_rng(14)
    alone = together = 0
    for _ in range(300):
        draws = rng.random((60, 1))
        found = table((draws < 0.01) | (draws > 0.5), (draws > 0.495))
        low, high = bootstrap(found, resamples=200)
        alone += low <= 0.5 <= high
        low, high, _ = interval(found, resamples=200)
        together += low <= 0.5 <= high
    assert alone < 0.7 * 300, "why the score interval stands beside it"
    assert together >= 0.95 * 300


def coverage(find, *, seeds, spread, repeats=150, gap=0.1):
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(repeats):
        hardness = rng.uniform(0.3, 0.7, (150, 1))
        sides = [
            rng.random((150, seeds)) < hardness + shift + rng.normal(0, spread, seeds)
            for shift in (gap / 2, -gap / 2)
        ]
        low, high = find(table(*sides))[:2]
        hits += low <= 100 * gap <= high
    return hits / repeats


def test_the_interval_covers_a_known_difference():
    def find(pairs):
        return interval(pairs, resamples=1000)

    # One seed without seed noise: 95%, give or take 2.5 standard errors of the simulation.
    assert 0.9 <= coverage(find, seeds=1, spread=0.0) <= 0.99
    assert coverage(find, seeds=3, spread=0.0) >= 0.95
    assert coverage(find, seeds=3, spread=0.08) >= 0.9
    # Why Student's t stands beside it: three seeds, resampled, do not reach beyond the three.
    assert coverage(lambda p: bootstrap(p, resamples=1000), seeds=3, spread=0.15) < 0.85
    assert coverage(find, seeds=3, spread=0.15) >= 0.9


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 4).flatmap(
        lambda s: st.lists(st.tuples(*[st.integers(-1, 2)] * s), min_size=1, max_size=25)
    )
)
def test_swapping_the_two_mirrors_the_interval_exactly(rows):
    values = np.asarray(rows)
    values[0] = np.where(values[0] == 2, 0, values[0])  # every seed measures some image
    a, b, full = values == 1, values == -1, values != 2
    full[~full.any(axis=1), 0] = True
    low, high, _ = interval(table(a, b, full), resamples=200)
    assert interval(table(b, a, full), resamples=200)[:2] == (-high, -low)
    assert -100 <= low <= high <= 100


def test_too_few_resamples_are_refused():
    with pytest.raises(ValueError, match="too few"):
        bootstrap(table([[1]], [[0]]), resamples=79)


# --- two records


def test_a_record_does_not_differ_from_itself():
    found = compare(RECORD, RECORD)
    names = ["clean", *RECORD.attack_names, "worst_case"]
    assert [row.measurement for row in found.rows] == names
    for row in found.rows:
        assert (row.difference, row.low, row.high) == (0, 0, 0)
        assert (row.by_image.only_a, row.by_image.only_b, row.by_image.p) == (0, 0, 1)
        assert row.p_holm == 1
        assert row.verdict == "does not stand"
    assert found.notes[0] == "A and B are students of the same distilled set."


def test_accuracies_are_those_that_a_board_shows():
    other, _ = simulated(np.random.default_rng(3))
    for row in compare(RECORD, RECORD).rows:
        if row.measurement == "worst_case":
            expected = metrics.worst_case(RECORD.seeds).estimate.mean
        elif row.measurement == "clean":
            expected = metrics.estimate([run.clean for run in RECORD.seeds]).mean
        else:
            expected = metrics.estimate([r.attacks[row.measurement] for r in RECORD.seeds]).mean
        assert row.a == row.b == pytest.approx(expected, abs=1e-4)
    assert compare(other, other).rows[0].images_per_seed == (200, 200, 200)


def test_swapping_the_records_swaps_the_answer():
    a, b = simulated(np.random.default_rng(4), gap=0.25)
    there, back = compare(a, b), compare(b, a)
    mirror = {"A higher": "B higher", "B higher": "A higher", "does not stand": "does not stand"}
    assert "A higher" in {row.verdict for row in there.rows}
    for row, other in zip(there.rows, back.rows, strict=True):
        assert (other.a, other.b, other.difference) == (row.b, row.a, -row.difference)
        assert (other.low, other.high, other.p_holm) == (-row.high, -row.low, row.p_holm)
        assert other.by_image.only_a == row.by_image.only_b
        assert other.pooled.only_b == row.pooled.only_a
        assert other.verdict == mirror[row.verdict]


def test_the_same_comparison_gives_the_same_bytes():
    a, b = simulated(np.random.default_rng(5), gap=0.1)
    texts = {canonical.dumps(compare(a, b).model_dump(mode="json")) for _ in range(2)}
    assert len(texts) == 1


def test_methods_that_are_alike_are_seldom_told_apart():
    """Four rows, three seeds, no difference: some row stands in at most 5 of 100 comparisons."""
    rng = np.random.default_rng(6)
    wrong = 0
    for _ in range(100):
        rows = compare(*simulated(rng, images=100), resamples=400).rows
        wrong += any(row.verdict != "does not stand" for row in rows)
    assert wrong <= 5


def test_a_clear_difference_is_found():
    a, b = simulated(np.random.default_rng(7), gap=0.3, spread=0.01)
    assert {row.verdict for row in compare(a, b).rows} == {"A higher"}


def test_only_a_record_beside_itself_has_an_interval_without_width():
    """Two sets whose students get the same 100 images right may still differ by a few in a hundred."""
    clean = flags("1" * 60 + "0" * 40)
    ours = record({0: (clean, {"fgsm": clean})})
    theirs = record(
        {0: (clean, {"fgsm": clean})}, artifact={**RECORD.artifact.model_dump(), "sha256": "0" * 64}
    )
    for row in compare(ours, theirs).rows:
        assert row.difference == 0
        assert (row.low, row.high) == pytest.approx((-3.6993, 3.6993), abs=1e-4)
    for row in compare(ours, ours).rows:
        assert (row.low, row.high) == (0, 0)


def test_repeating_the_same_images_adds_no_evidence():
    """Three students that agree on every image: the pooled p would claim three times the images."""
    ours, theirs = flags("1" * 9 + "0" + "1" * 20), flags("0" * 9 + "1" + "1" * 20)
    a, b = (record({k: (side, {"fgsm": side}) for k in range(3)}) for side in (ours, theirs))
    row = compare(a, b).rows[0]
    assert (row.by_image.only_a, row.by_image.only_b) == (9, 1)
    assert row.by_image.p == row.by_seed[0].p == pytest.approx(22 / 1024, abs=1e-6)
    assert (row.pooled.only_a, row.pooled.only_b) == (27, 3)
    assert row.pooled.p < 1e-4


def test_disjoint_slices_count_each_image_of_each_seed():
    runs = [{}, {}]
    for k in range(2):
        for side, text in enumerate(("1110", "0010")):
            clean = flags("11111111")
            runs[side][k] = (clean, {"aa": flags(text, first=4 * k)})
    row = compare(record(runs[0]), record(runs[1])).rows[1]
    assert (row.images, row.images_per_seed) == (8, (4, 4))
    assert (row.by_image.only_a, row.pooled.only_a) == (4, 4)
    assert (row.a, row.b) == (75, 25)


def test_an_interval_away_from_zero_does_not_stand_on_few_images():
    ours, theirs = flags("11111"), flags("00000")
    a, b = (record({0: (side, {"fgsm": side})}) for side in (ours, theirs))
    row = compare(a, b).rows[0]
    # Five images cannot show 100 to 100, which this test once held for right: the bootstrap, which knows no
    # other images, is not alone any more.
    assert (row.low, row.high) == (pytest.approx(score_interval(5, 0, 5)[0], abs=1e-4), 100)
    assert 0 < row.low < 50
    assert row.by_image.p == 2 / 32
    assert row.verdict == "does not stand"


def test_the_worst_case_is_over_attacks_of_both_and_free_attacks_are_marked():
    clean = flags("1111")
    free = flags("0000", bounded=False, max_distance=2.0)
    a = record({0: (clean, {"fgsm": flags("1110"), "cw": free, "extra": flags("0000")})})
    b = record({0: (clean, {"fgsm": flags("1100"), "cw": free})})
    found = compare(a, b)
    rows = {row.measurement: row for row in found.rows}
    assert list(rows) == ["clean", "cw", "fgsm", "worst_case"]
    assert (rows["worst_case"].a, rows["worst_case"].b) == (75, 50)
    assert [row.measurement for row in found.rows if not row.bounded] == ["cw"]
    assert "Left out: no image in common, or not in both records: extra." in found.notes


def test_what_a_reader_has_to_know_is_noted():
    a = record({0: (flags("11"), {"fgsm": flags("1")}), 5: (flags("11"), {"fgsm": flags("1")})})
    words = a.model_dump()
    words["seeds"] = [{**words["seeds"][0], "attacks": {"fgsm": flags("1", first=1).model_dump()}}]
    words["artifact"] = {**words["artifact"], "label_kind": "hard", "sha256": "0" * 64}
    found = compare(a, ResultRecord(**{**words, "ipc": 50, "flags": ("odd",)}))
    assert [row.measurement for row in found.rows] == ["clean"]
    assert found.notes == (
        "A is given soft labels, B hard ones: no board ranks these.",
        f"A has {a.ipc} images per class, B 50: no board ranks these.",
        "Left out: seeds that only A has, 5.",
        "Left out: no image in common, or not in both records: fgsm.",
        "No worst case: no image was measured by every bounded attack in both.",
        "Flag of B: odd",
    )


def test_another_engine_torch_or_precision_is_noted() -> None:
    """Two rows of one protocol may owe their difference to it: an earlier engine broke fewer images."""

    def made(versions: dict[str, str], students: str) -> ResultRecord:
        changes = {"versions": versions, "precision": {"students": students, "attacks": "fp32"}}
        return RECORD.model_copy(
            update={"provenance": RECORD.provenance.model_copy(update=changes)}
        )

    earlier = made({"torch": "2.14"}, "fp32")
    notes = compare(earlier, made({"torch": "2.15", "guardbench-engine": "6"}, "bf16")).notes
    assert [note for note in notes if "may owe" in note] == [
        "engine: unknown in A, 6 in B; what differs may owe to that.",
        "torch: 2.14 in A, 2.15 in B; what differs may owe to that.",
        "students trained in: fp32 in A, bf16 in B; what differs may owe to that.",
    ]
    assert not any("may owe" in note for note in compare(earlier, earlier).notes)


# --- refusals


def test_records_of_two_tiers_are_refused_and_two_of_dev_are_called_unofficial():
    dev = unlike(tier="dev")
    with pytest.raises(GuardbenchError, match="A is of tier dev and B of tier official"):
        compare(dev, RECORD)
    assert any("unofficial" in note for note in compare(dev, dev).notes)
    assert not any("unofficial" in note for note in compare(RECORD, RECORD).notes)
    other = unlike(tier="dev", test={"list_sha256": "0" * 64})
    with pytest.raises(GuardbenchError, match="again with the other's --images"):
        compare(dev, other)


def unlike(**fields):
    words = RECORD.model_dump()
    for name, value in fields.items():
        words[name] = {**words[name], **value} if isinstance(value, dict) else value
    return ResultRecord(**words)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (unlike(protocol="other", protocol_sha256="a" * 64), ("aaaaaaaaaaaa", "under the other's")),
        (unlike(test={"data_sha256": "b" * 64}), ("bbbbbbbbbbbb", "--data-dir")),
        (unlike(test={"list_sha256": "c" * 64}), ("cccccccccccc", "run one of them again")),
    ],
)
def test_records_of_other_protocols_or_images_are_refused(other, said):
    digests = RECORD.protocol_sha256, RECORD.test.data_sha256, RECORD.test.list_sha256
    with pytest.raises(GuardbenchError) as error:
        compare(RECORD, other)
    message = str(error.value)
    assert all(word in message for word in said)
    assert any(digest[:12] in message for digest in digests)
    assert "\n" not in message


def test_records_without_a_shared_image_are_refused():
    runs = {0: (flags("11"), {"fgsm": flags("11")})}
    others = {1: runs[0]}, {0: (flags("11", first=2), {"fgsm": flags("11", first=2)})}
    for other in others:
        with pytest.raises(GuardbenchError, match=r"share no image.*seed [01]: ") as error:
            compare(record(runs), record(other))
        assert "\n" not in str(error.value)


def test_refusals_are_one_line_and_exit_code_2(tmp_path):
    save_record(tmp_path / "a.json", RECORD)
    save_record(tmp_path / "b.json", unlike(protocol_sha256="a" * 64))
    command = [sys.executable, "-m", "guardbench", "compare", "a.json", "b.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: A is under protocol")
    assert done.stderr.count("\n") == 1


def test_the_verb_loads_no_torch(tmp_path):
    save_record(tmp_path / "a.json", RECORD)
    code = (
        "import sys\nfrom guardbench.cli import app\n"
        f"try: app(['compare', {str(tmp_path / 'a.json')!r}, {str(tmp_path / 'a.json')!r}])\n"
        "except SystemExit: pass\nassert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# --- what is printed and written


def printed(found, width=80):
    stream = io.StringIO()
    print_comparison(Console(file=stream, width=width, color_system=None), found)
    return stream.getvalue()


def test_the_table_says_what_was_found():
    a, b = simulated(np.random.default_rng(8), gap=0.3, spread=0.01)
    found = compare(a, b)
    lines = printed(found).splitlines()
    assert max(len(line) for line in lines) <= 80
    first, second = (
        [line.split() for line in lines if line.startswith(name)]
        for name in ("clean", "worst case")
    )
    row = found.rows[0]
    assert first[0] == [
        "clean", "200x3", f"{row.a:.1f}", f"{row.b:.1f}", f"{row.difference:+.1f}",
        f"{row.low:.1f}", "to", f"{row.high:.1f}",
        f"{row.by_image.only_a}:{row.by_image.only_b}", f"{row.p_holm:.0e}", "A", "higher",
    ]  # fmt: skip
    assert len(first) == len(second) == 2
    assert first[1][1] == f"{row.by_seed[0].only_a}:{row.by_seed[0].only_b}"
    text = " ".join(" ".join(lines).split())
    assert "One distilled set each: nothing here is about another run of the distillation." in text
    assert "A:B: images that more students of A have right" in text
    assert "widest of a bootstrap over seeds and images, Tango's score interval" in text


def test_no_line_is_wider_than_the_console_and_no_name_is_cut():
    a, b = simulated(np.random.default_rng(9), images=3925, gap=-0.45, spread=0.05)
    renamed = []
    for made in (a, b):
        words = made.model_dump()
        for run in words["seeds"]:
            run["attacks"] = {"autoattack": run["attacks"]["fgsm"]}
        words["method"]["title"] = "[red]:b: A title " * 8
        renamed.append(ResultRecord(**words))
    text = printed(compare(*renamed))
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "autoattack" in text
    assert "[red]:b: A title" in text
    assert "3925x3" in text


def test_many_students_leave_their_tests_to_the_file():
    a, b = simulated(np.random.default_rng(10), images=30, seeds=6)
    text = printed(compare(a, b))
    assert "The tests of each of the 6 seeds are in --json." in text
    assert max(len(line) for line in text.splitlines()) <= 80
    one = printed(compare(*simulated(np.random.default_rng(10), images=30, seeds=1)))
    assert "one seed says nothing about other seeds" in " ".join(one.split())


def test_the_file_holds_what_the_table_shows(tmp_path):
    a, b = simulated(np.random.default_rng(11), images=50)
    save_record(tmp_path / "a.json", a)
    save_record(tmp_path / "b.json", b)
    paths = [str(tmp_path / name) for name in ("a.json", "b.json")]
    out = tmp_path / "new" / "c.json"
    result = CliRunner().invoke(app, ["compare", *paths, "--json", str(out)])
    assert result.exit_code == 0
    text = out.read_text(encoding="utf-8")
    assert text == canonical.dumps(json.loads(text))
    assert Comparison.model_validate_json(text) == compare(a, b)
    assert "does not" in result.output


def test_a_record_is_never_overwritten(tmp_path):
    save_record(tmp_path / "a.json", RECORD)
    before = (tmp_path / "a.json").read_bytes()
    path = str(tmp_path / "a.json")
    result = CliRunner().invoke(app, ["compare", path, path, "--json", path])
    assert isinstance(result.exception, GuardbenchError)
    assert (tmp_path / "a.json").read_bytes() == before
    result = CliRunner().invoke(app, ["compare", path, path, "--json", f"{path}/c.json"])
    assert "choose another folder with --json" in str(result.exception)


def test_enough_resamples_for_the_ends_to_hold_still():
    """Another random stream moves the ends by little beside the width of the interval."""
    rng = np.random.default_rng(12)
    found = table(rng.random((300, 3)) < 0.8, rng.random((300, 3)) < 0.7)
    ends = []
    for seed in range(8):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(paired, "BOOTSTRAP_SEED", seed)
            ends.append(bootstrap(found))
    lows, highs = np.asarray(ends).T
    assert max(np.ptp(lows), np.ptp(highs)) < 0.1 * (highs - lows).mean()
