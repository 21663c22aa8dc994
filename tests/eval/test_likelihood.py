"""Likelihood estimates against enumeration, their standard errors, units, and that batching and modes leave no trace.

Monte Carlo tests fix their seeds and allow 4.5 standard errors: a correct program fails each with probability 7e-6.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from edlm.diffusion import CosineSchedule, LogLinearSchedule, MaskedDiffusion, NoiseSchedule, discrete_nelbo
from edlm.eval import ar_nll, nelbo
from edlm.eval.likelihood import _scored
from edlm.models import CausalLM, CausalLMConfig, DiT, DiTConfig, NCEEnergy, NCEEnergyConfig
from exact import TabularCausalLM, TabularDenoiser, Universe

UNIVERSE = Universe(num_tokens=3, length=3, seed=0)
LENGTH = UNIVERSE.length


def draws(n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return UNIVERSE.sequences[torch.multinomial(UNIVERSE.q, n, True, generator=generator)]


def per_sequence(estimate) -> tuple[float, float]:
    return estimate.mean * LENGTH, estimate.stderr * LENGTH


@pytest.mark.parametrize("num_times", [1, 4])
@pytest.mark.parametrize("schedule", [None, CosineSchedule(eps=0.0)], ids=repr)
def test_perfect_denoiser_reaches_the_entropy(schedule: NoiseSchedule | None, num_times: int) -> None:
    estimate = nelbo(TabularDenoiser(UNIVERSE), draws(20_000), schedule=schedule, num_times=num_times, batch_size=5000)
    mean, stderr = per_sequence(estimate)
    assert stderr < 0.02
    assert estimate.count == 20_000
    assert abs(mean - UNIVERSE.entropy()) < 4.5 * stderr


def test_denoiser_that_looks_at_t() -> None:
    """The times that the denoiser sees have the right law given the masks, not only on average.

    A denoiser whose -log mu is c(t) at every position has NELBO L * integral of c: here -log mu = 0.2 + t, so 0.7 a token.
    """

    class Clock:
        mask_token_id, vocab_size = 2, 3

        def __call__(self, xt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            p = torch.exp(-(0.2 + t))
            return torch.stack([p.log(), (1 - p).log(), torch.full_like(p, 9.0)], 1)[:, None].expand(-1, xt.shape[1], -1)

    x0 = torch.zeros(4000, 5, dtype=torch.int64)
    estimate = nelbo(Clock(), x0, batch_size=4000)
    assert abs(estimate.mean - 0.7) < 4.5 * estimate.stderr < 0.03
    # Under another schedule t is another function of the mask probability: -log mu = 0.2 + 2/pi asin(p), integrated over p.
    curved = nelbo(Clock(), x0, schedule=CosineSchedule(eps=0.0), batch_size=4000)
    assert abs(curved.mean - (0.2 + 1 - 2 / math.pi)) < 4.5 * curved.stderr < 0.03


def test_denoiser_that_looks_at_t_and_at_the_masks() -> None:
    """Given n of 2 masked, the mask probability is Beta(n, 3 - n): -log mu = 0.2 + (t - n/2)^2 has a NELBO of 0.2 + 1/8 a token.

    E (p - 1/2)^2 under Beta(1, 2) is 1/12, E (p - 1)^2 under Beta(2, 1) is 1/6; n is uniform. Times that are uniform, but not of
    that law given n, fail here.
    """

    class Clock:
        mask_token_id, vocab_size = 2, 3

        def __call__(self, xt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            p = torch.exp(-0.2 - (t - (xt == 2).sum(1) / 2).square())
            return torch.stack([p.log(), (1 - p).log(), torch.full_like(p, 9.0)], 1)[:, None].expand(-1, 2, -1)

    estimate = nelbo(Clock(), torch.zeros(10_000, 2, dtype=torch.int64), batch_size=10_000)
    assert abs(estimate.mean - 0.325) < 4.5 * estimate.stderr < 0.01


def test_eps_leaves_a_part_out() -> None:
    """eps = 0.2: independent uniform tokens, -log mu = log 2 everywhere, so exactly 0.8 log 2 a token instead of log 2."""

    class Coin:
        mask_token_id, vocab_size = 2, 3

        def __call__(self, xt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return torch.zeros(*xt.shape, 3)

    x0 = torch.zeros(4000, 4, dtype=torch.int64)
    estimate = nelbo(Coin(), x0, schedule=LogLinearSchedule(eps=0.2), batch_size=4000)
    assert abs(estimate.mean - 0.8 * math.log(2)) < 4.5 * estimate.stderr < 0.05
    assert nelbo(Coin(), x0).mean == pytest.approx(math.log(2), rel=1e-6)  # no variance is left without eps
    # and for a perfect denoiser of correlated data: below the entropy by more than the noise
    mean, stderr = per_sequence(nelbo(TabularDenoiser(UNIVERSE), draws(20_000), schedule=LogLinearSchedule(eps=0.2)))
    assert mean < UNIVERSE.entropy() - 4.5 * stderr


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("num_times", [1, 3])
def test_steps_agree_with_the_sum_over_all_steps(steps: int, num_times: int) -> None:
    schedule, x0 = CosineSchedule(eps=0.0), draws(20_000)
    estimate = nelbo(TabularDenoiser(UNIVERSE), x0, schedule=schedule, steps=steps, num_times=num_times, seed=5, batch_size=5000)
    mean, stderr = per_sequence(estimate)
    every = discrete_nelbo(
        TabularDenoiser(UNIVERSE), x0, MaskedDiffusion(schedule, UNIVERSE.mask), steps, seed=99, all_steps=True
    )
    both = math.hypot(stderr, float(every.nats.std()) / math.sqrt(20_000))
    assert abs(mean - float(every.nats.mean())) < 4.5 * both
    if steps == 1:  # nothing is random but the data: exact
        marginals = UNIVERSE.marginals((UNIVERSE.mask,) * LENGTH).log()
        exact = -marginals[torch.arange(LENGTH), x0].sum(1).mean()
        assert mean == pytest.approx(float(exact), rel=1e-6)


def test_standard_error_is_honest() -> None:
    """Over 300 repetitions with other seeds and data, (mean - truth) / stderr has variance 1.

    chi2(300) / 300 lies in (0.66, 1.42) but for 4e-6; t with 79 degrees of freedom adds 3 %, inside that margin.
    """
    denoiser, x0 = TabularDenoiser(UNIVERSE), draws(300 * 80)
    scores = []
    for i in range(300):
        mean, stderr = per_sequence(nelbo(denoiser, x0[80 * i : 80 * i + 80], num_times=2, seed=80 * i, batch_size=160))
        scores.append((mean - UNIVERSE.entropy()) / stderr)
    assert 0.66 < float(np.mean(np.square(scores))) < 1.42


def test_stratified_draws_help() -> None:
    x0 = UNIVERSE.sequences[[5]].expand(4000, -1).contiguous()  # one sequence, so all the spread comes from the masks
    one, three = (nelbo(TabularDenoiser(UNIVERSE), x0, num_times=n, batch_size=4000) for n in (1, 3))
    assert three.stderr < 0.9 * one.stderr / math.sqrt(3)


def test_parts_of_the_range_are_drawn_independently() -> None:
    """-log mu = n / L where n are masked, so a draw is linear in its place v: the mean of K draws, one in each K-th of the range, has
    variance 1 / (12 K^3). One uniform for all parts would give 1 / (12 K^2): their errors would add up.

    4000 sequences: the standard deviation is known to 1.1 %; n counts in steps of 1 / 256, which adds less than 1 %.
    """

    class Clock:
        mask_token_id, vocab_size = 2, 3

        def __call__(self, xt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            p = torch.exp(-(xt == 2).float().mean(1))
            return torch.stack([p.log(), (1 - p).log(), torch.zeros_like(p)], 1)[:, None].expand(-1, xt.shape[1], -1)

    estimate = nelbo(Clock(), torch.zeros(4000, 256, dtype=torch.int64), num_times=8, batch_size=8000)
    assert abs(estimate.mean - 257 / 512) < 4.5 * estimate.stderr
    assert float(estimate.values.std()) == pytest.approx(math.sqrt(1 / (12 * 8**3)), rel=0.06)


@pytest.mark.parametrize("steps", [None, 3])
def test_batches_leave_no_trace(steps: int | None) -> None:
    x0 = draws(10)
    denoiser = TabularDenoiser(UNIVERSE)
    whole = nelbo(denoiser, x0, steps=steps, num_times=3, seed=4, batch_size=64)
    assert nelbo(denoiser, x0, steps=steps, num_times=3, seed=4, batch_size=7) == whole
    ones = [nelbo(denoiser, x0[i : i + 1], steps=steps, num_times=3, seed=4 + i).mean for i in range(10)]
    assert np.mean(ones) == pytest.approx(whole.mean, rel=1e-12)
    assert np.unique(ones).size > 5
    assert nelbo(denoiser, x0, steps=steps, num_times=3, seed=5) != whole
    assert nelbo(denoiser, x0, steps=steps, num_times=3, seed=torch.arange(4, 14)) == whole


def test_mode_is_restored_and_dropout_is_off() -> None:
    class Network(torch.nn.Module):
        mask_token_id, vocab_size = UNIVERSE.mask, UNIVERSE.num_tokens + 1

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))
            self.dropout = torch.nn.Dropout(0.5)
            self.frozen = torch.nn.Dropout(0.5).eval()

        def forward(self, xt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            assert not torch.is_grad_enabled()
            return self.frozen(self.dropout(self.weight[xt]))

        def log_probs(self, x0: torch.Tensor) -> torch.Tensor:
            return self(x0, x0)[..., :3].log_softmax(-1).gather(-1, x0[..., None]).squeeze(-1)

    network, x0 = Network(), draws(20)
    assert nelbo(network, x0) == nelbo(network, x0)
    assert ar_nll(network, x0) == ar_nll(network, x0)
    assert network.training
    assert network.dropout.training
    assert not network.frozen.training
    with pytest.raises(ValueError, match="mask"):
        nelbo(network, torch.full((1, 3), UNIVERSE.mask))
    assert network.training
    assert torch.is_grad_enabled()


def test_ar_nll_against_enumeration() -> None:
    p = UNIVERSE.autoregressive(0.5)
    x0 = UNIVERSE.sequences
    estimate = ar_nll(TabularCausalLM(UNIVERSE, p), x0, batch_size=4)
    values = -p.log() / LENGTH  # the chain rule, every token scored
    assert estimate.mean == pytest.approx(float(values.mean()), rel=1e-6)
    assert estimate.stderr == pytest.approx(float(values.std()) / math.sqrt(27), rel=1e-5)
    assert ar_nll(TabularCausalLM(UNIVERSE, p), x0[:2], batch_size=1).mean == pytest.approx(float(values[:2].mean()), rel=1e-6)


@pytest.mark.parametrize("steps", [None, 3])
def test_what_is_given_is_read_and_not_scored(steps: int | None) -> None:
    """-log p(the others | these): the first token, or the last two, given; against the conditional entropy, rows that differ."""
    x0, given = draws(20_000), torch.zeros(20_000, LENGTH, dtype=torch.bool)
    given[::2, 0] = True
    given[1::2, 1:] = True
    estimate = nelbo(TabularDenoiser(UNIVERSE), x0, given=given, steps=steps, num_times=2, batch_size=5000)
    assert len(estimate.values) == 20_000
    last = [float(-(UNIVERSE.q * (UNIVERSE.q.log() - _log_q(c))).sum()) for c in ((0,), (1, 2))]
    first = estimate.values[::2] * 2  # nats of two tokens; of one below
    for values, truth, exact in ((first, last[0], steps is None), (estimate.values[1::2], last[1], True)):
        error = float(values.std()) / 100
        if exact:  # a single token is scored as it is, in however many steps; two of them in continuous time
            assert abs(float(values.mean()) - truth) < 4.5 * error < 0.1
        else:  # in steps they are drawn as if they were independent, now and then
            assert float(values.mean()) > truth + 4.5 * error
    whole = nelbo(TabularDenoiser(UNIVERSE), x0[:50], given=torch.zeros(50, LENGTH, dtype=torch.bool), steps=steps)
    assert whole == nelbo(TabularDenoiser(UNIVERSE), x0[:50], steps=steps)


def test_counts_lie_where_the_data_lie() -> None:
    """Batches are picked out of them by an index on that device, which a tensor on the CPU would refuse."""
    x0 = torch.zeros(4, LENGTH, dtype=torch.int64, device="meta")
    assert _scored(None, x0).device.type == _scored(torch.zeros(4, LENGTH, dtype=torch.bool), x0).device.type == "meta"


def _log_q(columns: tuple[int, ...]) -> torch.Tensor:
    """[S]: log q of the tokens of each sequence at these columns."""
    same = (UNIVERSE.sequences[:, None, list(columns)] == UNIVERSE.sequences[None, :, list(columns)]).all(2)
    return (same.double() @ UNIVERSE.q).log()


def test_ar_nll_of_what_is_not_given() -> None:
    p, x0 = UNIVERSE.autoregressive(0.5), UNIVERSE.sequences
    given = torch.zeros(27, LENGTH, dtype=torch.bool)
    given[:, 0] = True
    given[5] = torch.tensor([True, True, False])
    estimate = ar_nll(TabularCausalLM(UNIVERSE, p), x0, given=given, batch_size=4)
    conditionals = UNIVERSE.conditionals(p)
    expected = -conditionals[:, 1:].sum(1) / 2
    expected[5] = -conditionals[5, 2]
    assert torch.allclose(estimate.values, expected, atol=1e-6)


SIZES = {"dim": 8, "num_layers": 1, "num_heads": 1, "max_length": 3}


def small_dit() -> DiT:
    return DiT(DiTConfig(vocab_size=4, mask_token_id=3, **SIZES))


def small_causal_lm() -> CausalLM:
    return CausalLM(CausalLMConfig(vocab_size=3, bos_token_id=3, **SIZES))


def test_networks_of_another_kind() -> None:
    x0 = draws(2)
    for other in (small_causal_lm(), NCEEnergy(NCEEnergyConfig(vocab_size=4, mask_token_id=3, **SIZES)), None):
        with pytest.raises(ValueError, match=f"denoiser: expected a callable xt, t -> .*, got {type(other).__name__}"):
            nelbo(other, x0)
    for other in (small_dit(), None):
        with pytest.raises(ValueError, match=rf"causal_lm: expected log_probs\(.*, got {type(other).__name__}"):
            ar_nll(other, x0)
    # What only hands it on is one.
    compiled = torch.compile(small_dit(), backend="eager")
    assert nelbo(compiled, x0).count == ar_nll(torch.compile(small_causal_lm(), backend="eager"), x0).count == 2


def test_sequences_that_are_too_long() -> None:
    x0 = torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"x0: expected at most 3 tokens a sequence \(max_length of the denoiser\), got 4; cut"):
        nelbo(small_dit(), x0)
    with pytest.raises(ValueError, match=r"x0: expected at most 3 tokens a sequence \(max_length of the causal_lm\), got 4; cut"):
        ar_nll(small_causal_lm(), x0)
    assert nelbo(small_dit(), x0[:, :3]).count == ar_nll(small_causal_lm(), x0[:, :3]).count == 2


def test_errors() -> None:
    denoiser, x0 = TabularDenoiser(UNIVERSE), draws(2)
    for bad in ({"num_times": 0}, {"steps": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}: expected an int >= 1, got 0"):
            nelbo(denoiser, x0, **bad)
    with pytest.raises(ValueError, match="x0: expected int64"):
        nelbo(denoiser, x0[0])
    with pytest.raises(ValueError, match="x0: expected at least one token"):
        ar_nll(TabularCausalLM(UNIVERSE, UNIVERSE.q), x0[:0])

    class Short:
        def log_probs(self, x0: torch.Tensor) -> torch.Tensor:
            return torch.zeros(x0.shape[0], x0.shape[1] - 1)

    with pytest.raises(ValueError, match="causal_lm: expected log_probs"):
        ar_nll(Short(), x0)

    class Broken:
        def __init__(self, value: float) -> None:
            self.value = value

        def log_probs(self, x0: torch.Tensor) -> torch.Tensor:
            return torch.full(x0.shape, self.value)

    for value, got in ((math.nan, "NaN"), (math.inf, r"\+inf")):
        with pytest.raises(ValueError, match=f"causal_lm: expected log-probabilities, got {got}"):
            ar_nll(Broken(value), x0)
    assert ar_nll(Broken(-math.inf), x0).mean == math.inf  # what a model holds impossible

    class Nothing(TabularDenoiser):
        def __call__(self, xt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return super().__call__(xt, t) * math.nan

    with pytest.raises(ValueError, match="denoiser: expected log-probabilities, got NaN"):
        nelbo(nothing := Nothing(UNIVERSE), x0, batch_size=1)
    assert nothing.calls == 1  # the first batch is enough
    for function in (
        lambda g: nelbo(denoiser, x0, given=g),
        lambda g: ar_nll(TabularCausalLM(UNIVERSE, UNIVERSE.q), x0, given=g),
    ):
        with pytest.raises(ValueError, match=r"given: expected bool \[N, L\] = \[2, 3\]"):
            function(torch.zeros(2, 2, dtype=torch.bool))
        with pytest.raises(ValueError, match="got none in 1 of 2"):
            function(torch.tensor([[True] * 3, [False] * 3]))
