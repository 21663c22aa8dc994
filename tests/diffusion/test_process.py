"""The masking process: frequencies, independence of rows, the posterior against Bayes, opening and training times.

Statistical tests fix their seeds; each G-test would fail a correct program with probability 1e-4, each z-test with 7e-6.
"""

from __future__ import annotations

import math

import pytest
import torch
from edlm.diffusion import CosineSchedule, LogLinearSchedule, MaskedDiffusion, NoiseSchedule
from exact import g_test

MASK = 9
SCHEDULES = [LogLinearSchedule(eps=0.0), LogLinearSchedule(eps=0.1), CosineSchedule(eps=0.0)]
each = pytest.mark.parametrize("noise", SCHEDULES, ids=repr)


def binomial(n: int, p: float) -> torch.Tensor:
    return torch.tensor([math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)], dtype=torch.float64)


def rows(batch: int, length: int) -> torch.Tensor:
    return (torch.arange(batch)[:, None] * 3 + torch.arange(length)) % MASK


@each
def test_q_sample_masks_a_binomial_number(noise: NoiseSchedule) -> None:
    diffusion, length = MaskedDiffusion(noise, MASK), 7
    x0 = rows(6000, length)
    t = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64).repeat(2000)  # neighbouring rows at different times
    xt = diffusion.q_sample(x0, t, seed=3)
    masked = xt == MASK
    assert torch.equal(xt[~masked], x0[~masked])
    for i in range(3):
        p = float(noise.mask_prob(t[i]))
        counts = torch.bincount(masked[i::3].sum(1), minlength=length + 1).double()
        assert g_test(counts, binomial(length, p)) > 1e-4
        z = (masked[i::3].double().mean(0) - p) / math.sqrt(p * (1 - p) / 2000)  # every position, not only their number
        assert z.abs().max() < 4.5


def test_q_sample_ends() -> None:
    x0 = rows(50, 40)
    diffusion = MaskedDiffusion(LogLinearSchedule(eps=0.0), MASK)
    assert torch.equal(diffusion.q_sample(x0, 0.0, seed=0), x0)
    assert (diffusion.q_sample(x0, 1.0, seed=0) == MASK).all()
    assert diffusion.q_sample(x0[:0], 0.5, seed=0).shape == (0, 40)
    leaky = MaskedDiffusion(LogLinearSchedule(eps=0.5), MASK).q_sample(x0, 1.0, seed=0)
    assert abs(float((leaky == MASK).double().mean()) - 0.5) < 4.5 * 0.5 / math.sqrt(2000)


def test_q_sample_rows_stand_alone() -> None:
    diffusion = MaskedDiffusion(CosineSchedule(), MASK)
    x0, t = rows(8, 30), torch.linspace(0.2, 0.9, 8)
    whole = diffusion.q_sample(x0, t, seed=11, offset=5)
    for b in range(8):
        assert torch.equal(diffusion.q_sample(x0[b : b + 1], t[b : b + 1], seed=11 + b, offset=5)[0], whole[b])
    order = torch.tensor([3, 0, 7, 1, 2, 6, 5, 4])
    assert torch.equal(diffusion.q_sample(x0[order], t[order], seed=11 + order, offset=torch.full((8,), 5)), whole[order])
    assert torch.equal(diffusion.q_sample(x0[:, :20], t, seed=11, offset=5), whole[:, :20])
    torch.manual_seed(1)
    assert torch.equal(diffusion.q_sample(x0, t, seed=11, offset=5), whole)
    same_t = diffusion.q_sample(x0, 0.5, seed=11) == MASK
    assert len(same_t.unique(dim=0)) == 8, "rows share their noise"
    assert not torch.equal(diffusion.q_sample(x0, 0.5, seed=11, offset=1) == MASK, same_t)


def test_q_sample_is_one_path() -> None:
    diffusion = MaskedDiffusion(LogLinearSchedule(), MASK)
    early, late = (diffusion.q_sample(rows(20, 30), t, seed=2) == MASK for t in (0.3, 0.6))
    assert (late | ~early).all()
    assert (late & ~early).any()


@each
def test_q_posterior_against_bayes(noise: NoiseSchedule) -> None:
    """Every x0, xt and xs of one position: q(xs | xt, x0) = q(xt | xs) q(xs | x0) / q(xt | x0), from transition matrices."""
    vocab, mask, t, s = 4, 3, 0.7, 0.4
    diffusion = MaskedDiffusion(noise, mask)

    def kernel(keep: float) -> torch.Tensor:  # rows: from; columns: to
        matrix = keep * torch.eye(vocab, dtype=torch.float64)
        matrix[:, mask] += 1 - keep
        matrix[mask] = torch.eye(vocab)[mask]
        return matrix

    from_0_to_s, from_0_to_t = kernel(float(noise.alpha(s))), kernel(float(noise.alpha(t)))
    from_s_to_t = kernel(float(noise.alpha(t) / noise.alpha(s)))
    cases = [(x0, xt) for x0 in range(mask) for xt in range(vocab) if from_0_to_t[x0, xt] > 0]
    x0, xt = (torch.tensor(column)[None] for column in zip(*cases, strict=True))
    got = diffusion.q_posterior(torch.nn.functional.one_hot(x0, vocab).double(), xt, t, s)
    for i, (a, b) in enumerate(cases):
        expected = from_0_to_s[a] * from_s_to_t[:, b] / from_0_to_t[a, b]
        torch.testing.assert_close(got[0, i], expected, rtol=1e-12, atol=1e-15)


def test_q_posterior_rows_and_errors() -> None:
    diffusion = MaskedDiffusion(LogLinearSchedule(eps=0.0), 2)
    probs = torch.tensor([[[0.25, 0.75, 0.0]], [[0.5, 0.5, 0.0]]])
    xt = torch.tensor([[2], [2]])
    got = diffusion.q_posterior(probs, xt, torch.tensor([0.5, 1.0]), torch.tensor([0.25, 0.25]))
    torch.testing.assert_close(got, torch.tensor([[[0.125, 0.375, 0.5]], [[0.375, 0.375, 0.25]]]))
    torch.testing.assert_close(diffusion.q_posterior(probs, xt, 0.5, 0.0), probs)
    with pytest.raises(ValueError, match="x0_probs: expected probabilities"):
        diffusion.q_posterior(probs.log(), xt, 0.5, 0.25)
    with pytest.raises(ValueError, match="mask's column"):
        diffusion.q_posterior(torch.tensor([[[0.2, 0.2, 0.6]]] * 2), xt, 0.5, 0.25)
    with pytest.raises(ValueError, match="s: expected s <= t"):
        diffusion.q_posterior(probs, xt, 0.25, 0.5)
    with pytest.raises(ValueError, match=r"x0_probs: expected \[B, L, V\]"):
        diffusion.q_posterior(probs[:1], xt, 0.5, 0.25)


@each
def test_number_opened_in_a_step_is_binomial(noise: NoiseSchedule) -> None:
    diffusion, steps, length = MaskedDiffusion(noise, MASK), 4, 6
    times = diffusion.opening_times(5, 4000, length)
    assert times.dtype == torch.float64
    assert times.shape == (4000, length)
    assert ((times >= 0) & (times < 1)).all()
    opened_so_far = torch.zeros_like(times, dtype=torch.bool)
    for i in range(steps):
        t, s = 1 - i / steps, 1 - (i + 1) / steps
        opens = (times >= s) & ~opened_so_far
        assert torch.equal(opens, (times >= s) & (times < t)), "the step's own rule disagrees with the history"
        p = float((noise.mask_prob(t) - noise.mask_prob(s)) / noise.mask_prob(1.0))
        counts = torch.bincount(opens.sum(1), minlength=length + 1).double()
        assert g_test(counts, binomial(length, p)) > 1e-4
        z = (opens.double().mean(0) - p) / math.sqrt(p * (1 - p) / 4000)
        assert z.abs().max() < 4.5
        opened_so_far |= opens
    assert opened_so_far.all()


def test_opening_times_stand_alone() -> None:
    diffusion = MaskedDiffusion(CosineSchedule(), MASK)
    whole = diffusion.opening_times(40, 6, 20)
    assert torch.equal(diffusion.opening_times(42, 1, 12)[0], whole[2, :12])
    assert torch.equal(diffusion.opening_times(torch.tensor([45, 40]), 2, 20), whole[[5, 0]])
    assert len(whole.flatten().unique()) == 120
    # Corruption is another stream: under the log-linear schedule both would otherwise be the same numbers.
    linear = MaskedDiffusion(LogLinearSchedule(eps=0.0), MASK)
    masked = linear.q_sample(torch.zeros(6, 20, dtype=torch.int64), 0.5, seed=40) == MASK
    assert not torch.equal(masked, linear.opening_times(40, 6, 20) < 0.5)


def test_training_times_are_stratified() -> None:
    diffusion = MaskedDiffusion(LogLinearSchedule(), MASK)
    for t_min in (0.0, 0.25):
        draws = torch.stack([diffusion.training_times(5, seed=1, offset=i, t_min=t_min) for i in range(400)])
        assert (draws > t_min).all()
        assert (draws <= 1).all()
        strata = ((1 - draws) / (1 - t_min) * 5).floor()
        assert torch.equal(strata, torch.arange(5.0).double().expand(400, 5))
        within = (1 - draws[:, 0]) / (1 - t_min) * 5  # uniform in [0, 1)
        assert g_test(torch.histc(within, 8, 0, 1), torch.full((8,), 1 / 8, dtype=torch.float64)) > 1e-4
    assert not torch.equal(diffusion.training_times(5, seed=1), diffusion.training_times(5, seed=2))


def test_errors() -> None:
    diffusion, x0 = MaskedDiffusion(LogLinearSchedule(), MASK), rows(2, 3)
    with pytest.raises(ValueError, match=r"t: expected times in \[0, 1\]"):
        diffusion.q_sample(x0, torch.tensor([0.5, math.nan]), seed=0)
    with pytest.raises(ValueError, match=r"t: expected a number or a floating tensor \[2\]"):
        diffusion.q_sample(x0, torch.rand(3), seed=0)
    with pytest.raises(ValueError, match="x0: expected int64"):
        diffusion.q_sample(x0[0], 0.5, seed=0)
    with pytest.raises(ValueError, match="seed: expected"):
        diffusion.q_sample(x0, 0.5, seed=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="t_min"):
        diffusion.training_times(4, seed=0, t_min=1.0)
    with pytest.raises(ValueError, match="mask_token_id"):
        MaskedDiffusion(LogLinearSchedule(), -1)
