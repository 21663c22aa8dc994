"""What is told while the loop runs, and what comes back."""

from __future__ import annotations

import pytest
import torch
from edlm.samplers import generate


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("sampler", ["ancestral", "first_hitting", "remasking", "left_to_right"])
def test_reports_add_up_to_the_output(universe, denoiser, energy, sampler, particles):
    reports = []
    m = universe.mask
    prompt = torch.tensor([(m, m, m), (1, m, m), (m, m, 2)]).repeat(10, 1)
    out = generate(
        denoiser, prompt=prompt, sampler=sampler, steps=5 if sampler in ("ancestral", "remasking") else None, energy=energy,
        num_candidates=4, window=(0.4, 1), seed=91, on_step=reports.append, num_particles=particles, return_history=True,
        resample_threshold=0.0,
    )  # fmt: skip
    assert [r.number for r in reports] == list(range(out.nfe)) == list(range(len(out.step_times)))
    assert all(r.number < r.total for r in reports)
    assert reports[-1].nfe == out.nfe and reports[-1].energy_nfe == out.energy_nfe
    for r, t in zip(reports, out.step_times, strict=True):
        assert torch.equal(r.rows, (~t.isnan()).nonzero().squeeze(1))
        assert torch.equal(r.t, t[r.rows])
    if particles == 1:
        for name in ("ess", "log_Z", "energy"):
            assert torch.equal(torch.stack([getattr(r, name) for r in reports]).nan_to_num(), getattr(out, name).nan_to_num())
        assert torch.equal(torch.stack([r.num_candidates for r in reports]), out.num_candidates)
        assert torch.equal(torch.stack([r.tokens for r in reports]), out.history[1:])
    else:
        assert torch.equal(reports[-1].tokens, out.particles.tokens[:, 0])
    assert torch.equal(out.history[0], prompt) and torch.equal(out.history[-1], out.tokens)
    assert torch.equal(out.lengths, torch.full((30,), 3))
    used = out.step_times > 0.4
    assert torch.equal(~out.energy.isnan(), used) and torch.equal(out.num_candidates, 4 * used)
    assert out.energy.dtype == out.ess.dtype == torch.float32 and out.step_times.dtype == torch.float64


def test_the_energy_is_that_of_the_candidate_taken(universe, denoiser):
    """In one step every token comes from it."""
    value = torch.randn(27, generator=torch.Generator().manual_seed(1))

    def energy(x0, xt, t, log_p):
        return value[universe.index(x0)]

    out = generate(denoiser, batch_size=200, length=3, steps=1, energy=energy, num_candidates=6, window=(0, 1), seed=92)
    assert torch.equal(out.energy[0], value[universe.index(out.tokens)])


def test_reports_are_copies(universe, denoiser, energy):
    def spoil(report):
        for name in ("ess", "log_Z", "energy", "num_candidates", "tokens", "t", "rows"):
            getattr(report, name).fill_(1)

    common = {"batch_size": 20, "length": 3, "steps": 3, "energy": energy, "num_candidates": 2, "window": (0, 1), "seed": 93}
    plain, spoilt = generate(denoiser, **common), generate(denoiser, on_step=spoil, **common)
    for name in ("ess", "log_Z", "energy", "num_candidates", "tokens", "step_times"):
        assert torch.equal(getattr(plain, name).nan_to_num(), getattr(spoilt, name).nan_to_num())


def test_the_prompt_is_not_written_to(universe, denoiser):
    prompt = torch.full((4, 3), universe.mask)
    out = generate(denoiser, prompt=prompt, steps=2)
    assert (prompt == universe.mask).all() and (out.tokens != universe.mask).all()
