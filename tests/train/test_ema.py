"""The average of the weights: its recursion, its eval mode, its independence."""

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
        ema.update(net, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * net.weight.detach()
        torch.testing.assert_close(ema.model.weight, expected)
    assert min(0.9, 81 / 90) == 0.9  # both branches were walked


def test_no_decay_follows_at_once():
    net = nn.Linear(3, 2)
    ema = EMA(net, 0.0)
    with torch.no_grad():
        net.weight.fill_(5.0)
    ema.update(net, 1000)
    assert torch.equal(ema.model.weight, net.weight)


def test_it_is_a_copy_in_eval_mode_without_gradients():
    net = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).train()
    before = net[0].weight.detach().clone()
    ema = EMA(net, 0.9)
    assert not any(m.training for m in ema.model.modules()) and net.training and net[1].training
    assert not any(p.requires_grad for p in ema.model.parameters()) and net[0].weight.requires_grad
    with torch.no_grad():
        net[0].weight.zero_()
    assert torch.equal(ema.model[0].weight, before)
    ema.update(net, 0)
    assert torch.equal(net[0].weight, torch.zeros_like(before))
    assert ema.model[0].weight == pytest.approx(0.1 * before)
