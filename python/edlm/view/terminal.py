"""Decoding in the terminal: ``Watch`` while it runs, ``show`` afterwards. It needs rich, which is an extra."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from .pieces import Decode, Pieces
from .trajectory import Frame, Trajectory

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from ..samplers import StepReport

HOLE = "·"
_MASKED, _PROMPT, _OPENED, _NEW = "bright_black", "bold", "", "black on yellow"


class Watch:
    """Shows the sequences while they are decoded, and leaves their last state on the terminal.

    ::

        with Watch(tokenizer.decode, denoiser.mask_token_id) as watch:
            edlm.generate(denoiser, ..., on_step=watch)

    The screen is redrawn at most ``refresh_per_second`` times a second; between redraws a step costs next to nothing, and the state
    stays on its device. Highlighted is what opened since the last redraw. As many of the first ``rows`` sequences as fit are shown;
    of a text taller than the screen, the part from its first masked position on. Where the console is no terminal nothing is
    printed until the end: then, as on a terminal, the text, masks that are left as ``·``. NOTE: what is shown are states: with a
    stop token or lengths also what is behind the end of a sequence; with particles the first one, before the choice by weight. What
    ``generate`` returns may be another text; where that is printed, ``leave=False`` keeps the two apart.

    Args:
        decode: the text of a list of token ids; it is asked for single tokens too. mask_token_id: the denoiser's.
        console: a ``rich.console.Console``; standard output's by default. rows: >= 1. refresh_per_second: > 0.
        leave: print the last state at the end; otherwise what was shown vanishes, and where there is no terminal nothing is printed.

    Raises:
        ImportError: rich is not installed. ValueError: rows or refresh_per_second.
    """

    def __init__(
        self,
        decode: Decode,
        mask_token_id: int,
        console: Console | None = None,
        *,
        rows: int = 4,
        refresh_per_second: float = 8.0,
        leave: bool = True,
    ) -> None:
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
            raise ValueError(f"rows: expected how many sequences to show, an int >= 1, got {rows!r}")
        if not refresh_per_second > 0:
            raise ValueError(f"refresh_per_second: expected a number > 0, got {refresh_per_second!r}")
        self.console = console if console is not None else _rich("console").Console()
        _rich("live")  # that it is missing is said now, not once the networks are loaded
        self.mask_token_id = mask_token_id
        self.rows = rows
        self.leave = leave
        self.interval = 1.0 / refresh_per_second
        self._pieces = Pieces(decode)
        self._reset()

    def _reset(self) -> None:
        self._live: Live | None = None
        self._report: StepReport | None = None
        self._shown: torch.Tensor | None = None
        self._drawn_at = -math.inf

    def __enter__(self) -> Watch:
        self._reset()
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            # transient: at the end the whole text is printed instead, of which the screen may have held a part.
            self._live = _rich("live").Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __call__(self, report: StepReport) -> None:
        """Takes what ``generate`` reports after a step."""
        self._report = report
        if self._live is None:
            return
        now = time.monotonic()
        if now - self._drawn_at < self.interval:
            return
        self._drawn_at = now
        self._live.update(self._screen(report), refresh=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()
        report, live, self._live = self._report, self._live, None
        if report is None or not self.leave:
            return
        tokens = report.tokens[: self.rows].cpu().tolist()
        for b, row in enumerate(tokens):
            if len(report.tokens) > 1:
                self.console.print(self._label(b))
            # soft_wrap: a file or a pipe gets the lines of the text, not those of a screen
            self.console.print(_rich("text").Text(self._pieces.text(row, self.mask_token_id, HOLE)), soft_wrap=live is None)
        if len(report.tokens) > len(tokens):
            self.console.print(self._more(len(report.tokens) - len(tokens)))
        if live is not None:
            self.console.print(self._status(report))

    # --- what is drawn ------------------------------------------------------------------------------------------------------------

    def _screen(self, report: StepReport) -> Text:
        text = _rich("text")
        state = report.tokens[: self.rows].cpu()
        before = self._shown if self._shown is not None and self._shown.shape == state.shape else state
        self._shown = state
        width, room = self.console.width, max(1, self.console.height - 3)
        lines: list[Text] = []
        for b, row in enumerate(state.tolist()):
            styles = [_NEW if old != new else _OPENED for old, new in zip(before[b].tolist(), row, strict=True)]
            block = list(_coloured(self._pieces, row, styles, self.mask_token_id).wrap(self.console, width, overflow="fold"))
            label = [self._label(b)] if len(report.tokens) > 1 else []
            if b > 0 and len(lines) + len(label) + len(block) > room:
                break
            space = room - len(label)
            if len(block) > space:
                first = next((i for i, line in enumerate(block) if any(s.style == _MASKED for s in line.spans)), len(block))
                first = max(0, min(first - 1, len(block) - space))
                block = block[first : first + space]
            lines += label + block
        shown = b if len(lines) and b < len(state) - 1 else len(state)
        if len(report.tokens) > shown:
            lines.append(self._more(len(report.tokens) - shown))
        status = self._status(report)
        status.truncate(width, overflow="ellipsis")
        return text.Text("\n").join([*lines, status])

    def _label(self, index: int) -> Text:
        return _rich("text").Text(f"sequence {index}", style="dim italic")

    def _more(self, count: int) -> Text:
        return _rich("text").Text(f"and {count} more", style="dim italic")

    def _status(self, report: StepReport) -> Text:
        words = [f"step {report.number + 1} of {report.total}"]
        times = report.t.tolist()
        if times:
            low, high = min(times), max(times)
            words.append(f"t {low:.3g}" if low == high else f"t {low:.3g} to {high:.3g}")
        ess, energy = _mean(report.ess), _mean(report.energy)
        average = "mean " if len(report.tokens) > 1 else ""
        if not math.isnan(ess):
            words.append(f"{average}ESS {ess:.2f} of {int(report.num_candidates.max())}")
        if not math.isnan(energy):
            words.append(f"{average}energy {energy:.2f} nats")
        words.append(f"nfe {report.nfe}" + (f" + {report.energy_nfe} energy" if report.energy_nfe else ""))
        return _rich("text").Text(", ".join(words), style="cyan")


def show(trajectory: Trajectory, decode: Decode, console: Console | None = None, *, frames: int = 6) -> None:
    """Print a few states of ``trajectory``, evenly spread from the start to the end.

    Each comes with how many positions opened (and were masked again) since the one above, and with t, ESS and energy of its own step.

    Args:
        trajectory: of ``edlm.view.trajectory``. decode: as in ``Watch``. console: standard output's by default.
        frames: how many states, >= 2.

    Raises:
        ImportError: rich is not installed. ValueError: frames.
    """
    if isinstance(frames, bool) or not isinstance(frames, int) or frames < 2:
        raise ValueError(f"frames: expected how many states to show, an int >= 2, got {frames!r}")
    console = console if console is not None else _rich("console").Console()
    text, pieces = _rich("text"), Pieces(decode)
    last = len(trajectory.frames)
    wanted = sorted({round(i * last / (frames - 1)) for i in range(frames)})
    columns = _columns(trajectory)
    table = _rich("table").Table(box=_rich("box").SIMPLE_HEAD, pad_edge=False, expand=False)
    for name in ("step", *columns):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("text", overflow="fold")
    prompt = set(trajectory.prompt)
    since: list[Frame] = []  # the steps after the last state that is shown
    for n, row in enumerate(trajectory.states()):
        since += trajectory.frames[n - 1 : n] if n else ()
        if n not in wanted:
            continue
        opened = {i for frame in since for i in frame.opened}
        prompt -= opened
        styles = [_NEW if i in opened else _PROMPT if i in prompt else _OPENED for i in range(len(row))]
        cells = [value(since) for value in columns.values()] if since else [""] * len(columns)
        table.add_row(str(n), *cells, _coloured(pieces, row, styles, trajectory.mask_token_id))
        since = []
    console.print(table)
    legend = text.Text.assemble((HOLE, _MASKED), " masked, ", ("a", _NEW), " opened since the line above")
    if trajectory.prompt:
        legend.append(", ").append("a", _PROMPT).append(" prompt")
    if "energy" in columns:
        legend.append("; energy in nats")
    console.print(legend)


def _columns(trajectory: Trajectory) -> dict[str, Callable[[list[Frame]], str]]:
    """Name -> the cell of a line, from the steps since the line above. Columns in which nothing would stand are left out."""

    def ess(frame: Frame) -> str:
        return (
            "" if math.isnan(frame.ess) else f"{frame.ess:.2f}" + (f" of {frame.num_candidates}" if frame.num_candidates else "")
        )

    frames = trajectory.frames
    columns: dict[str, Callable[[list[Frame]], str]] = {"t": lambda since: f"{since[-1].t:.3g}"}
    columns["opened"] = lambda since: str(sum(len(f.opened) for f in since))
    if any(f.remasked for f in frames):
        columns["remasked"] = lambda since: str(sum(len(f.remasked) for f in since))
    if any(not math.isnan(f.ess) for f in frames):
        columns["ESS"] = lambda since: ess(since[-1])
    if any(not math.isnan(f.energy) for f in frames):
        columns["energy"] = lambda since: "" if math.isnan(since[-1].energy) else f"{since[-1].energy:.2f}"
    return columns


def _coloured(pieces: Pieces, tokens: list[int], styles: list[str], mask_token_id: int) -> Text:
    out = _rich("text").Text(overflow="fold", end="")
    joined = {first: (count, text) for first, count, text in pieces.joins(tokens, mask_token_id)}
    i = 0
    while i < len(tokens):
        count, piece = joined.get(i, (1, None))
        if tokens[i] == mask_token_id:
            out.append(HOLE, _MASKED)
        else:
            new = _NEW if _NEW in styles[i : i + count] else styles[i]
            out.append((pieces[tokens[i]] if piece is None else piece).replace("\n", "⏎\n").expandtabs(4), new)
        i += count
    return out


def _mean(values: torch.Tensor) -> float:
    values = values[~values.isnan()]
    return float(values.double().mean()) if len(values) else math.nan


def _rich(module: str) -> Any:
    """A module of rich, imported where it is used: it is no part of the base install."""
    try:
        import rich.box
        import rich.console
        import rich.live
        import rich.table
        import rich.text
    except ImportError as error:
        raise ImportError("edlm.view shows things in the terminal with rich: pip install 'edlm-torch[view]'") from error
    return getattr(rich, module)
