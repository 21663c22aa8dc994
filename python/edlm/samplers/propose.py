"""K candidates from one denoiser call: the head and the sampler see the rows that are wanted, and no others where the model allows."""

from __future__ import annotations

import math

import torch

from ..ops import Candidates, sample_candidates, sample_categorical
from ..protocols import Denoiser, offers_head
from .upload import upload

# Rows go through the head in chunks whose float32 logits stay below this.
_HEAD_BYTES = 64 << 20


def denoise(denoiser: Denoiser, xt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The network, once: hidden [B, L, D] where it offers ``hidden`` and ``head``, logits [B, L, V] otherwise."""
    if offers_head(denoiser):
        return denoiser.hidden(xt, t)
    logits = denoiser(xt, t)
    expected = (*xt.shape, denoiser.vocab_size)
    if not isinstance(logits, torch.Tensor) or tuple(logits.shape) != expected:
        got = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ValueError(f"denoiser: expected logits [B, L, V] = {list(expected)}, got {got}")
    return logits


class Proposal:
    """Draws from mu, tempered and filtered, into buffers that are allocated once.

    ``compact``: the rows that are wanted are known on the host and picked out, and nothing else is computed. Otherwise every row goes
    through the head, and all shapes are the same whatever is wanted, as a CUDA graph needs it. Both give the same draws: a row's
    counter knows its sequence and position, not where its logits lie.
    """

    def __init__(self, denoiser: Denoiser, compact: bool, **filters: float | int | None) -> None:
        self.denoiser, self.compact, self.filters = denoiser, compact, filters
        self.shaped = filters["temperature"] != 1 or any(filters[name] is not None for name in ("top_k", "top_p", "min_p"))
        self._buffers: dict[object, torch.Tensor] = {}

    def draw(
        self,
        output: torch.Tensor,
        xt: torch.Tensor,
        active: torch.Tensor,
        num_candidates: int,
        *,
        seed: torch.Tensor,
        offset: torch.Tensor,
    ) -> Candidates:
        """Draw the active masked rows of xt, K times each, from what ``denoise`` returned. What comes is overwritten by the next draw.

        active: bool [B, L], on the CPU where ``compact``, on the device otherwise. seed, offset: int64 [B].
        """
        mask = self.denoiser.mask_token_id
        if not offers_head(self.denoiser):
            active = upload(active, xt.device) if self.compact else active
            return sample_candidates(output, xt, mask, num_candidates, active=active, seed=seed, offset=offset, **self.filters)
        candidates = self._candidates(xt, num_candidates)
        if self.compact:
            b, i = (upload(index, xt.device) for index in active.nonzero(as_tuple=True))
            rows = max(1, _HEAD_BYTES // (4 * self.denoiser.vocab_size))
            for b_chunk, i_chunk in zip(b.split(rows), i.split(rows), strict=True):
                drawn = sample_categorical(
                    self.denoiser.head(output[b_chunk, i_chunk]),
                    num_candidates,
                    position=i_chunk,
                    forbidden=mask,
                    seed=seed[b_chunk],
                    offset=offset[b_chunk],
                    **self.filters,
                )
                candidates.tokens[b_chunk, :, i_chunk] = drawn.tokens
                candidates.log_probs[b_chunk, :, i_chunk] = drawn.log_probs
                if self.shaped:
                    candidates.model_log_probs[b_chunk, :, i_chunk] = drawn.model_log_probs
            return candidates
        batch, length = xt.shape
        sequences = max(1, _HEAD_BYTES // (4 * self.denoiser.vocab_size * length))
        for first in range(0, batch, sequences):
            part = slice(first, first + sequences)
            logits = self.denoiser.head(output[part].flatten(0, 1)).view(-1, length, self.denoiser.vocab_size)
            drawn = sample_candidates(
                logits, xt[part], mask, num_candidates, active=active[part], seed=seed[part], offset=offset[part], **self.filters
            )
            candidates.tokens[part], candidates.log_probs[part] = drawn.tokens, drawn.log_probs
            if self.shaped:
                candidates.model_log_probs[part] = drawn.model_log_probs
        return candidates

    def _candidates(self, xt: torch.Tensor, num_candidates: int) -> Candidates:
        """xt K times with log-probabilities 0, in the buffers."""
        batch, length = xt.shape
        shape, names = (batch, num_candidates, length), ("log_probs", "model_log_probs") if self.shaped else ("log_probs",)
        tokens = self._buffer("tokens", shape, torch.int64, xt.device).copy_(xt[:, None])
        logs = [self._buffer(name, shape, torch.float32, xt.device).zero_() for name in names]
        return Candidates(tokens, logs[0], logs[-1])

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Of that shape, at the start of a buffer as large as ever was asked for; for a graph, in one that keeps its address."""
        key, size = name if self.compact else (name, shape), math.prod(shape)
        if key not in self._buffers or self._buffers[key].numel() < size:
            self._buffers[key] = torch.empty(size, dtype=dtype, device=device)
        return self._buffers[key][:size].view(shape)
