"""K candidates from one denoiser call: the head and the sampler see the rows that are wanted, and no others where the model allows."""

from __future__ import annotations

import torch

from ..ops import Candidates, sample_candidates, sample_categorical
from ..protocols import Denoiser, offers_head

# Rows go through the head in chunks whose float32 logits stay below this.
_HEAD_BYTES = 256 << 20


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


def propose(
    denoiser: Denoiser,
    output: torch.Tensor,
    xt: torch.Tensor,
    active: torch.Tensor,
    num_candidates: int,
    *,
    seed: torch.Tensor,
    offset: int,
    **proposal: float | int | None,
) -> Candidates:
    """Draw the active masked rows of xt, K times each, from what ``denoise`` returned. ``active`` is a CPU tensor [B, L].

    Both routes give the same draws: a row's counter knows its sequence and position, not where its logits lie.
    """
    mask = denoiser.mask_token_id
    if not offers_head(denoiser):
        active = active.to(xt.device, non_blocking=True)
        return sample_candidates(output, xt, mask, num_candidates, active=active, seed=seed, offset=offset, **proposal)

    b, i = (index.to(xt.device, non_blocking=True) for index in active.nonzero(as_tuple=True))
    tokens = xt[:, None].repeat(1, num_candidates, 1)
    log_probs = torch.zeros(tokens.shape, dtype=torch.float32, device=xt.device)
    model_log_probs = log_probs
    rows = max(1, _HEAD_BYTES // (4 * denoiser.vocab_size))
    for b_chunk, i_chunk in zip(b.split(rows), i.split(rows), strict=True):
        logits = denoiser.head(output[b_chunk, i_chunk])
        drawn = sample_categorical(
            logits, num_candidates, position=i_chunk, forbidden=mask, seed=seed[b_chunk], offset=offset, **proposal
        )
        tokens[b_chunk, :, i_chunk] = drawn.tokens
        log_probs[b_chunk, :, i_chunk] = drawn.log_probs
        if drawn.model_log_probs is not drawn.log_probs:
            if model_log_probs is log_probs:
                model_log_probs = torch.zeros_like(log_probs)
            model_log_probs[b_chunk, :, i_chunk] = drawn.model_log_probs
    return Candidates(tokens, log_probs, model_log_probs)
