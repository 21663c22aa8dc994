"""How much sooner a model has texts of the quality that another one has, where both have it at like diversity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from .documents import Document, judge_identity, machine_of, seconds_of_a_text

ENTROPY_TOLERANCE = 0.05  # bits
LEFT_OUT = 0.1  # of the words: a judge that leaves out more says little of the text
_NEAR = "within one error of the baseline's best"
_UNKNOWN = "the baseline never reaches this score, but an error is not known"

Rows = Sequence[tuple[Document, dict[str, Any]]]  # of texts


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
    better: bool = False  # than any point of the baseline, by more than one standard error


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
    neighbours; None where the envelope ends before, or an error is not known. The clock is taken as exact. A score is better than the
    baseline's best where it is lower by more than that error. Texts of models that were decoded with the same seeds are correlated
    somewhat, and the error is then on the large side.

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
        if point.stderr is None or best.stderr is None:
            return Match(point, why=_UNKNOWN)
        better = point.score + math.hypot(point.stderr, best.stderr) < best.score
        return Match(point, why="the baseline never reaches this score" if better else _NEAR, better=better)
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


# --- of documents -----------------------------------------------------------------------------------------------------------------


def timed_and_scored(rows: Rows, judge: str) -> Rows:
    return [
        (document, row)
        for document, row in rows
        if row["seconds"] is not None and row["judges"].get(judge, {}).get("bits_per_character", {}).get("mean") is not None
    ]


def points_of(rows: Rows, judge: str) -> list[Point]:
    """Of rows of ``timed_and_scored``."""
    points = []
    for _, row in rows:
        score, seconds = row["judges"][judge]["bits_per_character"], seconds_of_a_text(row)
        points.append(Point(row["steps"], seconds, score["mean"], score["stderr"], row["entropy"]["mean"]))
    return points


def why_not_compared(rows: Rows, judge: str) -> str:
    """Why points of these rows, of both sides, are no two curves of one plot; "" where they are."""
    judged = [judge_identity(document, row, judge) for document, row in rows]
    if len(set(judged) - {None}) > 1:
        paths = dict.fromkeys(document.path for (document, _), identity in zip(rows, judged, strict=True) if identity is not None)
        return f"{judge} is not the same judge in {', '.join(paths)}"
    if any((row["judges"][judge].get("left_out") or 0) > LEFT_OUT for _, row in rows):
        return f"{judge} leaves out more than {100 * LEFT_OUT:g} % of the words of one side or both"
    said: dict[str, list[Any]] = {
        "texts have {} tokens": sorted({row["length"] for _, row in rows}),
        "seconds are of {} texts at once": sorted({row["num_texts"] for _, row in rows}),
        "seconds are of batches of {}": list(dict.fromkeys(document.settings.get("--batch-size") or 0 for document, _ in rows)),
        "seconds are of several machines ({})": list(dict.fromkeys(machine_of(document) for document, _ in rows)),
    }
    for words, values in said.items():
        known = [str(value) for value in values if value]  # a size of batch that is not given is not known
        if len(known) > 1:
            return words.format(("; " if "machines" in words else " and ").join(known))
    return ""


def summary(matches: Sequence[Match]) -> str:
    """One line of a model's points. Better, and slower throughout, are said only of what is so by a standard error."""
    ratios = [m.ratio for m in matches if m.ratio is not None]
    known = [m for m in matches if m.slower or m.ratio is not None]
    surely = [m for m in known if m.slower and (m.ratio is None or (m.high is not None and m.high < 1))]
    better = sum(m.better for m in matches)
    said = "slower at every score that can be compared, " if known and len(surely) == len(known) else ""
    if ratios:
        span = " to ".join(dict.fromkeys((f"{min(ratios):.2f}", f"{max(ratios):.2f}")))
        whys = [m.why for m in matches if m.why in (_NEAR, _UNKNOWN)]
        said += f"ratio {span} at {len(ratios)} of {len(matches)} points" + ("; " if whys else "")
    else:
        whys = [m.why for m in matches if not m.better and not (said and m.slower)]
        said += "no ratio" + (": " if whys else "")
    said += "; ".join(f"{why} ({whys.count(why)})" for why in dict.fromkeys(whys))
    return said + (f"; at {better} of {len(matches)} points its score is better than the baseline's best" if better else "")
