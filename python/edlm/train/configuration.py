"""What a run is made of: the tables of a training TOML, each a dataclass."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from ..models import CausalLM, CausalLMConfig, DiT, DiTConfig, preset


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """[model]. ``preset`` gives the sizes; a size that is set replaces the preset's."""

    kind: Literal["dit", "causal_lm"]
    preset: str = "tiny"
    dim: int | None = None
    num_layers: int | None = None
    num_heads: int | None = None
    dropout: float | None = None
    cond_dim: int = 128  # dit
    time_conditioning: bool = False  # dit

    def __post_init__(self) -> None:
        preset(self.preset)
        for name in ("dim", "num_layers", "num_heads", "cond_dim"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number >= 1, got {getattr(self, name)}")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected a number in [0, 1), got {self.dropout}")

    def build(self, *, vocab_size: int, mask_token_id: int, bos_token_id: int) -> DiT | CausalLM:
        """An untrained network from torch's global generator. ``vocab_size`` counts the mask, which is the last id."""
        sizes = preset(self.preset)
        sizes |= {name: getattr(self, name) for name in sizes if getattr(self, name) is not None}
        if self.kind == "dit":
            return DiT(
                DiTConfig(
                    vocab_size=vocab_size,
                    mask_token_id=mask_token_id,
                    cond_dim=self.cond_dim,
                    time_conditioning=self.time_conditioning,
                    **sizes,
                )
            )
        return CausalLM(CausalLMConfig(vocab_size=vocab_size - 1, bos_token_id=bos_token_id, **sizes))


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """[data]. ``text`` is "bundled" or a UTF-8 file (.txt, .xz, .gz); it is split 90 / 5 / 5 in order."""

    text: str = "bundled"
    tokenizer: Literal["text8"] = "text8"
    length: int = 128

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"length: expected a number >= 1, got {self.length}")


@dataclass(frozen=True, kw_only=True)
class DiffusionSpec:
    """[diffusion], for a dit. ``t_min`` bounds the weight 1/t of the loss; the part below it is not trained on."""

    schedule: Literal["log_linear", "cosine"] = "log_linear"
    eps: float = 1e-3
    t_min: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("eps", "t_min"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number in [0, 1), got {getattr(self, name)}; 1e-3 is usual")


@dataclass(frozen=True, kw_only=True)
class OptimSpec:
    """[optim]. AdamW; the learning rate rises over ``warmup_steps`` and then follows ``decay`` to ``final_lr_ratio`` of itself."""

    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup_steps: int = 100
    decay: Literal["constant", "cosine", "linear"] = "constant"
    final_lr_ratio: float = 0.0
    grad_clip: float = 1.0
    ema_decay: float = 0.9999

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf or self.warmup_steps < 0 or not self.grad_clip > 0:
            raise ValueError(
                f"lr, warmup_steps, grad_clip: expected > 0, >= 0, > 0, got {self.lr}, {self.warmup_steps}, {self.grad_clip}"
            )
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay: expected a number >= 0, got {self.weight_decay}")
        if not 0 <= self.final_lr_ratio <= 1:
            raise ValueError(f"final_lr_ratio: expected a number in [0, 1], got {self.final_lr_ratio}")
        for name, value in (("ema_decay", self.ema_decay), ("betas[0]", self.betas[0]), ("betas[1]", self.betas[1])):
            if not 0 <= value < 1:
                raise ValueError(f"{name}: expected a number in [0, 1), got {value}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A run. Everything that it computes follows from this and the text."""

    model: ModelSpec
    data: DataSpec = field(default_factory=DataSpec)
    diffusion: DiffusionSpec = field(default_factory=DiffusionSpec)
    optim: OptimSpec = field(default_factory=OptimSpec)
    steps: int = 1000
    batch_size: int = 32
    seed: int = 0
    log_every: int = 10
    valid_every: int = 250
    valid_windows: int = 128
    checkpoint_every: int = 250
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "valid_every", "valid_windows", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number >= 1, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected a number in 0 .. 2**63 - 1, got {self.seed}")
