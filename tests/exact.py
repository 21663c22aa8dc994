"""The oracle: a universe small enough to enumerate, and the exact law of everything that the package samples or estimates in it.

Tokens 0 .. V-1, the mask is V. A state xt is a tuple over 0 .. V; a sequence x0 is one over 0 .. V-1. All arithmetic is float64.
Nothing here calls edlm: an oracle that shares code with what it judges is no oracle.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable

import torch

State = tuple[int, ...]


class Universe:
    """A correlated distribution q over V**L sequences, with its perfect marginals, conditionals and joints."""

    def __init__(self, num_tokens: int = 3, length: int = 3, seed: int = 0, concentration: float = 1.5) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.num_tokens, self.length, self.mask = num_tokens, length, num_tokens
        self.sequences = torch.tensor(list(itertools.product(range(num_tokens), repeat=length)))  # [S, L]
        noise = torch.randn(len(self.sequences), generator=generator, dtype=torch.float64)
        self.q = torch.softmax(concentration * noise, 0)  # [S]
        self.noise = torch.softmax(torch.randn(len(self.q), generator=generator, dtype=torch.float64), 0)

    def entropy(self) -> float:
        return float(-(self.q * self.q.log()).sum())

    def states(self) -> list[State]:
        return list(itertools.product(range(self.num_tokens + 1), repeat=self.length))

    def agrees(self, xt: State) -> torch.Tensor:
        """bool [S]: the sequences that keep every observed token of xt."""
        observed = torch.tensor([token != self.mask for token in xt])
        return ((self.sequences == torch.tensor(xt)) | ~observed).all(1)

    def posterior(self, xt: State, p: torch.Tensor | None = None) -> torch.Tensor:
        """[S]: p(x0 | the observed tokens of xt), of q unless another joint is given."""
        weight = (self.q if p is None else p) * self.agrees(xt)
        return weight / weight.sum()

    def marginals(self, xt: State) -> torch.Tensor:
        """[L, V]: the perfect factorised denoiser; one-hot where xt is observed."""
        onehot = torch.nn.functional.one_hot(self.sequences, self.num_tokens).double()
        return torch.einsum("s,slv->lv", self.posterior(xt), onehot)

    def product(self, xt: State) -> torch.Tensor:
        """[S]: mu(x0 | xt), the product of the marginals."""
        marginals = self.marginals(xt)
        return marginals[torch.arange(self.length), self.sequences].prod(1) * self.agrees(xt)

    def autoregressive(self, mixing: float) -> torch.Tensor:
        """[S]: a joint (1 - a) q + a noise. Orderings of bounds hold for a model near q, so a <= 0.6."""
        assert 0 <= mixing <= 0.6
        return (1 - mixing) * self.q + mixing * self.noise

    def conditionals(self, p: torch.Tensor) -> torch.Tensor:
        """[S, L]: log p(x_i | x_<i) of a joint p, for every sequence."""
        columns = []
        for i in range(self.length):
            same = (self.sequences[:, None, :i] == self.sequences[None, :, :i]).all(2)  # [S, S]
            same_next = same & (self.sequences[:, None, i] == self.sequences[None, :, i])
            columns.append(((same_next.double() @ p) / (same.double() @ p)).log())
        return torch.stack(columns, 1)

    def index(self, tokens: torch.Tensor) -> torch.Tensor:
        """[..., L] tokens -> [...] row of ``sequences``."""
        powers = self.num_tokens ** torch.arange(self.length - 1, -1, -1)
        return (tokens * powers).sum(-1)

    def state_index(self, xt: torch.Tensor) -> torch.Tensor:
        """[..., L] tokens or masks -> [...] row of ``states()``."""
        powers = (self.num_tokens + 1) ** torch.arange(self.length - 1, -1, -1)
        return (xt * powers).sum(-1)


class TabularDenoiser:
    """The perfect factorised denoiser as a network: a table over states. A row's logits depend on that row of xt alone, bitwise.

    The mask's column holds a large logit: whoever fails to exclude it is found out at once.
    """

    def __init__(self, universe: Universe, marginals: Callable[[State], torch.Tensor] | None = None) -> None:
        self.universe, self.mask_token_id, self.vocab_size = universe, universe.mask, universe.num_tokens + 1
        table = torch.stack([(marginals or universe.marginals)(state) for state in universe.states()])  # [states, L, V]
        garbage = torch.full((*table.shape[:2], 1), 30.0, dtype=torch.float64)
        self.table = torch.cat([table.log(), garbage], 2).float()
        self.calls = 0

    def __call__(self, xt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.table[self.universe.state_index(xt)]


class SplitDenoiser:
    """A denoiser in two halves, ``hidden`` and ``head``; it records how many rows the head was asked for in each call."""

    def __init__(self, inner: TabularDenoiser) -> None:
        self.inner, self.mask_token_id, self.vocab_size, self.rows = inner, inner.mask_token_id, inner.vocab_size, []

    def hidden(self, xt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.inner(xt, t)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        self.rows.append(len(hidden))
        return hidden

    def __call__(self, xt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a denoiser with hidden and head is not asked for all logits")


class TabularCausalLM:
    """log p(x_i | x_<i) of an enumerated joint."""

    def __init__(self, universe: Universe, p: torch.Tensor) -> None:
        self.universe, self.p = universe, p
        self.table = universe.conditionals(p)

    def log_probs(self, x0: torch.Tensor) -> torch.Tensor:
        return self.table[self.universe.index(x0)].float()


class TabularEnergy:
    """E(x0, xt) from a table [states, S]; +inf where mu is 0."""

    def __init__(self, universe: Universe, energy: Callable[[State], torch.Tensor]) -> None:
        self.universe, self.calls = universe, 0
        self.table = torch.stack([energy(state) for state in universe.states()])

    def __call__(self, x0: torch.Tensor, xt: torch.Tensor, t: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        state = self.universe.state_index(xt)[:, None].expand(x0.shape[:2])
        return self.table[state, self.universe.index(x0)].float()


def residual_energy(universe: Universe, p: torch.Tensor | None = None) -> Callable[[State], torch.Tensor]:
    """The perfect energy -log(p(x0|xt) / mu(x0|xt)); with q itself (the default) the corrected step is exact."""

    def energy(xt: State) -> torch.Tensor:
        ratio = universe.posterior(xt, p) / universe.product(xt)
        return torch.where(universe.product(xt) > 0, -ratio.log(), math.inf)

    return energy


def pick_law(mu: torch.Tensor, energy: torch.Tensor, num_candidates: int, temperature: float = 1.0) -> torch.Tensor:
    """[S]: the law of the candidate chosen by softmax(-E / temperature) among K independent draws from mu, by enumeration."""
    support = torch.nonzero(mu > 0).squeeze(1).tolist()
    law = torch.zeros_like(mu)
    log_weight = torch.zeros_like(mu) if math.isinf(temperature) else -energy / temperature
    for draws in itertools.product(support, repeat=num_candidates):
        rows = list(draws)
        law.index_add_(0, torch.tensor(rows), mu[rows].prod() * torch.softmax(log_weight[rows], 0))
    return law


def transition(
    universe: Universe,
    states: dict[State, float],
    completion: Callable[[State], torch.Tensor],
    opens: float,
    *,
    among: tuple[int, ...] | None = None,
    remask: float = 0.0,
    fixed: tuple[int, ...] = (),
) -> dict[State, float]:
    """One step of mass over states, by enumeration; what opens is taken from ``completion(xt)`` [S], a law or any measure of x0.

    A step at which nothing changes is not made: it multiplies by nothing, whatever the total of a measure.
    Positions ``among`` (all of them by default) open with probability ``opens`` where they are masked, and become masked with
    probability ``remask`` where they are clean and not ``fixed``.
    """
    among = tuple(range(universe.length)) if among is None else among
    following: dict[State, float] = defaultdict(float)
    for xt, mass in states.items():
        changes = [i for i in among if xt[i] == universe.mask or (remask > 0 and i not in fixed)]
        law = completion(xt)
        for pattern in itertools.product([False, True], repeat=len(changes)):
            probability = [opens if xt[i] == universe.mask else remask for i in changes]
            weight = mass * math.prod(p if change else 1 - p for p, change in zip(probability, pattern, strict=True))
            if weight == 0:
                continue
            changed = [i for i, change in zip(changes, pattern, strict=True) if change]
            if not changed:
                following[xt] += weight
                continue
            for row, p in enumerate(law.tolist()):
                if p > 0:
                    xs = list(xt)
                    for i in changed:
                        xs[i] = int(universe.sequences[row, i]) if xt[i] == universe.mask else universe.mask
                    following[tuple(xs)] += weight * p
    return dict(following)


def law_of_states(universe: Universe, states: dict[State, float]) -> torch.Tensor:
    """[S]: the mass of each sequence; no state may hold a mask."""
    result = torch.zeros(len(universe.sequences), dtype=torch.float64)
    for xt, mass in states.items():
        assert universe.mask not in xt
        result[universe.index(torch.tensor(xt))] += mass
    return result


def generate_law(
    universe: Universe, completion: Callable[[State, float], torch.Tensor], times: list[float], start: State | None = None
) -> torch.Tensor:
    """[S]: the law of what ancestral decoding returns, by dynamic programming over states.

    ``completion(xt, t)`` is the law of x0 from which the step at t takes the tokens that open. Log-linear schedule, eps = 0: a masked
    position opens in t -> s with probability (t - s) / t.
    """
    states: dict[State, float] = {start or (universe.mask,) * universe.length: 1.0}
    for t, s in itertools.pairwise(times):
        states = transition(universe, states, lambda xt, t=t: completion(xt, t), (t - s) / t)
    return law_of_states(universe, states)


def subsets(positions: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [c for n in range(len(positions) + 1) for c in itertools.combinations(positions, n)]


def hide(universe: Universe, row: int, positions: tuple[int, ...]) -> State:
    """The sequence of that row with masks at ``positions``."""
    tokens = universe.sequences[row].tolist()
    return tuple(universe.mask if i in positions else token for i, token in enumerate(tokens))


def finite_step_nll(universe: Universe, steps: int, term: Callable[[State, tuple[int, ...], int], float]) -> float:
    """The T-step negative ELBO in nats a sequence, by enumeration: the sum over steps of E[term(xt, S, row of x0)], S not empty.

    Log-linear schedule, eps = 0: a position is masked at t with probability t, and then opens before s with probability (t - s) / t.
    """
    total, length = 0.0, universe.length
    for i in range(steps):
        t, s = 1 - i / steps, 1 - (i + 1) / steps
        for row, q in enumerate(universe.q.tolist()):
            for masked in subsets(tuple(range(length))):
                p_masked = t ** len(masked) * (1 - t) ** (length - len(masked))
                for opened in subsets(masked)[1:]:
                    p_opened = ((t - s) / t) ** len(opened) * (s / t) ** (len(masked) - len(opened))
                    if p_masked * p_opened > 0:
                        total += q * p_masked * p_opened * term(hide(universe, row, masked), opened, row)
    return total


def paper_joint_nats(universe: Universe, term: Callable[[State, int], float]) -> float:
    """E_x0 of the integral over t of (1/t) E_xt[term(xt, row of x0)]: each set M of masked positions has the weight of
    the integral of p^(|M| - 1) (1 - p)^(L - |M|), a Beta function."""
    length, total = universe.length, 0.0
    for row, q in enumerate(universe.q.tolist()):
        for masked in subsets(tuple(range(length)))[1:]:
            n = len(masked)
            weight = math.factorial(n - 1) * math.factorial(length - n) / math.factorial(length)
            total += q * weight * term(hide(universe, row, masked), row)
    return total


def log_marginal(universe: Universe, law: torch.Tensor, opened: tuple[int, ...], row: int) -> float:
    """log of the mass that a law [S] gives to the tokens of sequence ``row`` at ``opened``."""
    columns = list(opened)
    same = (universe.sequences[:, columns] == universe.sequences[row, columns]).all(1)
    return math.log(float(law[same].sum()))


def all_draws(mu: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every way to draw n sequences from mu [S]: rows int64 [D, n] and probabilities [D]."""
    support = torch.nonzero(mu > 0).squeeze(1)
    rows = torch.cartesian_prod(*[support] * n).view(-1, n)
    return rows, mu[rows].prod(1)


def log_mean(log_w: torch.Tensor) -> torch.Tensor:
    """T_n = log of the mean weight: [D, n] -> [D]."""
    return log_w.exp().mean(1).log()


def leave_one_out(log_w: torch.Tensor) -> torch.Tensor:
    """(2n - 1) T_n - 2 (n - 1) T_{n-1}, the latter averaged over the n subsets, as it is written: [D, n] -> [D]."""
    n = log_w.shape[1]
    parts = [log_mean(log_w[:, [j for j in range(n) if j != k]]) for k in range(n)]
    return (2 * n - 1) * log_mean(log_w) - 2 * (n - 1) * torch.stack(parts).mean(0)


def total_variation(p: torch.Tensor, q: torch.Tensor) -> float:
    return float((p - q).abs().sum() / 2)


def g_test(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """p-value of the G-test of counts against probs; cells with probability 0 must be empty, small cells are pooled."""
    assert counts[probs == 0].sum() == 0, "an impossible outcome was drawn"
    n = counts.sum().item()
    order = torch.argsort(probs)
    cells: list[list[float]] = [[0.0, 0.0]]
    for i in order.tolist():  # pool from the smallest, so that every cell expects at least 10
        if cells[-1][1] >= 10:
            cells.append([0.0, 0.0])
        cells[-1][0] += counts[i].item()
        cells[-1][1] += n * probs[i].item()
    if len(cells) > 1 and cells[-1][1] < 10:
        last = cells.pop()
        cells[-1][0] += last[0]
        cells[-1][1] += last[1]
    assert len(cells) > 1, "a G-test needs two cells"
    statistic = 2 * sum(seen * math.log(seen / expected) for seen, expected in cells if seen > 0)
    degrees = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees, torch.tensor(max(statistic, 0.0) / 2, dtype=torch.float64)))
