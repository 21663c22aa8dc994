"""A run's metrics: one JSON object a line, always; a progress bar on stderr where it is wanted."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

from ..data import replace_file


class Metrics:
    """``metrics.jsonl``. On resume, lines after the checkpoint are dropped, so that no step stands there twice."""

    def __init__(self, path: Path, *, resume_step: int) -> None:
        self.path = path
        if path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            replace_file(path, "".join(line + "\n" for line in lines if _step_of(line) <= resume_step).encode())

    def write(self, step: int, **values: Any) -> None:
        """Append one line. A number that is not finite becomes null: JSON has none."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step, **clean}) + "\n")


def _step_of(line: str) -> float:
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # half a line: the kill came while it was written
    return step if isinstance(step, int) else math.inf


class Progress:
    """The bar: the batch's loss in bits per character, the last validation, tokens a second; tqdm adds the time that is left."""

    def __init__(self, name: str, first: int, steps: int, tokens_per_step: int, *, show: bool) -> None:
        self.bar = tqdm(total=steps, initial=first, desc=name, unit="step", disable=not show, dynamic_ncols=True)
        self.tokens_per_step, self.valid = tokens_per_step, ""
        self._since, self._steps = time.perf_counter(), 0
        self.tokens_per_second = math.nan

    def advance(self, nats: float) -> None:
        self._steps += 1
        elapsed = time.perf_counter() - self._since
        self.tokens_per_second = self._steps * self.tokens_per_step / elapsed if elapsed > 0 else math.nan
        self.bar.set_postfix_str(
            f"train {nats / math.log(2):.3f} bits/char{self.valid}, {self.tokens_per_second / 1e3:.1f}k tok/s", refresh=False
        )
        self.bar.update()

    def validated(self, bits: str) -> None:
        self.valid = f", valid {bits}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()
