"""SUBS: a denoiser's logits as the log-probabilities of x0 given xt, over the whole vocabulary."""

from __future__ import annotations

import math

import torch


def subs_log_probs(logits: torch.Tensor, xt: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """log mu(x0_i = v | xt): never the mask, and a clean position is its own token.

    At a masked position: log_softmax over every column but the mask's, which is -inf. At a clean one: 0 at xt_i, -inf elsewhere
    (logits there are ignored). It makes a [B, L, V] tensor, so it is for tests, teaching and small vocabularies: the decode loop
    and the losses never call it.

    Args:
        logits: floating [B, L, V]. xt: int64 [B, L]. mask_token_id: in 0 .. V-1.

    Returns:
        float32 [B, L, V] (float64 for float64 logits), in nats.

    Raises:
        ValueError: wrong shapes or dtypes; a mask outside the vocabulary.

    Source: Sahoo et al., arXiv 2406.07524 (SUBS parameterisation).
    """
    if logits.dim() != 3 or not logits.is_floating_point():
        raise ValueError(f"logits: expected a floating tensor [B, L, V], got {logits.dtype} {list(logits.shape)}")
    if xt.dtype != torch.int64 or xt.shape != logits.shape[:2]:
        raise ValueError(f"xt: expected int64 {list(logits.shape[:2])}, as logits has it, got {xt.dtype} {list(xt.shape)}")
    if not 0 <= mask_token_id < logits.shape[2]:
        raise ValueError(
            f"mask_token_id: expected an id in 0 .. {logits.shape[2] - 1}, got {mask_token_id}; V counts the mask's column"
        )
    x = logits if logits.dtype == torch.float64 else logits.float()
    column = torch.arange(logits.shape[2], device=logits.device)
    # -inf before the softmax, not after: the mask must take no share of the mass, however large its logit.
    log_probs = x.masked_fill(column == mask_token_id, -math.inf).log_softmax(-1)
    carried = torch.where(column == xt[..., None], 0.0, -math.inf).to(x.dtype)
    return torch.where((xt == mask_token_id)[..., None], log_probs, carried)
