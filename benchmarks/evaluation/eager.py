"""The likelihoods of ``edlm.eval`` as research code evaluates them, in eager PyTorch: what they are compared with.

Written for this comparison from how code of that line of work goes about it (MDLM, Sahoo et al., arXiv 2406.07524): t uniform in
[t_min, 1], each position masked by itself with probability t, the logits [B, L, V] of every position, all of them normalised in
float32, one of each row gathered, the masked ones summed with weight 1/t.

Repaired, so that both sides do the same job:
- the rows of a batch share [t_min, 1] among them, row i of n always the i-th n-th there, so that a sequence's own estimate is biased by
  its place in the batch; here the draws of one sequence share it, or (``batch_times``) the sequences of a batch in an order of chance.
  One draw alone is uniform in all of it;
- the mask probability is t, not (1 - 1e-3) t, whose NELBO lacks the noisiest times.

Kept: t_min = 1e-3, below which the weight 1/t is cut off. Left out, where it only costs time: writing clean positions into the
log-probabilities. torch's own generator draws; a network is used in the mode that it is in.
"""

from __future__ import annotations

import torch
from edlm.protocols import Denoiser

T_MIN = 1e-3


def draw_times(sequences: int, draws: int, t_min: float, device: torch.device) -> torch.Tensor:
    """float32 [sequences, draws], stratified over the draws."""
    u = (torch.rand(sequences, draws, device=device) + torch.arange(draws, device=device)) / draws
    return (1 - t_min) * u + t_min


def batch_times(batches: int, rows: int, t_min: float, device: torch.device) -> torch.Tensor:
    """float32 [batches * rows, 1]: a draw a sequence, stratified over the rows of each batch."""
    t = draw_times(batches, rows, t_min, device)
    return t.gather(1, torch.rand_like(t).argsort(1)).view(-1, 1)


def corrupt(x0: torch.Tensor, t: torch.Tensor, mask: int) -> torch.Tensor:
    return torch.where(torch.rand(x0.shape, device=x0.device) < t[:, None], mask, x0)


@torch.no_grad()
def weighted_nats(denoiser: Denoiser, x0: torch.Tensor, xt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """(1/t) sum over masked i of -log mu_i(x0_i | xt): float32 [B]."""
    logits, mask = denoiser(xt, t).float(), denoiser.mask_token_id
    logits[..., mask] = -torch.inf
    log_p = logits.log_softmax(-1).gather(-1, x0[..., None]).squeeze(-1)
    return -(log_p * (xt == mask)).sum(1) / t


def nelbo(denoiser: Denoiser, x0: torch.Tensor, times: torch.Tensor, *, batch_size: int = 64) -> torch.Tensor:
    """[N, L] and times [N, draws] -> [N]: nats per token of each sequence; ``batch_size`` rows (sequence, draw) a call."""
    rows = x0.repeat_interleave(times.shape[1], 0)
    parts = zip(rows.split(batch_size), times.flatten().split(batch_size), strict=True)
    nats = [weighted_nats(denoiser, x, corrupt(x, t, denoiser.mask_token_id), t) for x, t in parts]
    return torch.cat(nats).view(times.shape).mean(1) / x0.shape[1]


@torch.no_grad()
def ar_nll(causal_lm: torch.nn.Module, x0: torch.Tensor, *, batch_size: int = 64) -> torch.Tensor:
    """[N, L] -> [N]: nats per token. ``causal_lm(x0)``: logits [N, L, V], those at position i predicting x0[:, i]."""
    return torch.cat([-causal_lm(x).log_softmax(-1).gather(-1, x[..., None]).mean((1, 2)) for x in x0.split(batch_size)])
