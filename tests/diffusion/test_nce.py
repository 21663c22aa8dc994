"""NCE against enumeration: the optimum of the loss, the loss far from 0, the law of the negatives, what a row depends on, decoding.

Every G-test has a fixed seed and a false-alarm rate of 1e-6.
"""

from __future__ import annotations

import math

import pytest
import torch
from edlm.diffusion import LogLinearSchedule, MaskedDiffusion, nce_batch, nce_loss
from edlm.models import DiT, DiTConfig, NCEEnergy
from edlm.ops import sample_candidates
from edlm.samplers import generate
from exact import TabularDenoiser, TabularEnergy, Universe, g_test, pick_law, residual_energy, total_variation


@pytest.fixture(scope="module")
def universe():
    return Universe()


@pytest.fixture(scope="module")
def proposal(universe):
    return TabularDenoiser(universe)


@pytest.fixture(scope="module")
def diffusion(universe):
    return MaskedDiffusion(LogLinearSchedule(eps=0.0), universe.mask)


class TwoHalves:
    """The tabular denoiser as hidden and head; it remembers how many rows its head was asked for."""

    def __init__(self, whole):
        self.whole, self.mask_token_id, self.vocab_size, self.rows = whole, whole.mask_token_id, whole.vocab_size, []

    def hidden(self, xt, t):
        assert not torch.is_grad_enabled()
        return self.whole(xt, t)

    def head(self, rows):
        assert rows.dim() == 2
        self.rows.append(len(rows))
        return rows

    def __call__(self, xt, t):
        raise AssertionError("the head would run on every row")


def draw(universe, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return universe.sequences[torch.multinomial(universe.q, n, replacement=True, generator=generator)]


# --- the optimum ------------------------------------------------------------------------------------------------------------------


def tables(universe, product):
    """q(x0 | xt) and mu(x0 | xt) of every state: float64 [64, 27] twice."""
    return (torch.stack([f(state) for state in universe.states()]) for f in (universe.posterior, product))


@pytest.mark.parametrize("proposal_is", ["perfect", "poor"])
def test_the_optimum_is_the_log_ratio(universe, proposal_is):
    """The expected loss over all pairs, minimised by L-BFGS in float64 over a table: E = -log(q / mu) within 1e-3, Z = 1 within 1e-4.

    Also with a mu that is not made of q's marginals: its energy has more to repair, and Z is 1 all the same.
    """

    def product(xt):
        if proposal_is == "perfect":
            return universe.product(xt)
        poor = torch.softmax(torch.arange(3).double() * 0.7, 0)[universe.sequences]
        masked = torch.tensor([token == universe.mask for token in xt])
        return torch.where(masked, poor, 1.0).prod(1) * universe.agrees(xt)

    q, mu = tables(universe, product)
    table = torch.zeros(64, 27, dtype=torch.float64, requires_grad=True)
    # Every (state, x0, x0') is a row of the batch, with the probability that it has.
    state, plus, minus = (q[:, :, None] * mu[:, None] > 0).nonzero(as_tuple=True)
    weight = q[state, plus] * mu[state, minus]
    optimiser = torch.optim.LBFGS(
        [table], max_iter=400, history_size=50, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        loss = (weight * nce_loss(table[state, plus], table[state, minus][:, None]).nats).sum()
        loss.backward()
        return loss

    assert float(closure().detach()) == pytest.approx(64 * 2 * math.log(2))
    optimiser.step(closure)
    energy, support = table.detach(), mu > 0
    torch.testing.assert_close(energy[support], -(q / mu).log()[support], rtol=0, atol=1e-3)
    z = (mu * (-energy).exp()).sum(1)
    torch.testing.assert_close(z, torch.ones(64, dtype=torch.float64), rtol=0, atol=1e-4)
    assert energy[-1].abs().max() > 0.3  # there was something to learn, where everything is masked


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_number_of_negatives_does_not_move_the_optimum(n):
    """The expected loss over the positive and all n-tuples of negatives (four sequences, all masked): its gradient is 0 at E*."""
    small = Universe(num_tokens=2, length=2)
    state = (small.mask,) * 2
    q, mu = small.posterior(state), small.product(state)
    rows = torch.cartesian_prod(*[torch.arange(4)] * (1 + n))  # [4 ** (1 + n), 1 + n]
    weight = q[rows[:, 0]] * mu[rows[:, 1:]].prod(1)

    def gradient(energy):
        loss = (weight * nce_loss(energy[rows[:, 0]], energy[rows[:, 1:]]).nats).sum()
        return torch.autograd.grad(loss, energy)[0]

    best = -(q / mu).log()
    assert gradient(best.clone().requires_grad_()).abs().max() < 1e-14
    assert gradient((best + 0.1).requires_grad_()).abs().min() > 1e-4


@pytest.fixture(scope="module")
def learned(universe, proposal, diffusion):
    """A table [64, 27] learned from ``nce_batch`` alone: 250 steps of Adam, 1024 sequences with 3 negatives; the last half averaged."""
    table = torch.zeros(64, 27, requires_grad=True)
    optimiser, average = torch.optim.Adam([table], lr=0.05), torch.zeros(64, 27)
    for step in range(250):
        batch = nce_batch(proposal, draw(universe, 1024, step), diffusion, num_negatives=3, seed=1024 * step, offset=step)
        energy = table[universe.state_index(batch.xt)[:, None], universe.index(batch.candidates)]
        optimiser.zero_grad()
        nce_loss(energy[:, 0], energy[:, 1:]).nats.mean().backward()
        optimiser.step()
        if step >= 125:
            average += table.detach() / 125
    return average


def test_learned_from_samples(universe, learned):
    """Where everything is masked: E within 0.06 of -log(q / mu) on average over q, |Z - 1| < 0.02; Z within 0.05 over all states."""
    q, mu = tables(universe, universe.product)
    error = (learned.double() + (q / mu).log()).abs()
    assert (q[-1] * error[-1]).sum() < 0.06
    assert (q[-1] * (q[-1] / mu[-1]).log().abs()).sum() > 0.3  # what E = 0 would have had
    z = (mu * (-learned.double()).exp()).sum(1)
    assert abs(z[-1] - 1) < 0.02
    assert (z - 1).abs().max() < 0.05


def test_decoding_with_the_learned_energy(universe, proposal, learned):
    """One step, K = 64 of 20 000 sequences: near q with the learned energy; further than plain mu with its sign reversed.

    And with the exact energy, K = 2: the pick's enumerated law, to which the reversed sign does not fit.
    """
    n, state = 20_000, (universe.mask,) * 3

    def law(energy, k):
        out = generate(proposal, batch_size=n, length=3, steps=1, energy=energy, num_candidates=k, window=(0, 1), seed=4)
        return torch.bincount(universe.index(out.tokens), minlength=27).double()

    right, wrong = (TabularEnergy(universe, lambda xt: torch.zeros(27)) for _ in range(2))
    right.table, wrong.table = learned, -learned
    plain = total_variation(universe.product(state), universe.q)
    assert total_variation(law(right, 64) / n, universe.q) < 0.1 * plain
    assert total_variation(law(wrong, 64) / n, universe.q) > 1.5 * plain

    mu, exact = universe.product(state), residual_energy(universe)
    counts = law(TabularEnergy(universe, exact), 2)
    assert g_test(counts, pick_law(mu, exact(state), 2)) > 1e-6
    assert g_test(counts, pick_law(mu, -exact(state), 2)) < 1e-6


def test_a_lower_energy_is_picked_more_often(universe, proposal):
    """One sequence's energy lowered by ln 3, all others at 0: its odds among 64 candidates rise about threefold."""
    lowered = torch.zeros(64, 27)
    lowered[:, 5] = -math.log(3)
    energy = TabularEnergy(universe, lambda xt: torch.zeros(27))
    shares = []
    for table in (torch.zeros(64, 27), lowered):
        energy.table = table
        out = generate(proposal, batch_size=20_000, length=3, steps=1, energy=energy, num_candidates=64, window=(0, 1), seed=4)
        shares.append(float((universe.index(out.tokens) == 5).double().mean()))
    odds = [share / (1 - share) for share in shares]
    assert 2.4 < odds[1] / odds[0] < 3.6


# --- the loss far from 0 ----------------------------------------------------------------------------------------------------------

VALUES = [0.0, 1e-4, 0.3, 8.0, 20.0, 21.0, 50.0, 89.0, 104.0, 1000.0]


def softplus(x):
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(max(x, -745.0)) / (1 + math.exp(x))


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)]
)
def test_values_and_gradients_are_analytic(dtype, rtol):
    """At E up to +-1000, of either role. Low-precision energies are widened first: only their gradients are rounded back."""
    energy = torch.tensor([*VALUES, *(-x for x in VALUES)], dtype=dtype)
    exact = energy.double().tolist()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tolerance = {"rtol": min(rtol, 1e-6), "atol": 1e-37}
    for role in ("positive", "negative"):
        moving, still = energy.clone().requires_grad_(), torch.zeros(len(energy), dtype=dtype)
        given = (moving, still[:, None]) if role == "positive" else (still, moving[:, None])
        loss = nce_loss(*given)
        assert loss.nats.dtype == wide
        sign = 1 if role == "positive" else -1
        expected = torch.tensor([softplus(sign * x) + math.log(2) for x in exact], dtype=torch.float64)
        torch.testing.assert_close(loss.nats.double(), expected, **tolerance)
        loss.nats.sum().backward()
        slope = torch.tensor([sign * sigmoid(sign * x) for x in exact], dtype=torch.float64)
        # Below 1e-37 (1e-7 in float16) a gradient is denormal in its dtype, or 0.
        smallest = 1e-7 if dtype == torch.float16 else 1e-37
        torch.testing.assert_close(moving.grad.double(), slope, rtol=rtol, atol=smallest)
        assert moving.grad.dtype == dtype


def test_small_losses_keep_their_digits():
    """E+ = -50, E- = 50 is a loss of 2 exp(-50) with gradients of that size: no log of 1, no epsilon, no threshold."""
    plus, minus = torch.tensor([-50.0], requires_grad=True), torch.tensor([[50.0]], requires_grad=True)
    loss = nce_loss(plus, minus)
    loss.nats.sum().backward()
    assert float(loss.nats.detach()) == pytest.approx(2 * math.exp(-50), rel=1e-6)
    assert float(plus.grad) == pytest.approx(math.exp(-50), rel=1e-6)
    assert float(minus.grad) == pytest.approx(-math.exp(-50), rel=1e-6)


def test_gradcheck():
    torch.manual_seed(0)
    given = (
        (3 * torch.randn(4, dtype=torch.float64)).requires_grad_(),
        (3 * torch.randn(4, 3, dtype=torch.float64)).requires_grad_(),
    )
    assert torch.autograd.gradcheck(lambda p, n: nce_loss(p, n).nats, given)


def test_negatives_are_averaged():
    """Two negatives written out; a row is its own; impossible candidates (E = inf) are told apart at no cost."""
    loss = nce_loss(torch.tensor([1.0, -2.0]), torch.tensor([[3.0, -1.0], [0.5, math.inf]]))
    expected = [softplus(1) + (softplus(-3) + softplus(1)) / 2, softplus(-2) + softplus(-0.5) / 2]
    torch.testing.assert_close(loss.nats, torch.tensor(expected))


def test_accuracy_and_gap():
    """Half for the positives, half for the negatives; ties are half right; no gradient."""
    plus = torch.tensor([-1.0, -2.0, 0.0, 3.0], requires_grad=True)
    minus = torch.tensor([[1.0, 2.0, -1.0], [0.0, 1.0, 1.0], [5.0, 5.0, 5.0], [-1.0, -1.0, -1.0]])
    loss = nce_loss(plus, minus)
    assert loss.accuracy.tolist() == pytest.approx([(1 + 2 / 3) / 2, (1 + 2.5 / 3) / 2, (0.5 + 1) / 2, 0.0])
    torch.testing.assert_close(loss.energy_gap, torch.tensor([2 / 3 + 1, 2 / 3 + 2, 5.0, -1 - 3]))
    assert loss.nats.requires_grad and not loss.accuracy.requires_grad and not loss.energy_gap.requires_grad
    for n in (1, 7):
        zero = nce_loss(torch.zeros(5), torch.zeros(5, n))
        assert zero.accuracy.tolist() == [0.5] * 5 and zero.energy_gap.tolist() == [0.0] * 5
        torch.testing.assert_close(zero.nats, torch.full((5,), 2 * math.log(2)))
        guess = nce_loss(torch.ones(5), torch.ones(5, n))  # "all of it is drawn by the proposal"
        assert guess.accuracy.tolist() == [0.5] * 5
    right, wrong = nce_loss(-torch.ones(2), torch.ones(2, 3)), nce_loss(torch.ones(2), -torch.ones(2, 3))
    assert (right.accuracy.tolist(), wrong.accuracy.tolist()) == ([1.0, 1.0], [0.0, 0.0])
    assert (right.energy_gap.tolist(), wrong.energy_gap.tolist()) == ([2.0, 2.0], [-2.0, -2.0])


@pytest.mark.parametrize("shapes", [((4, 1), (4, 1)), ((4,), (4,)), ((4,), (3, 2)), ((4,), (4, 0)), ((), (1, 1)), ((1,), (4, 2))])
def test_bad_energies(shapes):
    with pytest.raises(ValueError, match=r"positive, negatives: expected energies \[B\] and \[B, n\] with n >= 1, got "):
        nce_loss(*(torch.zeros(shape) for shape in shapes))
    with pytest.raises(ValueError, match=r"negatives: expected floating energies, got torch.int64"):
        nce_loss(torch.zeros(2), torch.zeros(2, 1, dtype=torch.int64))


# --- positives and negatives ------------------------------------------------------------------------------------------------------


def test_what_a_batch_holds(universe, proposal, diffusion):
    """The positive first; xt carried over by all; never a mask; log mu of every token where xt is masked, and 0 elsewhere."""
    x0 = draw(universe, 500)
    times = torch.linspace(0, 1, 500, dtype=torch.float64)
    batch = nce_batch(proposal, x0, diffusion, num_negatives=4, seed=3, offset=7, times=times)
    candidates, xt, t, log_p = batch
    assert candidates.shape == log_p.shape == (500, 5, 3) and candidates.dtype == torch.int64
    assert (t.dtype, log_p.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(t, times.float())
    assert torch.equal(candidates[:, 0], x0)
    assert torch.equal(xt, diffusion.q_sample(x0, times, seed=3, offset=7))
    # The negatives are the decode loop's candidates of that xt, seed and step.
    same = sample_candidates(proposal(xt, t), xt, universe.mask, 4, seed=3, offset=7)
    assert torch.equal(candidates[:, 1:], same.tokens) and torch.equal(log_p[:, 1:], same.log_probs)
    masked = (xt == universe.mask)[:, None].expand_as(candidates)
    assert (candidates != universe.mask).all() and (candidates < universe.mask).all()
    assert torch.equal(candidates[~masked], xt[:, None].expand_as(candidates)[~masked])
    marginals = torch.stack([universe.marginals(state) for state in universe.states()])[universe.state_index(xt)]
    expected = marginals[:, None].expand(-1, 5, -1, -1).gather(-1, candidates[..., None])[..., 0].log()
    torch.testing.assert_close(log_p.double(), torch.where(masked, expected, 0.0), rtol=1e-5, atol=1e-5)
    assert (log_p[~masked] == 0).all() and (log_p[masked] < 0).all()
    clean = ~masked.any(-1)[:, 0]
    assert clean.any() and (candidates[clean] == x0[clean][:, None]).all()


@pytest.mark.parametrize("time", [1.0, 0.6])
def test_negatives_follow_mu(universe, proposal, diffusion, time):
    """Given xt, every negative is a draw from mu(. | xt): G-test of each negative in every state with masks that came up often.

    At 0.6 a position is masked iff its uniform is below 0.6: a draw of the token that shared that uniform would be far from mu.
    """
    x0 = draw(universe, 30_000, 1)
    batch = nce_batch(proposal, x0, diffusion, num_negatives=2, seed=11, offset=5, times=time)
    states, tested = universe.state_index(batch.xt), 0
    for number, state in enumerate(universe.states()):
        here = states == number
        if universe.mask not in state or here.sum() < 300:
            continue
        tested += 1
        for k in (1, 2):
            drawn = universe.index(batch.candidates[here, k])
            assert g_test(torch.bincount(drawn, minlength=27).double(), universe.product(state)) > 1e-6
    assert tested == 1 if time == 1 else tested > 20


def test_negatives_are_independent(universe, proposal, diffusion):
    """Of the positive, of each other, and of which positions are masked at another time of the same seed and step."""
    n = 60_000
    x0 = draw(universe, n, 2)
    batch = nce_batch(proposal, x0, diffusion, num_negatives=2, seed=0, times=1.0)
    mu = universe.product((universe.mask,) * 3)
    first, second = (universe.index(batch.candidates[:, k]) for k in (1, 2))
    data = universe.index(x0)
    for a, law_a, b, law_b in ((data, universe.q, first, mu), (first, mu, second, mu)):
        counts = torch.bincount(27 * a + b, minlength=27 * 27).double()
        assert g_test(counts, torch.outer(law_a, law_b).flatten()) > 1e-6
    # The corruption's own uniforms, by the mask that they would give at t = 1/2.
    half = diffusion.q_sample(x0, 0.5, seed=0) == universe.mask
    pattern = (half * torch.tensor([4, 2, 1])).sum(1)
    counts = torch.bincount(27 * pattern + first, minlength=8 * 27).double()
    assert g_test(counts, torch.outer(torch.full((8,), 1 / 8, dtype=torch.float64), mu).flatten()) > 1e-6


def test_a_row_depends_on_its_seed_and_time_alone(universe, proposal, diffusion):
    """Slices of a batch with sliced seeds and times, bitwise; more negatives keep the first ones; an int seed is s + b."""
    x0, seeds, times = draw(universe, 24), torch.randint(-(2**62), 2**62, (24,)), torch.rand(24, dtype=torch.float64)
    whole = nce_batch(proposal, x0, diffusion, num_negatives=3, seed=seeds, offset=9, times=times)
    for first, last in ((0, 1), (5, 12), (12, 24)):
        part = nce_batch(
            proposal, x0[first:last], diffusion, num_negatives=3, seed=seeds[first:last], offset=9, times=times[first:last]
        )
        for a, b in zip(whole, part, strict=True):
            assert torch.equal(a[first:last], b)
    fewer = nce_batch(proposal, x0, diffusion, num_negatives=1, seed=seeds, offset=9, times=times)
    assert torch.equal(fewer.candidates, whole.candidates[:, :2]) and torch.equal(fewer.log_p, whole.log_p[:, :2])
    by_rows = nce_batch(
        proposal, x0, diffusion, num_negatives=3, seed=seeds, offset=torch.full((24,), 9, dtype=torch.int64), times=times
    )
    one = nce_batch(proposal, x0, diffusion, num_negatives=3, seed=seeds, offset=torch.tensor([9]), times=times)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(whole, by_rows, one, strict=True))
    later = nce_batch(proposal, x0, diffusion, num_negatives=3, seed=seeds, offset=10, times=times)
    assert not torch.equal(later.xt, whole.xt) and not torch.equal(later.candidates[:, 1:], whole.candidates[:, 1:])
    ints = nce_batch(proposal, x0, diffusion, seed=40, times=0.8)
    same = nce_batch(proposal, x0, diffusion, seed=torch.arange(40, 64), times=0.8)
    assert all(torch.equal(a, b) for a, b in zip(ints, same, strict=True))


def test_times_are_stratified_where_none_are_given(universe, proposal, diffusion):
    x0 = draw(universe, 10)
    batch = nce_batch(proposal, x0, diffusion, seed=4, offset=2, t_min=0.1)
    expected = diffusion.training_times(10, seed=4, offset=2, t_min=0.1)
    assert torch.equal(batch.t, expected.float())
    assert torch.equal(batch.xt, diffusion.q_sample(x0, expected, seed=4, offset=2))


def test_the_head_runs_on_masked_rows_alone(universe, proposal, diffusion, monkeypatch):
    """The same draws, from a denoiser in two halves; in chunks of any size; and where nothing is masked."""
    x0, given = draw(universe, 50), {"num_negatives": 3, "seed": 1, "offset": 2}
    whole = nce_batch(proposal, x0, diffusion, **given, times=0.5)
    masked = int((whole.xt == universe.mask).sum())
    for chunk in (masked, 7, 1):
        monkeypatch.setattr("edlm.diffusion.completions._HEAD_BYTES", (4 * 4 + 16 * 3) * chunk)
        halves = TwoHalves(proposal)
        torch.manual_seed(0)
        state = torch.get_rng_state()
        parts = nce_batch(halves, x0, diffusion, **given, times=0.5)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
        assert sum(halves.rows) == masked and max(halves.rows) <= chunk
    for denoiser in (proposal, TwoHalves(proposal)):
        still = nce_batch(denoiser, x0, diffusion, **given, times=0.0)
        assert (still.candidates == x0[:, None]).all() and not still.log_p.any()
        none = nce_batch(denoiser, x0[:0], diffusion, **given, times=0.5)
        assert none.candidates.shape == (0, 4, 3)


def tiny():
    torch.manual_seed(0)
    dit = DiT(DiTConfig(vocab_size=4, mask_token_id=3, dim=16, num_layers=1, num_heads=2, cond_dim=8, dropout=0.5))
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return dit


def test_a_step_of_training(universe, diffusion):
    """A real proposal and the energy made from it: the proposal keeps no gradient, the loss starts at 2 ln 2 and falls."""
    dit = tiny().eval()
    model = NCEEnergy.from_denoiser(dit, dropout=0.0).train()
    optimiser, losses = torch.optim.Adam(model.parameters(), lr=3e-3), []
    for step in range(40):
        batch = nce_batch(dit, draw(universe, 128, step), diffusion, num_negatives=2, seed=128 * step, offset=step, t_min=0.5)
        assert not batch.log_p.requires_grad
        energy = model(*batch)
        loss = nce_loss(energy[:, 0], energy[:, 1:])
        optimiser.zero_grad()
        loss.nats.mean().backward()
        optimiser.step()
        losses.append(float(loss.nats.detach().mean()))
    assert losses[0] == pytest.approx(2 * math.log(2), rel=1e-6)
    assert sum(losses[-10:]) / 10 < losses[0] - 0.05
    assert all(parameter.grad is None for parameter in dit.parameters())


# --- refusals ---------------------------------------------------------------------------------------------------------------------


def test_a_proposal_in_train_mode_is_refused(universe, diffusion):
    """Of the whole, of a part, and of something that is no module."""
    dit, x0 = tiny(), draw(universe, 4)
    nce_batch(dit.eval(), x0, diffusion, seed=0)
    for part in (dit, dit.transformer.blocks[0]):
        part.train()
        with pytest.raises(ValueError, match=r"proposal: expected a network in eval mode, got one in train mode; call eval\(\)"):
            nce_batch(dit, x0, diffusion, seed=0)
        dit.eval()
    wrapper = TabularDenoiser(universe)
    wrapper.training = True
    with pytest.raises(ValueError, match="eval mode"):
        nce_batch(wrapper, x0, diffusion, seed=0)


def test_bad_batches(universe, proposal, diffusion):
    x0 = draw(universe, 4)
    for change, message in (
        ({"x0": x0.float()}, "x0: expected int64 tokens"),
        ({"x0": x0[0]}, "x0: expected int64 tokens"),
        ({"x0": torch.full((4, 3), 3)}, r"x0: expected data, got the mask \(3\) in it"),
        ({"diffusion": MaskedDiffusion(LogLinearSchedule(), 2)}, "diffusion: expected the denoiser's mask_token_id 3, got 2"),
        ({"num_negatives": 0}, "num_negatives: expected an int >= 1, got 0"),
        ({"num_negatives": True}, "num_negatives: expected an int >= 1, got True"),
        ({"times": 1.5}, r"times: expected times in \[0, 1\]"),
        ({"times": torch.ones(3)}, r"times: expected a number or a floating tensor \[4\]"),
        ({"seed": torch.zeros(3, dtype=torch.int64)}, r"seed: expected an int or an int64 tensor of shape \[4\]"),
        ({"offset": torch.zeros(3, dtype=torch.int64)}, "nce_batch: offset: expected"),
        ({"t_min": 1.0}, "t_min: expected"),
    ):
        given = {"proposal": proposal, "x0": x0, "diffusion": diffusion, "seed": 0} | change
        with pytest.raises(ValueError, match=message):
            nce_batch(**given)

    class Flat(TabularDenoiser):
        def __call__(self, xt, t):
            return super().__call__(xt, t).flatten(0, 1)

    with pytest.raises(ValueError, match=r"proposal: expected \[B, L, ...\] = \[4, 3, ...\], got \[12, 4\]"):
        nce_batch(Flat(universe), x0, diffusion, seed=0)
