"""What documents of ``edlm eval`` say, in pictures: one a question."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from textwrap import fill
from typing import TYPE_CHECKING, Any

from .documents import REAL_TEXT, Document, decodings, is_distrusted, judges, likelihoods, real_texts, seconds_of_a_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind tell apart, from the darkest on; then the same with another line and mark.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
LINES = ("-", "--", ":", "-.")
_MARKS = ("o", "s", "^", "D", "v", "P", "X")
DPI = 160
_GREY = "0.35"
_WIDTH = 64  # characters of a title or a label that fit a line
_REAL = {"color": _GREY, "linewidth": 1, "linestyle": (0, (4, 3)), "zorder": 1.5}
_BITS = "bits per character"

Style = dict[str, Any]  # of a line: colour, line and mark
_Row = dict[str, Any]
_Value = dict[str, Any]  # with mean and stderr


@dataclass(frozen=True)
class _Panel:
    title: str
    x: str
    y: str
    keys: dict[str, Style]  # of the legend
    draw: Callable[[Axes], None]


def draw(documents: Sequence[Document]) -> dict[str, bytes]:
    """Name of a PNG -> its bytes, for each question that there are data for; the same bytes for the same documents.

    quality_vs_steps.png, quality_vs_seconds.png and quality_vs_entropy.png have a panel a judge, ess_vs_t.png one for each number of
    steps, bounds_vs_n.png one a text of which there are joint NLLs of several n. A colour is a label throughout; bars are one
    standard error, where it is known. A bound that is not to be trusted is hollow and has none; of bounds that coincide the earlier
    label's are wider.

    Raises:
        ValueError: matplotlib is missing.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"plots: expected matplotlib, got none that can be imported ({error}); pip install 'edlm-torch[plot]', or --no-plots"
        ) from None
    labels = list(dict.fromkeys([*decodings(documents), *(label for label, _ in likelihoods(documents))]))
    styles = {
        label: {
            "color": COLOURS[i % len(COLOURS)],
            "linestyle": LINES[i // len(COLOURS) % len(LINES)],
            "marker": _MARKS[i % len(_MARKS)],
        }
        for i, label in enumerate(labels)
    }
    questions = {
        "quality_vs_steps.png": _quality(documents, styles, _against_steps),
        "quality_vs_seconds.png": _quality(documents, styles, _against_seconds),
        "quality_vs_entropy.png": _quality(documents, styles, _against_entropy),
        "ess_vs_t.png": _ess(documents, styles),
        "bounds_vs_n.png": _bounds(documents, styles),
    }
    return {name: _png(panels, labels) for name, panels in questions.items() if panels}


# --- quality ----------------------------------------------------------------------------------------------------------------------


def _score(row: _Row, judge: str) -> _Value:
    return row["judges"].get(judge, {}).get("bits_per_character", {"mean": None, "stderr": None})


def _against_steps(row: _Row) -> _Value:
    return {"mean": row["steps"], "stderr": None}


def _against_seconds(row: _Row) -> _Value:
    return {"mean": seconds_of_a_text(row), "stderr": None}


def _against_entropy(row: _Row) -> _Value:
    return row["entropy"]


_Where = Callable[[_Row], _Value]
_X = {
    _against_steps: "decoding steps",
    _against_seconds: "seconds a text",
    _against_entropy: "unigram entropy of a text, bits (large marks: most steps)",
}


def _quality(documents: Sequence[Document], styles: dict[str, Style], where: _Where) -> list[_Panel]:
    rows = {label: [row for _, row in found] for label, found in decodings(documents).items()}
    real = [row for _, row in real_texts(documents)]
    panels = []
    for judge in judges(documents):
        scored = {
            label: [row for row in found if _score(row, judge)["mean"] is not None and where(row)["mean"] is not None]
            for label, found in rows.items()
        }
        if any(scored.values()):
            level = [row for row in real if _score(row, judge)["mean"] is not None]
            stepless = [
                (label, row)
                for label, found in rows.items()
                for row in found
                if where is _against_steps and row["steps"] is None and _score(row, judge)["mean"] is not None
            ]
            panels.append(_quality_panel(judge, where, scored, level, stepless, styles))
    return panels


def _quality_panel(
    judge: str,
    where: _Where,
    scored: dict[str, list[_Row]],
    level: Sequence[_Row],
    stepless: Sequence[tuple[str, _Row]],
    styles: dict[str, Style],
) -> _Panel:
    def panel(axes: Axes) -> None:
        if where is not _against_entropy:
            _logarithmic(
                axes, 2 if where is _against_steps else 10, [where(row)["mean"] for rows in scored.values() for row in rows]
            )
        for label, rows in scored.items():
            if rows:
                _curve(axes, [where(row) for row in rows], [_score(row, judge) for row in rows], styles[label])
                if where is _against_entropy:
                    last, style = rows[-1], styles[label] | {"linestyle": "none"}
                    axes.plot(where(last)["mean"], _score(last, judge)["mean"], markersize=9, zorder=3, **style)
        for label, row in stepless:
            axes.axhline(_score(row, judge)["mean"], linewidth=1.2, **styles[label] | {"marker": None})
        for row in level:
            axes.axhline(_score(row, judge)["mean"], **_REAL)
            if where is _against_entropy and row["entropy"]["mean"] is not None:
                axes.axvline(row["entropy"]["mean"], **_REAL)

    labels = [*(label for label, rows in scored.items() if rows), *(label for label, _ in stepless)]
    keys = {label: styles[label] for label in labels} | ({REAL_TEXT: _REAL} if level else {})
    x = _X[where] + (" (lines without marks: no steps)" if stepless else "")
    return _Panel(judge, x, f"{_BITS}, low is good", keys, panel)


# --- draws ------------------------------------------------------------------------------------------------------------------------


def _ess(documents: Sequence[Document], styles: dict[str, Style]) -> list[_Panel]:
    found: dict[int, dict[str, _Row]] = {}
    for label, rows in decodings(documents).items():
        for _, row in rows:
            if row["ess"] and row["steps"] is not None:
                found.setdefault(row["steps"], {})[label] = row
    panels = []
    for steps in sorted(found):
        keys = {label: styles[label] for label in found[steps]} | {"n, the most there can be": {"color": _GREY, "linestyle": ":"}}
        title = f"{steps} step{'' if steps == 1 else 's'}"
        draw_it = partial(_draws, of_label=found[steps], styles=styles)
        panels.append(_Panel(title, "t (decoding goes from 1 to 0)", "ESS, draws", keys, draw_it))
    return panels


def _draws(axes: Axes, of_label: dict[str, _Row], styles: dict[str, Style]) -> None:
    for label, row in of_label.items():
        bins = sorted(row["ess"], key=lambda b: b["t"])
        t = [b["t"] for b in bins]
        _curve(axes, [{"mean": value, "stderr": None} for value in t], bins, styles[label])
        axes.plot(t, [b["num_candidates"] for b in bins], color=styles[label]["color"], linestyle=":", linewidth=1.2)
    axes.set_xlim(1.02, -0.02)
    axes.set_ylim(bottom=0)


_UNIT = "bits_per_character"
_KINDS = {
    "lower": ("log Z lower: below in expectation", {"color": _GREY, "linestyle": "-", "marker": "o"}),
    "upper_asymptotic": (
        "log Z upper, asymptotic: above for n large enough",
        {"color": _GREY, "linestyle": "--", "marker": "s"},
    ),
    "exact": ("log Z exact", {"color": _GREY, "linestyle": ":"}),
}
_HOLLOW = {"linestyle": "none", "markerfacecolor": "white"}


def _bounds(documents: Sequence[Document], styles: dict[str, Style]) -> list[_Panel]:
    found: dict[str, dict[str, list[_Row]]] = {}
    for label, row in likelihoods(documents):
        if row["measure"] == "joint_nll" and row["log_Z"] is not None and row[_UNIT]["mean"] is not None:
            found.setdefault(row["text"], {}).setdefault(label, []).append(row)
    panels = []
    for text, of_label in found.items():
        drawn = {label: rows for label, rows in of_label.items() if len({row["num_candidates"] for row in rows} - {None}) > 1}
        if drawn:
            kinds = {row["log_Z"] for rows in drawn.values() for row in rows}
            keys = {label: {"color": styles[label]["color"]} for label in drawn}  # lines and marks say which log Z it is
            keys |= dict(key for kind, key in _KINDS.items() if kind in kinds)
            if any(is_distrusted(row) for rows in drawn.values() for row in rows):
                keys["hollow: not to be trusted"] = {"color": _GREY, "marker": "o", **_HOLLOW}
            panels.append(
                _Panel(
                    f"{text}: joint NLL, T = 1",
                    "draws n behind log Z (no error is known below an ESS of 5)",
                    _BITS,
                    keys,
                    partial(_brackets, drawn=drawn, styles=styles),
                )
            )
    return panels


def _brackets(axes: Axes, drawn: dict[str, list[_Row]], styles: dict[str, Style]) -> None:
    _logarithmic(axes, 2, [row["num_candidates"] for rows in drawn.values() for row in rows if row["num_candidates"]])
    for kind, (_, line) in _KINDS.items():
        of_label = {label: [row for row in rows if row["log_Z"] == kind] for label, rows in drawn.items()}
        points = {label: [(row["num_candidates"], row[_UNIT]["mean"]) for row in rows] for label, rows in of_label.items()}
        hidden = list(points.values())  # by later ones of the same points: so much wider, to be seen around them
        for label, rows in of_label.items():
            hidden.remove(points[label])
            wider = hidden.count(points[label])
            style = line | {"color": styles[label]["color"], "linewidth": 1.4 + 2.5 * wider, "markersize": 5 + 4 * wider}
            if kind == "exact":
                for row in rows:
                    axes.axhline(row[_UNIT]["mean"], **style)
            elif rows:
                draws = [{"mean": row["num_candidates"], "stderr": None} for row in rows]
                _curve(axes, draws, [row[_UNIT] | ({"stderr": None} if is_distrusted(row) else {}) for row in rows], style)
                few = [point for point, row in zip(points[label], rows, strict=True) if is_distrusted(row)]
                axes.plot([n for n, _ in few], [mean for _, mean in few], **style | _HOLLOW, zorder=3)


# --- style ------------------------------------------------------------------------------------------------------------------------


def _curve(axes: Axes, x: Sequence[dict[str, Any]], y: Sequence[dict[str, Any]], style: Style) -> None:
    """Marks with one standard error each way, where it is known."""
    bars = [[e["stderr"] or 0.0 for e in values] if any(e["stderr"] for e in values) else None for values in (x, y)]
    axes.errorbar(
        [e["mean"] for e in x],
        [e["mean"] for e in y],
        xerr=bars[0],
        yerr=bars[1],
        markeredgecolor="white",
        markeredgewidth=0.6,
        capsize=2,
        elinewidth=1,
        **{"linewidth": 1.4, "markersize": 5} | style,
    )


def _logarithmic(axes: Axes, base: int, values: Sequence[float]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

    axes.set_xscale("log", base=base)
    there = sorted(set(values))
    decades = math.log10(there[-1] / there[0])
    if base == 2 and len(there) <= 10:
        axes.xaxis.set_major_locator(FixedLocator(there))
    elif base == 10:
        axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5) if decades < 2.5 else (1,)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _png(panels: Sequence[_Panel], labels: Sequence[str]) -> bytes:
    picture = io.BytesIO()
    # Without metadata: the version of matplotlib is no part of the picture.
    _figure(panels, labels).savefig(picture, format="png", dpi=DPI, metadata={"Software": None})
    return picture.getvalue()


def _figure(panels: Sequence[_Panel], labels: Sequence[str]) -> Figure:
    """The panels, two in a row, and one legend of what is in any of them, the labels first and in their order."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    known = {text: style for panel in panels for text, style in panel.keys.items()}
    keys = {text: known[text] for text in (*(label for label in labels if label in known), *known)}
    handles = [
        Line2D([], [], markersize=5, label=fill(text, _WIDTH), **{"linewidth": 1.6} | style) for text, style in keys.items()
    ]
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    width = 5.6 * columns + 0.4  # inches
    ncols = max(1, min(len(keys), int(width / (0.7 + 0.085 * max(min(len(text), _WIDTH) for text in keys)))))
    figure = Figure(figsize=(width, 3.9 * rows + 0.3 + 0.22 * -(-len(keys) // ncols)), layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the user's settings say
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1)
        panel.draw(axes)
        axes.set_title(fill(panel.title, _WIDTH), loc="left", fontsize=11, parse_math=False)  # a "$" in a name is no mathematics
        axes.set(xlabel=panel.x, ylabel=panel.y)
        axes.grid(color="0.9", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=ncols, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure
