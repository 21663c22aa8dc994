"""select_candidate, resample, reverse_step: laws by enumeration, weights against float64, identities, errors."""

from __future__ import annotations

import math

import pytest
import torch
from edlm.ops import resample, reverse_step, select_candidate
from edlm.ops.importance import SCHEMES
from exact import Universe, g_test, pick_law, residual_energy

ENERGY = torch.tensor([[0.3, -1.2, 2.0, 0.0], [5.0, 5.5, 4.0, 9.0], [-40.0, 0.0, 40.0, 1.0]])


def test_weights_ess_and_log_z(device):
    correction = torch.tensor([0.5, -0.5, 0.0, 1.0]).expand(3, 4)
    got = select_candidate(ENERGY.to(device), temperature=0.7, log_correction=correction.to(device), seed=0)
    a = -ENERGY.double() / 0.7 + correction
    w = a.exp()
    torch.testing.assert_close(got.log_weights.cpu().double(), a.log_softmax(-1), atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(got.ess.cpu().double(), w.sum(-1) ** 2 / (w**2).sum(-1), atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(got.log_Z.cpu().double(), w.mean(-1).log(), atol=1e-5, rtol=1e-6)
    for k in range(4):
        others = [i for i in range(4) if i != k]
        torch.testing.assert_close(got.log_Z_loo[:, k].cpu().double(), w[:, others].mean(-1).log(), atol=1e-5, rtol=1e-6)


def test_low_energy_is_good(device):
    """The law of the index is softmax(-E / T), rows apart: G-tests at 1e-6; the sign reversed is rejected."""
    n = 50_000
    energy = torch.tensor([[0.0, 1.0, -0.5], [2.0, 0.0, 0.5]])
    index = select_candidate(energy.repeat(n, 1).to(device), temperature=0.8, seed=1).index.cpu().view(n, 2)
    for row in range(2):
        counts = torch.bincount(index[:, row], minlength=3).double()
        assert g_test(counts, torch.softmax(-energy[row].double() / 0.8, 0)) > 1e-6
        assert g_test(counts, torch.softmax(energy[row].double() / 0.8, 0)) < 1e-6


def test_raising_a_candidates_likelihood_raises_how_often_it_is_chosen(device):
    energy = torch.zeros(40_000, 3, device=device)
    before = (select_candidate(energy, seed=2).index == 1).double().mean()
    energy[:, 1] -= 0.5  # its log p_AR rises by half a nat
    assert (select_candidate(energy, seed=2).index == 1).double().mean() > before + 0.05


@pytest.mark.parametrize("k", [1, 2, 3])
def test_law_of_the_pick(k, device):
    """K draws from mu, scored and picked: the enumerated finite-K law of self-normalised importance sampling."""
    universe, n = Universe(), 60_000
    state = (universe.mask,) * 3
    mu, energy = universe.product(state), residual_energy(universe)(state)
    draws = torch.multinomial(mu, n * k, replacement=True).view(n, k)
    index = select_candidate(energy[draws].float().to(device), seed=3).index.cpu()
    counts = torch.bincount(draws.gather(1, index[:, None]).squeeze(1), minlength=len(mu)).double()
    assert g_test(counts, pick_law(mu, energy, k)) > 1e-6


def test_candidates_are_exchangeable(device):
    """Independent candidates of one law: each place is picked equally often, whatever the energies."""
    energy = torch.randn(60_000, 4, generator=torch.Generator().manual_seed(1)).to(device) * 3
    counts = torch.bincount(select_candidate(energy, seed=8).index.cpu(), minlength=4).double()
    assert g_test(counts, torch.full((4,), 0.25)) > 1e-6


def test_temperature_limits(device):
    greedy = select_candidate(ENERGY.to(device), temperature=0, seed=0)
    assert torch.equal(greedy.index.cpu(), ENERGY.argmin(1)) and (greedy.ess == 1).all() and greedy.log_Z.isnan().all()
    tie = select_candidate(torch.tensor([[1.0, 0.0, 0.0]], device=device), temperature=0, seed=0)
    assert tie.index.item() == 1
    flat = select_candidate(
        torch.tensor([[1.0, 2.0, math.inf, 3.0]], device=device).repeat(30_000, 1), temperature=math.inf, seed=0
    )
    counts = torch.bincount(flat.index.cpu(), minlength=4).double()
    assert g_test(counts, torch.tensor([1, 1, 0, 1]) / 3) > 1e-6  # an impossible candidate stays impossible


def test_one_candidate(device):
    got = select_candidate(torch.tensor([[3.0], [-1.0]], device=device), seed=0)
    assert (got.index == 0).all() and (got.ess == 1).all() and got.log_Z_loo.isnan().all()
    torch.testing.assert_close(got.log_Z.cpu(), torch.tensor([-3.0, 1.0]))


def test_shift_invariance_and_large_energies(device):
    got, shifted = (select_candidate((ENERGY + c).to(device), seed=4) for c in (0.0, 1024.0))
    assert torch.equal(got.index, shifted.index)
    torch.testing.assert_close(got.log_weights, shifted.log_weights, atol=2e-4, rtol=1e-4)
    equal = select_candidate(torch.full((1, 2), 1e17, dtype=torch.float64, device=device), seed=0)
    assert equal.ess.item() == 2
    huge = select_candidate(torch.tensor([[1e5, 1e5 + 1, 1e30]], device=device), seed=0)
    assert huge.log_weights.isfinite()[:, :2].all() and huge.ess.isfinite().all()


def test_leave_one_out_keeps_the_small(device):
    """One weight 10**13 times the rest: by subtraction the others' mean would be lost altogether."""
    loo = select_candidate(torch.tensor([[-30.0, 0.0, 1.0]], device=device), seed=0).log_Z_loo.cpu()
    assert abs(loo[0, 0] - math.log((1 + math.exp(-1)) / 2)) < 1e-6


def test_rows_and_seeds(device):
    energy = torch.randn(20, 5, device=device)
    seed = torch.arange(20) * 3
    whole = select_candidate(energy, seed=seed, offset=7).index
    rows = [3, 19, 0]
    assert torch.equal(select_candidate(energy[rows], seed=seed[rows], offset=7).index, whole[rows])
    many = torch.zeros(4000, 5, device=device)
    assert not torch.equal(select_candidate(many, seed=0).index, select_candidate(many, seed=0, offset=1).index)


def test_expectation_of_log_mean_weights():
    """E[T_n] of the log-mean-exp rises with n and stays below log Z, by enumeration of the op's own log_Z over all n-tuples."""
    values = torch.tensor([-2.0, 0.5, 1.0])
    probs = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    log_z = (probs * (-values.double()).exp()).sum().log()
    previous = -math.inf
    for n in (1, 2, 3, 4):
        rows = torch.cartesian_prod(*[torch.arange(3)] * n).view(-1, n)
        expectation = (probs[rows].prod(1) * select_candidate(values[rows], seed=0).log_Z.double()).sum()
        assert previous < expectation < log_z
        previous = expectation
        unbiased = (probs[rows].prod(1) * select_candidate(values[rows], seed=0).log_Z.double().exp()).sum()
        assert abs(unbiased - log_z.exp()) < 1e-5


@pytest.mark.parametrize(
    ("energy", "where"),
    [
        (torch.tensor([[0.0, 1.0], [math.nan, 0.0]]), 1),
        (torch.tensor([[-math.inf, 1.0], [0.0, 0.0]]), 0),
        (torch.tensor([[0.0, 1.0], [math.inf, math.inf]]), 1),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_select_bad_energies(energy, where, temperature):
    with pytest.raises(ValueError, match=rf"energy: expected finite energies.* in sequence {where}"):
        select_candidate(energy, temperature=temperature, seed=0)


def test_a_weight_that_overflows_is_reported():
    with pytest.raises(ValueError, match=r"energy: expected finite energies.* in sequence 0"):
        select_candidate(torch.tensor([[-1.0, 0.0]]), temperature=1e-310, seed=0)


def test_select_bad_input():
    with pytest.raises(ValueError, match=r"energy: expected a floating tensor \[B, K\] .* got torch.float32 \[3\]"):
        select_candidate(torch.zeros(3), seed=0)
    with pytest.raises(ValueError, match=r"energy: .* at least one column"):
        select_candidate(torch.zeros(3, 0), seed=0)
    with pytest.raises(ValueError, match=r"temperature: expected a number >= 0 .* got -1.0"):
        select_candidate(torch.zeros(3, 2), temperature=-1.0, seed=0)
    with pytest.raises(ValueError, match=r"log_correction: expected a torch.float32 tensor of shape \[3, 2\]"):
        select_candidate(torch.zeros(3, 2), log_correction=torch.zeros(3), seed=0)


def test_the_first_bad_row_is_named_and_shares_nothing(device):
    """The smallest of several, wherever threads meet them; a direct caller's numbers stay in range, and other rows are as without."""
    energy = torch.randn(3000, 20, device=device)
    want = select_candidate(energy, seed=0)
    energy[[2900, 1234, 1235], 7] = math.nan
    with pytest.raises(ValueError, match=r"in sequence 1234$"):
        select_candidate(energy, seed=0)
    index, *_, invalid = torch.ops.edlm.select_candidate(
        energy, 1.0, None, torch.arange(3000, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    )
    good = ~energy.isnan().any(1)
    assert invalid.tolist() == [1234] and torch.equal(index[good], want.index[good]) and ((index >= 0) & (index < 20)).all()


def test_sizes_at_the_edge(device):
    """No rows, one column, and a hundred thousand of them."""
    none = select_candidate(torch.zeros(0, 3, device=device), seed=0)
    assert [list(t.shape) for t in none] == [[0], [0, 3], [0], [0], [0, 3]]
    big = torch.randn(2, 100_000, device=device, dtype=torch.float64, generator=torch.Generator(device).manual_seed(0))
    got = select_candidate(big, seed=0)
    weight = torch.softmax(-big, -1)
    torch.testing.assert_close(got.ess.double(), 1 / (weight**2).sum(-1), rtol=1e-6, atol=0)
    torch.testing.assert_close(got.log_weights.double(), weight.log(), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        got.log_Z_loo.double(), (-big).exp().mean(-1, keepdim=True).log().expand_as(big), rtol=0, atol=1e-2
    )
    for scheme in SCHEMES:
        assert resample(torch.zeros(0, 3, device=device), scheme, seed=0).shape == (0, 3)
        assert resample(torch.zeros(2, 1, device=device), scheme, seed=0).tolist() == [[0], [0]]
        copies = torch.zeros_like(big).scatter_add_(1, resample(-big, scheme, seed=0), torch.ones_like(big))
        # Within 6 standard errors of a multinomial's, the widest of the four: a false alarm in fewer than 1 % of seeds.
        expected = 100_000 * weight
        assert ((copies - expected).abs() < 6 * expected.sqrt() + 4).all(), scheme


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_every_floating_dtype(dtype, device):
    energy = ENERGY.to(device).to(dtype)
    for got, want in zip(select_candidate(energy, seed=0), select_candidate(energy.double(), seed=0), strict=True):
        assert torch.equal(got, want)
    assert torch.equal(resample(energy, seed=0), resample(energy.double(), seed=0))


# --- resample --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_resampling_is_unbiased(scheme, device):
    """Mean copies are N w within five standard errors, populations apart, for weights that include 0 and one above 1 / N."""
    log_w = torch.tensor([[0.0, -1.0, -math.inf, 2.0, 0.5], [1.0, 1.0, 1.0, 1.0, -3.0]])
    n = 20_000
    ancestors = resample(log_w.repeat(n, 1).to(device), scheme, seed=1).cpu()
    assert (ancestors.diff(dim=1) >= 0).all()
    copies = torch.nn.functional.one_hot(ancestors, 5).sum(1).double().view(n, 2, 5)
    expected = 5 * torch.softmax(log_w.double(), -1)
    error = copies.std(0) / math.sqrt(n) + 1e-12
    assert ((copies.mean(0) - expected).abs() < 5 * error + 1e-9).all()
    if scheme == "systematic":
        assert ((copies - expected).abs() < 1 + 1e-9).all()
    if scheme == "residual":
        assert (copies >= expected.floor() - 1e-9).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_equal_weights_and_certain_ones(scheme, device):
    certain = torch.full((1, 6), -math.inf, device=device)
    certain[0, 4] = -700.0
    assert (resample(certain, scheme, seed=0) == 4).all()
    if scheme != "multinomial":
        for n in (6, 49, 98):  # 49 * (1 / 49) is just below 1
            assert torch.equal(resample(torch.zeros(1, n, device=device), scheme, seed=0).cpu(), torch.arange(n)[None])


def test_resample_bad_input():
    with pytest.raises(ValueError, match=r"scheme: expected one of systematic, .* got 'best'"):
        resample(torch.zeros(1, 2), "best", seed=0)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match=r"log_weights: expected finite numbers or -inf"):
            resample(torch.tensor([[0.0, bad]]), seed=0)
    with pytest.raises(ValueError, match=r"log_weights: expected finite numbers or -inf"):
        resample(torch.full((1, 2), -math.inf), seed=0)
    with pytest.raises(ValueError, match=r"log_weights: expected a floating tensor \[B, N\]"):
        resample(torch.zeros(2), seed=0)


# --- reverse_step ----------------------------------------------------------------------------------------------------------------


def test_reverse_step(device):
    xt = torch.tensor([[9, 9, 3], [9, 1, 9]], device=device)
    x0 = torch.tensor([[[0, 1, 3], [4, 5, 3]], [[6, 1, 7], [8, 1, 2]]], device=device)
    index = torch.tensor([1, 0], device=device)
    open_time = torch.tensor([[0.9, 0.2, 0.1], [0.5, 0.9, 0.4]], dtype=torch.float64, device=device)
    assert reverse_step(xt, x0, index, open_time, 0.5).tolist() == [[4, 9, 3], [6, 1, 9]]
    assert reverse_step(xt, x0, index, open_time, 0.0).tolist() == [[4, 5, 3], [6, 1, 7]]
    per_row = torch.tensor([math.inf, 0.4], dtype=torch.float64, device=device)
    assert reverse_step(xt, x0, index, open_time, per_row).tolist() == [[9, 9, 3], [6, 1, 7]]


def test_reverse_step_sizes_at_the_edge(device):
    """Nothing to do; one token; enough for several threads; a tensor s of one element."""
    empty = torch.zeros(0, dtype=torch.int64, device=device)
    for shape in ((0, 5), (2, 0)):
        xt = empty.view(shape)
        time = torch.zeros(shape, device=device)
        x0 = torch.zeros(shape[0], 3, shape[1], dtype=torch.int64, device=device)
        assert reverse_step(xt, x0, torch.zeros_like(xt[:, :1].sum(1)), time, 0.5).shape == shape
    xt, x0 = torch.full((5, 20_001), -1, device=device), torch.arange(5 * 2 * 20_001, device=device).view(5, 2, 20_001)
    index, open_time = torch.tensor([0, 1, 0, 1, 1], device=device), torch.rand(5, 20_001, device=device)
    want = torch.where(open_time >= 0.25, x0[torch.arange(5), index], xt)
    assert torch.equal(reverse_step(xt, x0, index, open_time, 0.25), want)
    assert torch.equal(reverse_step(xt, x0, index, open_time, torch.tensor(0.25, device=device)), want)
    assert torch.equal(reverse_step(xt.T.contiguous().T, x0, index, open_time.double(), 0.25), want)


def test_reverse_step_bad_input():
    xt, x0, index = (
        torch.zeros(2, 3, dtype=torch.int64),
        torch.zeros(2, 4, 3, dtype=torch.int64),
        torch.zeros(2, dtype=torch.int64),
    )
    open_time = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"x0: expected a torch.int64 tensor of shape \[2, 4, 3\], got torch.int64 \[3, 4, 3\]"):
        reverse_step(xt, torch.zeros(3, 4, 3, dtype=torch.int64), index, open_time, 0.5)
    with pytest.raises(ValueError, match=r"index: expected a torch.int64 tensor of shape \[2\], got torch.int64 \[3\]"):
        reverse_step(xt, x0, torch.zeros(3, dtype=torch.int64), open_time, 0.5)
    with pytest.raises(ValueError, match=r"open_time: expected float64 or float32, got torch.int64"):
        reverse_step(xt, x0, index, xt, 0.5)
    with pytest.raises(ValueError, match=r"s: expected a number, or a torch.float64 tensor of one element or \[2\]"):
        reverse_step(xt, x0, index, open_time, torch.zeros(3))
    with pytest.raises(ValueError, match=r"xt: expected an int64 tensor \[B, L\], got torch.int32 \[2, 3\]"):
        reverse_step(xt.int(), x0, index, open_time, 0.5)
    with pytest.raises(ValueError, match=r"index: expected indices in 0 .. 3, got 4 in sequence 1"):
        reverse_step(xt, x0, torch.tensor([0, 4]), open_time, 0.5)
