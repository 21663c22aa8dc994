"""Ratios against numbers that were worked out by hand, and every case in which there is none."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from edlm.eval.equal_quality import Match, Point, speed_at_equal_quality


def point(seconds, score, entropy=6.0, stderr=None, steps=1):
    return Point(steps, seconds, score, stderr, entropy)


BASELINE = [point(1.0, 3.0), point(4.0, 2.0, 6.02), point(64.0, 1.0, 6.04)]


def one(of, baseline=BASELINE, **options):
    (match,) = speed_at_equal_quality([of], baseline, **options)
    return match


def test_the_logarithm_of_seconds_is_linear_in_the_score():
    halfway = one(point(1.0, 2.5))  # sqrt(1 * 4) seconds, entropy 6.01
    assert halfway.seconds == pytest.approx(2.0) and halfway.ratio == pytest.approx(2.0) and halfway.why == ""
    assert halfway.entropy == pytest.approx(6.01) and not halfway.slower
    quarter = one(point(16.0, 1.75))  # 4 * 16 ** (1/4) = 8 seconds
    assert quarter.ratio == pytest.approx(0.5) and quarter.slower and quarter.entropy == pytest.approx(6.025)


@pytest.mark.parametrize("i", range(3))
def test_the_baseline_against_itself_is_one(i):
    assert one(BASELINE[i]).ratio == pytest.approx(1.0) and not one(BASELINE[i]).slower


def test_order_and_points_no_better_than_faster_ones_are_no_matter():
    noisy = [BASELINE[2], point(2.0, 3.4, 9.9), BASELINE[0], point(8.0, 2.0, 9.9), BASELINE[1], point(1.0, 3.1, 9.9)]
    for score in (3.0, 2.7, 2.5, 2.0, 1.4, 1.0):
        assert one(point(1.0, score), noisy) == one(point(1.0, score))


def test_a_curve_that_is_not_monotone_gives_the_least_time():
    bumpy = [point(1.0, 3.0), point(2.0, 4.0), point(4.0, 1.0)]
    assert one(point(1.0, 2.0), bumpy).seconds == pytest.approx(2.0)  # sqrt(1 * 4): from 3.0 to 1.0, past 4.0


def test_one_standard_error_either_way():
    errors = [replace(p, stderr=0.3) for p in BASELINE]
    match = one(point(1.0, 2.5, stderr=0.1), errors)
    spread = math.hypot(0.1, 0.3 * math.sqrt(0.5))  # halfway between two errors of 0.3
    assert match.low == pytest.approx(4 ** (0.5 - spread)) and match.high == pytest.approx(4 ** (0.5 + spread))
    assert match.low < match.ratio < match.high
    near_end = one(point(1.0, 1.1, stderr=0.1), errors)
    assert near_end.ratio is not None and near_end.low is not None and near_end.high is None
    assert one(point(1.0, 2.95, stderr=0.1), errors).low is None
    for of, baseline in ((point(1.0, 2.5, stderr=0.1), BASELINE), (point(1.0, 2.5), errors)):
        match = one(of, baseline)
        assert match.ratio == pytest.approx(2.0) and match.low is match.high is None


def test_nothing_beyond_the_scores_of_both():
    better = point(1.0, 0.9)
    assert one(better) == Match(better, why="the baseline never reaches this score")
    poor = point(0.5, 3.1)
    assert one(poor) == Match(poor, why="no texts of the baseline are this poor")
    slow = point(1.5, 3.1)
    assert one(slow) == Match(slow, why="slower: the baseline's fastest texts are better", slower=True)
    assert one(better, []).why == "no point of the baseline has a score and seconds"


def test_nothing_where_entropies_differ():
    for entropy, why in ((5.90, "entropy 0.110 bits below"), (6.07, "entropy 0.060 bits above")):
        match = one(point(1.0, 2.5, entropy))
        assert (match.ratio, match.why) == (None, why) and match.seconds == pytest.approx(2.0)
        assert one(point(1.0, 2.5, entropy), entropy_tolerance=0.2).ratio == pytest.approx(2.0)
    assert one(point(1.0, 2.5, None)).why == "an entropy is not known"
    assert one(point(1.0, 2.5), [replace(BASELINE[0], entropy=None), *BASELINE[1:]]).why == "an entropy is not known"
    assert not one(point(9.0, 2.5, 5.0)).slower, "more seconds for texts that repeat themselves less are not slower"
    unlike = one(point(1.5, 3.1, 6.2))
    assert unlike.why == "the baseline's fastest texts are better; entropy 0.200 bits above" and not unlike.slower


@pytest.mark.parametrize("tolerance", [-0.1, math.nan])
def test_a_tolerance_that_is_none(tolerance):
    with pytest.raises(ValueError, match="entropy_tolerance: expected bits >= 0"):
        one(point(1.0, 2.5), entropy_tolerance=tolerance)
