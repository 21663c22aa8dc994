"""DiT: the bidirectional denoiser, with MDLM's architecture (Sahoo et al., arXiv 2406.07524)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from .layers import LayerNorm, Modulation, TimestepEmbedding, modulate
from .pretrained import Pretrained
from .transformer import Transformer, check_ids


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Sizes of a DiT. ``vocab_size`` counts the mask. With ``time_conditioning`` off (the default) t is ignored.

    ``max_length``: the most tokens that it is meant for, as many as it was trained on: ``edlm.generate`` asks for no more. None: any.
    """

    vocab_size: int
    mask_token_id: int
    dim: int = 768
    num_layers: int = 12
    num_heads: int = 12
    cond_dim: int = 128
    dropout: float = 0.1
    time_conditioning: bool = False
    max_length: int | None = None

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length: expected a number of tokens >= 1, or None, got {self.max_length}")
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(f"mask_token_id: expected an id in 0 .. {self.vocab_size - 1}, got {self.mask_token_id}")


class DiT(Pretrained, nn.Module):
    """The proposal mu: ``DiT(config)(xt, t) -> logits [B, L, V]``.

    ``hidden(xt, t)`` and ``head(rows)`` are its two halves: ``generate`` and the losses run the head on masked rows alone. The last
    layer starts at 0, so an untrained network is uniform.
    """

    kind = "dit"
    config_class = DiTConfig

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.mask_token_id, self.vocab_size, self.max_length = config.mask_token_id, config.vocab_size, config.max_length
        self.vocab_embed = nn.Embedding(config.vocab_size, config.dim)
        nn.init.kaiming_uniform_(self.vocab_embed.weight, a=math.sqrt(5))
        self.sigma_map = TimestepEmbedding(config.cond_dim)
        self.transformer = Transformer(
            config.dim, config.num_layers, config.num_heads, config.dropout, causal=False, cond_dim=config.cond_dim
        )
        self.norm_final = LayerNorm(config.dim)
        self.adaLN_final = Modulation(config.cond_dim, config.dim, 2)
        self.linear = nn.Linear(config.dim, config.vocab_size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def hidden(self, xt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """int64 [B, L], floating [B] in [0, 1] -> [B, L, dim], modulated and ready for the head."""
        check_ids("xt", xt, self.vocab_size)
        if tuple(t.shape) != (xt.shape[0],) or not t.is_floating_point():
            raise ValueError(f"t: expected a floating tensor [B] = [{xt.shape[0]}], got {t.dtype} {list(t.shape)}")
        # Conditioned on sigma = -log alpha of the log-linear schedule with eps = 1e-3, as the published networks are.
        sigma = (
            -torch.log1p(-(1 - 1e-3) * t.float()) if self.config.time_conditioning else torch.zeros_like(t, dtype=torch.float32)
        )
        condition = nn.functional.silu(self.sigma_map(sigma))
        x = self.transformer(self.vocab_embed(xt), condition)
        return modulate(self.norm_final(x), *self.adaLN_final(condition))

    @property
    def output_layer(self) -> nn.Linear:
        """The head, for those who need no logits (``edlm.ops.linear_log_probs``)."""
        return self.linear

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., dim] -> logits [..., V]."""
        return self.linear(hidden)

    def forward(self, xt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """int64 [B, L], floating [B] -> logits [B, L, V]. The mask's column means nothing."""
        return self.head(self.hidden(xt, t))
