"""The NELBO against enumeration: exact over masks and by quadrature over t, then by Monte Carlo; its gradient; its rows.

Monte Carlo tests fix their seeds and allow 4.5 standard errors: a correct program fails each with probability 7e-6.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from edlm.diffusion import (
    CosineSchedule,
    LogLinearSchedule,
    MaskedDiffusion,
    NoiseSchedule,
    discrete_nelbo,
    masked_nats,
    nelbo_loss,
)
from exact import TabularDenoiser, Universe

UNIVERSE = Universe(num_tokens=3, length=3, seed=0)
ENTROPY = UNIVERSE.entropy()
LINEAR = MaskedDiffusion(LogLinearSchedule(eps=0.0), UNIVERSE.mask)


def draws(n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return UNIVERSE.sequences[torch.multinomial(UNIVERSE.q, n, True, generator=generator)]


def oracle_terms() -> dict[tuple[bool, ...], float]:
    """For every mask pattern M: E_q sum over i in M of -log mu_i(x0_i | x0 outside M), in float64 and without edlm."""
    terms = {}
    for pattern in itertools.product([False, True], repeat=UNIVERSE.length):
        total = 0.0
        for row, probability in zip(UNIVERSE.sequences.tolist(), UNIVERSE.q.tolist(), strict=True):
            xt = tuple(UNIVERSE.mask if hidden else token for hidden, token in zip(pattern, row, strict=True))
            marginals = UNIVERSE.marginals(xt)
            total -= probability * sum(math.log(marginals[i, row[i]]) for i in range(UNIVERSE.length) if pattern[i])
        terms[pattern] = total
    return terms


TERMS = oracle_terms()


def expected_nats(mask_prob: float) -> float:
    """E over the masks of independent positions."""
    return sum(mask_prob ** sum(m) * (1 - mask_prob) ** (len(m) - sum(m)) * value for m, value in TERMS.items())


def exact_discrete(noise: NoiseSchedule, steps: int) -> float:
    grid = [float(noise.mask_prob(1 - i / steps)) for i in range(steps + 1)]
    return sum((a - b) / a * expected_nats(a) for a, b in itertools.pairwise(grid))


def test_masked_nats_equals_the_oracle() -> None:
    denoiser = TabularDenoiser(UNIVERSE)
    for pattern, expected in TERMS.items():
        xt = torch.where(torch.tensor(pattern), UNIVERSE.mask, UNIVERSE.sequences)
        nats = masked_nats(denoiser, UNIVERSE.sequences, xt, torch.ones(len(xt)))
        assert float((UNIVERSE.q * nats).sum()) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("noise", [LogLinearSchedule(eps=0.0), CosineSchedule(eps=0.0)], ids=repr)
def test_perfect_denoiser_reaches_the_entropy(noise: NoiseSchedule) -> None:
    """All masks, and t by 40-point Gauss-Legendre quadrature through loss_weight: no randomness."""
    nodes, weights = np.polynomial.legendre.leggauss(40)
    t = torch.from_numpy((nodes + 1) / 2)
    value = sum(
        w / 2 * float(noise.loss_weight(x)) * expected_nats(float(noise.mask_prob(x)))
        for x, w in zip(t.tolist(), weights.tolist(), strict=True)
    )
    assert value == pytest.approx(ENTROPY, abs=1e-9)


@pytest.mark.parametrize("noise", [LogLinearSchedule(eps=0.0), CosineSchedule(eps=0.0)], ids=repr)
def test_monte_carlo_reaches_the_entropy(noise: NoiseSchedule) -> None:
    loss = nelbo_loss(TabularDenoiser(UNIVERSE), draws(60_000), MaskedDiffusion(noise, UNIVERSE.mask), seed=7)
    stderr = float(loss.nats.std()) / math.sqrt(60_000)
    assert stderr < 0.03
    assert abs(float(loss.nats.mean()) - ENTROPY) < 4.5 * stderr


def test_eps_comes_out_below_the_entropy() -> None:
    """mask_prob stops at 1 - eps: the integral of expected_nats(p) / p lacks its end, near -log mu at full noise times eps."""
    for eps in (1e-3, 0.2):
        nodes, weights = np.polynomial.legendre.leggauss(40)
        p = (nodes + 1) / 2 * (1 - eps)
        value = sum(w * (1 - eps) / 2 * expected_nats(x) / x for x, w in zip(p.tolist(), weights.tolist(), strict=True))
        assert value < ENTROPY
    loss = nelbo_loss(
        TabularDenoiser(UNIVERSE), draws(60_000), MaskedDiffusion(LogLinearSchedule(eps=0.2), UNIVERSE.mask), seed=7
    )
    stderr = float(loss.nats.std()) / math.sqrt(60_000)
    assert abs(float(loss.nats.mean()) - value) < 4.5 * stderr
    assert float(loss.nats.mean()) < ENTROPY - 4.5 * stderr


@pytest.mark.parametrize("noise", [LogLinearSchedule(eps=0.0), CosineSchedule(eps=0.0)], ids=repr)
def test_finite_steps_fall_to_the_entropy(noise: NoiseSchedule) -> None:
    table = [exact_discrete(noise, steps) for steps in (1, 2, 4, 8, 4096)]
    assert all(a > b for a, b in itertools.pairwise(table))
    assert table[-1] > ENTROPY
    assert table[-1] == pytest.approx(ENTROPY, abs=1e-3)
    marginals = UNIVERSE.marginals((UNIVERSE.mask,) * UNIVERSE.length)
    assert table[0] == pytest.approx(float(-(marginals * marginals.log()).sum()))  # one step: independent positions


@pytest.mark.parametrize("all_steps", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("noise", [LogLinearSchedule(eps=0.0), CosineSchedule(eps=0.0)], ids=repr)
def test_finite_steps_by_monte_carlo(noise: NoiseSchedule, steps: int, all_steps: bool) -> None:
    denoiser, n = TabularDenoiser(UNIVERSE), 20_000
    loss = discrete_nelbo(denoiser, draws(n), MaskedDiffusion(noise, UNIVERSE.mask), steps, seed=3, all_steps=all_steps)
    assert denoiser.calls == (steps if all_steps else 1)
    assert abs(float(loss.nats.mean()) - exact_discrete(noise, steps)) < 4.5 * float(loss.nats.std()) / math.sqrt(n)


def test_each_of_all_steps_has_its_own_noise() -> None:
    denoiser, x0 = TabularDenoiser(UNIVERSE), draws(50)
    loss = discrete_nelbo(denoiser, x0, LINEAR, 2, seed=3, offset=5, all_steps=True)
    states = [LINEAR.q_sample(x0, t, seed=3, offset=offset) for t, offset in ((1.0, 10), (0.5, 11))]
    terms = [masked_nats(denoiser, x0, xt, torch.ones(50)) for xt in states]
    torch.testing.assert_close(loss.nats, 0.5 * terms[0] + terms[1])
    assert torch.equal(loss.num_masked, sum((xt == UNIVERSE.mask).sum(1) for xt in states))


class EmbeddingDenoiser(torch.nn.Module):
    """logits = (mean over positions of E[xt]) W + own E[xt] W: every row of the table gets a gradient."""

    mask_token_id, vocab_size = 3, 4

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = torch.nn.Parameter(torch.randn(4, 5, generator=generator))
        self.weight = torch.nn.Parameter(torch.randn(5, 4, generator=generator))

    def features(self, embedding: torch.Tensor, xt: torch.Tensor) -> torch.Tensor:
        e = embedding[xt]
        return torch.tanh(e + e.mean(1, keepdim=True))

    def forward(self, xt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.features(self.embedding, xt) @ self.weight


class SplitDenoiser(EmbeddingDenoiser):
    def hidden(self, xt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.features(self.embedding, xt)

    def head(self, rows: torch.Tensor) -> torch.Tensor:
        self.head_rows = rows.shape[0]
        return rows @ self.weight


def test_gradient_by_finite_differences() -> None:
    model, x0, t = EmbeddingDenoiser(), draws(6), torch.tensor([0.3, 0.5, 0.6, 0.7, 0.9, 1.0])
    loss = nelbo_loss(model, x0, LINEAR, seed=1, times=t)
    loss.nats.sum().backward()
    xt = LINEAR.q_sample(x0, t, seed=1)
    masked = xt == 3

    def value(embedding: torch.Tensor) -> torch.Tensor:
        logits = model.features(embedding, xt) @ model.weight.detach().double()
        log_probs = logits[..., :3].log_softmax(-1).gather(-1, x0[..., None]).squeeze(-1)
        return -((log_probs * masked).sum(1) / t.double()).sum()

    base = model.embedding.detach().double()
    assert float(loss.nats.sum().detach()) == pytest.approx(float(value(base)), rel=1e-5)
    numeric = torch.zeros_like(base)
    for i, j in itertools.product(range(4), range(5)):
        step = torch.zeros_like(base)
        step[i, j] = 1e-5
        numeric[i, j] = (value(base + step) - value(base - step)) / 2e-5
    assert numeric.abs().min() > 1e-4
    torch.testing.assert_close(model.embedding.grad.double(), numeric, rtol=1e-4, atol=1e-4)


def test_head_runs_on_masked_rows_only() -> None:
    x0, t = draws(6), torch.tensor([0.3, 0.5, 0.6, 0.7, 0.9, 1.0])
    split, whole = SplitDenoiser(), EmbeddingDenoiser()
    a, b = (nelbo_loss(model, x0, LINEAR, seed=1, times=t) for model in (split, whole))
    torch.testing.assert_close(a.nats, b.nats)
    assert split.head_rows == int(a.num_masked.sum()) < x0.numel()
    a.nats.sum().backward()
    b.nats.sum().backward()
    torch.testing.assert_close(split.weight.grad, whole.weight.grad)


def test_rows_stand_alone() -> None:
    denoiser, x0 = TabularDenoiser(UNIVERSE), UNIVERSE.sequences[[0, 5, 13, 26, 8]]
    t = torch.tensor([0.9, 0.4, 1.0, 0.7, 0.8])
    whole = nelbo_loss(denoiser, x0, LINEAR, seed=20, offset=4, times=t)
    assert len(whole.nats.unique()) == 5, "rows are not told apart by this test"
    for b in range(5):
        alone = nelbo_loss(denoiser, x0[b : b + 1], LINEAR, seed=20 + b, offset=4, times=t[b : b + 1])
        assert alone.nats[0] == whole.nats[b]
        assert alone.num_masked[0] == whole.num_masked[b]
    torch.testing.assert_close(whole.times, t.double())


def test_nothing_masked_is_zero_and_differentiable() -> None:
    model = SplitDenoiser()
    loss = nelbo_loss(model, draws(4), LINEAR, seed=0, times=1e-12)
    loss.nats.sum().backward()
    assert (loss.nats == 0).all()
    assert (loss.num_masked == 0).all()
    assert (model.weight.grad == 0).all()


def test_times_are_drawn_afresh_each_step() -> None:
    model, x0 = TabularDenoiser(UNIVERSE), draws(8)
    first, again, second = (nelbo_loss(model, x0, LINEAR, seed=0, offset=i, t_min=0.5) for i in (0, 0, 1))
    assert torch.equal(first.times, again.times)
    assert torch.equal(first.nats, again.nats)
    assert not torch.equal(first.times, second.times)
    assert (first.times > 0.5).all()


def test_errors() -> None:
    denoiser, x0 = TabularDenoiser(UNIVERSE), draws(2)
    with pytest.raises(ValueError, match="x0: expected data, got the mask"):
        nelbo_loss(denoiser, torch.full_like(x0, UNIVERSE.mask), LINEAR, seed=0)
    with pytest.raises(ValueError, match=r"times: expected times in \(0, 1\]"):
        nelbo_loss(denoiser, x0, LINEAR, seed=0, times=torch.tensor([0.0, 0.5]))
    with pytest.raises(ValueError, match="diffusion: expected the denoiser's mask_token_id 3, got 7"):
        nelbo_loss(denoiser, x0, MaskedDiffusion(LogLinearSchedule(), 7), seed=0)
    with pytest.raises(ValueError, match="steps: expected an int >= 1, got 0"):
        discrete_nelbo(denoiser, x0, LINEAR, 0, seed=0)
    with pytest.raises(ValueError, match="x0: expected int64"):
        nelbo_loss(denoiser, x0.float(), LINEAR, seed=0)
