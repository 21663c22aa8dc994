"""A run's metrics: one JSON object a line, always; TensorBoard and Weights & Biases, and a progress bar, where they are wanted."""

from __future__ import annotations

import html
import importlib
import json
import math
import secrets
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from tqdm import tqdm

from ..data import replace_file
from .throughput import Peak, mfu

# --- lines ------------------------------------------------------------------------------------------------------------------------


class Sink(Protocol):
    """Where lines go besides ``metrics.jsonl``. Values are finite numbers, or texts."""

    def write(self, step: int, values: dict[str, float | str]) -> None: ...

    def close(self) -> None: ...


class Metrics:
    """``metrics.jsonl``. On resume, lines after the checkpoint are dropped, so that no step stands there twice.

    ``sinks`` get every line after it stands in the file. ``close()`` closes them.
    """

    def __init__(self, path: Path, *, resume_step: int, sinks: Sequence[Sink] = ()) -> None:
        self.path, self.sinks = path, tuple(sinks)
        if path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            replace_file(path, "".join(line + "\n" for line in lines if _step_of(line) <= resume_step).encode())

    def write(self, step: int, **values: Any) -> None:
        """Append one line. A number that is not finite becomes null: JSON has none. ``samples=[...]`` are texts: a sink gets them as
        samples/0, samples/1, ..."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step, **clean}) + "\n")
        flat = {k: v for k, v in _flat(clean).items() if isinstance(v, int | float | str)}
        for sink in self.sinks if flat else ():
            sink.write(step, flat)

    def close(self) -> None:
        with ExitStack() as stack:  # each of them, whatever another one raises
            for sink in self.sinks:
                stack.callback(sink.close)


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Lists spread out: key/0, key/1, ..."""
    lists = {key: value for key, value in values.items() if isinstance(value, list | tuple)}
    spread = {f"{key}/{i}": item for key, value in lists.items() for i, item in enumerate(value)}
    return {key: value for key, value in values.items() if key not in lists} | spread


def _step_of(line: str) -> float:
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # half a line: the kill came while it was written
    return step if isinstance(step, int) else math.inf


# --- sinks ------------------------------------------------------------------------------------------------------------------------


class TensorBoardSink:
    """Event files in ``out/tensorboard``: ``tensorboard --logdir`` of any folder above. It names runs by their folders.

    A resumed run opens a new file in the same folder, and purges from the first step that it writes: what an ended process wrote after
    its last checkpoint is then not shown twice.
    """

    def __init__(self, out: Path, config: dict[str, Any]) -> None:
        self._class = _package("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self._folder, self._config, self._writer = out / "tensorboard", config, None

    def write(self, step: int, values: dict[str, float | str]) -> None:
        if self._writer is None:
            self._writer = self._class(str(self._folder), purge_step=step)
            self._writer.add_text("config", _as_code(json.dumps(self._config, indent=1)), step)
        for key, value in values.items():
            if isinstance(value, str):
                self._writer.add_text(key, _as_code(value), step)
            else:
                self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WandbSink:
    """A run of Weights & Biases in the project "edlm". What it is told by its own environment and ``wandb login`` holds (offline too).

    Its id lies in ``out/wandb_id``, so that a resumed run goes on as the same one. It keeps the first line of a step: steps that an
    ended process had reached after its last checkpoint are not written again.
    """

    def __init__(self, out: Path, config: dict[str, Any], run_name: str) -> None:
        self._wandb = _package("wandb", "wandb")
        file = out / "wandb_id"
        if not file.exists():
            replace_file(file, f"{secrets.token_hex(8)}\n".encode())
        self._run = self._wandb.init(
            project="edlm",
            name=run_name,
            id=file.read_text(encoding="ascii").strip(),
            resume="allow",
            dir=str(out),
            config=config,
        )

    def write(self, step: int, values: dict[str, float | str]) -> None:
        shown = {k: self._wandb.Html(f"<pre>{html.escape(v)}</pre>") if isinstance(v, str) else v for k, v in values.items()}
        self._run.log(shown, step=step)

    def close(self) -> None:
        self._run.finish()


def open_sinks(names: tuple[str, ...], out: Path, config: dict[str, Any], run_name: str) -> list[Sink]:
    """The sinks of those names, for a new run or one that goes on.

    Args:
        names: of "tensorboard" and "wandb". out: the run's folder, which exists. config: plain values, to be shown with the run.
        run_name: what wandb calls the run.

    Raises:
        ValueError: another name, or one twice; a package that is not installed, with the command that installs it.
    """
    known = {"tensorboard": lambda: TensorBoardSink(out, config), "wandb": lambda: WandbSink(out, config, run_name)}
    wrong = [name for name in names if name not in known]
    if wrong or len(set(names)) < len(names):
        raise ValueError(f"sinks: expected names among {', '.join(known)}, each once, got {', '.join(names)}")
    sinks: list[Sink] = []
    try:
        for name in names:
            sinks.append(known[name]())
    except BaseException:
        for sink in sinks:
            sink.close()
        raise
    return sinks


def _package(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"sinks: expected the package {extra}, got none that can be imported ({error}); pip install 'edlm-torch[{extra}]', or "
            "leave the sink out"
        ) from None


def _as_code(text: str) -> str:
    """A block that Markdown leaves as it is."""
    return "\n".join(f"    {line}" for line in text.splitlines())


# --- progress ---------------------------------------------------------------------------------------------------------------------

_WINDOW_SECONDS, _WINDOW_STEPS = 30.0, 10
_LARGEST_WINDOW = 1000


class Progress:
    """The bar: the batch's loss, the last validation, tokens a second, how much of the device's peak that is, the time that is left.

    Args:
        name: in front of it. first: steps that were done before. steps: of the run. tokens_per_step: of all processes.
        show: False computes the rates and prints nothing.
        unit: of the loss: "bits/char" and "bits/token" show nats divided by ln 2, "nats" what comes.
        flops_per_token, peak: of throughput.py. With both, model FLOPs utilisation is known.

    ``tokens_per_second`` and ``eta_seconds`` are of the last 30 seconds (of at least 10 and at most 1000 steps); they are NaN before
    the first step is done.
    """

    def __init__(
        self,
        name: str,
        first: int,
        steps: int,
        tokens_per_step: int,
        *,
        show: bool,
        unit: Literal["bits/char", "bits/token", "nats"] = "bits/char",
        flops_per_token: float | None = None,
        peak: Peak | None = None,
    ) -> None:
        self.bar = tqdm(
            total=steps,
            initial=first,
            desc=name,
            unit="step",
            disable=not show,
            dynamic_ncols=True,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}{postfix}]",
        )
        self.tokens_per_step, self.valid, self.unit = tokens_per_step, "", unit
        self.flops_per_token, self.peak = flops_per_token, peak
        self._left = steps - first
        self._begin, self._paused = time.perf_counter(), 0.0
        # The working clock at the end of each step of the window, and at the beginning.
        self._ends: deque[float] = deque([0.0], maxlen=_LARGEST_WINDOW + 1)

    def advance(self, nats: float) -> None:
        """A step is done, and this was its loss."""
        now = self._working()
        self._ends.append(now)
        while len(self._ends) > _WINDOW_STEPS + 1 and now - self._ends[1] >= _WINDOW_SECONDS:
            self._ends.popleft()
        self._left -= 1
        if not self.bar.disable:
            loss = nats if self.unit == "nats" else nats / math.log(2)
            share = "" if self.mfu is None else f", MFU {100 * self.mfu:.1f} %"
            self.bar.set_postfix_str(
                f"train {loss:.3f} {self.unit}{self.valid}, {self.tokens_per_second / 1e3:.1f}k tok/s{share}, "
                f"{_clock(self.eta_seconds)} left",
                refresh=False,
            )
        self.bar.update()

    def validated(self, text: str) -> None:
        """What the bar says of the last validation."""
        self.valid = f", valid {text}"

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Validation, saving: time that no rate counts."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - begin

    @property
    def tokens_per_second(self) -> float:
        """Over the window, without what was paused."""
        span = self._ends[-1] - self._ends[0]
        return (len(self._ends) - 1) * self.tokens_per_step / span if span > 0 else math.nan

    @property
    def eta_seconds(self) -> float:
        """Until the last step, at the window's pace and with as large a share of pauses as so far."""
        working = self._ends[-1]
        if working <= 0:
            return math.nan
        return self._left * self.tokens_per_step / self.tokens_per_second * (1 + self._paused / working)

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation, a share; None where the peak is unknown."""
        if self.flops_per_token is None or self.peak is None:
            return None
        return mfu(self.tokens_per_second, self.flops_per_token, self.peak)

    def _working(self) -> float:
        return time.perf_counter() - self._begin - self._paused

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"
