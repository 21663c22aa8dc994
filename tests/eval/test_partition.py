"""log Z: each estimator against its own enumerated expectation, the biased ones included; what is exact; what is refused.

Monte Carlo tests fix their seeds and allow 4.5 standard errors: a correct program fails each comparison with probability 7e-6.
"""

from __future__ import annotations

import math

import pytest
import torch
from edlm.eval import PartitionBounds, log_partition_bounds, log_Z_lower, log_Z_upper_asymptotic
from edlm.models import ARResidualEnergy
from exact import TabularCausalLM, all_draws, leave_one_out, log_mean, residual_energy

STATES = [(3, 3, 3), (1, 3, 3), (3, 0, 3)]  # the mask is 3


def log_weights(universe, energy, state):
    """mu [S] and -E [S] of a state."""
    return universe.product(state), -energy.table[universe.state_index(torch.tensor(state))].double()


def enumerated(universe, energy, state, n, estimator):
    """The expectation of an estimator of log Z from n draws."""
    mu, log_w = log_weights(universe, energy, state)
    rows, probs = all_draws(mu, n)
    return float((probs * estimator(log_w[rows])).sum())


def log_Z(universe, energy, state):
    mu, log_w = log_weights(universe, energy, state)
    return math.log(float((mu[mu > 0] * log_w[mu > 0].exp()).sum()))


@pytest.mark.parametrize("n", [2, 3])
def test_each_estimate_has_its_own_enumerated_expectation(universe, denoiser, rough, n):
    """Three states in turn, so that rows that are mixed up are found out."""
    xt = torch.tensor(STATES).repeat(4000, 1)
    bounds = log_partition_bounds(denoiser, rough, xt, 0.5, num_candidates=n, seed=3, energy_batch_size=9000)
    for i, state in enumerate(STATES):
        for values, estimator in ((bounds.log_Z_lower, log_mean), (bounds.log_Z_upper_asymptotic, leave_one_out)):
            mine = values[i::3]
            error = float(mine.std()) / math.sqrt(len(mine))
            expected = enumerated(universe, rough, state, n, estimator)
            assert error < 0.03
            assert abs(float(mine.mean()) - expected) < 4.5 * error
        weights = bounds.log_Z_lower[i::3].exp()  # the mean weight is unbiased for Z
        error = float(weights.std()) / math.sqrt(len(weights))
        assert abs(float(weights.mean()) - math.exp(log_Z(universe, rough, state))) < 4.5 * error


@pytest.mark.parametrize("state", STATES)
def test_the_lower_estimate_rises_to_log_Z_from_below(universe, rough, state):
    mu, log_w = log_weights(universe, rough, state)
    expected = []
    for n in (1, 2, 3):
        rows, probs = all_draws(mu, n)
        expected.append(float((probs * log_Z_lower(-log_w[rows])).sum()))
    assert expected[0] < expected[1] < expected[2] < log_Z(universe, rough, state)
    assert expected[0] == pytest.approx(float((mu[mu > 0] * log_w[mu > 0]).sum()))
    # Here the weights are tame, and the estimate from above is above from the start, and falls.
    above = [enumerated(universe, rough, state, n, leave_one_out) for n in (2, 3)]
    assert above[0] > above[1] > log_Z(universe, rough, state)


def test_the_upper_estimate_is_no_bound_for_heavy_tails():
    """A weight of 1000 once in 1000 draws, else 0.001: log Z = 0.0 or so, and the estimate's expectation at n = 2, 3, 8 is below."""
    p = 1e-3
    log_Z = math.log(p * 1000 + (1 - p) * 1e-3)
    for n in (2, 3, 8):
        mean = 0.0
        for k in range(n + 1):  # how many of n draws are large
            energy = torch.full((n,), -math.log(1e-3), dtype=torch.float64)
            energy[:k] = -math.log(1000)
            mean += math.comb(n, k) * p**k * (1 - p) ** (n - k) * float(log_Z_upper_asymptotic(energy))
        assert mean < log_Z - 1


def test_estimates_as_they_are_written():
    log_w = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 - 700  # exp underflows to 0
    shifted = log_w + 700
    assert torch.allclose(log_Z_lower(-log_w) + 700, log_mean(shifted))
    assert torch.allclose(log_Z_upper_asymptotic(-log_w) + 700, leave_one_out(shifted))
    assert log_Z_lower(-log_w).dtype == torch.float64
    assert float(log_Z_upper_asymptotic(-log_w[0])) == pytest.approx(float(log_Z_upper_asymptotic(-log_w)[0]))
    assert float(log_Z_lower(torch.tensor([2.5]))) == pytest.approx(-2.5)
    some = torch.tensor([1.0, math.inf, 2.0])
    assert float(log_Z_lower(some)) == pytest.approx(math.log((math.exp(-1) + math.exp(-2)) / 3))
    assert math.isfinite(float(log_Z_upper_asymptotic(some)))
    nothing = torch.full((3,), math.inf)
    assert float(log_Z_lower(nothing)) == float(log_Z_upper_asymptotic(nothing)) == -math.inf  # and not NaN


def test_ess_and_standard_error(universe, denoiser, rough):
    """stderr is the delta method's: the standard deviation of the weights over sqrt(n) times their mean."""
    bounds = log_partition_bounds(denoiser, rough, torch.tensor(STATES), 0.5, num_candidates=50, seed=3)
    assert isinstance(bounds, PartitionBounds)
    assert ((bounds.ess > 1) & (bounds.ess < 50)).all()
    weights = torch.tensor([0.2, 1.0, 3.0, 0.7], dtype=torch.float64)
    from edlm.eval.partition import effective_size, log_Z_stderr

    ess = effective_size(-weights.log())
    assert float(ess) == pytest.approx(float(weights.sum() ** 2 / weights.square().sum()))
    assert math.isnan(float(log_Z_stderr(ess, 4)))  # three effective draws: nothing is said
    many = weights.repeat(25)
    spread = float(many.std() / many.mean()) / 10
    assert float(log_Z_stderr(effective_size(-many.log()), 100)) == pytest.approx(spread)
    assert float(effective_size(torch.tensor([0.0, math.inf, math.inf]))) == 1
    assert float(effective_size(torch.full((3,), math.inf))) == 1


def test_what_an_energy_knows(universe, denoiser, p_ar):
    """Z = 1 with carry-over in every state; p_AR(observed) without, known where it is a prefix. Against enumeration."""
    causal_lm = TabularCausalLM(universe, p_ar)
    xt = torch.tensor(universe.states())
    carry = ARResidualEnergy(causal_lm, True, mask_token_id=universe.mask).log_Z(xt)
    assert torch.equal(carry, torch.zeros(64))
    known = ARResidualEnergy(causal_lm, mask_token_id=universe.mask).log_Z(xt)
    for state, value in zip(universe.states(), known.tolist(), strict=True):
        masked = [token == universe.mask for token in state]
        if masked == sorted(masked):
            assert value == pytest.approx(math.log(float(p_ar[universe.agrees(state)].sum())), abs=1e-6)
        else:
            assert math.isnan(value)
    bounds = log_partition_bounds(
        denoiser, ARResidualEnergy(causal_lm, mask_token_id=universe.mask), torch.tensor(STATES), 1.0, num_candidates=4000
    )
    assert bounds.log_Z_exact.isnan().tolist() == [False, False, True]
    # 4000 draws: the bias is below a tenth of the error.
    for i in (0, 1):
        assert abs(float(bounds.log_Z_lower[i] - bounds.log_Z_exact[i])) < 4.5 * float(bounds.stderr[i]) < 0.15
    # The state whose Z the energy does not know: log p_AR(the observed token), which is enumerated.
    truth = math.log(float(p_ar[universe.agrees(STATES[2])].sum()))
    assert abs(float(bounds.log_Z_lower[2]) - truth) < 4.5 * float(bounds.stderr[2])


def test_a_state_does_not_depend_on_its_batch(universe, denoiser, rough):
    xt = torch.tensor(STATES * 3)
    whole = log_partition_bounds(denoiser, rough, xt, 0.5, num_candidates=5, seed=torch.arange(9) + 40)
    for i in range(9):
        one = log_partition_bounds(denoiser, rough, xt[i : i + 1], 0.5, num_candidates=5, seed=40 + i, energy_batch_size=2)
        assert float(one.log_Z_lower) == float(whole.log_Z_lower[i])
        assert float(one.log_Z_upper_asymptotic) == float(whole.log_Z_upper_asymptotic[i])


def test_a_perfect_energy_leaves_nothing_to_estimate(universe, denoiser):
    """E = 0: every estimate is 0, and the sample size is full."""

    def zero(x0, xt, t, log_p):
        return torch.zeros(x0.shape[:2])

    bounds = log_partition_bounds(denoiser, zero, torch.tensor(STATES), 0.5, num_candidates=6)
    assert torch.allclose(bounds.log_Z_lower, torch.zeros(3).double(), atol=1e-12)
    assert torch.allclose(bounds.log_Z_upper_asymptotic, torch.zeros(3).double(), atol=1e-12)
    assert bounds.log_Z_exact.isnan().all()
    assert torch.allclose(bounds.ess, torch.full((3,), 6.0).double())


def test_errors(universe, denoiser, rough):
    xt = torch.tensor(STATES)
    for n in (1, 0, 2.0, True):
        with pytest.raises(ValueError, match="num_candidates: expected an int >= 2"):
            log_partition_bounds(denoiser, rough, xt, 0.5, num_candidates=n)
    with pytest.raises(ValueError, match="at least 2 draws for the leave-one-out estimate of log Z, got 1"):
        log_Z_upper_asymptotic(torch.zeros(3, 1))
    for bad in (math.nan, -math.inf):
        with pytest.raises(ValueError, match="energy: expected numbers above -inf, got"):
            log_Z_lower(torch.tensor([0.0, bad]))

        def wrong(x0, xt, t, log_p, bad=bad):
            energy = torch.zeros(x0.shape[:2])
            energy[-1, -1] = bad
            return energy

        with pytest.raises(ValueError, match="for sequence 2, candidate 3 of the batch"):
            log_partition_bounds(denoiser, wrong, xt, 0.5, num_candidates=4)
    with pytest.raises(ValueError, match=r"energy: expected energies \[B, K\] = \[3, 4\], got \[3\]"):
        log_partition_bounds(denoiser, lambda x0, xt, t, p: torch.zeros(3), xt, 0.5, num_candidates=4)
    with pytest.raises(ValueError, match="xt: expected int64"):
        log_partition_bounds(denoiser, rough, xt[0], 0.5, num_candidates=4)
    with pytest.raises(ValueError, match="t: expected times in"):
        log_partition_bounds(denoiser, rough, xt, 1.5, num_candidates=4)
    with pytest.raises(ValueError, match=r"energy: expected floating \[..., n\]"):
        log_Z_lower(torch.zeros(3, dtype=torch.int64))
    for function in (log_Z_lower, log_Z_upper_asymptotic):
        with pytest.raises(ValueError, match=r"energy: expected floating \[..., n\] .*, got list; make it a tensor"):
            function([1.0, 2.0])
    with pytest.raises(ValueError, match="mask_token_id: expected the denoiser's mask"):
        ARResidualEnergy(TabularCausalLM(universe, universe.q)).log_Z(xt)


def test_energies_without_a_possible_draw(denoiser):
    """Draws of the second state are all impossible: nothing is known of its Z, and it is not -inf."""

    def energy(x0, xt, t, log_p):
        return torch.where(xt[:, :1] == 1, math.inf, 0.0).expand(x0.shape[:2])

    with pytest.raises(
        ValueError, match=r"expected a completion that is possible among 4 of each state, got \+inf for all of state 1"
    ):
        log_partition_bounds(denoiser, energy, torch.tensor(STATES), 0.5, num_candidates=4)


def test_what_an_energy_says_of_log_Z_has_a_shape(denoiser, rough):
    class Wrong:
        def __call__(self, *given):
            return rough(*given)

        def log_Z(self, xt):
            return torch.zeros(len(xt), 1)

    with pytest.raises(ValueError, match=r"energy: expected log_Z\(xt\) \[B\] = \[3\], NaN where it is not known, got \[3, 1\]"):
        log_partition_bounds(denoiser, Wrong(), torch.tensor(STATES), 0.5, num_candidates=4)


def test_the_perfect_energy_has_Z_one_everywhere(universe, perfect):
    """The oracle's own check: what the tests of the joint figures call perfect."""
    assert torch.allclose(perfect.log_Z_table, torch.zeros(64).double(), atol=1e-12)
    assert residual_energy(universe)((3, 3, 3)).isfinite().all()
