"""The learning rate's course, AdamW's groups, clipping, and its state as named tensors."""

from __future__ import annotations

import math

import pytest
import torch
from edlm.train import OptimSpec
from edlm.train.optim import Optimizer, learning_rate
from torch import nn


def course(steps, **values):
    return [learning_rate(OptimSpec(lr=1.0, **values), step, steps) for step in range(steps)]


def test_warm_up_is_linear_and_ends_at_lr():
    assert course(10, warmup_steps=4) == pytest.approx([0.25, 0.5, 0.75, 1.0] + [1.0] * 6)
    assert course(3, warmup_steps=0) == [1.0, 1.0, 1.0]


def test_linear_decay_ends_at_the_final_ratio():
    assert course(7, warmup_steps=2, decay="linear") == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0])
    assert course(7, warmup_steps=2, decay="linear", final_lr_ratio=0.2) == pytest.approx([0.5, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_cosine_decay():
    assert course(5, warmup_steps=0, decay="cosine") == pytest.approx(
        [0.5 * (1 + math.cos(math.pi * share)) for share in (0, 0.25, 0.5, 0.75, 1)]
    )
    rates = course(101, warmup_steps=0, decay="cosine", final_lr_ratio=0.1)
    assert rates[0] == 1 and rates[50] == pytest.approx(0.55) and rates[-1] == pytest.approx(0.1)
    assert rates == sorted(set(rates), reverse=True)


@pytest.mark.parametrize("decay", ["constant", "cosine", "linear"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_runs_shorter_than_their_warm_up(decay, steps):
    assert course(steps, warmup_steps=10, decay=decay) == pytest.approx([(i + 1) / 10 for i in range(steps)])
    assert all(0 <= rate <= 1 for rate in course(steps, warmup_steps=steps, decay=decay))
    assert all(math.isfinite(rate) for rate in course(steps, warmup_steps=steps - 1, decay=decay))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.norm = nn.LayerNorm(3)
        self.linear = nn.Linear(3, 2)

    def forward(self, ids):
        return self.linear(self.norm(self.embed(ids)))


def loss_of(net):
    return (net(torch.tensor([0, 1, 2, 3, 4])) ** 2).sum()


def test_weight_decay_falls_on_matrices_alone():
    """With gradients of 0 AdamW moves what decays, by lr * weight_decay, and nothing else."""
    net = Net()
    optimizer = Optimizer(net, OptimSpec(lr=0.1, weight_decay=0.5, warmup_steps=0), 10)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(1.0)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0)
    moved = {name: float(p.flatten()[0].detach()) for name, p in net.named_parameters()}
    assert moved == pytest.approx(
        {"embed.weight": 0.95, "norm.weight": 1, "norm.bias": 1, "linear.weight": 0.95, "linear.bias": 1}
    )


def test_each_step_follows_the_course():
    net = Net()
    optimizer = Optimizer(net, OptimSpec(lr=1e-2, warmup_steps=2, decay="linear"), 4)
    for step in range(4):
        loss_of(net).backward()
        rate, _ = optimizer.step(step)
        assert rate == learning_rate(optimizer.spec, step, 4)
        assert [group["lr"] for group in optimizer.adamw.param_groups] == [rate, rate]
        assert all(p.grad is None for p in net.parameters())


def test_betas_reach_adamw():
    optimizer = Optimizer(Net(), OptimSpec(betas=(0.5, 0.7)), 1)
    assert [group["betas"] for group in optimizer.adamw.param_groups] == [(0.5, 0.7)] * 2


@pytest.mark.parametrize(("clip", "scale"), [(1.0, 1 / 5), (10.0, 1.0)])
def test_clipping_is_of_the_whole_gradient(clip, scale):
    """A gradient of norm 5 over two parameters; its first moment is (1 - beta1) times what was left of it."""
    net = nn.Linear(1, 1)
    optimizer = Optimizer(net, OptimSpec(grad_clip=clip, betas=(0.9, 0.999)), 1)
    net.weight.grad, net.bias.grad = torch.tensor([[3.0]]), torch.tensor([4.0])
    _, norm = optimizer.step(0)
    assert norm == pytest.approx(5.0)
    state = optimizer.state()
    assert float(state["weight/exp_avg"]) == pytest.approx(0.1 * 3 * scale, rel=1e-4)
    assert float(state["bias/exp_avg"]) == pytest.approx(0.1 * 4 * scale, rel=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_moves_nothing(bad):
    net = Net()
    optimizer = Optimizer(net, OptimSpec(lr=0.1, warmup_steps=0), 10)
    loss_of(net).backward()
    optimizer.step(0)
    weights, state = [p.detach().clone() for p in net.parameters()], {k: v.clone() for k, v in optimizer.state().items()}
    loss_of(net).backward()
    net.linear.bias.grad[0] = bad
    with pytest.raises(FloatingPointError, match="step 1: the gradient is not finite"):
        optimizer.step(1)
    assert all(torch.equal(a, b) for a, b in zip(weights, net.parameters(), strict=True))
    assert all(torch.equal(v, state[k]) for k, v in optimizer.state().items())


def test_the_state_makes_a_round_trip():
    """Three steps, then three more from the stored state, equal six in one go, bit by bit."""
    spec = OptimSpec(lr=1e-2, warmup_steps=2, weight_decay=0.1)
    whole = Net()
    start = {k: v.clone() for k, v in whole.state_dict().items()}
    optimizer = Optimizer(whole, spec, 6)
    for step in range(6):
        loss_of(whole).backward()
        optimizer.step(step)

    first = Net()
    first.load_state_dict(start)
    optimizer = Optimizer(first, spec, 6)
    for step in range(3):
        loss_of(first).backward()
        optimizer.step(step)
    stored = {k: v.clone() for k, v in optimizer.state().items()}
    assert set(stored) == {f"{n}/{k}" for n, _ in first.named_parameters() for k in ("step", "exp_avg", "exp_avg_sq")}

    second = Net()
    second.load_state_dict(first.state_dict())
    optimizer = Optimizer(second, spec, 6)
    assert set(optimizer.state()) == set(stored)  # there from the beginning, to be read into
    for name, value in optimizer.state().items():
        value.copy_(stored[name])
    for step in range(3, 6):
        loss_of(second).backward()
        optimizer.step(step)
    assert all(torch.equal(a, b) for a, b in zip(second.parameters(), whole.parameters(), strict=True))
