"""Sequential Monte Carlo against enumeration: the finite law of what is returned, proper weights, seeds, lineages.

Every G-test has a fixed seed and a false-alarm rate of 1e-6; means are compared at five standard errors (1e-6 a comparison).
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from edlm.samplers import generate
from edlm.samplers.smc import particle_seeds
from exact import TabularEnergy, g_test, generate_law, pick_law, total_variation

N = 40_000


def counts(universe, tokens):
    assert (tokens != universe.mask).all()
    return torch.bincount(universe.index(tokens), minlength=len(universe.q)).double()


def two_step_law(universe, energy, threshold):
    """N = 2, K = 1, two steps on L = 2: every opening pattern, pair of draws, resampling and choice, enumerated."""
    start, law = (universe.mask,) * 2, torch.zeros(len(universe.q), dtype=torch.float64)
    rows = range(len(universe.q))
    for first in itertools.product([True, False], repeat=2):  # whether a position opens in the first step: probability 1/2
        mu, log_w = universe.product(start), -energy(start)
        if not any(first):  # no step is made, and nothing is weighed
            pairs = {((start, start), (0.0, 0.0)): 0.25}
        else:
            pairs = {}
            for draws in itertools.product(rows, repeat=2):
                mass = 0.25 * float(mu[list(draws)].prod())
                weights = torch.softmax(log_w[list(draws)], 0)
                states = [
                    tuple(int(universe.sequences[row, i]) if first[i] else universe.mask for i in range(2)) for row in draws
                ]
                ess = 1 / float((weights**2).sum())
                if ess < threshold * 2 * (1 - 1e-9):
                    # Systematic resampling of two: the heavier has one copy for certain, and the other with probability 2 w - 1.
                    heavy = int(weights[1] > weights[0])
                    twice = 2 * float(weights[heavy]) - 1
                    both = (states[heavy],) * 2
                    for after, p in ((both, twice), (tuple(states), 1 - twice)):
                        key = (after, (0.0, 0.0))
                        pairs[key] = pairs.get(key, 0.0) + mass * p
                else:
                    key = (tuple(states), tuple(weights.log().tolist()))
                    pairs[key] = pairs.get(key, 0.0) + mass
        for (states, log_weights), mass in pairs.items():
            if all(universe.mask not in state for state in states):
                for state, p in zip(states, torch.softmax(torch.tensor(log_weights, dtype=torch.float64), 0), strict=True):
                    law[universe.index(torch.tensor(state))] += mass * float(p)
                continue
            mus, logs = [universe.product(state) for state in states], [-energy(state) for state in states]
            for draws in itertools.product(rows, repeat=2):
                p = float(mus[0][draws[0]] * mus[1][draws[1]])
                if p == 0:
                    continue
                scores = [log_weights[n] + float(logs[n][draws[n]]) for n in range(2)]
                w = torch.softmax(torch.tensor(scores, dtype=torch.float64), 0)
                for n in range(2):
                    law[draws[n]] += mass * p * float(w[n])
    return law


@pytest.mark.parametrize("threshold", [0.0, 0.75, 1.0])
def test_the_law_of_two_particles(rough, threshold):
    """With resampling never, sometimes and always. A resampled particle that drew with its parent's seed would repeat its draws: that
    law is another one."""
    universe, denoiser, energy = rough
    law = two_step_law(universe, energy, threshold)
    assert abs(float(law.sum()) - 1) < 1e-9
    out = generate(
        denoiser, batch_size=4 * N, length=2, steps=2, energy=TabularEnergy(universe, energy), num_candidates=1, num_particles=2,
        window=(0, 1), seed=31, resample_threshold=threshold,
    )  # fmt: skip
    assert g_test(counts(universe, out.tokens), law) > 1e-6
    assert bool(out.particles.resampled.any()) is (threshold > 0)
    plain = generate_law(universe, lambda xt, t: universe.product(xt), [1.0, 0.5, 0.0])
    assert g_test(counts(universe, out.tokens), plain) < 1e-6


@pytest.mark.parametrize(("particles", "k"), [(2, 1), (3, 1), (2, 2)])
def test_one_step_is_one_pick_among_all(rough, particles, k):
    """In one step N particles of K candidates are N K candidates, in law."""
    universe, denoiser, energy = rough
    law = pick_law(universe.product((universe.mask,) * 2), energy((universe.mask,) * 2), particles * k)
    out = generate(
        denoiser, batch_size=N, length=2, steps=1, energy=TabularEnergy(universe, energy), num_candidates=k,
        num_particles=particles, window=(0, 1), seed=32,
    )  # fmt: skip
    assert g_test(counts(universe, out.tokens), law) > 1e-6


@pytest.mark.parametrize(
    ("particles", "k", "threshold", "scheme", "sampler", "window"),
    [
        (3, 2, 0.9, "systematic", "ancestral", (0, 1)),
        (2, 1, 1.0, "multinomial", "ancestral", (0, 1)),
        (4, 1, 0.5, "residual", "ancestral", (0.4, 1)),
        (3, 2, 0.8, "stratified", "first_hitting", (0, 1)),
        (2, 3, 0.0, "systematic", "ancestral", (0, 1)),
    ],
)
def test_weights_are_proper(rough, particles, k, threshold, scheme, sampler, window):
    """E[Z-hat x weight of x] is the enumerated measure gamma(x), for any N, K, threshold and scheme; and so is its total."""
    universe, denoiser, energy = rough
    steps = 3 if sampler == "ancestral" else None

    def measure(xt, t):
        mu = universe.product(xt)
        return mu * torch.exp(-energy(xt)) if window[0] < t <= window[1] else mu

    if sampler == "ancestral":
        gamma = generate_law(universe, measure, [1.0, 2 / 3, 1 / 3, 0.0])
    else:  # either position first, with probability 1/2
        gamma, start = torch.zeros(4, dtype=torch.float64), (universe.mask,) * 2
        for first in range(2):
            for row, mass in enumerate(measure(start, 1.0).tolist()):
                state = tuple(int(universe.sequences[row, i]) if i == first else universe.mask for i in range(2))
                gamma += 0.5 * mass * measure(state, 1.0)
    out = generate(
        denoiser, batch_size=N, length=2, steps=steps, energy=TabularEnergy(universe, energy), num_candidates=k,
        num_particles=particles, window=window, seed=33, resample_threshold=threshold, resample_scheme=scheme, sampler=sampler,
    )  # fmt: skip
    population = out.particles
    assert population.tokens.shape == (N, particles, 2)
    torch.testing.assert_close(population.log_weights.logsumexp(1), torch.zeros(N, dtype=torch.float64), atol=1e-9, rtol=0)
    z = population.log_Z.exp()
    member = torch.nn.functional.one_hot(universe.index(population.tokens), 4).double()  # [B, N, S]
    for values in ((population.log_weights.exp()[..., None] * member).sum(1), member_of(universe, out.tokens)):
        estimate = z[:, None] * values
        error = (estimate.mean(0) - gamma).abs() / (estimate.std(0) / math.sqrt(N))
        assert (error < 5).all(), (estimate.mean(0), gamma)


def member_of(universe, tokens):
    return torch.nn.functional.one_hot(universe.index(tokens), len(universe.q)).double()


def test_many_particles_reach_the_ideal_chain(universe, denoiser, energy):
    """Z = 1 in every state, so gamma is the ideal corrected chain, and that one gives q in two steps; one candidate does not."""
    arguments = {
        "batch_size": N // 4,
        "length": 3,
        "steps": 2,
        "energy": energy,
        "num_candidates": 1,
        "window": (0, 1),
        "seed": 34,
    }
    many = generate(denoiser, num_particles=64, **arguments)
    one = generate(denoiser, num_particles=1, **arguments)
    assert total_variation(counts(universe, many.tokens) / (N // 4), universe.q) < 0.03
    assert total_variation(counts(universe, one.tokens) / (N // 4), universe.q) > 0.08


@pytest.mark.parametrize("sampler", ["ancestral", "first_hitting", "remasking"])
def test_the_first_particle_is_plain_bitwise(universe, denoiser, energy, sampler):
    common = {
        "batch_size": 200, "length": 3, "sampler": sampler, "steps": None if sampler == "first_hitting" else 4, "energy": energy,
        "num_candidates": 3, "window": (0.2, 1), "seed": 35,
    }  # fmt: skip
    several = generate(denoiser, num_particles=3, resample_threshold=0.0, **common)
    plain = generate(denoiser, **common)
    # Particle 0 has the sequence's seed: without resampling it is the plain sample.
    assert torch.equal(several.particles.tokens[:, 0], plain.tokens)
    assert not torch.equal(several.particles.tokens[:, 1], plain.tokens)
    assert several.nfe == plain.nfe


def test_a_population_does_not_depend_on_its_batch(universe, denoiser, energy):
    m = universe.mask
    prompt = torch.tensor([(m, m, m), (1, m, m), (m, 0, m), (m, m, 2), (m, m, m)])
    seeds = torch.tensor([5, 17, -4, 1 << 40, 6])
    for sampler, steps in (("ancestral", 4), ("first_hitting", None), ("remasking", 5)):
        common = {
            "sampler": sampler, "steps": steps, "energy": energy, "num_candidates": 2, "window": (0.1, 1), "num_particles": 4,
            "resample_threshold": 0.9,
        }  # fmt: skip
        whole = generate(denoiser, prompt=prompt, seed=seeds, **common)
        for rows in ([2], [4, 0], [3, 2, 1]):
            part = generate(denoiser, prompt=prompt[rows], seed=seeds[rows], **common)
            assert torch.equal(part.tokens, whole.tokens[rows])
            assert torch.equal(part.particles.tokens, whole.particles.tokens[rows])
            assert torch.equal(part.particles.log_Z, whole.particles.log_Z[rows])
            assert torch.equal(part.particles.log_weights, whole.particles.log_weights[rows])
    given = prompt != m
    assert torch.equal(whole.tokens[given], prompt[given])


def test_history_is_that_of_the_line_that_was_returned(universe, denoiser, energy):
    out = generate(
        denoiser, batch_size=300, length=3, sampler="first_hitting", energy=energy, num_candidates=2, num_particles=5,
        window=(0, 1), resample_threshold=1.0, seed=36, return_history=True,
    )  # fmt: skip
    assert out.particles.resampled.any()
    assert torch.equal(out.history[-1], out.tokens)
    for before, after in itertools.pairwise(out.history):
        kept = before != universe.mask
        assert torch.equal(after[kept], before[kept])  # a line of ancestors never changes a token
        assert ((after != universe.mask).sum(1) - kept.sum(1) == 1).all()
    assert out.ess.shape == out.step_times.shape == (3, 300) and not out.ess.isnan().any()
    assert (out.particles.tokens == out.tokens[:, None]).all(2).any(1).all()


def test_seeds_of_particles():
    seeds = torch.tensor([0, 1, -5, 2**62])
    table = particle_seeds(seeds, 6)
    assert table.shape == (4, 7) and torch.equal(table[:, 0], seeds)
    assert len(table.unique()) == 28
    assert torch.equal(particle_seeds(seeds, 3)[:, :3], table[:, :3])  # the last one is for the choice among them
