"""CausalLM: the autoregressive model, with BOS in front, so that every token is scored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..ops import linear_cross_entropy, linear_log_probs
from .key_values import Extension, KeyValues
from .layers import LayerNorm
from .pretrained import Pretrained
from .transformer import Transformer, check_ids


@dataclass(frozen=True, kw_only=True)
class CausalLMConfig:
    """Sizes of a CausalLM. ``vocab_size`` counts the tokens that it predicts: no mask. ``bos_token_id`` may be any id, that of the
    mask or an end-of-text token included: it is only ever read. ``max_length``: the most tokens that ``sample_autoregressive`` asks
    for, as many as it was trained on; None: any."""

    vocab_size: int
    bos_token_id: int
    dim: int = 768
    num_layers: int = 12
    num_heads: int = 12
    dropout: float = 0.1
    max_length: int | None = None

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length: expected a number of tokens >= 1, or None, got {self.max_length}")
        if self.vocab_size < 1 or self.bos_token_id < 0:
            raise ValueError(
                f"vocab_size, bos_token_id: expected numbers >= 1 and >= 0, got {self.vocab_size}, {self.bos_token_id}"
            )


class CausalLM(Pretrained, nn.Module):
    """p(x) = prod_i p(x_i | BOS, x_<i): ``log_probs(x0) -> [N, L]`` scores every token, the first one included."""

    kind = "causal_lm"
    config_class = CausalLMConfig

    def __init__(self, config: CausalLMConfig) -> None:
        super().__init__()
        self.config, self.vocab_size, self.bos_token_id = config, config.vocab_size, config.bos_token_id
        self.max_length = config.max_length
        self.vocab_embed = nn.Embedding(max(config.vocab_size, config.bos_token_id + 1), config.dim)
        nn.init.normal_(self.vocab_embed.weight, std=0.02)
        self.transformer = Transformer(config.dim, config.num_layers, config.num_heads, config.dropout, causal=True)
        self.norm_final = LayerNorm(config.dim)
        self.linear = nn.Linear(config.dim, config.vocab_size, bias=False)
        nn.init.normal_(self.linear.weight, std=0.02)

    def hidden(self, x0: torch.Tensor) -> torch.Tensor:
        """int64 [N, L] -> [N, L, dim]; row i has read BOS and x_<i, and predicts x_i."""
        check_ids("x0", x0, self.vocab_size)
        bos = torch.full_like(x0[:, :1], self.config.bos_token_id)
        return self.norm_final(self.transformer(self.vocab_embed(torch.cat([bos, x0[:, :-1]], 1)[:, : x0.shape[1]])))

    def bos(self, num_rows: int, device: torch.device | str | None = None) -> torch.Tensor:
        """int64 [N, 1]: the first input of ``extend``, on the model's device unless another is named."""
        return torch.full((num_rows, 1), self.bos_token_id, device=self.linear.weight.device if device is None else device)

    @torch.no_grad()
    def extend(
        self, inputs: torch.Tensor, cache: KeyValues | None = None, *, keep: bool = True
    ) -> tuple[torch.Tensor, KeyValues | None]:
        """Reads on: the next inputs behind those that ``cache`` holds; what was read before is not computed again. No gradients.

        Read in whatever pieces, BOS and x_0 .. x_{L-2} give the rows of ``hidden(x)``, but for the last bits of matrix products.

        Args:
            inputs: int64 [N, M]; the very first one is BOS (``bos``), not a token.
            cache: of an earlier call, N rows; None at the start. It is not changed, and may be extended again.
            keep: False where nothing will be read behind these inputs: their keys and values are then not stored, and the cache that
                is returned is None.

        Returns:
            hidden [N, M, dim], whose row m predicts the token that follows input m (``head`` gives its logits), and the cache
            with these inputs in it: 2 x num_layers x dim numbers a position and row.

        Raises:
            ValueError: no int64 [N, M]; on a CPU an id that is neither a token nor BOS; a cache of another number of rows.
        """
        check_ids("inputs", inputs.masked_fill(inputs == self.bos_token_id, 0), self.vocab_size)
        if cache is not None and cache.num_rows != len(inputs):
            raise ValueError(
                f"cache: expected one of {len(inputs)} rows, as inputs has, got {cache.num_rows}; cache.rows(index) takes rows"
            )
        extension = Extension(cache, inputs.shape[1], keep)
        hidden = self.norm_final(self.transformer(self.vocab_embed(inputs), extension=extension))
        return hidden, extension.result()

    @property
    def output_layer(self) -> nn.Linear:
        """The head, for those who need no logits (``edlm.ops.linear_log_probs``)."""
        return self.linear

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., dim] -> logits [..., V]."""
        return self.linear(hidden)

    def forward(self, x0: torch.Tensor) -> torch.Tensor:
        """int64 [N, L] -> logits [N, L, V]; logits[:, i] predict x0[:, i]."""
        return self.head(self.hidden(x0))

    def log_probs(self, x0: torch.Tensor) -> torch.Tensor:
        """log p(x_i | x_<i), natural log: int64 [N, L] -> float32 [N, L], differentiable. N x L x V logits are never stored."""
        hidden = self.hidden(x0)
        return linear_log_probs(hidden.flatten(0, 1), self.linear.weight, x0.flatten()).view(x0.shape)

    def nll(self, x0: torch.Tensor) -> torch.Tensor:
        """-log p of all tokens, summed: int64 [N, L] -> float32 scalar in nats, for training: its gradients cost least."""
        hidden = self.hidden(x0)
        return linear_cross_entropy(hidden.flatten(0, 1), self.linear.weight, x0.flatten())
