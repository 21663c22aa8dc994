"""As many candidates as it takes, a window that the ESS ends, energies in small calls and energies that are wrong.

Every G-test has a fixed seed and a false-alarm rate of 1e-6.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from edlm.samplers import generate
from exact import TabularEnergy, g_test, generate_law, law_of_states, pick_law, transition

N = 40_000


def counts(universe, tokens):
    assert (tokens != universe.mask).all()
    return torch.bincount(universe.index(tokens), minlength=len(universe.q)).double()


def ess(log_w):
    w = torch.softmax(log_w, 0)
    return 1 / float((w**2).sum())


def stopped_law(mu, energy, target, stages):
    """[S]: the law of the pick if candidates are added, stage by stage, until their ESS reaches the target. All tuples, enumerated."""
    support = torch.nonzero(mu > 0).squeeze(1).tolist()
    law, used = torch.zeros_like(mu), dict.fromkeys(stages, 0.0)
    for draws in itertools.product(support, repeat=stages[-1]):
        mass = float(mu[list(draws)].prod())
        for k in stages:
            log_w = -energy[list(draws[:k])]
            if k == stages[-1] or ess(log_w) >= target:
                law.index_add_(0, torch.tensor(draws[:k]), mass * torch.softmax(log_w, 0))
                used[k] += mass
                break
    return law, used


def test_law_of_as_many_candidates_as_it_takes(rough):
    """The stopping rule enumerated, through two steps; it is the law of no fixed K, and the counts are those that the rule gives."""
    universe, denoiser, energy = rough
    stages, target = [2, 4], 1.8
    law = generate_law(universe, lambda xt, t: stopped_law(universe.product(xt), energy(xt), target, stages)[0], [1.0, 0.5, 0.0])
    common = {
        "batch_size": 4 * N, "length": 2, "steps": 2, "energy": TabularEnergy(universe, energy), "window": (0, 1), "seed": 61
    }  # fmt: skip
    out = generate(denoiser, num_candidates="auto", ess_target=target, max_candidates=4, **common)
    assert g_test(counts(universe, out.tokens), law) > 1e-6
    for k in (2, 4):
        fixed = generate_law(universe, lambda xt, t, k=k: pick_law(universe.product(xt), energy(xt), k), [1.0, 0.5, 0.0])
        assert g_test(counts(universe, out.tokens), fixed) < 1e-6
    at_first = out.num_candidates[0][out.step_times[0] == 1.0]
    _, used = stopped_law(universe.product((2, 2)), energy((2, 2)), target, stages)
    assert g_test(torch.bincount(at_first, minlength=5)[[2, 4]].double(), torch.tensor([used[2], used[4]])) > 1e-6
    enough = out.ess >= target
    assert (enough | (out.num_candidates == 4) | out.ess.isnan()).all()


def test_auto_is_the_fixed_number_where_it_ends(rough):
    """Bitwise: a sequence that stops at k takes what K = k takes; at a target that is out of reach all stop at the cap."""
    universe, denoiser, energy = rough
    common = {
        "batch_size": 500, "length": 2, "steps": 1, "energy": TabularEnergy(universe, energy), "window": (0, 1), "seed": 62
    }  # fmt: skip
    out = generate(denoiser, num_candidates="auto", ess_target=2.5, max_candidates=12, **common)
    assert set(out.num_candidates.unique().tolist()) == {4, 8, 12}
    for k in (4, 8, 12):
        fixed = generate(denoiser, num_candidates=k, **common)
        here = out.num_candidates[0] == k
        assert torch.equal(out.tokens[here], fixed.tokens[here])
        torch.testing.assert_close(out.log_Z[0][here], fixed.log_Z[0][here])
        torch.testing.assert_close(out.ess[0][here], fixed.ess[0][here])
        torch.testing.assert_close(out.energy[0][here], fixed.energy[0][here])
    assert out.energy_nfe == 3
    capped = generate(denoiser, num_candidates="auto", ess_target=12.0, max_candidates=12, **common)
    assert torch.equal(capped.tokens, generate(denoiser, num_candidates=12, **common).tokens) and capped.energy_nfe == 1


def test_law_of_a_window_that_the_ess_ends(rough):
    """Energy on from t = 1 until a sequence's ESS reaches 0.9 K: states with and without it, enumerated through three steps."""
    universe, denoiser, energy = rough
    share, k = 0.9, 2

    def parted(xt, ends):
        """The part of the pick's law in which the ESS ends the window, or does not."""
        mu, e, law = universe.product(xt), energy(xt), torch.zeros(4, dtype=torch.float64)
        for draws in itertools.product(torch.nonzero(mu > 0).squeeze(1).tolist(), repeat=k):
            log_w = -e[list(draws)]
            if (ess(log_w) >= share * k) is ends:
                law.index_add_(0, torch.tensor(draws), mu[list(draws)].prod() * torch.softmax(log_w, 0))
        return law

    on, off = {(2, 2): 1.0}, {}
    for i in range(3):
        opens = 1 / (3 - i)
        nothing = {xt: mass * (1 - opens) ** xt.count(2) for xt, mass in on.items()}  # no step is made: the window stays
        stay = transition(universe, on, lambda xt: parted(xt, False), opens)
        leave = transition(universe, on, lambda xt: parted(xt, True), opens)
        for xt, mass in nothing.items():  # counted in both
            leave[xt] = leave.get(xt, 0.0) - mass
        off = transition(universe, off, universe.product, opens)
        for xt, mass in leave.items():
            off[xt] = off.get(xt, 0.0) + mass
        on = stay
    law = law_of_states(universe, {xt: on.get(xt, 0.0) + off.get(xt, 0.0) for xt in {*on, *off} if 2 not in xt})
    assert abs(float(law.sum()) - 1) < 1e-9
    out = generate(
        denoiser, batch_size=4 * N, length=2, steps=3, energy=TabularEnergy(universe, energy), num_candidates=k, window="auto",
        window_ess=share, seed=63,
    )  # fmt: skip
    assert g_test(counts(universe, out.tokens), law) > 1e-6
    always = generate_law(universe, lambda xt, t: pick_law(universe.product(xt), energy(xt), k), [1.0, 2 / 3, 1 / 3, 0.0])
    assert g_test(counts(universe, out.tokens), always) < 1e-6
    over = (out.ess >= share * k).long().cumsum(0) > 0  # from the step that ended it on
    after = torch.cat([torch.zeros_like(over[:1]), over[:-1]])
    assert out.ess[after].isnan().all() and (~out.ess[0].isnan()).all()


@pytest.mark.parametrize("rows", [1, 2, 5, 7, 1000])
def test_calls_of_any_size_are_one(universe, denoiser, energy, rows):
    sizes = []

    def recording(x0, xt, t, log_p):
        sizes.append(x0.shape[0] * x0.shape[1])
        return energy(x0, xt, t, log_p)

    common = {"batch_size": 40, "length": 3, "steps": 3, "num_candidates": 5, "window": (0, 1), "seed": 64}
    whole = generate(denoiser, energy=energy, **common)
    parts = generate(denoiser, energy=recording, energy_batch_size=rows, **common)
    assert torch.equal(whole.tokens, parts.tokens)
    assert torch.equal(whole.ess.nan_to_num(), parts.ess.nan_to_num())
    assert max(sizes) <= rows and parts.energy_nfe == len(sizes)
    with pytest.raises(ValueError, match="energy_batch_size: expected an int >= 1, or None for no bound, got 0"):
        generate(denoiser, energy=energy, energy_batch_size=0, **common)


def test_score_is_asked_with_what_the_host_knows(universe, denoiser, energy):
    class Scoring:
        calls = 0

        def __call__(self, x0, xt, t, log_p):
            raise AssertionError("score is there")

        def score(self, x0, xt, t, log_p, *, masked):
            self.calls += 1
            assert torch.equal(masked, xt == universe.mask) and masked.device.type == "cpu"
            return energy(x0, xt, t, log_p)

    common = {"batch_size": 60, "length": 3, "steps": 4, "num_candidates": 3, "window": (0.3, 1), "seed": 65}
    scoring = Scoring()
    out = generate(denoiser, energy=scoring, **common)
    assert torch.equal(out.tokens, generate(denoiser, energy=energy, **common).tokens) and scoring.calls == out.energy_nfe


@pytest.mark.parametrize(("bad", "said"), [(math.nan, "nan"), (-math.inf, "-inf")])
def test_wrong_energies_are_named(universe, denoiser, bad, said):
    """Step, sequence and candidate."""

    class Sometimes:
        calls = 0

        def __call__(self, x0, xt, t, log_p):
            value = torch.zeros(x0.shape[:2])
            self.calls += 1
            if self.calls == 2:
                value[1, 2] = bad
            return value

    with pytest.raises(ValueError, match=rf"energy: .* got {said} for candidate 2 of sequence 1 in step 1$"):
        generate(denoiser, batch_size=3, length=3, sampler="first_hitting", energy=Sometimes(), num_candidates=4, window=(0, 1))
    # Of rows that are not the whole batch, the sequence is the batch's: here the first two are complete from the start but for one.
    prompt = torch.tensor([(0, 1, 3), (0, 3, 1), (3, 3, 3)])
    with pytest.raises(ValueError, match=rf"got {said} for all 4 candidates of sequence 2 in step 1$"):
        generate(
            denoiser, prompt=prompt, sampler="first_hitting", num_candidates=4, window=(0, 1),
            energy=lambda x0, xt, t, log_p: torch.full(x0.shape[:2], bad if len(x0) == 1 else 0.0),
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"got inf for all 4 candidates of sequence 0 in step 0$"):
        generate(
            denoiser, batch_size=2, length=3, steps=1, num_candidates=4, window=(0, 1),
            energy=lambda x0, xt, t, log_p: torch.full(x0.shape[:2], math.inf),
        )  # fmt: skip


def test_auto_goes_on_where_the_first_are_excluded(universe, denoiser):
    """What K = 64 finds, "auto" with that cap finds too, though all of the first few are impossible."""

    def energy(x0, xt, t, log_p):
        return torch.where(x0[..., 0] == 2, 0.0, math.inf)

    common = {"batch_size": 200, "length": 3, "steps": 1, "energy": energy, "window": (0, 1), "seed": 67}
    out = generate(denoiser, num_candidates="auto", ess_target=2.0, max_candidates=64, **common)
    assert (out.tokens[:, 0] == 2).all() and out.ess.min() >= 2 and out.num_candidates.unique().numel() > 2


def test_raising_p_ar_raises_the_choice(universe, denoiser):
    """More mass of the autoregressive model on one sequence: it is chosen more often, as the enumerated law says."""
    from edlm.models import ARResidualEnergy
    from exact import TabularCausalLM

    seen = []
    state, favourite = (universe.mask,) * 3, 5
    for factor in (1.0, 4.0):
        p = universe.q.clone()
        p[favourite] *= factor
        p = p / p.sum()
        energy = ARResidualEnergy(TabularCausalLM(universe, p), mask_token_id=universe.mask)
        law = pick_law(universe.product(state), (universe.product(state) / p).log(), 3)
        out = generate(denoiser, batch_size=N, length=3, steps=1, energy=energy, num_candidates=3, window=(0, 1), seed=66)
        assert g_test(counts(universe, out.tokens), law) > 1e-6
        seen.append(float(counts(universe, out.tokens)[favourite]) / N)
    assert seen[1] > 1.5 * seen[0]


def test_expected_log_z_rises_towards_log_z(rough):
    """E[T_n], n = 2, 3, 4, of the sampler against its own enumeration (five standard errors); that rises, and stays below log Z."""
    universe, denoiser, energy = rough
    mu, e = universe.product((2, 2)), energy((2, 2))
    log_z = float((mu * torch.exp(-e)).sum().log())
    previous = -math.inf
    for n in (2, 3, 4):
        exact = sum(
            float(mu[list(draws)].prod()) * float((-e[list(draws)]).logsumexp(0) - math.log(n))
            for draws in itertools.product(range(4), repeat=n)
        )
        assert previous < exact < log_z
        previous = exact
        out = generate(
            denoiser,
            batch_size=N,
            length=2,
            steps=1,
            energy=TabularEnergy(universe, energy),
            num_candidates=n,
            window=(0, 1),
            seed=n,
        )
        values = out.log_Z[0].double()
        assert abs(float(values.mean()) - exact) < 5 * float(values.std()) / math.sqrt(N)


BAD = [
    ({"num_candidates": "all"}, r"num_candidates: expected an int >= 1, or auto, got 'all'"),
    ({"num_candidates": "auto", "ess_target": 40.0}, r"ess_target: expected a number in 1 .. max_candidates = 32, got 40.0"),
    ({"num_candidates": "auto", "max_candidates": 0}, r"max_candidates: expected an int >= 1, got 0"),
    ({"window": "auto", "window_ess": 1.5}, r"window_ess: expected a share of the candidates in \(0, 1\], got 1.5"),
    ({"window": "automatic"}, r"window: expected a pair \(lo, hi\), or 'auto', got 'automatic'"),
    ({"num_particles": 0}, r"num_particles: expected an int >= 1, got 0"),
    ({"num_particles": 4, "energy": None}, r"num_particles: 4 particles need an energy"),
    ({"num_particles": 4, "energy_temperature": 0}, r"energy_temperature: expected a number > 0 with particles"),
    ({"num_particles": 4, "num_candidates": "auto"}, r"num_candidates, window: expected numbers with particles, got 'auto'"),
    ({"num_particles": 4, "window": "auto"}, r"num_candidates, window: expected numbers with particles, got 'auto'"),
    ({"energy_temperature": "hot"}, r"energy_temperature: expected a number >= 0 .* got 'hot'"),
    ({"energy_temperature": None}, r"energy_temperature: expected a number >= 0 .* got None"),
    ({"temperature": torch.ones(1)}, r"temperature: expected a number, got tensor"),
    ({"top_p": "0.9"}, r"top_p: expected a number, got '0.9'"),
    ({"schedule": "cosine"}, r"schedule: expected an edlm.diffusion.NoiseSchedule, got 'cosine'"),
    ({"on_step": 3}, r"on_step: expected a callable that takes a StepReport, got 3"),
    ({"max_candidates": None, "num_candidates": "auto"}, r"max_candidates: expected an int >= 1, got None"),
    ({"window": [0.5]}, r"window: expected a pair \(lo, hi\), or 'auto', got \[0.5\]"),
    ({"resample_threshold": -1}, r"resample_threshold: expected a share of the particles in \[0, 1\], got -1"),
    ({"resample_scheme": "best"}, r"resample_scheme: expected one of systematic, .* got 'best'"),
    ({"remask_prob": 0.1}, r"remask_prob: it is for the remasking sampler, got 0.1 with 'ancestral'"),
    ({"remask_prob": 1.1, "sampler": "remasking"}, r"remask_prob: expected a probability in \[0, 1\], got 1.1"),
    ({"cuda_graph": True}, r"cuda_graph: expected a CUDA device, got cpu"),
    (
        {"num_candidates": 10**9},
        r"num_candidates: 1000000000 candidates of 2 sequences of 3 tokens need .* GiB free on cpu; \d+ fit",
    ),
    ({"energy": 3}, r"energy: expected a callable"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input(denoiser, energy, change, message):
    full = {"batch_size": 2, "length": 3, "steps": 2, "energy": energy, "window": (0, 1)}
    with pytest.raises(ValueError, match=message):
        generate(denoiser, **(full | change))


def test_an_energy_of_another_vocabulary(denoiser, energy):
    class Other:
        vocab_size = 7

        def __call__(self, x0, xt, t, log_p):
            return torch.zeros(x0.shape[:2])

    full = {"batch_size": 2, "length": 3, "steps": 2, "window": (0, 1)}
    with pytest.raises(ValueError, match=r"energy: expected a model of the denoiser's 4 ids .* got one of 7"):
        generate(denoiser, energy=Other(), **full)
    Other.vocab_size = 3  # an autoregressive model, which knows no mask
    generate(denoiser, energy=Other(), **full)
    Other.max_length = 2
    with pytest.raises(ValueError, match=r"the energy takes at most 2 tokens \(max_length\), got 3 tokens .* block_length=1"):
        generate(denoiser, energy=Other(), **full)

    class Causal(Other):
        max_length = None

        def log_probs(self, x0):
            return x0

    with pytest.raises(
        ValueError, match=r"energy: .* got an autoregressive model \(Causal\); wrap it: edlm.models.ARResidualEnergy"
    ):
        generate(denoiser, energy=Causal(), **full)


def test_a_window_without_a_step_is_told(universe, denoiser, energy):
    full = {"batch_size": 2, "length": 3, "energy": energy}
    with pytest.warns(UserWarning, match=r"window: none of 2 steps starts within \(0.6, 0.9\): the energy will not be used"):
        generate(denoiser, steps=2, window=(0.6, 0.9), **full)
    prompt = torch.tensor([(1, 3, 3)])
    with pytest.warns(UserWarning, match=r"window: no step started within \(0.999999, 1.0\): the energy was not used"):
        generate(denoiser, prompt=prompt, sampler="first_hitting", window=(0.999999, 1.0), energy=energy)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(denoiser, steps=2, window=(1, 1), **full)  # w = 0, as it is meant
        generate(denoiser, steps=3, window=(1 / 3, 2 / 3), **full)
