"""Which positions open when: known before the first network call, since opening depends on no token.

A plan is a stream of steps over three nested things: sequences of one length, blocks of columns, and a clock, which says in what order
the positions of a block open. A sequence keeps its own clock: its j-th step is made together with the j-th steps of the others,
whatever their times, so that a batch costs as many network calls as its busiest sequence and none is made where nothing opens.
Everything here lives on the CPU, so that the loop never waits for a device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from ..diffusion import NoiseSchedule
from ..ops import Purpose, philox_uniform

_UNIFORMS = 1 << 18  # drawn at once by a plan: 2 MiB


@dataclass(frozen=True)
class Step:
    """One reverse step of R sequences, each at its own time, over the W columns that the networks see."""

    rows: torch.Tensor  # int64 [R]: those sequences
    columns: tuple[int, int]  # first and one past the last of the columns
    offset: torch.Tensor  # int64 [R]: the step's word of the RNG counter
    t: torch.Tensor  # float64 [R]: start of the step
    in_window: torch.Tensor  # bool [R]: lo < t <= hi
    opening: torch.Tensor  # bool [R, W]: masked before the step, open after it
    masked: torch.Tensor  # bool [R, W]: masked before the step
    remask: torch.Tensor | None = None  # bool [R, W]: become masked again just before the step
    ends_block: bool = False

    def only(self, keep: torch.Tensor) -> Step:
        """Of the sequences where ``keep`` bool [R]."""
        if bool(keep.all()):
            return self
        parts = {name: getattr(self, name)[keep] for name in ("rows", "offset", "t", "in_window", "opening", "masked")}
        return replace(self, **parts, remask=None if self.remask is None else self.remask[keep])

    def spread(self, size: int) -> Step:
        """Over sequences 0 .. size - 1, of which the others do nothing. What was to be masked again is left out."""
        empty = torch.zeros(size, self.opening.shape[1], dtype=torch.bool)
        return replace(
            self,
            rows=torch.arange(size),
            offset=torch.zeros(size, dtype=torch.int64).index_copy_(0, self.rows, self.offset),
            t=torch.ones(size, dtype=torch.float64).index_copy_(0, self.rows, self.t),
            in_window=empty[:, 0].index_copy(0, self.rows, self.in_window),
            opening=empty.index_copy(0, self.rows, self.opening),
            masked=empty.index_copy(0, self.rows, self.masked),
            remask=None,
        )


@dataclass(frozen=True)
class Block:
    """What a clock orders: columns first .. last - 1 of sequences that see ``columns``. Tensors are over the columns seen."""

    number: int
    first: int
    rows: torch.Tensor  # int64 [R]
    columns: tuple[int, int]
    inside: torch.Tensor  # bool [W]: the block's own columns
    open_time: torch.Tensor  # float64 [R, W]
    masked: torch.Tensor  # bool [R, W], those beyond the block included
    seeds: torch.Tensor  # int64 [R]


class Clock(Protocol):
    """The order in which positions open, and at which times and offsets."""

    def __call__(self, block: Block, window: tuple[float, float]) -> Iterator[Step]: ...

    def most(self, wanted: torch.Tensor) -> int:
        """A bound of the number of steps, given bool [R, W] of the masked positions of a block."""
        ...


def _rank(key: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """int64 [R, W]: of each wanted position, how many smaller keys its sequence has. Of the others it means nothing."""
    ordered, at = key.masked_fill(~wanted, torch.inf).sort(dim=1)
    fresh = ordered < torch.inf
    fresh[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]
    return torch.empty_like(at).scatter_(1, at, fresh.cumsum(1) - 1)


def _in_turn(
    block: Block, window: tuple[float, float], turn: torch.Tensor, offset: torch.Tensor, t: torch.Tensor
) -> Iterator[Step]:
    """Positions with one turn open together, whichever the sequence. int64, int64, float64 [R, W]; a turn of a sequence has one t."""
    wanted, masked = block.masked & block.inside, block.masked
    for j in turn[wanted].unique().tolist():
        opening = wanted & (turn == j)
        live = opening.any(1)
        one = opening.long().argmax(1, keepdim=True)
        at_offset, at_t = (value.gather(1, one).squeeze(1)[live] for value in (offset, t))
        in_window = (window[0] < at_t) & (at_t <= window[1])
        yield Step(block.rows[live], block.columns, at_offset, at_t, in_window, opening[live], masked[live])
        masked = masked & ~opening


@dataclass(frozen=True)
class Ancestral:
    """The grid t_i = 1 - i/T for i = 0 .. T; its last s is 0, where whatever is still masked opens."""

    steps: int

    def __call__(self, block: Block, window: tuple[float, float]) -> Iterator[Step]:
        # The first i with open_time >= (T - i - 1) / T: near the one that arithmetic gives, and exactly that against rounding.
        near = self.steps - 1 - (block.open_time * self.steps).floor()
        index = near + 1
        for i in (near, near - 1):
            index = torch.where(block.open_time >= (self.steps - i - 1) / self.steps, i, index)
        index = index.clamp(0, self.steps - 1)
        # (T - i) / T is the nearest float64, so that an edge such as 0.3 of a window compares as it reads; 1 - i / T is not.
        turn = _rank(index, block.masked & block.inside)
        return _in_turn(block, window, turn, block.number * self.steps + index.long(), (self.steps - index) / self.steps)

    def most(self, wanted: torch.Tensor) -> int:
        return min(self.steps, int(wanted.sum(1).max()))


@dataclass(frozen=True)
class FirstHitting:
    """One position a step, latest opening time first: exact, without a grid. t is that opening time.

    Source: Zheng et al., arXiv 2409.02908.
    """

    def __call__(self, block: Block, window: tuple[float, float]) -> Iterator[Step]:
        # Equal times (probability 2**-53 a pair) open together, once. The offset counts the openings, from the block's first column on.
        turn = _rank(-block.open_time, block.masked & block.inside)
        return _in_turn(block, window, turn, block.first + turn, block.open_time)

    def most(self, wanted: torch.Tensor) -> int:
        return int(wanted.sum(1).max())


@dataclass(frozen=True)
class LeftToRight:
    """One position a step, from the left, the same one in all sequences. t is the share of the block's columns from there on."""

    def __call__(self, block: Block, window: tuple[float, float]) -> Iterator[Step]:
        column = torch.arange(*block.columns).expand_as(block.masked)
        t = 1 - (column - block.first).double() / int(block.inside.sum())
        return _in_turn(block, window, column, column, t)

    def most(self, wanted: torch.Tensor) -> int:
        return int(wanted.any(0).sum())


@dataclass(frozen=True)
class Remasking:
    """The grid of ``Ancestral``, on which open positions become masked again with probability sigma (ReMDM, its "cap" schedule).

    With alpha as the schedule has it, sigma = min(remask_prob, (1 - alpha(s)) / alpha(t)) for every open position that is no prompt,
    and a masked position opens with probability (alpha(s) - (1 - sigma) alpha(t)) / (1 - alpha(t)): as many are masked at each time
    as without remasking, in law. Neither depends on a token, so masks are drawn here.

    NOTE: every step of the grid is gone through on the host, about 60 us each, though no network call is made where nothing opens.
    RNG: Philox(seed; column, 0, offset, REMASK), the first uniform, column as the network sees it.
    Source: Wang et al., arXiv 2503.00307.
    """

    steps: int
    remask_prob: float
    schedule: NoiseSchedule

    def __call__(self, block: Block, window: tuple[float, float]) -> Iterator[Step]:
        masked, wanted = block.masked, block.masked & block.inside
        pending = torch.zeros_like(masked)
        column = torch.arange(masked.shape[1])
        edges = torch.arange(self.steps, -1, -1, dtype=torch.float64) / self.steps
        clean = 1 - self.schedule.mask_prob(edges) / self.schedule.mask_prob(1.0)  # at t = 1 everything is masked, whatever eps
        at_once = max(1, _UNIFORMS // masked.numel())
        for i in range(self.steps):
            alpha_t, alpha_s = float(clean[i]), float(clean[i + 1])
            last = i == self.steps - 1
            sigma = 0.0 if last else self.remask_prob if alpha_t <= 0 else min(self.remask_prob, (1 - alpha_s) / alpha_t)
            opens = 1.0 if last else (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t)
            number = block.number * self.steps + i
            if i % at_once == 0:
                offsets = torch.arange(number, number + min(at_once, self.steps - i))[:, None, None]
                drawn, _ = philox_uniform(block.seeds[:, None], position=column, offset=offsets, purpose=Purpose.REMASK)
            u = drawn[i % at_once]
            now = masked & block.inside
            opening, again = now & (u < opens), wanted & ~now & (u < sigma)
            live = opening.any(1)
            if bool(live.any()):
                t = torch.full((int(live.sum()),), (self.steps - i) / self.steps, dtype=torch.float64)
                yield Step(
                    rows=block.rows[live],
                    columns=block.columns,
                    offset=torch.full_like(t, number, dtype=torch.int64),
                    t=t,
                    in_window=(window[0] < t) & (t <= window[1]),
                    opening=opening[live],
                    masked=masked[live],
                    remask=pending[live],
                )
                pending = pending & ~live[:, None]
            masked = (masked & ~opening) | again
            pending = pending | again

    def most(self, wanted: torch.Tensor) -> int:
        return self.steps


@dataclass(frozen=True)
class Plan:
    """All steps of a batch.

    Args:
        clock: the order within a block. window: (lo, hi), the energy is used iff lo < t <= hi.
        open_time: float64 [B, L]. masked: bool [B, L], what is to be generated. seeds: int64 [B].
        lengths: int64 [B]: a sequence ends there, and no network sees what lies behind; those of one length go together.
        block_length: columns are decoded in blocks of so many, from the left, each by its own run of the clock; all if None.
        context: how many columns a network sees at most: those that end with the block, or more to its right where it is near the
            start. All if None.
    """

    clock: Clock
    window: tuple[float, float]
    open_time: torch.Tensor
    masked: torch.Tensor
    seeds: torch.Tensor
    lengths: torch.Tensor
    block_length: int | None = None
    context: int | None = None

    def __iter__(self) -> Iterator[Step]:
        for block in self._blocks():
            step = None
            for following in self.clock(block, self.window):
                if step is not None:
                    yield step
                step = following
            if step is not None:
                yield replace(step, ends_block=True)

    def most(self) -> int:
        """A bound of the number of steps."""
        return sum(self.clock.most(block.masked & block.inside) for block in self._blocks())

    def _blocks(self) -> Iterator[Block]:
        for length in self.lengths.unique().tolist():
            group = (self.lengths == length).nonzero().squeeze(1)
            masked, open_time = self.masked[group], self.open_time[group]
            size, context = self.block_length or length, min(self.context or length, length)
            for number, first in enumerate(range(0, length, size)):
                last = min(first + size, length)
                low = max(0, last - context)
                seen = slice(low, low + context)
                inside = torch.zeros(context, dtype=torch.bool)
                inside[first - low : last - low] = True
                rows = (masked[:, seen] & inside).any(1)
                if bool(rows.any()):
                    yield Block(
                        number=number,
                        first=first,
                        rows=group[rows],
                        columns=(low, low + context),
                        inside=inside,
                        open_time=open_time[rows, seen],
                        masked=masked[rows, seen],
                        seeds=self.seeds[group][rows],
                    )
                masked[:, first:last] = False
