"""What a residual energy is asked about: the data and the proposal's own completions of one xt, with their log mu."""

from __future__ import annotations

import torch

from ..ops import gather_log_probs, sample_categorical
from ..protocols import Denoiser, offers_head

# Rows go through the head in chunks whose float32 logits, and the draws from them, stay below this.
_HEAD_BYTES = 256 << 20


@torch.no_grad()
def completions(
    proposal: Denoiser,
    x0: torch.Tensor,
    xt: torch.Tensor,
    t: torch.Tensor,
    num_completions: int,
    *,
    seeds: torch.Tensor,
    offsets: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x0 and n completions of xt ~ mu(. | xt), from one call of the proposal.

    Its head, where it offers ``hidden`` and ``head``, and the draws run on masked rows alone, in chunks: nothing of size
    B x n x L x V is made. n = 0 scores x0 alone.

    Args:
        x0: int64 [B, L] without masks. xt: int64 [B, L], x0 with some positions masked. t: floating [B], handed on as float32.
        seeds, offsets: int64 [B] (offsets may be [1]).

    Returns:
        candidates int64 [B, 1 + n, L], x0 first, and log_p float32 [B, 1 + n, L]: log mu of their tokens at masked positions, 0
        elsewhere.

    Raises:
        ValueError: a proposal that answers with another shape; logits without a probability.

    RNG: completion k as candidate k of ``sample_candidates``: Philox(seeds[b]; i, k, offsets[b], TOKEN).
    """
    mask, batch, t = proposal.mask_token_id, len(xt), t.to(torch.float32)
    output = proposal.hidden(xt, t) if offers_head(proposal) else proposal(xt, t)
    if output.dim() != 3 or output.shape[:2] != xt.shape:
        raise ValueError(f"proposal: expected [B, L, ...] = [{batch}, {xt.shape[1]}, ...], got {list(output.shape)}")
    candidates = torch.cat([x0[:, None], xt[:, None].expand(-1, num_completions, -1)], 1)
    log_p = torch.zeros(candidates.shape, dtype=torch.float32, device=x0.device)
    # Also under autocast: log mu is a sum of about a thousand terms, and bfloat16 logits would cost it as much as energies differ.
    wide = torch.is_autocast_enabled(x0.device.type)
    rows, offsets = max(1, _HEAD_BYTES // (4 * proposal.vocab_size + 16 * num_completions)), offsets.expand(batch)
    for at in (xt == mask).nonzero().split(rows):
        b, i = at.unbind(1)
        with torch.autocast(x0.device.type, enabled=False):
            picked = output[b, i].float() if wide and offers_head(proposal) else output[b, i]
            logits = proposal.head(picked) if offers_head(proposal) else picked
        if num_completions:
            drawn = sample_categorical(logits, num_completions, position=i, forbidden=mask, seed=seeds[b], offset=offsets[b])
            candidates[b, 1:, i], log_p[b, 1:, i] = drawn.tokens, drawn.log_probs
        log_p[b, 0, i] = gather_log_probs(logits, x0[b, i], forbidden=mask)
    return candidates, log_p
