"""ARResidualEnergy against enumeration: the definition at every state and candidate, Z, sign, chunks, accumulation, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from edlm.models import ARResidualEnergy, CausalLM, CausalLMConfig, ar_residual
from edlm.protocols import EnergyModel
from exact import TabularCausalLM, Universe
from torch.profiler import ProfilerActivity, profile


@pytest.fixture(scope="module")
def universe():
    return Universe()


@pytest.fixture(scope="module")
def p_ar(universe):
    return universe.autoregressive(0.5)


def everything(universe):
    """All states as a batch, all completions of each as its candidates: x0 [64, 27, 3], xt [64, 3], log_p, log mu [64, 27], agrees.

    ``x0`` is the sequence; candidates that contradict xt have probability 0 and are left out of every comparison.
    """
    xt = torch.tensor(universe.states())
    x0 = universe.sequences.expand(len(xt), -1, -1).contiguous()
    masked = xt == universe.mask
    marginals = torch.stack([universe.marginals(state) for state in universe.states()])  # [64, 3, V]
    token = marginals[:, None].expand(-1, 27, -1, -1).gather(-1, x0[..., None])[..., 0]
    log_p = torch.where(masked[:, None], token.log(), 0.0)
    agrees = torch.stack([universe.agrees(state) for state in universe.states()])
    return x0, xt, log_p, agrees


def definition(universe, p_ar, carry_over):
    """[64, 27]: E by its equation, from the enumerated joint alone; prefix probabilities by summation over sequences."""
    out = torch.empty(64, 27, dtype=torch.float64)
    sequences = universe.sequences.tolist()
    for row, state in enumerate(universe.states()):
        mu = universe.product(state)
        for column, sequence in enumerate(sequences):
            log_ar = 0.0
            for i in range(3):
                if carry_over and state[i] != universe.mask:
                    continue
                joint = sum(float(p_ar[n]) for n, other in enumerate(sequences) if other[: i + 1] == sequence[: i + 1])
                prefix = sum(float(p_ar[n]) for n, other in enumerate(sequences) if other[:i] == sequence[:i])
                log_ar += math.log(joint / prefix)
            out[row, column] = -log_ar + (math.log(mu[column]) if mu[column] > 0 else math.nan)
    return out


@pytest.mark.parametrize("carry_over", [False, True])
def test_definition_and_partition(universe, p_ar, carry_over):
    """E at every state and candidate; Z = sum mu exp(-E) is 1 with carry-over, p_AR of the observed tokens without."""
    x0, xt, log_p, agrees = everything(universe)
    model = ARResidualEnergy(TabularCausalLM(universe, p_ar), carry_over, mask_token_id=universe.mask)
    assert isinstance(model, EnergyModel)
    energy = model(x0, xt, torch.rand(64), log_p.float())
    assert energy.shape == (64, 27) and energy.dtype == torch.float32
    expected = definition(universe, p_ar, carry_over)
    torch.testing.assert_close(energy[agrees].double(), expected[agrees], rtol=1e-5, atol=1e-5)

    mu = torch.stack([universe.product(state) for state in universe.states()])
    z = (mu * torch.where(agrees, -energy.double(), -math.inf).exp()).sum(1)
    observed = torch.stack([p_ar[universe.agrees(state)].sum() for state in universe.states()])
    torch.testing.assert_close(z, torch.ones_like(z) if carry_over else observed, rtol=1e-5, atol=1e-6)
    assert observed.min() < 0.05  # the two are told apart


def test_carry_over_ignores_the_right_context_and_the_plain_one_does_not(universe, p_ar):
    """mu exp(-E) normalised is p_AR(x0 | observed) for EDLM-AR; with carry-over only where what is observed is a prefix."""
    x0, xt, log_p, _ = everything(universe)
    mu = torch.stack([universe.product(state) for state in universe.states()])
    for carry_over in (False, True):
        model = ARResidualEnergy(TabularCausalLM(universe, p_ar), carry_over, mask_token_id=universe.mask)
        weight = mu * (-model(x0, xt, torch.rand(64), log_p.float()).double()).exp().nan_to_num(0, 0, 0)
        law = weight / weight.sum(1, keepdim=True)
        for row, state in enumerate(universe.states()):
            gap = (law[row] - universe.posterior(state, p_ar)).abs().max()
            is_prefix = universe.mask not in state[: sum(token != universe.mask for token in state)]
            if not carry_over or is_prefix:
                assert gap < 1e-5
            elif state == (universe.mask, universe.mask, 0):
                assert gap > 1e-2


@pytest.mark.parametrize("carry_over", [False, True])
def test_sign(universe, p_ar, carry_over):
    """Raising p_AR of one candidate lowers its energy; raising mu raises it."""
    raised = p_ar.clone()
    raised[14] += 0.2
    raised /= raised.sum()
    xt = torch.full((1, 3), universe.mask)
    x0, log_p = universe.sequences[None, 14:15], torch.full((1, 1, 3), -1.0)
    before, after = (
        ARResidualEnergy(TabularCausalLM(universe, p), carry_over, mask_token_id=universe.mask)(x0, xt, torch.ones(1), log_p)
        for p in (p_ar, raised)
    )
    assert after < before - 0.1
    likelier = ARResidualEnergy(TabularCausalLM(universe, p_ar), carry_over, mask_token_id=universe.mask)
    torch.testing.assert_close(likelier(x0, xt, torch.ones(1), log_p + 0.25), before + 0.75)


class Recorder:
    """Scores that tell every row and position apart; it remembers how many rows it was asked for."""

    def __init__(self):
        self.asked = []

    def log_probs(self, x0):
        self.asked.append(len(x0))
        return -(x0.double() @ torch.tensor([[1.0, 0, 0], [0, 10, 0], [0, 0, 100]], dtype=torch.float64)).float()


@pytest.mark.parametrize("carry_over", [False, True])
@pytest.mark.parametrize(("max_bytes", "rows"), [(1, 1), (23, 1), (24, 2), (36, 3), (60, 5), (256 << 20, 10)])
def test_chunks(carry_over, max_bytes, rows):
    """B = 2, K = 5 with ten different rows: chunks of any size, also ones that cut through a sequence's candidates."""
    torch.manual_seed(0)
    x0 = torch.arange(30).view(2, 5, 3)
    xt = torch.tensor([[99, 1, 99], [15, 99, 99]])
    log_p = -torch.rand(2, 5, 3)
    causal = Recorder()
    model = ARResidualEnergy(causal, carry_over, mask_token_id=99, max_bytes=max_bytes, bytes_per_token=4)
    energy = model(x0, xt, torch.ones(2), log_p)
    assert causal.asked == [rows] * (10 // rows) + ([10 % rows] if 10 % rows else [])
    weights = torch.tensor([1.0, 10, 100])
    masked = (xt == 99) if carry_over else torch.ones(2, 3, dtype=torch.bool)
    for b in range(2):
        for k in range(5):
            expected = sum(float(x0[b, k, i] * weights[i]) for i in range(3) if masked[b, i]) + float(log_p[b, k].sum())
            assert abs(float(energy[b, k]) - expected) < 1e-3


def test_chunks_of_a_real_network():
    torch.manual_seed(0)
    causal = CausalLM(CausalLMConfig(vocab_size=5, bos_token_id=5, dim=16, num_layers=1, num_heads=2, dropout=0.5))
    for parameter in causal.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x0, xt = torch.randint(0, 5, (3, 4, 6)), torch.full((3, 6), 5)
    log_p = -torch.rand(3, 4, 6)
    whole = ARResidualEnergy(causal, mask_token_id=5)
    assert not causal.training and whole.bytes_per_token == 14 * 4 * 16
    expected = whole(x0, xt, torch.ones(3), log_p)
    torch.testing.assert_close(ARResidualEnergy(causal, mask_token_id=5, max_bytes=1)(x0, xt, torch.ones(3), log_p), expected)
    for b in range(3):
        for k in range(4):
            one = log_p[b, k].sum() - causal.log_probs(x0[b, k][None]).sum()
            torch.testing.assert_close(expected[b, k], one.detach(), rtol=1e-4, atol=1e-4)
    assert not expected.requires_grad
    assert not torch.equal(expected[0], expected[1])


@pytest.mark.parametrize(("dim", "length", "rows"), [(16, 64, 64), (128, 128, 16)])
def test_scoring_takes_the_memory_that_is_estimated(dim, length, rows):
    """The allocator's peak while a chunk that just fills ``max_bytes`` is scored: within the bound, and not far below it."""
    torch.manual_seed(0)
    causal = CausalLM(CausalLMConfig(vocab_size=5, bos_token_id=5, dim=dim, num_layers=2, num_heads=4))
    budget = ARResidualEnergy(causal, mask_token_id=5).bytes_per_token * length * rows
    model = ARResidualEnergy(causal, mask_token_id=5, max_bytes=budget)
    x0, xt = torch.randint(0, 5, (1, 4 * rows, length)), torch.full((1, length), 5)
    given = x0, xt, torch.ones(1), torch.zeros(1, 4 * rows, length)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model(*given)
    now = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    results = 2 * 8 * x0.numel()  # the float64 terms of all candidates and their log mu, which no chunk bounds
    assert 0.6 * budget < peak <= budget + results


class Fixed:
    def __init__(self, scores):
        self.scores = scores

    def log_probs(self, x0):
        return self.scores


def test_impossible_tokens():
    """-inf at an observed position is no part of carry-over; at a masked one the candidate is impossible: +inf, never nan."""
    x0, xt = torch.zeros(2, 2, 3, dtype=torch.int64), torch.tensor([[9, 0, 9], [0, 9, 9]])
    log_p = torch.tensor([-1.0, 0, -2.0]).expand(2, 2, 3)
    scores = torch.full((4, 3), -0.5)
    scores[0, 1] = scores[1, 0] = scores[2, 0] = -math.inf
    carry = ARResidualEnergy(Fixed(scores), True, mask_token_id=9)(x0, xt, torch.ones(2), log_p)
    assert carry.tolist() == [[-2.0, math.inf], [-2.0, -2.0]]
    plain = ARResidualEnergy(Fixed(scores), False, mask_token_id=9)(x0, xt, torch.ones(2), log_p)
    assert plain.tolist() == [[math.inf, math.inf], [math.inf, -1.5]]


def test_sums_are_float64():
    """4096 terms, float32 as they come: the energy is the float64 sum rounded once, where float32 sums differ."""
    torch.manual_seed(0)
    scores, log_p = -30 * torch.rand(64, 4096), -30 * torch.rand(8, 8, 4096)
    x0, xt = torch.zeros(8, 8, 4096, dtype=torch.int64), torch.full((8, 4096), 9)
    exact = (log_p.double().sum(-1) - scores.double().view(8, 8, 4096).sum(-1)).float()
    got = ARResidualEnergy(Fixed(scores), mask_token_id=9, bytes_per_token=1)(x0, xt, torch.ones(8), log_p)
    assert torch.equal(got, exact)
    assert not torch.equal(log_p.sum(-1) - scores.view(8, 8, 4096).sum(-1), exact)


# --- the same energy with gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("carry_over", [False, True])
def test_ar_residual_is_the_energy_and_has_gradients(carry_over):
    """Its value is ARResidualEnergy's; its gradient that of -sum log p_AR over the positions that are scored."""
    torch.manual_seed(0)
    causal = CausalLM(CausalLMConfig(vocab_size=5, bos_token_id=5, dim=16, num_layers=1, num_heads=2, dropout=0.0))
    for parameter in causal.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    xt = torch.randint(0, 5, (3, 6)).masked_fill(torch.rand(3, 6) < 0.6, 5)
    x0 = torch.where((xt == 5)[:, None], torch.randint(0, 5, (3, 4, 6)), xt[:, None])
    log_p = -torch.rand(3, 4, 6)
    energy = ar_residual(causal.train(), x0, xt, log_p, carry_over=carry_over, mask_token_id=5)
    assert energy.shape == (3, 4) and energy.dtype == torch.float32 and causal.training
    whole = ARResidualEnergy(causal, carry_over, mask_token_id=5)(x0, xt, torch.ones(3), log_p)
    torch.testing.assert_close(energy.detach(), whole)

    weight = torch.randn(3, 4)
    (energy * weight).sum().backward()
    got = {name: parameter.grad for name, parameter in causal.named_parameters()}
    causal.zero_grad()
    log_ar = causal(x0.flatten(0, 1)).log_softmax(-1).gather(-1, x0.flatten(0, 1)[..., None]).view(3, 4, 6)
    scored = (xt == 5)[:, None] if carry_over else torch.ones(3, 1, 6, dtype=torch.bool)
    (-(log_ar * scored).sum(-1) * weight).sum().backward()
    for name, parameter in causal.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-4)


def test_ar_residual_refuses_what_the_energy_refuses():
    x0, xt, _, log_p = arguments().values()
    with pytest.raises(ValueError, match=r"x0, xt, log_p: expected .*, got \[6, 4\], \[2, 4\]"):
        ar_residual(Fixed(None), x0.flatten(0, 1), xt, log_p, carry_over=False, mask_token_id=9)
    with pytest.raises(ValueError, match=r"causal_lm: expected log_probs of every token, \[N, L\] = \[6, 4\], got \[6, 3\]"):
        ar_residual(Fixed(torch.zeros(6, 3)), x0, xt, log_p, carry_over=False, mask_token_id=9)
    with pytest.raises(ValueError, match="mask_token_id: expected the denoiser's mask with carry_over"):
        ar_residual(Fixed(torch.zeros(6, 4)), x0, xt, log_p, carry_over=True, mask_token_id=None)


# --- refusals ---------------------------------------------------------------------------------------------------------------------


def arguments():
    return {
        "x0": torch.zeros(2, 3, 4, dtype=torch.int64),
        "xt": torch.zeros(2, 4, dtype=torch.int64),
        "t": torch.ones(2),
        "log_p": torch.zeros(2, 3, 4),
    }


@pytest.mark.parametrize(
    ("name", "shape"),
    [("x0", (6, 4)), ("x0", (3, 2, 4)), ("xt", (2, 3)), ("xt", (2, 3, 4)), ("log_p", (3, 2, 4)), ("log_p", (2, 3))],
)
def test_bad_shapes(name, shape):
    given = arguments()
    given[name] = given[name].new_zeros(shape)
    with pytest.raises(ValueError, match=r"x0, xt, log_p: expected \[B, K, L\], \[B, L\] and \[B, K, L\], got "):
        ARResidualEnergy(Fixed(torch.zeros(6, 4)), mask_token_id=9)(**given)


@pytest.mark.parametrize("shape", [(6, 3), (6,), (6, 4, 1), (5, 4), (4, 6), (1, 4)])
def test_every_token_is_to_be_scored(shape):
    """Also a model that does not score position 0, as those without BOS do, and shapes that would broadcast."""
    with pytest.raises(ValueError, match=r"causal_lm: expected log_probs of every token, \[N, L\] = \[6, 4\], got .*BOS"):
        ARResidualEnergy(Fixed(torch.zeros(shape)), mask_token_id=9)(**arguments())


def test_train_mode_is_refused():
    """Of the whole and of a part: dropout would be part of the energy."""
    torch.manual_seed(0)
    causal = CausalLM(CausalLMConfig(vocab_size=5, bos_token_id=5, dim=16, num_layers=1, num_heads=2)).train()
    model = ARResidualEnergy(causal, mask_token_id=5)
    assert not causal.training
    model(**arguments())
    for switched_on in (causal, causal.transformer.blocks[0]):
        switched_on.train()
        with pytest.raises(ValueError, match=r"causal_lm: expected a model in eval mode, got one in train mode; call eval\(\)"):
            model(**arguments())
        causal.eval()
    wrapper = Fixed(torch.zeros(6, 4))
    wrapper.training = True
    with pytest.raises(ValueError, match="eval mode"):
        ARResidualEnergy(wrapper, mask_token_id=9)(**arguments())


def test_bad_construction():
    with pytest.raises(ValueError, match=r"causal_lm: expected log_probs\(x0 \[N, L\]\)"):
        ARResidualEnergy(torch.nn.Linear(1, 1), mask_token_id=9)
    for name, value in (("max_bytes", 0), ("bytes_per_token", 0), ("bytes_per_token", -4)):
        with pytest.raises(ValueError, match=f"{name}: expected a number >= 1.*, got {value}"):
            ARResidualEnergy(Fixed(None), mask_token_id=9, **{name: value})


def test_the_mask_is_needed_where_masked_positions_alone_are_scored():
    """Without carry-over every position is, and its id changes nothing."""
    scores = -torch.rand(6, 4)
    plain = [ARResidualEnergy(Fixed(scores), mask_token_id=mask)(**arguments()) for mask in (None, 0, 9)]
    assert torch.equal(plain[0], plain[1]) and torch.equal(plain[0], plain[2])
    with pytest.raises(ValueError, match=r"mask_token_id: expected the denoiser's mask with carry_over, .*; got None"):
        ARResidualEnergy(Fixed(scores), True)


def test_nothing_to_score():
    model = ARResidualEnergy(Fixed(torch.zeros(0, 4)), mask_token_id=9)
    out = model(
        torch.zeros(0, 3, 4, dtype=torch.int64), torch.zeros(0, 4, dtype=torch.int64), torch.ones(0), torch.zeros(0, 3, 4)
    )
    assert out.shape == (0, 3)
