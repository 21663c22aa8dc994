"""Small layers that both networks share."""

from __future__ import annotations

import math

import torch
from torch import nn


class LayerNorm(nn.Module):
    """Layer norm with a weight and no bias, computed in float32 whatever the input's dtype."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # One rounding to the input's dtype, at the very end.
        return nn.functional.layer_norm(x.float(), self.weight.shape, self.weight.float()).to(x.dtype)


class Rotary:
    """Rotary position embedding over the whole head (Su et al., arXiv 2104.09864), halves rotated against each other, base 10 000.

    The table of angles for ``length`` positions from ``start`` on; calling it turns q or k. No module, and no buffer: a network that is
    cast to bfloat16 would cast its frequencies too, and at position 1000 an angle would then be off by radians.
    """

    def __init__(self, length: int, head_dim: int, device: torch.device, start: int = 0) -> None:
        frequency = 10_000.0 ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
        angle = torch.arange(start, start + length, device=device, dtype=torch.float32)[:, None] * frequency
        self.cos, self.sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H, L, D] -> the same shape and dtype, position i turned by start + i times the frequencies; computed in float32."""
        a, b = x.chunk(2, -1)
        return (x * self.cos + torch.cat([-b, a], -1) * self.sin).to(x.dtype)


class TimestepEmbedding(nn.Module):
    """sigma [B] -> [B, cond_dim]: 256 sinusoidal features and a two-layer MLP."""

    FREQUENCIES = 256

    def __init__(self, cond_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.FREQUENCIES, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim))

    def forward(self, sigma: torch.Tensor) -> torch.Tensor:
        half = self.FREQUENCIES // 2
        frequency = torch.exp(-math.log(10_000.0) / half * torch.arange(half, device=sigma.device, dtype=torch.float32))
        angle = sigma.float()[:, None] * frequency
        return self.mlp(torch.cat([angle.cos(), angle.sin()], -1).to(self.mlp[0].weight.dtype))


class Modulation(nn.Linear):
    """adaLN-Zero (Peebles and Xie, arXiv 2212.09748): a conditioning vector -> ``count`` vectors of ``dim``, all 0 at the start."""

    def __init__(self, cond_dim: int, dim: int, count: int) -> None:
        super().__init__(cond_dim, count * dim)
        self.count = count
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, condition: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return super().forward(condition)[:, None].chunk(self.count, -1)


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x * (1 + scale) + shift
