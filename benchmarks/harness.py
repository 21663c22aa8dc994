"""Interleaved timing in one process: medians with spread, as ratios to a floor measured in the same run."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import edlm
import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds over the repetitions: median and quartiles."""

    name: str
    median: float
    low: float
    high: float


def interleave(variants: dict[str, Callable[[int], object]], repetitions: int, budget_s: float = 60.0) -> dict[str, Timing]:
    """Time every variant once a round, in turn, so that drift of the machine falls on all alike; each round starts with another
    one, so that none always runs in the wake of the same neighbour.

    A variant is called with the round's number, by which it may pick a fresh input. One warm-up round is thrown away. Rounds stop
    at ``repetitions`` or when ``budget_s`` is spent, never below three.
    """
    samples: dict[str, list[float]] = {name: [] for name in variants}
    start, order = time.perf_counter(), list(variants.items())
    for n in range(-1, repetitions):
        order = order[1:] + order[:1]
        for name, call in order:
            begin = time.perf_counter()
            call(max(n, 0))
            if n >= 0:
                samples[name].append(1e3 * (time.perf_counter() - begin))
        if n >= 2 and time.perf_counter() - start > budget_s:
            break
    quartiles = {name: statistics.quantiles(times, n=4) for name, times in samples.items()}
    return {name: Timing(name, statistics.median(samples[name]), q[0], q[2]) for name, q in quartiles.items()}


def machine() -> dict[str, object]:
    """What a reader needs to place the numbers: processor, threads, versions."""
    cpu = (
        next(
            (
                line.split(":")[1].strip()
                for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")
            ),
            platform.processor(),
        )
        if Path("/proc/cpuinfo").exists()
        else platform.processor()
    )
    from edlm import _build

    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": _build.info()["cpu_isa_used"],
        "torch": torch.__version__,
        "edlm": edlm.__version__,
        "python": platform.python_version(),
    }


def require_compiled(op: str) -> None:
    """A benchmark of the reference would be a benchmark of nothing."""
    kind = edlm.ops.backends()[op]["cpu"]
    if kind != "compiled":
        raise SystemExit(f"{op}: expected a compiled kernel, got the {kind}; build edlm first (`edlm info` tells what is there)")


def write_json(path: str, results: list[dict]) -> None:
    Path(path).write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")


def as_dicts(timings: dict[str, Timing]) -> list[dict]:
    return [asdict(t) for t in timings.values()]
