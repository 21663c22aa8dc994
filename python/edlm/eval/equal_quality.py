"""How much sooner a model has texts of the quality that another one has, where both have it at like diversity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

ENTROPY_TOLERANCE = 0.05  # bits


@dataclass(frozen=True)
class Point:
    """Texts of one model at one number of steps."""

    steps: int | None
    seconds: float  # of decoding, > 0
    score: float  # a judge's bits per character: low is good
    stderr: float | None  # of the score
    entropy: float | None  # bits


@dataclass(frozen=True)
class Match:
    """A point, and where the baseline's curve first has a score as good. None is what is not known."""

    point: Point
    seconds: float | None = None  # of the baseline
    entropy: float | None = None  # of the baseline, there
    ratio: float | None = None  # seconds of the baseline / seconds of the point
    low: float | None = None  # the ratio with the difference of scores moved by one standard error
    high: float | None = None
    why: str = ""  # there is no ratio
    slower: bool = False  # at like entropy, be there a ratio or not


def speed_at_equal_quality(
    points: Sequence[Point], baseline: Sequence[Point], *, entropy_tolerance: float = ENTROPY_TOLERANCE
) -> list[Match]:
    """For each point of a model: seconds that the baseline takes to the same score / seconds of the point.

    The baseline's curve is the lower envelope of its points: one that is no better than a faster one is left out, so that scores fall
    as seconds grow, and a curve that is not monotone gives the least time to a score at least that good. Between neighbours of the
    envelope, log(seconds) and the entropy are linear in the score. Nothing is extrapolated: a point whose score lies outside of the
    envelope has no ratio, nor has one whose entropy differs from the baseline's by more than the tolerance, for a judge is pleased by
    texts that repeat themselves.

    low and high are the ratios at score +- sqrt(stderr^2 + the baseline's stderr^2), the latter interpolated between independent
    neighbours; None where the envelope ends before, or an error is not known. The clock is taken as exact.

    Args:
        points, baseline: of the model and of the baseline, in any order; scores of one judge on texts of one length.
        entropy_tolerance: bits, >= 0.

    Returns:
        A Match a point, in order of the points.

    Raises:
        ValueError: the tolerance is no number >= 0.

    Source: the comparison is that of Xu et al., arXiv 2410.21357, who read 1.3 off such curves.
    """
    if not entropy_tolerance >= 0:
        raise ValueError(f"entropy_tolerance: expected bits >= 0, got {entropy_tolerance}")
    envelope: list[Point] = []
    for point in sorted(baseline, key=lambda p: (p.seconds, p.score)):
        if not envelope or point.score < envelope[-1].score:
            envelope.append(point)
    return [_match(point, envelope, entropy_tolerance) for point in points]


def _match(point: Point, envelope: Sequence[Point], tolerance: float) -> Match:
    if not envelope:
        return Match(point, why="no point of the baseline has a score and seconds")
    fastest, best = envelope[0], envelope[-1]
    if point.score < best.score:
        return Match(point, why="the baseline never reaches this score")
    if point.score > fastest.score:
        if fastest.seconds > point.seconds:
            return Match(point, why="no texts of the baseline are this poor")
        unlike = _unlike(point, fastest, tolerance)
        why = (
            f"the baseline's fastest texts are better; {unlike}" if unlike else "slower: the baseline's fastest texts are better"
        )
        return Match(point, why=why, slower=not unlike)
    there = _at(point.score, envelope)
    known = {"seconds": there.seconds, "entropy": there.entropy}
    unlike = _unlike(point, there, tolerance)
    if unlike:
        return Match(point, **known, why=unlike)
    low = high = None
    if point.stderr is not None and there.stderr is not None:
        spread = math.hypot(point.stderr, there.stderr)
        poor, good = point.score + spread, point.score - spread
        low = _at(poor, envelope).seconds / point.seconds if poor <= fastest.score else None
        high = _at(good, envelope).seconds / point.seconds if good >= best.score else None
    ratio = there.seconds / point.seconds
    return Match(point, **known, ratio=ratio, low=low, high=high, slower=ratio < 1)


def _unlike(point: Point, other: Point, tolerance: float) -> str:
    """Why their diversities are not alike; "" where they are."""
    if point.entropy is None or other.entropy is None:
        return "an entropy is not known"
    above = point.entropy - other.entropy
    return f"entropy {abs(above):.3f} bits {'above' if above > 0 else 'below'}" if abs(above) > tolerance else ""


def _at(score: float, envelope: Sequence[Point]) -> Point:
    """The envelope where it has this score, which it has."""
    for a, b in pairwise(envelope):
        if a.score > score > b.score:
            w = (a.score - score) / (a.score - b.score)
            seconds = math.exp((1 - w) * math.log(a.seconds) + w * math.log(b.seconds))
            entropy = None if a.entropy is None or b.entropy is None else (1 - w) * a.entropy + w * b.entropy
            stderr = None if a.stderr is None or b.stderr is None else math.hypot((1 - w) * a.stderr, w * b.stderr)
            return Point(None, seconds, score, stderr, entropy)
    return next(point for point in envelope if point.score == score)
