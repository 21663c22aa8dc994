"""Log-probabilities from hidden rows and an output layer, in chunks of both: ``linear_log_probs``.

The products are torch's, a chunk at a time; what is done to a chunk is a kernel (csrc/cpu/log_probs.cpp). Differentiable, recomputing
in the backward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from ._library import (
    check_invalid,
    check_logits,
    check_tensor,
    define_op,
    first_of,
    forbidden_ids,
    refuse_forward_mode,
    register_backward,
)

# A chunk of logits: small beside a cache (the second level of a GPU's), large enough for a product; whole tiles of csrc/tiles.h.
_CHUNK_BYTES, _CHUNK_BYTES_ON_CUDA = 8 << 20, 32 << 20
_CHUNK_ROWS, _CHUNK_COLUMNS = 1024, 1 << 20  # a GPU's kernel has a row's tiles in shared memory
_TILE = 512

# running float64 [N, 3]: over the columns so far, the maximum, the sum of exp(x - maximum) and the token's logit.
# A chunk is float32 [N, C]; its tokens and forbidden ids count from its first column, and those outside it are ignored.


def _fold_reference(running: torch.Tensor, chunk: torch.Tensor, tokens: torch.Tensor, forbidden: torch.Tensor) -> None:
    columns = chunk.shape[1]
    x = chunk.index_fill(1, forbidden[(forbidden >= 0) & (forbidden < columns)], -math.inf).double()
    top = torch.maximum(running[:, :1], x.amax(1, keepdim=True))
    reference = top.masked_fill(top == -math.inf, 0.0)
    running[:, 1:2] *= (running[:, :1] - reference).exp()
    running[:, 1:2] += (x - reference).exp().sum(1, keepdim=True)
    running[:, :1] = top
    here = (tokens >= 0) & (tokens < columns)
    running[here, 2] = x[here, tokens[here]]


def _grad_reference(
    chunk: torch.Tensor, grad: torch.Tensor, tokens: torch.Tensor, stats: torch.Tensor, forbidden: torch.Tensor
) -> None:
    """The chunk becomes the gradient of its logits: grad (1[v = token] - p_v); 0 at forbidden columns."""
    columns = chunk.shape[1]
    chunk.sub_(stats[:, :1]).sub_(stats[:, 1:]).exp_().mul_(-grad[:, None])
    here = ((tokens >= 0) & (tokens < columns)).nonzero().squeeze(1)
    chunk[here, tokens[here]] += grad[here]
    chunk.index_fill_(1, forbidden[(forbidden >= 0) & (forbidden < columns)], 0)
    chunk.masked_fill_(grad[:, None] == 0, 0)


_fold = define_op(
    "linear_fold(Tensor(a!) running, Tensor chunk, Tensor tokens, Tensor forbidden) -> ()",
    _fold_reference,
    lambda running, chunk, tokens, forbidden: None,
)
_grad = define_op(
    "linear_grad(Tensor(a!) chunk, Tensor grad, Tensor tokens, Tensor stats, Tensor forbidden) -> ()",
    _grad_reference,
    lambda chunk, grad, tokens, stats, forbidden: None,
)


def _chunk_shape(n: int, vocab_size: int, device: torch.device) -> tuple[int, int]:
    """Rows and columns of a chunk of logits, at most _CHUNK_BYTES or a tile of them."""
    rows, size = max(1, min(n, _CHUNK_ROWS)), _CHUNK_BYTES_ON_CUDA if device.type == "cuda" else _CHUNK_BYTES
    return rows, min(vocab_size, _CHUNK_COLUMNS, max(_TILE, size // (4 * rows) // _TILE * _TILE))


def _product(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, buffer: torch.Tensor) -> torch.Tensor:
    out = buffer[: len(hidden) * len(weight)].view(len(hidden), len(weight))
    if bias is None:
        return torch.mm(hidden, weight.t(), out=out)
    return torch.addmm(bias, hidden, weight.t(), out=out)


def _column_chunks(
    weight: torch.Tensor, bias: torch.Tensor | None, tokens: torch.Tensor, forbidden: torch.Tensor, columns: int
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]]:
    """Where a chunk of the vocabulary lies; its weight and bias in float32; tokens and forbidden ids counted from its first column."""
    for j in range(0, weight.shape[0], columns):
        at = slice(j, j + columns)
        yield at, weight[at].float(), None if bias is None else bias[at].float(), tokens - j, forbidden - j


def _linear_forward(
    hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor, bias: torch.Tensor | None, forbidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log_probs [N], stats [N, 2] (maximum, log of the sum of exp(x - maximum)), invalid [1]."""
    n, vocab_size = hidden.shape[0], weight.shape[0]
    invalid = first_of((tokens < 0) | (tokens >= vocab_size))
    running = torch.full((n, 3), -math.inf, dtype=torch.float64, device=hidden.device)
    running[:, 1] = 0
    rows, columns = _chunk_shape(n, vocab_size, hidden.device)
    buffer = torch.empty(rows * columns, dtype=torch.float32, device=hidden.device)
    for _, w, b, ids, excluded in _column_chunks(weight, bias, tokens, forbidden, columns):
        for i in range(0, n, rows):
            at = slice(i, i + rows)
            _fold(running[at], _product(hidden[at].float(), w, b, buffer), ids[at], excluded)
    log_sum = running[:, 1].log()
    log_probs = (running[:, 2] - running[:, 0] - log_sum).clamp_max(0).float()
    return log_probs, torch.stack([running[:, 0], log_sum], 1).float(), invalid


def _linear_fake(
    hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor, bias: torch.Tensor | None, forbidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        hidden.new_empty(tokens.shape, dtype=torch.float32),
        hidden.new_empty((*tokens.shape, 2), dtype=torch.float32),
        tokens.new_empty(1),
    )


def _linear_backward_chunks(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    tokens: torch.Tensor,
    stats: torch.Tensor,
    bias: torch.Tensor | None,
    forbidden: torch.Tensor,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of hidden, weight and bias where ``needs`` says so, else empty; sums in float32, in place where that is the dtype."""
    n, vocab_size = hidden.shape[0], weight.shape[0]
    grads = _linear_backward_fake(grad, hidden, weight, tokens, stats, bias, forbidden, needs)
    to_hidden, to_weight, to_bias = (g.zero_() for g in grads)
    sum_hidden = to_hidden if hidden.dtype == torch.float32 else to_hidden.float()
    rows, columns = _chunk_shape(n, vocab_size, hidden.device)
    buffer = torch.empty(rows * columns, dtype=torch.float32, device=hidden.device)
    for columns_at, w, b, ids, excluded in _column_chunks(weight, bias, tokens, forbidden, columns):
        sum_weight, sum_bias = to_weight[columns_at].float(), to_bias[columns_at].float()
        for i in range(0, n, rows):
            at = slice(i, i + rows)
            h = hidden[at].float()
            dx = _product(h, w, b, buffer)
            _grad(dx, grad[at], ids[at], stats[at], excluded)
            if needs[0]:
                sum_hidden[at].addmm_(dx, w)
            if needs[1]:
                sum_weight.addmm_(dx.t(), h)
            if needs[2]:
                sum_bias += dx.sum(0)
        if needs[1] and sum_weight.dtype != to_weight.dtype:
            to_weight[columns_at] = sum_weight
        if needs[2] and sum_bias.dtype != to_bias.dtype:
            to_bias[columns_at] = sum_bias
    return to_hidden if sum_hidden is to_hidden else sum_hidden.to(hidden.dtype), to_weight, to_bias


def _linear_backward_fake(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    tokens: torch.Tensor,
    stats: torch.Tensor,
    bias: torch.Tensor | None,
    forbidden: torch.Tensor,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        hidden.new_empty(hidden.shape if needs[0] else (0, hidden.shape[1])),
        weight.new_empty(weight.shape if needs[1] else (0, weight.shape[1])),
        (weight if bias is None else bias).new_empty(weight.shape[0] if needs[2] else 0),
    )


_linear = define_op(
    "linear_log_probs(Tensor hidden, Tensor weight, Tensor tokens, Tensor? bias, Tensor forbidden) -> (Tensor, Tensor, Tensor)",
    _linear_forward,
    _linear_fake,
    made_of="linear_fold",
)
_linear_backward = define_op(
    "linear_log_probs_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor tokens, Tensor stats, Tensor? bias,"
    " Tensor forbidden, bool[3] needs) -> (Tensor, Tensor, Tensor)",
    _linear_backward_chunks,
    _linear_backward_fake,
    made_of="linear_grad",
)


def _linear_setup(ctx, inputs, output) -> None:  # noqa: ANN001
    hidden, weight, tokens, bias, forbidden = inputs
    ctx.save_for_backward(hidden, weight, tokens, output[1], bias, forbidden)
    ctx.mark_non_differentiable(output[1], output[2])


def _linear_vjp(ctx, grad, _grad_stats, _grad_invalid):  # noqa: ANN001, ANN202
    hidden, weight, tokens, stats, bias, forbidden = ctx.saved_tensors
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]]
    grads = _linear_backward(grad.contiguous(), hidden, weight, tokens, stats, bias, forbidden, needs)
    of_hidden, of_weight, of_bias = (g if needed else None for g, needed in zip(grads, needs, strict=True))
    return of_hidden, of_weight, None, of_bias, None


register_backward("linear_log_probs", _linear_vjp, _linear_setup)


def check_linear(
    name: str,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    tokens: torch.Tensor,
    bias: torch.Tensor | None,
    forbidden: int | list[int] | torch.Tensor | None,
) -> torch.Tensor:
    """The forbidden ids as int64 [F], after everything was found to fit."""
    check_logits(name, hidden, "[N, D]", argument="hidden", may_be_empty=True)
    check_logits(name, weight, "[V, D]", argument="weight", may_be_empty=True)
    if weight.shape[1] != hidden.shape[1] or weight.shape[0] == 0:
        raise ValueError(
            f"{name}: weight: expected the shape [V, D] with V >= 1 and D = {hidden.shape[1]}, got {list(weight.shape)}"
        )
    check_tensor(name, "weight", weight, weight.dtype, tuple(weight.shape), hidden.device)
    check_tensor(name, "tokens", tokens, torch.int64, (hidden.shape[0],), hidden.device)
    if bias is not None:
        check_logits(name, bias, "[V]", argument="bias", may_be_empty=True)
        check_tensor(name, "bias", bias, bias.dtype, (weight.shape[0],), hidden.device)
    refuse_forward_mode(name, hidden, weight, bias)
    return forbidden_ids(name, forbidden, weight.shape[0], hidden.device)


def linear_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    tokens: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    forbidden: int | list[int] | torch.Tensor | None = None,
) -> torch.Tensor:
    """log softmax(hidden @ weight.T + bias) at one token a row, in chunks of rows and vocabulary: N x V logits are never stored.

    The products are float32 whatever the dtypes (a bfloat16 product would err by nats over a sequence; on a GPU,
    ``torch.backends.cuda.matmul.allow_tf32`` applies, and costs about 1e-3 a log-probability). The backward recomputes the
    chunks, so memory beyond the gradients is O(chunk): 8 MiB of logits (32 on a GPU) and what the products need; half-precision
    inputs, and gradients of theirs, are widened a chunk at a time too (the gradient of ``hidden`` as a whole). Gradients that nobody
    needs are not computed.

    Args:
        hidden: float32, bfloat16 or float16 [N, D]. weight: [V, D]. bias: [V] or None. All differentiable (first order).
        tokens: int64 [N].
        forbidden: ids excluded from the softmax (an id, a list, or an int64 tensor [F]).

    Returns:
        float32 [N], in nats, <= 0; -inf for a forbidden token; NaN in a row whose logits hold NaN or +inf, or nothing finite.

    Raises:
        ValueError: wrong shapes, dtypes or devices; an id outside 0 .. V-1.
    """
    name = "linear_log_probs"
    ids = check_linear(name, hidden, weight, tokens, bias, forbidden)
    out, _, invalid = _linear(hidden, weight, tokens.contiguous(), bias, ids)
    last = weight.shape[0] - 1
    check_invalid(name, invalid, lambda row, value: f"tokens: expected ids in 0 .. {last}, got {value} in row {row}", tokens)
    return out
