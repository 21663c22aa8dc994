"""Interleaved timing in one process: medians with quartiles, as ratios to floors measured in the same rounds.

Two floors: ``amax`` reads every logit once, so nothing that needs all of them can be faster; the sum of exponentials, compiled by
inductor, is the least arithmetic that a normaliser takes. Times are milliseconds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import edlm.ops
import torch

from .machine import last_level_cache

AMAX, EXP_SUM = "amax", "sum of exp, compiled"


@dataclass(frozen=True)
class Variant:
    """One way to do the work of a case. ``call`` gets the number of the call, by which it picks a fresh input and a seed."""

    name: str
    call: Callable[[int], object]
    bytes: int = 0  # what must move whatever the implementation: inputs read once, results written once
    k: int | None = None
    threads: int | None = None
    before: Callable[[], object] | None = None  # untimed, ahead of every call


@dataclass(frozen=True)
class Timing:
    """Over the repetitions: median and quartiles."""

    median: float
    low: float
    high: float
    repetitions: int

    def scaled(self, factor: float) -> Timing:
        return Timing(factor * self.median, factor * self.low, factor * self.high, self.repetitions)


def interleave(
    variants: Sequence[Variant], repetitions: int, *, budget_s: float = 30.0, inner: int = 1, clock: Callable = time.perf_counter
) -> list[Timing]:
    """Time every variant once a round, in turn, so that drift of the machine falls on all alike; each round starts with another
    one, so that none always runs in the wake of the same neighbour.

    One warm-up round is thrown away. Rounds stop at ``repetitions`` or when ``budget_s`` is spent, never below three. ``inner``
    calls make one sample, their mean, where a call takes microseconds. The number that a call gets is never repeated, so that
    two neighbours in a round do not read the same input either.
    """
    if repetitions < 3:
        raise ValueError(f"repetitions: expected at least 3, for quartiles, got {repetitions}")
    samples: list[list[float]] = [[] for _ in variants]
    start, order, number = clock(), list(range(len(variants))), 0
    for round_ in range(-1, repetitions):
        order = order[1:] + order[:1]
        for i in order:
            if variants[i].before is not None:
                variants[i].before()
            call = variants[i].call
            begin = clock()
            for n in range(number, number + inner):
                call(n)
            elapsed = clock() - begin
            number += inner
            if round_ >= 0:
                samples[i].append(1e3 * elapsed / inner)
        if round_ >= 2 and clock() - start > budget_s:
            break
    timings = []
    for times in samples:
        low, median, high = statistics.quantiles(times, n=4, method="inclusive")
        timings.append(Timing(median, low, high, len(times)))
    return timings


class Inputs:
    """Logits that no cache holds: views of one random pool, larger than the last-level cache, in turn.

    ``fresh(n, v, dtype)`` gives a function of the number of the call: neighbours are different memory. Where a pool holds only two
    inputs, the two together are still larger than the cache.
    """

    def __init__(self, largest: int, seed: int, smoke: bool) -> None:
        self.bytes = 2 * largest if smoke else max(2 * largest, 3 * last_level_cache() // 2)
        self.generator = torch.Generator().manual_seed(seed)
        self.pools: dict[torch.dtype, torch.Tensor] = {}

    def pool(self, dtype: torch.dtype) -> torch.Tensor:
        if dtype not in self.pools:
            size = self.bytes // dtype.itemsize + 1024
            # A period of 2^24 deviates, which no row length divides: two rows are never alike, and making it takes no seconds.
            period = (2 * torch.randn(min(size, 1 << 24), generator=self.generator)).to(dtype)
            self.pools[dtype] = period.repeat(-(-size // len(period)))[:size].contiguous()
        return self.pools[dtype]

    def fresh(self, n: int, v: int, dtype: torch.dtype) -> Callable[[int], torch.Tensor]:
        pool, line = self.pool(dtype), 64 // dtype.itemsize
        size = -(-n * v // line) * line  # each input starts at a cache line, as an allocator would have it
        views = [pool[i : i + n * v].view(n, v) for i in range(0, len(pool) - n * v + 1, size)][:4096]
        return lambda number: views[number % len(views)]


def compiled(function: Callable) -> Callable:
    """torch.compile for the shape of the first call. Dynamo keeps eight versions of a function and then stops: start afresh."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def exp_sum(logits: torch.Tensor) -> torch.Tensor:
    return logits.float().exp().sum(-1)


def inductor_problem() -> str | None:
    """None where inductor compiles; otherwise why not, in one line."""
    try:
        compiled(exp_sum)(torch.randn(2, 8))
    except torch._dynamo.exc.BackendCompilerFailed as error:
        return str(error).strip().splitlines()[0]
    return None


def references(ops: Sequence[str]) -> list[str]:
    """Which of these would run a reference here."""
    kinds = edlm.ops.backends()
    return [op for op in ops if op in kinds and kinds[op]["cpu"] != "compiled"]


@dataclass
class Session:
    """One run of one family: how much to do, its inputs, and the results as they come."""

    family: str
    effort: str  # smoke | quick | full
    repetitions: int
    inputs: Inputs
    inductor: bool  # whether compiled variants are run
    memory: bool
    show: Callable[[list[dict]], None]
    results: list[dict] = field(default_factory=list)

    @property
    def full(self) -> bool:
        return self.effort == "full"

    @property
    def smoke(self) -> bool:
        return self.effort == "smoke"

    def floors(self, fresh: Callable[[int], torch.Tensor]) -> list[Variant]:
        """Both read-only passes over the same inputs."""
        size = fresh(0).numel() * fresh(0).element_size()
        variants = [Variant(AMAX, lambda i: fresh(i).amax(-1), size)]
        if self.inductor:
            pass_ = compiled(exp_sum)
            pass_(fresh(0))
            variants.append(Variant(EXP_SUM, lambda i: pass_(fresh(i)), size))
        return variants

    def measure(
        self,
        case: str,
        variants: Sequence[Variant],
        *,
        n: int,
        v: int | None,
        dtype: torch.dtype | None,
        budget_s: float = 10.0,
        inner: int = 1,
        apart: Sequence[tuple[Variant, int]] = (),
    ) -> None:
        """Interleave the variants and keep their results. ``apart``: slow ones with the rows that they are timed on; they run by
        themselves afterwards, for they leave caches and clock in a state that no decode loop has."""
        if self.smoke:
            inner = min(inner, 3)
        timings = list(zip(variants, interleave(variants, self.repetitions, budget_s=budget_s, inner=inner), strict=True))
        notes = {}
        for variant, rows in apart:
            timings.append((variant, interleave([variant], 3)[0].scaled(n / rows)))
            if rows != n:
                notes[variant.name] = f"timed on {rows} of {n} rows and scaled"
        medians = {variant.name: timing.median for variant, timing in timings}
        rows = []
        for variant, timing in timings:
            rows.append(
                {
                    "family": self.family,
                    "case": case,
                    "name": variant.name,
                    "n": n,
                    "v": v,
                    "k": variant.k,
                    "dtype": str(dtype).removeprefix("torch.") if dtype else None,
                    "threads": variant.threads or torch.get_num_threads(),
                    "median": timing.median,
                    "low": timing.low,
                    "high": timing.high,
                    "repetitions": timing.repetitions,
                    "bytes": variant.bytes,
                    "gb_per_s": variant.bytes / timing.median / 1e6,
                    "over_amax": timing.median / medians[AMAX] if AMAX in medians else None,
                    "over_exp_sum": timing.median / medians[EXP_SUM] if EXP_SUM in medians else None,
                    "note": notes.get(variant.name),
                }
            )
        self.add(rows)

    def add(self, rows: list[dict]) -> None:
        self.results += rows
        self.show(rows)
