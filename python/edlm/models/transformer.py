"""One stack of transformer blocks: bidirectional with adaLN, or causal without conditioning."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

from .key_values import Extension
from .layers import LayerNorm, Modulation, Rotary, modulate

# A layer's new keys and values -> those of all positions.
Append = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Block(nn.Module):
    """Attention and MLP, pre-norm. Names and shapes follow MDLM's blocks, so that its weights can be mapped one to one."""

    def __init__(self, dim: int, num_heads: int, dropout: float, *, causal: bool, cond_dim: int | None) -> None:
        super().__init__()
        self.num_heads, self.dropout, self.causal = num_heads, dropout, causal
        self.norm1 = LayerNorm(dim)
        self.attn_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attn_out = nn.Linear(dim, dim, bias=False)
        self.norm2 = LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))
        self.adaLN_modulation = None if cond_dim is None else Modulation(cond_dim, dim, 6)

    def _attend(self, x: torch.Tensor, rotary: Rotary, append: Append | None) -> torch.Tensor:
        batch, length, dim = x.shape
        qkv = self.attn_qkv(x).view(batch, length, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = rotary(q), rotary(k)
        if append is not None:
            k, v = append(k, v)
        if k.shape[2] == length:
            out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        else:
            # The last query sees every key: is_causal would align the mask with the first one. A single query needs no mask.
            bias = None if length == 1 else causal_lower_right(length, k.shape[2])
            out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.attn_out(out.transpose(1, 2).reshape(batch, length, dim))

    def _residual(self, x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        if gate is not None:
            branch = gate * branch
        return x + nn.functional.dropout(branch, self.dropout, self.training)

    def forward(
        self, x: torch.Tensor, rotary: Rotary, condition: torch.Tensor | None, append: Append | None = None
    ) -> torch.Tensor:
        if self.adaLN_modulation is None:
            x = self._residual(x, self._attend(self.norm1(x), rotary, append), None)
            return self._residual(x, self.mlp(self.norm2(x)), None)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition)
        x = self._residual(x, self._attend(modulate(self.norm1(x), shift1, scale1), rotary, append), gate1)
        return self._residual(x, self.mlp(modulate(self.norm2(x), shift2, scale2)), gate2)


class Transformer(nn.Module):
    """``num_layers`` blocks over [B, L, dim]; ``condition`` [B, cond_dim] where the blocks are conditioned.

    A causal stack may read on behind positions that it has read: ``extension`` has their keys and values, and takes the new ones.
    """

    def __init__(
        self, dim: int, num_layers: int, num_heads: int, dropout: float, *, causal: bool, cond_dim: int | None = None
    ) -> None:
        super().__init__()
        for name, value in {"dim": dim, "num_layers": num_layers, "num_heads": num_heads, "cond_dim": cond_dim}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected a number >= 1, got {value}")
        if dim % num_heads or (dim // num_heads) % 2:
            raise ValueError(f"num_heads: expected a divisor of dim {dim} that leaves an even head size, got {num_heads}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a share in [0, 1), got {dropout}")
        self.head_dim = dim // num_heads
        self.checkpoint_activations = (
            False  # in training: keep each block's input alone, and compute the block again in the backward
        )
        self.blocks = nn.ModuleList(Block(dim, num_heads, dropout, causal=causal, cond_dim=cond_dim) for _ in range(num_layers))

    def forward(self, x: torch.Tensor, condition: torch.Tensor | None = None, extension: Extension | None = None) -> torch.Tensor:
        rotary = Rotary(x.shape[1], self.head_dim, x.device, 0 if extension is None else extension.start)
        for layer, block in enumerate(self.blocks):
            append = None if extension is None else partial(extension.append, layer)
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, rotary, condition, append, use_reentrant=False)
            else:
                x = block(x, rotary, condition, append)
        return x


def check_ids(name: str, tokens: torch.Tensor, count: int) -> None:
    """int64 ids in 0 .. count - 1, or a ValueError. On CUDA looking would make the host wait: the embedding checks."""
    if tokens.dtype != torch.int64 or tokens.dim() != 2:
        raise ValueError(f"{name}: expected int64 tokens [B, L], got {tokens.dtype} {list(tokens.shape)}")
    if tokens.device.type == "cpu" and tokens.numel():
        low, high = (int(x) for x in tokens.aminmax())
        if low < 0 or high >= count:
            raise ValueError(f"{name}: expected ids in 0 .. {count - 1}, got {low if low < 0 else high}")
