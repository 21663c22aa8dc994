"""Trajectories to look at, made by hand: a batch of two with remasking, tokens of every awkward kind, and a large one."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch

MASK = 0
NAN = math.nan
# Whatever a page, a script or a terminal could trip over; ids from 1 on.
AWKWARD = [
    "</script>", "<b>", "&amp;", '"', "'", "<!--", "<script>", "]]>", "\\u003c", "\u2028", "\u2029", "\x00", "\x1b[31m", "\x9b",
    "\r", "\n", "\t", "\ud800", "😀", "שלום", "مرحبا", "\u202e", "\ufeff", "", "  ", "e\u0301", "${x}", "@@data@@", "%s",
    "</pre>", "</textarea>", "--age", "\x7f", "[red]", "[/]", "漢字",
]  # fmt: skip


def decode_awkward(ids: list[int]) -> str:
    return "".join("[MASK]" if i == MASK else AWKWARD[i - 1] for i in ids)


def decode_letters(ids: list[int]) -> str:
    return "".join("_" if i == MASK else chr(96 + i) for i in ids)


def sample(history: list, step_times: list, **changed):
    """A SampleOutput: history [S + 1, B, L], step_times [S, B]; energies wherever a sequence took part in a step before t = 0.3."""
    times = torch.tensor(step_times, dtype=torch.float64)
    history = torch.tensor(history)
    used = times > 0.3
    order = torch.arange(times.numel()).reshape(times.shape)
    fields = {
        "tokens": history[-1],
        "lengths": torch.full((history.shape[1],), history.shape[2]),
        "nfe": len(times),
        "energy_nfe": len(times),
        "ess": torch.where(used, 1.0 + order / 2, NAN),
        "log_Z": torch.where(used, -1.0 - order, NAN),
        "energy": torch.where(used, -12.25 + order, NAN),
        "num_candidates": torch.where(used, 8, 0),
        "step_times": times,
        "history": history,
        "stage_seconds": {},
    }
    return SimpleNamespace(**fields | changed)


def two():
    """L = 4 over a batch of two. Sequence 0 has a prompt, loses position 1 and gets it back otherwise; sequence 1 rests in step 2."""
    history = [
        [[3, 0, 0, 0], [0, 0, 0, 0]],
        [[3, 1, 0, 2], [0, 0, 5, 0]],
        [[3, 0, 7, 2], [0, 0, 5, 0]],
        [[3, 4, 7, 2], [6, 7, 5, 8]],
    ]
    return sample(history, [[0.9, 1.0], [0.6, NAN], [0.2, 0.5]])


def awkward():
    """Two sequences of every awkward token, opened from both ends."""
    length = len(AWKWARD)
    state = torch.zeros(2, length, dtype=torch.int64)
    history = [state.tolist()]
    steps = -(-length // 3)
    for n in range(steps):
        state[0, 3 * n : 3 * n + 3] = torch.arange(1, length + 1)[3 * n : 3 * n + 3]
        state[1, length - 3 * n - 3 if 3 * n + 3 <= length else 0 : length - 3 * n] = torch.arange(1, length + 1).flip(0)[
            length - 3 * n - 3 if 3 * n + 3 <= length else 0 : length - 3 * n
        ]
        history.append(state.tolist())
    return sample(history, [[1 - n / steps] * 2 for n in range(steps)])


def large(batch: int = 8, length: int = 1024, steps: int = 1024, remasked: int = 0):
    """A position a step, ids up to 50256; ``remasked`` positions are lost in every step and come back in the next."""
    generator = torch.Generator().manual_seed(0)
    end = torch.randint(1, 50257, (batch, length), generator=generator)
    rank = torch.stack([torch.randperm(length, generator=generator) for _ in range(batch)]) * steps // length
    history = torch.where(rank < torch.arange(steps + 1)[:, None, None], end, MASK)
    for s in range(1, steps):
        for _ in range(remasked):
            history[s, :, torch.randint(length, (1,), generator=generator)] = MASK
    times = 1 - torch.arange(steps).double()[:, None].expand(-1, batch) / steps
    values = torch.randn(3, steps, batch, generator=generator)
    return SimpleNamespace(
        history=history,
        step_times=times,
        lengths=torch.full((batch,), length),
        ess=1 + values[0].abs(),
        log_Z=100 * values[1],
        energy=100 * values[2],
        num_candidates=torch.full((steps, batch), 8),
    )
