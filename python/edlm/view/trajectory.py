"""One sequence of a batch, from its start to its end: what each of its own steps opened, masked again, and measured."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ..samplers import SampleOutput


@dataclass(frozen=True)
class Frame:
    """One step. Numbers that were not measured, as where no energy was used, are NaN."""

    t: float  # diffusion time at the start of the step
    opened: tuple[int, ...]  # positions that got a token, or another one, ascending
    tokens: tuple[int, ...]  # theirs, in the same order
    remasked: tuple[int, ...]  # positions that lost theirs
    ess: float  # effective sample size, in 1 .. num_candidates
    log_Z: float  # nats: log of the mean weight of the candidates
    energy: float  # nats: of the candidate taken
    num_candidates: int  # that were scored; 0 where none were


@dataclass(frozen=True)
class Trajectory:
    """A sequence's own steps: those of the batch in which it had a part. Step n leads from state n - 1 to state n."""

    start: tuple[int, ...]  # token ids, the mask's among them
    frames: tuple[Frame, ...]
    mask_token_id: int

    def states(self) -> Iterator[list[int]]:
        """The start and the tokens after every step: ``len(frames) + 1`` lists of ids, each a fresh one."""
        tokens = list(self.start)
        yield list(tokens)
        for frame in self.frames:
            for position, token in zip(frame.opened, frame.tokens, strict=True):
                tokens[position] = token
            for position in frame.remasked:
                tokens[position] = self.mask_token_id
            yield list(tokens)

    @property
    def end(self) -> list[int]:
        """The token ids after the last step."""
        *_, last = self.states()
        return last

    @property
    def prompt(self) -> list[int]:
        """The positions that had a token before the first step, ascending."""
        return [i for i, token in enumerate(self.start) if token != self.mask_token_id]

    @property
    def opened_at(self) -> list[int]:
        """For each position the step, from 1, at which it got the token it has at the end; 0: from the start; -1: it is masked."""
        steps = [-1 if token == self.mask_token_id else 0 for token in self.start]
        for number, frame in enumerate(self.frames, 1):
            for position in frame.opened:
                steps[position] = number
            for position in frame.remasked:
                steps[position] = -1
        return steps


def trajectory(sample: SampleOutput, index: int, mask_token_id: int) -> Trajectory:
    """What happened to sequence ``index`` of ``sample``, up to its own length.

    Args:
        sample: of ``edlm.generate(..., return_history=True)``, or anything with its ``history`` int64 [S + 1, B, L] and
            ``step_times`` [S, B]. Without ``lengths`` a sequence has L tokens; what is missing of ``ess``, ``log_Z`` and ``energy`` is
            NaN, and ``num_candidates`` 0.
        index: which sequence, 0 .. B - 1.
        mask_token_id: the denoiser's.

    Raises:
        ValueError: the sample has no history; index is none of its sequences.
    """
    history = getattr(sample, "history", None)
    if history is None:
        raise ValueError("sample: expected one with every state, got history=None; pass return_history=True to generate")
    batch = history.shape[1]
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < batch:
        raise ValueError(f"index: expected a sequence of the sample, 0 .. {batch - 1}, got {index!r}")
    lengths = getattr(sample, "lengths", None)
    length = history.shape[2] if lengths is None else int(lengths[index])
    states = history[:, index, :length].cpu()
    times = sample.step_times[:, index].tolist()
    ess, log_z, energy = (_column(sample, name, index, len(times), math.nan) for name in ("ess", "log_Z", "energy"))
    candidates = _column(sample, "num_candidates", index, len(times), 0)

    frames, before = [], states[0]
    for s, t in enumerate(times):
        if math.isnan(t):
            continue
        after = states[s + 1]
        changed = (after != before).nonzero().squeeze(1)
        masked = after[changed] == mask_token_id
        opened = changed[~masked]
        frames.append(
            Frame(
                t=t,
                opened=tuple(opened.tolist()),
                tokens=tuple(after[opened].tolist()),
                remasked=tuple(changed[masked].tolist()),
                ess=ess[s],
                log_Z=log_z[s],
                energy=energy[s],
                num_candidates=candidates[s],
            )
        )
        before = after
    return Trajectory(start=tuple(states[0].tolist()), frames=tuple(frames), mask_token_id=mask_token_id)


def _column(sample: SampleOutput, name: str, index: int, steps: int, absent: float) -> list[float]:
    values: torch.Tensor | None = getattr(sample, name, None)
    return [absent] * steps if values is None else values[:, index].tolist()
