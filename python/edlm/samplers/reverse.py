"""One reverse step of R sequences: denoise, propose, energy, select, reverse. Compacted rows or a fixed shape, the same five stages."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..ops import Candidates, reverse_step, upload
from ..protocols import Denoiser
from .choose import Choice, Scorer
from .move import Move, Names
from .propose import Proposal, denoise
from .stages import Stages


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
            if callable(prepare):
                prepare(names.number, names.rows, names.columns, names.masked)
            output = denoise(self.denoiser, move.xt, move.t)
        scorer = self.scorer if energy else None
        with self.stages("propose"):
            candidates = self.proposal.draw(output, move, scorer.num_candidates if scorer else 1, names)
        index, choice = torch.zeros(len(move.xt), dtype=torch.int64, device=move.xt.device), None
        if scorer and self.compact and not bool(move.scored.all()):
            some = move.scored.nonzero().squeeze(1)
            on = upload(some, move.xt.device)
            part = Move(*(value[some if value.device.type == "cpu" else on] for value in vars(move).values()))
            choice = scorer.choose(_of(candidates, on), part, names.only(some), host_knows=True)
            index[on] = choice.index
        elif scorer:
            choice = scorer.choose(candidates, move, names, host_knows=self.compact)
            index = choice.index if self.compact else torch.where(move.scored, choice.index, index)
        with self.stages("reverse"):
            # What opens is known: 1 is "at least s" for the op, 0 is not.
            return reverse_step(move.xt, candidates.tokens, index, move.opening, 0.5), choice


def _of(candidates: Candidates, rows: torch.Tensor) -> Candidates:
    same = candidates.model_log_probs is candidates.log_probs
    log_probs = candidates.log_probs[rows]
    return Candidates(candidates.tokens[rows], log_probs, log_probs if same else candidates.model_log_probs[rows])
