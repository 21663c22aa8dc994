"""``generate`` against exhaustive enumeration: the law of what it returns, sign, K-law, windows, prompts, and what is bitwise.

Batches of tens of thousands of sequences are drawn at once. Every G-test has a fixed seed and a false-alarm rate of 1e-6.
"""

from __future__ import annotations

import math

import pytest
import torch
from edlm.samplers import generate
from exact import (
    SplitDenoiser,
    TabularCausalLM,
    TabularEnergy,
    g_test,
    generate_law,
    pick_law,
    residual_energy,
    total_variation,
)

N = 40_000


def grid(steps):
    return [1 - i / steps for i in range(steps)] + [0.0]


def counts(universe, tokens):
    assert (tokens != universe.mask).all()
    return torch.bincount(universe.index(tokens), minlength=len(universe.q)).double()


# --- laws ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_law_of_plain_masked_diffusion(universe, denoiser, steps):
    law = generate_law(universe, lambda xt, t: universe.product(xt), grid(steps))
    out = generate(denoiser, batch_size=N, length=3, steps=steps, seed=1)
    assert g_test(counts(universe, out.tokens), law) > 1e-6


@pytest.mark.parametrize(("steps", "k", "window"), [(1, 2, (0, 1)), (2, 3, (0, 1)), (2, 2, (0.5, 1)), (3, 2, (0, 0.7))])
def test_law_with_an_energy(universe, denoiser, energy, steps, k, window):
    """The finite-K law, enumerated over all K-tuples of candidates, through all states and steps, window included."""

    def completion(xt, t):
        mu = universe.product(xt)
        return pick_law(mu, residual_energy(universe)(xt), k) if window[0] < t <= window[1] else mu

    law = generate_law(universe, completion, grid(steps))
    out = generate(denoiser, batch_size=N, length=3, steps=steps, seed=2, energy=energy, num_candidates=k, window=window)
    assert g_test(counts(universe, out.tokens), law) > 1e-6
    # The test has teeth: the laws of K = 1 and of the reversed sign are rejected.
    plain = generate_law(universe, lambda xt, t: universe.product(xt), grid(steps))
    assert g_test(counts(universe, out.tokens), plain) < 1e-6
    wrong = generate_law(
        universe,
        lambda xt, t: pick_law(universe.product(xt), -residual_energy(universe)(xt).nan_to_num(posinf=-50), k),
        grid(steps),
    )
    assert g_test(counts(universe, out.tokens), wrong) < 1e-6


def test_more_candidates_come_closer_to_the_data(universe, denoiser, energy):
    """One step. The enumerated total variation falls with K, and the sampler attains each within its own noise."""
    state = (universe.mask,) * 3
    previous = math.inf
    for k in (1, 2, 3):
        law = pick_law(universe.product(state), residual_energy(universe)(state), k)
        distance = total_variation(law, universe.q)
        assert distance < previous
        previous = distance
        out = generate(denoiser, batch_size=N, length=3, steps=1, seed=k, energy=energy, num_candidates=k, window=(0, 1))
        assert g_test(counts(universe, out.tokens), law) > 1e-6
    many = generate(denoiser, batch_size=N, length=3, steps=1, seed=9, energy=energy, num_candidates=256, window=(0, 1))
    assert total_variation(counts(universe, many.tokens) / N, universe.q) < 0.02


def test_more_steps_come_closer_to_the_data(universe, denoiser):
    """The enumerated total variation of the perfect factorised proposal falls with T; that of the perfect joint is 0 at every T."""
    previous = math.inf
    for steps in (1, 2, 4, 16, 64):
        law = generate_law(universe, lambda xt, t: universe.product(xt), grid(steps))
        assert total_variation(law, universe.q) < previous
        previous = total_variation(law, universe.q)
        if steps >= 16:
            out = generate(denoiser, batch_size=N, length=3, steps=steps, seed=17)
            assert g_test(counts(universe, out.tokens), law) > 1e-6
        if steps <= 4:
            joint = generate_law(universe, lambda xt, t: universe.posterior(xt), grid(steps))
            assert total_variation(joint, universe.q) < 1e-12


@pytest.mark.parametrize("carry_over", [False, True])
def test_autoregressive_energies(universe, denoiser, carry_over):
    """A residual energy made of a tabular AR model: p_AR(x0 | xt) in the limit (AR), or the enumerated K-law (coAR)."""
    from edlm.models import ARResidualEnergy

    p = universe.autoregressive(0.5)
    ar = TabularCausalLM(universe, p)
    model = ARResidualEnergy(ar, carry_over=carry_over, mask_token_id=universe.mask)

    def completion(xt, t):
        mu = universe.product(xt)
        masked = torch.tensor([token == universe.mask for token in xt])
        terms = ar.table[:, masked].sum(1) if carry_over else ar.table.sum(1)
        return pick_law(mu, torch.where(mu > 0, mu.log() - terms, math.inf), 2)

    law = generate_law(universe, completion, grid(2))
    out = generate(denoiser, batch_size=N, length=3, steps=2, seed=5, energy=model, num_candidates=2, window=(0, 1))
    assert g_test(counts(universe, out.tokens), law) > 1e-6


def first_hitting_law(universe, completion):
    """Uniformly random order, one position at a time."""
    states = {(universe.mask,) * universe.length: 1.0}
    for _ in range(universe.length):
        following = {}
        for xt, mass in states.items():
            masked = [i for i, token in enumerate(xt) if token == universe.mask]
            for i in masked:
                for row, p in enumerate(completion(xt).tolist()):
                    xs = (*xt[:i], int(universe.sequences[row, i]), *xt[i + 1 :])
                    following[xs] = following.get(xs, 0.0) + mass * p / len(masked)
        states = following
    law = torch.zeros_like(universe.q)
    for xt, mass in states.items():
        law[universe.index(torch.tensor(xt))] += mass
    return law


@pytest.mark.parametrize("k", [1, 2])
def test_first_hitting(universe, denoiser, energy, k):
    """Its enumerated law; with perfect marginals that law is q itself, the limit of many ancestral steps."""

    def completion(xt):
        return pick_law(universe.product(xt), residual_energy(universe)(xt), k)

    law = first_hitting_law(universe, completion)
    if k == 1:
        assert total_variation(law, universe.q) < 1e-12
        many = generate_law(universe, lambda xt, t: universe.product(xt), grid(256))
        assert total_variation(many, law) < 3e-3
    out = generate(
        denoiser, batch_size=N, length=3, sampler="first_hitting", seed=3, energy=energy, num_candidates=k, window=(0, 1)
    )
    assert g_test(counts(universe, out.tokens), law) > 1e-6
    assert out.nfe == 3


@pytest.mark.filterwarnings("ignore:window")
@pytest.mark.parametrize("steps", [3, 10, 20, 49])
def test_window_edges_compare_as_they_read(universe, denoiser, energy, steps):
    """lo < t <= hi with t = i / T as a fraction: an edge that is a grid point belongs to the step below it, and rounding moves none."""
    seen = set()
    for low, high in ((0.3, 1.0), (0.0, 0.3), (1 / 3, 1.0), (0.05, 0.7)):
        out = generate(
            denoiser, batch_size=300, length=3, steps=steps, seed=1, energy=energy, num_candidates=2, window=(low, high)
        )
        part = ~out.step_times.isnan()
        for t, used in zip(out.step_times[part].tolist(), (~out.ess.isnan())[part].tolist(), strict=True):
            exact = round(t * steps) / steps  # the nearest float to the fraction
            assert t == exact
            assert used is (low < exact <= high)
            seen.add(used)
    assert seen == {True, False}


def test_first_hitting_window_is_per_sequence(universe, denoiser, energy):
    out = generate(
        denoiser, batch_size=500, length=3, sampler="first_hitting", seed=3, energy=energy, num_candidates=4, window=(0.5, 0.9)
    )
    inside = (out.step_times > 0.5) & (out.step_times <= 0.9)
    assert inside.any() and not inside.all()
    assert torch.equal(inside, ~out.ess.isnan())


def test_prompts_and_infilling(universe, denoiser, energy):
    """Rows of one batch with different prompts: each follows its own conditional law and keeps its tokens."""
    m = universe.mask
    prompts = [(1, m, m), (m, 2, m), (m, m, m), (0, m, 1)]
    prompt = torch.tensor(prompts).repeat(N // 4, 1)
    out = generate(denoiser, prompt=prompt, steps=2, seed=4, energy=energy, num_candidates=2, window=(0, 1))
    given = prompt != m
    assert torch.equal(out.tokens[given], prompt[given])

    def completion(xt, t):
        return pick_law(universe.product(xt), residual_energy(universe)(xt), 2)

    for row, start in enumerate(prompts):
        law = generate_law(universe, completion, grid(2), start=start)
        assert g_test(counts(universe, out.tokens[row::4]), law) > 1e-6


def test_tempered_proposal_keeps_its_target(universe, denoiser, energy):
    """With a temperature the weights are corrected: at K = 2 the enumerated law of the pick, and q in the limit of K."""
    state = (universe.mask,) * 3
    marginals = universe.marginals(state) ** (1 / 1.5)
    marginals = marginals / marginals.sum(1, keepdim=True)
    proposal = marginals[torch.arange(3), universe.sequences].prod(1)
    # Weight of a candidate: exp(-E) mu / proposal = q / proposal.
    law = pick_law(proposal, -(universe.q / proposal).log(), 2)
    arguments = {"batch_size": N, "length": 3, "steps": 1, "energy": energy, "window": (0, 1), "temperature": 1.5}
    out = generate(denoiser, seed=6, num_candidates=2, **arguments)
    assert g_test(counts(universe, out.tokens), law) > 1e-6
    many = generate(denoiser, seed=7, num_candidates=256, **arguments)
    assert total_variation(counts(universe, many.tokens) / N, universe.q) < 0.02


def test_filtered_proposal_targets_its_support(universe, denoiser, energy):
    """top_k = 2 removes a token at each position; what is left is q restricted to that support, as K grows."""
    state = (universe.mask,) * 3
    keep = torch.zeros(3, 3, dtype=torch.bool).scatter_(1, universe.marginals(state).topk(2, dim=1).indices, True)
    support = keep[torch.arange(3), universe.sequences].all(1)
    target = universe.q * support / (universe.q * support).sum()
    out = generate(denoiser, batch_size=N, length=3, steps=1, seed=8, energy=energy, num_candidates=256, window=(0, 1), top_k=2)
    seen = counts(universe, out.tokens)
    assert seen[~support].sum() == 0
    assert total_variation(seen / N, target) < 0.02


def test_constant_energy_and_infinite_temperature_are_plain_in_law(universe, denoiser, energy):
    law = generate_law(universe, lambda xt, t: universe.product(xt), grid(2))
    constant = TabularEnergy(universe, lambda xt: torch.full((27,), 3.0, dtype=torch.float64))
    for model, energy_temperature in ((constant, 1.0), (energy, math.inf)):
        out = generate(
            denoiser, batch_size=N, length=3, steps=2, seed=10, energy=model, num_candidates=4, window=(0, 1),
            energy_temperature=energy_temperature,
        )  # fmt: skip
        assert g_test(counts(universe, out.tokens), law) > 1e-6


def test_number_opened_in_a_step_is_binomial(universe, denoiser):
    out = generate(denoiser, batch_size=N, length=3, steps=4, seed=11, return_history=True)
    # What opened at t = 1: a sequence's first step, if that was its time.
    opened = ((out.history[0] != universe.mask) ^ (out.history[1] != universe.mask)).sum(1) * (out.step_times[0] == 1)
    law = torch.tensor([math.comb(3, n) * 0.25**n * 0.75 ** (3 - n) for n in range(4)], dtype=torch.float64)
    assert g_test(torch.bincount(opened, minlength=4).double(), law) > 1e-6


# --- what is bitwise -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ancestral", "first_hitting"])
def test_one_candidate_or_an_empty_window_is_plain(universe, denoiser, energy, sampler):
    common = {"batch_size": 300, "length": 3, "sampler": sampler, "seed": 12, "steps": 3 if sampler == "ancestral" else None}
    plain = generate(denoiser, **common).tokens
    one = generate(denoiser, energy=energy, num_candidates=1, window=(0, 1), **common)
    never = generate(denoiser, energy=energy, num_candidates=8, window=(1, 1), **common)
    assert torch.equal(one.tokens, plain) and torch.equal(never.tokens, plain)
    assert one.energy_nfe == 0 and never.energy_nfe == 0
    assert not torch.equal(generate(denoiser, energy=energy, num_candidates=8, window=(0, 1), **common).tokens, plain)


def test_a_sequence_does_not_depend_on_its_batch(universe, denoiser, energy):
    m = universe.mask
    prompt = torch.tensor([(m, m, m), (1, m, m), (m, 0, m), (m, m, 2), (m, m, m)])
    for sampler, steps in (("ancestral", 4), ("first_hitting", None)):
        common = {"sampler": sampler, "steps": steps, "energy": energy, "num_candidates": 3, "window": (0.3, 1)}
        seeds = torch.tensor([5, 17, -4, 1 << 40, 6])
        whole = generate(denoiser, prompt=prompt, seed=seeds, **common).tokens
        for rows in ([2], [4, 0], [3, 2, 1]):
            part = generate(denoiser, prompt=prompt[rows], seed=seeds[rows], **common).tokens
            assert torch.equal(part, whole[rows])


def test_energy_shift_changes_nothing(universe, denoiser):
    base = residual_energy(universe)
    shifted = TabularEnergy(universe, lambda xt: base(xt) + 4.0 * sum(xt))  # a power of two apart, so that float32 rounds alike
    common = {"batch_size": 2000, "length": 3, "steps": 3, "seed": 13, "num_candidates": 4, "window": (0, 1)}
    a = generate(denoiser, energy=TabularEnergy(universe, base), **common)
    b = generate(denoiser, energy=shifted, **common)
    assert (a.tokens == b.tokens).all(1).double().mean() > 0.999
    torch.testing.assert_close(a.ess, b.ess, equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shaping", [{}, {"temperature": 0.8}, {"top_k": 2, "temperature": 1.2}])
def test_head_rows(universe, denoiser, energy, shaping):
    """The head on the rows that matter gives the very same draws, and sees opening rows outside the window, masked ones inside."""
    common = {
        "batch_size": 50, "length": 3, "steps": 4, "seed": 14, "energy": energy, "num_candidates": 3, "window": (0.5, 1), **shaping
    }  # fmt: skip
    whole = generate(denoiser, return_history=True, **common)
    split = SplitDenoiser(denoiser)
    assert torch.equal(generate(split, **common).tokens, whole.tokens)
    before = (whole.history[:-1] == universe.mask) & ~whole.step_times.isnan()[:, :, None]
    opened = before & (whole.history[1:] != universe.mask)
    expected = torch.where((whole.step_times > 0.5)[:, :, None], before, opened).sum((1, 2)).tolist()
    assert split.rows == expected


def test_global_generator_is_not_touched(denoiser):
    state = torch.get_rng_state()
    generate(denoiser, batch_size=2, length=3, steps=2)
    assert torch.equal(state, torch.get_rng_state())


# --- work, diagnostics, modes ----------------------------------------------------------------------------------------------------


def test_no_call_when_nothing_opens(universe, denoiser):
    for seed in range(5):
        for steps in (1024, 2**31):  # the plan visits no step at which nothing opens, so their number costs nothing
            denoiser.calls = 0
            out = generate(denoiser, batch_size=1, length=3, steps=steps, seed=seed)
            assert out.nfe == denoiser.calls <= 3


def test_diagnostics(universe, denoiser, energy):
    energy.calls = 0
    out = generate(
        denoiser, batch_size=4, length=3, steps=4, seed=0, energy=energy, num_candidates=6, window=(0.5, 1), return_history=True
    )
    used = out.step_times > 0.5
    assert out.energy_nfe == energy.calls == int(used.any(1).sum())
    assert torch.equal(~out.ess.isnan(), used) and torch.equal(~out.log_Z.isnan(), used)
    assert ((out.ess[used] >= 1) & (out.ess[used] <= 6)).all()
    assert out.history.shape == (len(out.step_times) + 1, 4, 3)
    assert (out.history[0] == universe.mask).all() and torch.equal(out.history[-1], out.tokens)
    assert set(out.stage_seconds) == {"denoise", "propose", "energy", "select", "reverse"}
    assert all(seconds >= 0 for seconds in out.stage_seconds.values())


def test_samples_may_be_trained_on(denoiser):
    out = generate(denoiser, batch_size=2, length=3, steps=2)
    table = torch.nn.Embedding(4, 2)
    table(out.tokens).sum().backward()  # an inference tensor would be refused here
    assert table.weight.grad is not None


def test_candidates_never_meet_the_vocabulary():
    """K = 32 candidates: no operator of a step allocates more than the denoiser's own B x L x V logits."""
    batch, length, vocab_size, k = 2, 16, 4000, 32

    class Flat:
        mask_token_id, vocab_size = 3999, 4000

        def __call__(self, xt, t):
            return torch.zeros(*xt.shape, vocab_size)

    def energy(x0, xt, t, log_p):
        return torch.zeros(x0.shape[:2])

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        generate(Flat(), batch_size=batch, length=length, steps=2, energy=energy, num_candidates=k, window=(0, 1))
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest <= 4 * batch * length * vocab_size < 4 * k * length * vocab_size


def test_log_z_is_unbiased_before_the_log(universe, denoiser):
    """mean exp(log_Z) is Z = 1 for the residual energy of q (five standard errors), and mean log_Z is below 0 (Jensen)."""
    energy = TabularEnergy(universe, residual_energy(universe))
    out = generate(denoiser, batch_size=N, length=3, steps=1, seed=15, energy=energy, num_candidates=4, window=(0, 1))
    z = out.log_Z[0].double().exp()
    assert abs(z.mean() - 1) < 5 * z.std() / math.sqrt(N)
    assert out.log_Z.mean() < 0


def test_dropout_is_off_and_the_mode_is_restored(universe, denoiser):
    class Noisy(torch.nn.Module):
        mask_token_id, vocab_size = universe.mask, universe.num_tokens + 1

        def __init__(self):
            super().__init__()
            self.dropout = torch.nn.Dropout(0.9)
            self.frozen = torch.nn.Dropout(0.5).eval()

        def forward(self, xt, t):
            return self.dropout(denoiser(xt, t).clamp_min(-1e4))

    noisy = Noisy()
    noisy.frozen.eval()
    tokens = generate(noisy, batch_size=200, length=3, steps=2, seed=16).tokens
    assert torch.equal(tokens, generate(denoiser, batch_size=200, length=3, steps=2, seed=16).tokens)
    assert noisy.training and noisy.dropout.training and not noisy.frozen.training
