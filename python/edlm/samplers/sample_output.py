"""What ``generate`` returns, what it reports while it runs, and how both are gathered."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from .choose import Choice
from .smc import Particles, Population


@dataclass(frozen=True, eq=False)
class SampleOutput:
    """What was generated, and what it took.

    S is the number of steps, each one denoiser call. A row of the tables [S, B] is a step, which sequences make at times of their own;
    NaN (0 in ``num_candidates``) where a sequence had no part. With several particles they are those of the particle that was returned,
    along its line of ancestors.
    """

    tokens: torch.Tensor  # int64 [B, L], without masks, but for what is padded from ``lengths`` on
    lengths: torch.Tensor  # int64 [B] on the CPU: how many tokens of each sequence count
    nfe: int  # denoiser calls; each may serve many sequences
    energy_nfe: int  # energy calls
    ess: torch.Tensor  # float32 [S, B], effective sample size in 1 .. K, where the energy was used
    log_Z: torch.Tensor  # float32 [S, B], log of the mean weight there: a lower bound of log Z(xt) in expectation
    energy: torch.Tensor  # float32 [S, B], in nats, of the candidate that was taken there
    num_candidates: torch.Tensor  # int64 [S, B], how many were scored there
    step_times: torch.Tensor  # float64 [S, B], the t of each step
    history: torch.Tensor | None  # int64 [S + 1, B, L]: the start and every state after a step, if asked for
    particles: Particles | None = None  # where there were several a sequence
    stage_seconds: dict[str, float] = field(default_factory=dict)  # host time a stage; on CUDA that is launches, not execution


@dataclass(frozen=True, eq=False)
class StepReport:
    """What ``on_step`` is told after every step. Tensors on a GPU are those of the loop: whoever reads them waits for it."""

    number: int  # 0, 1, ...
    total: int  # at most so many steps
    rows: torch.Tensor  # int64 [R] on the CPU: the sequences that took part
    t: torch.Tensor  # float64 [R] on the CPU: the times at which they were
    tokens: torch.Tensor  # int64 [B, L], the state after the step; of several particles the first, after resampling
    ess: torch.Tensor  # float32 [B], NaN where no energy was used
    log_Z: torch.Tensor  # float32 [B]
    energy: torch.Tensor  # float32 [B], of the candidate that was taken
    num_candidates: torch.Tensor  # int64 [B], 0 where no energy was used
    nfe: int  # so far
    energy_nfe: int


class Record:
    """The tables of a run, row by row. N = B x particles rows; nothing here waits for a device."""

    TABLES = ("ess", "log_Z", "energy")

    def __init__(self, start: torch.Tensor, particles: int, keep_history: bool) -> None:
        self.size, self.particles, self.device = len(start), particles, start.device
        self.times: list[torch.Tensor] = []
        self.counts: list[torch.Tensor] = []
        self.tables: dict[str, list[torch.Tensor]] = {name: [] for name in self.TABLES}
        self.history = [start.clone()] if keep_history else None

    def add(self, rows: torch.Tensor, t: torch.Tensor, used: torch.Tensor, choice: Choice | None, xt: torch.Tensor) -> None:
        """After a step: rows int64 [R] and t float64 [R] on the CPU; used int64 [Q] on the device, whom the choice is of; xt [N, L]."""
        self.times.append(torch.full((self.size,), math.nan, dtype=torch.float64).index_copy_(0, rows, t))
        self.counts.append(torch.zeros(self.size, dtype=torch.int64, device=self.device))
        for table in self.tables.values():
            table.append(torch.full((self.size,), math.nan, device=self.device))
        if choice is not None:
            self.counts[-1][used] = choice.num_candidates
            for name, table in self.tables.items():
                table[-1][used] = getattr(choice, name)
        if self.history is not None:
            self.history.append(xt.clone())

    def report(self, rows: torch.Tensor, t: torch.Tensor, xt: torch.Tensor, total: int, nfe: int, energy_nfe: int) -> StepReport:
        first = slice(None, None, self.particles)  # the first particle of each sequence
        one = rows % self.particles == 0
        tables = {name: table[-1][first].clone() for name, table in self.tables.items()}
        return StepReport(
            number=len(self.times) - 1,
            total=max(total, len(self.times)),
            rows=rows[one] // self.particles,
            t=t[one],
            tokens=xt[first].clone(),
            **tables,
            num_candidates=self.counts[-1][first].clone(),
            nfe=nfe,
            energy_nfe=energy_nfe,
        )

    def finish(
        self,
        tokens: torch.Tensor,
        lengths: torch.Tensor,
        chosen: torch.Tensor | None,
        population: Population | None,
        xt: torch.Tensor,
        **counted: int | dict[str, float],
    ) -> SampleOutput:
        """The output for tokens [B, L]; chosen int64 [B], whose they are among the rows of xt, where there are several particles."""
        # There is at least one step: a prompt without masks is refused.
        history, times, counts = self.history, torch.stack(self.times), torch.stack(self.counts)
        tables = {name: torch.stack(table) for name, table in self.tables.items()}
        particles = None
        if population is not None and chosen is not None:
            particles = population.particles(xt)
            line = population.lineage(chosen)
            during = torch.stack(line)
            counts = counts.gather(1, during)
            tables = {name: table.gather(1, during) for name, table in tables.items()}
            times = times[:, :: self.particles]  # those of a sequence share their times
            if history is not None:  # after a step, but before its resampling
                history = [history[0][chosen], *(state[rows] for state, rows in zip(history[1:], line, strict=True))]
        return SampleOutput(
            tokens=tokens,
            lengths=lengths,
            step_times=times,
            num_candidates=counts,
            history=None if history is None else torch.stack(history),
            particles=particles,
            **tables,
            **counted,
        )
