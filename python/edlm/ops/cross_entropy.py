"""A loss from hidden rows and an output layer, with its gradients from the same pass: ``linear_cross_entropy``.

``linear_log_probs`` computes a chunk's logits twice, since it learns only in the backward what each row's gradient counts. A loss whose
row weights are known beforehand needs them once: three products a chunk instead of four. The kernels are those of linear.py.
"""

from __future__ import annotations

import math

import torch

from ._library import check_invalid, check_tensor, define_op, first_of, register_backward
from .linear import _fold, _grad, _product, check_linear

# A chunk of whole rows of logits. Larger than linear.py's: each one reads the weight three times.
_CHUNK_BYTES = 64 << 20


def _chunk_rows(n: int, vocab_size: int) -> int:
    return max(1, min(n, _CHUNK_BYTES // (4 * vocab_size)))


def _forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    tokens: torch.Tensor,
    row_weight: torch.Tensor,
    bias: torch.Tensor | None,
    forbidden: torch.Tensor,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """loss [], the gradients of hidden, weight and bias where ``needs`` says so, else empty (float32 sums), invalid [1]."""
    n, vocab_size = hidden.shape[0], weight.shape[0]
    invalid = first_of((tokens < 0) | (tokens >= vocab_size))
    _, to_hidden, to_weight, to_bias, _ = _fake(hidden, weight, tokens, row_weight, bias, forbidden, needs)
    to_weight.zero_()
    to_bias.zero_()
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    rows = _chunk_rows(n, vocab_size)
    buffer = torch.empty(rows * vocab_size, dtype=torch.float32, device=hidden.device)
    w, b = weight.float(), None if bias is None else bias.float()
    for i in range(0, n, rows):
        at = slice(i, i + rows)
        h, ids = hidden[at].float(), tokens[at]
        x = _product(h, w, b, buffer)
        running = torch.full((len(h), 3), -math.inf, dtype=torch.float64, device=hidden.device)
        running[:, 1] = 0
        _fold(running, x, ids, forbidden)
        log_sum = running[:, 1].log()
        log_probs = (running[:, 2] - running[:, 0] - log_sum).clamp_max(0)
        # A row that counts nothing counts nothing, impossible tokens included.
        total -= (row_weight[at] * log_probs).masked_fill(row_weight[at] == 0, 0).sum()
        if any(needs):
            _grad(x, -row_weight[at], ids, torch.stack([running[:, 0], log_sum], 1).float(), forbidden)
        if needs[0]:
            torch.mm(x, w, out=to_hidden[at])
        if needs[1]:
            to_weight.addmm_(x.t(), h)
        if needs[2]:
            to_bias += x.sum(0)
    return total.float(), to_hidden, to_weight, to_bias, invalid


def _fake(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    tokens: torch.Tensor,
    row_weight: torch.Tensor,
    bias: torch.Tensor | None,
    forbidden: torch.Tensor,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    single = {"dtype": torch.float32}
    return (
        hidden.new_empty((), **single),
        hidden.new_empty(hidden.shape if needs[0] else (0, hidden.shape[1]), **single),
        weight.new_empty(weight.shape if needs[1] else (0, weight.shape[1]), **single),
        weight.new_empty(weight.shape[:1] if needs[2] and bias is not None else (0,), **single),
        tokens.new_empty(1),
    )


_op = define_op(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor tokens, Tensor row_weight, Tensor? bias, Tensor forbidden,"
    " bool[3] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    made_of="linear_grad",
)


def _scale(
    grad: torch.Tensor,
    to_hidden: torch.Tensor,
    to_weight: torch.Tensor,
    to_bias: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inputs are here for autograd's eyes alone: who differentiates this again is refused, and gets no silent zero."""
    return grad * to_hidden, grad * to_weight, grad * to_bias


_backward = define_op(
    "linear_cross_entropy_backward(Tensor grad, Tensor to_hidden, Tensor to_weight, Tensor to_bias, Tensor hidden, Tensor weight,"
    " Tensor? bias) -> (Tensor, Tensor, Tensor)",
    _scale,
    lambda grad, to_hidden, to_weight, to_bias, *inputs: tuple(torch.empty_like(x) for x in (to_hidden, to_weight, to_bias)),
    made_of="linear_grad",
)


def _setup(ctx, inputs, output) -> None:  # noqa: ANN001
    hidden, weight, _, _, bias, _, needs = inputs
    ctx.save_for_backward(*output[1:4], hidden, weight, bias)
    ctx.dtypes, ctx.needs = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype), needs
    ctx.mark_non_differentiable(*output[1:])


def _vjp(ctx, grad, *_unused):  # noqa: ANN001, ANN002, ANN202
    grads = _backward(grad, *ctx.saved_tensors)
    of_hidden, of_weight, of_bias = (
        g.to(dtype) if needed else None for g, dtype, needed in zip(grads, ctx.dtypes, ctx.needs, strict=True)
    )
    return of_hidden, of_weight, None, None, of_bias, None, None


register_backward("linear_cross_entropy", _vjp, _setup)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    tokens: torch.Tensor,
    row_weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    forbidden: int | list[int] | torch.Tensor | None = None,
) -> torch.Tensor:
    """sum_n row_weight[n] * -log softmax(hidden @ weight.T + bias)[n, tokens[n]], in chunks of rows: N x V logits are never stored.

    The gradients are computed with the loss, where they are needed at all, and the backward only scales them: for a loss that is a
    weighted sum of rows it is ``linear_log_probs`` in three quarters of the arithmetic. Products are float32 whatever the dtypes, and
    the loss is a float64 sum. Memory beyond the gradients is a chunk of logits, 64 MiB or one row, and a float32 copy of a ``weight``
    in half precision.

    Args:
        hidden: float32, bfloat16 or float16 [N, D]. weight: [V, D]. bias: [V] or None. All differentiable (first order).
        tokens: int64 [N].
        row_weight: float32 [N], not differentiable; 1 if None. A row of weight 0 counts nothing, whatever its token.
        forbidden: ids excluded from the softmax (an id, a list, or an int64 tensor [F]).

    Returns:
        float32 scalar, in nats; +inf where a forbidden token has weight; NaN where a row's logits hold NaN or +inf, or nothing finite.

    Raises:
        ValueError: wrong shapes, dtypes or devices; an id outside 0 .. V-1; a row_weight that wants a gradient.

    Source: the gradient beside the loss, as in Hsu et al., arXiv 2410.10989 (fused linear cross-entropy).
    """
    name = "linear_cross_entropy"
    ids = check_linear(name, hidden, weight, tokens, bias, forbidden)
    if row_weight is None:
        row_weight = torch.ones(hidden.shape[0], device=hidden.device)
    check_tensor(name, "row_weight", row_weight, torch.float32, (hidden.shape[0],), hidden.device)
    if row_weight.requires_grad:
        raise ValueError(f"{name}: row_weight: expected one without a gradient, got one that requires it; take linear_log_probs")
    on = torch.is_grad_enabled()
    needs = [on and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    loss, _, _, _, invalid = _op(hidden, weight, tokens.contiguous(), row_weight.contiguous(), bias, ids, needs)
    last = weight.shape[0] - 1
    check_invalid(name, invalid, lambda row, value: f"tokens: expected ids in 0 .. {last}, got {value} in row {row}", tokens)
    return loss
