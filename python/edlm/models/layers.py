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
        return nn.functional.layer_norm(x.float(), self.weight.shape).to(x.dtype) * self.weight.to(x.dtype)


class Rotary(nn.Module):
    """Rotary position embedding over the whole head (Su et al., arXiv 2104.09864), halves rotated against each other, base 10 000."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 10_000.0 ** (-torch.arange(0, head_dim, 2).float() / head_dim), persistent=False)

    def forward(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, H, L, D] twice -> the same, position i turned by i * inv_freq."""
        angle = torch.arange(q.shape[2], device=q.device, dtype=torch.float32)[:, None] * self.inv_freq
        cos, sin = (torch.cat([f(angle), f(angle)], -1).to(q.dtype) for f in (torch.cos, torch.sin))
        return tuple(x * cos + _rotate_half(x) * sin for x in (q, k))


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


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
