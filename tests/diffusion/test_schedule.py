"""Schedules: identities between their forms, both ends in float64, inverses, errors. Deterministic."""

from __future__ import annotations

import math

import pytest
import torch
from edlm.diffusion import CosineSchedule, LogLinearSchedule, NoiseSchedule, schedule

SCHEDULES = [LogLinearSchedule(), LogLinearSchedule(eps=0.0), CosineSchedule(), CosineSchedule(eps=0.0)]
each = pytest.mark.parametrize("noise", SCHEDULES, ids=repr)


@each
def test_forms_agree(noise: NoiseSchedule) -> None:
    t = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
    torch.testing.assert_close(noise.mask_prob(t), 1 - noise.alpha(t), rtol=0, atol=1e-15)
    torch.testing.assert_close(noise.sigma(t), -noise.alpha(t).log(), rtol=1e-12, atol=0)
    h = 1e-5
    slope = (noise.mask_prob(t + h) - noise.mask_prob(t - h)) / (2 * h)
    torch.testing.assert_close(noise.loss_weight(t), slope / noise.mask_prob(t), rtol=1e-7, atol=0)
    assert (noise.mask_prob(t).diff() > 0).all()


@each
def test_inverse(noise: NoiseSchedule) -> None:
    t = torch.cat([torch.linspace(0, 1, 101, dtype=torch.float64), torch.tensor([1e-300, 1e-12, 1e-6])])
    # Near t = 1 the cosine is flat: p there does not hold more than half of t's digits.
    back = noise.time_of_mask_prob(noise.mask_prob(t))
    torch.testing.assert_close(back, t, rtol=1e-12, atol=1e-15 if isinstance(noise, LogLinearSchedule) else 3e-8)
    small = t < 0.9
    torch.testing.assert_close(back[small], t[small], rtol=1e-12, atol=0)


@each
def test_ends(noise: NoiseSchedule) -> None:
    assert noise.mask_prob(0.0) == 0
    assert noise.alpha(0.0) == 1
    assert noise.sigma(0.0) == 0
    assert noise.alpha(1.0) == noise.eps
    assert noise.mask_prob(1.0) == 1 - noise.eps
    assert noise.time_of_mask_prob(0.0) == 0
    assert noise.time_of_mask_prob(1 - noise.eps) == 1
    assert math.isinf(noise.loss_weight(0.0))
    assert math.isinf(noise.sigma(1.0)) == (noise.eps == 0)
    # alpha is 1 here to the last bit: forms that start from it would give 0 or inf. (approx is absolute by default.)
    assert noise.mask_prob(1e-30) > 0
    assert noise.sigma(1e-30) == pytest.approx(float(noise.mask_prob(1e-30)), rel=1e-12, abs=0)
    assert noise.loss_weight(1e-30) == pytest.approx(1e30, rel=1e-12)


def test_known_values() -> None:
    assert LogLinearSchedule(eps=0.2).mask_prob(0.5) == pytest.approx(0.4)
    assert LogLinearSchedule().loss_weight(0.25) == 4
    assert CosineSchedule(eps=0.0).mask_prob(1 / 3) == pytest.approx(0.5)
    assert CosineSchedule().loss_weight(0.5) == pytest.approx(math.pi / 2)
    assert CosineSchedule(eps=0.0).loss_weight(1.0) == 0
    near = 1 - 2.0**-30  # cosine: alpha = 2 sin^2(pi/4 2^-30), far below the spacing of doubles around 1
    assert CosineSchedule(eps=0.0).alpha(near) == pytest.approx(2 * (math.pi / 4 * 2.0**-30) ** 2, rel=1e-9, abs=0)


def test_shapes_and_dtypes() -> None:
    t = torch.rand(2, 3)
    assert LogLinearSchedule().alpha(t).shape == (2, 3)
    assert CosineSchedule().loss_weight(t).dtype == torch.float64


@each
@pytest.mark.parametrize("t", [-1e-9, 1.0000001, math.nan, torch.tensor([0.5, 2.0])])
def test_time_outside(noise: NoiseSchedule, t: float | torch.Tensor) -> None:
    for form in (noise.alpha, noise.mask_prob, noise.sigma, noise.loss_weight):
        with pytest.raises(ValueError, match=r"t: expected numbers in \[0, 1\]"):
            form(t)
    with pytest.raises(ValueError, match="p: expected"):
        noise.time_of_mask_prob(t)


def test_lookup() -> None:
    assert schedule("cosine", eps=0.0) == CosineSchedule(eps=0.0)
    assert schedule("log_linear") == LogLinearSchedule(eps=1e-3)
    with pytest.raises(ValueError, match="one of log_linear, cosine, got 'linear'"):
        schedule("linear")
    with pytest.raises(ValueError, match="eps: expected"):
        LogLinearSchedule(eps=1.0)
