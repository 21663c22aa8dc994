"""One reverse step of R sequences: denoise, propose, energy, select, reverse. Compacted rows or a fixed shape, the same five stages."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..ops import Candidates, reverse_step
from ..protocols import Denoiser
from .choose import Choice, Scorer
from .propose import Proposal, denoise
from .stages import Stages


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
    """What only the host knows of a step: for errors, and for energies that need not ask the device."""

    where: str  # the step's
    rows: torch.Tensor  # int64 [R] on the CPU: the sequences' numbers in the batch
    columns: tuple[int, int]  # first and one past the last of the W columns
    masked: torch.Tensor  # bool [R, W] on the CPU


@dataclass
class Reverse:
    """The networks and how they are used, as a function of a ``Move``. ``compact``: only sequences that are scored go to the energy."""

    denoiser: Denoiser
    proposal: Proposal
    scorer: Scorer | None
    stages: Stages
    compact: bool

    def __call__(self, move: Move, names: Names, energy: bool) -> tuple[torch.Tensor, Choice | None]:
        """int64 [R, W] after the step; and the choice, of the scored sequences where compact, else of all, if ``energy`` is used."""
        with self.stages("denoise"):
            prepare = getattr(self.denoiser, "prepare", None)
            if self.compact and callable(prepare):
                prepare(names.rows, names.columns, names.masked)
            output = denoise(self.denoiser, move.xt, move.t)
        scorer = self.scorer if energy else None
        with self.stages("propose"):
            count = scorer.num_candidates if scorer else 1
            candidates = self.proposal.draw(output, move.xt, move.active, count, seed=move.seed, offset=move.offset)
        index, choice = torch.zeros(len(move.xt), dtype=torch.int64, device=move.xt.device), None
        if scorer and self.compact and not bool(move.scored.all()):
            some = move.scored.nonzero().squeeze(1)
            on = some.to(move.xt.device, non_blocking=True)
            choice = scorer.choose(_of(candidates, on), move.xt[on], move.t[on], names.masked[some], names.rows[some], move.seed[on],
                                   move.offset[on], names.where)  # fmt: skip
            index[on] = choice.index
        elif scorer:
            masked = names.masked if self.compact else None  # a fixed shape may not depend on it
            choice = scorer.choose(candidates, move.xt, move.t, masked, names.rows, move.seed, move.offset, names.where)
            index = choice.index if self.compact else torch.where(move.scored, choice.index, index)
        with self.stages("reverse"):
            # What opens is known: 1 is "at least s" for the op, 0 is not.
            return reverse_step(move.xt, candidates.tokens, index, move.opening, 0.5), choice


def _of(candidates: Candidates, rows: torch.Tensor) -> Candidates:
    same = candidates.model_log_probs is candidates.log_probs
    log_probs = candidates.log_probs[rows]
    return Candidates(candidates.tokens[rows], log_probs, log_probs if same else candidates.model_log_probs[rows])
