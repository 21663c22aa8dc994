"""Curves of runs, read from their ``metrics.jsonl`` and drawn into one picture."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AXES = {"step": "training steps", "tokens": "tokens trained on", "seconds": "hours of training"}
FORMATS = ("png", "svg", "pdf")
_TRAINING = "Training loss"
_UNITS = {
    "lr": "learning rate",
    "grad_norm": "norm of the gradient",
    "tokens_per_second": "tokens a second",
    "nce_loss": "NCE loss, nats per sequence",
    "accuracy": "accuracy, data against proposals",
    "energy_gap": "energy of proposals minus that of data, nats",
    "valid_loss": "validation loss, nats per token",
    "valid_nce_loss": "validation NCE loss, nats per sequence",
    "valid_accuracy": "validation accuracy",
    "valid_energy_gap": "validation energy gap, nats",
}
# Okabe and Ito's colours, which the colour-blind tell apart, from the darkest on; then the same with another line.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
_LINES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Run:
    """One run's lines, in order of their steps."""

    path: Path  # the folder
    lines: list[dict[str, Any]]
    config: dict[str, Any]  # {} where there is none
    damaged: int  # lines that could not be read

    @property
    def keys(self) -> list[str]:
        """What there are numbers of, besides the step."""
        return [k for k in dict.fromkeys(k for line in self.lines for k in line) if k != "step" and len(self.curve(k)[0])]

    @property
    def characters_per_token(self) -> float | None:
        """As the validations counted them: valid_bits are a character's, valid_loss is a token's. None where nobody says."""
        for line in self.lines:
            nats, bits = line.get("valid_loss"), line.get("valid_bits")
            if _is_number(nats) and _is_number(bits) and nats > 0 and bits > 0:
                return nats / math.log(2) / bits
        data = self.config.get("data")
        return 1.0 if isinstance(data, dict) and data.get("tokenizer") == "text8" else None

    def curve(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """(indices of lines, values) where ``key`` is a finite number."""
        found = [(i, line[key]) for i, line in enumerate(self.lines) if _is_number(line.get(key))]
        index, values = zip(*found, strict=True) if found else ((), ())
        return np.array(index, dtype=np.int64), np.array(values, dtype=np.float64)

    def x(self, axis: str) -> np.ndarray:
        """[number of lines]: steps, tokens or hours."""
        steps = np.array([line["step"] for line in self.lines], dtype=np.float64)
        if axis == "step":
            return steps
        if axis == "tokens":
            try:
                return steps * self.config["batch_size"] * self.config["data"]["length"]
            except (KeyError, TypeError):
                raise ValueError(
                    f"--x: expected a config.json in {self.path} to count tokens by, got none; take --x step"
                ) from None
        index, seconds = self.curve("seconds")
        if not len(index):
            raise ValueError(f"--x: expected seconds in the lines of {self.path}, got none; take --x step")
        return np.interp(steps, steps[index], seconds) / 3600  # a validation's line need not have them


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def read_run(path: str | Path) -> Run:
    """A run's folder, or its metrics.jsonl. Lines that are damaged are counted and left out.

    Raises:
        ValueError: no such run; no line in it that can be read.
    """
    path = Path(path)
    file = path / "metrics.jsonl" if path.is_dir() else path
    if not path.exists():
        raise ValueError(f"run: expected the folder of a run, or its metrics.jsonl, got {path}, which is not there")
    if not file.exists():
        inner = sorted(f.parent.name for f in path.glob("*/metrics.jsonl"))
        there = f"; its folders {', '.join(inner[:4])} have one" if inner else ""
        raise ValueError(f"run: expected a metrics.jsonl in {path}, got none{there}")
    lines, damaged = {}, 0
    for text in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            if not _is_number(line["step"]):
                raise ValueError("step: expected a number")
            lines[int(line["step"])] = lines.get(int(line["step"]), {}) | line
        except (ValueError, KeyError, TypeError):
            damaged += 1
    if not lines:
        raise ValueError(f"run: expected lines of metrics in {file}, got {f'{damaged} damaged ones' if damaged else 'none'}")
    try:
        config = json.loads((file.parent / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    return Run(file.parent, [lines[step] for step in sorted(lines)], config if isinstance(config, dict) else {}, damaged)


def names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart; numbered where nothing does."""
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, parts), default=0) + 1):
        found = ["/".join(p[-count:]) for p in parts]
        if len(set(found)) == len(found):
            return found
    return [f"{path.name} ({i})" for i, path in enumerate(paths, 1)]


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred means over ``window`` values: no lag. At the beginning, where curves are steep, over as many values before as after; at
    the end over those that there are, for a curve that ended in its last value alone would be read by its noise."""
    total, half = np.concatenate([[0.0], np.cumsum(values)]), window // 2
    i = np.arange(len(values))
    left = np.minimum(half, i)
    right = np.minimum(left, len(values) - 1 - i)
    return (total[i + right + 1] - total[i - left]) / (left + right + 1)


def _window(count: int, asked: int | None) -> int:
    return asked or 2 * (count // 50) + 1


def plot(
    runs: Sequence[str | Path],
    out: str | Path,
    *,
    y: Sequence[str] = (),
    x: str = "step",
    window: int | None = None,
    title: str | None = None,
) -> list[str]:
    """Draw the curves of runs into the picture ``out``.

    Without ``y``: a panel of training loss and one of validation with its standard error, in bits per character (per token where
    neither a validation nor the tokenizer says how many characters a token has); for runs of NCE one of their loss, beside 2 ln 2, and
    one of their accuracy, beside 1/2.

    Args:
        runs: folders with metrics.jsonl, or such files. out: .png, .svg or .pdf.
        y: keys of the lines, a panel each. x: "step", "tokens" or "seconds". window: of ``smooth``, in lines (default: about a 25th of
            a run's lines; 1 draws the values as they are). title: over everything.

    Returns:
        Notes: what was left out.

    Raises:
        ValueError: no such run, nothing to draw, a key that no run has, an axis that a run lacks, matplotlib missing.
        OSError: ``out`` cannot be written; what was there before is kept.
    """
    out = Path(out)
    if out.suffix[1:] not in FORMATS:
        raise ValueError(f"--out: expected a name that ends in {', '.join('.' + f for f in FORMATS)}, got {out}")
    if x not in AXES:
        raise ValueError(f"--x: expected one of {', '.join(AXES)}, got {x!r}")
    if not runs:
        raise ValueError("runs: expected at least one, got none")
    if window is not None and window < 1:
        raise ValueError(f"--smooth: expected a number of lines >= 1, got {window}")
    found = [read_run(path) for path in runs]
    labels = names([run.path for run in found])
    known = list(dict.fromkeys(key for run in found for key in run.keys))
    unknown = [key for key in y if key not in known]
    if unknown:
        raise ValueError(f"--y: expected keys that the runs have ({', '.join(known) or 'none'}), got {', '.join(unknown)}")
    notes = [f"{run.path}: {run.damaged} damaged lines left out" for run in found if run.damaged]
    series = [
        _Series(label, run, x, window, _COLOURS[i % len(_COLOURS)], _LINES[i // len(_COLOURS) % len(_LINES)])
        for i, (label, run) in enumerate(zip(labels, found, strict=True))
    ]
    panels = [_panel_of(key, series) for key in y] if y else _usual_panels(series)
    if not panels:
        raise ValueError(f"--y: expected runs with loss or nce_loss, got {', '.join(known) or 'no numbers'}; choose with --y")
    for label, run in zip(labels, found, strict=True):
        if not any(run.curve(key)[0].size for panel in panels for key in panel.keys):
            notes.append(f"{label}: nothing of it is drawn; it has {', '.join(run.keys) or 'no numbers'}")
    picture = io.BytesIO()
    _draw(panels, series, AXES[x], title).savefig(picture, format=out.suffix[1:], dpi=160)
    try:
        replace_file(out, picture.getvalue())
    except OSError as error:
        raise OSError(error.errno, f"--out: {out} cannot be written: {error.strerror or error}; choose another name") from error
    return notes


# --- panels -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Series:
    label: str
    run: Run
    axis: str
    window: int | None
    colour: str
    line: str

    def trace(self, key: str, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
        index, values = self.run.curve(key)
        return self.run.x(self.axis)[index], scale * values

    def bits(self) -> tuple[np.ndarray, np.ndarray]:
        """The training loss, per character where it is known what that is."""
        return self.trace("loss", 1 / math.log(2) / (self.run.characters_per_token or 1.0))

    def training(self, axes: Axes, key: str) -> None:
        """Every value thin, their centred means thick."""
        x, values = self.bits() if key == "loss" else self.trace(key)
        if not len(x):
            return
        window = _window(len(values), self.window)
        style = {"color": self.colour, "linestyle": self.line}
        if window > 1 and len(values) > 2:
            axes.plot(x, values, linewidth=0.6, alpha=0.3, **style)
        means = smooth(values, window)
        # One value is no line.
        axes.plot(x, means, linewidth=1.8, marker="o" if len(values) < 3 else None, markersize=4, **style)

    def validation(self, axes: Axes, key: str) -> None:
        """Marks with one standard error, where it is known."""
        x, values = self.trace(key)
        if not len(x):
            return
        at, errors = self.trace(f"{key}_stderr")
        known = dict(zip(at.tolist(), errors.tolist(), strict=True))
        bars = [known.get(position, 0.0) for position in x.tolist()]
        axes.errorbar(
            x,
            values,
            yerr=bars if known else None,
            color=self.colour,
            linestyle=self.line,
            linewidth=1.2,
            marker="o",
            markersize=4.5,
            markeredgecolor="white",
            markeredgewidth=0.6,
            zorder=3,
            capsize=2,
            elinewidth=1,
        )


@dataclass(frozen=True)
class _Panel:
    title: str
    unit: str
    keys: tuple[str, ...]
    draw: Callable[[Axes, _Series], None]
    level: tuple[float, str] | None = None  # a line to compare with, and what it is


def _usual_panels(series: Sequence[_Series]) -> list[_Panel]:
    def there(*keys: str) -> bool:
        return any(s.run.curve(key)[0].size for s in series for key in keys)

    def both(key: str) -> Callable[[Axes, _Series], None]:
        def draw(axes: Axes, s: _Series) -> None:
            s.training(axes, key)
            s.validation(axes, f"valid_{key}")

        return draw

    panels = []
    if there("loss"):
        panels.append(_panel_of("loss", series))
    if there("valid_bits"):
        panels.append(_panel_of("valid_bits", series))
    for key, title, level in (
        ("nce_loss", "NCE loss", (2 * math.log(2), "2 ln 2: knows nothing")),
        ("accuracy", "Accuracy", (0.5, "chance")),
    ):
        if there(key, f"valid_{key}"):
            dots = ", validation as dots" if there(f"valid_{key}") else ""
            panels.append(_Panel(f"{title}{dots}", _UNITS[key], (key, f"valid_{key}"), both(key), level))
    return panels


def _panel_of(key: str, series: Sequence[_Series]) -> _Panel:
    draw = (lambda a, s: s.validation(a, key)) if key.startswith("valid_") else (lambda a, s: s.training(a, key))
    if key == "loss":
        kinds = {"character" if s.run.characters_per_token else "token" for s in series if s.run.curve(key)[0].size}
        return _Panel(_TRAINING, f"bits per {' or '.join(sorted(kinds))}", (key,), draw)
    if key == "valid_bits":
        return _Panel("Validation, ± one standard error", "bits per character", (key,), draw)
    return _Panel(key, _UNITS.get(key, key), (key,), draw)


def _draw(panels: Sequence[_Panel], series: Sequence[_Series], x_label: str, title: str | None) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
        from matplotlib.ticker import EngFormatter
    except ImportError as error:
        raise ValueError(
            f"plot: expected matplotlib, got none that can be imported ({error}); pip install 'edlm-torch[plot]'"
        ) from None
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.6 * columns + 0.4, 3.9 * rows + 0.5), layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the user's settings say
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1)
        drawn = [s for s in series if any(s.run.curve(key)[0].size for key in panel.keys)]
        for s in drawn:
            panel.draw(axes, s)
        if panel.level is not None:
            value, text = panel.level
            axes.axhline(value, color="0.35", linewidth=1, linestyle=(0, (4, 3)), zorder=1.5)
            axes.annotate(
                text,
                (1, value),
                (-4, 3),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                ha="right",
                color="0.35",
            )
        _limit(axes, panel, drawn)
        axes.set_title(panel.title, loc="left", fontsize=11, parse_math=False)  # a "$" in a name is no mathematics
        axes.set(xlabel=x_label)
        axes.set_ylabel(panel.unit, parse_math=False)
        if not x_label.startswith("hours"):
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(color="0.9", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    handles = [Line2D([], [], color=s.colour, linestyle=s.line, linewidth=2, label=s.label) for s in series]
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 3 * columns), frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    if title:
        figure.suptitle(title, fontsize=13, parse_math=False)
    return figure


def _limit(axes: Axes, panel: _Panel, drawn: Sequence[_Series]) -> None:
    """A few wild batches do not press everything else against the floor: the thin lines may leave the panel, the rest may not."""
    if panel.title != _TRAINING:
        return
    low, high = [], []
    for s in drawn:
        _, values = s.bits()
        means = smooth(values, _window(len(values), s.window))
        low.append(min(float(np.quantile(values, 0.005)), float(means.min())))
        high.append(max(float(np.quantile(values, 0.99)), float(means.max())))
    margin = 0.04 * (max(high) - min(low))
    if margin > 0:
        axes.set_ylim(min(low) - margin, max(high) + margin)
