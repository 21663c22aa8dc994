"""What one reverse step is given: tensors for the device, and what only the host knows."""

from __future__ import annotations

from dataclasses import dataclass

import torch


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
