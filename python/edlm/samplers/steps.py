"""Which positions open when: known before the first network call, since opening depends on no token.

A plan is a list of steps. Ancestral: all sequences walk one grid, t_i = 1 - i/T; steps at which nothing opens are left out.
First-hitting: step j opens each sequence's j-th position at that position's own time. Everything here lives on the CPU, so that the
loop never waits for a device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Step:
    """One reverse step of the sequences in which something opens."""

    offset: int  # the step's word of the RNG counter
    live: torch.Tensor  # int64 [R]: those sequences
    t: torch.Tensor  # float64 [R]: start of the step
    s: torch.Tensor  # float64 [R]: end of the step
    in_window: torch.Tensor  # bool [R]: lo < t <= hi
    opening: torch.Tensor  # bool [R, L]: masked before the step, open after it
    masked: torch.Tensor  # bool [R, L]: masked before the step


def _step(
    offset: int, open_time: torch.Tensor, masked: torch.Tensor, t: torch.Tensor, s: torch.Tensor, window: tuple[float, float]
) -> tuple[Step, torch.Tensor]:
    """The step, and what is masked after it."""
    opening = masked & (open_time >= s[:, None])
    live = opening.any(1).nonzero().squeeze(1)
    t_live = t[live]
    in_window = (window[0] < t_live) & (t_live <= window[1])
    return Step(offset, live, t_live, s[live], in_window, opening[live], masked[live]), masked & ~opening


def ancestral(open_time: torch.Tensor, masked: torch.Tensor, steps: int, window: tuple[float, float]) -> Iterator[Step]:
    """The grid t_i = 1 - i/T for i = 0 .. T; its last s is 0, where whatever is still masked opens. float64 [B, L], bool [B, L]."""
    batch = masked.shape[0]
    # Only steps at which something may open: the one that each opening time falls in, and its neighbours against rounding.
    near = steps - 1 - (open_time[masked] * steps).floor().long()
    for i in torch.cat([near - 1, near, near + 1]).clamp(0, steps - 1).unique().tolist():
        # (T - i) / T is the nearest float64, so that an edge such as 0.3 of a window compares as it reads; 1 - i / T is not.
        t = torch.full((batch,), (steps - i) / steps, dtype=torch.float64)
        s = torch.full((batch,), (steps - i - 1) / steps, dtype=torch.float64)
        step, masked = _step(i, open_time, masked, t, s, window)
        if step.live.numel():
            yield step


def first_hitting(open_time: torch.Tensor, masked: torch.Tensor, window: tuple[float, float]) -> Iterator[Step]:
    """One position a step and sequence, latest opening time first: exact, without a grid. t = s = that opening time.

    Source: Zheng et al., arXiv 2409.02908.
    """
    times = open_time.masked_fill(~masked, -math.inf).sort(dim=1, descending=True).values
    for j in range(int(masked.sum(1).max()) if masked.numel() else 0):
        # A sequence that is complete has s = +inf: nothing opens. Equal times (probability 2**-53 a pair) open together, once.
        t = times[:, j]
        s = torch.where(t == -math.inf, math.inf, t)
        step, masked = _step(j, open_time, masked, t, s, window)
        if step.live.numel():
            yield step
