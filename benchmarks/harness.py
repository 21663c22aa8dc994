"""Interleaved timing in one process: medians with quartiles, as ratios to floors measured in the same rounds.

Two floors: ``amax`` reads every logit once, so nothing that needs all of them can be faster; the sum of exponentials, compiled by
inductor, is the least arithmetic that a normaliser takes. On a GPU a third: the bandwidth of a large copy, measured once a family.
Times are milliseconds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import edlm.ops
import torch

from .machine import last_level_cache

AMAX, EXP_SUM = "amax", "sum of exp, compiled"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Variant:
    """One way to do the work of a case. ``call`` gets the number of the call, by which it picks a fresh input and a seed."""

    name: str
    call: Callable[[int], object]
    bytes: int = 0  # what must move whatever the implementation: inputs read once, results written once
    k: int | None = None
    threads: int | None = None
    before: Callable[[], object] | None = None  # untimed, ahead of every call
    ops: int = 1  # calls of the op that ``call`` makes: the replay of a graph makes many
    warm_up: Callable[[int], object] | None = None  # the first round, where a whole call would take long
    wall: bool = False  # on a GPU: by the host's clock until the device is done, as a caller who waits would see it


@dataclass(frozen=True)
class Timing:
    """Over the repetitions: median and quartiles."""

    median: float
    low: float
    high: float
    repetitions: int
    queued: float | None = None  # on a GPU: the share of samples whose work was all queued before the device began it

    def scaled(self, factor: float) -> Timing:
        return Timing(factor * self.median, factor * self.low, factor * self.high, self.repetitions, self.queued)


class HostTimer:
    """A sample by the host's clock. Like every timer it gives milliseconds, and whether the work was queued (None: no queue)."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock

    def __call__(self, variant: Variant, work: Callable[[], object], calls: int) -> tuple[float, bool | None]:
        begin = self.clock()
        work()
        return 1e3 * (self.clock() - begin), None


def interleave(
    variants: Sequence[Variant],
    repetitions: int,
    *,
    budget_s: float = 30.0,
    inner: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    timer: Callable[[Variant, Callable[[], object], int], tuple[float, bool | None]] | None = None,
) -> list[Timing]:
    """Time every variant once a round, in turn, so that drift of the machine falls on all alike; each round starts with another
    one, so that none always runs in the wake of the same neighbour.

    One warm-up round is thrown away. Rounds stop at ``repetitions`` or when ``budget_s`` is spent, never below three. ``inner``
    calls make one sample, their mean, where a call takes microseconds. The number that a call gets is never repeated, so that
    two neighbours in a round do not read the same input either. ``clock`` keeps the budget; ``timer`` takes the samples.
    """
    if repetitions < 3:
        raise ValueError(f"repetitions: expected at least 3, for quartiles, got {repetitions}")
    timer = timer or HostTimer(clock)
    samples: list[list[tuple[float, bool | None]]] = [[] for _ in variants]
    start, order, number = clock(), list(range(len(variants))), 0
    for round_ in range(-1, repetitions):
        order = order[1:] + order[:1]
        for i in order:
            if variants[i].before is not None:
                variants[i].before()
            calls = 1 if variants[i].ops > 1 or variants[i].wall else inner
            call = variants[i].warm_up if round_ < 0 and variants[i].warm_up else variants[i].call
            elapsed, queued = timer(variants[i], partial(_repeat, call, number, calls), calls)
            number += calls
            if round_ >= 0:
                samples[i].append((elapsed / (calls * variants[i].ops), queued))
        if round_ >= 2 and clock() - start > budget_s:
            break
    timings = []
    for taken in samples:
        low, median, high = statistics.quantiles([time_ for time_, _ in taken], n=4, method="inclusive")
        queued = [queued for _, queued in taken if queued is not None]
        timings.append(Timing(median, low, high, len(taken), sum(queued) / len(queued) if queued else None))
    return timings


def _repeat(call: Callable[[int], object], number: int, calls: int) -> None:
    for n in range(number, number + calls):
        call(n)


class Inputs:
    """Logits that no cache holds: views of one random pool, larger than the last-level cache, in turn.

    ``fresh(n, v, dtype)`` gives a function of the number of the call: neighbours are different memory. Where a pool holds only two
    inputs, the two together are still larger than the cache. On a GPU the pool is eight times its L2 and more, as far as a quarter
    of the free memory goes; what does not fit twice is not timed.
    """

    def __init__(self, largest: int, seed: int, smoke: bool, device: torch.device = CPU) -> None:
        self.device = device
        self.bytes = 2 * largest if smoke else max(2 * largest, 3 * last_level_cache() // 2)
        if device.type == "cuda" and not smoke:
            l2, free = torch.cuda.get_device_properties(device).L2_cache_size, torch.cuda.mem_get_info(device)[0]
            self.bytes = min(max(2 * largest, 8 * l2), free // 4)
        self.generator = torch.Generator().manual_seed(seed)
        self.pools: dict[torch.dtype, torch.Tensor] = {}

    def fits(self, n: int, v: int, dtype: torch.dtype) -> bool:
        return 2 * n * v * dtype.itemsize <= self.bytes

    def pool(self, dtype: torch.dtype) -> torch.Tensor:
        if dtype not in self.pools:
            size = self.bytes // dtype.itemsize + 1024
            # A period of 2^24 deviates, which no row length divides: two rows are never alike, and making it takes no seconds.
            period = (2 * torch.randn(min(size, 1 << 24), generator=self.generator)).to(dtype).to(self.device)
            self.pools[dtype] = period.repeat(-(-size // len(period)))[:size].contiguous()
        return self.pools[dtype]

    def fresh(self, n: int, v: int, dtype: torch.dtype) -> Callable[[int], torch.Tensor]:
        pool, line = self.pool(dtype), (512 if self.device.type == "cuda" else 64) // dtype.itemsize
        size = (
            -(-n * v // line) * line
        )  # each input starts at a cache line, as an allocator would have it (512: torch's on a GPU)
        views = [pool[i : i + n * v].view(n, v) for i in range(0, len(pool) - n * v + 1, size)[:4096]]
        return lambda number: views[number % len(views)]


def compiled(function: Callable) -> Callable:
    """torch.compile for the shape of the first call. Dynamo keeps eight versions of a function and then stops: start afresh."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def exp_sum(logits: torch.Tensor) -> torch.Tensor:
    return logits.float().exp().sum(-1)


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def inductor_problem(device: torch.device = CPU) -> str | None:
    """None where inductor compiles; otherwise why not, in one line."""
    try:
        compiled(exp_sum)(torch.randn(2, 8, device=device))
    except (RuntimeError, ImportError, OSError) as error:  # no compiler; on a GPU also no triton, or one that does not run
        return first_line(error)
    return None


def references(ops: Sequence[str], device: str = "cpu") -> list[str]:
    """Which of these would run a reference on that kind of device."""
    kinds = edlm.ops.backends()
    return [op for op in ops if op in kinds and kinds[op][device] != "compiled"]
