"""The average of the weights: its recursion, its independence, and its place in the model."""

from __future__ import annotations

import pytest
import torch
from edlm.train.ema import EMA
from torch import nn


def test_the_recursion():
    net = nn.Linear(3, 2)
    ema, expected = EMA(net, 0.9), net.weight.detach().clone()
    for step in range(200):
        with torch.no_grad():
            net.weight.add_(torch.randn(2, 3))
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * net.weight.detach()
        torch.testing.assert_close(ema.weights["weight"], expected)
    assert min(0.9, 81 / 90) == 0.9  # both branches were walked


def test_no_decay_follows_at_once():
    net = nn.Linear(3, 2)
    ema = EMA(net, 0.0)
    with torch.no_grad():
        net.weight.fill_(5.0)
    ema.update(1000)
    assert torch.equal(ema.weights["weight"], net.weight)


def test_it_is_a_copy_without_gradients():
    net = nn.Linear(3, 3)
    before = net.weight.detach().clone()
    ema = EMA(net, 0.9)
    assert not any(w.requires_grad for w in ema.weights.values()) and net.weight.requires_grad
    with torch.no_grad():
        net.weight.zero_()
    assert torch.equal(ema.weights["weight"], before)
    ema.update(0)
    assert torch.equal(net.weight, torch.zeros_like(before))
    assert ema.weights["weight"] == pytest.approx(0.1 * before)


def test_in_place_it_is_the_model_and_afterwards_nothing_has_changed():
    net = nn.Linear(3, 2)
    ema = EMA(net, 0.9)
    with torch.no_grad():
        net.weight.mul_(3)
    mine, average, place = net.weight.detach().clone(), ema.weights["weight"].clone(), net.weight.data_ptr()
    with ema.in_place():
        assert torch.equal(net.weight, average) and net.weight.data_ptr() == place
    assert torch.equal(net.weight, mine) and torch.equal(ema.weights["weight"], average)
