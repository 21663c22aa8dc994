"""Log-probabilities of given tokens, without a vocabulary-sized result: ``gather_log_probs`` and ``linear_log_probs``.

Both are differentiable and recompute in the backward; both accumulate in float32 or wider whatever the input's dtype.
"""

from __future__ import annotations

import math

import torch

from ._library import check_invalid, check_logits, check_tensor, define_op, forbidden_ids, register_backward

# A chunk of rows whose float32 logits take about this much: large enough for a matrix product, small enough for a cache level.
_CHUNK_BYTES = 16 << 20


def _rows_per_chunk(columns: int) -> int:
    return max(1, _CHUNK_BYTES // (4 * columns))


def _centred(x: torch.Tensor, forbidden: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """(x - max) / temperature in float32, a copy, with forbidden columns at -inf: a shift costs no precision."""
    x = x.float()
    if forbidden.numel():
        x = x.index_fill(-1, forbidden, -math.inf)
    return (x - x.amax(-1, keepdim=True)) / temperature


# --- gather_log_probs -----------------------------------------------------------------------------------------------------------


def _gather_reference(
    logits: torch.Tensor, tokens: torch.Tensor, temperature: float, forbidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[N, V], [N, K] -> log_probs [N, K], lse [N] of the centred logits, invalid [1]: the first row with a bad id, or -1."""
    n, vocab_size = logits.shape
    out = torch.empty(tokens.shape, dtype=torch.float32, device=logits.device)
    lse = torch.empty(n, dtype=torch.float32, device=logits.device)
    bad = ((tokens < 0) | (tokens >= vocab_size)).any(-1)
    invalid = torch.where(bad.any(), bad.long().argmax() if n else 0, -1).reshape(1)
    safe = tokens.clamp(0, vocab_size - 1)
    step = _rows_per_chunk(vocab_size)
    for i in range(0, n, step):
        rows = slice(i, i + step)
        x = _centred(logits[rows], forbidden, temperature)
        lse[rows] = x.logsumexp(-1)
        out[rows] = (x.gather(-1, safe[rows]) - lse[rows, None]).clamp_max(0)
    return out, lse, invalid


def _gather_fake(
    logits: torch.Tensor, tokens: torch.Tensor, temperature: float, forbidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        logits.new_empty(tokens.shape, dtype=torch.float32),
        logits.new_empty(logits.shape[:1], dtype=torch.float32),
        tokens.new_empty(1),
    )


def _gather_backward_reference(
    grad: torch.Tensor,
    logits: torch.Tensor,
    tokens: torch.Tensor,
    lse: torch.Tensor,
    temperature: float,
    forbidden: torch.Tensor,
) -> torch.Tensor:
    """d log p_k / dx_v = (1[v = token_k] - p_v) / T, summed over k with the incoming gradients; 0 at forbidden columns."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    step = _rows_per_chunk(logits.shape[1])
    for i in range(0, logits.shape[0], step):
        rows = slice(i, i + step)
        g = grad[rows] / temperature
        x = _centred(logits[rows], forbidden, temperature)
        dx = (x - lse[rows, None]).exp_().mul_(-g.sum(-1, keepdim=True))
        dx.scatter_add_(-1, tokens[rows], g)
        if forbidden.numel():
            dx.index_fill_(-1, forbidden, 0)
        out[rows] = dx.to(out.dtype)
    return out


_gather = define_op(
    "gather_log_probs(Tensor logits, Tensor tokens, float temperature, Tensor forbidden) -> (Tensor, Tensor, Tensor)",
    _gather_reference,
    _gather_fake,
)
_gather_backward = define_op(
    "gather_log_probs_backward(Tensor grad, Tensor logits, Tensor tokens, Tensor lse, float temperature, Tensor forbidden)"
    " -> Tensor",
    _gather_backward_reference,
    lambda grad, logits, tokens, lse, temperature, forbidden: logits.new_empty(logits.shape),
)


def _gather_setup(ctx, inputs, output) -> None:  # noqa: ANN001
    logits, tokens, ctx.temperature, forbidden = inputs
    ctx.save_for_backward(logits, tokens, output[1], forbidden)
    ctx.mark_non_differentiable(output[1], output[2])


def _gather_vjp(ctx, grad, _grad_lse, _grad_invalid):  # noqa: ANN001, ANN202
    logits, tokens, lse, forbidden = ctx.saved_tensors
    return _gather_backward(grad.contiguous(), logits, tokens, lse, ctx.temperature, forbidden), None, None, None


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
        temperature: > 0.
        forbidden: ids excluded from the softmax (an id, a list, or an int64 tensor [F]); their own log-probability is -inf.

    Returns:
        float32, shaped like ``tokens``, in nats; NaN in a row that holds NaN or +inf, or no finite logit.

    Raises:
        ValueError: wrong shapes, dtypes or devices; an id outside 0 .. V-1; a temperature that is not positive and finite.
    """
    name = "gather_log_probs"
    check_logits(name, logits, "[..., V]")
    if not isinstance(tokens, torch.Tensor):
        raise ValueError(f"{name}: tokens: expected an int64 tensor, got {type(tokens).__name__}")
    lead = tuple(logits.shape[:-1])
    single = tokens.dim() == len(lead)
    shape = lead if single else (*lead, tokens.shape[-1] if tokens.dim() == len(lead) + 1 else -1)
    check_tensor(name, "tokens", tokens, torch.int64, shape, logits.device)
    if not 0 < temperature < math.inf:
        raise ValueError(f"{name}: temperature: expected a positive, finite number, got {temperature}")
    vocab_size = logits.shape[-1]
    ids = forbidden_ids(name, forbidden, vocab_size, logits.device)
    flat = tokens.reshape(-1, 1) if single else tokens.reshape(-1, tokens.shape[-1])
    out, _, invalid = _gather(logits.reshape(-1, vocab_size), flat, float(temperature), ids)
    check_invalid(
        name, invalid, lambda row: f"tokens: expected ids in 0 .. {vocab_size - 1}, got {flat[row].tolist()} in row {row}"
    )
    return out.reshape(tokens.shape)


# --- linear_log_probs -----------------------------------------------------------------------------------------------------------


def _linear_logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, forbidden: torch.Tensor
) -> torch.Tensor:
    x = hidden.float() @ weight.float().t()
    if bias is not None:
        x += bias.float()
    return _centred(x, forbidden)


def _linear_reference(
    hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor, bias: torch.Tensor | None, forbidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n, vocab_size = hidden.shape[0], weight.shape[0]
    out = torch.empty(n, dtype=torch.float32, device=hidden.device)
    lse = torch.empty(n, dtype=torch.float32, device=hidden.device)
    bad = (tokens < 0) | (tokens >= vocab_size)
    invalid = torch.where(bad.any(), bad.long().argmax() if n else 0, -1).reshape(1)
    safe = tokens.clamp(0, vocab_size - 1)
    step = _rows_per_chunk(vocab_size)
    for i in range(0, n, step):
        rows = slice(i, i + step)
        x = _linear_logits(hidden[rows], weight, bias, forbidden)
        lse[rows] = x.logsumexp(-1)
        out[rows] = (x.gather(-1, safe[rows, None]).squeeze(-1) - lse[rows]).clamp_max(0)
    return out, lse, invalid


def _linear_fake(
    hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor, bias: torch.Tensor | None, forbidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        hidden.new_empty(tokens.shape, dtype=torch.float32),
        hidden.new_empty(tokens.shape, dtype=torch.float32),
        tokens.new_empty(1),
    )


def _linear_backward_reference(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    tokens: torch.Tensor,
    lse: torch.Tensor,
    bias: torch.Tensor | None,
    forbidden: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_hidden = torch.empty_like(hidden)
    grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
    grad_bias = torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device)
    step = _rows_per_chunk(weight.shape[0])
    for i in range(0, hidden.shape[0], step):
        rows = slice(i, i + step)
        x = _linear_logits(hidden[rows], weight, bias, forbidden)
        dx = (x - lse[rows, None]).exp_().mul_(-grad[rows, None])
        dx.scatter_add_(-1, tokens[rows, None], grad[rows, None])
        if forbidden.numel():
            dx.index_fill_(-1, forbidden, 0)
        grad_hidden[rows] = (dx @ weight.float()).to(hidden.dtype)
        grad_weight.addmm_(dx.t(), hidden[rows].float())
        grad_bias += dx.sum(0)
    return grad_hidden, grad_weight.to(weight.dtype), grad_bias if bias is None else grad_bias.to(bias.dtype)


_linear = define_op(
    "linear_log_probs(Tensor hidden, Tensor weight, Tensor tokens, Tensor? bias, Tensor forbidden) -> (Tensor, Tensor, Tensor)",
    _linear_reference,
    _linear_fake,
)
_linear_backward = define_op(
    "linear_log_probs_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor tokens, Tensor lse, Tensor? bias,"
    " Tensor forbidden) -> (Tensor, Tensor, Tensor)",
    _linear_backward_reference,
    lambda grad, hidden, weight, tokens, lse, bias, forbidden: (
        torch.empty_like(hidden),
        torch.empty_like(weight),
        weight.new_empty(weight.shape[0], dtype=torch.float32 if bias is None else bias.dtype),
    ),
)


def _linear_setup(ctx, inputs, output) -> None:  # noqa: ANN001
    hidden, weight, tokens, bias, forbidden = inputs
    ctx.save_for_backward(hidden, weight, tokens, output[1], bias, forbidden)
    ctx.mark_non_differentiable(output[1], output[2])


def _linear_vjp(ctx, grad, _grad_lse, _grad_invalid):  # noqa: ANN001, ANN202
    hidden, weight, tokens, lse, bias, forbidden = ctx.saved_tensors
    grads = _linear_backward(grad.contiguous(), hidden, weight, tokens, lse, bias, forbidden)
    return grads[0], grads[1], None, None if bias is None else grads[2], None


register_backward("linear_log_probs", _linear_vjp, _linear_setup)


def linear_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    tokens: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    forbidden: int | list[int] | torch.Tensor | None = None,
) -> torch.Tensor:
    """log softmax(hidden @ weight.T + bias) at one token a row, in chunks of rows: N x V logits are never stored.

    The products are float32 whatever the dtypes (a bfloat16 product would err by nats over a sequence). The backward recomputes the
    chunks, so memory beyond the gradients is O(chunk): about 16 MiB of logits and what the products need.

    Args:
        hidden: float32, bfloat16 or float16 [N, D]. weight: [V, D]. bias: [V] or None. All differentiable (first order).
        tokens: int64 [N].
        forbidden: ids excluded from the softmax (an id, a list, or an int64 tensor [F]).

    Returns:
        float32 [N], in nats, <= 0.

    Raises:
        ValueError: wrong shapes, dtypes or devices; an id outside 0 .. V-1.
    """
    name = "linear_log_probs"
    floating = (torch.float32, torch.bfloat16, torch.float16)
    if hidden.dim() != 2 or hidden.dtype not in floating:
        raise ValueError(f"{name}: hidden: expected a floating tensor [N, D], got {hidden.dtype} {list(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or weight.shape[0] == 0 or weight.dtype not in floating:
        raise ValueError(
            f"{name}: weight: expected a floating tensor [V, D] with D = {hidden.shape[1]}, got {weight.dtype} {list(weight.shape)}"
        )
    check_tensor(name, "weight", weight, weight.dtype, tuple(weight.shape), hidden.device)
    check_tensor(name, "tokens", tokens, torch.int64, (hidden.shape[0],), hidden.device)
    if bias is not None:
        check_tensor(name, "bias", bias, bias.dtype, (weight.shape[0],), hidden.device)
    ids = forbidden_ids(name, forbidden, weight.shape[0], hidden.device)
    out, _, invalid = _linear(hidden, weight, tokens, bias, ids)
    check_invalid(
        name, invalid, lambda row: f"tokens: expected ids in 0 .. {weight.shape[0] - 1}, got {int(tokens[row])} in row {row}"
    )
    return out
