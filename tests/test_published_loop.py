"""The published decode loop that ``edlm bench decode`` compares with: its law against enumeration, its cache, its energies.

A benchmark against something wrong would be worth nothing. Every G-test has a fixed seed and a false-alarm rate of 1e-6.
"""

from __future__ import annotations

import math

import pytest
import torch
from edlm.benchmarks.decode import loop
from edlm.benchmarks.decode.published import Adapted, AutoregressiveResidual, decode
from edlm.benchmarks.decode.recorder import Recorder
from edlm.models import ARResidualEnergy
from exact import TabularDenoiser, TabularEnergy, Universe, g_test, generate_law, pick_law, residual_energy

N = 20_000
UNIVERSE = Universe()
MASK = UNIVERSE.mask


@pytest.fixture(scope="module")
def denoiser():
    return TabularDenoiser(UNIVERSE)


@pytest.fixture(scope="module")
def energy():
    return TabularEnergy(UNIVERSE, residual_energy(UNIVERSE))


def masks(batch):
    return torch.full((batch, UNIVERSE.length), MASK)


def grid(steps):
    return [1 - i / steps for i in range(steps)] + [0.0]


def law(steps, k, window, start=None, sign=1):
    """Enumerated: the finite-K law of the pick inside the window, mu outside."""

    def completion(xt, t):
        mu = UNIVERSE.product(xt)
        energy = residual_energy(UNIVERSE)(xt)
        energy = energy if sign == 1 else -energy.nan_to_num(posinf=-50)
        return pick_law(mu, energy, k) if window[0] < t <= window[1] else mu

    return generate_law(UNIVERSE, completion, grid(steps), start=start)


def counts(tokens):
    assert (tokens != MASK).all()
    return torch.bincount(UNIVERSE.index(tokens), minlength=len(UNIVERSE.q)).double()


@pytest.mark.parametrize("steps", [1, 4])
def test_law_without_an_energy(denoiser, steps):
    torch.manual_seed(1)
    assert g_test(counts(decode(denoiser, masks(N), steps).tokens), law(steps, 1, (1, 1))) > 1e-6


@pytest.mark.parametrize(
    ("steps", "window"), [(1, (0.0, 1.0)), (3, (0.0, 1.0)), (2, (0.5, 1.0)), (3, (0.0, 0.7)), (2, (1.0, 1.0))]
)
def test_law_with_two_candidates(denoiser, energy, steps, window):
    """B is large, so that a mistaken order of (K, B) would swap candidates between sequences; the reversed sign is told apart."""
    torch.manual_seed(2)
    out = decode(denoiser, masks(N), steps, energy=Adapted(energy, N), num_candidates=2, window=window)
    assert g_test(counts(out.tokens), law(steps, 2, window)) > 1e-6
    if window[0] < 1:
        assert g_test(counts(out.tokens), law(steps, 1, window)) < 1e-6
        assert g_test(counts(out.tokens), law(steps, 2, window, sign=-1)) < 1e-6


def test_each_sequence_gets_its_own_candidates(denoiser, energy):
    """Neighbours with different prompts: each keeps its tokens and follows its own conditional law."""
    torch.manual_seed(3)
    prompts = [(1, MASK, MASK), (MASK, 2, MASK), (0, MASK, 1)]
    start = torch.tensor(prompts).repeat(N // 4, 1)
    out = decode(denoiser, start, 2, energy=Adapted(energy, len(start)), num_candidates=2, window=(0.0, 1.0))
    assert torch.equal(out.tokens[start != MASK], start[start != MASK])
    for row, prompt in enumerate(prompts):
        assert g_test(counts(out.tokens[row :: len(prompts)]), law(2, 2, (0.0, 1.0), start=prompt)) > 1e-6


def test_law_of_sequences_alone_whose_predictions_are_cached(denoiser, energy):
    """One at a time most steps change nothing and use what is cached, over the edge of the window too."""
    torch.manual_seed(4)
    window, steps, alone = (0.4, 1.0), 6, 2500
    before = denoiser.calls
    found = [decode(denoiser, masks(1), steps, energy=Adapted(energy, 1), num_candidates=2, window=window) for _ in range(alone)]
    assert g_test(counts(torch.cat([out.tokens for out in found])), law(steps, 2, window)) > 1e-6
    assert denoiser.calls - before == sum(out.nfe for out in found) < 0.8 * steps * alone
    assert all(out.energy_nfe <= out.nfe <= UNIVERSE.length + 2 for out in found), "each position, the edge, and once complete"


def test_a_cache_ends_with_the_window_and_with_time_conditioning(denoiser, energy):
    """No step opens anything here, so that each call is one that the cache does not spare."""
    start, only = masks(1), [100, 101, 102, 103]
    nothing_opens = {"only": only, "energy": Adapted(energy, 1), "num_candidates": 2}
    edge = (1 - 101.5e-9, 1.0)  # between the starts of steps 101 and 102 of 1e9
    torch.manual_seed(5)
    out = decode(denoiser, start, 10**9, window=edge, **nothing_opens)
    assert torch.equal(out.tokens, start) and (out.nfe, out.energy_nfe) == (2, 1)
    out = decode(denoiser, start, 10**9, window=(0.0, 1.0), time_conditioning=True, **nothing_opens)
    assert torch.equal(out.tokens, start) and (out.nfe, out.energy_nfe) == (4, 4)


def test_the_published_energy_is_the_same_number():
    case = loop.SMOKE._replace(batch=3, k=2)
    found = loop.networks(case)
    mask = case.vocab - 1
    torch.manual_seed(6)
    p = torch.rand(case.batch, case.length, case.vocab)
    p[..., mask] = 0
    p = (p / p.sum(-1, keepdim=True)).repeat(case.k, 1, 1)
    x0, xt = torch.randint(mask, (case.k * case.batch, case.length)), torch.full((case.k * case.batch, case.length), mask)
    arguments = x0, xt, torch.ones(len(x0)), p
    with torch.no_grad():
        plain = AutoregressiveResidual(found.causal_lm)(*arguments)
        ours = Adapted(ARResidualEnergy(found.causal_lm), case.batch)(*arguments)
    assert plain.std() > 0.1
    torch.testing.assert_close(plain, ours, rtol=1e-4, atol=1e-4)


def test_stretches_keep_the_share_of_the_window():
    case = loop.HEADLINE._replace(part=16)
    inside, outside = loop.stretches(case)
    assert len(inside) == 3 and len(outside) == 13
    assert set(inside) < set(range(13)) and set(outside) < set(range(13, 64))
    assert loop.stretches(case._replace(low=0.0)) == [range(24, 40)] == loop.stretches(case._replace(k=0))
    assert [len(only) for only in loop.stretches(case._replace(part=1))] == [1, 1]


def test_a_stretch_calls_its_networks_as_often_as_steps_change_something():
    """A position opens in one of 64 steps, so that a step changes something, and the next one calls, with probability
    1 - (63/64)**8 = 0.118. Were the first call of every stretch counted, it would be 0.23."""
    case = loop.SMOKE._replace(batch=1, steps=64, part=16)
    torch.manual_seed(7)
    part, calls, runs = loop.Theirs(case, loop.networks(case), adapted=False), 0, 300
    for _ in range(runs):
        part.prepare()
        calls += sum(out.nfe for out in part())
    steps = runs * sum(map(len, part.parts))
    p = 1 - (63 / 64) ** case.length
    assert abs(calls - steps * p) < 5 * math.sqrt(steps * p * (1 - p)), "false alarm 6e-7"


def test_the_networks_alone_are_the_calls_of_the_decode():
    case = loop.SMOKE
    found = loop.networks(case)
    recorder = Recorder(found.denoiser, found.energy)
    out = loop.ours(case, recorder, recorder.energy, 0)
    assert (recorder.nfe, recorder.energy_nfe) == (out.nfe, out.energy_nfe) and recorder.nfe > recorder.energy_nfe > 0
    same = loop.ours(case, found.denoiser, found.energy, 0)
    assert torch.equal(out.tokens, same.tokens)
    made = []
    recorder.calls = [(name, lambda call=call: made.append(call())) for name, call in recorder.calls]
    recorder.replay()
    assert len(made) == len(recorder.calls) and all(value.isfinite().all() for value in made)
    assert recorder.bytes(found.denoiser, found.causal_lm) > sum(p.nbytes for p in found.denoiser.output_layer.parameters())
    assert math.isclose(sum(len(only) for only in loop.stretches(case._replace(part=case.steps))), case.steps)


def test_figures_are_of_the_timed_runs_and_stages_of_the_one_in_the_middle():
    warm_up, *timed = (
        loop.Told(9, 50, 50, {"denoise": 9, "energy": 0}),
        loop.Told(3, 7, 2, {"denoise": 1, "energy": 1}),
        loop.Told(1, 5, 1, {"denoise": 1, "energy": 0}),
        loop.Told(2, 6, 3, {"denoise": 0, "energy": 2}),
        loop.Told(4, 9, 9, {"denoise": 0, "energy": 4}),
    )
    runs = loop.Runs(None)
    runs.told = [warm_up, *timed[:3]]
    assert runs.figures(2, 3) == {"nfe": 12, "energy_nfe": 4, "stage_seconds": {"denoise": 0, "energy": 4}}
    runs.told = [warm_up, warm_up, *timed]
    found = runs.figures(1, 4)
    assert found["stage_seconds"] == {"denoise": 0.5, "energy": 1.5}, "the mean of the two in the middle"
    assert found["nfe"] == round(6.5) and found["energy_nfe"] == round(2.5)


def test_a_noisy_machine_is_not_conclusive():
    def row(median, low, high, note=None):
        return {"median": median, "low": low, "high": high, "note": note}

    calm = {loop.EDLM: row(10, 9, 13), loop.NETWORKS: row(11, 10, 12), loop.PUBLISHED: row(50, 20, 60, "scaled")}
    assert loop.doubts(calm) == [] == loop.doubts({loop.EDLM: calm[loop.EDLM]})
    (spread,) = loop.doubts(calm | {loop.EDLM: row(10, 8, 13)})
    assert spread == f"the quartiles of {loop.EDLM} are 1.62x apart"
    (networks,) = loop.doubts(calm | {loop.NETWORKS: row(13, 12, 14)})
    assert networks == f"{loop.NETWORKS} took 1.30x the loop that contains them"
