"""Log-probabilities of given tokens, without a vocabulary-sized result: ``gather_log_probs``.

Kernels: csrc/cpu/log_probs.cpp, csrc/cuda/log_probs.cu.

Differentiable, recomputing in the backward; sums are float32 or wider whatever the dtype of the logits.
"""

from __future__ import annotations

import math

import torch

from ._library import (
    check_invalid,
    check_logits,
    check_number,
    check_tensor,
    define_op,
    first_of,
    forbidden_ids,
    refuse_forward_mode,
    register_backward,
    unit_stride,
)

_CHUNK_BYTES = 8 << 20  # of float32, at a time, in the references


def _centred(x: torch.Tensor, forbidden: torch.Tensor, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """(x - max) / temperature in float32, a copy, with forbidden columns at -inf: a shift costs no precision. And max [..., 1]."""
    x = x.float()
    if forbidden.numel():
        x = x.index_fill(-1, forbidden, -math.inf)
    top = x.amax(-1, keepdim=True)
    return (x - top) / temperature, top


def _gather_reference(
    logits: torch.Tensor, tokens: torch.Tensor, temperature: float, forbidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[B, L, V], [B, L, K] -> log_probs [B, L, K], stats [B, L, 2], invalid [1]: the first row with a bad id, or -1.

    stats: the row's maximum, and the log of the sum of exp((x - maximum) / temperature).
    """
    vocab_size = logits.shape[-1]
    rows, ids = logits.flatten(0, 1), tokens.flatten(0, 1)
    out = torch.empty(ids.shape, dtype=torch.float32, device=logits.device)
    stats = torch.empty(len(ids), 2, dtype=torch.float32, device=logits.device)
    invalid = first_of(((ids < 0) | (ids >= vocab_size)).any(-1))
    safe = ids.clamp(0, vocab_size - 1)
    step = max(1, _CHUNK_BYTES // (4 * vocab_size))
    for i in range(0, len(ids), step):
        at = slice(i, i + step)
        x, top = _centred(rows[at], forbidden, temperature)
        lse = x.logsumexp(-1, keepdim=True)
        out[at] = (x.gather(-1, safe[at]) - lse).clamp_max(0)
        stats[at] = torch.cat([top, lse], -1)
    return out.view(tokens.shape), stats.view(*tokens.shape[:2], 2), invalid


def _gather_fake(
    logits: torch.Tensor, tokens: torch.Tensor, temperature: float, forbidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        logits.new_empty(tokens.shape, dtype=torch.float32),
        logits.new_empty((*tokens.shape[:2], 2), dtype=torch.float32),
        tokens.new_empty(1),
    )


def _gather_backward_reference(
    grad: torch.Tensor,
    logits: torch.Tensor,
    tokens: torch.Tensor,
    stats: torch.Tensor,
    temperature: float,
    forbidden: torch.Tensor,
) -> torch.Tensor:
    """d log p_k / dx_v = (1[v = token_k] - p_v) / T, summed over k with the incoming gradients; 0 at forbidden columns.

    A row whose gradients are all 0 gets 0, whatever it holds.
    """
    rows, ids = logits.flatten(0, 1), tokens.flatten(0, 1)
    out = torch.empty(rows.shape, dtype=logits.dtype, device=logits.device)
    step = max(1, _CHUNK_BYTES // (4 * logits.shape[-1]))
    for i in range(0, len(ids), step):
        at = slice(i, i + step)
        g = grad.flatten(0, 1)[at] / temperature
        x, _ = _centred(rows[at], forbidden, temperature)
        dx = (x - stats.flatten(0, 1)[at, 1:]).exp_().mul_(-g.sum(-1, keepdim=True))
        dx.scatter_add_(-1, ids[at], g)
        if forbidden.numel():
            dx.index_fill_(-1, forbidden, 0)
        out[at] = dx.masked_fill_((g == 0).all(-1, keepdim=True), 0).to(out.dtype)
    return out.view(logits.shape)


_gather = define_op(
    "gather_log_probs(Tensor logits, Tensor tokens, float temperature, Tensor forbidden) -> (Tensor, Tensor, Tensor)",
    _gather_reference,
    _gather_fake,
)
_gather_backward = define_op(
    "gather_log_probs_backward(Tensor grad, Tensor logits, Tensor tokens, Tensor stats, float temperature, Tensor forbidden)"
    " -> Tensor",
    _gather_backward_reference,
    lambda grad, logits, tokens, stats, temperature, forbidden: logits.new_empty(logits.shape),
)


def _gather_setup(ctx, inputs, output) -> None:  # noqa: ANN001
    logits, tokens, ctx.temperature, forbidden = inputs
    ctx.save_for_backward(logits, tokens, output[1], forbidden)
    ctx.mark_non_differentiable(output[1], output[2])


def _gather_vjp(ctx, grad, _grad_stats, _grad_invalid):  # noqa: ANN001, ANN202
    logits, tokens, stats, forbidden = ctx.saved_tensors
    return _gather_backward(grad.contiguous(), logits, tokens, stats, ctx.temperature, forbidden), None, None, None


register_backward("gather_log_probs", _gather_vjp, _gather_setup)


def gather_log_probs(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    *,
    temperature: float = 1.0,
    forbidden: int | list[int] | torch.Tensor | None = None,
) -> torch.Tensor:
    """log softmax(logits / temperature) at the given tokens: log p = x_token / T - logsumexp(x / T) <= 0.

    Args:
        logits: float32, bfloat16 or float16 [..., V]. Differentiable (first order).
        tokens: int64 [...] (one a row) or [..., K].
        temperature: > 0; below 1e-30 it counts as 1e-30, above 1e30 as 1e30.
        forbidden: ids excluded from the softmax (an id, a list, or an int64 tensor [F]); their own log-probability is -inf.

    Returns:
        float32, shaped like ``tokens``, in nats; NaN in a row that holds NaN or +inf, or no finite logit.

    Raises:
        ValueError: wrong shapes, dtypes or devices; an id outside 0 .. V-1; a temperature that is not positive and finite.
    """
    name = "gather_log_probs"
    check_logits(name, logits, "[..., V]")
    refuse_forward_mode(name, logits)
    if not isinstance(tokens, torch.Tensor):
        raise ValueError(f"{name}: tokens: expected an int64 tensor, got {type(tokens).__name__}")
    lead = tuple(logits.shape[:-1])
    single = tokens.dim() == len(lead)
    shape = lead if single else (*lead, tokens.shape[-1] if tokens.dim() == len(lead) + 1 else -1)
    check_tensor(name, "tokens", tokens, torch.int64, shape, logits.device)
    check_number(name, "temperature", temperature)
    if not 0 < temperature < math.inf:
        raise ValueError(f"{name}: temperature: expected a positive, finite number, got {temperature}")
    vocab_size = logits.shape[-1]
    ids = forbidden_ids(name, forbidden, vocab_size, logits.device)
    # The op wants [B, L, V]: axes are added or merged, and only a layout that no strides can say is copied.
    rows = unit_stride(logits)
    rows = rows.flatten(0, -3) if len(lead) > 1 else rows.reshape(1, math.prod(lead), vocab_size)
    at_rows = tokens.reshape(*rows.shape[:2], 1 if single else tokens.shape[-1]).contiguous()
    out, _, invalid = _gather(rows, at_rows, float(temperature), ids)
    check_invalid(
        name,
        invalid,
        lambda row, values: f"tokens: expected ids in 0 .. {vocab_size - 1}, got {values} in row {row}",
        at_rows.flatten(0, 1),
    )
    return out.reshape(tokens.shape)
