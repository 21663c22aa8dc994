"""Sequential Monte Carlo over whole trajectories: N particles a sequence, weighed by the energy of every step, resampled by ESS.

All particles of a sequence share its opening times, so that they open the same positions in the same step. A step draws K candidates
for each particle, takes one by softmax(-E / temperature), and multiplies the particle's weight by the mean of the K weights. On
trajectories (the completions x0_1, x0_2, ... that are taken, given the opening times) this targets

    gamma = product over steps j of mu(x0_j | x_j) [exp(-E(x0_j, x_j) / temperature) where t_j is in the window],

for every K and N: the pick among K and the mean weight are together one importance sample of the step, on an extended space. With
p(x0 | x) = mu exp(-E) / Z(x), gamma is the ideal corrected chain times the product of Z(x_j) over its steps: the ideal chain itself
where Z = 1 (carry-over energies, NCE at its optimum), and otherwise one that favours states of large Z.

Source: the pick is that of Xu et al., arXiv 2410.21357; proper weights of nested importance sampling: Naesseth, Lindsten, Schön,
"Nested sequential Monte Carlo methods", ICML 2015; unbiasedness: Andrieu, Doucet, Holenstein, "Particle Markov chain Monte Carlo
methods", JRSS B 2010.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..ops import Purpose, philox_uniform, resample, select_candidate
from .choose import Choice


@dataclass(frozen=True, eq=False)
class Particles:
    """The population at the end, and how it fared. S steps, B sequences, N particles."""

    tokens: torch.Tensor  # int64 [B, N, L]
    log_weights: torch.Tensor  # float64 [B, N], normalised: logsumexp over N is 0
    log_Z: torch.Tensor  # float64 [B]: log of an unbiased estimate of the mass of gamma, given the opening times
    ess: torch.Tensor  # float64 [S, B], in 1 .. N, before resampling; NaN where a sequence had no part
    resampled: torch.Tensor  # bool [S, B]


def particle_seeds(seeds: torch.Tensor, count: int) -> torch.Tensor:
    """int64 [B, count + 1]: the seed of each particle, and one for the last choice among them.

    Particle 0 has the sequence's own, so that one particle is none. RNG: Philox(seed; 0, n, 0, PARTICLE).
    """
    number = torch.arange(1, count + 1)
    low, high = philox_uniform(seeds[:, None], candidate=number, purpose=Purpose.PARTICLE)
    derived = ((high * 2.0**32).floor().long() << 32) | (low * 2.0**32).floor().long()  # 64 bits, the sign's among them
    return torch.cat([seeds[:, None], derived], 1)


class Population:
    """B x N particles as rows of one batch, sequence by sequence, with their weights. Nothing here waits for a device."""

    def __init__(self, seeds: torch.Tensor, count: int, threshold: float, scheme: str, device: torch.device) -> None:
        """seeds int64 [B] on the CPU; resampling where the ESS falls below threshold x N."""
        self.batch, self.count, self.threshold, self.scheme = len(seeds), count, threshold, scheme
        everyone = particle_seeds(seeds, count)
        self.seeds = everyone[:, :-1].reshape(-1)
        self.own, self.last = seeds.to(device), everyone[:, -1].to(device)
        self.log_weights = torch.full((self.batch, count), -math.log(count), dtype=torch.float64, device=device)
        self.log_z = torch.zeros(self.batch, dtype=torch.float64, device=device)
        self.ess: list[torch.Tensor] = []
        self.resampled: list[torch.Tensor] = []
        self.ancestors: list[torch.Tensor] = []

    def update(self, rows: torch.Tensor, offset: torch.Tensor, used: torch.Tensor, choice: Choice | None) -> torch.Tensor:
        """Weigh, and resample where it is due: int64 [B x N], the row that each row goes on from.

        Args:
            rows: int64 [R], those that took part in the step, whole sequences' particles; offset: int64 [R], theirs.
            used: int64 [Q], those that the choice is of; without one no weight changes.

        RNG: Philox(seed of the sequence; 0, n, offset, RESAMPLE).
        """
        size, device = self.batch * self.count, rows.device
        part = torch.zeros(size, dtype=torch.bool, device=device).index_fill_(0, rows, True).view(self.batch, self.count)[:, 0]
        at = torch.zeros(size, dtype=torch.int64, device=device).index_copy_(0, rows, offset).view(self.batch, self.count)[:, 0]
        added = torch.zeros(size, dtype=torch.float64, device=device)
        if choice is not None:
            added[used] = choice.log_Z.double()
        weights = self.log_weights + added.view(self.batch, self.count)
        mean = weights.logsumexp(1, keepdim=True)
        self.log_z = torch.where(part, self.log_z + mean.squeeze(1), self.log_z)
        even = torch.full_like(weights, -math.log(self.count))
        weights = torch.where(part[:, None], weights - mean, self.log_weights)  # of the others not even a bit changes
        ess = torch.exp(-(2 * weights).logsumexp(1))
        due = part & (ess < self.threshold * self.count * (1 - 1e-9))  # even weights are not resampled by rounding
        drawn = resample(weights, self.scheme, seed=self.own, offset=at.contiguous())
        own = torch.arange(self.count, device=drawn.device).expand_as(drawn)
        ancestors = torch.where(due[:, None], drawn, own)
        self.log_weights = torch.where(due[:, None], even, weights)
        self.ess.append(ess.masked_fill(~part, math.nan))
        self.resampled.append(due)
        first = torch.arange(self.batch, device=drawn.device)[:, None] * self.count
        self.ancestors.append((first + ancestors).view(-1))
        return self.ancestors[-1]

    def choose(self) -> torch.Tensor:
        """int64 [B]: the row of one particle a sequence, by weight. RNG: Philox(derived seed; 0, 0, 0, SELECT)."""
        index = select_candidate(-self.log_weights, seed=self.last, offset=0).index
        return torch.arange(self.batch, device=index.device) * self.count + index

    def lineage(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """The rows in which the ancestors of ``rows`` were during each step, before its resampling."""
        found = []
        for ancestors in reversed(self.ancestors):
            rows = ancestors[rows]
            found.append(rows)
        return found[::-1]

    def particles(self, tokens: torch.Tensor) -> Particles:
        """At the end, from the states [B x N, L]."""
        ess, resampled = torch.stack(self.ess), torch.stack(self.resampled)
        return Particles(tokens.view(self.batch, self.count, -1), self.log_weights, self.log_z, ess, resampled)
