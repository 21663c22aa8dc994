"""Ratios against numbers that were worked out by hand, and every case in which there is none."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from edlm.eval.documents import decodings, read_documents
from edlm.eval.equal_quality import Match, Point, points_of, speed_at_equal_quality, summary, timed_and_scored, why_not_compared
from eval_documents import curve, write


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
    better, errors = point(1.0, 0.9, stderr=0.03), [replace(p, stderr=0.04) for p in BASELINE]
    assert one(better, errors) == Match(better, why="the baseline never reaches this score", better=True)
    poor = point(0.5, 3.1)
    assert one(poor) == Match(poor, why="no texts of the baseline are this poor")
    slow = point(1.5, 3.1)
    assert one(slow) == Match(slow, why="slower: the baseline's fastest texts are better", slower=True)
    assert one(better, []).why == "no point of the baseline has a score and seconds"


def test_better_is_said_by_one_standard_error():
    errors = [replace(p, stderr=0.04) for p in BASELINE]
    for score, better in ((0.949, True), (0.951, False), (0.999, False)):  # 1 - sqrt(0.03^2 + 0.04^2) is 0.95
        match = one(point(1.0, score, stderr=0.03), errors)
        why = "the baseline never reaches this score" if better else "within one error of the baseline's best"
        assert (match.better, match.why, match.ratio) == (better, why, None)
    for of, baseline in ((point(1.0, 0.5), errors), (point(1.0, 0.5, stderr=0.03), BASELINE)):
        match = one(of, baseline)
        assert (match.better, match.why) == (False, "the baseline never reaches this score, but an error is not known")


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


def said(*points, stderr=0.01):
    baseline = [replace(p, stderr=stderr) for p in BASELINE]
    return summary(speed_at_equal_quality([replace(p, stderr=stderr) for p in points], baseline))


def test_slower_is_said_of_what_surely_is():
    slower = "slower at every score that can be compared, "
    assert said(point(4.0, 2.5), point(9.0, 3.5)) == slower + "ratio 0.50 at 1 of 2 points"
    assert said(point(9.0, 3.5)) == slower + "no ratio"
    assert said(point(4.0, 2.5), point(2.1, 2.5)) == slower + "ratio 0.50 to 0.95 at 2 of 2 points"
    assert said(point(4.0, 2.5), point(2.01, 2.5)) == "ratio 0.50 to 1.00 at 2 of 2 points", "high is above 1"
    assert said(point(4.0, 2.5), stderr=None) == "ratio 0.50 at 1 of 1 points", "no error is known"
    assert said(point(90.0, 1.0)) == "ratio 0.71 at 1 of 1 points", "the baseline's curve ends before high"
    assert said(point(1.0, 2.5)) == "ratio 2.00 at 1 of 1 points"


def test_scores_that_the_baseline_has_not_are_said():
    better = "of 2 points its score is better than the baseline's best"
    assert said(point(4.0, 2.5), point(9.0, 0.5)) == (
        f"slower at every score that can be compared, ratio 0.50 at 1 of 2 points; at 1 {better}"
    )
    assert said(point(1.0, 0.9), point(2.0, 0.5)) == f"no ratio; at 2 {better}"
    assert said(point(0.5, 3.1), point(1.0, 0.9)) == f"no ratio: no texts of the baseline are this poor (1); at 1 {better}"
    assert said(point(1.0, 2.5, 5.0)) == "no ratio: entropy 1.010 bits below (1)"
    near = "within one error of the baseline's best"
    assert said(point(1.0, 0.999), point(2.0, 0.99)) == f"no ratio: {near} (2)"
    assert said(point(1.0, 2.5), point(1.0, 0.999)) == f"ratio 2.00 at 1 of 2 points; {near} (1)"
    assert said(point(1.0, 2.5), point(1.0, 0.999), point(1.0, 0.5)) == (
        f"ratio 2.00 at 1 of 3 points; {near} (1); at 1 of 3 points its score is better than the baseline's best"
    )
    unknown = "the baseline never reaches this score, but an error is not known"
    assert said(point(4.0, 2.5), point(1.0, 0.5), stderr=None) == f"ratio 0.50 at 1 of 2 points; {unknown} (1)"


CURVE = [(1, 1.0, 3.0, 6.0), (4, 4.0, 2.0, 6.02)]


@pytest.fixture
def why_not(tmp_path, monkeypatch):
    """why_not(documents, ...) of models scored by a judge j."""
    monkeypatch.chdir(tmp_path)

    def why(*plain):
        write(tmp_path, {f"{i}.json": one for i, one in enumerate(plain)})
        found = decodings(read_documents([f"{i}.json" for i in range(len(plain))])).values()
        return why_not_compared([row for rows in found for row in timed_and_scored(rows, "j")], "j")

    return why


def test_what_cannot_be_compared_is_not(why_not):
    plain = curve("B", CURVE)
    assert why_not(plain, curve("E", CURVE)) == ""
    other = curve("E", CURVE, machine={"device": "NVIDIA H100"})
    said = "seconds are of several machines (torch 2.13.0, device cpu, threads 2; device NVIDIA H100)"
    assert why_not(plain, other) == said
    for change, said in (
        ({"length": 256}, "texts have 128 and 256 tokens"),
        ({"num_texts": 32}, "seconds are of 32 and 64 texts at once"),
        ({"num_texts": 32, "seconds": None}, ""),  # what has no seconds is no point
    ):
        changed = curve("E", CURVE)
        changed["rows"] = [row | change for row in changed["rows"]]
        assert why_not(plain, changed) == said
    small, large, unknown = (curve("E", CURVE, settings={"--batch-size": size}) for size in (8, 64, None))
    plain["settings"] = {"--batch-size": 64}
    assert why_not(plain, small) == "seconds are of batches of 64 and 8"
    assert why_not(plain, large) == why_not(plain, unknown) == ""


def test_judges_of_one_name_are_compared_where_they_are_the_same(why_not):
    def judged(label, judge):
        return curve(label, CURVE, settings={"--judge": judge})

    plain = judged("B", {"hf:a": "sha256 1"})
    assert why_not(plain, judged("E", {"hf:a": "sha256 2"})) == "j is not the same judge in 0.json, 1.json"
    silent = judged("D", ["hf:a"])
    assert why_not(plain, silent, judged("E", {"hf:a": "sha256 2"})) == "j is not the same judge in 0.json, 2.json"
    for known in ({"hf:elsewhere": "sha256 1"}, {"hf:a": None}, ["hf:a"], None):
        assert why_not(plain, judged("E", known)) == ""


@pytest.mark.parametrize("lossy", ["B", "E"])
def test_a_judge_that_leaves_out_much_says_nothing_of_speed(why_not, lossy):
    plain = {label: curve(label, CURVE) for label in "BE"}
    score = plain[lossy]["rows"][1]["judges"]["j"]
    score["left_out"] = 0.1
    assert why_not(*plain.values()) == ""
    score["left_out"] = 0.11
    assert why_not(*plain.values()) == "j leaves out more than 10 % of the words of one side or both"


def test_points_are_what_is_timed_and_scored(tmp_path):
    plain = curve("B", [*CURVE, (8, 5.0, 1.5, 6.0), (16, 6.0, 1.2, 6.0)])
    plain["rows"][2]["seconds"] = None
    plain["rows"][3]["judges"] = {}
    (rows,) = decodings(read_documents(write(tmp_path, {"a.json": plain}))).values()
    assert points_of(timed_and_scored(rows, "j"), "j") == [Point(1, 1.0, 3.0, None, 6.0), Point(4, 4.0, 2.0, None, 6.02)]
