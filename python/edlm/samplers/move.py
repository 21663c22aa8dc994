"""What one reverse step is given: tensors for the device, and what only the host knows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..ops import upload
from .steps import Step


@dataclass
class Move:
    """What a step reads, on the device but for what is said to be on the CPU. R sequences, W columns."""

    xt: torch.Tensor  # int64 [R, W]
    t: torch.Tensor  # float32 [R]
    seed: torch.Tensor  # int64 [R]
    offset: torch.Tensor  # int64 [R]
    opening: torch.Tensor  # float32 [R, W]: 1 where a position opens, 0 elsewhere
    active: torch.Tensor  # bool [R, W]: which masked rows are drawn; on the CPU where rows are compacted
    scored: torch.Tensor  # bool [R]: whose candidates the energy chooses among; on the CPU where rows are compacted


@dataclass(frozen=True)
class Names:
    """The step as the host knows it: for errors, for energies that need not ask the device, and for denoisers that keep a cache."""

    number: int  # of the step in this run
    rows: torch.Tensor  # int64 [R] on the CPU: the sequences' numbers in the batch (with particles, those of the particles)
    columns: tuple[int, int]  # first and one past the last of the W columns
    masked: torch.Tensor  # bool [R, W] on the CPU
    particles: int = 1  # rows of a sequence

    def only(self, some: torch.Tensor) -> Names:
        return Names(self.number, self.rows[some], self.columns, self.masked[some], self.particles)

    def whose(self, row: int) -> str:
        """The row and the step, in an error."""
        sequence, particle = divmod(int(self.rows[row]), self.particles)
        return f"sequence {sequence}{f', particle {particle},' if self.particles > 1 else ''} in step {self.number}"


def inputs(
    step: Step, scored: torch.Tensor, xt: torch.Tensor, draws: torch.Tensor, *, number: int, particles: int, compact: bool
) -> tuple[Move, Names]:
    """What a step reads of the states xt [N, L] with the seeds ``draws`` [N]: of the rows that take part, or in a fixed shape of all.

    scored: int64 [Q] on the CPU, the rows whose candidates the energy chooses among.
    """
    made, device = step if compact else step.spread(len(xt)), xt.device
    used = torch.isin(made.rows, scored)
    if compact:
        # An energy reads whole sequences; of the others only what opens is ever used.
        active = torch.where(used[:, None], made.masked, made.opening)
    else:
        active = made.opening if not len(scored) else torch.ones_like(made.opening)  # energies see everybody
        active, used = upload(active, device), upload(used, device)
    seen, everybody = slice(*step.columns), len(made.rows) == len(xt)
    rows = None if everybody else upload(made.rows, device)
    move = Move(
        xt=xt[:, seen] if rows is None else xt[rows, seen],
        t=upload(made.t.float(), device),
        seed=draws if rows is None else draws[rows],
        offset=upload(made.offset, device),
        opening=upload(made.opening.float(), device),
        active=active,
        scored=used,
    )
    return move, Names(number, made.rows, step.columns, made.masked, particles)
