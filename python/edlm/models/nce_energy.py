"""NCEEnergy: a bidirectional network that reads xt and a candidate x0 and answers with one number; see ``diffusion.nce_loss``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import nn

from .dit import DiT
from .layers import LayerNorm, Modulation, TimestepEmbedding, modulate
from .pretrained import Pretrained
from .transformer import Transformer, check_ids


@dataclass(frozen=True, kw_only=True)
class NCEEnergyConfig:
    """Sizes of an NCEEnergy: those of a DiT, and how positions become one number. ``vocab_size`` counts the mask."""

    vocab_size: int
    mask_token_id: int
    dim: int = 768
    num_layers: int = 12
    num_heads: int = 12
    cond_dim: int = 128
    dropout: float = 0.1
    time_conditioning: bool = False
    max_length: int | None = None
    pooling: Literal["sum", "mean"] = "sum"

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length: expected a number of tokens >= 1, or None, got {self.max_length}")
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(f"mask_token_id: expected an id in 0 .. {self.vocab_size - 1}, got {self.mask_token_id}")
        if self.pooling not in ("sum", "mean"):
            raise ValueError(f"pooling: expected 'sum' or 'mean', got {self.pooling!r}")


class Readout(nn.Linear):
    """[..., dim] -> [...]: one number a row, 0 at the start; float32 whatever the input's dtype, under autocast too."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 1)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # A term of 30 nats in bfloat16 is off by up to 0.06, and an energy sums hundreds of them.
        with torch.autocast(x.device.type, enabled=False):
            return nn.functional.linear(x.float(), self.weight.float(), self.bias.float()).squeeze(-1)


class NCEEnergy(Pretrained, nn.Module):
    """The residual energy of EDLM-NCE: ``NCEEnergy(config)(x0, xt, t) -> energy [B, K]`` in nats. Low energy is good.

    One table embeds xt and x0; the two are concatenated, projected to the width, and go through the DiT's blocks and its modulated
    final norm. With h_i the row of position i, M the masked positions of xt, and f an MLP:

        pooling "sum":   E = sum over i in M of f(h_i)           (the ideal energy, -log(q / mu), grows with the number of them)
        pooling "mean":  E = f(mean over i in M of h_i)          (the paper's)

    Clean positions, padding among them, take part in attention and in no pool; without a masked position E = 0 exactly. At the
    start E = 0 everywhere (the last layer is 0) and the projection is [0 | I], which passes x0's embedding through.

    ``max_bytes`` (256 MiB; an attribute): where gradients are off, candidates go through in chunks that this bounds, by
    ``bytes_per_token``; the result does not depend on it but for the last bits of matrix products. Where gradients are on all of
    them go through at once.

    Source: Xu et al., arXiv 2410.21357, section 4.
    """

    kind = "nce_energy"
    config_class = NCEEnergyConfig

    def __init__(self, config: NCEEnergyConfig) -> None:
        super().__init__()
        self.config = config
        self.mask_token_id, self.vocab_size, self.max_length = config.mask_token_id, config.vocab_size, config.max_length
        self.max_bytes = 256 << 20
        # Four bytes a number; a block's peak was measured at 12 x dim (its MLP: residual, norm, modulation, twice 4 x dim).
        self.bytes_per_token = 14 * 4 * config.dim
        self.vocab_embed = nn.Embedding(config.vocab_size, config.dim)
        nn.init.kaiming_uniform_(self.vocab_embed.weight, a=math.sqrt(5))
        self.project = nn.Linear(2 * config.dim, config.dim)
        with torch.no_grad():
            self.project.weight.copy_(torch.eye(config.dim, 2 * config.dim).roll(config.dim, 1))
            self.project.bias.zero_()
        self.sigma_map = TimestepEmbedding(config.cond_dim)
        self.transformer = Transformer(
            config.dim, config.num_layers, config.num_heads, config.dropout, causal=False, cond_dim=config.cond_dim
        )
        self.norm_final = LayerNorm(config.dim)
        self.adaLN_final = Modulation(config.cond_dim, config.dim, 2)
        self.mlp = nn.Sequential(nn.Linear(config.dim, config.dim), nn.GELU(approximate="tanh"), Readout(config.dim))

    @classmethod
    def from_denoiser(cls, dit: DiT, *, pooling: Literal["sum", "mean"] = "sum", dropout: float | None = None) -> Self:
        """An energy that starts from a trained denoiser: copies of its embeddings, blocks, time embedding, final norm and modulation.

        Args:
            dit: the proposal; it is not changed and shares nothing with the energy.
            pooling: as in the configuration. dropout: the denoiser's if left out.

        Returns:
            An NCEEnergy with E = 0, in the mode (train or eval), on the device and of the dtype of ``dit``; its
            ``tokenizer_description`` is the denoiser's.

        Raises:
            ValueError: ``dit`` is no DiT.

        RNG: torch's global generator, for the MLP's first layer.
        """
        if not isinstance(dit, DiT):
            raise ValueError(
                f"dit: expected an edlm.models.DiT, got {type(dit).__name__}; build another network's energy by hand"
            )
        sizes = vars(dit.config) | ({} if dropout is None else {"dropout": dropout})
        model = cls(NCEEnergyConfig(**sizes, pooling=pooling)).to(dit.vocab_embed.weight)
        for name in ("vocab_embed", "sigma_map", "transformer", "norm_final", "adaLN_final"):
            getattr(model, name).load_state_dict(getattr(dit, name).state_dict())
        model.tokenizer_description = dit.tokenizer_description
        return model.train(dit.training)

    def hidden(self, x0: torch.Tensor, xt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """int64 [N, L] twice, floating [N] in [0, 1] -> [N, L, dim]: every position's row, before pooling."""
        # Conditioned on sigma as the denoiser is (DiT.hidden), whose time embedding this may have been.
        sigma = (
            -torch.log1p(-(1 - 1e-3) * t.float()) if self.config.time_conditioning else torch.zeros_like(t, dtype=torch.float32)
        )
        condition = nn.functional.silu(self.sigma_map(sigma))
        x = self.project(torch.cat([self.vocab_embed(xt), self.vocab_embed(x0)], -1))
        return modulate(self.norm_final(self.transformer(x, condition)), *self.adaLN_final(condition))

    def _score(self, x0: torch.Tensor, xt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """int64 [N, L] twice, floating [N] -> float32 [N]."""
        hidden, masked = self.hidden(x0, xt, t), xt == self.mask_token_id
        if self.config.pooling == "sum":
            # Every position, though clean ones are dropped: a fixed shape, for a share of 1 / (12 num_layers) of the blocks' work.
            return self.mlp(hidden).masked_fill(~masked, 0.0).sum(-1, dtype=torch.float64).float()
        count = masked.sum(-1)
        pooled = hidden.masked_fill(~masked[..., None], 0.0).sum(1, dtype=torch.float32) / count.clamp_min(1)[:, None]
        return self.mlp(pooled.to(hidden.dtype)).masked_fill(count == 0, 0.0)

    def forward(self, x0: torch.Tensor, xt: torch.Tensor, t: torch.Tensor, log_p: torch.Tensor | None = None) -> torch.Tensor:
        """Energies of K candidates a sequence, in nats; differentiable where gradients are on.

        Args:
            x0: int64 [B, K, L], complete, equal to xt where xt is not masked. xt: int64 [B, L]. t: floating [B] in [0, 1], used with
                ``time_conditioning`` alone. log_p: not used; [B, K, L] where it is given, as ``edlm.protocols.EnergyModel`` has it.

        Returns:
            float32 [B, K], under autocast too. Sums over positions are float64 (pooling "sum") or float32 ("mean").

        Raises:
            ValueError: shapes or dtypes that do not fit; on a CPU, ids outside the vocabulary, a mask left in x0, an x0 that
                contradicts xt; where gradients are off, a network in train mode (dropout would be part of the energy).
        """
        self._check(x0, xt, t, log_p)
        batch, k, length = x0.shape
        rows, owner = x0.reshape(batch * k, length), torch.arange(batch, device=x0.device).repeat_interleave(k)
        if torch.is_grad_enabled():
            return self._score(rows, xt[owner], t[owner]).view(batch, k)
        if any(module.training for module in self.modules()):
            raise ValueError("energy: expected a network in eval mode where gradients are off, got train mode; call eval() first")
        if self.max_bytes < 1:
            raise ValueError(f"max_bytes: expected a number >= 1, got {self.max_bytes}")
        chunk = max(1, self.max_bytes // max(1, self.bytes_per_token * length))
        energy = torch.empty(batch * k, dtype=torch.float32, device=x0.device)
        for first in range(0, batch * k, chunk):
            part = slice(first, first + chunk)
            energy[part] = self._score(rows[part], xt[owner[part]], t[owner[part]])
        return energy.view(batch, k)

    def _check(self, x0: torch.Tensor, xt: torch.Tensor, t: torch.Tensor, log_p: torch.Tensor | None) -> None:
        if x0.dim() != 3 or tuple(xt.shape) != (x0.shape[0], x0.shape[2]):
            raise ValueError(f"x0, xt: expected [B, K, L] and [B, L], got {list(x0.shape)} and {list(xt.shape)}")
        if log_p is not None and log_p.shape != x0.shape:
            raise ValueError(f"log_p: expected [B, K, L] = {list(x0.shape)}, or None, got {list(log_p.shape)}")
        if tuple(t.shape) != (x0.shape[0],) or not t.is_floating_point():
            raise ValueError(f"t: expected a floating tensor [B] = [{x0.shape[0]}], got {t.dtype} {list(t.shape)}")
        check_ids("x0", x0.flatten(0, 1), self.vocab_size)
        check_ids("xt", xt, self.vocab_size)
        if x0.device.type != "cpu":  # looking would make the host wait
            return
        if bool((x0 == self.mask_token_id).any()):
            raise ValueError(
                f"x0: expected complete candidates, got the mask ({self.mask_token_id}) in one; draw it a token first"
            )
        if bool(((xt != self.mask_token_id)[:, None] & (x0 != xt[:, None])).any()):
            raise ValueError(
                "x0: expected xt's tokens where xt is not masked, got others; [B, K, L] has the candidates of a "
                "sequence together, on axis 1"
            )
