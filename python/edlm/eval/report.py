"""One page of Markdown from several documents of ``edlm eval``: tables, and the words without which they would be misread."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from textwrap import wrap
from typing import Any

from .documents import (
    DIRECTIONS,
    FEW_DRAWS,
    MEASURES,
    UNITS,
    Document,
    decodings,
    digests,
    is_distrusted,
    judge_identity,
    judges,
    likelihoods,
    machine_of,
    real_texts,
)
from .equal_quality import ENTROPY_TOLERANCE, Rows, points_of, speed_at_equal_quality, summary, timed_and_scored, why_not_compared

_DISTRUSTED = "not to be trusted"
_NONE = "-"
_PAPER_JOINT = (
    "paper_joint is no bound of anything: it weights the joint -log p(x0 | xt) by 1/t, while the ELBO in continuous time has the "
    "marginals of p(x0 | xt) alone. For carried-over AR energies it equals the AR NLL, of whatever model and data; for a perfect joint "
    "it lies below the entropy of the data. It is here to be compared with printed figures."
)
_FEW_DRAWS = f"{FEW_DRAWS.replace('+-', '±')} and is left out."
_EXACT_JOINT = "With an autoregressive energy this is the likelihood of that model itself, and says nothing of decoding."
_LOG_Z = {None: _NONE, "exact": "exact", "lower": "lower", "upper_asymptotic": "upper, asymptotic"}
_CAPTIONS = {
    "bounds_vs_n.png": "Bounds against the draws of log Z, whose error is not known below an ESS of 5",
    "quality_vs_steps.png": "Quality against decoding steps",
    "quality_vs_seconds.png": "Quality against seconds",
    "quality_vs_entropy.png": "Quality against diversity",
    "ess_vs_t.png": "Effective draws against time",
}


class _Notes:
    """Footnotes of one table, numbered as they come."""

    def __init__(self) -> None:
        self._texts: list[str] = []

    def mark(self, text: str) -> str:
        if text not in self._texts:
            self._texts.append(text)
        return f" ({self._texts.index(text) + 1})"

    def lines(self) -> list[str]:
        return [line for i, text in enumerate(self._texts, 1) for line in (f"({i}) {text}", "")]


def page(
    documents: Sequence[Document],
    *,
    unit: str = UNITS[0],
    baseline: str | None = None,
    entropy_tolerance: float = ENTROPY_TOLERANCE,
    pictures: Sequence[str] = (),
) -> str:
    """The page, the same text for the same documents.

    Args:
        documents: of ``read_documents``.
        unit: of the likelihood table, one of UNITS.
        baseline: label that speeds are compared with; the one model without an energy if None.
        entropy_tolerance: bits, of ``speed_at_equal_quality``.
        pictures: names of pictures beside the page, of ``draw``.

    Raises:
        ValueError: no document; another unit; a baseline of which there are no texts; a tolerance below 0.
    """
    if not documents:
        raise ValueError("documents: expected at least one, got none")
    if unit not in UNITS:
        raise ValueError(f"--unit: expected one of {', '.join(UNITS)}, got {unit!r}")
    labels = list(dict.fromkeys(document.label for document in documents))
    sections = [
        [f"# Evaluation of {_plain('; '.join(labels))}", ""],
        _sources(documents),
        _likelihood(documents, unit, pictures),
        _texts(documents, pictures),
        _speed(documents, baseline, entropy_tolerance),
    ]
    return "\n".join(line for section in sections for line in section).rstrip("\n") + "\n"


# --- Markdown ---------------------------------------------------------------------------------------------------------------------


def _plain(text: object) -> str:
    """One line that is neither a cell's end nor HTML."""
    return " ".join(str(text).split()).replace("|", r"\|").replace("<", r"\<")


def _table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Rows of one set of columns; a column without a value is left out. Padded, so that it can be read as text."""
    names = [name for name in rows[0] if any(row[name] != _NONE for row in rows)]
    widths = {name: max(len(name), 3, *(len(row[name]) for row in rows)) for name in names}
    lines = ["| " + " | ".join(name.ljust(widths[name]) for name in names) + " |"]
    lines.append("|" + "|".join("-" * (widths[name] + 2) for name in names) + "|")
    lines += ["| " + " | ".join(row[name].ljust(widths[name]) for name in names) + " |" for row in rows]
    return [*lines, ""]


def _pictures(drawn: Sequence[str], *names: str) -> list[str]:
    return [line for name in names if name in drawn for line in (f"![{_CAPTIONS[name]}]({name})", "")]


def _estimate(value: Mapping[str, float | None] | None, digits: int, *, null: str = _NONE) -> str:
    """``null``: what a mean that is null means."""
    if value is None:
        return _NONE
    if value["mean"] is None:
        return null
    error = "" if value["stderr"] is None else f" ± {value['stderr']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{error}"


def _ess(value: Mapping[str, float | None] | None) -> str:
    """Two digits, rounded down: what is just below the ESS that is asked for is to look so."""
    if value is None or value["mean"] is None:
        return _NONE
    return _estimate({**value, "mean": math.floor(round(100 * value["mean"], 6)) / 100}, 2)


def _number(value: float | None, digits: int | None = None) -> str:
    """Three significant figures, or so many digits."""
    if value is None:
        return _NONE
    if digits is not None:
        return f"{value:.{digits}f}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


# --- sections ---------------------------------------------------------------------------------------------------------------------


def _sources(documents: Sequence[Document]) -> list[str]:
    rows = [
        {
            "file": _plain(document.path),
            "kind": document.kind,
            "model": _plain(document.label),
            "machine": _plain(machine_of(document)),
            "seconds": _number(document.seconds),
        }
        for document in documents
    ]
    lines = ["Made by `edlm report`. ± is one standard error.", "", "## What was read", "", *_table(rows)]
    for kind in dict.fromkeys(document.kind for document in documents):
        of_kind = [document for document in documents if document.kind == kind]
        shared = {
            key: value
            for key, value in of_kind[0].settings.items()
            if len(of_kind) > 1 and all(key in other.settings and other.settings[key] == value for other in of_kind)
        }
        if shared:
            lines += _settings(f"every document of kind {kind}", shared)
        for document in of_kind:
            own = {key: value for key, value in document.settings.items() if key not in shared}
            lines += _settings(document.path, own) if own or document.warnings or not shared else []
            lines += [f"  - warning: {_plain(warning)}" for warning in document.warnings]
    return [*lines, ""]


def _settings(whose: str, settings: Mapping[str, Any]) -> list[str]:
    said = "; ".join(f"{key} {_words(value)}" for key, value in settings.items())
    said = re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1", said)  # so much of a SHA-256 tells files apart
    bullet = f"- {_plain(whose)}: {_plain(said) or 'no other settings'}"
    return wrap(bullet, 130, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} ({_words(of)})" for key, of in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_words, value)) or "none"
    return {None: "none", True: "yes", False: "no"}[value] if value is None or isinstance(value, bool) else str(value)


def _unlike(what: str, found: Iterable[tuple[str, Any, str | None, str]]) -> list[str]:
    """Of (name, sort, identity, path): a line for each name that means several things of one sort. None is not known."""
    named: dict[tuple[str, Any], dict[str, list[str]]] = {}
    for name, sort, identity, path in found:
        if identity is not None:
            paths = named.setdefault((name, sort), {}).setdefault(identity, [])
            paths += [path] if path not in paths else []
    said = [(name, " and in ".join(map(", ".join, of.values()))) for (name, _), of in named.items() if len(of) > 1]
    return [line for name, paths in said for line in (_plain(f"{what} {name} is not the same in {paths}."), "")]


def _likelihood(documents: Sequence[Document], unit: str, pictures: Sequence[str]) -> list[str]:
    found = likelihoods(documents)
    if not found:
        return []
    texts = list(dict.fromkeys(row["text"] for _, row in found))
    digits = 2 if unit == "perplexity" else 4
    effective = "ESS of n, of each text" if len(texts) > 1 else "ESS of n"
    groups: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for label, row in found:
        is_ = _DISTRUSTED if is_distrusted(row) else row["direction"]
        key = label, *(row[name] for name in ("measure", "steps", "num_candidates", "log_Z")), is_
        groups.setdefault(key, {})[row["text"]] = row
    notes, rows = _Notes(), []
    for (label, measure, steps, n, log_z, is_), of_text in groups.items():
        ess = [of_text[text]["ess"] if text in of_text else None for text in texts]
        name = measure + (notes.mark(_PAPER_JOINT) if measure == "paper_joint" else "")
        exact = log_z == "exact"  # nothing was drawn
        name += notes.mark(_EXACT_JOINT) if exact and measure in ("joint_nll", "finite_step_elbo") else ""
        time = "continuous" if measure in ("nelbo", "paper_joint") and steps is None else _NONE
        row = {"model": _plain(label), "measure": name, "T": time if steps is None else str(steps)}
        few = is_ == _DISTRUSTED
        row |= {
            "log Z": _LOG_Z[log_z],
            "n": _NONE if exact else _number(n, 0),
            "is": is_ + (notes.mark(_FEW_DRAWS) if few else ""),
        }
        for text in texts:
            value = of_text[text][unit] if text in of_text else None
            value = value | {"stderr": None} if value and few else value  # the error of log Z is not in it
            row[_plain(text)] = _estimate(value, digits, null="not finite")
        row[effective] = _NONE if exact or not any(ess) else " / ".join(map(_ess, ess))
        rows.append(row)
    lines = [
        "## Likelihood",
        "",
        f"{unit.replace('_', ' ').capitalize()} of each text; low is good.",
        "",
        *_table(rows),
        *notes.lines(),
    ]
    lines += [*_unlike("The text", digests(documents, "likelihood")), *_other_windows(found, texts)]
    if unit != "bits_per_character":
        lines += ["What is counted per token compares only models of one tokenizer.", ""]
    if unit == "perplexity":
        lines += ["What is said of a perplexity holds of its logarithm: it is the exponential of a figure that is so.", ""]
    for words, at in ((MEASURES, 1), (DIRECTIONS, -1)):
        there = {key[at] for key in groups}
        lines += [*(f"- {name}: {meaning}" for name, meaning in words.items() if name in there), ""]
    return lines + _pictures(pictures, "bounds_vs_n.png")


def _other_windows(found: Sequence[tuple[str, dict[str, Any]]], texts: Sequence[str]) -> list[str]:
    lines = []
    for text in texts:
        windows: dict[str, list[str]] = {}
        for label, row in found:
            if row["text"] == text:
                windows.setdefault(f"{row['sequences']} of {row['length']} tokens", []).append(label)
        if len(windows) > 1:
            said = "; ".join(f"{what}: {', '.join(dict.fromkeys(of))}" for what, of in windows.items())
            lines += [f"Not the same windows of {_plain(text)}: {_plain(said)}.", ""]
    return lines


def _texts(documents: Sequence[Document], pictures: Sequence[str]) -> list[str]:
    real = real_texts(documents)
    rows = [(f"real text of {path}" if len(real) > 1 else "real text", row) for path, row in real]
    for label, found in decodings(documents).items():
        rows += [(f"{label}, {row['file']}" if row["file"] else label, row) for _, row in found]
    if not rows:
        return []
    names, notes = judges(documents), _Notes()
    grams = {
        kind: sorted({n for _, row in rows for n in row[kind]}, key=lambda n: (len(n), n)) for kind in ("distinct", "repetition")
    }
    table = []
    for name, row in rows:
        cells = {"texts of": _plain(name), "steps": _number(row["steps"], 0), "texts": f"{row['num_texts']} x {row['length']}"}
        for judge in names:
            score = row["judges"].get(judge)
            skipped = score.get("skipped") if score else None
            mark = notes.mark(f"{_plain(judge)} could not score {skipped} of the {row['num_texts']} texts.") if skipped else ""
            cells[f"{_plain(judge)}, bits per character"] = _estimate(score and score["bits_per_character"], 3) + mark
            # A score of fewer words looks better than it is.
            words = f"{_plain(judge)} leaves out words that it does not know; what is left looks better for it."
            lost = score.get("left_out") if score else None
            cells[f"{_plain(judge)}, left out"] = f"{100 * lost:.1f} %" + notes.mark(words) if lost else _NONE
            cells[f"{_plain(judge)}, perplexity"] = _estimate(score and score["perplexity"], 2)
        cells["entropy, bits"] = _estimate(row["entropy"], 3)
        cells |= {f"distinct-{n}": _number(row["distinct"].get(n), 3) for n in grams["distinct"]}
        cells |= {f"repetition-{n}": _estimate(row["repetition"].get(n), 3) for n in grams["repetition"]}
        cells |= {"self-BLEU": _estimate(row["self_bleu"], 3), "MAUVE": _number(row["mauve"], 3)}
        cells |= {"NFE": _number(row["nfe"], 0), "energy NFE": _number(row["energy_nfe"], 0), "seconds": _number(row["seconds"])}
        table.append(cells)
    judged = (
        (judge, None, judge_identity(document, row, judge), document.path)
        for document in documents
        if document.kind != "likelihood"
        for row in document.rows
        for judge in row["judges"]
    )
    return [
        "## Texts",
        "",
        "Quality (judges; low is good) beside diversity (entropy, distinct, repetition, self-BLEU), as the one is bought with the "
        "other: a text that repeats itself pleases a judge. Real text is the mark, on both sides. Texts are number x tokens; "
        "distinct-n falls with their number. Seconds are of decoding them all. Entropies compare only what is counted in one "
        f"tokenizer's tokens.{_other_units(documents)}",
        "",
        *_table(table),
        *notes.lines(),
        *_unlike("The text", digests(documents, "decoding", "samples")),
        *_unlike("The judge", judged),
        *_pictures(pictures, "quality_vs_steps.png", "quality_vs_seconds.png", "quality_vs_entropy.png", "ess_vs_t.png"),
    ]


def _other_units(documents: Sequence[Document]) -> str:
    units: dict[str, list[str]] = {}
    for document in documents:
        if document.unit_of_diversity is not None:
            units.setdefault(document.unit_of_diversity, []).append(document.path)
    said = "; ".join(f"{unit} in {_plain(', '.join(paths))}" for unit, paths in units.items())
    return f" Here they are counted in several units: {said}." if len(units) > 1 else ""


# --- speed ------------------------------------------------------------------------------------------------------------------------


def _speed(documents: Sequence[Document], baseline: str | None, tolerance: float) -> list[str]:
    models = decodings(documents)
    if baseline is not None and baseline not in models:
        raise ValueError(
            f"--baseline: expected a model of which there are texts ({', '.join(models) or 'none'}), got {baseline!r}"
        )
    if not tolerance >= 0:
        raise ValueError(f"--entropy-tolerance: expected bits >= 0, got {tolerance}")
    timed = {label: rows for label, rows in models.items() if any(row["seconds"] is not None for _, row in rows)}
    if len(timed) < 2 and baseline is None:
        return []
    lines = ["## Speed at equal quality", ""]
    if baseline is None:
        plain = [label for label, rows in timed.items() if len(rows) > 1 and not any(row["energy_nfe"] for _, row in rows)]
        if len(plain) != 1:
            got = f"of several ({', '.join(map(_plain, plain))})" if plain else "as every one has an energy, or one point alone"
            return [*lines, f"Not compared: no model is the baseline by itself, {got}; choose one with --baseline.", ""]
        baseline = plain[0]
    lines += [
        f"Seconds of {_plain(baseline)}, the baseline, over seconds of the model, at the model's own scores: above 1 the model is "
        "faster. Of the baseline counts the least time at which it has a score at least as good; between its points log(seconds) is "
        "linear in the score, and beyond them nothing is claimed. Nor is there a ratio where the entropies differ by more than "
        f"{tolerance:g} bits. In brackets: the ratio with the difference of the two scores moved by one standard error either way "
        f"({_NONE} where the baseline's curve ends before, or an error is not known); seconds were taken once, and count as exact. Xu "
        "et al. (arXiv 2410.21357) print 1.3.",
        "",
    ]
    for judge in judges(documents):
        lines += [f"### {_plain(judge)}", "", *_compared(models, baseline, judge, tolerance)]
    return lines


def _compared(models: Mapping[str, Rows], baseline: str, judge: str, tolerance: float) -> list[str]:
    """Of one judge: a line a model, then every model's points in one table."""
    summaries: list[str] = []
    refused: dict[str, list[str]] = {}
    table: list[dict[str, str]] = []
    others = timed_and_scored(models[baseline], judge)
    for label, rows in models.items():
        if label == baseline:
            continue
        points = timed_and_scored(rows, judge)
        if not points or not others:
            why = f"{label if others else baseline} has no seconds or no score"
        else:
            why = why_not_compared([*others, *points], judge)
        if why:
            refused.setdefault(why, []).append(label)
            continue
        matches = speed_at_equal_quality(points_of(points, judge), points_of(others, judge), entropy_tolerance=tolerance)
        summaries.append(f"- {_plain(label)} against {_plain(baseline)}: {summary(matches)}.")
        table += [
            {
                "model": _plain(label),
                "steps": _number(m.point.steps, 0),
                "bits per character": _estimate({"mean": m.point.score, "stderr": m.point.stderr}, 3),
                "seconds a text": _number(m.point.seconds),
                "baseline's seconds": _number(m.seconds),
                "entropy": _number(m.point.entropy, 3),
                "baseline's entropy": _number(m.entropy, 3),
                "ratio": f"{m.ratio:.2f} ({_number(m.low, 2)} to {_number(m.high, 2)})" if m.ratio is not None else m.why,
            }
            for m in matches
        ]
    summaries += [
        f"- {_plain('; '.join(of))} against {_plain(baseline)}: not compared, as {_plain(why)}." for why, of in refused.items()
    ]
    return [*summaries, "", *(_table(table) if table else ())]
