import math
from fractions import Fraction
from pathlib import Path

import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from guardbench import ddranking, metrics
from guardbench.metrics import Measurement, WorstMeasurement, estimate, worst_case
from guardbench.record_files import load_record
from guardbench.records import Outcome, SeedRun, StageCost


def outcome(correct, total, first=0, **more):
    return Outcome.from_flags([i < correct for i in range(total)], first=first, **more)


# --- intervals


def test_t_quantiles_are_those_of_the_tables():
    # Student 1908 and every table since, two-sided 95%.
    for degrees, value in {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 30: 2.042}.items():
        assert metrics.t_quantile(degrees) == pytest.approx(value, abs=5e-4)


@pytest.mark.parametrize("degrees", [*range(1, 40), 99, 100, 1023])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_t_quantiles_agree_with_scipy(degrees, confidence):
    expected = scipy.stats.t.ppf((1 + confidence) / 2, degrees)
    assert metrics.t_quantile(degrees, confidence) == pytest.approx(expected, rel=1e-9)


@given(
    st.lists(st.floats(0, 100), min_size=2, max_size=12).filter(lambda v: max(v) - min(v) > 1e-3)
)
def test_t_intervals_agree_with_scipy_where_they_are_not_clipped(values):
    low, high = metrics.student_t(values)
    expected = scipy.stats.t.interval(
        0.95, len(values) - 1, loc=sum(values) / len(values), scale=scipy.stats.sem(values)
    )
    assert low == pytest.approx(max(0, expected[0]), abs=1e-6)
    assert high == pytest.approx(min(100, expected[1]), abs=1e-6)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_agrees_with_scipy(case):
    correct, total = case
    expected = scipy.stats.binomtest(correct, total).proportion_ci(0.95, method="wilson")
    low, high = metrics.wilson(correct / total, total)
    assert low == pytest.approx(100 * expected.low, abs=1e-9)
    assert high == pytest.approx(100 * expected.high, abs=1e-9)
    assert 0 <= low <= 100 * correct / total + 1e-9
    assert 100 * correct / total - 1e-9 <= high <= 100


def test_wilson_on_a_value_worked_by_hand():
    # 8 of 10: centre (0.8 + 3.8415/20) / 1.38415 = 0.7167, half-width 0.2266.
    assert metrics.wilson(0.8, 10) == pytest.approx((49.02, 94.33), abs=0.01)


def test_impossible_arguments_are_refused():
    for share, total in ((-0.1, 5), (1.1, 5), (0.5, 0), (math.nan, 5)):
        with pytest.raises(ValueError, match="images"):
            metrics.wilson(share, total)
    with pytest.raises(ValueError, match="two values"):
        metrics.student_t([50.0])
    with pytest.raises(ValueError, match="degrees"):
        metrics.t_quantile(0)
    with pytest.raises(ValueError, match="one seed"):
        estimate([])


def test_one_seed_rests_on_its_images_and_says_so():
    found = estimate([outcome(80, 100)])
    assert found.basis == "images"
    assert (found.low, found.high) == metrics.wilson(0.8, 100)
    assert found.mean == 80


def test_three_seeds_that_differ_are_as_uncertain_as_the_seeds():
    found = estimate([outcome(700, 1000), outcome(750, 1000), outcome(800, 1000)])
    assert found.basis == "seeds and images"
    # 75 +- 4.3027 * 5 / sqrt(3)
    assert (found.low, found.high) == pytest.approx((62.579, 87.421), abs=1e-3)
    assert found.per_seed == (70, 75, 80)


def test_seeds_that_agree_are_as_uncertain_as_their_images():
    same = estimate([outcome(80, 100)] * 3)
    assert (same.low, same.high) == metrics.wilson(0.8, 100)
    assert same.images == 100
    disjoint = estimate([outcome(80, 100, first=100 * k) for k in range(3)])
    assert (disjoint.low, disjoint.high) == metrics.wilson(0.8, 300)
    assert disjoint.images == 300
    overlapping = estimate([outcome(80, 100, first=50 * k) for k in range(3)])
    assert overlapping.images == 200
    nested = estimate([outcome(80, 100), outcome(8, 10, first=40), outcome(80, 100, first=60)])
    assert nested.images == 160


def test_each_side_reaches_as_far_as_the_wider_interval():
    # The t interval alone would end at 100.
    found = estimate([outcome(98, 100), outcome(100, 100), outcome(99, 100)])
    t, images = metrics.student_t([98, 100, 99]), metrics.wilson(0.99, 100)
    assert t[1] == 100
    assert images[0] < t[0]
    assert (found.low, found.high) == (images[0], 100)


@given(
    st.lists(
        st.integers(1, 50).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))),
        min_size=1,
        max_size=6,
    )
)
def test_the_mean_lies_inside_and_the_ends_on_the_scale(cases):
    found = estimate([outcome(correct, total) for correct, total in cases])
    assert 0 <= found.low <= found.mean <= found.high <= 100
    assert found.high > found.low
    assert found.share == sum(Fraction(*case) for case in cases) / len(cases)
    rounded = Measurement.of(found)
    assert rounded.mean == round(found.mean, 4)
    assert rounded.images_per_seed == tuple(total for _, total in cases)


def test_rounding_never_puts_the_mean_outside():
    # At these sizes the formula alone misses the end of the scale by one rounding.
    for total in (13, 15, 43, 45):
        assert estimate([outcome(0, total)]).low == 0
        assert estimate([outcome(total, total)]).high == 100


# --- worst case


def run(seed=0, clean=8, **attacks):
    return SeedRun(seed=seed, clean=Outcome.from_flags([True] * clean), attacks=attacks)


def flags(text, first=0, **more):
    return Outcome.from_flags([c == "1" for c in text], first=first, **more)


def test_the_worst_case_needs_survival_of_every_bounded_attack():
    found = worst_case(
        [
            run(
                0,
                pgd=flags("11110000", max_distance=0.1),
                square=flags("10101010", max_distance=0.2),
                cw=flags("00000000", bounded=False, max_distance=3.0),
            )
        ]
    )
    assert found.outcomes[0].flags() == [c == "1" for c in "10100000"]
    assert (found.attacks, found.excluded) == (("pgd", "square"), ("cw",))
    assert found.estimate.max_distance == 0.2
    assert found.estimate.bounded
    assert WorstMeasurement.of_worst(found).mean == 25


def test_the_worst_case_is_over_the_images_that_all_attacks_measured():
    found = worst_case(
        [
            run(0, pgd=flags("11100000"), aa=flags("101", first=1)),
            run(1, pgd=flags("11111111"), aa=flags("011", first=4)),
        ]
    )
    assert [o.first for o in found.outcomes] == [1, 4]
    assert [o.flags() for o in found.outcomes] == [[True, False, False], [False, True, True]]
    assert found.estimate.images == 6


def test_no_common_image_or_no_bounded_attack_gives_no_worst_case():
    assert worst_case([run(0, pgd=flags("11"), aa=flags("11", first=2))]) is None
    assert worst_case([run(0, cw=flags("11", bounded=False))]) is None


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4))
def test_the_worst_case_is_never_above_any_attack(table):
    attacks = {f"a{i}": Outcome.from_flags(row) for i, row in enumerate(table)}
    found = worst_case([SeedRun(seed=0, clean=flags("111111"), attacks=attacks)])
    assert found.estimate.mean <= min(100 * sum(row) / 6 for row in table) + 1e-9


# --- scores of other benchmarks


def test_beard_by_hand():
    # clean 80, attacks 60, 40, 20: mean 40, min 20 -> 1 - 40/60.
    assert metrics.robustness_ratio(80, [60, 40, 20]) == pytest.approx(100 / 3)
    # clean pass 1 s, attacks 3, 5, 11 s: mean 19/3 -> (16/3) / 10.
    assert metrics.attack_efficiency(1, [3, 5, 11]) == pytest.approx(160 / 3)
    assert metrics.crei(100 / 3, 160 / 3) == pytest.approx(130 / 3)
    assert metrics.crei(10, 50, alpha=0.25) == pytest.approx(40)


def beard_record(square_first=0, engine="guardbench"):
    """Two seeds; `pgd` on all ten images, `square` and `autoattack` on four; times by image."""
    record = load_record(Path(__file__).parents[1] / "golden" / "record-v3.json")
    seconds = {"clean": 0.5, "pgd": 2.0, "square": 3.0, "autoattack": 4.0}
    seeds, cost = [], []
    for seed in (0, 1):
        attacks = {
            "pgd": flags("1110000000"),
            "square": flags("1100", first=square_first),
            "autoattack": flags("1000"),
        }
        seeds.append(SeedRun(seed=seed, clean=flags("1111111100"), attacks=attacks))
        for name, each in seconds.items():
            total = 10 if name in ("clean", "pgd") else 4
            words = {"stage": f"{name} {seed}", "seconds": each * total, "after": ()}
            if (name, engine) == ("autoattack", "guardbench"):
                words["after"] = ("square",)
            cost.append(StageCost(**words, peak_memory_bytes=1, device="cpu"))
    engines = {"square": engine, "autoattack": engine}
    made = record.provenance.model_copy(update={"engines": engines})
    return record.model_copy(
        update={"seeds": tuple(seeds), "cost": tuple(cost), "provenance": made}
    )


def test_beard_of_a_record_is_over_common_images_and_times_by_image():
    found = metrics.beard(beard_record())
    assert found is not None
    # On the four common images: clean 4, pgd 3, square 2, autoattack 1 right: drops 25, 50, 75 points.
    assert found.ratio == pytest.approx(100 * (1 - 50 / 75))
    # Square's three seconds belong to AutoAttack's four as well: 2, 3 and 7, and 0.5 for clean.
    assert found.efficiency == pytest.approx(100 * (4 - 0.5) / (7 - 0.5))
    assert found.crei == pytest.approx((found.ratio + found.efficiency) / 2)
    theirs = metrics.beard(beard_record(engine="reference"))
    assert theirs is not None
    assert theirs.efficiency == pytest.approx(100 * (3 - 0.5) / (4 - 0.5)), "it ran its own Square"


def test_beard_is_silent_where_it_cannot_be_had():
    record = beard_record()
    assert metrics.beard(record.model_copy(update={"cost": record.cost[1:]})) is None
    alone = [
        run.model_copy(update={"attacks": {"pgd": run.attacks["pgd"]}}) for run in record.seeds
    ]
    assert metrics.beard(record.model_copy(update={"seeds": tuple(alone)})) is None, "one attack"
    assert metrics.beard(beard_record(square_first=6)) is None, "no common image"


def test_beard_with_equal_denominators_is_zero():
    assert metrics.robustness_ratio(80, [80, 80]) == 0
    assert metrics.attack_efficiency(2, [2, 1]) == 0
    assert metrics.attack_efficiency(2, [1, 0.5]) == 0
    assert metrics.robustness_ratio(80, [50]) == 0


def test_dd_ranking_by_hand():
    assert ddranking.hard_label_recovery(0.9, 0.6) == pytest.approx(0.3)
    assert ddranking.improvement_over_random(0.7, 0.5) == pytest.approx(0.2)
    # a = 0.5 * 0.2 - 0.5 * 0.3 = -0.05
    expected = (math.exp(-0.05) - 1 / math.e) / (math.e - 1 / math.e)
    assert ddranking.label_robust_score(0.2, 0.3) == pytest.approx(expected)
    assert expected == pytest.approx(0.248192, abs=1e-6)
    # 0.25 * 0.4 + 0.75 * 0.2 = 0.25
    expected = (math.exp(0.25) - 1 / math.e) / (math.e - 1 / math.e)
    assert ddranking.augmentation_robust_score(0.4, 0.2, weight=0.25) == pytest.approx(expected)
    assert expected == pytest.approx(0.389783, abs=1e-6)


def test_dd_ranking_scores_span_zero_to_one():
    assert ddranking.label_robust_score(1, -1) == pytest.approx(1)
    assert ddranking.label_robust_score(-1, 1) == pytest.approx(0)
    assert ddranking.augmentation_robust_score(1, 1) == pytest.approx(1)
    assert ddranking.augmentation_robust_score(-1, -1) == pytest.approx(0)


def test_dd_ranking_of_a_record_by_hand():
    """Of 60 images: clean 51, 60, 60; random 41, 48, 48; plain 39, 45, 45; its random 34, 40, 40."""
    record = load_record(Path(__file__).parents[1] / "golden" / "record-v4.json")
    found = ddranking.scores(record, 0.99)
    ior, hlr = (171 - 137) / 180, 0.99 - (51 + 51 + 51) / 180
    assert found.ior == pytest.approx(ior, abs=1e-6)
    assert found.hlr == pytest.approx(hlr, abs=1e-6)

    def scaled(value):
        return (math.exp(value) - math.exp(-1)) / (math.e - math.exp(-1))

    assert found.lrs == pytest.approx(scaled(0.5 * ior - 0.5 * hlr), abs=1e-6)
    assert found.ars == pytest.approx(scaled(0.5 * ior + 0.5 * (129 - 114) / 180), abs=1e-6)
    assert ddranking.scores(record, None).lrs is None
    old = load_record(Path(__file__).parents[1] / "golden" / "record-v3.json")
    assert ddranking.scores(old, 0.99) is None
    assert "a random subset trained the same way 76.1" in ddranking.in_words(record)
