"""One run of one family: how much to do and on which device, its inputs, and the results as they come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import edlm.ops
import torch

from .device import replayed, runnable
from .harness import AMAX, EXP_SUM, Inputs, Timing, Variant, compiled, exp_sum, interleave

COPY = "copy of a large buffer"
_SEEDS = 4096  # first seeds, in turn
_MOST_ROWS = 1 << 16
_GIGABYTE = 1e9


@dataclass
class Session:
    family: str
    effort: str  # smoke | quick | full
    repetitions: int
    inputs: Inputs
    inductor: bool  # whether compiled variants are run
    memory: bool
    show: Callable[[list[dict]], None]
    timer: Callable | None = None  # of a GPU; None: the host's clock
    results: list[dict] = field(default_factory=list)
    missing: list[dict] = field(default_factory=list)  # what could not be timed, and why
    checks: list[dict] = field(default_factory=list)  # what is true or false, not fast or slow
    copy_gb_per_s: float | None = None

    @property
    def full(self) -> bool:
        return self.effort == "full"

    @property
    def smoke(self) -> bool:
        return self.effort == "smoke"

    @property
    def device(self) -> torch.device:
        return self.inputs.device

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    # --- what the ops take besides their inputs: numbers on a CPU; on a GPU tensors that lie there, as in a decode loop, for a number
    # --- costs a launch that is not the op's own

    @cached_property
    def _integers(self) -> torch.Tensor:
        return torch.arange(_SEEDS + _MOST_ROWS, device=self.device)

    def seed(self, call: int, rows: int) -> int | torch.Tensor:
        return self._integers[call % _SEEDS : call % _SEEDS + rows] if self.cuda else call

    @cached_property
    def offset(self) -> int | torch.Tensor:
        return torch.zeros(1, dtype=torch.int64, device=self.device) if self.cuda else 0

    def positions(self, rows: int) -> int | torch.Tensor:
        return torch.zeros(rows, dtype=torch.int64, device=self.device) if self.cuda else 0

    # --- floors

    def floors(self, fresh: Callable[[int], torch.Tensor], inductor: bool = True) -> list[Variant]:
        """Read-only passes over the same inputs."""
        size = fresh(0).numel() * fresh(0).element_size()
        variants = [Variant(AMAX, lambda i: fresh(i).amax(-1), size)]
        if self.inductor and inductor:
            pass_ = compiled(exp_sum)
            if not self.cuda:  # there what does not compile is found out with every other variant
                pass_(fresh(0))
            variants.append(Variant(EXP_SUM, lambda i: pass_(fresh(i)), size))
        return variants

    def copy(self) -> None:
        """The bandwidth of a copy on the device, bytes read and bytes written: ``of_copy`` of every later result is a share of it."""
        size = 1 << 20 if self.smoke else min(2 << 30, torch.cuda.mem_get_info(self.device)[0] // 8) if self.cuda else 1 << 28
        source = torch.empty(size // 8, dtype=torch.int64, device=self.device).random_()
        target = torch.empty_like(source)
        variant = Variant(COPY, lambda i: target.copy_(source), 2 * size)
        self.measure(f"copy: {size >> 20} MiB", [variant], n=len(source), v=None, dtype=torch.int64)
        self.copy_gb_per_s = self.results[-1]["gb_per_s"]
        self.results[-1]["of_copy"] = 1.0

    # --- results

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
        unit: str = "rows",
    ) -> None:
        """Interleave the variants and keep their results. ``apart``: slow ones with the rows (``unit``), of n, that they are timed on;
        they run by themselves afterwards, for they leave caches and clock in a state that no decode loop has."""
        if self.smoke:
            inner = min(inner, 3)
        if self.cuda:
            variants = [variant for variant in variants if self._runs(case, dtype, variant)]
        timings, notes = self._timed(variants, budget_s, inner), {}
        for variant, rows in apart:
            (timing,) = interleave([variant], 3, timer=self.timer)
            timings.append((variant, timing.scaled(n / rows)))
            if rows != n:
                notes[variant.name] = f"timed on {rows} of {n} {unit} and scaled"
        medians = {variant.name: timing.median for variant, timing in timings}
        rows = []
        for variant, timing in timings:
            gb_per_s = variant.bytes / timing.median / 1e6
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
                    "gb_per_s": gb_per_s,
                    "over_amax": timing.median / medians[AMAX] if AMAX in medians else None,
                    "over_exp_sum": timing.median / medians[EXP_SUM] if EXP_SUM in medians else None,
                    "of_copy": gb_per_s / self.copy_gb_per_s if self.copy_gb_per_s else None,
                    "queued": timing.queued,
                    "note": notes.get(variant.name),
                }
            )
        self.add(rows)

    def _timed(self, variants: Sequence[Variant], budget_s: float, inner: int) -> list[tuple[Variant, Timing]]:
        def times() -> list[Timing]:
            return interleave(variants, self.repetitions, budget_s=budget_s, inner=inner, timer=self.timer)

        if not variants:
            return []
        if not self.cuda:
            return list(zip(variants, times(), strict=True))
        with edlm.ops.deferred_checks():  # or every call would wait for the device, and nothing could be queued
            return list(zip(variants, times(), strict=True))

    def _runs(self, case: str, dtype: torch.dtype | None, variant: Variant) -> bool:
        """One call apart, so that what a library or the memory cannot do costs one result and not the run."""
        problem = runnable(variant.call)
        if problem:
            self.miss(case, dtype, variant.name, f"failed: {problem}")
        return problem is None

    def graph(self, case: str, like: Variant, calls: int, dtype: torch.dtype | None = None) -> list[Variant]:
        """So many calls of a variant as one graph, on a GPU and where it can be captured; otherwise nothing."""
        found: list[Variant] = []
        if not self.cuda:
            return found
        name = f"{like.name}, graph"
        problem = runnable(
            lambda _: found.append(replayed(name, [partial(like.call, i) for i in range(calls)], like.bytes, like.k))
        )
        if problem:
            self.miss(case, dtype, name, f"failed: {problem}")
        return found

    def miss(self, case: str, dtype: torch.dtype | None, name: str, reason: str) -> None:
        bits = str(dtype).removeprefix("torch.") if dtype else None
        if not any((row["name"], row["reason"]) == (name, reason) for row in self.missing):  # once is enough to read
            print(f"\n{self.family}, {case}{f', {bits}' if bits else ''}: {name}: {reason}", flush=True)
        self.missing.append({"family": self.family, "case": case, "dtype": bits, "name": name, "reason": reason})

    def fits(self, case: str, n: int, v: int, dtype: torch.dtype) -> bool:
        if not self.inputs.fits(n, v, dtype):
            self.miss(case, dtype, "every variant", "does not fit the memory twice")
            return False
        return True

    def check(self, name: str, run: Callable[[], dict]) -> None:
        """``run`` gives a value in 0 .. 1 and what it was made of."""
        found: list[dict] = []
        problem = None
        if self.cuda:
            problem = runnable(lambda _: found.append(run()))
        else:  # what goes wrong on a CPU is raised
            found.append(run())
        result = {"value": 0.0, "detail": f"failed: {problem}"} if problem else found[0]
        self.checks.append({"family": self.family, "name": name, **result})
        print(f"\n{self.family}, check: {name}: {result['value']:g} ({result['detail']})", flush=True)

    def calls(self, size: int) -> int:
        """Calls in a sample, on a GPU: enough for the resolution of an event, few enough for the queue."""
        return max(1, min(20, int(_GIGABYTE) // max(size, 1))) if self.cuda else 1

    def add(self, rows: list[dict]) -> None:
        self.results += rows
        if rows:
            self.show(rows)
