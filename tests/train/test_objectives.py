"""What is minimised: its value, its gradient, and how the same model is validated."""

from __future__ import annotations

import math

import pytest
import torch
from edlm.diffusion import MaskedDiffusion, nelbo_loss, schedule
from edlm.eval import nelbo
from edlm.train.objectives import CausalObjective, DiffusionObjective, objective_for
from tiny_run import tiny_config

MASK = 27


def build(kind, **changes):
    config = tiny_config(kind, "bundled", **{"batch_size": 6} | changes)
    model = config.model.build(vocab_size=28, mask_token_id=MASK, bos_token_id=MASK)
    with torch.no_grad():  # away from adaLN's and the head's zeros, which hide everything
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return config, model, objective_for(config, model, MASK, None)


def loss_of(objective, x0, step):
    """The mean over a whole batch, as the trainer takes it."""
    terms = objective(objective.terms, objective.rows(x0, 0, step), step)
    return terms[0] / (len(x0) * (x0.shape[1] if objective.per == "token" else 1))


def validated(objective, x0):
    """As the trainer does it: in eval mode, without gradients."""
    objective.model.eval()
    with torch.no_grad():
        return objective(objective.validate, x0, objective.valid_seed + torch.arange(len(x0)))


@pytest.fixture
def x0():
    return torch.randint(0, MASK, (6, 16))


@pytest.mark.parametrize("name", ["log_linear", "cosine"])
def test_the_diffusion_loss_is_the_nelbo_per_token(x0, name):
    _, model, objective = build("dit", seed=5, diffusion={"schedule": name, "eps": 0.01, "t_min": 0.02})
    model.eval()
    diffusion = MaskedDiffusion(schedule(name, eps=0.01), MASK)
    for step in (0, 1, 17):
        expected = nelbo_loss(model, x0, diffusion, seed=5, offset=step, t_min=0.02).nats.double().mean() / 16
        assert loss_of(objective, x0, step).item() == pytest.approx(expected.item(), rel=1e-6)


def test_corruption_depends_on_the_step_and_the_seed(x0):
    _, model, objective = build("dit")
    _, _, other = build("dit", seed=1)
    model.eval()
    losses = [loss_of(objective, x0, step).item() for step in range(5)] + [loss_of(other, x0, 0).item()]
    assert len(set(losses)) == 6
    assert losses[:5] == [loss_of(objective, x0, step).item() for step in range(5)]


def test_the_mean_diffusion_loss_is_near_the_validated_bound(x0):
    """An estimator and its counterpart in the evaluation, 400 steps of 6 rows: 5 standard errors."""
    _, model, objective = build("dit", diffusion={"eps": 0.0, "t_min": 0.0})
    model.eval()
    with torch.no_grad():
        losses = torch.stack([loss_of(objective, x0, step) for step in range(400)]).double()
    reference = nelbo(model, x0, num_times=200)
    assert abs(float(losses.mean()) - reference.mean) < 5 * float(losses.std()) / math.sqrt(400) + 0.01


def test_the_causal_loss_is_the_mean_negative_log_likelihood(x0):
    _, model, objective = build("causal_lm")
    model.eval()
    logits = model(x0)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), x0.flatten())
    assert loss_of(objective, x0, 3).item() == pytest.approx(expected.item(), rel=1e-5)
    assert isinstance(objective, CausalObjective)


@pytest.mark.parametrize("kind", ["dit", "causal_lm"])
def test_gradients_reach_every_parameter(x0, kind):
    _, model, objective = build(kind, model={"time_conditioning": True})
    model.train()
    loss_of(objective, x0, 0).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_an_untrained_model_costs_the_uniform_code(x0):
    """The denoiser's head is 0 at the start: every one of 27 tokens is as likely, the mask being none of them."""
    config = tiny_config("dit", "bundled", diffusion={"eps": 0.0})
    model = config.model.build(vocab_size=28, mask_token_id=MASK, bos_token_id=MASK)
    assert validated(objective_for(config, model, MASK, None), x0)["loss"].mean == pytest.approx(math.log(27), rel=1e-5)


@pytest.mark.parametrize("kind", ["dit", "causal_lm"])
def test_validation_is_repeatable_without_dropout_and_leaves_no_trace(x0, kind):
    _, model, objective = build(kind)
    state = torch.get_rng_state()
    first = validated(objective, x0)
    assert torch.equal(torch.get_rng_state(), state)  # dropout of the next step is what it would have been
    assert all(p.grad is None for p in model.parameters())
    assert validated(objective, x0) == first
    model.train()
    with torch.no_grad():
        noisy = {float(loss_of(objective, x0, 0)) for _ in range(3)}
    assert len(noisy) == 3  # there is a dropout that could have shown


def test_validation_is_a_bound_whatever_eps_was_trained_with(x0):
    """With eps > 0 the noisiest part of the integral would be missing."""
    _, model, small = build("dit", diffusion={"eps": 0.001})
    large = objective_for(tiny_config("dit", "bundled", diffusion={"eps": 0.5}), model, MASK, None)
    assert isinstance(small, DiffusionObjective)
    assert validated(large, x0) == validated(small, x0)
