"""The exponential moving average of the weights: what is validated, exported and sampled from."""

from __future__ import annotations

import copy

import torch
from torch import nn


class EMA:
    """A second copy of the model, in eval mode, whose weights follow the first. Young averages forget faster: (1 + n) / (10 + n)."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = copy.deepcopy(model).eval().requires_grad_(False), decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        mine, theirs = list(self.model.parameters()), [p.detach() for p in model.parameters()]
        torch._foreach_lerp_(mine, theirs, weight)
