"""What a run shows and writes down while it goes on."""

from __future__ import annotations

import json
import math
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self

import torch

from ..config import to_dict
from ..eval import Estimate
from .configuration import TrainConfig
from .distributed import World
from .logging import Metrics, Progress, open_sinks
from .objectives import Objective
from .throughput import Peak, peak_flops
from .training_text import TrainingText


class Record:
    """A run's lines, sinks and bar. Only the first process writes and shows; the others know what the validation said."""

    def __init__(
        self,
        config: TrainConfig,
        out: Path,
        first: int,
        world: World,
        objective: Objective,
        text: TrainingText,
        *,
        name: str | None,
        progress: bool,
    ) -> None:
        self.config, self.world = config, world
        # A loss in nats a token is shown in bits a character.
        self._characters = text.characters_per_token if objective.per == "token" else 1.0
        precision = torch.bfloat16 if config.system.precision == "bfloat16" else torch.float32
        one = peak_flops(world.device, precision)
        self.bar = Progress(
            name or config.model.kind,
            first,
            config.steps,
            config.batch_size * config.data.length,
            show=progress and world.rank == 0,
            unit="bits/char" if objective.per == "token" else "nats",
            flops_per_token=objective.flops_per_token(config.data.length),
            peak=Peak(one.flops * world.size, one.source),
        )
        self._line: dict[str, Any] = {}
        self._valid: tuple[int, float] | None = None
        self._earlier, self._begin = 0.0, time.perf_counter()
        self.metrics: Metrics | None = None
        world.first(lambda: self._open(out, first))

    def _open(self, out: Path, first: int) -> None:
        sinks = open_sinks(self.config.logging.sinks, out, to_dict(self.config), out.name)
        self.metrics = Metrics(out / "metrics.jsonl", resume_step=first, sinks=sinks)
        self._earlier = _seconds(out / "metrics.jsonl")

    def step(self, done: int, means: dict[str, float], rate: float, norm: float) -> None:
        """Figures of a step, kept for ``write`` every ``log_every`` steps."""
        self.bar.advance(next(iter(means.values())) / self._characters)
        if done % self.config.log_every == 0:
            seconds = round(self._earlier + time.perf_counter() - self._begin, 2)
            self._line |= means | {"lr": rate, "grad_norm": norm, "seconds": seconds}
            self._line |= {"tokens_per_second": round(self.bar.tokens_per_second), "eta_seconds": round(self.bar.eta_seconds, 1)}
            if self.bar.mfu is not None:
                self._line["mfu"] = round(self.bar.mfu, 4)

    def validated(self, done: int, estimates: dict[str, Estimate], samples: list[str]) -> None:
        first, *_ = estimates.values()
        self._valid = (done, first.mean)
        for name, estimate in estimates.items():
            self._line |= {f"valid_{name}": estimate.mean, f"valid_{name}_stderr": estimate.stderr}
        if first.unit == "nats/token":
            bits = first.bits_per_character(self._characters)
            self._line |= {"valid_bits": bits.mean, "valid_bits_stderr": bits.stderr}
            self.bar.validated(f"{bits.mean:.3f}")
        else:
            self.bar.validated(f"{first.mean:.3f}")
        if samples:
            self._line["samples"] = samples

    def valid_loss(self, done: int) -> float | None:
        """What the validation of this very step said, to find the best checkpoint by."""
        if self._valid is None or self._valid[0] != done or not math.isfinite(self._valid[1]):
            return None
        return self._valid[1]

    def write(self, done: int) -> None:
        line, self._line = self._line, {}
        if line:
            self.world.first(lambda: self.metrics is not None and self.metrics.write(done, **line))

    def paused(self) -> AbstractContextManager[None]:
        """Validation, saving: time that no rate counts."""
        return self.bar.paused()

    def __enter__(self) -> Self:
        self.bar.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.__exit__(*error)
        if self.metrics is not None:
            self.metrics.close()


def _seconds(path: Path) -> float:
    """Seconds of training that the last whole line of an earlier process says."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for line in reversed(lines):
        try:
            return float(json.loads(line)["seconds"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0.0
