"""The T-step bound of an energy model against enumeration: its orderings, and each estimate's own expectation.

Monte Carlo tests fix their seeds and allow 4.5 standard errors: a correct program fails each comparison with probability 7e-6.
"""

from __future__ import annotations

import contextlib
import functools
import math

import pytest
import torch
from edlm.diffusion import CosineSchedule, LogLinearSchedule
from edlm.eval import ar_nll, finite_step_elbo, joint_nll, nelbo
from edlm.models import ARResidualEnergy
from exact import (
    TabularCausalLM,
    all_draws,
    finite_step_nll,
    leave_one_out,
    log_marginal,
    log_mean,
    pick_law,
)

LENGTH = 3


def draws(universe, n, seed=1):
    """int64 [n, L] from q."""
    return universe.sequences[torch.multinomial(universe.q, n, True, generator=torch.Generator().manual_seed(seed))]


def constant(x0, xt, t, log_p):
    return torch.zeros(x0.shape[:2])


def carried_over(universe, p):
    """The law of x0 given xt under the carry-over energy: p(x_i | x_<i) at masked positions, observed tokens as they are."""
    conditionals = universe.conditionals(p)

    @functools.cache
    def law(state):
        masked = torch.tensor([token == universe.mask for token in state])
        return (conditionals * masked).sum(1).exp() * universe.agrees(state)

    return law


def exact_nll(universe, law, steps):
    """The ideal model's T-step bound, nats a sequence: law(xt) [S]."""
    return finite_step_nll(universe, steps, lambda state, opened, row: -log_marginal(universe, law(state), opened, row))


def test_the_orderings_of_the_table(universe, p_ar):
    """A factorised proposal falls to the entropy, a perfect joint is there at once, a carried-over autoregressive model rises.

    p_AR = 0.6 q + 0.4 noise: the last holds for models near q.
    """
    entropy, nll = universe.entropy(), float(-(universe.q * p_ar.log()).sum())
    steps = (1, 2, 4, 8)
    factorised = [exact_nll(universe, universe.product, t) for t in steps]
    assert sorted(factorised, reverse=True) == factorised
    assert factorised[-1] > entropy
    for t in steps:
        assert exact_nll(universe, universe.posterior, t) == pytest.approx(entropy, abs=1e-10)
    over = [exact_nll(universe, carried_over(universe, p_ar), t) for t in steps]
    assert over[0] == pytest.approx(nll, abs=1e-10)
    assert sorted(over) == over
    assert over[-1] > nll > entropy


@pytest.mark.parametrize(("steps", "schedule"), [(1, None), (2, None), (4, CosineSchedule(eps=0.0)), (16, None)])
def test_without_an_energy_it_is_the_bound_of_the_proposal(universe, denoiser, schedule, steps):
    """E = 0: nothing is biased, so lower = upper. T = 16 is more than L."""
    x0 = draws(universe, 20_000)
    result = finite_step_elbo(denoiser, constant, x0, steps=steps, num_candidates=2, schedule=schedule, batch_size=20_000)
    assert torch.allclose(result.lower.values, result.upper_asymptotic.values, atol=1e-9)
    assert torch.allclose(result.sampler.values, result.lower.values, atol=1e-9)
    other = nelbo(denoiser, x0, steps=steps, schedule=schedule, num_times=4, seed=1 << 40, batch_size=80_000)
    assert abs(result.lower.mean - other.mean) < 4.5 * math.hypot(result.lower.stderr, other.stderr) < 0.03
    if schedule is None:
        expected = exact_nll(universe, universe.product, steps)
        assert abs(result.lower.mean * LENGTH - expected) < 4.5 * result.lower.stderr * LENGTH


def expectation(universe, energy, state, opened, row, name):
    """-log p(x0^S | xt) as each of the three estimates with n = 2 has it in expectation."""
    mu, index = universe.product(state), universe.state_index(torch.tensor(state))
    log_w = -energy.table[index].double()
    rows, probs = all_draws(mu, 2)  # completions, [D, 2]
    with_x0 = universe.sequences[rows].clone()
    with_x0[..., list(opened)] = universe.sequences[row, list(opened)]
    plain, rest = log_w[rows], log_w[universe.index(with_x0)]
    if name == "lower":
        log_ratio = leave_one_out(rest) - log_mean(plain)
    elif name == "upper_asymptotic":
        log_ratio = log_mean(rest) - leave_one_out(plain)
    else:
        picked = [rest[:, k].exp() / (rest[:, k].exp() + plain[:, 1 - k].exp()) for k in (0, 1)]
        log_ratio = (picked[0] + picked[1]).log()
    return -log_marginal(universe, mu, opened, row) - float((probs * log_ratio).sum())


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_each_estimate_has_its_own_enumerated_expectation(universe, denoiser, rough, steps):
    """n = 2, the biased ones included. A completion shares its rest with the one that has x0 at S: that changes no expectation of a
    single log, and does that of the sampler's, which is enumerated as it is."""
    result = finite_step_elbo(denoiser, rough, draws(universe, 30_000), steps=steps, num_candidates=2, batch_size=30_000)
    for name in ("lower", "upper_asymptotic", "sampler"):
        term = functools.cache(functools.partial(expectation, universe, rough, name=name))
        expected = finite_step_nll(universe, steps, term)
        found = getattr(result, name)
        assert found.stderr * LENGTH < 0.03
        assert abs(found.mean * LENGTH - expected) < 4.5 * found.stderr * LENGTH, name
    assert result.exact is None


@pytest.mark.parametrize("steps", [1, 3])
def test_the_samplers_figure_bounds_the_sampler(universe, rough, steps):
    """Against the law of what is picked among K = 2, enumerated by another way: above it, and not by much; the ideal model differs."""

    @functools.cache
    def picked(state):
        energy = rough.table[universe.state_index(torch.tensor(state))].double()
        return pick_law(universe.product(state), energy, 2)

    truth = exact_nll(universe, picked, steps)
    bound = finite_step_nll(universe, steps, functools.cache(functools.partial(expectation, universe, rough, name="sampler")))
    assert truth < bound < truth + 0.15


def test_many_draws_come_to_the_ideal_model(universe, denoiser, rough, perfect):
    """n = 400: what is left of the bias is below 1 % of a nat here, so both sides are within 4.5 errors + 0.02 of the enumeration."""

    def law(state):
        weight = universe.product(state) * torch.exp(-rough.table[universe.state_index(torch.tensor(state))].double())
        return weight / weight.sum()

    result = finite_step_elbo(denoiser, rough, draws(universe, 4000), steps=3, num_candidates=400, batch_size=500)
    expected = exact_nll(universe, functools.cache(law), 3)
    for name in ("lower", "upper_asymptotic"):
        found = getattr(result, name)
        assert abs(found.mean * LENGTH - expected) < 4.5 * found.stderr * LENGTH + 0.02
    result = finite_step_elbo(denoiser, perfect, draws(universe, 4000), steps=3, num_candidates=400, batch_size=500)
    for name in ("lower", "upper_asymptotic"):  # log Z is known; what is left is E_rest
        found = getattr(result, name)
        assert abs(found.mean * LENGTH - universe.entropy()) < 4.5 * found.stderr * LENGTH + 0.02


def test_one_step_is_the_joint(universe, denoiser, p_ar, perfect):
    causal_lm = TabularCausalLM(universe, p_ar)
    energy = ARResidualEnergy(causal_lm, True, mask_token_id=universe.mask)
    x0 = universe.sequences
    one = finite_step_elbo(denoiser, energy, x0, steps=1, num_candidates=2)
    assert torch.allclose(one.exact.values, ar_nll(causal_lm, x0).values, atol=1e-5)
    assert torch.allclose(one.exact.values, joint_nll(denoiser, energy, x0, num_candidates=2).exact.values, atol=1e-5)
    # What stays masked is summed by draws. Where it happens that nothing stays, that is no reason to call the figure exact.
    assert all(finite_step_elbo(denoiser, energy, x0[:1], steps=2, num_candidates=2, seed=s).exact is None for s in range(20))


def test_an_impossible_completion_is_not_picked(universe, denoiser):
    """Where x0 goes with no rest that was drawn and the others are impossible as well: impossible, and not NaN."""

    def energy(x0, xt, t, log_p):
        return torch.where(x0[..., 0] == 1, 0.3, math.inf)

    x0 = torch.tensor([[0, 1, 2]]).expand(200, -1).contiguous()
    result = finite_step_elbo(denoiser, energy, x0, steps=1, num_candidates=8, seed=0)
    for name in ("lower", "upper_asymptotic", "sampler"):
        assert getattr(result, name).mean == math.inf
    few = []
    for seed in range(50):  # some of the two draws are possible, some are not
        with contextlib.suppress(ValueError):
            few.append(finite_step_elbo(denoiser, energy, x0[:1], steps=2, num_candidates=2, seed=seed).sampler.mean)
    assert len(few) > 5 and not any(map(math.isnan, few)) and math.inf in few


def test_the_draws_of_a_sequence_are_spread(universe, denoiser):
    """Over 3000 sequences a standard error is known to about 1.3 %, and the ratio of two to 2 %: 0.9 is five of those away from 1."""
    x0 = universe.sequences[[5]].expand(3000, -1).contiguous()
    one, three = (
        finite_step_elbo(denoiser, constant, x0, steps=8, num_candidates=2, num_times=n, batch_size=9000) for n in (1, 3)
    )
    assert three.lower.stderr < 0.9 * one.lower.stderr / math.sqrt(3)


def test_batches_leave_no_trace(universe, denoiser, rough):
    x0 = draws(universe, 9)
    given = {"steps": 4, "num_candidates": 3, "num_times": 2}
    whole = finite_step_elbo(denoiser, rough, x0, **given, seed=4, batch_size=64)
    assert finite_step_elbo(denoiser, rough, x0, **given, seed=4, batch_size=5) == whole
    for i in range(9):
        one = finite_step_elbo(denoiser, rough, x0[i : i + 1], **given, seed=4 + i)
        for name in ("lower", "upper_asymptotic", "sampler"):
            assert getattr(one, name).mean == pytest.approx(float(getattr(whole, name).values[i]), rel=1e-12)


def test_the_networks_are_told_the_time_of_the_step(universe, denoiser):
    """On a grid of 4 steps both see t in 1/4, 2/4, 3/4, 1, the same for a row."""
    seen, told = [], []

    class Watching:
        mask_token_id, vocab_size = universe.mask, 4

        def __call__(self, xt, t):
            seen.append(t)
            return denoiser(xt, t)

    def energy(x0, xt, t, log_p):
        told.append(t)
        return torch.zeros(x0.shape[:2])

    finite_step_elbo(Watching(), energy, draws(universe, 500), steps=4, num_candidates=2, batch_size=500, energy_batch_size=1500)
    assert len(seen) == 1
    assert seen[0].unique().tolist() == [0.25, 0.5, 0.75, 1.0]
    assert torch.equal(told[0], seen[0])
    assert len(told) == 2  # completions of all rows; then those of rows of which some stay masked, with x0 put in
    assert 0 < len(told[1]) < 500


def test_errors(universe, denoiser, rough):
    x0 = draws(universe, 2)
    with pytest.raises(ValueError, match="num_candidates: expected an int >= 2"):
        finite_step_elbo(denoiser, rough, x0, steps=2, num_candidates=1)
    for bad in ({"steps": 0}, {"steps": 2, "num_times": 0}, {"steps": 2, "batch_size": 0}):
        with pytest.raises(ValueError, match="expected an int >= 1, got 0"):
            finite_step_elbo(denoiser, rough, x0, **bad)
    with pytest.raises(ValueError, match="schedule: expected one with eps = 0"):
        finite_step_elbo(denoiser, rough, x0, steps=2, schedule=LogLinearSchedule(eps=1e-3))
    with pytest.raises(ValueError, match="got the mask"):
        finite_step_elbo(denoiser, rough, torch.full((1, 3), universe.mask), steps=2)
    with pytest.raises(ValueError, match="energy: expected numbers above -inf, got nan"):
        finite_step_elbo(denoiser, lambda x, xt, t, p: torch.full(x.shape[:2], math.nan), x0, steps=2)
    with pytest.raises(ValueError, match="expected a completion that is possible"):
        finite_step_elbo(denoiser, lambda x, xt, t, p: torch.full(x.shape[:2], math.inf), x0, steps=2)
