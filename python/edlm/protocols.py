"""The types that rooms share. A leaf: it imports nothing of ours, and nothing here needs a base class.

Any object that fits is accepted: a function with two attributes is a denoiser. Letters: B batch, K candidates, L positions,
V vocabulary, N rows (docs/notation.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch


@runtime_checkable
class Denoiser(Protocol):
    """The proposal mu(x0 | xt): one vector of logits for every position, in one call.

    ``xt`` int64 [B, L] holds ``mask_token_id`` where nothing is known yet; ``t`` float [B] is the diffusion time in [0, 1].
    Returns logits [B, L, V], V = ``vocab_size`` with the mask's column included; what that column holds is ignored.

    A denoiser may also offer ``hidden(xt, t) -> [B, L, D]`` and ``head(hidden_rows [N, D]) -> [N, V]`` with
    ``head(hidden(xt, t))`` equal to the call itself; ``generate`` then runs the head on the rows that it draws, and on no others.
    Where the head is one linear layer it may be offered as ``output_layer`` too (``weight`` [V, D], ``bias`` [V] or None): the losses
    then score tokens without ever storing logits.
    """

    mask_token_id: int
    vocab_size: int

    def __call__(self, xt: torch.Tensor, t: torch.Tensor) -> torch.Tensor: ...


def offers_head(denoiser: Denoiser) -> bool:
    """Whether the denoiser comes in two halves, ``hidden`` and ``head``. Other attributes of these names do not count."""
    return callable(getattr(denoiser, "hidden", None)) and callable(getattr(denoiser, "head", None))


@runtime_checkable
class EnergyModel(Protocol):
    """The residual energy E(x0, xt, t) of K completed candidates a sequence. Low energy is good.

    ``x0`` int64 [B, K, L]: candidates, equal to ``xt`` where ``xt`` is not masked. ``xt`` int64 [B, L]; ``t`` float [B].
    ``log_p`` float32 [B, K, L]: log mu of each candidate's token under the untempered, unfiltered proposal, 0 at clean positions.
    Returns energy float [B, K] in nats.
    """

    def __call__(self, x0: torch.Tensor, xt: torch.Tensor, t: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor: ...


@runtime_checkable
class CausalLM(Protocol):
    """An autoregressive model, as an energy or a judge sees it."""

    def log_probs(self, x0: torch.Tensor) -> torch.Tensor:
        """log p(x_i | x_<i), natural log: int64 [N, L] -> float32 [N, L]. Every token is scored, the first one included."""
        ...


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back. ``vocab_size`` counts the mask, whose id is ``mask_token_id``; ``encode`` never returns the mask."""

    mask_token_id: int
    vocab_size: int

    def encode(self, text: str) -> Sequence[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...
