"""Schedules: identities between their forms, both ends in float64, inverses, errors. Deterministic."""

from __future__ import annotations

import math

import pytest
import torch
from edlm.diffusion import CosineSchedule, LogLinearSchedule, NoiseSchedule
from edlm.diffusion.schedule import GeometricSchedule, LinearSchedule, evaluation_schedule, schedule
from exact import Universe

NAMES = ("log_linear", "cosine", "linear", "geometric")
SCHEDULES = [
    LogLinearSchedule(),
    LogLinearSchedule(eps=0.0),
    CosineSchedule(),
    CosineSchedule(eps=0.0),
    LinearSchedule(),
    LinearSchedule(eps=0.7),
    GeometricSchedule(),
    GeometricSchedule(eps=1e-8, sigma_min=1e-5),
    evaluation_schedule("linear"),
    evaluation_schedule("geometric"),
]
each = pytest.mark.parametrize("noise", SCHEDULES, ids=repr)


@each
def test_forms_agree(noise: NoiseSchedule) -> None:
    t = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
    torch.testing.assert_close(noise.mask_prob(t), 1 - noise.alpha(t), rtol=0, atol=1e-15)
    torch.testing.assert_close(noise.sigma(t), -noise.alpha(t).log(), rtol=1e-12, atol=1e-15)
    h = 1e-5
    slope = (noise.mask_prob(t + h) - noise.mask_prob(t - h)) / (2 * h)
    torch.testing.assert_close(noise.loss_weight(t), slope / noise.mask_prob(t), rtol=1e-7, atol=1e-8)
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
    assert schedule("linear", eps=0.1) == LinearSchedule(eps=0.1)
    assert schedule("geometric") == GeometricSchedule(eps=1e-3, sigma_min=1e-4)
    for lookup in (schedule, evaluation_schedule):
        with pytest.raises(ValueError, match="one of log_linear, cosine, linear, geometric, got 'sqrt'"):
            lookup("sqrt")
    with pytest.raises(ValueError, match="eps: expected"):
        LogLinearSchedule(eps=1.0)


# --- schedules given by their noise, and the evaluation ---------------------------------------------------------------------------


def test_linear_and_geometric_are_what_they_say() -> None:
    t = torch.linspace(0, 1, 41, dtype=torch.float64)
    torch.testing.assert_close(LinearSchedule(eps=1e-3).sigma(t), math.log(1e3) * t, rtol=1e-13, atol=0)
    noise = GeometricSchedule(eps=1e-3, sigma_min=1e-4)
    sigma_max = 1e-4 + math.log(1e3)
    torch.testing.assert_close(noise.sigma(t), 1e-4 ** (1 - t) * sigma_max**t - 1e-4, rtol=1e-11, atol=1e-18)
    # Half way in log noise: most of the time is spent at little of it.
    assert noise.mask_prob(0.5) < 0.03 < LinearSchedule(eps=1e-3).mask_prob(0.01)


@each
def test_the_weight_is_the_slope_of_log_mask_prob(noise: NoiseSchedule) -> None:
    t = torch.tensor([1e-12, 1e-6, 1e-3, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(noise.mask_prob(t).sum(), t)
    torch.testing.assert_close(noise.loss_weight(t.detach()), slope / noise.mask_prob(t.detach()), rtol=1e-11, atol=1e-14)


@each
def test_alpha_keeps_its_digits_near_noise(noise: NoiseSchedule) -> None:
    """alpha(t) - eps from alpha's slope at 1: what is left a little before the end, in the schedules that end at 0."""
    if noise.eps > 0 or isinstance(noise, CosineSchedule):  # there the end is flat, and its own test looks at it
        return
    near = 1 - 2.0**-40
    slope = noise.loss_weight(near) * noise.mask_prob(near)
    assert noise.alpha(near) == pytest.approx(float(slope) * 2.0**-40, rel=1e-9, abs=0)
    assert noise.alpha(near) < 1e-10


def test_noise_that_ends_needs_eps() -> None:
    for kind in (LinearSchedule, GeometricSchedule):
        with pytest.raises(ValueError, match=r"eps: expected a number in \(0, 1\).*evaluation_schedule"):
            kind(eps=0.0)
        with pytest.raises(ValueError, match=r"eps: expected a number in \[0, 1\)"):
            kind(eps=1.0)
    for sigma_min in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="sigma_min: expected a number > 0"):
            GeometricSchedule(sigma_min=sigma_min)


@pytest.mark.parametrize("kind", [LinearSchedule, GeometricSchedule])
def test_a_tiny_eps_overflows_nowhere(kind: type[NoiseSchedule]) -> None:
    t = torch.linspace(0, 1, 11, dtype=torch.float64)[1:]
    noise = kind(eps=1e-320)
    assert all(bool(form(t).isfinite().all()) for form in (noise.alpha, noise.sigma, noise.loss_weight))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("eps", [1e-3, 0.2])
def test_an_evaluation_stretches_the_training_schedule_to_the_end(name: str, eps: float) -> None:
    training, evaluation = schedule(name, eps=eps), evaluation_schedule(name, eps=eps)
    assert evaluation.eps == 0 and evaluation.alpha(1.0) == 0 and evaluation.mask_prob(1.0) == 1
    t = torch.linspace(0.01, 0.99, 37, dtype=torch.float64)
    torch.testing.assert_close(evaluation.mask_prob(t) * (1 - eps), training.mask_prob(t), rtol=1e-13, atol=0)
    torch.testing.assert_close(evaluation.loss_weight(t), training.loss_weight(t), rtol=1e-13, atol=0)
    p = torch.linspace(0, 1, 21, dtype=torch.float64)
    torch.testing.assert_close(evaluation.time_of_mask_prob(p), training.time_of_mask_prob(p * (1 - eps)), rtol=1e-13, atol=0)
    if name in ("log_linear", "cosine"):
        assert evaluation == schedule(name, eps=0.0)


def gauss_legendre(n: int, low: float, high: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Nodes and weights of n-point quadrature on (low, high): Golub and Welsch."""
    k = torch.arange(1, n, dtype=torch.float64)
    beta = k / (4 * k**2 - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(beta, 1) + torch.diag(beta, -1))
    return low + (high - low) * (nodes + 1) / 2, (high - low) * vectors[0] ** 2


@pytest.fixture(scope="module")
def conditional_entropies() -> tuple[Universe, dict[int, float]]:
    """By the number of masked positions: the sum over all masks M of that size of sum over i in M of H(x_i | the others' tokens)."""
    universe, total = Universe(), {}
    for xt in universe.states():
        observed = float(universe.q[universe.agrees(xt)].sum())
        marginals = universe.marginals(xt)
        masked = [i for i, token in enumerate(xt) if token == universe.mask]
        nats = sum(float(-torch.special.xlogy(marginals[i], marginals[i]).sum()) for i in masked)
        total[len(masked)] = total.get(len(masked), 0.0) + observed * nats
    return universe, total


@each
def test_a_perfect_denoiser_has_the_entropy_minus_the_part_beyond_eps(noise: NoiseSchedule, conditional_entropies) -> None:
    universe, total = conditional_entropies

    def nats(p: torch.Tensor) -> torch.Tensor:
        """E over masks at mask probability p of sum over masked i of -log mu_i(x_i | xt), mu being perfect."""
        return sum(p**n * (1 - p) ** (universe.length - n) * h for n, h in total.items())

    # In pieces, and in u = log t where the geometric schedule turns.
    integral = 0.0
    for low, high in ((-60.0, -20.0), (-20.0, -5.0), (-5.0, -1.0), (-1.0, -0.1), (-0.1, 0.0)):
        u, weight = gauss_legendre(60, low, high)
        t = u.exp().clamp_max(1.0)
        integral += float((weight * t * noise.loss_weight(t) * nats(noise.mask_prob(t))).sum())
    p, weight = gauss_legendre(40, 1 - noise.eps, 1.0)
    missing = float((weight * nats(p) / p).sum())
    assert integral == pytest.approx(universe.entropy() - missing, abs=1e-10)
    assert (missing > 0) == (noise.eps > 0)
    if noise.eps == 1e-3:
        assert universe.entropy() - integral > 1e-3, "a bound that left nothing out would not show what this test is for"
