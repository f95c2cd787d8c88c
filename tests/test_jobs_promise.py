"""The promise of a cascade on rows whose margins and agreement are drawn from known chances."""

import math
import random

import pytest

from lepton_jax.config import CascadeSection
from lepton_jax.jobs.promise import Promise, Verdict, clopper_pearson, fewest_rows


def binomial(count, rows, share):
    """The chance of exactly so many."""
    return math.comb(rows, count) * share**count * (1 - share) ** (rows - count)


@pytest.mark.parametrize(("count", "rows"), [(0, 1), (0, 368), (3, 80), (5, 5), (400, 1000)])
def test_the_interval_ends_where_the_tails_have_a_fortieth(count, rows):
    low, high = clopper_pearson(count, rows)
    assert low <= count / rows <= high
    if count:
        at_least = sum(binomial(k, rows, low) for k in range(count, rows + 1))
        assert at_least == pytest.approx(0.025)
    if count < rows:
        assert sum(binomial(k, rows, high) for k in range(count + 1)) == pytest.approx(0.025)
    assert (low == 0) == (count == 0) and (high == 1) == (count == rows)


def test_the_fewest_rows_are_those_that_show_the_agreement_without_a_difference():
    for agreement in (0.5, 0.9, 0.99, 0.999):
        rows = fewest_rows(agreement)
        assert clopper_pearson(0, rows)[1] <= 1 - agreement < clopper_pearson(0, rows - 1)[1]
    assert fewest_rows(0.99) == 368


def test_too_few_calibration_rows_are_refused_with_how_many_it_takes():
    with pytest.raises(ValueError, match=r"calibration=100 .*agreement=0.99: .* 0.9638. Give 368"):
        Promise(CascadeSection(agreement=0.99, calibration=100))
    Promise(CascadeSection(agreement=0.99, calibration=368))


def calibrated(pairs, agreement=0.9, **fields) -> Promise:
    """A promise after these (margin, same)."""
    promise = Promise(CascadeSection(agreement=agreement, calibration=len(pairs), **fields))
    for margin, same in pairs:
        assert promise.why_dense("row", margin) == "calibration"
        promise.observe(Verdict("dense", "calibration", margin, same))
    return promise


def test_the_threshold_is_the_lowest_that_holds():
    # Of 100 rows 4 may differ: the interval of 4 ends at 9.93 %, that of 5 at 11.3 %.
    assert clopper_pearson(4, 100)[1] < 0.1 < clopper_pearson(5, 100)[1]
    margins = [n / 10 for n in range(100)]
    wrong = {0.3, 0.5, 1.0, 2.0, 3.0, 4.0, 7.0}
    promise = calibrated([(margin, margin not in wrong) for margin in margins])
    assert promise.threshold == 1.0  # the fifth from above: 2, 3, 4 and 7 stand
    assert promise.why_dense("row", 1.0) == "unsure"
    assert promise.why_dense("row", 1.1) in ("", "audit")
    assert calibrated([(margin, True) for margin in margins]).threshold == 0


def simulated(rows, *, chance, seed, agreement=0.95, **fields):
    """(promise, share of rows that are as the dense model's) where a row of margin m, exponential,
    differs with `chance(m, place)`.
    """
    draw = random.Random(seed)
    promise = Promise(CascadeSection(agreement=agreement, **fields))
    agreed = after = 0
    for place in range(rows):
        margin = round(draw.expovariate(1), 6)
        same = draw.random() >= chance(margin, place)
        why = promise.why_dense(f"row-{place}", margin)
        model = "dense" if why else "compressed"
        after += bool(promise.thresholds)
        agreed += bool(promise.thresholds) and (same or model == "dense")
        promise.observe(Verdict(model, why or "sure", margin, same if why else None))
    return promise, agreed / after


def test_the_promise_is_kept_and_the_reported_interval_holds_the_truth():
    kept = held = alarms = 0
    for seed in range(40):
        promise, truth = simulated(
            3000, chance=lambda margin, place: 0.5 * math.exp(-3 * margin), seed=seed
        )
        account = promise.account()
        alarms += account["rows"]["calibration"] > 2 * fewest_rows(0.95)
        assert sum(account["rows"].values()) == 3000
        assert account["rows"]["sure"] > 1000
        kept += truth >= 0.95
        calibrated_share = account["rows"]["calibration"] / 3000
        whole = calibrated_share + (1 - calibrated_share) * truth
        held += account["agreement"]["low"] <= whole <= account["agreement"]["high"]
    assert kept >= 36 and held >= 36  # of 40: they fail in 2.5 % and 5 % of the runs at most
    assert alarms <= 2


def test_a_threshold_of_hopeless_models_escalates_nearly_all():
    promise, _ = simulated(3000, chance=lambda margin, place: 0.5, seed=0)
    assert promise.account()["escalated"] > 0.7


def test_broken_promises_are_seen_and_only_raise_the_threshold(caplog):
    def drifting(margin, place):
        return 0.3 * math.exp(-margin) if place > 1500 else 0.0

    promise, _ = simulated(6000, chance=drifting, seed=1, audit=0.2)
    assert "too many for the promised 0.95" in caplog.text
    assert len(promise.thresholds) >= 2 and promise.thresholds[0] == 0
    assert promise.thresholds == sorted(promise.thresholds) and promise.thresholds[-1] > 0.5
    assert promise.account()["rows"]["calibration"] >= 4 * fewest_rows(0.95)


def test_the_audited_rows_are_the_same_in_every_run_and_about_as_many_as_asked():
    promise = calibrated([(1.0, True)] * 100, audit=0.1)
    keys = [f"row-{n}" for n in range(4000)]
    audited = [key for key in keys if promise.why_dense(key, 2.0) == "audit"]
    again = calibrated([(1.0, True)] * 100, audit=0.1)
    assert audited == [key for key in keys if again.why_dense(key, 2.0) == "audit"]
    assert 300 < len(audited) < 500


def test_an_account_of_nothing():
    account = Promise(CascadeSection(agreement=0.9)).account()
    assert account["agreement"] is None and account["thresholds"] == []
