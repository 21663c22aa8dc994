"""The figures of the joint law against enumeration: T = 1, the paper's formula, each with every log Z, the biased ones included.

Monte Carlo tests fix their seeds and allow 4.5 standard errors: a correct program fails each comparison with probability 7e-6.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch
from edlm.eval import ar_nll, finite_step_elbo, joint_nll, log_partition_bounds, nelbo, paper_joint
from edlm.models import ARResidualEnergy, CausalLM, CausalLMConfig, DiT, DiTConfig, NCEEnergy, NCEEnergyConfig
from exact import TabularCausalLM, TabularDenoiser, all_draws, leave_one_out, log_mean, paper_joint_nats

LENGTH = 3


def draws(universe, n, seed=1):
    """int64 [n, L] from q."""
    return universe.sequences[torch.multinomial(universe.q, n, True, generator=torch.Generator().manual_seed(seed))]


def nats(universe, energy, state, row, estimator, n):
    """-log mu + E + E[estimate of log Z] of sequence ``row`` in a state, by enumeration."""
    mu, index = universe.product(state), universe.state_index(torch.tensor(state))
    rows, probs = all_draws(mu, n)
    log_w = -energy.table[index].double()
    return -math.log(float(mu[row])) - float(log_w[row]) + float((probs * estimator(log_w[rows])).sum())


def within(estimate, expected):
    """A figure in nats a sequence."""
    assert estimate.stderr * LENGTH < 0.05
    return abs(estimate.mean * LENGTH - expected) < 4.5 * estimate.stderr * LENGTH


# --- T = 1 ------------------------------------------------------------------------------------------------------------------------


def test_the_perfect_energy_gives_minus_log_q(universe, denoiser, perfect):
    result = joint_nll(denoiser, perfect, universe.sequences, num_candidates=8, batch_size=4)
    assert torch.allclose(result.exact.values * LENGTH, -universe.q.log(), atol=1e-5)
    mean = float((universe.q * result.exact.values).sum()) * LENGTH
    assert mean == pytest.approx(universe.entropy(), abs=1e-5)


@pytest.mark.parametrize("carry_over", [False, True])
def test_an_autoregressive_energy_gives_the_likelihood_of_its_model(universe, denoiser, p_ar, carry_over):
    causal_lm = TabularCausalLM(universe, p_ar)
    energy = ARResidualEnergy(causal_lm, carry_over, mask_token_id=universe.mask)
    result = joint_nll(denoiser, energy, universe.sequences, num_candidates=4)
    assert torch.allclose(result.exact.values, ar_nll(causal_lm, universe.sequences).values, atol=1e-5)
    assert result.exact.stderr == pytest.approx(ar_nll(causal_lm, universe.sequences).stderr, abs=1e-5)


@pytest.mark.parametrize("n", [2, 3])
def test_each_bracket_has_its_own_enumerated_expectation(universe, denoiser, rough, n):
    """Over 3000 draws of log Z, for sequences that differ."""
    x0 = universe.sequences[[4, 20]]
    masked = torch.full((3000, LENGTH), universe.mask)
    bounds = log_partition_bounds(denoiser, rough, masked, 1.0, num_candidates=n, seed=9)
    found = {"lower": [], "upper_asymptotic": []}
    for i in range(3000):  # the figure of each draw of log Z
        one = type(bounds)(**{k: v[i : i + 1] if isinstance(v, torch.Tensor) else v for k, v in vars(bounds).items()})
        result = joint_nll(denoiser, rough, x0, log_Z=one)
        for name, values in found.items():
            values.append(getattr(result, name).values * LENGTH)
    for name, estimator in (("lower", log_mean), ("upper_asymptotic", leave_one_out)):
        values = torch.stack(found[name])  # [3000, 2]
        for column, row in enumerate((4, 20)):
            error = float(values[:, column].std()) / math.sqrt(3000)
            expected = nats(universe, rough, (universe.mask,) * 3, row, estimator, n)
            assert abs(float(values[:, column].mean()) - expected) < 4.5 * error < 0.1
    assert result.exact is None


def test_log_Z_may_be_handed_on(universe, denoiser, rough):
    x0 = draws(universe, 20)
    masked = torch.full((1, LENGTH), universe.mask)
    log_Z = log_partition_bounds(denoiser, rough, masked, 1.0, num_candidates=40, seed=5)
    whole = joint_nll(denoiser, rough, x0, num_candidates=40, seed=5, batch_size=7)
    handed = joint_nll(denoiser, rough, x0, log_Z=log_Z)
    assert (handed.lower, handed.upper_asymptotic) == (whole.lower, whole.upper_asymptotic)
    assert whole.num_candidates == 40
    assert whole.ess.mean == float(log_Z.ess)
    # Its error is in all sequences alike: in the standard error, though one cannot see it in the values.
    spread = float(whole.lower.values.std()) / math.sqrt(20)
    assert whole.lower.stderr > spread
    assert whole.lower.stderr == pytest.approx(math.hypot(spread, float(log_Z.stderr) / LENGTH))
    assert joint_nll(denoiser, rough, x0, num_candidates=40, seed=6).lower.mean != whole.lower.mean


# --- the paper's figure -----------------------------------------------------------------------------------------------------------


def test_the_papers_figure_of_a_carry_over_energy_is_the_likelihood_of_the_autoregressive_model(universe, denoiser, p_ar):
    """For any such model and any data: so it says nothing about decoding."""
    causal_lm = TabularCausalLM(universe, p_ar)
    nll = float(-(universe.q * p_ar.log()).sum())
    conditionals = universe.conditionals(p_ar)

    def term(state, row):
        masked = [i for i, token in enumerate(state) if token == universe.mask]
        return -float(conditionals[row, masked].sum())

    assert paper_joint_nats(universe, term) == pytest.approx(nll, abs=1e-12)  # exactly, by enumeration
    energy = ARResidualEnergy(causal_lm, True, mask_token_id=universe.mask)
    result = paper_joint(denoiser, energy, draws(universe, 20_000), num_candidates=2, batch_size=20_000)
    assert within(result.exact, nll)


def test_the_papers_figure_of_a_perfect_joint_is_below_the_entropy(universe, denoiser, perfect):
    """No likelihood can be: the formula weights the joint of x0, of which only the marginals enter the bound of decoding."""
    expected = paper_joint_nats(universe, lambda state, row: -math.log(float(universe.posterior(state)[row])))
    assert expected < universe.entropy() - 0.1
    result = paper_joint(denoiser, perfect, draws(universe, 20_000), num_candidates=2, batch_size=20_000)
    assert within(result.exact, expected)
    assert result.exact.mean * LENGTH < universe.entropy() - 4.5 * result.exact.stderr * LENGTH
    # The NELBO of the same denoiser is the entropy: the energy has made the figure smaller than any model's likelihood can be.
    assert within(nelbo(denoiser, draws(universe, 20_000)), universe.entropy())


def test_the_papers_figure_with_estimated_log_Z(universe, denoiser, rough):
    result = paper_joint(denoiser, rough, draws(universe, 20_000), num_candidates=2, num_times=2, batch_size=40_000)
    for name, estimator in (("lower", log_mean), ("upper_asymptotic", leave_one_out)):
        expected = paper_joint_nats(universe, lambda state, row, e=estimator: nats(universe, rough, state, row, e, 2))
        assert within(getattr(result, name), expected)
    assert result.exact is None
    assert 1 < result.ess.mean < 2


def test_batches_leave_no_trace(universe, denoiser, rough):
    x0 = draws(universe, 9)
    whole = paper_joint(denoiser, rough, x0, num_candidates=3, num_times=2, seed=4, batch_size=64)
    assert paper_joint(denoiser, rough, x0, num_candidates=3, num_times=2, seed=4, batch_size=5) == whole
    for i in range(9):
        one = paper_joint(denoiser, rough, x0[i : i + 1], num_candidates=3, num_times=2, seed=4 + i)
        assert one.lower.mean == pytest.approx(float(whole.lower.values[i]), rel=1e-12)


@pytest.fixture(
    params=[
        joint_nll,
        paper_joint,
        functools.partial(finite_step_elbo, steps=2),
        lambda denoiser, energy, x0: log_partition_bounds(denoiser, energy, x0, 1.0, num_candidates=2),
    ],
    ids=["joint_nll", "paper_joint", "finite_step_elbo", "log_partition_bounds"],
)
def figure(request):
    """All that take a denoiser, an energy and tokens."""
    return request.param


SIZES = {"dim": 8, "num_layers": 1, "num_heads": 1}


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
def test_networks_of_another_kind(universe, figure):
    x0 = draws(universe, 2)
    dit = DiT(DiTConfig(vocab_size=4, mask_token_id=3, **SIZES))
    causal_lm = CausalLM(CausalLMConfig(vocab_size=3, bos_token_id=3, **SIZES))
    nce = NCEEnergy(NCEEnergyConfig(vocab_size=4, mask_token_id=3, **SIZES))
    for energy in (nce, ARResidualEnergy(causal_lm, mask_token_id=3)):
        assert figure(dit, energy, x0) is not None
        with pytest.raises(ValueError, match=f"denoiser: expected a callable xt, t -> .*, got {type(energy).__name__}"):
            figure(energy, dit, x0)
    traced = torch.jit.trace(lambda x0, xt, t, log_p: log_p.sum(-1), (x0[:, None], x0, torch.ones(2), torch.zeros(2, 1, LENGTH)))
    assert figure(dit, traced, x0) is not None  # a callable without a signature
    for wrong in (dit, None):
        with pytest.raises(ValueError, match=f"energy: expected a callable x0, xt, t, log_p .*, got {type(wrong).__name__}"):
            figure(dit, wrong, x0)
    with pytest.raises(ValueError, match=r"energy: .*, got an autoregressive model \(CausalLM\); wrap it"):
        figure(dit, causal_lm, x0)


def test_sequences_that_are_too_long(universe, figure):
    x0 = torch.zeros(2, 4, dtype=torch.int64)
    long, short = (DiT(DiTConfig(vocab_size=4, mask_token_id=3, max_length=most, **SIZES)) for most in (None, 3))
    energy = ARResidualEnergy(CausalLM(CausalLMConfig(vocab_size=3, bos_token_id=3, max_length=3, **SIZES)), mask_token_id=3)
    for whose, denoiser in (("denoiser", short), ("energy", long)):
        expected = rf"x[0t]: expected at most 3 tokens a sequence \(max_length of the {whose}\), got 4; cut"
        with pytest.raises(ValueError, match=expected):
            figure(denoiser, energy, x0)
        assert figure(denoiser, energy, x0[:, :3]) is not None


@pytest.mark.parametrize("function", [joint_nll, paper_joint, functools.partial(finite_step_elbo, steps=2)])
def test_data_that_the_proposal_cannot_write(universe, p_ar, function):
    """log mu is -inf, and so is this energy: the proposal is at fault, and not the autoregressive model."""

    def never(state):
        """Token 0 never comes."""
        return torch.tensor([0.0, 0.5, 0.5]).double().expand(LENGTH, -1)

    energy = ARResidualEnergy(TabularCausalLM(universe, p_ar), mask_token_id=universe.mask)
    with pytest.raises(ValueError, match=r"got -inf for sequence 0, .* the denoiser gives a token of x0 the probability 0"):
        function(TabularDenoiser(universe, never), energy, torch.zeros(1, LENGTH, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"got -inf for sequence 0, .* look at its weights"):
        function(TabularDenoiser(universe), lambda x, xt, t, p: torch.full(x.shape[:2], -math.inf), draws(universe, 1))


def test_errors(universe, denoiser, rough):
    x0 = draws(universe, 2)
    for function in (joint_nll, paper_joint):
        with pytest.raises(ValueError, match="num_candidates: expected an int >= 2"):
            function(denoiser, rough, x0, num_candidates=1)
        with pytest.raises(ValueError, match="got the mask"):
            function(denoiser, rough, torch.full((1, 3), universe.mask))
        with pytest.raises(ValueError, match="x0: expected at least one token"):
            function(denoiser, rough, x0[:0])
        with pytest.raises(ValueError, match=r"energy: expected numbers above -inf, got nan"):
            function(denoiser, lambda x, xt, t, p: torch.full(x.shape[:2], math.nan), x0)
    three = log_partition_bounds(denoiser, rough, torch.full((3, 3), universe.mask), 1.0, num_candidates=4)
    with pytest.raises(ValueError, match=r"log_Z: expected that of one state, the fully masked one, got \[3\] states"):
        joint_nll(denoiser, rough, universe.sequences[:3], log_Z=three)
    with pytest.raises(ValueError, match="expected a completion that is possible among 8"):  # though x0 itself is possible
        joint_nll(denoiser, lambda x, xt, t, p: torch.where(p[..., 0] < 0, 0.0, 0.0).fill_(math.inf), x0, num_candidates=8)
    impossible = paper_joint(
        denoiser, lambda x, xt, t, p: torch.zeros(x.shape[:2]).index_fill(1, torch.tensor([0]), math.inf), x0
    )
    assert impossible.lower.mean == math.inf  # data that the energy holds impossible: not NaN
    with pytest.raises(ValueError, match="expected a completion that is possible among 4"):
        paper_joint(denoiser, lambda x, xt, t, p: torch.full(x.shape[:2], math.inf), x0, num_candidates=4)
