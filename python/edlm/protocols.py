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

    ``max_length`` (int, or None for any): a denoiser that has it is never asked for more positions. ``prepare(number,
    rows, columns, masked)``: a denoiser that keeps something a sequence, such as a KV cache, is told before each call, on the host, the
    number of the step (0 is a new run), which sequences of the batch come (int64 [R]), which columns of them (first, one past the
    last), and where they are masked (bool [R, W]). It is not used with particles or a fixed shape.
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
    Returns energy float [B, K] in nats. What it is given is overwritten by the next step: to keep something is to copy it.

    An energy model may also offer ``score(x0, xt, t, log_p, *, masked) -> energy``, equal to the call, for those who know on the host
    which positions of xt are masked (bool [B, L] on the CPU); ``log_Z(xt) -> [B]``, log E_mu[exp(-E)] where it is known exactly and NaN
    where not; ``vocab_size``: the ids 0 .. vocab_size - 1 are read, or None; and
    ``max_length``, as a denoiser.
    """

    def __call__(self, x0: torch.Tensor, xt: torch.Tensor, t: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor: ...


@runtime_checkable
class CausalLM(Protocol):
    """An autoregressive model, as an energy or a judge sees it.

    A causal LM may also offer a KV cache: ``extend(inputs, cache=None, *, keep=True) -> (hidden, cache)`` reads the next inputs, int64
    [N, M], behind what the cache holds (the first input of all is ``bos_token_id``) and returns rows [N, M, D], of which row m predicts
    the token behind input m, and the longer cache (anything where ``keep`` is False). The cache it was given stays valid; it has
    ``rows(index) -> cache`` for int64 [N], rows repeated included. ``head(hidden_rows [N, D]) -> [N, V]`` gives the logits whose
    log-softmax ``log_probs`` scores; where it is one linear layer it may be offered as ``output_layer`` too, as a denoiser's. An
    energy then reads what K candidates have in common once. ``vocab_size``: the ids 0 .. vocab_size - 1 are read.
    """

    def log_probs(self, x0: torch.Tensor) -> torch.Tensor:
        """log p(x_i | x_<i), natural log: int64 [N, L] -> float32 [N, L]. Every token is scored, the first one included."""
        ...


def offers_cache(causal_lm: CausalLM) -> bool:
    """Whether the model reads on behind a cache: ``extend``, ``head`` and an int ``bos_token_id``."""
    parts = (getattr(causal_lm, name, None) for name in ("extend", "head"))
    return all(map(callable, parts)) and isinstance(getattr(causal_lm, "bos_token_id", None), int)


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back. ``vocab_size`` counts the mask, whose id is ``mask_token_id``; ``encode`` never returns the mask."""

    mask_token_id: int
    vocab_size: int

    def encode(self, text: str) -> Sequence[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...
