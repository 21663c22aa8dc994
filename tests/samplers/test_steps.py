"""Plans: what opens when, at which t and offset, how many calls that takes; and the laws of the orders that no token enters."""

from __future__ import annotations

import math

import pytest
import torch
from edlm.diffusion import LogLinearSchedule, MaskedDiffusion
from edlm.samplers import generate
from edlm.samplers.steps import Ancestral, FirstHitting, LeftToRight, Plan, Remasking
from exact import g_test, generate_law, law_of_states, pick_law, residual_energy, transition

N = 40_000


def plan(clock, masked, seeds=None, window=(0.0, 1.0), lengths=None, **options):
    batch, size = masked.shape
    seeds = torch.arange(batch) if seeds is None else seeds
    open_time = MaskedDiffusion(LogLinearSchedule(eps=0.0), 9).opening_times(seeds, batch, size)
    lengths = torch.full((batch,), size) if lengths is None else lengths
    return Plan(clock, window, open_time, masked, seeds, lengths, **options), open_time


CLOCKS = [Ancestral(7), Ancestral(1000), FirstHitting(), LeftToRight(), Remasking(9, 0.3, LogLinearSchedule(eps=0.0))]


@pytest.mark.parametrize("clock", CLOCKS, ids=str)
@pytest.mark.parametrize("options", [{}, {"block_length": 5}, {"block_length": 4, "context": 6}], ids=str)
def test_a_plan_opens_everything_and_says_what_is_masked(clock, options):
    generator = torch.Generator().manual_seed(0)
    wanted = torch.rand(6, 13, generator=generator) < 0.7
    wanted[4] = False
    lengths = torch.tensor([13, 13, 9, 5, 13, 9])
    wanted &= torch.arange(13) < lengths[:, None]
    steps, _ = plan(clock, wanted, lengths=lengths, **options)
    masked, count, offsets = wanted.clone(), 0, set()
    for step in steps:
        low, high = step.columns
        seen = masked[step.rows][:, low:high]
        if step.remask is not None:
            assert not (step.remask & ~wanted[step.rows][:, low:high]).any()  # a prompt stays
            seen = seen | step.remask
            masked[step.rows, low:high] = seen
        assert torch.equal(step.masked, seen)
        assert step.opening.any(1).all() and not (step.opening & ~seen).any()
        assert ((step.t > 0) & (step.t <= 1)).all() and high - low <= options.get("context", 13)
        masked[step.rows, low:high] = seen & ~step.opening
        fresh = {(int(row), int(offset)) for row, offset in zip(step.rows, step.offset, strict=True)}
        assert len(fresh) == len(step.rows) and not fresh & offsets  # no counter is used twice
        offsets |= fresh
        count += 1
    assert not masked.any()
    assert count <= steps.most()


@pytest.mark.parametrize("steps", [1, 3, 10, 49, 1024])
def test_the_grid_is_the_one_that_is_written(steps):
    """Each position opens in the first step whose end s = (T - i - 1) / T is not above its opening time, whatever the rounding."""
    masked = torch.ones(40, 32, dtype=torch.bool)
    made, open_time = plan(Ancestral(steps), masked)
    ends = torch.tensor([(steps - i - 1) / steps for i in range(steps)], dtype=torch.float64)
    expected = (open_time[..., None] >= ends).long().argmax(-1)
    seen = torch.full_like(expected, -1)
    for step in made:
        at = step.offset[:, None].expand_as(step.opening)
        seen[step.rows] = torch.where(step.opening, at, seen[step.rows])
        assert torch.equal(step.t, (steps - step.offset).double() / steps)
    assert torch.equal(seen, expected)


@pytest.mark.parametrize(("steps", "batch"), [(1024, 1), (1024, 8), (16, 64)])
def test_number_of_calls(steps, batch):
    """Each sequence keeps its own clock: a batch costs what its busiest sequence does, at most min(T, L)."""

    class Uniform:
        mask_token_id, vocab_size, calls = 5, 6, 0

        def __call__(self, xt, t):
            self.calls += 1
            return torch.zeros(*xt.shape, 6)

    denoiser = Uniform()
    out = generate(denoiser, batch_size=batch, length=128, steps=steps)
    alone = max(generate(denoiser, batch_size=1, length=128, steps=steps, seed=b).nfe for b in range(batch))
    assert out.nfe == alone <= min(steps, 128)
    denoiser.calls = 0
    assert generate(denoiser, batch_size=batch, length=128, steps=steps).nfe == denoiser.calls
    # The same tokens as on a common clock, which is that of one sequence at a time.
    one = generate(denoiser, batch_size=1, length=128, steps=steps, seed=batch - 1)
    assert torch.equal(out.tokens[-1], one.tokens[0])


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"sampler": "first_hitting"}, 8), ({"sampler": "left_to_right"}, 8), ({"sampler": "remasking", "steps": 20}, 20),
        ({"steps": 3, "block_length": 2}, 8), ({"steps": 1, "lengths": torch.tensor([8, 5, 8, 2]), "pad_token_id": 0}, 3),
        ({"sampler": "remasking", "steps": 5, "remask_prob": 1.0, "block_length": 4}, 10),
    ],
    ids=str,
)  # fmt: skip
def test_number_of_calls_of_the_others(options, most):
    class Uniform:
        mask_token_id, vocab_size = 5, 6

        def __call__(self, xt, t):
            return torch.zeros(*xt.shape, 6)

    for seed in range(20):
        assert 1 <= generate(Uniform(), batch_size=4, length=8, seed=seed, **options).nfe <= most


def remasking_schedule(steps, prob):
    """(t, probability to open, probability to be masked again), from the paper's posterior with alpha = 1 - t."""
    for i in range(steps):
        t, s = (steps - i) / steps, (steps - i - 1) / steps
        sigma = 0.0 if s == 0 else prob if t == 1 else min(prob, s / (1 - t))
        yield t, 1.0 if s == 0 else ((1 - s) - (1 - sigma) * (1 - t)) / t, sigma


@pytest.mark.parametrize(("steps", "prob", "k"), [(3, 1.0, 1), (4, 0.3, 1), (3, 0.4, 2)])
def test_law_of_remasking(universe, denoiser, energy, steps, prob, k):
    """ReMDM by enumeration over states, with a prompt that must stay, and with an energy."""

    def completion(xt):
        mu = universe.product(xt)
        return mu if k == 1 else pick_law(mu, residual_energy(universe)(xt), k)

    m = universe.mask
    prompts = [(m, m, m), (m, 1, m)]
    prompt = torch.tensor(prompts).repeat(N // 2, 1)
    out = generate(
        denoiser, prompt=prompt, steps=steps, sampler="remasking", remask_prob=prob, energy=energy if k > 1 else None,
        num_candidates=k, window=(0, 1), seed=41,
    )  # fmt: skip
    for row, start in enumerate(prompts):
        fixed = tuple(i for i in range(3) if start[i] != m)
        states = {start: 1.0}
        for _, opens, sigma in remasking_schedule(steps, prob):
            states = transition(universe, states, completion, opens, remask=sigma, fixed=fixed)
        law = law_of_states(universe, states)
        seen = torch.bincount(universe.index(out.tokens[row::2]), minlength=27).double()
        assert g_test(seen, law) > 1e-6
    given = prompt != m
    assert torch.equal(out.tokens[given], prompt[given])
    # It does something: without remasking the law of the last start is another.
    plain = {prompts[-1]: 1.0}
    for i in range(steps):
        plain = transition(universe, plain, completion, 1 / (steps - i))
    assert float((law_of_states(universe, plain) - law).abs().sum()) > 1e-3


def test_remasking_of_nothing_is_ancestral_in_law(universe, denoiser):
    out = generate(denoiser, batch_size=N, length=3, steps=3, sampler="remasking", remask_prob=0.0, seed=43)
    law = generate_law(universe, lambda xt, t: universe.product(xt), [1.0, 2 / 3, 1 / 3, 0.0])
    assert g_test(torch.bincount(universe.index(out.tokens), minlength=27).double(), law) > 1e-6


def test_as_many_are_masked_as_without_remasking():
    """The number masked at the start of each step is binomial(L, t), as in the forward process. G-tests, 1e-6 each."""
    steps, size = 6, 5
    made, _ = plan(Remasking(steps, 1.0, LogLinearSchedule(eps=0.0)), torch.ones(N, size, dtype=torch.bool))
    again = 0
    masked = torch.ones(N, size, dtype=torch.bool)
    seen = {}
    for step in made:
        again += int(step.remask.sum())
        seen[round(float(step.t[0]) * steps)] = (step.rows, step.masked.sum(1))
        masked[step.rows] = step.masked & ~step.opening
    assert again > N and not masked.any()
    for level, (rows, number) in seen.items():
        t = level / steps
        # A sequence in which nothing opens is left out of the step: those have to be added, with what the law says of them.
        opens, _ = next((o, s) for at, o, s in remasking_schedule(steps, 1.0) if round(at * steps) == level)
        law = torch.tensor([math.comb(size, n) * t**n * (1 - t) ** (size - n) for n in range(size + 1)], dtype=torch.float64)
        live = law * torch.tensor([1 - (1 - opens) ** n for n in range(size + 1)], dtype=torch.float64)
        counted = torch.bincount(number, minlength=size + 1).double()
        counted = torch.cat([counted, torch.tensor([float(N - len(rows))])])
        assert g_test(counted, torch.cat([live, 1 - live.sum()[None]])) > 1e-6


@pytest.mark.parametrize("options", [{"block_length": 2}, {"block_length": 2, "context": 3}], ids=str)
def test_times_run_down_in_each_block_from_left_to_right(options):
    steps, _ = plan(LeftToRight(), torch.ones(2, 6, dtype=torch.bool), window=(0.6, 1.0), **options)
    made = list(steps)
    assert [float(step.t[0]) for step in made] == [1.0, 0.5] * 3
    assert [bool(step.in_window[0]) for step in made] == [True, False] * 3
    assert [step.ends_block for step in made] == [False, True] * 3


def test_law_from_left_to_right(universe, denoiser, energy):
    """Any denoiser, with an energy: position after position, each from the completed law."""

    def completion(xt):
        return pick_law(universe.product(xt), residual_energy(universe)(xt), 2)

    states = {(universe.mask,) * 3: 1.0}
    for i in range(3):
        states = transition(universe, states, completion, 1.0, among=(i,))
    out = generate(
        denoiser, batch_size=N, length=3, sampler="left_to_right", energy=energy, num_candidates=2, window=(0, 1), seed=42
    )
    assert out.nfe == 3
    assert g_test(torch.bincount(universe.index(out.tokens), minlength=27).double(), law_of_states(universe, states)) > 1e-6
